"""Preprocessing against torchvision (pinned) and transformers (live), bit for bit; opening files, good and bad."""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.make_preprocess_goldens import MODES, RARE_MODES, SETTINGS, SIZES, noise, picture, samples, sha256
from PIL import ExifTags, Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip.preprocess
from miniclip import ConfigError, ImageError, InputError, MiniclipError, Preprocess, open_image
from validation.reference import sample_images

# Written by data/make_preprocess_goldens.py with torchvision.
GOLDENS = json.loads((Path(__file__).parent / "data" / "preprocess_goldens.json").read_text(encoding="utf-8"))["cases"]

picture = functools.lru_cache(picture)  # each is used by several tests, and changed by none
ALL_MODES = MODES + RARE_MODES
# On these mean and standard deviation the result is the grey level itself, from 0 to 255.
AS_LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


def parts(size: tuple[int, int]) -> bool:
    """Whether half-even rounding and floor give different crops of a picture that is resized and cropped to 224."""
    return any((int(224 * side / min(size)) - 224) % 4 == 3 for side in size)


def mismatches(setting: str, mode: str | None = None) -> list[tuple[str, tuple[int, int], list[float], list[float]]]:
    """The goldens that miniclip does not meet: mode, size, and the values of both at a few places."""
    size, edge, resample, mean, std = SETTINGS[setting]
    preprocess = Preprocess(size, mean, std, Image.Resampling[resample], shortest_edge=edge)  # type: ignore[arg-type]
    wrong = []
    for name, golden_mode, width, height, digest, values in GOLDENS:
        if name == setting and mode in (None, golden_mode):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Pillow's, of palettes with transparency
                pixels = preprocess(picture(golden_mode, width, height)).numpy()
            if sha256(pixels) != digest:
                wrong.append((golden_mode, (width, height), samples(pixels), values))
    return wrong


# -- the two conventions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
def test_equal_to_torchvision(mode: str) -> None:
    cases = [case for case in GOLDENS if case[:2] == ["openai", mode]]
    assert len(cases) == len(SIZES if mode in MODES else SIZES[::5])
    assert mismatches("openai", mode) == []


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "openai"])
def test_equal_to_torchvision_with_other_settings(setting: str) -> None:
    assert mismatches(setting) == []


@pytest.mark.parametrize("mode", ALL_MODES)
def test_equal_to_transformers(mode: str) -> None:
    processor, preprocess = CLIPImageProcessorPil(), Preprocess(convention="huggingface")
    every = 1 if mode in ("RGB", "RGBA", "P") else 2 if mode in MODES else 5
    for size in SIZES[::every]:
        image = picture(mode, *size)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(preprocess(image), expected), size


def test_the_conventions_part_at_a_quarter_of_the_sizes() -> None:
    assert {True, False} == {parts(size) for size in SIZES}
    for size in SIZES:
        image = picture("RGB", *size)
        difference = (Preprocess()(image) - Preprocess(convention="huggingface")(image)).abs().max()
        assert difference > 0.05 if parts(size) else difference < 1e-6, size


def test_a_floored_crop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniclip.preprocess, "round", int, raising=False)
    assert {size for _, size, _, _ in mismatches("openai", "RGB")} == {size for size in SIZES if parts(size)}


def test_converting_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    resize_and_crop = Preprocess._resize_and_crop
    monkeypatch.setattr(Preprocess, "_resize_and_crop", lambda self, image: resize_and_crop(self, image.convert("RGB")))
    assert not mismatches("openai", "RGB")
    assert all(mismatches("openai", mode) for mode in ("P", "RGBA"))


@pytest.mark.parametrize("mistake", ["another filter", "another mean", "scale after"])
def test_wrong_arithmetic_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake == "another filter":
        monkeypatch.setattr(miniclip.preprocess, "_resampling", lambda _: Image.Resampling.LANCZOS)
    elif mistake == "another mean":
        monkeypatch.setitem(SETTINGS, "openai", (*SETTINGS["openai"][:3], (0.5, 0.5, 0.5), SETTINGS["openai"][4]))
    else:  # equal but for the last bit
        grey = torch.arange(256)[None] / 255.0
        mean, std = (torch.tensor(values)[:, None] for values in SETTINGS["openai"][3:])
        monkeypatch.setattr(Preprocess, "_levels", (grey / std - mean / std).numpy())
    assert mismatches("openai", "RGB")


