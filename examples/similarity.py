"""Draw how similar a model finds every picture to every caption, as a matrix with the pictures along its top.

    python examples/similarity.py                        eight pictures that scikit-image ships
    python examples/similarity.py --folder my_photos     your own: my_photos/captions.csv holds image,caption

A CLIP that understands both has its brightest cells on the diagonal.
"""

import argparse
import csv
import textwrap
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image

import miniclip

matplotlib.use("Agg")  # a file is drawn, no window
import matplotlib.pyplot as plt

# scikit-image's name of each picture, and what a person would say it shows
CAPTIONS = {
    "astronaut": "a smiling astronaut in an orange space suit",
    "chelsea": "the face of a tabby cat",
    "coffee": "a cup of espresso on a saucer, with a spoon",
    "rocket": "a rocket standing on its launch pad",
    "camera": "a man looking through a camera on a tripod",
    "horse": "the black silhouette of a horse",
    "motorcycle_left": "a motorcycle parked in a garage",
    "page": "a page of printed text",
}


def sample_photos() -> tuple[list[Image.Image], list[str]]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    paths = [next(folder.glob(f"{name}.*")) for name in CAPTIONS]
    return [miniclip.open_image(path) for path in paths], list(CAPTIONS.values())


def captioned_folder(folder: Path) -> tuple[list[Image.Image], list[str]]:
    try:
        with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise SystemExit(f"similarity.py: {folder} has no captions.csv with the columns image,caption") from None
    except KeyError as missing:
        raise SystemExit(f"similarity.py: {folder / 'captions.csv'} has no column {missing}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"similarity.py: {folder / 'captions.csv'} is not UTF-8 ({error.reason})") from None
    if not rows:
        raise SystemExit(f"similarity.py: {folder / 'captions.csv'} lists no pictures")
    for number, (image, caption) in enumerate(rows, start=2):  # the first line is the heading
        if not image or not caption:
            raise SystemExit(f"similarity.py: {folder / 'captions.csv'} has no image or no caption in line {number}")
    return [miniclip.open_image(folder / image) for image, _ in rows], [caption for _, caption in rows]


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
    parser.add_argument("--folder", type=Path, help="a folder of pictures with a captions.csv (image,caption)")
    parser.add_argument("--model", default="ViT-B/32", help="a name, path or Hub repository (default: ViT-B/32)")
    parser.add_argument("--out", type=Path, default=Path("similarity.png"), help="the PNG (default: similarity.png)")
    options = parser.parse_args()

    if not options.out.resolve().parent.is_dir():
        raise SystemExit(f"similarity.py: there is no folder {options.out.resolve().parent}")
    photos, captions = captioned_folder(options.folder) if options.folder else sample_photos()
    model, preprocess = miniclip.load(options.model)
    matrix = similarities(model, preprocess(photos), miniclip.tokenize(captions, model.context_length))
    name = Path(options.model).name if Path(options.model).exists() else options.model
    draw(matrix, photos, captions, options.out, f"Cosine similarity, {name}")
    best = matrix.argmax(dim=0).eq(torch.arange(len(photos))).sum().item()
    print(f"{options.out}: the right caption scores highest for {best} of {len(photos)} pictures")


if __name__ == "__main__":
    try:
        main()
    except miniclip.MiniclipError as error:
        raise SystemExit(f"similarity.py: {error}") from None
