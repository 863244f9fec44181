"""Opening image files: every format and depth as a person sees it, and one error that names a bad file."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.make_preprocess_goldens import noise, sample_image
from helpers import make_image, run_python
from PIL import ExifTags, Image, ImageFile

import miniclip
from miniclip import ImageError, InputError, MiniclipError, open_image
from validation.reference import sample_images

# -- opening files --------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of a kind that Pillow does not write."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    every = [header, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in every
    )


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], np.ndarray]:
    """Writes a file and opens it: bytes -> (H, W, 3)."""

    def open_bytes(data: bytes) -> np.ndarray:
        (tmp_path / "image").write_bytes(data)
        image = open_image(tmp_path / "image")
        assert image.mode == "RGB"
        assert type(image) is Image.Image  # it does not refer to the file
        return np.asarray(image)

    return open_bytes


Opened = Callable[[bytes], np.ndarray]

# By EXIF orientation: (H, W, 3) as stored -> as shown.
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    0: lambda a: a,  # not a value of the standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = "a description"
    return block


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation: int, format: str, opened: Opened) -> None:
    image = sample_image("RGB", 24, 16)
    options = {"lossless": True} if format == "WEBP" else {}
    stored = opened(encoded(image, format, **options))
    assert stored.shape == (16, 24, 3)
    shown = opened(encoded(image, format, exif=exif(orientation), **options))
    assert np.array_equal(shown, ORIENTATIONS[orientation](stored))


def test_16_bit_images_are_turned_upright(opened: Opened) -> None:
    image = sample_image("I;16", 24, 16)
    assert np.array_equal(opened(encoded(image, "PNG", exif=exif(6))), np.rot90(opened(encoded(image, "PNG")), -1))


def test_images_with_damaged_exif_are_opened(opened: Opened) -> None:
    """The orientation is applied if it can be read. Many real files have a block that Pillow cannot write again."""
    image = sample_image("RGB", 24, 16)
    stored = opened(encoded(image, "JPEG"))
    for block in (b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        data = encoded(image, "JPEG", exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert np.array_equal(opened(data), stored)
    # A valid orientation 6, then a description that is wrongly stored as a rational number.
    tags = struct.pack("<HHHIHHHHII", 2, 0x0112, 3, 1, 6, 0, 0x010E, 5, 1, 38) + struct.pack("<III", 0, 1, 0)
    data = encoded(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    assert np.array_equal(opened(data), np.rot90(stored, -1))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_becomes_white(format: str, opened: Opened) -> None:
    image = sample_image("RGBA", 24, 16)
    pixels = np.asarray(image).astype(float)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    assert (alpha == 0).any()
    shown = opened(encoded(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {})))
    assert np.abs(shown - on_white(colour, alpha)).max() <= 1
    assert (shown[alpha[..., 0] == 0] == 255).all()


def test_grey_with_alpha_becomes_white(opened: Opened) -> None:
    image = sample_image("LA", 24, 16)
    grey, alpha = np.asarray(image).astype(float).transpose(2, 0, 1)
    shown = opened(encoded(image, "PNG"))
    assert np.abs(shown - on_white(grey, alpha)[..., None]).max() <= 1


def test_transparent_palette_entries_become_white(opened: Opened) -> None:
    image = sample_image("P", 24, 16)
    indices = np.asarray(image)
    palette, alphas = noise(7, 256, 3).astype(float), noise(8, 256)
    assert np.array_equal(opened(encoded(image, "PNG")), palette[indices])
    shown = opened(encoded(image, "PNG", transparency=alphas.tobytes()))
    assert np.abs(shown - on_white(palette[indices], alphas[indices][..., None])).max() <= 1
    chosen = int(indices[3, 3])
    for format in ("PNG", "GIF"):
        shown = opened(encoded(image, format, transparency=chosen))
        assert np.array_equal(shown, np.where((indices == chosen)[..., None], 255, palette[indices])), format


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_becomes_white(mode: str, opened: Opened) -> None:
    image = sample_image(mode, 24, 16)
    pixels = np.asarray(image.convert("RGB"))
    colour = image.getpixel((5, 5))
    match = (pixels == np.array(colour)).all(-1, keepdims=True)
    assert match.any()
    assert np.array_equal(opened(encoded(image, "PNG", transparency=colour)), np.where(match, 255, pixels))
    assert np.array_equal(opened(encoded(image, "PNG")), pixels)


def test_1_bit_images_become_black_and_white(opened: Opened) -> None:
    image = sample_image("1", 24, 16)
    expected = np.asarray(image)[..., None].repeat(3, -1) * 255
    assert np.array_equal(opened(encoded(image, "PNG")), expected)
    assert np.array_equal(opened(encoded(image, "TIFF", compression="group4")), expected)
    assert (opened(encoded(image, "PNG", transparency=0)) == 255).all()


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
RAMP_SHOWN = np.rint(RAMP / 65535 * 255).astype(np.uint8)[..., None].repeat(3, -1)


def ramp(order: str) -> bytes:
    return RAMP.astype(f"{order}u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.frombytes("I;16", (256, 256), ramp("<")), "PNG"),
        encoded(Image.frombytes("I;16", (256, 256), ramp("<")), "TIFF"),
        encoded(Image.frombytes("I;16B", (256, 256), ramp(">")), "TIFF"),
        b"P5 256 256 65535\n" + ramp(">"),
    ],
    ids=["PNG", "TIFF", "TIFF big-endian", "PGM"],
)
def test_16_bits_are_scaled(data: bytes, opened: Opened) -> None:
    assert np.array_equal(opened(data), RAMP_SHOWN)


def test_a_transparent_16_bit_level_becomes_white(opened: Opened) -> None:
    rows = b"\0" + struct.pack(">4H", 0, 1000, 40_000, 65_535)
    assert opened(png(4, 1, 16, 0, rows))[0, :, 0].tolist() == [0, 4, 156, 255]
    assert opened(png(4, 1, 16, 0, rows, (b"tRNS", b"\x03\xe8")))[0, :, 0].tolist() == [0, 255, 156, 255]


def test_16_bit_colour_and_alpha_are_scaled(opened: Opened) -> None:
    assert opened(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65_535, 0, 32_896, 0, 65_535, 257))).tolist() == [
        [[255, 0, 128], [0, 255, 1]]
    ]
    with_alpha = struct.pack(">8H", 65_535, 0, 32_896, 65_535, 65_535, 0, 32_896, 0)
    assert opened(png(2, 1, 16, 6, b"\0" + with_alpha)).tolist() == [[[255, 0, 128], [255, 255, 255]]]
    grey_with_alpha = struct.pack(">4H", 32_896, 65_535, 32_896, 0)
    assert opened(png(2, 1, 16, 4, b"\0" + grey_with_alpha)).tolist() == [[[128] * 3, [255] * 3]]


def test_cmyk_images_are_converted(opened: Opened) -> None:
    shown = opened(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(shown.astype(int) - [255, 0, 0]).max() < 8
    assert np.array_equal(opened(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"))[0, 0], [0, 255, 255])


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_an_animation_gives_its_first_frame(format: str, opened: Opened) -> None:
    first, second = Image.new("RGB", (24, 16), (200, 30, 40)), Image.new("RGB", (24, 16), (10, 220, 90))
    data = encoded(first, format, save_all=True, append_images=[second])
    assert len(data) > len(encoded(first, format))
    assert np.abs(opened(data).astype(int) - [200, 30, 40]).max() < 10


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "CMYK"])
def test_other_colour_spaces_are_converted(mode: str, opened: Opened) -> None:
    image = sample_image(mode, 24, 16)
    assert np.array_equal(opened(encoded(image, "TIFF")), np.asarray(image.convert("RGB")))


def test_every_kind_of_path_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a photo – été 猫.png"
    path.write_bytes(encoded(sample_image("RGB", 24, 16), "PNG"))
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), os.fsencode(path), path.name, "link"):
        assert open_image(name).size == (24, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 7, io.BytesIO(), ["a.png"], sample_image("RGB", 4, 4)])
def test_other_types_than_paths_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError):
        open_image(wrong)


# -- files that cannot be opened ----------------------------------------------------------------------------------

WHOLE = encoded(sample_image("RGB", 64, 48), "JPEG")
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not an image"),
    "text": (b"a photo of a cat\n" * 40, "is not an image"),
    "JPEG, first bytes only": (WHOLE[:3], "is not an image"),
    "JPEG, header only": (WHOLE[:200], "is not an image|cannot be read"),
    "JPEG, cut in the middle": (WHOLE[: len(WHOLE) // 2 + 300], "cannot be read .*truncated"),
    "PNG, cut in the middle": (encoded(sample_image("RGB", 64, 48), "PNG")[:2000], "cannot be read .*truncated"),
    "PNG of 3.6 billion pixels": (png(60_000, 60_000, 8, 2, b""), "is too large to be decoded safely"),
    "PNG without pixels": (png(0, 0, 8, 2, b""), "cannot be read|is not an image"),
    "PNG with a wrong transparent colour": (png(1, 1, 8, 2, b"\0abc", (b"tRNS", b"\0")), "cannot be read"),
    "32-bit integers": (
        encoded(Image.fromarray(np.arange(384, dtype=np.int32).reshape(16, 24)), "TIFF"),
        "has 32-bit integer pixels from 0 to 383: scale them to 8 bits first",
    ),
    "floats": (encoded(sample_image("F", 24, 16), "TIFF"), "has floating-point pixels"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_errors_name_the_bad_file(kind: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == path
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, MiniclipError)
    again = pickle.loads(pickle.dumps(caught.value))  # as from a worker process
    assert (str(again), again.path, again.reason) == (str(caught.value), path, caught.value.reason)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        open_image(tmp_path / "nowhere.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"link\.png: no such file"):
        open_image(tmp_path / "link.png")
    with pytest.raises(ImageError, match="is a folder, not an image"):
        open_image(tmp_path)
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    with pytest.raises(ImageError, match=r"round\.png: cannot be read \(.*symbolic links"):
        open_image(tmp_path / "round.png")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("nul\0byte.png")
    with pytest.raises(ImageError, match=r"cannot be read \(File name too long"):
        open_image("x" * 5000)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because root may read every file."""

    def refuse(path: str, *_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ImageError, match=r"secret\.png: cannot be read \(Permission denied\)"):
        open_image(tmp_path / "secret.png")