# -- calling it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_a_list_is_a_batch(convention: str) -> None:
    preprocess = Preprocess(size=32, convention=convention)
    images = [picture("RGB", 40, 50), picture("L", 64, 32), picture("RGBA", 33, 99)]
    batch = preprocess(images)
    assert batch.shape == (3, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert torch.equal(preprocess(tuple(images)), batch)
    for image, pixels in zip(images, batch):
        assert preprocess(image).shape == (3, 32, 32)
        assert preprocess(image).is_contiguous()
        assert torch.equal(preprocess(image), pixels)
    assert preprocess(images[:1]).shape == (1, 3, 32, 32)


def test_the_image_and_the_settings_stay_as_they_are() -> None:
    preprocess, image = Preprocess(), picture("RGB", 224, 224)  # of the right size: nothing to resize
    before = image.tobytes()
    pixels = preprocess(image)
    expected = pixels.clone()
    pixels.zero_()
    assert image.tobytes() == before
    assert torch.equal(preprocess(image), expected)


@pytest.mark.parametrize(
    "wrong", [None, "photo.jpg", Path("photo.jpg"), 7, np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), iter([])]
)
def test_what_is_no_image(wrong: Any) -> None:
    for argument in (wrong, [picture("RGB", 4, 4), wrong]):
        with pytest.raises(TypeError, match=rf"a PIL image or a list of them, got {type(wrong).__name__}; "):
            Preprocess()(argument)


def test_a_list_of_lists_is_no_list_of_images() -> None:
    with pytest.raises(TypeError, match="got list"):
        Preprocess()([[picture("RGB", 4, 4)]])  # type: ignore[list-item]


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list(empty: Any) -> None:
    with pytest.raises(InputError, match="the list is empty"):
        Preprocess()(empty)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_an_image_without_pixels(size: tuple[int, int], convention: str) -> None:
    with pytest.raises(InputError, match=rf"the image is {size[0]} x {size[1]} pixels"):
        Preprocess(convention=convention)(Image.new("RGB", size))


def test_threads_share_one_preprocess() -> None:
    images = [picture("RGB", 60 + i, 50) for i in range(16)]
    expected = Preprocess(size=32)(images)
    shared = Preprocess(size=32)  # whose table is not computed yet
    with ThreadPoolExecutor(8) as pool:
        assert torch.equal(torch.stack([*pool.map(shared, images)]), expected)


# -- its settings ---------------------------------------------------------------------------------------------------


def test_it_is_a_value() -> None:
    preprocess = Preprocess(size=32, convention="huggingface")
    image = picture("RGB", 40, 50)
    pixels = preprocess(image)
    again = pickle.loads(pickle.dumps(preprocess))
    assert again == preprocess == Preprocess(size=32, convention="huggingface")
    assert len({again, preprocess, Preprocess(size=32, convention="huggingface")}) == 1
    assert torch.equal(again(image), pixels)
    assert preprocess != Preprocess(size=32)
    with pytest.raises(AttributeError):
        preprocess.size = 64  # type: ignore[misc]


