"""examples/retrieval.py, linear_probe.py and attention.py: their arithmetic, their output, what they refuse."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import miniclip

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def load_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def retrieval(load_example: Any) -> Any:
    return load_example("retrieval")


@pytest.fixture
def linear_probe(load_example: Any) -> Any:
    return load_example("linear_probe")


@pytest.fixture
def attention(load_example: Any) -> Any:
    return load_example("attention")


def run(script: str, *arguments: object, code: int = 0) -> str:
    """What the script prints: its output, or what it says when it stops with ``code``."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith(f"{script}: ")
        assert done.stderr.count("\n") == 1
    return done.stderr if code else done.stdout


def stopped(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The sentence that main stops with, without a process of its own."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with pytest.raises((SystemExit, miniclip.MiniclipError)) as error:
        module.main()
    return str(error.value)


# -- retrieval --------------------------------------------------------------------------------------------------------


def brute_force(similarities: torch.Tensor, owner: torch.Tensor, k: int) -> tuple[float, float]:
    """Both recalls by sorting each row and each column and looking at its first k."""
    scores, owners = similarities.tolist(), owner.tolist()
    hits = 0
    for picture, row in enumerate(scores):
        first = sorted(range(len(row)), key=lambda caption: -row[caption])[:k]
        hits += any(owners[caption] == picture for caption in first)
    found = 0
    for caption, picture in enumerate(owners):
        first = sorted(range(len(scores)), key=lambda other: -scores[other][caption])[:k]
        found += picture in first
    return hits / len(scores), found / len(owners)


@pytest.mark.parametrize("captions", [1, 5])
def test_recall_is_that_of_a_plain_loop(retrieval: Any, captions: int) -> None:
    generator = torch.Generator().manual_seed(captions)
    owner = torch.arange(20).repeat_interleave(captions)
    owner = owner[torch.randperm(len(owner), generator=generator)]  # a picture's captions need not be neighbours
    similarities = torch.randn(20, len(owner), generator=generator)
    similarities[owner, torch.arange(len(owner))] += 1
    for k in (1, 2, 5, 10, 20):
        expected = brute_force(similarities, owner, k)
        assert retrieval.recall(retrieval.picture_ranks(similarities, owner), k) == pytest.approx(expected[0])
        assert retrieval.recall(retrieval.caption_ranks(similarities, owner), k) == pytest.approx(expected[1])


def test_recall_by_hand_with_several_captions(retrieval: Any) -> None:
    owner = torch.tensor([0, 0, 1, 2, 2])
    similarities = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.3], [0.8, 0.0, 0.6, 0.7, 0.1], [0.0, 0.1, 0.9, 0.4, 0.2]])
    # Picture 0 finds its second caption first; before picture 1's come 0.8 and 0.7, before picture 2's best 0.9.
    assert retrieval.picture_ranks(similarities, owner).tolist() == [0, 2, 1]
    assert retrieval.caption_ranks(similarities, owner).tolist() == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_model_that_finds_everything_alike_scores_nothing(retrieval: Any, value: float) -> None:
    owner = torch.arange(4).repeat_interleave(2)
    alike = torch.full((4, 8), value)
    assert retrieval.recall(retrieval.picture_ranks(alike, owner), 3) == 0
    assert retrieval.recall(retrieval.caption_ranks(alike, owner), 3) == 0


def test_a_k_beyond_the_collection_is_left_out(retrieval: Any, capsys: pytest.CaptureFixture[str]) -> None:
    retrieval.print_recalls(torch.eye(3).repeat_interleave(2, dim=1), torch.arange(3).repeat_interleave(2))
    heading, pictures, captions = capsys.readouterr().out.splitlines()
    assert heading.split() == ["recall@1", "recall@5"]
    assert pictures.split() == ["image", "to", "text", "100.0%", "100.0%"]
    assert captions.split() == ["text", "to", "image", "100.0%", "-"]


