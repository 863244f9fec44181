"""The attacks of ``fuzz.py``: how each makes a case from good files, and how it judges what miniclip makes of a case.

A case is the content of one file. Where several files could be damaged, the first line of the case is the name of the
file, and the rest is its content.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import miniclip
from miniclip import huggingface
from miniclip.check import check_folder
from miniclip.config import CLIPConfig, TextConfig, VisionConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from changes import judge_chain  # noqa: E402
from helpers import make_image  # noqa: E402
from peers import openai_tokenizer  # noqa: E402

REFUSED = "refused"
LONGEST_MESSAGE = 2_000


class Broken(Exception):
    """A case to which miniclip's answer is wrong, or no clear error."""


@dataclass(frozen=True)
class Attack:
    """How an attack makes a case, and what it finds out about one. ``judge`` returns the outcome in a few words."""

    make: Callable[[random.Random], bytes]
    judge: Callable[[bytes, Path], str]


def judge(name: str, data: bytes, place: Path) -> str:
    """The outcome of a case.

    Args:
        name: of the attack.
        data: the case.
        place: a folder for the attack's files.

    Raises:
        Broken: if the outcome is neither right nor one clear error.
    """
    place.mkdir(parents=True, exist_ok=True)
    try:
        return ATTACKS[name].judge(data, place)
    except miniclip.MiniclipError as error:
        text = str(error)
        if not text.strip() or not text.isprintable() or len(text) > LONGEST_MESSAGE:
            raise Broken(f"a message of {len(text)} characters that is not one line: {text[:300]!r}") from error
        return REFUSED
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {str(error)[:300]!r}") from error


def require(right: bool, what: str) -> None:
    if not right:
        raise Broken(what)


# -- damage -----------------------------------------------------------------------------------------------------------

ODD_NUMBERS = [-1, 0, 1, 2, 0.0, 1.5, -0.5, 1e300, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, math.nan, math.inf]
ODD_STRINGS = ["", "1", "../x", "\x00", "\ud800", "\x1b[2J", "a" * 3000]
ODD_VALUES: list[Any] = [*ODD_NUMBERS, *ODD_STRINGS, True, False, None, [], {}, [1], [[]], {"a": 1}]
ODD_BYTES = [0, 1, 9, 10, 34, 44, 45, 48, 57, 91, 93, 123, 125, 127, 128, 255]


def damaged(data: bytes, choose: random.Random) -> bytes:
    """A copy with one to four damages, most of them near the beginning, where descriptions are."""
    damage = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        size = len(damage)
        place = choose.randrange(min(size, choose.choice([16, 200, 5_000, size])) or 1) if size else 0
        length = choose.choice([1, 1, 2, 4, 8, choose.randrange(1, 100), choose.randrange(1, 5_000)])
        kind = choose.randrange(7)
        if kind == 0:
            del damage[place:]
        elif kind == 1:
            del damage[place : place + length]
        elif kind == 2:
            damage[place:place] = damage[choose.randrange(size + 1) :][:length]
        elif kind == 3:
            damage[place : place + length] = bytes([choose.choice(ODD_BYTES)]) * length
        elif kind == 4 and size:
            damage[min(place, size - 1)] ^= 1 << choose.randrange(8)
        elif kind == 5:
            damage[place : place + 4] = struct.pack(
                choose.choice("<>") + "I", choose.choice([0, 1, 2**31 - 1, 2**32 - 1])
            )
        else:
            damage += damage[:length]
    return bytes(damage)


def damaged_json(text: bytes, choose: random.Random) -> bytes:
    """A JSON text with one to three values, names or entries changed."""
    document = json.loads(text)
    for _ in range(choose.choice([1, 1, 2, 3])):
        places = list(_places(document))
        if not places:
            break
        parent, key = choose.choice(places)
        kind = choose.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[choose.choice([key + "x", key.upper(), "", "\x1b[2J"])] = parent.pop(key)
        elif kind == 2:
            parent[key] = [parent[key]]
        elif kind == 3:
            other, name = choose.choice(places)
            parent[key] = other[name] if (other, name) in places and not isinstance(other[name], (dict, list)) else None
        else:
            parent[key] = copy.deepcopy(choose.choice(ODD_VALUES))  # later damage may change what it holds
    if choose.random() < 0.02:
        document = choose.choice(ODD_VALUES)
    return json.dumps(document).encode()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in a JSON document, as the object or list that holds the value, and the key."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from _places(document[key])


# -- checkpoints and configurations -----------------------------------------------------------------------------------