def test_equal_settings_are_equal_however_they_are_written() -> None:
    plain = Preprocess(mean=(0, 0.5, 1), std=(1, 1, 1), resample=Image.Resampling.BILINEAR)
    written = Preprocess(mean=[0.0, 0.5, 1.0], std=[1, 1.0, 1], resample="bilinear")  # type: ignore[arg-type]
    assert written == plain == Preprocess(mean=(0, 0.5, 1), std=(1, 1, 1), resample=2)  # type: ignore[arg-type]
    assert hash(written) == hash(plain)
    assert written.mean == (0.0, 0.5, 1.0)
    assert written.resample is Image.Resampling.BILINEAR


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "convention": ({"convention": "timm"}, "unknown convention 'timm'"),
    "convention of another type": ({"convention": ["openai"]}, "unknown convention"),
    "size 0": ({"size": 0}, "size must be a positive number of pixels, got 0"),
    "negative size": ({"size": -224}, "size must be a positive number of pixels"),
    "size as text": ({"size": "224"}, "size must be a positive number of pixels, got '224'"),
    "fractional size": ({"size": 224.0}, "size must be a positive number of pixels"),
    "true size": ({"size": True}, "size must be a positive number of pixels, got True"),
    "no size": ({"size": None}, "size must be a positive number of pixels"),
    "two sizes": ({"size": (224, 224)}, "size must be a positive number of pixels"),
    "edge as text": ({"shortest_edge": "256"}, "shortest_edge must be a positive number of pixels"),
    "edge 0": ({"shortest_edge": 0}, "shortest_edge must be a positive number of pixels"),
    "true edge": ({"size": 1, "shortest_edge": True}, "shortest_edge must be a positive number of pixels"),
    "edge below size": ({"shortest_edge": 200}, "a short side of 200 pixels cannot be cropped to 224"),
    "two means": ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
    "one mean": ({"mean": 0.5}, "mean must be three numbers, got 0.5"),
    "mean as text": ({"mean": "0.5"}, "mean must be three numbers"),
    "means as text": ({"mean": ["0.5"] * 3}, "mean must be three finite numbers"),
    "infinite mean": ({"mean": [0.5, float("inf"), 0.5]}, "mean must be three finite numbers"),
    "mean that is no number": ({"mean": [0.5, 0.5, float("nan")]}, "mean must be three finite numbers"),
    "mean beyond float32": ({"mean": [0.5, 1e39, 0.5]}, "mean must be three finite numbers"),
    "mean beyond float64": ({"mean": [0.5, 10**400, 0.5]}, "mean must be three finite numbers"),
    "no mean": ({"mean": None}, "mean must be three numbers"),
    "std 0": ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    "negative std": ({"std": (1.0, 1.0, -1.0)}, "std must be positive"),
    "std that is no number": ({"std": (float("nan"), 1.0, 1.0)}, "std must be three finite numbers"),
    "four stds": ({"std": (1.0, 1.0, 1.0, 1.0)}, "std must be three numbers"),
    "filter by unknown name": ({"resample": "cubic"}, r"unknown resampling 'cubic'; Pillow has 0 \(nearest\)"),
    "filter by unknown number": ({"resample": 77}, "unknown resampling 77"),
    "filter of another type": ({"resample": [3]}, "unknown resampling"),
    "no filter": ({"resample": None}, "unknown resampling None"),
}


@pytest.mark.parametrize("mistake", BAD_SETTINGS)
def test_bad_settings_are_refused(mistake: str) -> None:
    settings, message = BAD_SETTINGS[mistake]
    with pytest.raises(ConfigError, match=message):
        Preprocess(**settings)


