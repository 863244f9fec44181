"""How much do the frozen image features know? A logistic regression on them, beside zero-shot classification.

    python examples/linear_probe.py                    the demo model on altered copies of examples/images
    python examples/linear_probe.py my_photos          my_photos/cat/*.jpg, my_photos/dog/*.jpg, …
    python examples/linear_probe.py my_photos --sweep

Every subfolder is a class. Where there are my_photos/train and my_photos/test, those are the split; otherwise a fifth
of each class, drawn by --seed, is kept for the test.

This is the linear probe of the paper (sections 3.2 and A.3), scikit-learn's L-BFGS with at most 1000 iterations, in the
form that openai/CLIP's README gives it: on what encode_image returns, with C=0.316. The paper itself takes the
features in front of the projection, and chooses the strength of the regularisation on a validation set; --sweep does
so too, with a fifth of the training pictures and C from 1e-6 to 1e6, before it trains on all of them.
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
from tqdm import tqdm

import miniclip

BATCH = 32
HELD_OUT = 0.2
OPENAI_C = 0.316
SWEEP = tuple(10.0**power for power in range(-6, 7))
COPIES = 8  # of each sample picture, for training and again for the test

Example = tuple[Path | Image.Image, str]  # a picture and its class


def class_folders(folder: Path) -> list[Example]:
    """Every file of every subfolder, with the subfolder's name as its class. "_" reads as a space."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise SystemExit(f"{folder} has {len(classes)} subfolders, and a classifier needs two classes at least")
    examples: list[Example] = []
    for path in classes:
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        examples += [(file, path.name.replace("_", " ")) for file in files]
    return examples


def cut_out(picture: Image.Image) -> Image.Image:
    """The picture with its background, what hangs together with a corner, made transparent."""
    flooded, key = picture.copy(), (255, 0, 255)
    right, bottom = picture.width - 1, picture.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        ImageDraw.floodfill(flooded, corner, key, thresh=40)
    figure = (np.asarray(flooded) != key).any(axis=2)
    return Image.fromarray(np.dstack([np.asarray(picture), np.uint8(255) * figure]))


def altered(figure: Image.Image, rng: random.Random) -> Image.Image:
    """The figure on a background of some colour, turned slightly, stretched and moved."""
    canvas = Image.new("RGB", figure.size, tuple(rng.randrange(120, 256) for _ in range(3)))
    width, height = (round(side * rng.uniform(0.6, 1)) for side in figure.size)
    figure = figure.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC).resize((width, height))
    canvas.paste(figure, (rng.randint(0, canvas.width - width), rng.randint(0, canvas.height - height)), figure)
    return canvas


def sample_copies(rng: random.Random) -> list[Example]:
    """Altered copies of the sample pictures, each picture a class that is called by its caption."""
    examples: list[Example] = []
    for name, captions in common.read_captions(common.IMAGES).items():
        figure = cut_out(miniclip.open_image(common.IMAGES / name))
        examples += [(altered(figure, rng), captions[0]) for _ in range(COPIES)]
    return examples


