"""Linear probe: a logistic regression on frozen image features, compared with zero-shot classification.

    python examples/linear_probe.py                               the demo model on altered copies of examples/images
    python examples/linear_probe.py my_images --model ViT-B/32    my_images/cat/*.jpg, my_images/dog/*.jpg, …
    python examples/linear_probe.py my_images --model ViT-B/32 --sweep

Every subfolder is a class. If my_images/train and my_images/test exist, they are the split. Otherwise a fifth of each
class, drawn with --seed, is the test set.

This is the linear probe of the paper (sections 3.2 and A.3): scikit-learn's L-BFGS with at most 1000 iterations. As in
openai/CLIP's README it uses the output of encode_image and C=0.316. The paper uses the features before the projection,
and chooses C on a validation set. --sweep also chooses C: it tries 1e-6 to 1e6 on a fifth of the training images, then
trains on all of them.
"""

import argparse
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image, ImageDraw

import miniclip

with common.needs("examples"):
    from tqdm import tqdm

BATCH = 32
HELD_OUT = 0.2
OPENAI_C = 0.316
SWEEP = tuple(10.0**power for power in range(-6, 7))
COPIES = 8  # of each sample image, for training and again for the test

Example = tuple[Path | Image.Image, str]  # an image and its class


def class_folders(folder: Path) -> list[Example]:
    """Every file of every subfolder. Its class is the subfolder's name, with spaces for underscores."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise SystemExit(f"{folder} has {len(classes)} subfolders, and a classifier needs at least two classes")
    examples: list[Example] = []
    for path in classes:
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        examples += [(file, path.name.replace("_", " ")) for file in files]
    return examples


def cut_out(image: Image.Image) -> Image.Image:
    """Make the background transparent: everything that is connected to a corner and has its colour."""
    flooded, key = image.copy(), (255, 0, 255)
    right, bottom = image.width - 1, image.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        ImageDraw.floodfill(flooded, corner, key, thresh=40)
    figure = (np.asarray(flooded) != key).any(axis=2)
    return Image.fromarray(np.dstack([np.asarray(image), np.uint8(255) * figure]))


def altered(figure: Image.Image, rng: random.Random) -> Image.Image:
    """The figure, slightly turned, stretched and moved, on a background of a random colour."""
    canvas = Image.new("RGB", figure.size, tuple(rng.randrange(120, 256) for _ in range(3)))
    width, height = (round(side * rng.uniform(0.6, 1)) for side in figure.size)
    figure = figure.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC).resize((width, height))
    canvas.paste(figure, (rng.randint(0, canvas.width - width), rng.randint(0, canvas.height - height)), figure)
    return canvas


def sample_copies(rng: random.Random) -> list[Example]:
    """Altered copies of the sample images. Each image is a class, and its caption is the class's name."""
    examples: list[Example] = []
    for name, captions in common.read_captions(common.IMAGES).items():
        figure = cut_out(miniclip.open_image(common.IMAGES / name))
        examples += [(altered(figure, rng), captions[0]) for _ in range(COPIES)]
    return examples