HF_CONFIGS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "OpenAI's, as transformers 5 writes it": CLIPImageProcessorPil().to_dict(),
    "OpenAI's, as transformers 4 wrote it": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "other sizes": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "edge beyond crop": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
    "edge beyond crop, as numbers": {"size": 40, "crop_size": 33},
    "other mean and std": {"size": 32, "crop_size": 32, "image_mean": [0.5, 0.4, 0], "image_std": [0.5, 1, 0.25]},
    "bilinear": {"size": 32, "crop_size": 32, "resample": 2},
    "lanczos": {"size": 32, "crop_size": 32, "resample": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_a_config_means_what_transformers_does(name: str) -> None:
    config = HF_CONFIGS[name]
    before = json.dumps(config)
    processor = CLIPImageProcessorPil(**{key: value for key, value in config.items() if not key.endswith("_type")})
    preprocess = replace(Preprocess.from_hf(json.loads(before)), convention="huggingface")
    for size in ((100, 75), (75, 103), (20, 31)):
        image = picture("RGB", *size)
        assert torch.equal(preprocess(image), processor(image, return_tensors="pt")["pixel_values"][0]), size
    assert json.dumps(config) == before


def test_openais_config_is_the_default() -> None:
    for name in ("nothing said", "OpenAI's, as transformers 5 writes it", "OpenAI's, as transformers 4 wrote it"):
        assert Preprocess.from_hf(HF_CONFIGS[name]) == Preprocess()
    larger = Preprocess.from_hf({"size": {"shortest_edge": 256}, "crop_size": 224})
    assert (larger.size, larger.shortest_edge, larger.convention) == (224, 256, "openai")


BAD_HF_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no resize": ({"do_resize": False}, "do_resize is off"),
    "no crop": ({"do_center_crop": False}, "do_center_crop is off"),
    "no rescale": ({"do_rescale": False}, "do_rescale is off"),
    "no normalize": ({"do_normalize": False}, "do_normalize is off"),
    "stretched to a square": ({"size": {"height": 224, "width": 224}}, "size must be a shortest_edge"),
    "longest edge as well": ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "size must be a shortest_edge"),
    "edge as text": ({"size": {"shortest_edge": "224"}}, "size must be a shortest_edge"),
    "size as text": ({"size": "224"}, "size must be a shortest_edge in pixels and nothing else, got '224'"),
    "true size": ({"size": True}, "size must be a shortest_edge"),
    "size 0": ({"size": 0}, "size must be a shortest_edge"),
    "null size": ({"size": None}, "size must be a shortest_edge"),
    "null resize": ({"do_resize": None}, "do_resize is off"),
    "null rescale": ({"rescale_factor": None}, "rescale_factor must be 1/255, got None"),
    "null crop": ({"crop_size": None}, "crop_size must be a square"),
    "null mean": ({"image_mean": None}, "mean must be three numbers"),
    "null filter": ({"resample": None}, "unknown resampling None"),
    "size list": ({"size": [224, 224]}, "size must be a shortest_edge"),
    "fractional size": ({"size": 224.5}, "size must be a shortest_edge"),
    "oblong crop": ({"crop_size": {"height": 224, "width": 200}}, "crop_size must be a square in pixels, got {"),
    "crop without width": ({"crop_size": {"height": 224}}, "crop_size must be a square"),
    "crop as text": ({"crop_size": "224"}, "crop_size must be a square"),
    "true crop": ({"crop_size": True}, "crop_size must be a square"),
    "crop list": ({"crop_size": [224, 224]}, "crop_size must be a square"),
    "crop beyond the edge": ({"size": 200, "crop_size": 224}, "a short side of 200 pixels cannot be cropped to 224"),
    "rescale to -1..1": ({"rescale_factor": 1 / 127.5}, "rescale_factor must be 1/255, got 0.0078"),
    "rescale as text": ({"rescale_factor": "1/255"}, "rescale_factor must be 1/255, got '1/255'"),
    "rescale that is no number": ({"rescale_factor": float("nan")}, "rescale_factor must be 1/255, got nan"),
    "rescale list": ({"rescale_factor": [1]}, "rescale_factor must be 1/255"),
    "unknown filter": ({"resample": 42}, "unknown resampling 42"),
    "unknown filter name": ({"resample": "best"}, "unknown resampling 'best'"),
    "two means": ({"image_mean": [0.5, 0.5]}, "mean must be three numbers"),
    "mean as text": ({"image_mean": "imagenet"}, "mean must be three numbers, got 'imagenet'"),
    "std 0": ({"image_std": [0, 0, 0]}, "std must be positive"),
}


@pytest.mark.parametrize("mistake", BAD_HF_CONFIGS)
def test_a_config_of_other_steps_is_refused(mistake: str) -> None:
    config, message = BAD_HF_CONFIGS[mistake]
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_hf(config)


def test_open_clip_configs() -> None:
    assert Preprocess.from_open_clip({}, 224) == Preprocess()
    assert Preprocess.from_open_clip({"mean": None, "interpolation": None}, 224) == Preprocess()
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
    size, edge, resample, mean, std = SETTINGS["bilinear"]
    expected = Preprocess(size, mean, std, Image.Resampling[resample])  # type: ignore[arg-type]
    assert size == edge
    assert Preprocess.from_open_clip(config, size) == expected  # whose results are pinned above


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resize_mode": "squash"}, "resize_mode must be 'shortest', got 'squash'"),
        ({"interpolation": "random"}, "unknown resampling 'random'"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"std": [0.5, 0.5, 0]}, "std must be positive"),
    ],
)
def test_open_clip_configs_of_other_steps_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_open_clip(config, 224)