def test_retrieval_runs_and_leaves_out_what_it_cannot_read(tiny: Path, tmp_path: Path) -> None:
    for name in ("cat", "pizza", "house"):
        shutil.copy(EXAMPLES / "images" / f"{name}.png", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [f"{name}.png,{text} {name}" for name in ("cat", "broken", "pizza", "house") for text in ("a", "the")]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    out = run("retrieval.py", tmp_path, "--model", tiny, "--batch-size", 2)
    assert "1 of 4 pictures could not be read" in out
    assert "3 pictures, 6 captions" in out
    assert "image to text" in out


def test_a_query_gets_the_pictures_in_order(
    retrieval: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval.py", "--query", "a cat", "--model", str(tiny)])
    retrieval.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    model, preprocess = miniclip.load(tiny)
    paths = sorted((EXAMPLES / "images").glob("*.png"))
    pictures = F.normalize(model.encode_image(preprocess([miniclip.open_image(path) for path in paths])), dim=1)
    scores = (pictures @ F.normalize(model.encode_text(miniclip.tokenize("a cat")), dim=1)[0]).tolist()
    expected = sorted(zip(scores, [path.name for path in paths]), reverse=True)[:5]
    assert lines == [[f"{score:.3f}", name] for score, name in expected]


def test_retrieval_without_captions_says_so(tmp_path: Path) -> None:
    assert "has no captions.csv" in run("retrieval.py", tmp_path, code=1)


def test_retrieval_without_one_readable_picture(
    retrieval: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "captions.csv").write_text("image,caption\nbroken.png,a cat\n")
    assert "none of the 1 pictures could be read" in stopped(retrieval, monkeypatch, tmp_path, "--model", tiny)


# -- linear probe -----------------------------------------------------------------------------------------------------


def colours(folder: Path, count: int, *names: str) -> Path:
    """A folder with a subfolder of plain pictures for every colour."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 40 + index), name).save(folder / name / f"{index}.png")
    return folder


def test_linear_probe_tells_colours_apart(tiny: Path, tmp_path: Path) -> None:
    out = run("linear_probe.py", colours(tmp_path, 5, "red", "green", "blue"), "--sweep", "--model", tiny)
    assert "3 classes, 12 pictures to train on, 3 to test on" in out
    assert "linear probe  100.0%" in out
    assert "zero-shot" in out


def test_linear_probe_takes_a_given_split(
    linear_probe: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    colours(tmp_path / "train", 3, "red", "green")
    colours(tmp_path / "test", 4, "red", "green")
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", str(tmp_path), "--model", str(tiny)])
    linear_probe.main()
    out = capsys.readouterr().out
    assert "2 classes, 6 pictures to train on, 8 to test on" in out
    assert "C = 0.316" in out
    colours(tmp_path / "test", 1, "blue")
    assert "no pictures of 1 of the test's classes: 'blue'" in stopped(
        linear_probe, monkeypatch, tmp_path, "--model", tiny
    )


def test_hold_out_keeps_a_fifth_of_every_class(linear_probe: Any) -> None:
    labels = np.array(["a"] * 10 + ["b"] * 2 + ["c"] * 25)
    held = linear_probe.hold_out(labels, random.Random(0), "the test")
    assert [held[labels == label].sum() for label in "abc"] == [2, 1, 5]
    assert (held == linear_probe.hold_out(labels, random.Random(0), "the test")).all()
    assert (held != linear_probe.hold_out(labels, random.Random(1), "the test")).any()


def test_linear_probe_refuses_what_it_cannot_train_on(
    linear_probe: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours(tmp_path, 1, "red")
    assert "has 1 subfolders, and a classifier needs two" in stopped(
        linear_probe, monkeypatch, tmp_path, "--model", tiny
    )
    colours(tmp_path, 3, "green")
    assert "'red' has one picture" in stopped(linear_probe, monkeypatch, tmp_path, "--model", tiny)
    assert "is not a folder" in stopped(linear_probe, monkeypatch, tmp_path / "none", "--model", tiny)


def test_sample_copies_differ_and_follow_the_seed(linear_probe: Any) -> None:
    monday, again = (linear_probe.sample_copies(random.Random(0)) for _ in range(2))
    assert len(monday) == 12 * linear_probe.COPIES
    assert len({picture.tobytes() for picture, _ in monday}) == len(monday)
    assert [picture.tobytes() for picture, _ in monday] == [picture.tobytes() for picture, _ in again]


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_walk_by_hand_gives_the_model_s_embedding(attention: Any, tiny: Path) -> None:
    model, _ = miniclip.load(tiny, dtype=torch.float32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    embedding, attentions = attention.encode_image(model.visual, images)
    torch.testing.assert_close(embedding, model.encode_image(images), rtol=0, atol=1e-5)
    assert [tuple(probabilities.shape) for probabilities in attentions] == [(2, 4, 17, 17)] * 3
    for probabilities in attentions:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 4, 17))


def test_gradients_of_the_attention_are_finite_differences(
    attention: Any, tiny: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = miniclip.load(tiny, dtype=torch.float64)
    weights = torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    embedding, attentions = attention.encode_image(model.visual, pixels)
    gradients = torch.autograd.grad(embedding[0] @ weights, attentions)
    original = attention.attention_probabilities

    def score(block: int, place: tuple[int, int, int], change: float) -> float:
        """The score after one attention probability of one block has been changed."""
        calls = []

        def changed(*arguments: Any) -> Any:
            probabilities, values = original(*arguments)
            if len(calls) == block:
                probabilities = probabilities.clone()
                probabilities[(0, *place)] += change
            calls.append(None)
            return probabilities, values

        with monkeypatch.context() as patch:
            patch.setattr(attention, "attention_probabilities", changed)
            return (attention.encode_image(model.visual, pixels)[0][0] @ weights).item()

    for block in range(3):
        for place in ((0, 0, 5), (3, 0, 0), (1, 7, 2)):
            slope = (score(block, place, 1e-5) - score(block, place, -1e-5)) / 2e-5
            assert gradients[block][(0, *place)].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def chained(attentions: list[np.ndarray], gradients: list[np.ndarray], positive: bool = True) -> np.ndarray:
    """Chefer's relevance as a product of matrices, (1 + A_last) … (1 + A_first), entry by entry in numpy."""
    product = np.eye(attentions[0].shape[-1])
    for probabilities, gradient in zip(attentions, gradients):
        heads = [p * g for p, g in zip(probabilities[0], gradient[0])]
        step = sum(np.where(head > 0, head, 0) if positive else head for head in heads) / len(heads)
        product = (np.eye(len(product)) + step) @ product
    return product[0, 1:]


def test_relevance_is_the_paper_s(attention: Any, tiny: Path, pixels: torch.Tensor) -> None:
    model, _ = miniclip.load(tiny, dtype=torch.float64)
    embedding, attentions = attention.encode_image(model.visual, pixels)
    gradients = torch.autograd.grad(embedding[0, 0], attentions)
    got = attention.relevance(attentions, gradients)[0].detach().numpy()
    arrays = [[t.detach().numpy() for t in tensors] for tensors in (attentions, gradients)]
    np.testing.assert_allclose(got, chained(*arrays), rtol=1e-10)
    # What a mistake would give is told apart: no positive part, the blocks in the other order, no gradient.
    for mistake in (
        chained(*arrays, positive=False),
        chained(arrays[0][::-1], arrays[1][::-1]),
        chained(arrays[0], [np.ones_like(gradient) for gradient in arrays[1]]),
    ):
        assert np.abs(mistake - got).max() > 0.01 * np.abs(got).max()


def test_heat_maps_are_those_of_each_prompt_alone(attention: Any, tiny: Path, pixels: torch.Tensor) -> None:
    model, _ = miniclip.load(tiny, dtype=torch.float32)
    prompts = ["a cat", "a red car on the road"]
    maps, cosines = attention.heat_maps(model, pixels[0].float(), prompts)
    assert maps.shape == (2, 4, 4)
    assert maps.amax(dim=(1, 2)).tolist() == [1, 1]
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)
    for prompt, heat in zip(prompts, maps):
        torch.testing.assert_close(attention.heat_maps(model, pixels[0].float(), [prompt])[0][0], heat)
    logits = model(pixels.float(), miniclip.tokenize(prompts))[0][0]
    torch.testing.assert_close(cosines, logits / model.logit_scale.exp(), rtol=1e-4, atol=1e-6)


def test_the_square_drawn_is_the_square_seen(attention: Any) -> None:
    """Shrunk to the model's size it has the colours that the model's own pixels have."""
    preprocess = miniclip.Preprocess(32, shortest_edge=40)
    gradient = np.linspace(0, 255, 300 * 500).reshape(300, 500).astype(np.uint8)
    photo = Image.fromarray(np.stack([gradient, gradient[:, ::-1], gradient[::-1]], axis=2))
    square = torch.from_numpy(attention.seen_square(preprocess, photo))
    assert square.shape == (512, 512, 3)
    mean, std = (torch.tensor(values) for values in (preprocess.mean, preprocess.std))
    seen = preprocess(photo).permute(1, 2, 0) * std + mean
    torch.testing.assert_close(
        square.view(32, 16, 32, 16, 3).mean(dim=(1, 3))[2:-2, 2:-2], seen[2:-2, 2:-2], rtol=0, atol=0.03
    )


def test_attention_draws(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "heat.png"
    said = run("attention.py", EXAMPLES / "images" / "cat.png", "a cat", "a dog", "--model", tiny, "--out", out)
    assert "2 heat maps" in said
    with Image.open(out) as picture:
        assert picture.width > 1.5 * picture.height


def test_attention_says_what_is_missing(attention: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in run("attention.py", tmp_path / "none.jpg", "a cat", code=1)
    assert "what to look for" in stopped(attention, monkeypatch, "photo.jpg")
    assert "there is no folder" in stopped(attention, monkeypatch, "--out", tmp_path / "none" / "heat.png")
