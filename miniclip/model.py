"""CLIP as in the paper (Radford et al. 2021, arXiv:2103.00020), under OpenAI's names.

The state_dict and the (L, N, W) contract of the transformers are those of openai/CLIP. In the shape comments
N is the batch, L the sequence length, W a tower's width, D the width of the joint space and S the image size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.config import CLIPConfig, TransformerConfig, VisionConfig
from miniclip.errors import InputError
from miniclip.fast import Kernels, repeated
from miniclip.layers import ACTIVATIONS, Conv2d, Embedding, Linear, MultiheadAttention


@repeated("forward")
class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block: (L, N, W) -> (L, N, W)."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.attn = MultiheadAttention(config.width, config.heads, causal)
        self.ln_1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=Linear(config.width, config.mlp_width),
                gelu=ACTIVATIONS[config.activation](),
                c_proj=Linear(config.mlp_width, config.width),
            )
        )
        self.ln_2 = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@repeated("forward")
class Transformer(nn.Module):
    """A stack of blocks: (L, N, W) -> (L, N, W). A causal one masks by itself."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.width = config.width
        self.layers = config.layers
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(config, causal) for _ in range(config.layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """The input and the output of every block, batch first: layers + 1 tensors (N, L, W)."""
        states = [x]
        for block in self.resblocks:
            states.append(block(states[-1]))
        return [state.transpose(0, 1) for state in states]


@repeated("forward", "embed")
class VisionTransformer(nn.Module):
    """The image tower: (N, 3, S, S) normalised pixels -> (N, D) embeddings, not normalised."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        self.conv1 = Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2 + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.transformer = Transformer(config, causal=False)
        self.ln_post = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.proj = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.ln_pre(self.embed(images))  # (N, L, W)
        x = self.transformer(x.transpose(0, 1))  # (L, N, W)
        return self.ln_post(x[0]) @ self.proj  # (N, D): the class token's

    def embed(self, images: Tensor) -> Tensor:
        """Patch embeddings behind the class token, positions added: (N, 3, S, S) -> (N, L, W), L = patches + 1."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, W)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)  # (N, 1, W)
        return torch.cat([class_token, x], dim=1) + self.positional_embedding  # (N, L, W)

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        """What enters the first block (after ``ln_pre``), then every block's output: layers + 1 tensors (N, L, W)."""
        images = self.check(images)
        return self.transformer.hidden_states(self.ln_pre(self.embed(images)).transpose(0, 1))

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Each patch in the joint space: (N, 3, S, S) -> (N, patches, D), row by row from the top left."""
        return self.ln_post(self.hidden_states(images)[-1][:, 1:]) @ self.proj

    def check(self, images: Tensor) -> Tensor:
        """The images in the tower's dtype.

        Raises:
            InputError: if they are not (N, 3, S, S) floating-point pixels on the tower's device.
        """
        size = self.input_resolution
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a tensor (N, 3, {size}, {size}), got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise InputError(f"images must be (N, 3, {size}, {size}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"images must be normalised floating-point pixels, got {images.dtype}: use preprocess")
        weight = self.conv1.weight
        if images.device != weight.device:
            raise InputError(f"images are on {images.device}, the model is on {weight.device}")
        return images.to(weight.dtype)


@repeated("forward", "embed")
class TextTransformer(nn.Module):
    """The text tower of a CLIP as a module of its own: (N, L) token ids -> (N, D) embeddings, not normalised.

    OpenAI's layout keeps the tower's parts on the CLIP itself. This borrows them, so that the tower can be compiled
    or exported alone; it is made on request and never part of the state_dict.
    """

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.training = clip.training
        self.end_of_text = clip.config.text.end_of_text
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer(self.embed(tokens).transpose(0, 1))  # (L, N, W)
        x = x[self.end_positions(tokens), torch.arange(tokens.shape[0], device=tokens.device)]  # (N, W)
        return self.ln_final(x) @ self.text_projection  # (N, D)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings with positions added: (N, L) -> (N, L, W)."""
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def end_positions(self, tokens: Tensor) -> Tensor:
        """Where each row is pooled, (N,): at its first end-of-text token (argmax returns the first of equals)."""
        return (tokens if self.end_of_text is None else (tokens == self.end_of_text).int()).argmax(dim=1)


@repeated("text")
class CLIP(nn.Module):
    """Contrastive language-image pre-training: an image tower and a text tower that meet in one space.

    A model from ``miniclip.load`` is in eval mode and frozen; ``requires_grad_(True)`` makes it trainable. Building
    one directly gives uninitialised parameters.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.text.context_length
        self.vocab_size = config.text.vocab_size
        width = config.text.width
        self.visual = VisionTransformer(config.vision, config.embed_dim)
        self.transformer = Transformer(config.text, causal=True)
        self.token_embedding = Embedding(config.text.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.text.context_length, width))
        self.ln_final = nn.LayerNorm(width, config.text.layer_norm_eps)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        #: False runs the plain modules on everything.
        self.fast = True
        self._kernels = Kernels()

    def _apply(self, *arguments: Any, **settings: Any) -> CLIP:  # what to(), half(), cuda() and their like come to
        self._kernels.clear()
        return super()._apply(*arguments, **settings)  # type: ignore[no-untyped-call]

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.visual.conv1.weight.device

    @property
    def text(self) -> TextTransformer:
        """The text tower as one module, sharing this model's parameters. Made anew each time: keep what you compile."""
        return TextTransformer(self)

    def encode_image(self, image: Tensor) -> Tensor:
        """Images (N, 3, S, S), preprocessed, in any floating dtype -> embeddings (N, D), not normalised.

        Raises:
            InputError: if the images have another shape, dtype or device.
        """
        images = self.visual.check(image)
        if len(images) and (tower := self._kernels.image(self, images)):
            with torch.no_grad():
                return tower(images)
        return self.visual(images)

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (N, L), L at most ``context_length`` -> embeddings (N, D), not normalised.

        Raises:
            InputError: if the ids have another shape, dtype or device, are outside the vocabulary, or a row lacks
                its end token.
        """
        # A trace or an export would keep this batch's lengths and verdicts for good.
        traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        lengths = [] if traced else self._check_tokens(text)
        if lengths and (tower := self._kernels.text(self, text, lengths)):
            with torch.no_grad():
                embeddings = tower(self, text, lengths)
            if embeddings.isfinite().all():  # texts that share a beginning would share a NaN as well
                return embeddings
        if self.fast and lengths:
            # Exact: under the causal mask nothing behind the end token reaches the position that is pooled.
            text = text[:, : max(lengths)]
        return self.text(text)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) and token ids (M, L) -> (logits_per_image (N, M), logits_per_text (M, N)).

        A logit is exp(logit_scale) times the cosine similarity of an image and a text.
        """
        image_features = self.encode_image(image)  # (N, D)
        text_features = self.encode_text(text)  # (M, D)
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T  # (N, M)
        return logits_per_image, logits_per_image.T

    def hidden_states(self, text: Tensor) -> list[Tensor]:
        """The text tower's embeddings, then every block's output: layers + 1 tensors (N, L, W). Never cut."""
        self._check_tokens(text)
        return self.transformer.hidden_states(self.text.embed(text).transpose(0, 1))

    def _check_tokens(self, tokens: Tensor) -> list[int]:
        """The length of every row, its end token included."""
        if not isinstance(tokens, Tensor):
            raise InputError(f"text must be a tensor of token ids (N, L), got {type(tokens).__name__}: use tokenize")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise InputError(f"text must be (N, L) with L from 1 to {self.context_length}, got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise InputError(f"token ids must be int32 or int64, got {tokens.dtype}")
        if tokens.device != self.device:
            raise InputError(f"text is on {tokens.device}, the model is on {self.device}")
        if not len(tokens):
            return []
        # Checked here because an id out of range inside a CUDA kernel takes the process along; in one transfer.
        position = self.text.end_positions(tokens)
        end = tokens.gather(1, position[:, None])[:, 0]
        rows = torch.stack([tokens.amin(dim=1).long(), tokens.amax(dim=1).long(), end.long(), position], dim=1).tolist()
        end_of_text = self.config.text.end_of_text
        for row, (low, high, end_id, _) in enumerate(rows):
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise InputError(f"text {row} holds the id {bad}, the vocabulary ends at {self.vocab_size - 1}")
            if end_of_text is not None and end_id != end_of_text:
                raise InputError(f"text {row} has no end token ({end_of_text}) among its {tokens.shape[1]} ids")
        return [position + 1 for *_, position in rows]