# -- very long images -----------------------------------------------------------------------------------------------


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[the most pixels that any resized or cropped image had]"""
    most = [0]

    def spied(method: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
        def call(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
            result = method(image, *args, **kwargs)
            most[0] = max(most[0], result.width * result.height)
            return result

        return call

    for name in ("resize", "crop"):
        monkeypatch.setattr(Image.Image, name, spied(getattr(Image.Image, name)))
    return most


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("RGB", (1, 4000)),
        ("RGB", (4000, 1)),
        ("RGBA", (2, 90_000)),
        ("P", (90_000, 3)),
        ("RGB", (1, 5_000_000)),
        ("RGB", (5_000_000, 1)),
        ("L", (1, 60_000_000)),
        ("1", (60_000_000, 1)),
        ("RGB", (31_000, 300)),
        ("I;16", (3, 1000)),
    ],
)
def test_memory_stays_bounded_for_very_long_images(mode: str, size: tuple[int, int], largest: list[int]) -> None:
    image = Image.new(mode, size, 1)
    conventions = ["openai"] if max(size) > 10**7 else ["openai", "huggingface"]  # the latter starts with RGB
    for convention in conventions:
        pixels = Preprocess(convention=convention, **AS_LEVELS)(image)
        assert pixels.shape == (3, 224, 224)
        if mode != "RGBA":  # of one colour everywhere; hardly opaque ones lose theirs to rounding
            assert torch.equal(pixels, pixels[:, :1, :1].expand(3, 224, 224))
    assert 224 * 224 <= largest[0] <= 4 * 224 * 224


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_a_part_resized_is_the_part_of_the_whole_resized(
    mode: str, convention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways round, on images of which the whole can be resized as well."""
    preprocess = Preprocess(size=64, convention=convention, **AS_LEVELS)
    for short, ratio in ((1, 131), (2, 101), (3, 133), (7, 143), (40, 107), (64, 105), (67, 101), (90, 102)):
        long = int(short * ratio) + 1
        for size in ((short, long), (long, short)):
            image = picture(mode, *size)
            monkeypatch.setattr(miniclip.preprocess, "_MAX_ASPECT", 10**9)
            whole = preprocess(image)
            monkeypatch.setattr(miniclip.preprocess, "_MAX_ASPECT", 100)
            part = preprocess(image)
            levels = 2 if mode == "CMYK" and convention == "openai" else 1  # converted after rounding
            assert (part - whole).abs().max() < levels + 0.01, size


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_strips_are_the_whole_to_the_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(miniclip.preprocess, "_LARGE", 0)
    pick = random.Random(threads)
    for filter in Image.Resampling:
        for _ in range(25):
            mode, size = pick.choice(("RGB", "L", "RGBA", "CMYK")), (pick.randint(1, 700), pick.randint(1, 700))
            resized = pick.randint(1, size[0] + 10), pick.randint(1, 700)
            image = picture(mode, *size)
            strips, whole = miniclip.preprocess._resize(image, resized, filter), image.resize(resized, filter)
            assert strips.mode == whole.mode
            assert np.array_equal(np.asarray(strips), np.asarray(whole)), (mode, size, resized, filter)


@pytest.mark.parametrize(
    ("size", "strips"), [((2001, 1000), 2), ((1100, 1900), 2), ((700, 2900), 1), ((1999, 1000), 1)]
)
def test_strips_are_used_where_they_pay(
    size: tuple[int, int], strips: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a file too, which Pillow reads when its pixels are first asked for. Very tall ones Pillow begins downwards."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    image = picture("RGB", *size)
    image.save(tmp_path / "a.png")
    expected, made, resize = Preprocess(convention="huggingface")(image), [], Image.Image.resize

    def counted(self: Image.Image, *arguments: Any, **settings: Any) -> Image.Image:
        made.append(settings.get("box"))
        return resize(self, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert torch.equal(Preprocess()(Image.open(tmp_path / "a.png")), Preprocess()(image))
    assert len([box for box in made if box]) == (0 if strips == 1 else 2 * strips)
    assert torch.equal(expected, CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0])


def test_strips_while_python_ends() -> None:
    """When no thread can be started any more."""
    code = (
        "import atexit, torch, miniclip; from PIL import Image; torch.set_num_threads(2)\n"
        "image = Image.linear_gradient('L').resize((2000, 1500)).convert('RGB')\n"
        "expected = miniclip.Preprocess()(image)\n"
        "atexit.register(lambda: print(torch.equal(miniclip.Preprocess()(image), expected)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


# -- opening files --------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand, for what Pillow does not write."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    every = [header, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in every
    )


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], np.ndarray]:
    """Writes a file and opens it: bytes -> (H, W, 3)."""

    def open_bytes(data: bytes) -> np.ndarray:
        (tmp_path / "picture").write_bytes(data)
        image = open_image(tmp_path / "picture")
        assert image.mode == "RGB"
        assert type(image) is Image.Image  # nothing of the file is left in it
        return np.asarray(image)

    return open_bytes


Opened = Callable[[bytes], np.ndarray]

