"""``miniclip demo``: what the demo model can and cannot do, computed on the package's sample images."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from miniclip.hub import KNOWN
from miniclip.images import open_image
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.tokenizer import tokenize
from miniclip.zero_shot import ZeroShotClassifier

#: Six drawings and a photo. Their LICENSE lies beside them.
SAMPLES = Path(__file__).parent / "data" / "samples"

# What the images show. The answers come from the model, and these decide only whether an answer is right. The
# samples were chosen for what they show: three that the model of version 0.1.0 gets right, and a photo it gets wrong.
DRAWINGS = {"elephant.png": "elephant", "guitar.png": "guitar", "pizza.png": "pizza"}
PHOTO, IN_PHOTO = "coffee_photo.jpg", "cup"
QUERY, WANTED = "a boat", "sailboat.png"

_LABELS = sorted([*DRAWINGS.values(), IN_PHOTO])
_SHOWN = 3  # images of the search


def tour(model: CLIP, preprocess: Preprocess) -> Iterator[str]:
    """Classify three drawings, search among the samples, and classify a photo.

    Args:
        model: the demo model. Any other model runs too, and gets the same verdicts on its own answers.
        preprocess: its preprocessing.

    Yields:
        Lines of text: for each step the command that repeats it, the answers, and whether they are right. Every answer,
        number and verdict is computed while the lines are read.

    Raises:
        ImageError: if a sample image is missing or damaged.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vectors = str(Path(tempfile.gettempdir()) / "miniclip-demo")
    classifier = ZeroShotClassifier(model, preprocess, _LABELS)
    verdicts: list[bool] = []
    yield f"The demo model has {parameters / 1e6:.1f} million parameters and has seen drawings of emoji, nothing else."
    yield "The commands repeat what is computed here. They begin in the folder of the sample images:"
    yield _command("cd", str(SAMPLES))
    yield ""
    yield "1. What does a drawing show?"
    yield _classify_command(*DRAWINGS)
    for name, truth in DRAWINGS.items():
        yield _answer(classifier, name, truth, verdicts)
    yield ""
    yield f"2. Which of the samples is {QUERY}?"
    yield _command("miniclip", "embed", ".", "--out", vectors, "--model", "demo")
    yield _command("miniclip", "search", vectors, QUERY, "-k", str(_SHOWN))
    matches = _search(model, preprocess, QUERY)
    verdicts.append(matches[0][0] == WANTED)
    for rank, (name, score) in enumerate(matches[:_SHOWN]):
        yield f"{name:<17} cosine    {score:6.2f}   {'' if rank else _verdict(verdicts[-1], WANTED)}".rstrip()
    yield ""
    yield "3. What does a photo show? The model has never seen one."
    yield _classify_command(PHOTO)
    yield _answer(classifier, PHOTO, IN_PHOTO, verdicts)
    yield ""
    yield f"{sum(verdicts)} of {len(verdicts)} answers are right. A high percentage does not make an answer right."
    megabytes = KNOWN["ViT-B/32"].sources[0].megabytes
    yield f"For photos, use a model that knows them: --model ViT-B/32 (a download of {megabytes} MB)."


def _answer(classifier: ZeroShotClassifier, name: str, truth: str, verdicts: list[bool]) -> str:
    """The line of one sample: its name, the label that won, the probability, the verdict. Adds to ``verdicts``."""
    label, probability = classifier(open_image(SAMPLES / name))[0]
    verdicts.append(label == truth)
    return f"{name:<17} {label:<9} {probability:6.1%}   {_verdict(verdicts[-1], truth)}"


def _verdict(right: bool, truth: str) -> str:
    return "right" if right else f"wrong ({truth} is right)"


def _search(model: CLIP, preprocess: Preprocess, query: str) -> list[tuple[str, float]]:
    """(name, cosine) of every sample, best first."""
    paths = sorted(path for path in SAMPLES.iterdir() if path.suffix in (".png", ".jpg"))
    with torch.inference_mode():
        images = preprocess([open_image(path) for path in paths]).to(model.device)
        image_vectors = F.normalize(model.encode_image(images), dim=1)  # (N, D)
        text_vector = F.normalize(model.encode_text(tokenize(query, model.context_length).to(model.device)), dim=1)[0]
        scores = (image_vectors @ text_vector).tolist()  # (N,)
    return sorted(((path.name, score) for path, score in zip(paths, scores)), key=lambda match: -match[1])


def _classify_command(*names: str) -> str:
    return _command("miniclip", "classify", *names, "--labels", *_LABELS, "--model", "demo")


def _command(*words: str) -> str:
    return f"$ {shlex.join(words)}"