ERRORS = [
    struct.error("unpack requires a buffer of 4 bytes"), zlib.error("bad data"), MemoryError(), RecursionError("deep"),
    AttributeError("no encode"), AssertionError(), NotImplementedError("BLP"), RuntimeError("AVIF"), EOFError(),
    SyntaxError("broken"), ValueError("bad"), TypeError("bad"), KeyError(7), IndexError(), OverflowError("huge"),
    ZeroDivisionError("division by zero"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "start"), OSError("broken data"),
    OSError(5, "Input/output error"), Image.DecompressionBombWarning("large"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["load", "transpose", "convert"])
def test_every_error_of_a_decoder_becomes_an_image_error(
    error: Exception, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = tmp_path / "photo.tga"
    path.write_bytes(encoded(sample_image("L", 24, 16), "PNG", exif=exif(6)))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load" if step == "load" else f"PIL.Image.Image.{step}", fail)
    with pytest.raises(ImageError, match=r"photo\.tga: cannot be read \(.+\)$") as caught:
        open_image(path)
    assert caught.value.__cause__ is error


def test_an_interrupt_is_not_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_image(tmp_path / "photo.png")


def damaged(source: random.Random) -> Iterator[bytes]:
    """Small files of common formats with some bytes overwritten, lost, doubled or cut off."""
    rgb, grey, palette, alpha = (sample_image(mode, 24, 16) for mode in ("RGB", "L", "P", "RGBA"))
    wholes = [
        encoded(rgb, "JPEG", exif=exif(6)), encoded(rgb, "JPEG", progressive=True), encoded(alpha, "PNG", exif=exif(3)),
        encoded(palette, "PNG", transparency=5), encoded(sample_image("I;16", 24, 16), "PNG"), encoded(rgb, "BMP"),
        encoded(palette, "GIF", save_all=True, append_images=[grey.convert("P")]), encoded(rgb, "TIFF", exif=exif(8)),
        encoded(grey, "TIFF", compression="tiff_lzw"), encoded(rgb, "WEBP"), encoded(alpha, "WEBP", lossless=True),
    ]  # fmt: skip
    while True:
        data = bytearray(source.choice(wholes))
        kind = source.randrange(4)
        place = source.randrange(min(len(data), source.choice([40, 200, 10_000])))
        if kind == 0:
            del data[place:]
        elif kind == 1:
            del data[place : place + source.randrange(1, 20)]
        elif kind == 2:
            data[place:place] = data[: source.randrange(1, 20)]
        else:
            for _ in range(source.randrange(1, 10)):
                data[place] = source.choice([0, 1, 127, 128, 255, source.randrange(256)])
                place = source.randrange(len(data))
        yield bytes(data)


def test_damaged_files_open_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 300 kinds of damage: the result is an image or an ImageError, and no file stays open."""
    handles, errors, files = [], [], damaged(random.Random(0))
    real = builtins.open

    def recording(*args: Any, **kwargs: Any) -> Any:
        handles.append(real(*args, **kwargs))
        return handles[-1]

    path = tmp_path / "photo"
    for _ in range(300):
        path.write_bytes(next(files))
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(builtins, "open", recording)
            try:
                assert open_image(path).mode == "RGB"
            except ImageError as error:
                errors.append(error)
        assert handles[-1].closed
    assert all(error.path == path for error in errors)
    assert 100 < len(errors) < 290


@pytest.mark.parametrize(
    ("size", "min_side", "decoded"),
    [
        ((400, 300), 301, (400, 300)),
        ((400, 300), 300, (400, 300)),
        ((400, 300), 150, (200, 150)),
        ((400, 300), 76, (200, 150)),
        ((400, 300), 75, (100, 75)),
        ((403, 299), 38, (101, 75)),
        ((403, 299), 37, (51, 38)),
        ((403, 299), 1, (51, 38)),
    ],
)
def test_min_side_chooses_the_smallest_sufficient_jpeg_scale(
    size: tuple[int, int], min_side: int, decoded: tuple[int, int], tmp_path: Path
) -> None:
    image = sample_image("RGB", *size)
    for format in ("JPEG", "PNG", "WEBP"):
        image.save(tmp_path / format, format)
        expected = decoded if format == "JPEG" else size
        assert open_image(tmp_path / format, min_side=min_side).size == expected
        assert open_image(tmp_path / format).size == size


def test_min_side_keeps_the_image_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sample_image("RGB", 400, 300).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg", min_side=100).size == (150, 200)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "224"])
def test_an_invalid_min_side_is_refused(wrong: Any, tmp_path: Path) -> None:
    sample_image("RGB", 9, 9).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="min_side must be a positive number of pixels"):
        open_image(tmp_path / "a.jpg", min_side=wrong)


def test_fast_decoding_keeps_the_embedding(tmp_path: Path) -> None:
    """The cosines in open_image's docstring, for 1.5 times the image size and for the image size itself."""
    model, preprocess = miniclip.load("demo", "cpu")
    cosines: dict[float, list[float]] = {1.5: [], 1: []}
    for photo in sample_images():
        for size in (photo.size, (258, 258), (450, 300), (512, 400), (1600, 1200)):
            photo.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=90)
            exact = model.encode_image(preprocess([open_image(tmp_path / "a.jpg")]))
            for times, found in cosines.items():
                image = open_image(tmp_path / "a.jpg", min_side=int(times * preprocess.size))
                found.append(torch.cosine_similarity(model.encode_image(preprocess([image])), exact).item())
    assert min(cosines[1.5]) >= 0.999
    assert 0.98 < min(cosines[1]) < 0.998


@pytest.mark.slow
def test_heif_is_read_with_the_plugin(tmp_path: Path) -> None:
    """As an iPhone writes it: stored in landscape, shown in portrait."""
    colours = Image.new("RGB", (64, 32))
    colours.paste((255, 0, 0), (0, 0, 32, 32))
    colours.paste((0, 0, 255), (32, 0, 64, 32))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise: the left side comes to the top
    path = tmp_path / "photo.heic"
    code = "import sys, pillow_heif; pillow_heif.register_heif_opener(); from PIL import Image\n"
    code += f"Image.open(sys.argv[1]).save(sys.argv[2], quality=100, exif={exif.tobytes()!r})"
    colours.save(tmp_path / "photo.png")
    assert run_python("-c", code, tmp_path / "photo.png", path).returncode == 0
    # Each in its own process, because Pillow keeps a registered format.
    code = "import json, sys; from miniclip import open_image\n"
    code += "image = open_image(sys.argv[1]); print(json.dumps([image.size, image.getpixel((16, 8)), image.mode]))"
    done = run_python("-c", code, path)
    size, (red, green, blue), mode = json.loads(done.stdout)
    assert (size, mode) == ([32, 64], "RGB")
    assert red > 230
    assert max(green, blue) < 25
    without = "import sys; sys.modules['pillow_heif'] = None\n" + code
    done = run_python("-c", without, path)
    said = 'photo.heic: is a HEIF image, which needs a plugin: pip install -c constraints.txt -e ".[heif]"'
    assert done.stderr.strip().endswith(said)
    os.mkfifo(tmp_path / "pipe")
    piping = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"not an image" * 8,))
    piping.start()
    with pytest.raises(ImageError, match="pipe: is not an image"):
        open_image(tmp_path / "pipe")  # without waiting for a second writer
    piping.join()
    path.write_bytes(path.read_bytes()[:300])
    done = run_python("-c", code, path)
    assert "miniclip.errors.ImageError" in done.stderr


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "image.eps"
    Image.new("RGB", (4, 4), "red").save(path)
    with pytest.raises(ImageError, match=r"image\.eps: is or may contain PostScript"):
        open_image(path)


