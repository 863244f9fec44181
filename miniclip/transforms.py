"""The five steps of openai/CLIP's preprocessing one by one, for programs that index or slice ``preprocess.transforms``.

Each step takes PIL images, as torchvision's does. Resize, CenterCrop and Normalize also take tensors (…, 3, H, W):
StyleGAN-NADA, DALLE2-pytorch and CLIPasso apply some of the steps to generated images, and need gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.errors import InputError


@dataclass(frozen=True)
class Resize:
    """The short side to ``size`` pixels. Tensors are resized with antialiasing, in bicubic or bilinear."""

    size: int
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        width, height = _size(image)
        short = min(width, height)
        width, height = (self.size if side == short else int(self.size * side / short) for side in (width, height))
        if isinstance(image, Image.Image):
            return image.resize((width, height), self.resample)
        if self.resample not in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
            raise InputError(f"tensors are resized in bicubic or bilinear, not {self.resample.name.lower()}")
        batch = image.reshape(-1, *image.shape[-3:])
        mode = self.resample.name.lower()
        batch = F.interpolate(batch, size=(height, width), mode=mode, antialias=True, align_corners=False)
        return batch.reshape(*image.shape[:-2], height, width)


@dataclass(frozen=True)
class CenterCrop:
    """A square of ``size`` pixels from the middle, rounded half to even, as torchvision's."""

    size: int

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        width, height = _size(image)
        if min(width, height) < self.size:
            raise InputError(f"an image of {width} x {height} pixels cannot be cropped to {self.size}")
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        if isinstance(image, Image.Image):
            return image.crop((left, top, left + self.size, top + self.size))
        return image[..., top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class ToRGB:
    """The three channels of a PIL image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")


@dataclass(frozen=True)
class ToTensor:
    """A PIL image -> float32 (3, H, W) from 0 to 1."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).astype(np.float32)) / 255


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / std for each channel of (…, 3, H, W)."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        if not isinstance(pixels, Tensor) or pixels.ndim < 3 or pixels.shape[-3] != 3:
            found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputError(f"Normalize takes a tensor (…, 3, H, W), got {found}")
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


def _size(image: Image.Image | Tensor) -> tuple[int, int]:
    """The width and the height of an image."""
    if isinstance(image, Image.Image):
        return image.size
    if not isinstance(image, Tensor) or image.ndim < 3:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"a step takes a PIL image or a tensor (…, 3, H, W), got {found}")
    return int(image.shape[-1]), int(image.shape[-2])
