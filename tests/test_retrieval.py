"""examples/retrieval.py: recall as a plain loop computes it, its output, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import common
import pytest
import retrieval
import torch
from helpers import run_script
from scripts import refusal, run_here
from torch.nn import functional as F

import miniclip


def brute_force(similarities: torch.Tensor, owner: torch.Tensor, k: int) -> tuple[float, float]:
    """Both recalls, from the first k of each sorted row and column."""
    scores, owners = similarities.tolist(), owner.tolist()
    hits = 0
    for image, row in enumerate(scores):
        first = sorted(range(len(row)), key=lambda caption: -row[caption])[:k]
        hits += any(owners[caption] == image for caption in first)
    found = 0
    for caption, image in enumerate(owners):
        first = sorted(range(len(scores)), key=lambda other: -scores[other][caption])[:k]
        found += image in first
    return hits / len(scores), found / len(owners)


@pytest.mark.parametrize("captions", [1, 5])
def test_recall_equals_a_plain_loop(captions: int) -> None:
    generator = torch.Generator().manual_seed(captions)
    owner = torch.arange(20).repeat_interleave(captions)
    owner = owner[torch.randperm(len(owner), generator=generator)]  # an image's captions need not be neighbours
    similarities = torch.randn(20, len(owner), generator=generator)
    similarities[owner, torch.arange(len(owner))] += 1
    for k in (1, 2, 5, 10, 20):
        expected = brute_force(similarities, owner, k)
        assert retrieval.recall(retrieval.image_ranks(similarities, owner), k) == pytest.approx(expected[0])
        assert retrieval.recall(retrieval.caption_ranks(similarities, owner), k) == pytest.approx(expected[1])


def test_ranks_with_several_captions_per_image() -> None:
    owner = torch.tensor([0, 0, 1, 2, 2])
    similarities = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.3], [0.8, 0.0, 0.6, 0.7, 0.1], [0.0, 0.1, 0.9, 0.4, 0.2]])
    # Image 0 finds its second caption first. Image 1's caption comes after 0.8 and 0.7, image 2's best after 0.9.
    assert retrieval.image_ranks(similarities, owner).tolist() == [0, 2, 1]
    assert retrieval.caption_ranks(similarities, owner).tolist() == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_equal_scores_count_against_the_model(value: float) -> None:
    owner = torch.arange(4).repeat_interleave(2)
    alike = torch.full((4, 8), value)
    assert retrieval.recall(retrieval.image_ranks(alike, owner), 3) == 0
    assert retrieval.recall(retrieval.caption_ranks(alike, owner), 3) == 0


def test_a_k_above_the_size_of_the_collection_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    retrieval.print_recalls(torch.eye(3).repeat_interleave(2, dim=1), torch.arange(3).repeat_interleave(2))
    heading, images, captions = capsys.readouterr().out.splitlines()
    assert heading.split() == ["recall@1", "recall@5"]
    assert images.split() == ["image", "to", "text", "100.0%", "100.0%"]
    assert captions.split() == ["text", "to", "image", "100.0%", "-"]


@pytest.mark.slow
def test_an_unreadable_image_is_left_out(tiny: Path, tmp_path: Path) -> None:
    for name in ("cat", "pizza", "house"):
        shutil.copy(common.IMAGES / f"{name}.png", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [f"{name}.png,{text} {name}" for name in ("cat", "broken", "pizza", "house") for text in ("a", "the")]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    done = run_script("examples/retrieval.py", tmp_path, "--model", tiny, "--batch-size", 2, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "1 of 4 images could not be read" in done.stdout
    assert "3 images, 6 captions" in done.stdout
    assert "image to text" in done.stdout


def test_a_query_lists_the_images_by_similarity(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch, retrieval, "--query", "a cat", "--model", tiny)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    model, preprocess = miniclip.load(tiny)
    paths = sorted((common.IMAGES).glob("*.png"))
    images = F.normalize(model.encode_image(preprocess([miniclip.open_image(path) for path in paths])), dim=1)
    scores = (images @ F.normalize(model.encode_text(miniclip.tokenize("a cat")), dim=1)[0]).tolist()
    expected = sorted(zip(scores, [path.name for path in paths]), reverse=True)[:5]
    assert lines == [[f"{score:.3f}", name] for score, name in expected]


def test_a_folder_without_captions_or_readable_images_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "has no captions.csv" in refusal(monkeypatch, retrieval, tmp_path, "--model", tiny)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "captions.csv").write_text("image,caption\nbroken.png,a cat\n")
    assert "none of the 1 images could be read" in refusal(monkeypatch, retrieval, tmp_path, "--model", tiny)