def test_postscript_inside_an_iptc_record_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow opens the image that an IPTC record contains."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "image.eps")

    def record(section: int, number: int, data: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, section, number, len(data)) + data

    size = struct.pack(">H", 4)
    fields = record(3, 60, b"\1\0") + record(3, 20, size) + record(3, 30, size) + record(3, 120, b"\5")
    (tmp_path / "photo.jpg").write_bytes(fields + record(8, 10, (tmp_path / "image.eps").read_bytes()))
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: ran.append(arguments))
    with pytest.raises(ImageError, match=r"photo\.jpg: is or may contain PostScript"):
        open_image(tmp_path / "photo.jpg")
    assert not ran


# -- the memory of one image ------------------------------------------------------------------------------------------


def never(*_: object) -> None:
    raise AssertionError("pixels were decoded")


@pytest.mark.parametrize(
    ("size", "suffix"), [((13_000, 13_000), "gif"), ((1, 170_000_000), "pgm"), ((20_000, 8_000), "tif")]
)
def test_an_image_that_declares_too_many_pixels_is_not_decoded(
    tmp_path: Path, size: tuple[int, int], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (width, height) = tmp_path / f"large.{suffix}", size
    if suffix == "pgm":
        path.write_bytes(f"P5 {width} {height} 255\n".encode())
    else:
        Image.new("P" if suffix == "gif" else "L", (8, 8)).save(path)
        data = path.read_bytes()
        if suffix == "gif":
            data = data[:6] + struct.pack("<HH", width, height) + data[10:]
        else:
            for tag, value in ((256, width), (257, height)):
                entry = data.index(struct.pack("<HH", tag, 4 if struct.pack("<HH", tag, 4) in data else 3))
                data = data[:entry] + struct.pack("<HHII", tag, 4, 1, value) + data[entry + 12 :]
        path.write_bytes(data)
    with Image.open(path) as opened:
        assert opened.size == size
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    monkeypatch.setattr(Image.Image, "load", never)
    needed = 4 * width * height
    with pytest.raises(ImageError, match=rf"takes {needed:,} bytes when it is decoded, and the limit is 536,870,912"):
        miniclip.open_image(path)


def test_the_limit_is_an_argument(tmp_path: Path, tiny: Path) -> None:
    make_image(tmp_path / "photos" / "small.png", 1, (40, 30))
    make_image(tmp_path / "photos" / "large.jpg", 2, (400, 300))
    path = tmp_path / "photos" / "large.jpg"
    assert miniclip.open_image(path, max_bytes=480_000).size == (400, 300)
    with pytest.raises(ImageError, match="takes 480,000 bytes when it is decoded, and the limit is 479,999"):
        miniclip.open_image(path, max_bytes=479_999)
    assert miniclip.open_image(path, max_bytes=479_999, min_side=100).size == (200, 150)  # decoded at half its size
    for wrong in (0, -1, True, 1.5, None):
        with pytest.raises(InputError, match="max_bytes must be a positive number of bytes"):
            miniclip.open_image(path, max_bytes=wrong)  # type: ignore[arg-type]
    done = miniclip.embed_images(tmp_path / "photos", tmp_path / "out", tiny, device="cpu", max_image_bytes=5_000)
    assert (done.embedded, done.failed) == (1, 1)
    assert "takes 480,000 bytes" in (tmp_path / "out" / "failures.jsonl").read_text()
    with pytest.raises(InputError, match="max_image_bytes must be an int of at least 1, got 0"):
        miniclip.embed_images(tmp_path / "photos", tmp_path / "out", tiny, max_image_bytes=0)
