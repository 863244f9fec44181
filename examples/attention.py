"""Draw where the image encoder looked for a prompt: the image, and beside it one heat map per prompt.

    python examples/attention.py                                        the demo model on the sample images
    python examples/attention.py photo.jpg "a dog" "a frisbee" --model ViT-B/32 --out frisbee.png

Without arguments a rule chooses what is shown. The prompt of each sample image is the plain noun that is its file's
name, such as "cat" for cat.png. Every image is shown whose cosine with this prompt is positive, and the others are
printed. With your own image, all prompts are shown.

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

DRAWN = 512  # the least side of a drawn image, in pixels
COLOURS = "RdPu"  # its darker half, because its pale one would wash out the colours of the image
OPACITY = 0.85  # of the most relevant place: the image still shows through
COLUMNS = 6  # three sample images, each with its map
LETTERS = 22  # in a line above a panel
SIDE, GAP, TITLE, LINE, MARGIN, BAR_LABELS = 1.7, 0.12, 0.28, 0.17, 0.1, 0.65  # inches


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


def blend(square: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay the heat over an image. Without heat the image keeps its colours; more heat covers more of it.

    Args:
        square: the image, (..., 3) from 0 to 1.
        heat: (...), from 0 to 1.

    Returns:
        (..., 3) from 0 to 1.
    """
    alpha: np.ndarray = OPACITY * heat[..., None]
    colour: np.ndarray = plt.get_cmap(COLOURS)(0.5 + 0.5 * heat)[..., :3]
    blended: np.ndarray = (1 - alpha) * square + alpha * colour
    return blended.clip(0, 1)  # rounding may exceed 1


def overlay(square: np.ndarray, heat: Tensor) -> np.ndarray:
    """The map (grid, grid), enlarged with bicubic interpolation, over the image (side, side, 3)."""
    side = len(square)
    heat = F.interpolate(heat[None, None], size=(side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    return blend(square, heat.numpy())


Panel = tuple[np.ndarray, str]  # an image (side, side, 3) from 0 to 1, and the words above it


def panels(name: str, square: np.ndarray, prompts: Sequence[str], maps: Tensor, cosines: Tensor) -> list[Panel]:
    """The square that the model saw, under the name of its file, then an overlay for each prompt."""
    shown = [(square, short(name))]
    for prompt, heat, cosine in zip(prompts, maps, cosines.tolist()):
        shown.append((overlay(square, heat), f"{short(prompt)}\ncosine {common.two_decimals(cosine)}"))
    return shown


def short(words: str) -> str:
    """The words on at most three lines, each no wider than a panel."""
    return "\n".join(textwrap.wrap(words, LETTERS, max_lines=3, placeholder=" …"))


def draw(shown: Sequence[Panel], columns: int, path: Path) -> None:
    """Draw the panels row by row, ``columns`` in a row, and one colour bar for all."""
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    title = TITLE + LINE * max(words.count("\n") for _, words in shown)
    width, height = MARGIN + columns * (SIDE + GAP) + BAR_LABELS, rows * (title + SIDE + GAP)
    figure = plt.figure(figsize=(width, height), dpi=160)
    for index, (image, words) in enumerate(shown):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * (SIDE + GAP), height - (row + 1) * (title + SIDE) - row * GAP
        axes = figure.add_axes((x / width, y / height, SIDE / width, SIDE / height))
        axes.imshow(image, interpolation="lanczos")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(color="0.6", linewidth=0.6)
        axes.set_title(words, fontsize=10, pad=4, linespacing=1.15)
    x = MARGIN + columns * (SIDE + GAP)
    bar = figure.add_axes((x / width, GAP / height, 0.12 / width, (height - title - GAP) / height))
    ramp = blend(np.ones((256, 3)), np.linspace(0, 1, 256))  # what the heat looks like on white
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), matplotlib.colors.ListedColormap(ramp))
    figure.colorbar(colours, cax=bar, ticks=[0, 0.5, 1]).set_label("relevance / its maximum", fontsize=9)
    bar.tick_params(labelsize=9)
    figure.savefig(path, facecolor="white", bbox_inches="tight")  # a long title is not cut off
    plt.close(figure)


def sample_prompts() -> dict[Path, list[str]]:
    """For each sample image one prompt: the plain noun that is its file's name, such as "cat" for cat.png."""
    return {common.IMAGES / name: [Path(name).stem.replace("_", " ")] for name in common.read_captions(common.IMAGES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?", help="an image file (default: sample images)")
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="what to look for in the image")
    parser.add_argument("--model", help=common.MODEL_HELP)
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the PNG (default: attention.png)")
    options = parser.parse_args()

    common.check_figure_path(options.out)
    if options.image is not None and not options.prompts:
        raise SystemExit(f"say what to look for in {options.image}: give one or more prompts after it")
    name = common.model_name(options.model, own_images=options.image is not None)
    wanted = sample_prompts() if options.image is None else {options.image: options.prompts}
    images = [miniclip.open_image(path) for path in wanted]
    model, preprocess = miniclip.load(name, dtype=torch.float32)  # float16 would round small gradients to 0

    shown: list[Panel] = []
    left_out = []
    for image, (path, prompts) in zip(images, wanted.items()):
        maps, cosines = heat_maps(model, preprocess(image), prompts)
        if options.image is None and not cosines[0] > 0:
            left_out.append(f"{prompts[0]} ({common.two_decimals(cosines[0].item())})")
        else:
            shown += panels(path.name, seen_square(preprocess, image), prompts, maps, cosines)
    if not shown:
        raise SystemExit("no sample image has a positive cosine with its noun, so there is nothing to show")
    draw(shown, COLUMNS, options.out)
    print(f"{options.out}: {sum(map(len, wanted.values())) - len(left_out)} heat maps")
    if left_out:
        print(f"left out, because the cosine is not positive: {', '.join(left_out)}")


if __name__ == "__main__":
    common.main(main)
