"""Draw where the image encoder looked for a prompt: the image, and beside it one heat map per prompt.

    python examples/attention.py                                        the demo model on three sample images
    python examples/attention.py photo.jpg "a dog" "a frisbee" --out frisbee.png

The maps are the transformer attributions of Chefer, Gur and Wolf (arXiv:2103.15679, section 3). Raw attention is the
same for all prompts; an attribution is not. In every block, each attention probability is multiplied by its gradient:
how much the prompt's logit would rise with it. Negative products are set to 0, the heads are averaged, and the blocks
are chained along the residual connections.

Each map is divided by its own maximum. The colours show where the encoder looked within an image, not how well the
prompt fits. The cosine similarity above each map shows the fit.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import miniclip
from miniclip.layers import MultiheadAttention
from miniclip.model import VisionTransformer

with common.needs("examples"):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, without a window
    import matplotlib.pyplot as plt

plt.rcParams["text.parse_math"] = False  # a prompt may contain dollar signs

SAMPLES = {
    "cat.png": ("a cat", "a red heart"),
    "house.png": ("a house", "a tree"),
    "sailboat.png": ("a boat", "water"),
}
DRAWN = 512  # the least side of a drawn image, in pixels
COLOURS = "OrRd"  # light at zero, and readable in print
SIDE, GAP, TITLE, MARGIN = 2.3, 0.12, 0.42, 0.1  # inches


def attention_probabilities(attention: MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (L, N, W) -> the attention probabilities (N, heads, L, L) and the values (N, heads, L, d).

    The model's own attention is fused and never stores the probabilities.
    """
    length, batch, width = x.shape
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (L, N, 3W)
    q, k, v = qkv.view(length, batch, 3, attention.heads, width // attention.heads).permute(2, 1, 3, 0, 4)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1), v


def encode_image(visual: VisionTransformer, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``visual.forward`` step by step. Returns the embeddings (N, D) and each block's attention (N, heads, L, L)."""
    # The parameters are frozen, so autograd would record nothing unless the input requires a gradient.
    x = visual.ln_pre(visual.embed(pixels)).requires_grad_().transpose(0, 1)  # (L, N, W)
    attentions = []
    blocks: Iterable[Any] = visual.transformer.resblocks
    for block in blocks:
        attention, values = attention_probabilities(block.attn, block.ln_1(x))
        attentions.append(attention)
        x = x + block.attn.out_proj((attention @ values).permute(2, 0, 1, 3).reshape(x.shape))
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[0]) @ visual.proj, attentions


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The relevance of each patch for the class token, (N, patches): its row in equations 5 and 6."""
    length = attentions[0].shape[-1]
    total = torch.eye(length, dtype=attentions[0].dtype, device=attentions[0].device)
    for attention, gradient in zip(attentions, gradients):
        step = (gradient * attention).clamp(min=0).mean(dim=1)  # (N, L, L)
        total = total + step @ total
    return total[:, 0, 1:]


def heat_maps(model: miniclip.CLIP, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """One image (3, S, S) -> a map per prompt, (prompts, grid, grid), with maximum 1, and the cosines (prompts,)."""
    with torch.no_grad():
        tokens = miniclip.tokenize(prompts, model.context_length).to(model.device)
        texts = F.normalize(model.encode_text(tokens), dim=1)
    image, attentions = encode_image(model.visual, pixels[None].to(model.device))
    cosines = texts @ F.normalize(image, dim=1)[0]  # (prompts,)
    maps = []
    for logit in model.logit_scale.exp() * cosines:
        gradients = torch.autograd.grad(logit, attentions, retain_graph=True)
        maps.append(relevance([attention.detach() for attention in attentions], gradients)[0])
    grid = model.config.vision.grid
    stacked = torch.stack(maps).view(-1, grid, grid)
    highest = stacked.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(stacked.dtype).tiny)
    return (stacked / highest).cpu(), cosines.detach().cpu()


def seen_square(preprocess: miniclip.Preprocess, image: Image.Image) -> np.ndarray:
    """The square that preprocessing crops, (side, side, 3) from 0 to 1, at a higher resolution than the model's."""
    times = -(-DRAWN // preprocess.size)
    short = preprocess.shortest_edge and times * preprocess.shortest_edge
    pixels = dataclasses.replace(preprocess, size=times * preprocess.size, shortest_edge=short)(image)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def overlay(square: np.ndarray, heat: Tensor) -> np.ndarray:
    """The map, enlarged with bicubic interpolation, over a pale grey version of the image."""
    side = len(square)
    heat = F.interpolate(heat[None, None], size=(side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    grey = 0.5 + 0.5 * square @ np.array([0.299, 0.587, 0.114])
    colour: np.ndarray = plt.get_cmap(COLOURS)(heat.numpy())[..., :3]
    return grey[..., None] * colour


Row = tuple[np.ndarray, Sequence[str], Tensor, Tensor]  # an image's square, its prompts, their maps, their cosines


def draw(rows: Sequence[Row], path: Path) -> None:
    """One row per image: the square that the model saw, then the map of each prompt. One colour bar for all."""
    columns = 1 + max(len(prompts) for _, prompts, _, _ in rows)
    width = MARGIN + columns * (SIDE + GAP) + 0.75
    height = len(rows) * (TITLE + SIDE + GAP)
    figure = plt.figure(figsize=(width, height), dpi=220)

    def panel(row: int, column: int, image: np.ndarray, words: str) -> None:
        x, y = MARGIN + column * (SIDE + GAP), height - (row + 1) * (TITLE + SIDE) - row * GAP
        axes = figure.add_axes((x / width, y / height, SIDE / width, SIDE / height))
        axes.imshow(image, interpolation="lanczos")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(color="0.6", linewidth=0.6)
        axes.set_title(words, fontsize=10, pad=4, linespacing=1.15)

    for row, (square, prompts, maps, cosines) in enumerate(rows):
        panel(row, 0, square, "" if row else "what the model saw")
        for column, (prompt, heat, cosine) in enumerate(zip(prompts, maps, cosines), start=1):
            words = textwrap.fill(textwrap.shorten(prompt, 60, placeholder=" …"), 32)
            number = f"{cosine:z.2f}".replace("-", "−")
            panel(row, column, overlay(square, heat), f"{words}\ncosine {number}")
    x = MARGIN + columns * (SIDE + GAP)
    bar = figure.add_axes((x / width, GAP / height, 0.12 / width, (height - TITLE - GAP) / height))
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOURS)
    figure.colorbar(colours, cax=bar, ticks=[0, 0.5, 1]).set_label("relevance, divided by its maximum", fontsize=9)
    bar.tick_params(labelsize=9)
    figure.savefig(path, facecolor="white", bbox_inches="tight")  # a title of three lines is not cut off
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?", help="an image file (default: sample images)")
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="what to look for in the image")
    parser.add_argument("--model", help="a name, path or Hub repository")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the PNG (default: attention.png)")
    options = parser.parse_args()

    common.check_figure_path(options.out)
    if options.image is not None and not options.prompts:
        raise SystemExit(f"say what to look for in {options.image}: give one or more prompts after it")
    samples = {common.IMAGES / name: prompts for name, prompts in SAMPLES.items()}
    wanted = samples if options.image is None else {options.image: options.prompts}
    images = [miniclip.open_image(path) for path in wanted]
    name = common.model_name(options.model, own_images=options.image is not None)
    model, preprocess = miniclip.load(name, dtype=torch.float32)  # float16 would round small gradients to 0

    rows = []
    for image, prompts in zip(images, wanted.values()):
        rows.append((seen_square(preprocess, image), prompts, *heat_maps(model, preprocess(image), prompts)))
    draw(rows, options.out)
    print(f"{options.out}: {sum(len(prompts) for prompts in wanted.values())} heat maps")


if __name__ == "__main__":
    common.main(main)
