"""Zero-shot classification (section 3.1 of the paper): the labels are the classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.errors import InputError
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.tokenizer import tokenize

Answer = list[tuple[str, float]]

# Enough to keep a processor busy; more only costs memory.
_TEXTS_PER_BATCH = 256
_IMAGES_PER_BATCH = 32


class ZeroShotClassifier:
    """Answers which of the labels an image shows. The prompts are encoded once, here; an image costs one forward.

    Args:
        model, preprocess: as ``miniclip.load`` returns them.
        labels: the candidates, each once.
        templates: prompts in which "{}" stands for the label. Several are averaged as OpenAI does: every prompt's
            embedding is normalised, then their mean is.

    Attributes:
        labels: the labels, in the order given.
        weights: (labels, D) unit vectors in the model's dtype, one per label.

    Raises:
        InputError: for no labels, a label given twice, no templates, or a template without "{}".
        TextTooLongError: if a prompt does not fit the model's context.
    """

    def __init__(
        self,
        model: CLIP,
        preprocess: Preprocess,
        labels: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        self.model = model
        self.preprocess = preprocess
        self.labels = _strings("labels", labels)
        self.templates = _strings("templates", templates)
        for label, times in Counter(self.labels).items():
            if times > 1:
                raise InputError(f"the label {label!r} is given {times} times")
        for template in self.templates:
            if "{}" not in template:
                raise InputError(f"the template {template!r} has no {{}} for the label to go")
        prompts = [template.replace("{}", label) for label in self.labels for template in self.templates]
        with torch.no_grad():
            tokens = tokenize(prompts, model.context_length).to(model.device)
            embeddings = torch.cat([model.encode_text(batch) for batch in tokens.split(_TEXTS_PER_BATCH)])
            embeddings = F.normalize(embeddings, dim=1).view(len(self.labels), len(self.templates), -1)
            self.weights = F.normalize(embeddings.mean(dim=1), dim=1)  # (labels, D)

    @overload
    def __call__(self, images: Image.Image) -> Answer: ...
    @overload
    def __call__(self, images: Iterable[Image.Image]) -> list[Answer]: ...
    def __call__(self, images: Image.Image | Iterable[Image.Image]) -> Answer | list[Answer]:
        """One PIL image -> [(label, probability), …], most probable first; several images -> a list of those."""
        if isinstance(images, Image.Image):
            return self([images])[0]
        stream = iter(images)
        answers: list[Answer] = []
        while batch := list(islice(stream, _IMAGES_PER_BATCH)):
            rows = self.probabilities(self.preprocess(batch)).tolist()
            answers += [sorted(zip(self.labels, row), key=lambda pair: -pair[1]) for row in rows]
        return answers

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Preprocessed images (N, 3, S, S) -> float32 (N, labels): the softmax over the labels, in the order given.

        Raises:
            InputError: for pixels the model does not take, or whose similarities are not finite.
        """
        if isinstance(pixels, Tensor):
            pixels = pixels.to(self.model.device)
        embeddings = F.normalize(self.model.encode_image(pixels), dim=1)  # (N, D)
        logits = self.model.logit_scale.exp() * embeddings @ self.weights.to(embeddings).T  # (N, labels)
        for image, finite in enumerate(logits.isfinite().all(dim=1).tolist()):
            if not finite:
                raise InputError(
                    f"the similarities of image {image} are not finite: the pixels or the weights hold NaN or "
                    f"infinity, or overflow in {logits.dtype}"
                )
        return logits.float().softmax(dim=1)


def _strings(name: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise InputError(f"{name} must be a list of strings, got the single string {values!r}")
    if not isinstance(values, Iterable):
        raise InputError(f"{name} must be a list of strings, got {type(values).__name__}")
    values = tuple(values)
    if not values:
        raise InputError(f"{name} must hold at least one string")
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(f"{name}[{i}] must be a string, got {type(value).__name__}")
    return values
