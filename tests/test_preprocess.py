"""Preprocessing against torchvision (stored results) and transformers (live), bit for bit; settings and errors."""

from __future__ import annotations

import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.make_preprocess_goldens import MODES, RARE_MODES, SETTINGS, SIZES, sample_image, samples, sha256
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip.preprocess
from miniclip import ConfigError, InputError, Preprocess

# Written by data/make_preprocess_goldens.py with torchvision.
GOLDENS = json.loads((Path(__file__).parent / "data" / "preprocess_goldens.json").read_text(encoding="utf-8"))["cases"]

ALL_MODES = MODES + RARE_MODES


def crops_differ(size: tuple[int, int]) -> bool:
    """Whether half-even rounding and floor give different crops, for an image that is resized and cropped to 224."""
    return any((int(224 * side / min(size)) - 224) % 4 == 3 for side in size)


def mismatches(setting: str, mode: str | None = None) -> list[tuple[str, tuple[int, int], list[float], list[float]]]:
    """The goldens that miniclip misses: mode, size, and a few values of both results."""
    size, edge, resample, mean, std = SETTINGS[setting]
    preprocess = Preprocess(size, mean, std, Image.Resampling[resample], shortest_edge=edge)  # type: ignore[arg-type]
    wrong = []
    for name, golden_mode, width, height, digest, values in GOLDENS:
        if name == setting and mode in (None, golden_mode):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Pillow's, about palettes with transparency
                pixels = preprocess(sample_image(golden_mode, width, height)).numpy()
            if sha256(pixels) != digest:
                wrong.append((golden_mode, (width, height), samples(pixels), values))
    return wrong


# -- the two conventions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
def test_pixels_equal_torchvisions(mode: str) -> None:
    cases = [case for case in GOLDENS if case[:2] == ["openai", mode]]
    assert len(cases) == len(SIZES if mode in MODES else SIZES[::5])
    assert mismatches("openai", mode) == []


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "openai"])
def test_pixels_equal_torchvisions_with_other_settings(setting: str) -> None:
    assert mismatches(setting) == []


@pytest.mark.parametrize("mode", ALL_MODES)
def test_pixels_equal_transformers(mode: str) -> None:
    processor, preprocess = CLIPImageProcessorPil(), Preprocess(convention="huggingface")
    every = 1 if mode in ("RGB", "RGBA", "P") else 2 if mode in MODES else 5
    for size in SIZES[::every]:
        image = sample_image(mode, *size)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(preprocess(image), expected), size


def test_the_conventions_differ_at_a_quarter_of_the_sizes() -> None:
    assert {True, False} == {crops_differ(size) for size in SIZES}
    for size in SIZES:
        image = sample_image("RGB", *size)
        difference = (Preprocess()(image) - Preprocess(convention="huggingface")(image)).abs().max()
        assert difference > 0.05 if crops_differ(size) else difference < 1e-6, size


def test_rounding_the_crop_down_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniclip.preprocess, "round", int, raising=False)
    assert {size for _, size, _, _ in mismatches("openai", "RGB")} == {size for size in SIZES if crops_differ(size)}


def test_converting_first_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    resize_and_crop = Preprocess._resize_and_crop
    monkeypatch.setattr(Preprocess, "_resize_and_crop", lambda self, image: resize_and_crop(self, image.convert("RGB")))
    assert not mismatches("openai", "RGB")
    assert all(mismatches("openai", mode) for mode in ("P", "RGBA"))


@pytest.mark.parametrize("mistake", ["another filter", "another mean", "scale after"])
def test_wrong_arithmetic_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake == "another filter":
        monkeypatch.setattr(miniclip.preprocess, "_check_filter", lambda _: Image.Resampling.LANCZOS)
    elif mistake == "another mean":
        monkeypatch.setitem(SETTINGS, "openai", (*SETTINGS["openai"][:3], (0.5, 0.5, 0.5), SETTINGS["openai"][4]))
    else:  # equal except for the last bit
        grey = torch.arange(256)[None] / 255.0
        mean, std = (torch.tensor(values)[:, None] for values in SETTINGS["openai"][3:])
        monkeypatch.setattr(Preprocess, "_levels", (grey / std - mean / std).numpy())
    assert mismatches("openai", "RGB")


# -- calling it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_a_list_gives_a_batch(convention: str) -> None:
    preprocess = Preprocess(size=32, convention=convention)
    images = [sample_image("RGB", 40, 50), sample_image("L", 64, 32), sample_image("RGBA", 33, 99)]
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


def test_a_call_changes_neither_image_nor_settings() -> None:
    preprocess, image = Preprocess(), sample_image("RGB", 224, 224)  # the right size: no resize
    before = image.tobytes()
    pixels = preprocess(image)
    expected = pixels.clone()
    pixels.zero_()
    assert image.tobytes() == before
    assert torch.equal(preprocess(image), expected)


@pytest.mark.parametrize(
    "wrong", [None, "photo.jpg", Path("photo.jpg"), 7, np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), iter([])]
)
def test_other_types_than_images_are_refused(wrong: Any) -> None:
    for argument in (wrong, [sample_image("RGB", 4, 4), wrong]):
        with pytest.raises(TypeError, match=rf"a PIL image or a list of them, got {type(wrong).__name__}; "):
            Preprocess()(argument)


