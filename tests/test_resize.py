"""Resizing equals Pillow's to the bit in strips, and takes bounded memory for very long images."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.make_preprocess_goldens import sample_image
from helpers import run_python
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip.resize
from miniclip import Preprocess

# With this mean and standard deviation, the result is the grey level itself, from 0 to 255.
AS_LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number: the pixels of the largest image that a resize or crop made."""
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
    # "huggingface" first makes an RGB image, which takes memory of its own
    conventions = ["openai"] if max(size) > 10**7 else ["openai", "huggingface"]
    for convention in conventions:
        pixels = Preprocess(convention=convention, **AS_LEVELS)(image)
        assert pixels.shape == (3, 224, 224)
        if mode != "RGBA":  # one colour everywhere; nearly transparent pixels lose theirs to rounding
            assert torch.equal(pixels, pixels[:, :1, :1].expand(3, 224, 224))
    assert 224 * 224 <= largest[0] <= 4 * 224 * 224


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("convention", ["openai", "huggingface"])
def test_resizing_a_region_equals_cropping_the_resized_image(
    mode: str, convention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For tall and wide images that are small enough to resize as a whole."""
    preprocess = Preprocess(size=64, convention=convention, **AS_LEVELS)
    for short, ratio in ((1, 131), (2, 101), (3, 133), (7, 143), (40, 107), (64, 105), (67, 101), (90, 102)):
        long = int(short * ratio) + 1
        for size in ((short, long), (long, short)):
            image = sample_image(mode, *size)
            monkeypatch.setattr(miniclip.resize, "_MAX_ASPECT", 10**9)
            whole = preprocess(image)
            monkeypatch.setattr(miniclip.resize, "_MAX_ASPECT", 100)
            part = preprocess(image)
            levels = 2 if mode == "CMYK" and convention == "openai" else 1  # converted after rounding
            assert (part - whole).abs().max() < levels + 0.01, size


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_strips_equal_the_whole_to_the_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(miniclip.resize, "_LARGE", 0)
    pick = random.Random(threads)
    for filter in Image.Resampling:
        for _ in range(25):
            mode, size = pick.choice(("RGB", "L", "RGBA", "CMYK")), (pick.randint(1, 700), pick.randint(1, 700))
            resized = pick.randint(1, size[0] + 10), pick.randint(1, 700)
            image = sample_image(mode, *size)
            strips, whole = miniclip.resize._resize(image, resized, filter), image.resize(resized, filter)
            assert strips.mode == whole.mode
            assert np.array_equal(np.asarray(strips), np.asarray(whole)), (mode, size, resized, filter)


@pytest.mark.parametrize(
    ("size", "strips"), [((2001, 1000), 2), ((1100, 1900), 2), ((700, 2900), 1), ((1999, 1000), 1)]
)
def test_large_images_are_resized_in_strips(
    size: tuple[int, int], strips: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also from a file whose pixels Pillow has not read yet. Pillow starts very tall images with the vertical pass."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    image = sample_image("RGB", *size)
    image.save(tmp_path / "a.png")
    expected, made, resize = Preprocess(convention="huggingface")(image), [], Image.Image.resize

    def counted(self: Image.Image, *arguments: Any, **settings: Any) -> Image.Image:
        made.append(settings.get("box"))
        return resize(self, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert torch.equal(Preprocess()(Image.open(tmp_path / "a.png")), Preprocess()(image))
    assert len([box for box in made if box]) == (0 if strips == 1 else 2 * strips)
    assert torch.equal(expected, CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.slow
def test_strips_work_while_python_shuts_down() -> None:
    """At that time no thread can be started."""
    code = (
        "import atexit, torch, miniclip; from PIL import Image; torch.set_num_threads(2)\n"
        "image = Image.linear_gradient('L').resize((2000, 1500)).convert('RGB')\n"
        "expected = miniclip.Preprocess()(image)\n"
        "atexit.register(lambda: print(torch.equal(miniclip.Preprocess()(image), expected)))\n"
    )
    done = run_python("-c", code)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
