"""examples/linear_probe.py: its split, its classes, its output, and what it refuses."""

from __future__ import annotations

import random
from pathlib import Path

import linear_probe
import numpy as np
import pytest
from helpers import run_script
from PIL import Image
from scripts import refusal, run_here


def colours(folder: Path, count: int, *names: str) -> Path:
    """A folder with a subfolder of plain images for every colour."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 40 + index), name).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.slow
def test_a_probe_separates_colours(tiny: Path, tmp_path: Path) -> None:
    folder = colours(tmp_path, 5, "red", "green", "blue")
    done = run_script("examples/linear_probe.py", folder, "--sweep", "--model", tiny, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "3 classes, 12 training images, 3 test images" in done.stdout
    assert "linear probe  100.0%" in done.stdout
    assert "zero-shot" in done.stdout


def test_the_folders_train_and_test_are_the_split(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    colours(tmp_path / "train", 3, "red", "green")
    colours(tmp_path / "test", 4, "red", "green")
    run_here(monkeypatch, linear_probe, tmp_path, "--model", tiny)
    out = capsys.readouterr().out
    assert "2 classes, 6 training images, 8 test images" in out
    assert "C = 0.316" in out
    colours(tmp_path / "test", 1, "blue")
    said = refusal(monkeypatch, linear_probe, tmp_path, "--model", tiny)
    assert "lacks 1 of the test's classes, the first is 'blue'" in said


def test_hold_out_keeps_a_fifth_of_every_class() -> None:
    labels = np.array(["a"] * 10 + ["b"] * 2 + ["c"] * 25)
    held = linear_probe.hold_out(labels, random.Random(0), "the test")
    assert [held[labels == label].sum() for label in "abc"] == [2, 1, 5]
    assert (held == linear_probe.hold_out(labels, random.Random(0), "the test")).all()
    assert (held != linear_probe.hold_out(labels, random.Random(1), "the test")).any()


def test_too_few_classes_or_images_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours(tmp_path, 1, "red")
    said = refusal(monkeypatch, linear_probe, tmp_path, "--model", tiny)
    assert "has 1 subfolders, and a classifier needs at least two" in said
    colours(tmp_path, 3, "green")
    assert "'red' has one image" in refusal(monkeypatch, linear_probe, tmp_path, "--model", tiny)
    assert "is not a folder" in refusal(monkeypatch, linear_probe, tmp_path / "none", "--model", tiny)


def test_sample_copies_differ_and_follow_the_seed() -> None:
    first, second = (linear_probe.sample_copies(random.Random(0)) for _ in range(2))
    assert len(first) == 12 * linear_probe.COPIES
    assert len({image.tobytes() for image, _ in first}) == len(first)
    assert [image.tobytes() for image, _ in first] == [image.tobytes() for image, _ in second]
