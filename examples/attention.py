"""Draw where the image encoder looked for a prompt: the picture, and beside it a heat map for every prompt.

    python examples/attention.py                                        the demo model on sample pictures
    python examples/attention.py photo.jpg "a dog" "a frisbee" --out frisbee.png

The maps are transformer attributions after Chefer, Gur and Wolf (arXiv:2103.15679, section 3), not raw attention: in
every block each attention probability is weighted by how much the prompt's logit would gain from it, what would lower
the logit is dropped, the heads are averaged, and the blocks are chained along the residual connections. Raw attention
is the same for all prompts; this is not. Each map is scaled to its own highest value, so the colours tell where the
encoder looked within a picture, not how well the prompt fits: that is the cosine similarity, printed with each map.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import miniclip
from miniclip.layers import MultiheadAttention
from miniclip.model import VisionTransformer

matplotlib.use("Agg")  # a file is drawn, no window
import matplotlib.pyplot as plt

plt.rcParams["text.parse_math"] = False  # a prompt may hold dollars

SAMPLES = {
    "cat.png": ("a cat", "a red heart"),
    "house.png": ("a house", "a tree"),
    "sailboat.png": ("a boat", "water"),
}
DRAWN = 512  # pixels of a drawn picture's side, at least
COLOURS = "OrRd"  # light where there is nothing, and readable in print


def attention_probabilities(attention: MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (L, N, W) -> how much every token takes from every other (N, heads, L, L), and the values (N, heads, L, d).

    The model's own attention is fused and never has the first in memory.
    """
    length, batch, width = x.shape
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (L, N, 3W)
    q, k, v = qkv.view(length, batch, 3, attention.heads, width // attention.heads).permute(2, 1, 3, 0, 4)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1), v


def encode_image(visual: VisionTransformer, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``visual.forward`` step by step: the embeddings (N, D), and every block's attention (N, heads, L, L)."""
    # The parameters are frozen; autograd only records what follows from a tensor that requires a gradient.
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
    """How much each patch counts for the class token, (N, patches): equations 5 and 6, that token's row."""
    length = attentions[0].shape[-1]
    total = torch.eye(length, dtype=attentions[0].dtype, device=attentions[0].device)
    for attention, gradient in zip(attentions, gradients):
        step = (gradient * attention).clamp(min=0).mean(dim=1)  # (N, L, L)
        total = total + step @ total
    return total[:, 0, 1:]


def heat_maps(model: miniclip.CLIP, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """One picture (3, S, S) -> for every prompt a map (prompts, grid, grid), 1 at its highest, and the cosine."""
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


def seen_square(preprocess: miniclip.Preprocess, photo: Image.Image) -> np.ndarray:
    """The square that preprocessing cuts out, (side, side, 3) from 0 to 1: drawn finer than the model sees it."""
    times = -(-DRAWN // preprocess.size)
    short = preprocess.shortest_edge and times * preprocess.shortest_edge
    pixels = dataclasses.replace(preprocess, size=times * preprocess.size, shortest_edge=short)(photo)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def overlay(square: np.ndarray, heat: Tensor) -> np.ndarray:
    """The map over the picture in pale grey, whose lines show through: bicubic, as smooth as patches allow."""
    side = len(square)
    heat = F.interpolate(heat[None, None], size=(side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    grey = 0.5 + 0.5 * square @ np.array([0.299, 0.587, 0.114])
    colour: np.ndarray = plt.get_cmap(COLOURS)(heat.numpy())[..., :3]
    return grey[..., None] * colour


Row = tuple[np.ndarray, Sequence[str], Tensor, Tensor]  # a square, its prompts, their maps, their cosines


def draw(rows: Sequence[Row], path: Path) -> None:
    side, gap, title, margin, bar = 2.3, 0.12, 0.46, 0.1, 0.75  # inches
    columns = 1 + max(len(prompts) for _, prompts, _, _ in rows)
    width = margin + columns * (side + gap) + bar
    height = margin + len(rows) * (title + side) + margin
    figure = plt.figure(figsize=(width, height), dpi=220)

    def panel(row: int, column: int, picture: np.ndarray, words: str) -> None:
        x, y = margin + column * (side + gap), height - margin - (row + 1) * (title + side)
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        axes.imshow(picture, interpolation="lanczos")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(color="0.6", linewidth=0.6)
        axes.set_title(words, fontsize=9, pad=4, linespacing=1.15)

    for row, (square, prompts, maps, cosines) in enumerate(rows):
        panel(row, 0, square, "" if row else "what the model saw")
        for column, (prompt, heat, cosine) in enumerate(zip(prompts, maps, cosines), start=1):
            words = textwrap.shorten(prompt, 70, placeholder=" …")
            panel(row, column, overlay(square, heat), f"{textwrap.fill(words, 36)}\ncosine {cosine:.2f}")
    x = margin + columns * (side + gap)
    scale = figure.add_axes((x / width, 2 * margin / height, 0.12 / width, (side - margin) / height))
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOURS)
    figure.colorbar(colours, cax=scale, ticks=[0, 0.5, 1]).set_label("relevance / its maximum", fontsize=8)
    scale.tick_params(labelsize=8)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?", help="a picture file (default: sample pictures)")
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="what to look for in it")
    parser.add_argument("--model", help="a name, path or Hub repository")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the PNG (default: attention.png)")
    options = parser.parse_args()

    if options.out.suffix.lower() != ".png":
        raise SystemExit(f"{options.out}: the picture is a PNG, and its name should end in .png")
    if not options.out.resolve().parent.is_dir():
        raise SystemExit(f"there is no folder {options.out.resolve().parent}")
    if options.image is not None and not options.prompts:
        raise SystemExit(f"what to look for in {options.image}? Give a prompt, or several, behind it")
    samples = {common.IMAGES / name: prompts for name, prompts in SAMPLES.items()}
    wanted = samples if options.image is None else {options.image: options.prompts}
    photos = [miniclip.open_image(path) for path in wanted]
    name = common.model_name(options.model, own_images=options.image is not None)
    model, preprocess = miniclip.load(name, dtype=torch.float32)  # half precision would round small gradients to 0

    rows = []
    for photo, prompts in zip(photos, wanted.values()):
        rows.append((seen_square(preprocess, photo), prompts, *heat_maps(model, preprocess(photo), prompts)))
    draw(rows, options.out)
    print(f"{options.out}: {sum(len(prompts) for prompts in wanted.values())} heat maps")


if __name__ == "__main__":
    common.main(main)
