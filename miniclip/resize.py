"""Pillow's resize, to the bit: large images in strips on several threads, very long images in bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from PIL import __version__ as PILLOW_VERSION

# Up to this ratio of the sides, the whole image is resized and then cropped, as both references do. Beyond it, only the
# region of the crop is resampled: a 1 x 4000 image of a few hundred bytes would otherwise take 600 MB.
_MAX_ASPECT = 100

# Strips pay from this many pixels on. More than eight threads would wait for the memory.
_LARGE = 2_000_000
_MOST_STRIPS = 8
# Filters whose kernel is 1 at distance 0 and 0 at every other whole distance: they do not change an image that keeps
# its size.
_INTERPOLATING = {Image.Resampling[name] for name in ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")}

# Pillow filters these modes with premultiplied alpha.
_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}

_PILLOW_MAJOR = int(PILLOW_VERSION.partition(".")[0])


def resize_and_crop(
    image: Image.Image, resized: tuple[int, int], corner: tuple[int, int], size: int, resample: Image.Resampling
) -> Image.Image:
    """Resize an image and crop a square.

    The result equals Pillow's ``resize`` and ``crop`` to the bit, up to an aspect ratio of 100. Beyond that ratio,
    memory stays bounded and the rounding differs.

    Args:
        image: in any mode.
        resized: (width, height) after the resize.
        corner: (left, top) of the square in the resized image.
        size: the side of the square in pixels.
        resample: Pillow's filter.
    """
    if max(image.size) > _MAX_ASPECT * min(image.size):
        return _resize_region(image, resized, corner, size, resample)
    if resized != image.size:
        image = _resize(image, resized, resample)
    left, top = corner
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """``image.resize(size, resample)`` to the bit. A large image is cut into strips for torch's number of threads."""
    threads = min(torch.get_num_threads(), _MOST_STRIPS, image.height)
    is_exact = image.mode in ("RGB", "L") and resample in _INTERPOLATING and not _vertical_pass_first(image.size, size)
    is_large = image.width * image.height >= _LARGE and size[0] < image.width
    if threads == 1 or not is_exact or not is_large:
        return image.resize(size, resample)
    # Pillow resizes horizontally, rounds to 8 bits, and then resizes vertically. The horizontal pass is nearly all of
    # the work, and its rows are independent. The vertical pass of each strip, from n rows to n, changes nothing.
    image.load()
    edges = [image.height * i // threads for i in range(threads + 1)]

    def resize_strip(top: int, bottom: int) -> Image.Image:
        return image.resize((size[0], bottom - top), resample, box=(0, top, image.width, bottom))

    narrow = Image.new(image.mode, (size[0], image.height))
    try:
        with ThreadPoolExecutor(threads) as pool:
            for top, strip in zip(edges, pool.map(resize_strip, edges, edges[1:])):
                narrow.paste(strip, (0, top))
    except RuntimeError:  # no thread can be started, for example because Python is shutting down
        return image.resize(size, resample)
    return narrow.resize(size, resample)


def _resize_region(
    image: Image.Image, resized: tuple[int, int], corner: tuple[int, int], size: int, resample: Image.Resampling
) -> Image.Image:
    """``resize_and_crop`` that reads only the pixels that the square depends on."""
    spans, region = [], []
    for side, out, start in zip(image.size, resized, corner):
        scale = side / out
        first, last = start * scale, (start + size) * scale
        margin = int(5 * max(scale, 1)) + 2  # Pillow's filters reach up to 4.5 pixels of the coarser grid
        low, high = max(int(first) - margin, 0), min(int(last) + margin, side)
        spans.append((first - low, last - low))
        region.append((low, high))
    part = image.crop((region[0][0], region[1][0], region[0][1], region[1][1]))
    if part.mode in _PREMULTIPLIED:  # Pillow's resize does the same; here it is done once for both passes
        part = part.convert(_PREMULTIPLIED[part.mode])
    (left, right), (top, bottom) = spans
    width, height = part.size
    # Each pass rounds to 8 bits, so the order of the two passes shows in the result.
    if _vertical_pass_first(image.size, resized):
        part = part.resize((width, size), resample, box=(0, top, width, bottom))
        part = part.resize((size, size), resample, box=(left, 0, right, size))
    else:
        part = part.resize((size, height), resample, box=(left, 0, right, height))
        part = part.resize((size, size), resample, box=(0, top, size, bottom))
    return part.convert(image.mode)


def _vertical_pass_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow's resize starts with the vertical pass (``ImagingResampleInner`` in Resample.c, since 13.0)."""
    less_width, less_height = size[0] - resized[0], size[1] - resized[1]
    return _PILLOW_MAJOR >= 13 and less_height > max(0, 2 * less_width)
