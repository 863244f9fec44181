"""PIL images -> the pixels a CLIP was trained on. Pillow and numpy only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from miniclip.errors import ConfigError, ImageError, InputError

# Channel means and standard deviations of OpenAI's training images, on pixels from 0 to 1.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

CONVENTIONS = ("openai", "huggingface")

# Up to this ratio of the sides the whole image is resized and then cropped, as both references do. A 1 x 4000 image of
# a few hundred bytes would take 600 MB that way, so beyond it only the region of the crop is resampled.
_MAX_ASPECT = 100
_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side, crop the centre, scale to 0..1, normalise: one image -> (3, S, S), a list -> (N, 3, S, S).

    Two conventions are in use for the same weights, and both are followed to the bit:

    - ``"openai"`` (the default): resize in the image's own mode, crop at the half-even rounded centre, then convert to
      RGB, which drops transparency. openai/CLIP on torchvision's PIL transforms.
    - ``"huggingface"``: put transparency on white and convert to RGB first, crop at the floored centre.
      transformers' ``CLIPImageProcessorPil``.

    Beyond an aspect ratio of 100 an opaque image may differ from the references by one grey level: only the part of the
    image that is kept is resampled, in bounded memory.

    Attributes:
        size: S, the side of the result in pixels.
        mean, std: per channel, on pixels from 0 to 1.
        resample: the filter; bicubic in both references.
        convention: ``"openai"`` or ``"huggingface"``.
        shortest_edge: the length the short side is resized to before the crop; ``size`` unless given.
    """

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC
    convention: str = "openai"
    shortest_edge: int | None = None

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"unknown convention {self.convention!r}; miniclip knows {' and '.join(CONVENTIONS)}")
        if self.size < 1:
            raise ConfigError(f"size must be a positive number of pixels, got {self.size}")
        if self._short < self.size:
            raise ConfigError(f"a short side of {self._short} pixels cannot be cropped to {self.size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                raise ConfigError(f"{name} must have 3 values, got {len(values)}")
        if not all(value > 0 for value in self.std):
            raise ConfigError(f"std must be positive, got {self.std}")

    @overload
    def __call__(self, images: Image.Image) -> Tensor: ...
    @overload
    def __call__(self, images: Sequence[Image.Image]) -> Tensor: ...
    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """One PIL image -> float32 (3, S, S); a list of them -> (N, 3, S, S).

        Raises:
            InputError: for an image without pixels, or an empty list.
            TypeError: for anything but PIL images.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                raise InputError("there are no images to preprocess: the list is empty")
            return torch.stack([self(image) for image in images])
        if not isinstance(images, Image.Image):
            raise TypeError(
                f"Preprocess takes a PIL image or a list of them, got {type(images).__name__}; "
                "miniclip.open_image(path) opens a file, PIL.Image.fromarray(array) wraps an array"
            )
        if not (images.width and images.height):
            raise InputError(f"the image is {images.width} x {images.height} pixels")
        if self.convention == "openai":
            pixels = self._resize_and_crop(images).convert("RGB")
        else:
            pixels = self._resize_and_crop(_on_white(images))
        planes = np.asarray(pixels).transpose(2, 0, 1)  # (3, S, S)
        return torch.from_numpy(np.stack([levels[plane] for levels, plane in zip(self._levels, planes)]))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], convention: str = "openai") -> Preprocess:
        """Read the contents of a ``preprocessor_config.json``.

        Raises:
            ConfigError: if it asks for steps that are not these ones.
        """
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise ConfigError(f"preprocessor_config.json switches {step} off, CLIP's preprocessing has it on")
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ConfigError(f"preprocessor_config.json has rescale_factor {config['rescale_factor']}, expected 1/255")
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        shortest_edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
        if not isinstance(shortest_edge, int):
            raise ConfigError(f"preprocessor_config.json has size {size}, miniclip resizes a shortest_edge")
        height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, Mapping) else (crop, crop)
        if not isinstance(height, int) or height != width:
            raise ConfigError(f"preprocessor_config.json has crop_size {crop}, miniclip crops a square")
        return cls(
            size=height,
            mean=_channels("image_mean", config.get("image_mean", OPENAI_MEAN)),
            std=_channels("image_std", config.get("image_std", OPENAI_STD)),
            resample=_resampling(config.get("resample", Image.Resampling.BICUBIC)),
            convention=convention,
            shortest_edge=None if shortest_edge == height else shortest_edge,
        )

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], size: int) -> Preprocess:
        """Read the ``preprocess_cfg`` of an ``open_clip_config.json``, for a model of ``size`` pixels."""
        if (mode := config.get("resize_mode", "shortest")) != "shortest":
            raise ConfigError(f"open_clip_config.json has resize_mode {mode!r}, miniclip resizes the shortest side")
        return cls(
            size=size,
            mean=_channels("mean", config.get("mean", OPENAI_MEAN)),
            std=_channels("std", config.get("std", OPENAI_STD)),
            resample=_resampling(config.get("interpolation", "bicubic")),
        )

    @property
    def _short(self) -> int:
        return self.size if self.shortest_edge is None else self.shortest_edge

    @cached_property
    def _levels(self) -> np.ndarray:
        """(3, 256) float32: what each of the 256 grey levels becomes in each channel.

        A table, because scaling and normalising act on every pixel alone: 256 results looked up are the same bits as
        S x S computed. Each convention's arithmetic is its reference's, operation by operation.
        """
        grey = np.arange(256)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        if self.convention == "openai":
            scaled = grey.astype(np.float32) / np.float32(255)
        else:
            scaled = (grey.astype(np.float64) * (1 / 255)).astype(np.float32)
        levels: np.ndarray = (scaled - mean) / std
        return levels

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        short, size = self._short, self.size
        width, height = image.size
        if width <= height:
            resized = (short, int(short * height / width))
        else:
            resized = (int(short * width / height), short)
        if self.convention == "openai":
            left, top = (int(round((side - size) / 2.0)) for side in resized)
        else:
            left, top = ((side - size) // 2 for side in resized)
        if max(width, height) <= _MAX_ASPECT * min(width, height):
            if resized != image.size:
                image = image.resize(resized, self.resample)
            return image.crop((left, top, left + size, top + size))
        image_part = self._resize_center(image, resized, (left, top))
        return image_part.convert(image.mode)

    def _resize_center(self, image: Image.Image, resized: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
        """The square at ``corner`` of ``image`` resized to ``resized``, from the pixels that reach it alone."""
        spans, crop = [], []
        for side, out, start in zip(image.size, resized, corner):
            scale = side / out
            first, last = start * scale, (start + self.size) * scale
            margin = int(3 * max(scale, 1)) + 2  # no filter of Pillow reaches further than 3 pixels of the coarser grid
            low, high = max(int(first) - margin, 0), min(int(last) + margin, side)
            spans.append((first - low, last - low))
            crop.append((low, high))
        image_part = image.crop((crop[0][0], crop[1][0], crop[0][1], crop[1][1]))
        if image_part.mode in _PREMULTIPLIED:  # as Pillow's resize does, but once for both passes
            image_part = image_part.convert(_PREMULTIPLIED[image_part.mode])
        (left, right), (top, bottom) = spans
        width, height = image_part.size
        # Each pass rounds to 8 bits, so their order shows. Pillow 13 starts across, except to shrink a tall image.
        if image.height > image.width and image.height > resized[1]:
            image_part = image_part.resize((width, self.size), self.resample, box=(0, top, width, bottom))
            return image_part.resize((self.size, self.size), self.resample, box=(left, 0, right, self.size))
        image_part = image_part.resize((self.size, height), self.resample, box=(left, 0, right, height))
        return image_part.resize((self.size, self.size), self.resample, box=(0, top, self.size, bottom))


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture file as a person would see it: an RGB image.

    Upright by its EXIF orientation, transparency on white, 16 bits per channel scaled to 8, the first frame of an
    animation. (PIL's ``Image.open`` does none of these, and neither does openai/CLIP.)

    Raises:
        ImageError: naming the file, if it is missing, not an image, truncated, or too large to be decoded safely.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except IsADirectoryError:
        raise ImageError(path, "is a folder, not an image") from None
    except Image.UnidentifiedImageError:
        raise ImageError(path, "is not an image in a format Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"is too large to be decoded safely ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError) as error:
        # Pillow's decoders meet damaged files with all of these.
        raise ImageError(path, f"cannot be decoded ({error})") from error
    if image.mode.startswith("I"):  # "I;16" and its byte orders; some formats deliver 16 bits as "I"
        # Pillow's own conversion clips at 255, which leaves a 16-bit picture almost white.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(path, "holds floating-point pixels, whose range only you know: scale them to 8 bits first")
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    """To RGB, with whatever is transparent showing white behind it."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _channels(name: str, values: object) -> tuple[float, float, float]:
    if isinstance(values, (list, tuple)) and len(values) == 3 and all(isinstance(v, (int, float)) for v in values):
        return (float(values[0]), float(values[1]), float(values[2]))
    raise ConfigError(f"{name} must be three numbers, got {values!r}")


def _resampling(value: object) -> Image.Resampling:
    """A filter by Pillow's number, as Hugging Face writes it, or by name, as open_clip does."""
    try:
        return Image.Resampling[value.upper()] if isinstance(value, str) else Image.Resampling(value)
    except (KeyError, ValueError):
        names = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
        raise ConfigError(f"unknown resampling {value!r}; Pillow has {names}") from None
