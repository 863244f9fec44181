"""What a step of training consists of: initial weights, optimiser, learning rate, patch dropout and loss."""

import argparse
import math

import torch
import torch.nn.functional as F
from pairs import Batch
from torch import Tensor, nn

import miniclip
from miniclip.model import VisionTransformer

LOGIT_SCALE_LIMIT = math.log(100)  # section 2.5 of the paper: logits are never scaled by more than 100
WHOLE_IMAGES = 0.1  # the last share of a run, which sees all patches


def initialise(model: miniclip.CLIP, vocabulary: Tensor) -> None:
    """Random weights with openai/CLIP's standard deviations, except for the token embeddings.

    OpenAI draws all token embeddings with 0.02, because each of their tokens occurs in training. Here only the tokens
    in ``vocabulary`` (K,) do. The others get 0.001, so that a word without training says little.
    """
    text, vision = model.config.text, model.config.vision
    for tower, transformer in ((vision, model.visual.transformer), (text, model.transformer)):
        residual = tower.width**-0.5 * (2 * tower.layers) ** -0.5
        deviations = {"in_proj_weight": tower.width**-0.5, "out_proj.weight": residual}
        deviations |= {"c_fc.weight": (2 * tower.width) ** -0.5, "c_proj.weight": residual}
        for name, parameter in transformer.named_parameters():
            for ending, std in deviations.items():
                if name.endswith(ending):
                    nn.init.normal_(parameter, std=std)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.visual.conv1.weight, std=(3 * 3 * vision.patch_size**2) ** -0.5)
    for name in ("class_embedding", "positional_embedding", "proj"):
        nn.init.normal_(model.visual.get_parameter(name), std=vision.width**-0.5)
    nn.init.normal_(model.token_embedding.weight, std=0.001)
    with torch.no_grad():
        model.token_embedding.weight[vocabulary] *= 20
    nn.init.normal_(model.positional_embedding, std=0.01)
    nn.init.normal_(model.text_projection, std=text.width**-0.5)
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))


def optimiser_for(model: miniclip.CLIP, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW. Gains and biases, which are the parameters with fewer than two dimensions, do not decay (section 2.5)."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """A linear warm-up, then half a cosine down to 0."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def patches_to_keep(step: int, patches: int, options: argparse.Namespace) -> int:
    """How many of an image's patches the tower sees at this step."""
    if step >= options.steps * (1 - WHOLE_IMAGES):
        return patches
    return max(1, round(patches * (1 - options.patch_dropout)))


def encode_some_patches(visual: VisionTransformer, images: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """The image tower on ``keep`` patches, drawn for each image (FLIP, arXiv:2212.00794): (N, 3, S, S) -> (N, D)."""
    x = visual.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, W)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    chosen = torch.rand(x.shape[0], x.shape[1] - 1, device=x.device, generator=generator).argsort(dim=1)[:, :keep] + 1
    x = torch.cat([x[:, :1], x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))], dim=1)  # (N, 1 + keep, W)
    x = visual.transformer(visual.ln_pre(x).transpose(0, 1))  # (1 + keep, N, W)
    return visual.ln_post(x[0]) @ visual.proj


def loss_of(model: miniclip.CLIP, images: Tensor, batch: Batch, keep: int, generator: torch.Generator | None) -> Tensor:
    """The contrastive loss of a batch with normalised images (N, 3, S, S), a scalar.

    With several captions per image it is the mean of the losses with the first ones, the second ones, and so on. A
    caption that is true of another image as well, such as "an animal", is no wrong answer for that image. These
    pairs are left out of both sums of the loss.

    With a generator the image tower sees ``keep`` patches only. Without one, as in validation, it sees all of them.
    """
    if generator is not None and keep < model.config.vision.grid**2:
        image_features = encode_some_patches(model.visual, images, keep, generator)
    else:
        image_features = model.encode_image(images)
    image_features = F.normalize(image_features.float(), dim=1)
    text_features = F.normalize(model.encode_text(batch.tokens.flatten(0, 1)).float(), dim=1)  # (C N, D)
    with torch.autocast(images.device.type, enabled=False):  # half precision is too coarse for logits near 100
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (N, C N)
        groups = zip(logits.split(len(images), dim=1), batch.also_true)
        losses = [miniclip.contrastive_loss(group.masked_fill(also_true, -torch.inf)) for group, also_true in groups]
        return torch.stack(losses).mean()


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 if the device multiplies matrices in it, else None. Unlike float16 it needs no loss scaling."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else None
