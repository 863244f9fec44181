"""examples/attention.py: the tower step by step, its gradients, the maps of the paper, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attention
import common
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import is_clipped, refusal, run_here, watch_figures

import miniclip


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_tower_step_by_step_gives_the_model_s_embedding(tiny: Path) -> None:
    model, _ = miniclip.load(tiny, dtype=torch.float32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    embedding, attentions = attention.encode_image(model.visual, images)
    torch.testing.assert_close(embedding, model.encode_image(images), rtol=0, atol=1e-5)
    assert [tuple(probabilities.shape) for probabilities in attentions] == [(2, 4, 17, 17)] * 3
    for probabilities in attentions:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 4, 17))


def test_gradients_of_the_attention_equal_finite_differences(
    tiny: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
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


def test_relevance_equals_the_formula_of_the_paper(tiny: Path, pixels: torch.Tensor) -> None:
    model, _ = miniclip.load(tiny, dtype=torch.float64)
    embedding, attentions = attention.encode_image(model.visual, pixels)
    gradients = torch.autograd.grad(embedding[0, 0], attentions)
    got = attention.relevance(attentions, gradients)[0].detach().numpy()
    arrays = [[t.detach().numpy() for t in tensors] for tensors in (attentions, gradients)]
    np.testing.assert_allclose(got, chained(*arrays), rtol=1e-10)
    # Three mistakes give other numbers: negative parts kept, the blocks in reverse order, no gradient.
    for mistake in (
        chained(*arrays, positive=False),
        chained(arrays[0][::-1], arrays[1][::-1]),
        chained(arrays[0], [np.ones_like(gradient) for gradient in arrays[1]]),
    ):
        assert np.abs(mistake - got).max() > 0.01 * np.abs(got).max()


def test_each_prompt_gets_the_map_it_would_get_alone(tiny: Path, pixels: torch.Tensor) -> None:
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


def test_the_drawn_square_is_the_one_the_model_sees() -> None:
    """Reduced to the model's size, it has the colours of the model's own pixels."""
    preprocess = miniclip.Preprocess(32, shortest_edge=40)
    gradient = np.linspace(0, 255, 300 * 500).reshape(300, 500).astype(np.uint8)
    image = Image.fromarray(np.stack([gradient, gradient[:, ::-1], gradient[::-1]], axis=2))
    square = torch.from_numpy(attention.seen_square(preprocess, image))
    assert square.shape == (512, 512, 3)
    mean, std = (torch.tensor(values) for values in (preprocess.mean, preprocess.std))
    seen = preprocess(image).permute(1, 2, 0) * std + mean
    torch.testing.assert_close(
        square.view(32, 16, 32, 16, 3).mean(dim=(1, 3))[2:-2, 2:-2], seen[2:-2, 2:-2], rtol=0, atol=0.03
    )


def test_the_overlay_keeps_the_colours_of_the_image() -> None:
    square = np.random.default_rng(0).random((64, 64, 3))
    np.testing.assert_allclose(attention.overlay(square, torch.zeros(4, 4)), square)
    # Under half of the heat two colours still differ by their own difference, only smaller: nothing turns grey.
    other = np.random.default_rng(1).random((64, 64, 3))
    half = torch.full((4, 4), 0.5)
    difference = attention.overlay(square, half) - attention.overlay(other, half)
    np.testing.assert_allclose(difference, (1 - attention.OPACITY / 2) * (square - other), atol=1e-6)
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    change = np.abs(attention.overlay(square, heat) - square).mean(axis=2)
    assert change[:8, :8].mean() > 0.2
    assert change[32:, 32:].max() < 0.01  # far from the heat


def test_more_heat_is_darker_on_white() -> None:
    ramp = attention.blend(np.ones((64, 3)), np.linspace(0, 1, 64)) @ np.array([0.299, 0.587, 0.114])
    assert ramp[0] == pytest.approx(1)
    assert (np.diff(ramp) < 0).all()


def test_the_prompts_of_the_samples_are_the_names_of_their_files() -> None:
    prompts = attention.sample_prompts()
    assert len(prompts) == len(list(common.IMAGES.glob("*.png"))) == 12
    assert prompts[common.IMAGES / "cat.png"] == ["cat"]
    assert all(words == [path.stem] for path, words in prompts.items())


def test_a_sample_with_a_cosine_that_is_not_positive_is_left_out_and_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = watch_figures(monkeypatch)
    cosines = {"cat": -0.2, "pizza": -0.004, "octopus": 0.0}

    def maps(model: object, pixels: object, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1, 4, 4), torch.tensor([cosines.get(prompts[0], 0.3)])

    monkeypatch.setattr(attention, "heat_maps", maps)
    run_here(monkeypatch, attention, "--model", tiny, "--out", tmp_path / "heat.png")
    drawn, left_out = capsys.readouterr().out.splitlines()
    assert drawn.endswith("heat.png: 9 heat maps")
    assert left_out.endswith("not positive: pizza (0.00), cat (−0.20), octopus (0.00)")
    titles = [axes.get_title() for axes in figures[0].axes]
    assert len(titles) == 2 * 9 + 1  # each image and its map, and one colour bar for all
    assert [title for title in titles if title.startswith("sailboat")] == ["sailboat.png", "sailboat\ncosine 0.30"]
    assert not any(title.startswith(tuple(cosines)) for title in titles)
    cosines.update(dict.fromkeys([path.stem for path in common.IMAGES.glob("*.png")], -1.0))
    assert "nothing to show" in refusal(monkeypatch, attention, "--model", tiny, "--out", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_figure_has_one_map_per_prompt_and_nothing_is_clipped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the user's own image every prompt is shown, whatever its cosine."""
    figures = watch_figures(monkeypatch)
    out = tmp_path / "heat.png"
    prompts = ["a cat", "a dog", "a prompt for $5 and $6 that needs " + "very " * 30 + "many lines", "W" * 70]
    monkeypatch.setattr(attention, "COLUMNS", 3)
    run_here(monkeypatch, attention, common.IMAGES / "cat.png", *prompts, "--model", tiny, "--out", out)
    assert capsys.readouterr().out.splitlines() == [f"{out}: 4 heat maps"]
    panels = figures[0].axes[:-1]
    assert [axes.get_title().split()[0] for axes in panels[:4]] == ["cat.png", "a", "a", "a"]
    assert len({round(axes.get_position().y0, 6) for axes in panels}) == 2  # three panels, and two below them
    assert not is_clipped(out)


def test_a_missing_image_prompt_or_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refusal(monkeypatch, attention, tmp_path / "none.jpg", "a cat", "--model", "demo")
    assert "what to look for" in refusal(monkeypatch, attention, "photo.jpg")
    assert "there is no folder" in refusal(monkeypatch, attention, "--out", tmp_path / "none" / "heat.png")