@functools.cache
def good_model() -> dict[str, dict[str, bytes]]:
    """A small CLIP with random weights in each layout: the names and contents of its files."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 2, "heads": 2}
    vision = VisionConfig(width=16, mlp_width=24, patch_size=8, image_size=16, **sizes)
    text = TextConfig(width=8, mlp_width=16, context_length=12, vocab_size=50, end_of_text=49, **sizes)
    model = miniclip.CLIP(CLIPConfig(embed_dim=8, vision=vision, text=text)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    with tempfile.TemporaryDirectory() as folder:
        miniclip.save_pretrained(model, folder)
        hf = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return {"hf": hf, "openai": {**hf, "model.safetensors": safetensors.torch.save(model.state_dict())}}


def make_checkpoint(choose: random.Random) -> bytes:
    data = good_model()[choose.choice(["hf", "openai"])]["model.safetensors"]
    length = int.from_bytes(data[:8], "little")
    kind = choose.random()
    if kind < 0.4:
        return damaged(data, choose)
    header, numbers = data[8 : 8 + length], data[8 + length :]
    header = damaged_json(header, choose) if kind < 0.8 else damaged(header, choose)
    return struct.pack("<Q", len(header)) + header + numbers


def judge_checkpoint(data: bytes, place: Path) -> str:
    """What loads must be what the safetensors library reads from the same bytes."""
    for name, content in good_model()["hf"].items():
        (place / name).write_bytes(content)
    (place / "model.safetensors").unlink()  # the file may be mapped by the model of the case before
    (place / "model.safetensors").write_bytes(data)
    model, _ = miniclip.load(place, "cpu")
    told = safetensors.torch.load(data)
    state = model.state_dict()
    loaded = state if "visual.proj" in told else huggingface.tensors_to_hf(state)
    for name, tensor in loaded.items():
        require(
            torch.equal(tensor.view(torch.int32), told[name].float().view(torch.int32)), f"{name} is not the file's"
        )
    return "loaded what the file holds"


def make_configuration(choose: random.Random) -> bytes:
    files = good_model()["hf"]
    name = choose.choice(["config.json", "config.json", "preprocessor_config.json"])
    content = files[name]
    return name.encode() + b"\n" + (damaged_json if choose.random() < 0.7 else damaged)(content, choose)


def judge_configuration(data: bytes, place: Path) -> str:
    """A model that loads has finite answers, and the settings that transformers reads from the same file."""
    from transformers import CLIPConfig as Reference

    for name, content in (good_model()["hf"] | named(data)).items():
        (place / name).unlink(missing_ok=True)
        (place / name).write_bytes(content)
    model, preprocess = miniclip.load(place, "cpu")
    pixels = preprocess(make_image(None, 1))
    require(bool(pixels.isfinite().all()), "the pixels are not finite")
    model.encode_image(pixels[None])
    try:
        theirs = Reference.from_dict(json.loads((place / "config.json").read_bytes()))
        pairs = [(model.config.vision, theirs.vision_config), (model.config.text, theirs.text_config)]
        sections: list[Any] = [each for _, each in pairs]
        told = [(each.num_attention_heads, each.layer_norm_eps, each.hidden_act) for each in sections]
    except Exception:  # transformers refuses with errors of many kinds
        return "loaded, and transformers refuses it"
    ours = [(each.heads, each.layer_norm_eps, each.activation) for each, _ in pairs]
    require(ours == told, f"miniclip reads {ours}, transformers {told}")
    return "loaded as transformers does"


def named(data: bytes) -> dict[str, bytes]:
    """The name and the content of a case of several possible files."""
    name, _, content = data.partition(b"\n")
    return {name.decode(): content}


# -- texts ------------------------------------------------------------------------------------------------------------

WORDS = ["cat", "Dog's", "naïve", "Straße", "İstanbul", "ΟΔΟΣ", "кошка", "قطة", "猫の写真", "고양이"]
WORDS += ["हिन्दी", "żółw", "don't"]
MARKS = ["&amp;", "&lt;3", "&amp;amp;", "&#x27;", "&nbsp", "'S", "’ll", "…", "ﬁ", "\x85"]
MARKS += ["<|endoftext|>", "<|startoftext|>"]
FORMS = [functools.partial(unicodedata.normalize, form) for form in ("NFC", "NFD", "NFKC", "NFKD")]
SPACES = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\r\n", "\x1c", "\u2028"]


def make_text(choose: random.Random) -> bytes:
    pieces: list[str] = []
    for _ in range(choose.choice([0, 1, 2, 5, 10, 40])):
        kind = choose.randrange(7)
        if kind < 3:
            pieces.append(choose.choice([WORDS, MARKS, SPACES][kind]))
        elif kind == 3:
            pieces.append(chr(choose.randrange(choose.choice([0x80, 0x800, 0x3000, 0x10000, 0x110000]))))
        elif kind == 4:
            with contextlib.suppress(UnicodeError):  # mojibake: the text read with another encoding, once or twice
                encoding = choose.choice(["latin-1", "cp1252", "cp1251", "macroman"])
                pieces.append(choose.choice(WORDS).encode().decode(encoding))
        elif kind == 5:
            form = choose.choice(FORMS)
            pieces.append(form("".join(choose.choices(WORDS, k=3))))
        else:
            pieces.append(chr(choose.randrange(32, 0x2FFF)) * choose.randrange(1, 60))
    return "".join(pieces).encode("utf-8", "surrogatepass")


def judge_text(data: bytes, place: Path) -> str:
    """The ids are those of openai/CLIP's own tokenizer. Half a pair of surrogates is refused by both."""
    text = data.decode("utf-8", "surrogatepass")
    ours = tokenizer().encode(text)
    theirs = their_tokenizer().encode(text)
    require(ours == theirs, f"ids {ours} instead of {theirs}")
    tokenizer().decode(ours)
    ids = miniclip.tokenize(text, truncate=True)
    require(ids.shape == (1, 77), f"ids of the shape {tuple(ids.shape)}")
    return "the same ids"