# How each EXIF orientation is to be seen: (H, W, 3) as stored -> as shown.
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
def test_pictures_are_turned_upright(orientation: int, format: str, opened: Opened) -> None:
    image = picture("RGB", 24, 16)
    options = {"lossless": True} if format == "WEBP" else {}
    stored = opened(encoded(image, format, **options))
    assert stored.shape == (16, 24, 3)
    shown = opened(encoded(image, format, exif=exif(orientation), **options))
    assert np.array_equal(shown, ORIENTATIONS[orientation](stored))


def test_grey_pictures_are_turned_too(opened: Opened) -> None:
    image = picture("I;16", 24, 16)
    assert np.array_equal(opened(encoded(image, "PNG", exif=exif(6))), np.rot90(opened(encoded(image, "PNG")), -1))


def test_damaged_exif_does_not_hide_the_picture(opened: Opened) -> None:
    """Nor its orientation, where that can be read: of real files many carry a block that Pillow cannot write again."""
    image = picture("RGB", 24, 16)
    stored = opened(encoded(image, "JPEG"))
    for block in (b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        data = encoded(image, "JPEG", exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert np.array_equal(opened(data), stored)
    # Orientation 6 as it should be, then the description as a rational number.
    tags = struct.pack("<HHHIHHHHII", 2, 0x0112, 3, 1, 6, 0, 0x010E, 5, 1, 38) + struct.pack("<III", 0, 1, 0)
    data = encoded(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    assert np.array_equal(opened(data), np.rot90(stored, -1))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_white(format: str, opened: Opened) -> None:
    image = picture("RGBA", 24, 16)
    pixels = np.asarray(image).astype(float)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    assert (alpha == 0).any()
    shown = opened(encoded(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {})))
    assert np.abs(shown - on_white(colour, alpha)).max() <= 1
    assert (shown[alpha[..., 0] == 0] == 255).all()


def test_grey_with_alpha(opened: Opened) -> None:
    image = picture("LA", 24, 16)
    grey, alpha = np.asarray(image).astype(float).transpose(2, 0, 1)
    shown = opened(encoded(image, "PNG"))
    assert np.abs(shown - on_white(grey, alpha)[..., None]).max() <= 1


def test_palette_with_transparency(opened: Opened) -> None:
    image = picture("P", 24, 16)
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
def test_one_transparent_colour(mode: str, opened: Opened) -> None:
    image = picture(mode, 24, 16)
    pixels = np.asarray(image.convert("RGB"))
    colour = image.getpixel((5, 5))
    match = (pixels == np.array(colour)).all(-1, keepdims=True)
    assert match.any()
    assert np.array_equal(opened(encoded(image, "PNG", transparency=colour)), np.where(match, 255, pixels))
    assert np.array_equal(opened(encoded(image, "PNG")), pixels)


def test_black_and_white(opened: Opened) -> None:
    image = picture("1", 24, 16)
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


def test_16_bits_with_one_transparent_level(opened: Opened) -> None:
    rows = b"\0" + struct.pack(">4H", 0, 1000, 40_000, 65_535)
    assert opened(png(4, 1, 16, 0, rows))[0, :, 0].tolist() == [0, 4, 156, 255]
    assert opened(png(4, 1, 16, 0, rows, (b"tRNS", b"\x03\xe8")))[0, :, 0].tolist() == [0, 255, 156, 255]


def test_16_bits_of_colour_and_alpha(opened: Opened) -> None:
    assert opened(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65_535, 0, 32_896, 0, 65_535, 257))).tolist() == [
        [[255, 0, 128], [0, 255, 1]]
    ]
    with_alpha = struct.pack(">8H", 65_535, 0, 32_896, 65_535, 65_535, 0, 32_896, 0)
    assert opened(png(2, 1, 16, 6, b"\0" + with_alpha)).tolist() == [[[255, 0, 128], [255, 255, 255]]]
    grey_with_alpha = struct.pack(">4H", 32_896, 65_535, 32_896, 0)
    assert opened(png(2, 1, 16, 4, b"\0" + grey_with_alpha)).tolist() == [[[128] * 3, [255] * 3]]


