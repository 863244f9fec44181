"""PIL images -> the pixels a CLIP was trained on. Pillow and numpy only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, TypeGuard, overload

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import __version__ as PILLOW_VERSION
from torch import Tensor

from miniclip.errors import ConfigError, ImageError, InputError

# Channel means and standard deviations of OpenAI's training images, on pixels from 0 to 1.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

CONVENTIONS = ("openai", "huggingface")

# Up to this ratio of the sides the whole image is resized and then cropped, as both references do. A 1 x 4000 image of
# a few hundred bytes would take 600 MB that way, so beyond it only the region of the crop is resampled.
_MAX_ASPECT = 100
_LARGEST = float(np.finfo(np.float32).max)
_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}

_PILLOW = int(PILLOW_VERSION.partition(".")[0])
# Pixels from which on strips are worth their threads, and how many of them: more would wait for the memory.
_LARGE = 2_000_000
_MOST_STRIPS = 8
# Filters that are 1 at a pixel and 0 at all others.
_INTERPOLATING = {Image.Resampling[name] for name in ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")}

# What a file in the High Efficiency Image File Format calls itself (ISO/IEC 23008-12, 10.2 and annex B.4).
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What turns the stored pixels upright, by EXIF orientation; 1 is upright already.
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side, crop the centre, scale to 0..1, normalise: one image -> (3, S, S), a list -> (N, 3, S, S).

    Two conventions are in use for the same weights, and both are followed to the bit:

    - ``"openai"`` (the default): resize in the image's own mode, crop at the half-even rounded centre, then convert to
      RGB, which drops transparency. openai/CLIP on torchvision's PIL transforms.
    - ``"huggingface"``: put transparency on white and convert to RGB first, crop at the floored centre.
      transformers' ``CLIPImageProcessorPil``.

    Beyond an aspect ratio of 100 only the part of the image that is kept is resampled, in bounded memory. That rounds
    differently: by a grey level or two where the image is opaque, and of a palette it may pick the pixel beside.

    Attributes:
        size: S, the side of the result in pixels.
        mean, std: per channel, on pixels from 0 to 1.
        resample: the filter, as Pillow's constant, its number or its name; bicubic in both references.
        convention: ``"openai"`` or ``"huggingface"``.
        shortest_edge: the length the short side is resized to before the crop; ``size`` unless given.

    Raises:
        ConfigError: for a value that is of the wrong type or cannot work.
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
        if not _is_length(self.size):
            raise ConfigError(f"size must be a positive number of pixels, got {self.size!r}")
        if not _is_length(self._short):
            raise ConfigError(f"shortest_edge must be a positive number of pixels, got {self._short!r}")
        if self._short < self.size:
            raise ConfigError(f"a short side of {self._short} pixels cannot be cropped to {self.size}")
        # One form for each value, so that equal settings compare and hash as equal.
        object.__setattr__(self, "mean", _channels("mean", self.mean))
        object.__setattr__(self, "std", _channels("std", self.std))
        object.__setattr__(self, "resample", _resampling(self.resample))
        if not min(self.std) > 0:
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
            return torch.stack([self._pixels(image) for image in images])
        return self._pixels(images)

    def _pixels(self, image: object) -> Tensor:
        planes = self.crop(image)
        return torch.from_numpy(np.stack([levels.take(plane) for levels, plane in zip(self._levels, planes)]))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(…, 3, S, S) uint8 -> float32, on the pixels' device: the second half of what a call does, to the bit.

        Raises:
            InputError: for pixels of another dtype or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3:
            raise InputError(f"pixels must be (…, 3, S, S) in uint8, got {tuple(pixels.shape)} in {pixels.dtype}")
        levels = torch.from_numpy(self._levels).to(pixels.device)
        return torch.stack([levels[c][pixels.select(-3, c).int()] for c in range(3)], dim=-3)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read the contents of a ``preprocessor_config.json``.

        Raises:
            ConfigError: if it asks for steps that are not these ones.
        """
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise ConfigError(f"{step} is off, but CLIP's preprocessing has it on")
        factor = config.get("rescale_factor", 1 / 255)
        if not isinstance(factor, (int, float)) or not abs(factor * 255 - 1) < 1e-6:
            raise ConfigError(f"rescale_factor must be 1/255, got {factor!r}")
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        shortest_edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
        if not _is_length(shortest_edge) or (isinstance(size, Mapping) and size.get("longest_edge")):
            raise ConfigError(f"size must be a shortest_edge in pixels and nothing else, got {size!r}")
        height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, Mapping) else (crop, crop)
        if not _is_length(height) or height != width:
            raise ConfigError(f"crop_size must be a square in pixels, got {crop!r}")
        return cls(
            size=height,
            mean=config.get("image_mean", OPENAI_MEAN),
            std=config.get("image_std", OPENAI_STD),
            resample=config.get("resample", Image.Resampling.BICUBIC),
            shortest_edge=None if shortest_edge == height else shortest_edge,
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``preprocessor_config.json``. It has no word for the convention."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self._short},
            "resample": int(self.resample),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], size: int) -> Preprocess:
        """Read the ``preprocess_cfg`` of an ``open_clip_config.json``, for a model of ``size`` pixels.

        Raises:
            ConfigError: if it asks for steps that are not these ones.
        """
        config = {key: value for key, value in config.items() if value is not None}  # open_clip's null is the default
        if (mode := config.get("resize_mode", "shortest")) != "shortest":
            raise ConfigError(f"resize_mode must be 'shortest', got {mode!r}")
        return cls(
            size=size,
            mean=config.get("mean", OPENAI_MEAN),
            std=config.get("std", OPENAI_STD),
            resample=config.get("interpolation", "bicubic"),
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

    def crop(self, image: object) -> np.ndarray:
        """One PIL image -> (3, S, S) uint8: what the model sees of it, a quarter of the size. See ``normalise``.

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
            image = self._resize_and_crop(_on_white(image))
        return np.asarray(image).transpose(2, 0, 1)

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        short, size, shortest = self._short, self.size, min(image.size)
        width, height = (short if side == shortest else int(short * side / shortest) for side in image.size)
        if self.convention == "openai":
            left, top = round((width - size) / 2), round((height - size) / 2)
        else:
            left, top = (width - size) // 2, (height - size) // 2
        if max(image.size) > _MAX_ASPECT * shortest:
            return self._resize_center(image, (width, height), (left, top))
        if (width, height) != image.size:
            image = _resize(image, (width, height), self.resample)
        return image.crop((left, top, left + size, top + size))

    def _resize_center(self, image: Image.Image, resized: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
        """The square at ``corner`` of ``image`` resized to ``resized``, from the pixels that reach it alone."""
        spans, crop = [], []
        for side, out, start in zip(image.size, resized, corner):
            scale = side / out
            first, last = start * scale, (start + self.size) * scale
            margin = int(5 * max(scale, 1)) + 2  # Pillow's filters reach up to 4.5 pixels of the coarser grid
            low, high = max(int(first) - margin, 0), min(int(last) + margin, side)
            spans.append((first - low, last - low))
            crop.append((low, high))
        image_part = image.crop((crop[0][0], crop[1][0], crop[0][1], crop[1][1]))
        if image_part.mode in _PREMULTIPLIED:  # as Pillow's resize does, but once for both passes
            image_part = image_part.convert(_PREMULTIPLIED[image_part.mode])
        (left, right), (top, bottom) = spans
        width, height = image_part.size
        # Each pass rounds to 8 bits, so their order shows.
        if _starts_downwards(image.size, resized):
            image_part = image_part.resize((width, self.size), self.resample, box=(0, top, width, bottom))
            image_part = image_part.resize((self.size, self.size), self.resample, box=(left, 0, right, self.size))
        else:
            image_part = image_part.resize((self.size, height), self.resample, box=(left, 0, right, height))
            image_part = image_part.resize((self.size, self.size), self.resample, box=(0, top, self.size, bottom))
        return image_part.convert(image.mode)


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """``image.resize(size, resample)`` to the bit, a large one in strips on as many threads as torch has."""
    threads = min(torch.get_num_threads(), _MOST_STRIPS, image.height)
    known = image.mode in ("RGB", "L") and resample in _INTERPOLATING
    large = image.width * image.height >= _LARGE and size[0] < image.width
    if threads == 1 or not known or not large or _starts_downwards(image.size, size):
        return image.resize(size, resample)
    # Pillow resizes across, rounds to 8 bits and then resizes downwards. The first is nearly all of the work, and no
    # row of it knows of another. The strips' own second pass, from n rows to n, changes nothing.
    image.load()
    edges = [image.height * i // threads for i in range(threads + 1)]

    def strip(top: int, bottom: int) -> Image.Image:
        return image.resize((size[0], bottom - top), resample, box=(0, top, image.width, bottom))

    halfway = Image.new(image.mode, (size[0], image.height))
    try:
        with ThreadPoolExecutor(threads) as pool:
            for top, done in zip(edges, pool.map(strip, edges, edges[1:])):
                halfway.paste(done, (0, top))
    except RuntimeError:  # no thread can be started, or not any more: Python is about to end
        return image.resize(size, resample)
    return halfway.resize(size, resample)


def _starts_downwards(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow's resize begins with the vertical pass (ImagingResampleInner in its Resample.c, since 13.0)."""
    less_width, less_height = size[0] - resized[0], size[1] - resized[1]
    return _PILLOW >= 13 and less_height > max(0, 2 * less_width)


def open_image(path: str | os.PathLike[str], *, at_least: int | None = None) -> Image.Image:
    """Open a picture file as a person would see it: an RGB image.

    Upright by its EXIF orientation, transparency on white, 16 bits per channel scaled to 8, the first frame of an
    animation; HEIF if pillow-heif is installed. (PIL's ``Image.open`` does the last but one alone, and openai/CLIP
    takes what it gives.)

    Args:
        path: the file.
        at_least: pixels. A JPEG is then decoded at a half, a quarter or an eighth of its size, whichever is the
            smallest of which both sides have this many: several times as fast on photos, and not exact. With one and
            a half times the model's image size the embeddings of photos kept a cosine above 0.999 to the exact ones,
            those of fine stripes one of 0.97; with no more than the size itself photos fell to 0.99. Other formats
            are decoded whole.

    Raises:
        ImageError: naming the file, if it is missing, not an image, truncated, or too large to be decoded safely.
        InputError: if ``at_least`` is no number of pixels.
        TypeError: if ``path`` is no path.
    """
    os.fspath(path)
    if at_least is not None and not _is_length(at_least):
        raise InputError(f"at_least must be a positive number of pixels, got {at_least!r}")
    return decode_image(path, path, at_least)


def decode_image(file: str | os.PathLike[str] | BinaryIO, name: object, at_least: int | None = None) -> Image.Image:
    """``open_image`` of a path or an open file, which is called ``name`` in errors."""
    try:
        with _open(file, name) as opened:
            if opened.format in ("EPS", "IPTC"):  # the second opens whatever it has inside
                raise ImageError(name, "is or may hold PostScript, a program that Pillow would have Ghostscript run")
            if at_least is not None:
                opened.draft(None, (at_least, at_least))
            opened.load()
            image = _upright(opened)
            if image.mode != "F":
                image = _on_white(_to_8_bits(image))
                return image.copy() if image is opened else image  # a plain image, with nothing left of the file
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(name, "no such file") from error
    except IsADirectoryError as error:
        raise ImageError(name, "is a folder, not an image") from error
    except UnidentifiedImageError:
        raise ImageError(name, "is not an image in a format Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"is too large to be decoded safely ({error})") from None
    except Exception as error:  # in a damaged file Pillow's decoders trip over anything, MemoryError included
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(name, f"cannot be read ({reason})") from error
    raise ImageError(name, "holds floating-point pixels, whose range only you know: scale them to 8 bits first")


def _open(file: str | os.PathLike[str] | BinaryIO, name: object) -> Image.Image:
    """``Image.open``, and HEIF with the plugin that reads it: Pillow itself does not, and iPhones write little else."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
            raise  # a pipe: opened again, it would wait for another writer
        with open(file, "rb") if isinstance(file, str | os.PathLike) else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            start = opened.read(12)
            opened.seek(0)
        if start[4:8] != b"ftyp" or start[8:] not in _HEIF_BRANDS:
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ImageError(name, 'is a HEIF picture, which needs a plugin: pip install "miniclip[heif]"') from None
    register_heif_opener()
    return Image.open(file)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    Not by ``ImageOps.exif_transpose``: it also writes the EXIF block anew, which fails on many a real one.
    """
    try:
        method = _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture whose metadata is damaged is still a picture
        method = None
    return image if method is None else image.transpose(method)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 bits, whatever Pillow calls them: "I;16", its byte orders, or "I"."""
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips at 255, which leaves a 16-bit picture almost white.
    levels = np.asarray(image).astype(np.int32).clip(0, 65535)
    grey = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    grey[levels == image.info.get("transparency", -1)] = 255  # a PNG's transparent level, in 16 bits as well
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """To RGB, with whatever is transparent showing white behind it."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_length(value: object) -> TypeGuard[int]:
    """Whether it can be a number of pixels; True is an int to Python, but to nobody else."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _channels(name: str, values: object) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ConfigError(f"{name} must be three numbers, got {values!r}")
    if not all(isinstance(value, (int, float)) and abs(value) <= _LARGEST for value in values):  # NaN is not <=
        raise ConfigError(f"{name} must be three finite numbers, got {values!r}")
    return (float(values[0]), float(values[1]), float(values[2]))


def _resampling(value: Any) -> Image.Resampling:
    """A filter by Pillow's number, as Hugging Face writes it, or by name, as open_clip does."""
    try:
        return Image.Resampling[value.upper()] if isinstance(value, str) else Image.Resampling(value)
    except (KeyError, ValueError):
        names = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
        raise ConfigError(f"unknown resampling {value!r}; Pillow has {names}") from None
