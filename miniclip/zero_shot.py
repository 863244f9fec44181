"""Zero-shot classification (section 3.1 of the paper, arXiv:2103.00020): the embedded labels are the classifier."""

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

#: (label, probability) for every label, most probable first.
Answer = list[tuple[str, float]]

# These batches are large enough to keep a processor busy. Larger ones only cost memory.
_TEXTS_PER_BATCH = 256
_IMAGES_PER_BATCH = 32


class ZeroShotClassifier:
    """Tells which of the given labels an image shows.

    The constructor encodes all prompts once. After that an image costs one forward pass of the image tower.

    Attributes:
        model: the CLIP that encodes prompts and images.
        preprocess: what turns a PIL image into pixels.
        labels: the labels, in the order given.
        templates: the prompt templates, in the order given.
        weights: (labels, D) one unit vector per label, in the dtype the model had when the classifier was made.
    """

    def __init__(
        self,
        model: CLIP,
        preprocess: Preprocess,
        labels: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        truncate: bool = False,
    ) -> None:
        """Encode the prompts, which are every label in every template.

        Several templates are averaged as OpenAI's notebook does: each prompt's embedding is normalised, the mean over
        the templates is taken, and the mean is normalised again.

        Args:
            model: the model that ``miniclip.load`` returns.
            preprocess: the preprocessing that ``miniclip.load`` returns with the model.
            labels: the candidates, each of them once.
            templates: prompts in which "{}" stands for the label.
            truncate: cut prompts that are longer than the model's context, as ``tokenize`` does.

        Raises:
            InputError: if there are no labels or no templates, a label occurs twice, or a template has no "{}".
            TextTooLongError: if a prompt does not fit the model's context and ``truncate`` is false.
        """
        self.model = model
        self.preprocess = preprocess
        self.labels = _strings("labels", labels)
        self.templates = _strings("templates", templates)
        for label, times in Counter(self.labels).items():
            if times > 1:
                raise InputError(f"the label {label!r} is given {times} times")
        for template in self.templates:
            if "{}" not in template:
                raise InputError(f"the template {template!r} has no {{}} for the label")
        prompts = [template.replace("{}", label) for label in self.labels for template in self.templates]
        with torch.no_grad():
            tokens = tokenize(prompts, model.context_length, truncate).to(model.device)
            embeddings = torch.cat([model.encode_text(batch) for batch in tokens.split(_TEXTS_PER_BATCH)])
            embeddings = F.normalize(embeddings, dim=1).view(len(self.labels), len(self.templates), -1)
            self.weights = F.normalize(embeddings.mean(dim=1), dim=1)  # (labels, D)

    @overload
    def __call__(self, images: Image.Image) -> Answer: ...
    @overload
    def __call__(self, images: Iterable[Image.Image]) -> list[Answer]: ...
    def __call__(self, images: Image.Image | Iterable[Image.Image]) -> Answer | list[Answer]:
        """Classify one PIL image or several.

        Args:
            images: one image, or any iterable of images. An iterator is read in batches, so it may be long.

        Returns:
            For one image, a list of (label, probability), most probable first. For several, a list of such lists.

        Raises:
            InputError: if the similarities of an image are not finite.
            TypeError: if something else than PIL images is given.
        """
        if isinstance(images, Tensor):
            raise TypeError("the classifier takes PIL images, got a tensor; for preprocessed pixels use probabilities")
        if isinstance(images, Image.Image) or not isinstance(images, Iterable):  # preprocess names what is not an image
            return self([images])[0]
        stream = iter(images)
        answers: list[Answer] = []
        while batch := list(islice(stream, _IMAGES_PER_BATCH)):
            rows = self.probabilities(self.preprocess(batch)).tolist()
            answers += [sorted(zip(self.labels, row), key=lambda pair: -pair[1]) for row in rows]
        return answers

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Classify preprocessed images.

        Args:
            pixels: (N, 3, S, S) as ``preprocess`` returns them, of any floating-point dtype and on any device.

        Returns:
            (N, labels) float32: the softmax over the labels, in the order given.

        Raises:
            InputError: if the model does not take these pixels, or if the similarities are not finite.
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