def test_print_colours(opened: Opened) -> None:
    shown = opened(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(shown.astype(int) - [255, 0, 0]).max() < 8
    assert np.array_equal(opened(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"))[0, 0], [0, 255, 255])


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_the_first_of_several_frames(format: str, opened: Opened) -> None:
    first, second = Image.new("RGB", (24, 16), (200, 30, 40)), Image.new("RGB", (24, 16), (10, 220, 90))
    data = encoded(first, format, save_all=True, append_images=[second])
    assert len(data) > len(encoded(first, format))
    assert np.abs(opened(data).astype(int) - [200, 30, 40]).max() < 10


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "CMYK"])
def test_other_colour_spaces(mode: str, opened: Opened) -> None:
    image = picture(mode, 24, 16)
    assert np.array_equal(opened(encoded(image, "TIFF")), np.asarray(image.convert("RGB")))


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a photo – été 猫.png"
    path.write_bytes(encoded(picture("RGB", 24, 16), "PNG"))
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), os.fsencode(path), path.name, "link"):
        assert open_image(name).size == (24, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 7, io.BytesIO(), ["a.png"], picture("RGB", 4, 4)])
def test_what_is_no_path(wrong: Any) -> None:
    with pytest.raises(TypeError):
        open_image(wrong)


# -- opening what cannot be opened ----------------------------------------------------------------------------------

