"""Image files -> PIL images as a person sees them: upright, RGB, 8 bits, transparency on white."""

from __future__ import annotations

import contextlib
import os
from typing import BinaryIO, TypeGuard

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from miniclip.errors import ImageError, InputError
from miniclip.terminal import escaped

#: Bytes that the pixels of an image may take when they are decoded: 134 million pixels of 4 bytes.
MAX_BYTES = 2**29

# The brands of a file in the High Efficiency Image File Format (ISO/IEC 23008-12, 10.2 and annex B.4).
_BITS_PER_SAMPLE = 258  # the tag of TIFF
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What turns the stored pixels upright, by EXIF orientation. Orientation 1 is upright already.
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | os.PathLike[str], *, min_side: int | None = None, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Open an image file as a person sees the image.

    The EXIF orientation is applied, transparency is put on white, 16 bits per channel are scaled to 8, and an animation
    gives its first frame. HEIF files need pillow-heif. ``PIL.Image.open``, which openai/CLIP uses, does none of this:
    it only takes the first frame.

    Args:
        path: the file.
        min_side: a number of pixels. A JPEG is then decoded at a half, a quarter or an eighth of its size: the smallest
            of these whose two sides have at least ``min_side`` pixels. This is several times as fast on large photos,
            but not exact. With 1.5 times the model's image size, the embeddings of photos kept a cosine above 0.999 to
            the exact ones, and those of fine stripes kept 0.97. With the image size itself, photos fell to 0.99. Other
            formats are always decoded in full.
        max_bytes: refuse an image whose pixels take more bytes than this when they are decoded, at 4 bytes per pixel. A
            file of a few bytes may declare such a size. To decode takes up to five times as much for a moment. Pillow
            also has a limit of its own, of 179 million pixels.

    Returns:
        A plain ``PIL.Image.Image`` in mode "RGB". It holds no open file.

    Raises:
        ImageError: if the file is missing, is not an image, is truncated, or is too large to decode safely. The message
            names the file.
        InputError: if ``min_side`` is not a positive number of pixels, or ``max_bytes`` not a positive number.
        TypeError: if ``path`` is not a path.
    """
    os.fspath(path)
    if not is_side(max_bytes):
        raise InputError(f"max_bytes must be a positive number of bytes, got {max_bytes!r}")
    if min_side is not None and not is_side(min_side):
        raise InputError(f"min_side must be a positive number of pixels, got {min_side!r}")
    return decode_image(path, path, min_side, max_bytes)


def decode_image(
    file: str | os.PathLike[str] | BinaryIO, name: object, min_side: int | None = None, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """``open_image`` of a path or an open file.

    Args:
        file: a path, or a binary file that can seek.
        name: what errors call the file.
        min_side, max_bytes: as in ``open_image``.

    Raises:
        ImageError: as ``open_image`` does.
    """
    try:
        with _open(file, name) as opened:
            if opened.format in ("EPS", "IPTC"):  # an IPTC record may contain an EPS file, which Pillow opens
                raise ImageError(name, "is or may contain PostScript, a program that Pillow runs with Ghostscript")
            if min_side is not None:
                opened.draft(None, (min_side, min_side))
            if (needed := 4 * opened.width * opened.height) > max_bytes:
                raise ImageError(name, f"takes {needed:,} bytes when it is decoded, and the limit is {max_bytes:,}")
            opened.load()
            image = _apply_orientation(opened)
            if opened.mode == "I" and 32 in getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, ()):
                low, high = opened.getextrema()
                raise ImageError(name, f"has 32-bit integer pixels from {low} to {high}: scale them to 8 bits first")
            if image.mode != "F":
                image = on_white(_to_8_bits(image))
                return image.copy() if image is opened else image  # a plain image, without a reference to the file
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
    except Exception as error:  # on a damaged file Pillow's decoders raise anything, MemoryError included
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(name, f"cannot be read ({escaped(reason)})") from error
    raise ImageError(name, "has floating-point pixels of an unknown range: scale them to 8 bits first")


def on_white(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. Its transparent parts show white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_side(value: object) -> TypeGuard[int]:
    """Whether a value can be a side in pixels. Python counts True as an int; here it is refused."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _open(file: str | os.PathLike[str] | BinaryIO, name: object) -> Image.Image:
    """``Image.open``, with the plugin for HEIF, the format of iPhones. Pillow itself does not read HEIF."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
            raise  # opening a pipe again would wait for another writer
        with open(file, "rb") if isinstance(file, str | os.PathLike) else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            start = opened.read(12)
            opened.seek(0)
        if start[4:8] != b"ftyp" or start[8:] not in _HEIF_BRANDS:
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        install = 'pip install -c constraints.txt -e ".[heif]"'
        raise ImageError(name, f"is a HEIF image, which needs a plugin: {install}") from None
    register_heif_opener()
    return Image.open(file)


def _apply_orientation(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    ``ImageOps.exif_transpose`` is not used: it also rewrites the EXIF block, and that fails on many real files.
    """
    try:
        method = _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an image with damaged metadata is still an image
        method = None
    return image if method is None else image.transpose(method)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey levels to 8 bits. Pillow has several modes for them: "I;16", its byte orders, and "I"."""
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips at 255, which leaves a 16-bit image almost white.
    levels = np.asarray(image).astype(np.int32).clip(0, 65535)
    grey = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    grey[levels == image.info.get("transparency", -1)] = 255  # the transparent level of a PNG, also in 16 bits
    return Image.fromarray(grey)
