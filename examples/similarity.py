"""Draw the similarity of all images and all captions as a matrix, with the images above its columns.

    python examples/similarity.py                                 the demo model on examples/images
    python examples/similarity.py my_images --model ViT-B/32      my_images/captions.csv has the columns image,caption

A CLIP that knows both the images and the words has its brightest cells on the diagonal. The colours run from the
lowest to the highest similarity of the matrix, so two figures compare by their numbers, not by their colours.
"""

import argparse
import textwrap
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from PIL import Image

import miniclip

with common.needs("examples"):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, without a window
    import matplotlib.pyplot as plt

plt.rcParams["text.parse_math"] = False  # a caption may contain dollar signs

MAX_IMAGES = 24
CELL, LABELS, HEADER, MARGIN = 0.92, 2.6, 1.85, 0.15  # inches
BAR, BAR_LABELS = 0.22, 0.85  # inches: the width of the colour bar, and of the numbers and words beside it
LABEL_WIDTH = 26  # letters


@torch.no_grad()
def similarities(model: miniclip.CLIP, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cosine similarities (texts, images)."""
    images = F.normalize(model.encode_image(pixels.to(model.device)).float(), dim=1)
    texts = F.normalize(model.encode_text(tokens.to(model.device)).float(), dim=1)
    return (texts @ images.T).cpu()


def central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((256, 256), box=(left, top, left + side, top + side))


def wrapped(caption: str) -> str:
    """The caption on as few lines as possible, of about equal length."""
    lines = len(textwrap.wrap(caption, LABEL_WIDTH))
    width = next(width for width in range(1, LABEL_WIDTH + 1) if len(textwrap.wrap(caption, width)) == lines)
    return textwrap.fill(caption, width)


def draw(matrix: torch.Tensor, images: list[Image.Image], captions: list[str], path: Path, about: str) -> None:
    """Draw the matrix with its title and its colour bar.

    Args:
        matrix: cosine similarities (captions, images).
        images: what stands above the columns, cropped to the central square.
        captions: what stands beside the rows.
        path: the PNG.
        about: the model and the images, for the line below the title.
    """
    rows, columns = matrix.shape
    width, height = LABELS + CELL * columns + 2 * MARGIN + BAR + BAR_LABELS, HEADER + CELL * rows + MARGIN
    figure = plt.figure(figsize=(width, height), dpi=160)
    axes = figure.add_axes((LABELS / width, MARGIN / height, CELL * columns / width, CELL * rows / height))
    low, high = matrix.min().item(), matrix.max().item()
    cells = axes.imshow(matrix.numpy(), cmap="viridis", vmin=low, vmax=high)
    best = matrix.argmax(dim=0).tolist()
    for row in range(rows):
        for column in range(columns):
            value = matrix[row, column].item()
            number = common.two_decimals(value)
            ink = "black" if value > (low + high) / 2 else "white"
            weight = "bold" if best[column] == row else "normal"
            axes.text(column, row, number, ha="center", va="center", color=ink, fontsize=12, fontweight=weight)
    axes.set_yticks(range(rows), [wrapped(caption) for caption in captions], fontsize=12)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    gap = 0.04 * CELL
    side = CELL - 2 * gap
    for column, image in enumerate(images):
        x, y = LABELS + CELL * column + gap, MARGIN + CELL * rows + 2 * gap
        thumbnail = figure.add_axes((x / width, y / height, side / width, side / height))
        thumbnail.imshow(central_square(image))
        thumbnail.axis("off")
    x = LABELS + CELL * columns + MARGIN
    bar = figure.add_axes((x / width, MARGIN / height, BAR / width, CELL * rows / height))
    figure.colorbar(cells, cax=bar).set_label("cosine similarity", fontsize=12)
    bar.tick_params(labelsize=11)
    title = "Cosine similarity of captions (rows) and images (columns)"
    figure.text(LABELS / width, 1 - 0.3 / height, title, fontsize=15, va="center")
    figure.text(LABELS / width, 1 - 0.62 / height, about, fontsize=12, va="center", color="0.3")
    figure.savefig(path, facecolor="white", bbox_inches="tight")  # a long title is not cut off
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="images with a captions.csv (default: examples/images)")
    parser.add_argument("--model", help=common.MODEL_HELP)
    parser.add_argument("--out", type=Path, default=Path("similarity.png"), help="the PNG (default: similarity.png)")
    options = parser.parse_args()

    common.check_figure_path(options.out)
    name = common.model_name(options.model, own_images=options.folder is not None)
    folder = options.folder or common.IMAGES
    captions_of = common.read_captions(folder)
    if len(captions_of) > MAX_IMAGES:
        raise SystemExit(f"{folder} has {len(captions_of)} images; a readable matrix has at most {MAX_IMAGES}")
    images = [miniclip.open_image(folder / name) for name in captions_of]
    captions = [lines[0] for lines in captions_of.values()]
    model, preprocess = miniclip.load(name)
    matrix = similarities(model, preprocess(images), miniclip.tokenize(captions, model.context_length))
    name = Path(name).name if Path(name).exists() else name
    source = "examples/images" if options.folder is None else folder.resolve().name
    about = f"the model {name} on the images of {source}; bold: the caption nearest to each image"
    draw(matrix, images, captions, options.out, about)
    # Compare the captions instead of the indices, because two images may have the same caption.
    right = sum(captions[row] == caption for row, caption in zip(matrix.argmax(dim=0).tolist(), captions))
    print(f"{options.out}: the right caption scores highest for {right} of {len(images)} images")


if __name__ == "__main__":
    common.main(main)