WHOLE = encoded(picture("RGB", 64, 48), "JPEG")
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not an image"),
    "text": (b"a photo of a cat\n" * 40, "is not an image"),
    "JPEG, first bytes only": (WHOLE[:3], "is not an image"),
    "JPEG, header only": (WHOLE[:200], "is not an image|cannot be read"),
    "JPEG, cut in the middle": (WHOLE[: len(WHOLE) // 2 + 300], "cannot be read .*truncated"),
    "PNG, cut in the middle": (encoded(picture("RGB", 64, 48), "PNG")[:2000], "cannot be read .*truncated"),
    "PNG of 3.6 billion pixels": (png(60_000, 60_000, 8, 2, b""), "is too large to be decoded safely"),
    "PNG without pixels": (png(0, 0, 8, 2, b""), "cannot be read|is not an image"),
    "PNG with a wrong transparent colour": (png(1, 1, 8, 2, b"\0abc", (b"tRNS", b"\0")), "cannot be read"),
    "floats": (encoded(picture("F", 24, 16), "TIFF"), "holds floating-point pixels"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(kind: str, tmp_path: Path) -> None:
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


def test_missing_files_and_folders(tmp_path: Path) -> None:
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


def test_a_file_one_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since whoever runs the tests as root may read everything."""

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
def test_whatever_a_decoder_raises(
    error: Exception, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = tmp_path / "photo.tga"
    path.write_bytes(encoded(picture("L", 24, 16), "PNG", exif=exif(6)))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load" if step == "load" else f"PIL.Image.Image.{step}", fail)
    with pytest.raises(ImageError, match=r"photo\.tga: cannot be read \(.+\)$") as caught:
        open_image(path)
    assert caught.value.__cause__ is error


def test_an_interrupt_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_image(tmp_path / "photo.png")


def damaged(source: random.Random) -> Iterator[bytes]:
    """Small files of common formats with some bytes overwritten, lost, doubled or cut off."""
    rgb, grey, palette, alpha = (picture(mode, 24, 16) for mode in ("RGB", "L", "P", "RGBA"))
    wholes = [
        encoded(rgb, "JPEG", exif=exif(6)), encoded(rgb, "JPEG", progressive=True), encoded(alpha, "PNG", exif=exif(3)),
        encoded(palette, "PNG", transparency=5), encoded(picture("I;16", 24, 16), "PNG"), encoded(rgb, "BMP"),
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
    """Nothing but an image or an ImageError, and no file left open, over a few hundred kinds of damage."""
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
    ("size", "at_least", "decoded"),
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
def test_at_least_so_many_pixels(
    size: tuple[int, int], at_least: int, decoded: tuple[int, int], tmp_path: Path
) -> None:
    image = picture("RGB", *size)
    for format in ("JPEG", "PNG", "WEBP"):
        image.save(tmp_path / format, format)
        expected = decoded if format == "JPEG" else size
        assert open_image(tmp_path / format, at_least=at_least).size == expected
        assert open_image(tmp_path / format).size == size


def test_at_least_keeps_the_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB", 400, 300).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg", at_least=100).size == (150, 200)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "224"])
def test_at_least_is_a_number_of_pixels(wrong: Any, tmp_path: Path) -> None:
    picture("RGB", 9, 9).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="at_least must be a positive number of pixels"):
        open_image(tmp_path / "a.jpg", at_least=wrong)


def test_fast_decoding_keeps_the_embedding(tmp_path: Path) -> None:
    """What open_image's docstring says of one and a half times the size, and of no more than the size."""
    model, preprocess = miniclip.load("demo", "cpu")
    cosines: dict[float, list[float]] = {1.5: [], 1: []}
    for photo in sample_images():
        for size in (photo.size, (258, 258), (450, 300), (512, 400), (1600, 1200)):
            photo.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=90)
            exact = model.encode_image(preprocess([open_image(tmp_path / "a.jpg")]))
            for times, found in cosines.items():
                image = open_image(tmp_path / "a.jpg", at_least=int(times * preprocess.size))
                found.append(torch.cosine_similarity(model.encode_image(preprocess([image])), exact).item())
    assert min(cosines[1.5]) >= 0.999
    assert 0.98 < min(cosines[1]) < 0.998


@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_the_two_halves_are_the_whole(convention: str) -> None:
    preprocess = Preprocess(size=32, convention=convention)  # type: ignore[arg-type]
    images = [picture("RGB", 50, 40), picture("RGBA", 33, 90), picture("L", 32, 32)]
    crops = [preprocess.crop(image) for image in images]
    assert [(crop.shape, crop.dtype) for crop in crops] == [((3, 32, 32), np.uint8)] * 3
    pixels = torch.from_numpy(np.stack(crops))
    assert torch.equal(preprocess.normalise(pixels), preprocess(images))
    assert torch.equal(preprocess.normalise(pixels[0]), preprocess(images[0]))
    for wrong in (pixels.float(), pixels[:, :2], pixels[0, 0]):
        with pytest.raises(InputError, match="must be"):
            preprocess.normalise(wrong)


def test_heif_is_read_with_its_plugin(tmp_path: Path) -> None:
    """As an iPhone writes it: stored lying, to be shown standing."""
    colours = Image.new("RGB", (64, 32))
    colours.paste((255, 0, 0), (0, 0, 32, 32))
    colours.paste((0, 0, 255), (32, 0, 64, 32))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned a quarter clockwise: what lies left stands at the top
    path = tmp_path / "photo.heic"
    code = "import sys, pillow_heif; pillow_heif.register_heif_opener(); from PIL import Image\n"
    code += f"Image.open(sys.argv[1]).save(sys.argv[2], quality=100, exif={exif.tobytes()!r})"
    colours.save(tmp_path / "photo.png")
    subprocess.run([sys.executable, "-c", code, tmp_path / "photo.png", path], check=True)
    # In processes of their own: once registered, Pillow knows the format.
    code = "import json, sys; from miniclip import open_image\n"
    code += "image = open_image(sys.argv[1]); print(json.dumps([image.size, image.getpixel((16, 8)), image.mode]))"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    size, (red, green, blue), mode = json.loads(done.stdout)
    assert (size, mode) == ([32, 64], "RGB")
    assert red > 230
    assert max(green, blue) < 25
    without = "import sys; sys.modules['pillow_heif'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", without, path], capture_output=True, text=True, check=False)
    said = 'photo.heic: is a HEIF picture, which needs a plugin: pip install "miniclip[heif]"'
    assert done.stderr.strip().endswith(said)
    os.mkfifo(tmp_path / "pipe")
    piping = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"no picture" * 9,))
    piping.start()
    with pytest.raises(ImageError, match="pipe: is not an image"):
        open_image(tmp_path / "pipe")  # it does not wait for a second writer
    piping.join()
    path.write_bytes(path.read_bytes()[:300])
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert "miniclip.errors.ImageError" in done.stderr


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "picture.eps"
    Image.new("RGB", (4, 4), "red").save(path)
    with pytest.raises(ImageError, match=r"picture\.eps: is or may hold PostScript"):
        open_image(path)


def test_postscript_inside_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an IPTC record, which Pillow opens for what it holds."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "picture.eps")

    def record(section: int, number: int, data: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, section, number, len(data)) + data

    size = struct.pack(">H", 4)
    fields = record(3, 60, b"\1\0") + record(3, 20, size) + record(3, 30, size) + record(3, 120, b"\5")
    (tmp_path / "photo.jpg").write_bytes(fields + record(8, 10, (tmp_path / "picture.eps").read_bytes()))
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: ran.append(arguments))
    with pytest.raises(ImageError, match=r"photo\.jpg: is or may hold PostScript"):
        open_image(tmp_path / "photo.jpg")
    assert not ran