def test_a_list_of_lists_is_refused() -> None:
    with pytest.raises(TypeError, match="got list"):
        Preprocess()([[sample_image("RGB", 4, 4)]])  # type: ignore[list-item]


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_is_refused(empty: Any) -> None:
    with pytest.raises(InputError, match="the list is empty"):
        Preprocess()(empty)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_an_image_without_pixels_is_refused(size: tuple[int, int], convention: str) -> None:
    with pytest.raises(InputError, match=rf"the image is {size[0]} x {size[1]} pixels"):
        Preprocess(convention=convention)(Image.new("RGB", size))


def test_threads_share_one_preprocess() -> None:
    images = [sample_image("RGB", 60 + i, 50) for i in range(16)]
    expected = Preprocess(size=32)(images)
    shared = Preprocess(size=32)  # its table is not computed yet
    with ThreadPoolExecutor(8) as pool:
        assert torch.equal(torch.stack([*pool.map(shared, images)]), expected)


@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_to_pixels_and_normalise_equal_a_call(convention: str) -> None:
    preprocess = Preprocess(size=32, convention=convention)  # type: ignore[arg-type]
    images = [sample_image("RGB", 50, 40), sample_image("RGBA", 33, 90), sample_image("L", 32, 32)]
    halves = [preprocess.to_pixels(image) for image in images]
    assert [(half.shape, half.dtype) for half in halves] == [((3, 32, 32), np.uint8)] * 3
    pixels = torch.from_numpy(np.stack(halves))
    assert torch.equal(preprocess.normalise(pixels), preprocess(images))
    assert torch.equal(preprocess.normalise(pixels[0]), preprocess(images[0]))
    for wrong in (pixels.float(), pixels[:, :2], pixels[0, 0]):
        with pytest.raises(InputError, match="must be"):
            preprocess.normalise(wrong)


# -- settings -------------------------------------------------------------------------------------------------------


def test_equal_settings_are_one_value() -> None:
    preprocess = Preprocess(size=32, convention="huggingface")
    image = sample_image("RGB", 40, 50)
    pixels = preprocess(image)
    again = pickle.loads(pickle.dumps(preprocess))
    assert again == preprocess == Preprocess(size=32, convention="huggingface")
    assert len({again, preprocess, Preprocess(size=32, convention="huggingface")}) == 1
    assert torch.equal(again(image), pixels)
    assert preprocess != Preprocess(size=32)
    with pytest.raises(AttributeError):
        preprocess.size = 64  # type: ignore[misc]


def test_settings_have_one_form() -> None:
    plain = Preprocess(mean=(0, 0.5, 1), std=(1, 1, 1), resample=Image.Resampling.BILINEAR)
    written = Preprocess(mean=[0.0, 0.5, 1.0], std=[1, 1.0, 1], resample="bilinear")  # type: ignore[arg-type]
    assert written == plain == Preprocess(mean=(0, 0.5, 1), std=(1, 1, 1), resample=2)  # type: ignore[arg-type]
    assert hash(written) == hash(plain)
    assert written.mean == (0.0, 0.5, 1.0)
    assert written.resample is Image.Resampling.BILINEAR


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "convention": ({"convention": "timm"}, "unknown convention 'timm'"),
    "convention of another type": ({"convention": ["openai"]}, "unknown convention"),
    "size 0": ({"size": 0}, "size must be from 1 to 16384 pixels, got 0"),
    "size above the most": ({"size": 16385}, "size must be from 1 to 16384 pixels, got 16385"),
    "huge size": ({"size": 2**53 + 1}, "size must be from 1 to 16384 pixels, got 9007199254740993"),
    "huge edge": ({"shortest_edge": 10**400}, r"shortest_edge must be from 1 to 16384 pixels, got 1000.*\.\.\..*000$"),
    "negative size": ({"size": -224}, "size must be from 1 to 16384 pixels"),
    "size as text": ({"size": "224"}, "size must be from 1 to 16384 pixels, got '224'"),
    "fractional size": ({"size": 224.0}, "size must be from 1 to 16384 pixels"),
    "true size": ({"size": True}, "size must be from 1 to 16384 pixels, got True"),
    "no size": ({"size": None}, "size must be from 1 to 16384 pixels"),
    "two sizes": ({"size": (224, 224)}, "size must be from 1 to 16384 pixels"),
    "edge as text": ({"shortest_edge": "256"}, "shortest_edge must be from 1 to 16384 pixels"),
    "edge 0": ({"shortest_edge": 0}, "shortest_edge must be from 1 to 16384 pixels"),
    "true edge": ({"size": 1, "shortest_edge": True}, "shortest_edge must be from 1 to 16384 pixels"),
    "edge below size": ({"shortest_edge": 200}, "a short side of 200 pixels cannot be cropped to 224"),
    "two means": ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
    "one mean": ({"mean": 0.5}, "mean must be three numbers, got 0.5"),
    "mean as text": ({"mean": "0.5"}, "mean must be three numbers"),
    "means as text": ({"mean": ["0.5"] * 3}, "mean must be three finite numbers"),
    "infinite mean": ({"mean": [0.5, float("inf"), 0.5]}, "mean must be three finite numbers"),
    "mean NaN": ({"mean": [0.5, 0.5, float("nan")]}, "mean must be three finite numbers"),
    "mean beyond float32": ({"mean": [0.5, 1e39, 0.5]}, "mean must be three finite numbers"),
    "mean beyond float64": ({"mean": [0.5, 10**400, 0.5]}, "mean must be three finite numbers"),
    "no mean": ({"mean": None}, "mean must be three numbers"),
    "std 0": ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    "negative std": ({"std": (1.0, 1.0, -1.0)}, "std must be positive"),
    "std NaN": ({"std": (float("nan"), 1.0, 1.0)}, "std must be three finite numbers"),
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