@torch.no_grad()
def encode(
    model: miniclip.CLIP, preprocess: miniclip.Preprocess, examples: list[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) of the readable images, not normalised, and their classes (N,)."""
    features, labels = [], []
    starts = range(0, len(examples), BATCH)
    for start in tqdm(starts, "features", unit="batch", disable=len(starts) < 10 or None):
        images = []
        for image, label in examples[start : start + BATCH]:
            try:
                images.append(image if isinstance(image, Image.Image) else miniclip.open_image(image))
            except miniclip.ImageError as error:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            else:
                labels.append(label)
        if images:
            features.append(model.encode_image(preprocess(images).to(model.device)).float().cpu().numpy())
    if not features:
        raise SystemExit("no image could be read")
    return np.concatenate(features), np.array(labels)


def hold_out(labels: np.ndarray, rng: random.Random, purpose: str) -> np.ndarray:
    """A mask (N,) of the examples to hold out: a fifth of each class, at least one, and never all."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        if len(members) < 2:
            raise SystemExit(f"the class {str(label)!r} has one image and needs two: a part is held out for {purpose}")
        held[rng.sample(members, max(1, round(HELD_OUT * len(members))))] = True
    return held


def fit(features: np.ndarray, labels: np.ndarray, C: float) -> Any:
    """A trained LogisticRegression of scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the paper also stops at 1000 iterations
        return LogisticRegression(C=C, max_iter=1000).fit(features, labels)


def best_C(features: np.ndarray, labels: np.ndarray, rng: random.Random) -> float:
    """The C with the best accuracy on a fifth of these examples. Of equal ones the smallest: it regularises most."""
    held = hold_out(labels, rng, "validation")
    scores = [fit(features[~held], labels[~held], C).score(features[held], labels[held]) for C in SWEEP]
    return SWEEP[int(np.argmax(scores))]


def listed(folder: Path) -> tuple[list[Example], list[Example]]:
    """The training images and the test images. There are no test images if the folder has no train and test."""
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        return class_folders(folder), []
    train, test = class_folders(folder / "train"), class_folders(folder / "test")
    if unknown := sorted({label for _, label in test} - {label for _, label in train}):
        raise SystemExit(f"{folder / 'train'} lacks {len(unknown)} of the test's classes, the first is {unknown[0]!r}")
    return train, test


def read(
    examples: tuple[list[Example], list[Example]],
    model: miniclip.CLIP,
    preprocess: miniclip.Preprocess,
    rng: random.Random,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and classes of the training images, then of the test images."""
    train, test = examples
    features, labels = encode(model, preprocess, train)
    if test:
        return features, labels, *encode(model, preprocess, test)
    held = hold_out(labels, rng, "the test")
    return features[~held], labels[~held], features[held], labels[held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder with one subfolder of images per class")
    parser.add_argument("--sweep", action="store_true", help="choose C on a fifth of the training images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default: 0)")
    parser.add_argument("--model", help=common.MODEL_HELP)
    options = parser.parse_args()
    import sklearn  # noqa: F401  a missing package is reported before the features are computed

    name = common.model_name(options.model, own_images=options.folder is not None)
    rng = random.Random(options.seed)
    examples = listed(options.folder) if options.folder is not None else None
    model, preprocess = miniclip.load(name)
    if examples is not None:
        train, train_labels, test, test_labels = read(examples, model, preprocess, rng)
        template = "a photo of a {}."
    else:
        train, train_labels = encode(model, preprocess, sample_copies(rng))
        test, test_labels = encode(model, preprocess, sample_copies(rng))
        template = "{}"  # the names of these classes are whole captions
        print(f"each of the {len(set(test_labels))} sample images is a class, with {COPIES} altered copies to train on")
        print(f"and {COPIES} others to test on. This shows the method; the numbers have no meaning.")
    if len(classes := np.unique(train_labels).tolist()) < 2:
        raise SystemExit(f"only the class {classes[0]!r} has training images, and a classifier needs two classes")

    C = best_C(train, train_labels, rng) if options.sweep else OPENAI_C
    probe = fit(train, train_labels, C).score(test, test_labels)
    # The classifier of zero_shot.py on the same features. Normalising them would not change the argmax.
    weights = miniclip.ZeroShotClassifier(model, preprocess, classes, [template]).weights.float().cpu().numpy()
    zero_shot = np.mean(np.array(classes)[(test @ weights.T).argmax(axis=1)] == test_labels)
    print(f"{len(classes)} classes, {len(train)} training images, {len(test)} test images")
    print(f"linear probe  {probe:6.1%}   C = {C:g}")
    print(f"zero-shot     {zero_shot:6.1%}   {template!r}")


if __name__ == "__main__":
    common.main(main)
