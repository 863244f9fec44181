"""A PIL image -> the normalised pixels that a CLIP was trained on, in either of the two conventions in use."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniclip.errors import ConfigError, InputError
from miniclip.images import is_side, on_white
from miniclip.resize import resize_and_crop
from miniclip.transforms import CenterCrop, Normalize, Resize, ToRGB, ToTensor

# Channel means and standard deviations of OpenAI's training images, on pixels from 0 to 1.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

CONVENTIONS = ("openai", "huggingface")

_LARGEST_SIDE = 2**14  # pixels; a mistyped size must not exhaust the memory
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side, crop the centre, scale to 0..1, normalise: one image -> (3, S, S), a list -> (N, 3, S, S).

    Two conventions are in use for the same weights. miniclip follows both to the bit:

    - ``"openai"`` (the default): resize in the image's own mode, crop at the centre rounded half to even, then convert
      to RGB, which drops transparency. Source: openai/CLIP with torchvision's PIL transforms.
    - ``"huggingface"``: put transparency on white and convert to RGB first, crop at the centre rounded down.
      Source: transformers' ``CLIPImageProcessorPil``.

    Beyond an aspect ratio of 100, only the part of the image that is kept is resampled, in bounded memory. The rounding
    then differs: by one or two grey levels in opaque images; in a palette image, a neighbouring pixel may be picked.

    Attributes:
        size: S, the side of the result in pixels.
        mean: per channel, on pixels from 0 to 1.
        std: per channel, on pixels from 0 to 1.
        resample: the filter, as Pillow's constant, its number or its name; bicubic in both references.
        convention: ``"openai"`` or ``"huggingface"``.
        shortest_edge: the length in pixels to which the short side is resized before the crop; None means ``size``.

    Raises:
        ConfigError: if a setting has the wrong type or a value that cannot work.
    """

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC
    convention: str = "openai"
    shortest_edge: int | None = None

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ConfigError(
                f"unknown convention {reprlib.repr(self.convention)}; miniclip knows {' and '.join(CONVENTIONS)}"
            )
        for name, side in (("size", self.size), ("shortest_edge", self.short_side)):
            if not is_side(side) or side > _LARGEST_SIDE:
                raise ConfigError(f"{name} must be from 1 to {_LARGEST_SIDE} pixels, got {reprlib.repr(side)}")
        if self.short_side < self.size:
            raise ConfigError(f"a short side of {self.short_side} pixels cannot be cropped to {self.size}")
        # Each value gets one form, so that equal settings compare and hash as equal.
        object.__setattr__(self, "mean", _check_channels("mean", self.mean))
        object.__setattr__(self, "std", _check_channels("std", self.std))
        object.__setattr__(self, "resample", _check_filter(self.resample))
        if not min(self.std) > 0:
            raise ConfigError(f"std must be positive, got {self.std}")

    @property
    def short_side(self) -> int:
        """The length of the short side after the resize and before the crop, in pixels."""
        return self.size if self.shortest_edge is None else self.shortest_edge

    @property
    def transforms(self) -> list[Callable[[Any], Any]]:
        """The steps one by one, as openai/CLIP's ``preprocess.transforms`` has them; they can be sliced.

        Raises:
            ConfigError: for the convention "huggingface", whose rounding is another one.
        """
        if self.convention != "openai":
            raise ConfigError('transforms are the steps of the convention "openai"')
        resize, crop = Resize(self.short_side, self.resample), CenterCrop(self.size)
        return [resize, crop, ToRGB(), ToTensor(), Normalize(self.mean, self.std)]

    @overload
    def __call__(self, images: Image.Image) -> Tensor: ...
    @overload
    def __call__(self, images: Sequence[Image.Image]) -> Tensor: ...
    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """One PIL image -> float32 (3, S, S); a list of images -> (N, 3, S, S).

        Raises:
            InputError: for an image without pixels, or an empty list.
            TypeError: for anything but PIL images.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                raise InputError("there are no images to preprocess: the list is empty")
            batch = np.empty((len(images), 3, self.size, self.size), dtype=np.float32)
            for image, out in zip(images, batch):
                self._fill(out, image)
            return torch.from_numpy(batch)
        out = np.empty((3, self.size, self.size), dtype=np.float32)
        self._fill(out, images)
        return torch.from_numpy(out)

    def to_pixels(self, image: object) -> np.ndarray:
        """One PIL image -> (3, S, S) uint8: the part that the model sees, before ``normalise``.

        The array is a quarter of the size of the tensor that a call returns.

        Raises:
            InputError: for an image without pixels.
            TypeError: for anything but a PIL image.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"Preprocess takes a PIL image or a list of them, got {type(image).__name__}; "
                "miniclip.open_image(path) opens a file, PIL.Image.fromarray(array) wraps an array"
            )
        if not (image.width and image.height):
            raise InputError(f"the image is {image.width} x {image.height} pixels")
        if self.convention == "openai":
            image = self._resize_and_crop(image).convert("RGB")
        else:
            image = self._resize_and_crop(on_white(image))
        return np.asarray(image).transpose(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(…, 3, S, S) uint8 -> float32 on the same device: the second half of a call, to the bit.

        Raises:
            InputError: for pixels of another dtype or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3:
            raise InputError(f"pixels must be (…, 3, S, S) in uint8, got {tuple(pixels.shape)} in {pixels.dtype}")
        levels = torch.from_numpy(self._levels).to(pixels.device)
        return torch.stack([levels[c][pixels.select(-3, c).int()] for c in range(3)], dim=-3)

    def _fill(self, out: np.ndarray, image: object) -> None:
        """Write an image's normalised pixels into ``out``. torch.stack would wake its threads for one copy: 1.5 ms."""
        for levels, plane, target in zip(self._levels, self.to_pixels(image), out):
            levels.take(plane, out=target, mode="clip")  # uint8 is never out of range; the default mode copies twice

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (self.short_side if s == short else int(self.short_side * s / short) for s in image.size)
        if self.convention == "openai":
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        else:
            left, top = (width - self.size) // 2, (height - self.size) // 2
        return resize_and_crop(image, (width, height), (left, top), self.size, self.resample)

    @cached_property
    def _levels(self) -> np.ndarray:
        """(3, 256) float32: the normalised value of each of the 256 grey levels in each channel.

        Scaling and normalising act on each pixel alone. So a table of 256 results gives the same bits as S x S
        computations. The arithmetic of each convention follows its reference, operation by operation.
        """
        grey = np.arange(256)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        if self.convention == "openai":
            scaled = grey.astype(np.float32) / np.float32(255)
        else:
            scaled = (grey.astype(np.float64) * (1 / 255)).astype(np.float32)
        levels: np.ndarray = (scaled - mean) / std
        return levels


def _check_channels(name: str, values: object) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ConfigError(f"{name} must be three numbers, got {reprlib.repr(values)}")
    # NaN fails this comparison too.
    if not all(isinstance(value, (int, float)) and abs(value) <= _LARGEST_FLOAT32 for value in values):
        raise ConfigError(f"{name} must be three finite numbers, got {reprlib.repr(values)}")
    return (float(values[0]), float(values[1]), float(values[2]))


def _check_filter(value: Any) -> Image.Resampling:
    """A filter from Pillow's number, which Hugging Face writes, or from its name, which open_clip writes."""
    try:
        return Image.Resampling[value.upper()] if isinstance(value, str) else Image.Resampling(value)
    except (KeyError, ValueError):
        names = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
        raise ConfigError(f"unknown resampling {reprlib.repr(value)}; Pillow has {names}") from None
