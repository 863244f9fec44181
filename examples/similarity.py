"""Draw how similar a model finds every picture to every caption, as a matrix with the pictures along its top.

    python examples/similarity.py               the demo model on examples/images
    python examples/similarity.py my_photos     your own: my_photos/captions.csv holds image,caption

A CLIP that understands both has its brightest cells on the diagonal.
"""

import argparse
import textwrap
from pathlib import Path

import common
import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image

import miniclip

matplotlib.use("Agg")  # a file is drawn, no window
import matplotlib.pyplot as plt

plt.rcParams["text.parse_math"] = False  # a caption may hold dollars

MOST = 24


@torch.no_grad()
def similarities(model: miniclip.CLIP, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cosine similarities (texts, images)."""
    images = F.normalize(model.encode_image(pixels.to(model.device)).float(), dim=1)
    texts = F.normalize(model.encode_text(tokens.to(model.device)).float(), dim=1)
    return (texts @ images.T).cpu()


def draw(matrix: torch.Tensor, photos: list[Image.Image], captions: list[str], path: Path, title: str) -> None:
    rows, columns = matrix.shape
    cell = 0.92  # inches
    left, top = 3.1, cell + 0.55
    figure = plt.figure(figsize=(left + cell * columns + 0.15, top + cell * rows + 0.15), dpi=160)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0.15 / height, cell * columns / width, cell * rows / height))
    low, high = matrix.min().item(), matrix.max().item()
    axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high)
    for row in range(rows):
        for column in range(columns):
            value = matrix[row, column].item()
            ink = "black" if value > (low + high) / 2 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=12)
    axes.set_yticks(range(rows), [textwrap.fill(caption, 30) for caption in captions], fontsize=12)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for column, photo in enumerate(photos):
        gap = 0.04 * cell
        x, y = left + column * cell + gap, height - top + 0.06 + gap
        thumb = figure.add_axes((x / width, y / height, (cell - 2 * gap) / width, (cell - 2 * gap) / height))
        side = min(photo.size)
        x0, y0 = (photo.width - side) // 2, (photo.height - side) // 2
        thumb.imshow(photo.resize((256, 256), box=(x0, y0, x0 + side, y0 + side)))
        thumb.axis("off")
    figure.text(0.15 / width, 1 - 0.32 / height, title, fontsize=14, va="center")
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="pictures with a captions.csv (default: examples/images)")
    parser.add_argument("--model", help="a name, path or Hub repository")
    parser.add_argument("--out", type=Path, default=Path("similarity.png"), help="the PNG (default: similarity.png)")
    options = parser.parse_args()

    if options.out.suffix.lower() != ".png":
        raise SystemExit(f"{options.out}: the picture is a PNG, and its name should end in .png")
    if not options.out.resolve().parent.is_dir():
        raise SystemExit(f"there is no folder {options.out.resolve().parent}")
    folder = options.folder or common.IMAGES
    pairs = [(folder / name, lines[0]) for name, lines in common.read_captions(folder).items()]
    if len(pairs) > MOST:
        raise SystemExit(f"{folder} has {len(pairs)} pictures; a matrix that can be read has {MOST} at most")
    photos, captions = [miniclip.open_image(path) for path, _ in pairs], [caption for _, caption in pairs]
    name = common.model_name(options.model, own_images=options.folder is not None)
    model, preprocess = miniclip.load(name)
    matrix = similarities(model, preprocess(photos), miniclip.tokenize(captions, model.context_length))
    name = Path(name).name if Path(name).exists() else name
    draw(matrix, photos, captions, options.out, f"Cosine similarity, {name}")
    # By its words: two pictures may have the same caption.
    best = sum(captions[row] == caption for row, caption in zip(matrix.argmax(dim=0).tolist(), captions))
    print(f"{options.out}: the right caption scores highest for {best} of {len(photos)} pictures")


if __name__ == "__main__":
    common.main(main)
