"""training/average.py: every weight is the mean, and what cannot be averaged is refused."""

from __future__ import annotations

from pathlib import Path

import average
import pytest
import torch
from conftest import make_reference
from safetensors.torch import load_file
from scripts import refusal, run_here


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three folders of one configuration."""
    for seed in range(3):
        make_reference(seed).save_pretrained(tmp_path / str(seed))
    return [tmp_path / str(seed) for seed in range(3)]


def test_every_weight_is_the_mean(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, average, *models, "--out", tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    parts = [load_file(model / "model.safetensors") for model in models]
    assert len(mean) > 20
    for name, value in mean.items():
        expected = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        assert name == "logit_scale" or not torch.equal(value, parts[0][name])
    run_here(monkeypatch, average, *models[:2], "--half", "--out", tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["text_projection.weight"].dtype == torch.float16


def test_weights_may_be_negative(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 0.75, 0.75, -0.5
    run_here(monkeypatch, average, *models, "--weights", *weights, "--out", tmp_path / "beyond")
    beyond = load_file(tmp_path / "beyond" / "model.safetensors")
    parts = [load_file(model / "model.safetensors") for model in models]
    for name, value in beyond.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, parts))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
        mean = sum(part[name].double() for part in parts) / 3
        assert name == "logit_scale" or not torch.allclose(value.double(), mean, atol=1e-3)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0.5, 0.5), "there are 3 models and 2 weights"),
        ((1, 1, -0.5), "the weights must be 1 in sum, got 1.5"),
        (("nan", 1, 0), "the weights must be 1 in sum, got nan"),
        (("inf", 1, 0), "the weights must be 1 in sum, got inf"),
    ],
)
def test_wrong_weights_are_refused(
    weights: tuple[object, ...],
    said: str,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_here(monkeypatch, average, *models, "--weights", *weights, "--out", tmp_path / "mean")
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_what_cannot_be_averaged_is_refused(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_reference(projection_dim=12).save_pretrained(tmp_path / "other")
    said = refusal(monkeypatch, average, models[0], tmp_path / "other", "--out", tmp_path / "mean")
    assert "have different configurations" in said
    assert not (tmp_path / "mean").exists()
    assert "holds a model already" in refusal(monkeypatch, average, *models, "--out", models[0])
    with pytest.raises(SystemExit):
        run_here(monkeypatch, average, models[0], "--out", tmp_path / "mean")
    assert "give two models or more" in capsys.readouterr().err