@functools.cache
def tokenizer() -> miniclip.Tokenizer:
    return miniclip.Tokenizer()


@functools.cache
def their_tokenizer() -> Any:
    return openai_tokenizer()


# -- images and tars --------------------------------------------------------------------------------------------------

FORMATS = ["AVIF", "BMP", "DDS", "DIB", "EPS", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "PCX", "PDF"]
FORMATS += ["PNG", "PPM", "QOI", "SGI", "SPIDER", "TGA", "TIFF", "WEBP", "XBM"]
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *(("RGBA", format, {}) for format in ("PNG", "WEBP", "TIFF", "TGA", "AVIF", "ICO")),
    *(("L", format, {}) for format in ("PNG", "JPEG", "PCX", "SGI", "TIFF")),
    *(("P", format, {}) for format in ("GIF", "PNG", "BMP", "TIFF")),
    *(("1", format, {}) for format in ("PNG", "TIFF", "XBM", "PPM")),
    *(("I;16", format, {}) for format in ("PNG", "TIFF", "PPM")),
    *(("CMYK", "JPEG", {}), ("CMYK", "TIFF", {}), ("F", "TIFF", {}), ("I", "TIFF", {}), ("LAB", "TIFF", {})),
    *(("RGB", "JPEG", {"progressive": True}), ("RGB", "TIFF", {"compression": "tiff_lzw"})),
    *(("RGB", "TIFF", {"compression": "jpeg"}), ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"})),
]


@functools.cache
def good_images() -> list[bytes]:
    """One small file of every format and mode that Pillow writes here, HEIF where the plugin is installed."""
    formats = FORMATS
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats = [*FORMATS, "HEIF"]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    files: list[bytes] = []
    for mode, format, settings in [("RGB", name, {}) for name in formats] + VARIANTS:
        image = make_image(None, len(files), (48, 36)).convert("L" if mode == "I;16" else mode)
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257) if mode == "I;16" else image
        for more in ({}, {"exif": exif}, {"save_all": True, "append_images": [image] * 2}):
            file = io.BytesIO()
            with contextlib.suppress(OSError, KeyError, ValueError, TypeError):
                image.save(file, format, **settings, **more)
                files.append(file.getvalue())
    return list(dict.fromkeys(files))


def make_damaged_image(choose: random.Random) -> bytes:
    return damaged(choose.choice(good_images()), choose)


def judge_image(data: bytes, place: Path) -> str:
    path = place / "image"
    path.write_bytes(data)
    image = miniclip.open_image(path, min_side=choose_side(data))
    require(image.mode == "RGB" and min(image.size) > 0, f"an image of mode {image.mode} and size {image.size}")
    if image.width * image.height < 10**7 and max(image.size) < 100 * min(image.size):
        pixels = miniclip.Preprocess(16)(image)
        require(pixels.shape == (3, 16, 16) and bool(pixels.isfinite().all()), "pixels that are not finite")
    return "opened"


def choose_side(data: bytes) -> int | None:
    return 16 if len(data) % 2 else None