@torch.no_grad()
def encode(
    model: miniclip.CLIP, preprocess: miniclip.Preprocess, examples: list[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) of what can be read, not normalised, and its classes (N,)."""
    features, labels = [], []
    starts = range(0, len(examples), BATCH)
    for start in tqdm(starts, "features", unit="batch", disable=len(starts) < 10 or None):
        photos = []
        for picture, label in examples[start : start + BATCH]:
            try:
                photos.append(picture if isinstance(picture, Image.Image) else miniclip.open_image(picture))
            except miniclip.ImageError as error:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            else:
                labels.append(label)
        if photos:
            features.append(model.encode_image(preprocess(photos).to(model.device)).float().cpu().numpy())
    if not features:
        raise SystemExit("no picture could be read")
    return np.concatenate(features), np.array(labels)


def hold_out(labels: np.ndarray, rng: random.Random, purpose: str) -> np.ndarray:
    """Which examples (N,) to keep aside: a fifth of each class, at least one, and never all."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        if len(members) < 2:
            raise SystemExit(f"the class {str(label)!r} has one picture; with a part kept for {purpose}, it needs two")
        held[rng.sample(members, max(1, round(HELD_OUT * len(members))))] = True
    return held


def fit(features: np.ndarray, labels: np.ndarray, C: float) -> Any:
    """scikit-learn's LogisticRegression, trained."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # to stop at 1000 iterations is the paper's protocol
        return LogisticRegression(C=C, max_iter=1000).fit(features, labels)


def best_C(features: np.ndarray, labels: np.ndarray, rng: random.Random) -> float:
    """The C that does best on a fifth of these examples; of equals the smallest, which regularises most."""
    held = hold_out(labels, rng, "validation")
    scores = [fit(features[~held], labels[~held], C).score(features[held], labels[held]) for C in SWEEP]
    return SWEEP[int(np.argmax(scores))]


def listed(folder: Path) -> tuple[list[Example], list[Example]]:
    """The pictures to train on and those to test on; none of the latter where the folder does not tell them apart."""
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        return class_folders(folder), []
    train, test = class_folders(folder / "train"), class_folders(folder / "test")
    if unknown := sorted({label for _, label in test} - {label for _, label in train}):
        raise SystemExit(f"{folder / 'train'} has no pictures of {len(unknown)} of the test's classes: {unknown[0]!r}")
    return train, test


def read(
    examples: tuple[list[Example], list[Example]],
    model: miniclip.CLIP,
    preprocess: miniclip.Preprocess,
    rng: random.Random,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and classes of the training pictures, then of the test pictures."""
    train, test = examples
    features, labels = encode(model, preprocess, train)
    if test:
        return features, labels, *encode(model, preprocess, test)
    held = hold_out(labels, rng, "the test")
    return features[~held], labels[~held], features[held], labels[held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder with a subfolder of pictures for every class")
    parser.add_argument("--sweep", action="store_true", help="choose C on a fifth of the training pictures")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    parser.add_argument("--model", help="a name, path or Hub repository")
    options = parser.parse_args()
    import sklearn  # noqa: F401  so that a missing package is noticed before the work, not after it

    rng = random.Random(options.seed)
    examples = listed(options.folder) if options.folder is not None else None
    model, preprocess = miniclip.load(common.model_name(options.model, own_images=options.folder is not None))
    if examples is not None:
        train, train_labels, test, test_labels = read(examples, model, preprocess, rng)
        template = "a photo of a {}."
    else:
        train, train_labels = encode(model, preprocess, sample_copies(rng))
        test, test_labels = encode(model, preprocess, sample_copies(rng))
        template = "{}"  # these classes are called by captions
        print(f"each of the {len(set(test_labels))} sample pictures is a class: {COPIES} altered copies to train on,")
        print(f"{COPIES} other copies of the same picture to test on. It shows the method, and measures nothing.")
    if len(classes := np.unique(train_labels).tolist()) < 2:
        raise SystemExit(f"only the class {classes[0]!r} has pictures for training, and a classifier needs two")

    C = best_C(train, train_labels, rng) if options.sweep else OPENAI_C
    probe = fit(train, train_labels, C).score(test, test_labels)
    # The classifier of zero_shot.py, on the features that are here already. Their lengths do not change the argmax.
    weights = miniclip.ZeroShotClassifier(model, preprocess, classes, [template]).weights.float().cpu().numpy()
    zero_shot = np.mean(np.array(classes)[(test @ weights.T).argmax(axis=1)] == test_labels)
    print(f"{len(classes)} classes, {len(train)} pictures to train on, {len(test)} to test on")
    print(f"linear probe  {probe:6.1%}   C = {C:g}")
    print(f"zero-shot     {zero_shot:6.1%}   {template!r}")


if __name__ == "__main__":
    common.main(main)