@functools.cache
def good_tar() -> bytes:
    """As img2dataset writes them: images, captions and JSON beside each other."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n in range(4):
            image = io.BytesIO()
            make_image(None, n).save(image, ("PNG", "JPEG")[n % 2])
            caption = f"image {n}"
            document = json.dumps({"caption": caption, "url": f"https://example.com/{n}"})
            contents = {("png", "jpg")[n % 2]: image.getvalue(), "txt": caption.encode(), "json": document.encode()}
            for suffix, data in contents.items():
                member = tarfile.TarInfo(f"{n:08}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def make_tar(choose: random.Random) -> bytes:
    data = bytearray(good_tar())
    if choose.random() < 0.5:  # in a header: names, sizes, kinds, and with luck the header's own checksum
        header = 512 * choose.randrange(len(data) // 512)
        data[header : header + 512] = damaged(bytes(data[header : header + 512]), choose)[:512].ljust(512, b"\0")
        if choose.random() < 0.8:
            data[header + 148 : header + 156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        return bytes(data)
    return damaged(bytes(data), choose)


def judge_tar(data: bytes, place: Path) -> str:
    """Every image that is embedded can be found."""
    shutil.rmtree(place)
    place.mkdir()
    write_model(place / "model")
    (place / "0.tar").write_bytes(data)
    result = miniclip.embed_images(place / "0.tar", place / "out", str(place / "model"), device="cpu", shard_size=2)
    if not result.total:
        return "reported without vectors"
    index = miniclip.Index.open(place / "out")
    found = index.nearest(torch.ones(index.dimension), k=100)
    require(len(found) == result.total and all(np.isfinite(match.score) for match in found), "rows are missing")
    return "embedded"


# -- folders of vectors -----------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in good_model()["hf"].items():
        (folder / name).write_bytes(content)


@functools.cache
def good_folder() -> tuple[Path, tuple[Any, ...]]:
    """A folder of vectors in three shards, and what a search finds in it."""
    folder = Path(tempfile.mkdtemp(prefix="miniclip-fuzz-good-"))
    write_model(folder / "model")
    for n in range(7):
        make_image(folder / "photos" / f"{n}.png", n)
    (folder / "photos" / "damaged.png").write_bytes(b"no image")
    make_image(folder / "photos" / "gone.png", 8)
    miniclip.embed_images(folder / "photos", folder / "out", str(folder / "model"), device="cpu", shard_size=3)
    (folder / "photos" / "gone.png").unlink()
    miniclip.embed_images(folder / "photos", folder / "out", device="cpu")  # writes which rows are dead
    return folder / "out", answers(folder / "out")


EXPECTED = "expected.json"


def answers(out: Path) -> tuple[Any, ...]:
    index = miniclip.Index.open(out)
    query = torch.randn(index.dimension, generator=torch.Generator().manual_seed(0))
    return tuple((match.path, match.score) for match in index.nearest(query, k=100))


def make_folder(choose: random.Random) -> bytes:
    """A tar of a whole folder with one damaged file, and what a search found before the damage.

    Files of one run belong together by their checksums, so a damaged file alone could not be judged later.
    """
    folder, expected = good_folder()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    path = choose.choice(files)
    content = path.read_bytes()
    if choose.random() < 0.2:
        content = choose.choice(files).read_bytes()  # another file in its place
    elif path.suffix == ".json" and choose.random() < 0.7:
        content = damaged_json(content, choose)
    elif path.suffix == ".jsonl" and content and choose.random() < 0.7:
        lines = content.splitlines()
        line = choose.randrange(len(lines))
        lines[line] = damaged_json(lines[line], choose)
        content = b"\n".join(lines) + b"\n"
    else:
        content = damaged(content, choose)
    contents = {str(each.relative_to(folder)): each.read_bytes() for each in files} | {EXPECTED: json.dumps(expected)}
    contents[str(path.relative_to(folder))] = content
    return as_tar(contents)


def judge_folder(data: bytes, place: Path) -> str:
    """A search finds what it found before, or refuses, or miniclip check names the damage. embed mends or refuses."""
    shutil.rmtree(place)
    place.mkdir()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(place, filter="data")
    expected = json.loads((place / EXPECTED).read_bytes())
    (place / EXPECTED).unlink()
    try:
        found = answers(place)
        paths, scores = zip(*expected)
        same = [path for path, _ in found] == [*paths]
        outcome = "the same answers" if same and np.allclose([score for _, score in found], scores, atol=1e-6) else ""
    except miniclip.MiniclipError as error:
        outcome = REFUSED
        require(str(error).isprintable(), f"a message of several lines: {str(error)[:300]!r}")
    if not outcome:
        require(bool(check_folder(place).damaged), "a search has other answers, and miniclip check finds no damage")
        outcome = "found by miniclip check"
    photos = good_folder()[0].parent / "photos"
    miniclip.embed_images(photos, place, device="cpu")
    return outcome


def as_tar(contents: dict[str, Any]) -> bytes:
    """The files in a compressed tar, with no times."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:xz") as tar:
        for name, data in contents.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


ATTACKS = {
    "checkpoints": Attack(make_checkpoint, judge_checkpoint),
    "configurations": Attack(make_configuration, judge_configuration),
    "texts": Attack(make_text, judge_text),
    "images": Attack(make_damaged_image, judge_image),
    "tars": Attack(make_tar, judge_tar),
    "folders": Attack(make_folder, judge_folder),
    "models": Attack(lambda choose: b"%d" % choose.randrange(2**32), lambda data, place: judge_chain(int(data))),
}
