"""examples/similarity.py and what the figures of the examples share: numbers, titles, colour bars, nothing clipped."""

from __future__ import annotations

from pathlib import Path

import common
import pytest
import similarity
import torch
from helpers import make_image
from matplotlib.figure import Figure
from matplotlib.text import Text
from scripts import is_clipped, refusal, run_here, watch_figures

MINUS = "\N{MINUS SIGN}"


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-0.0049, "0.00"),
        (-0.0, "0.00"),
        (0.0049, "0.00"),
        (-0.0051, f"{MINUS}0.01"),
        (0.756, "0.76"),
        (-1.0, f"{MINUS}1.00"),
    ],
)
def test_a_number_that_rounds_to_zero_has_no_sign(value: float, shown: str) -> None:
    assert common.two_decimals(value) == shown


def test_every_cell_has_its_number_and_the_best_of_a_column_is_bold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = watch_figures(monkeypatch)
    matrix = torch.tensor([[0.5, -0.004, -0.2], [-0.31, 0.7, 0.1]])
    images = [make_image(seed=seed) for seed in range(3)]
    similarity.draw(matrix, images, ["a cat", "$5 and $6"], tmp_path / "out.png", "about")
    cells = drawn[0].axes[0].texts
    assert [cell.get_text() for cell in cells] == ["0.50", "0.00", f"{MINUS}0.20", f"{MINUS}0.31", "0.70", "0.10"]
    assert [cell.get_fontweight() for cell in cells] == ["bold", "normal", "normal", "normal", "bold", "bold"]


def test_the_figure_says_what_it_shows(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = watch_figures(monkeypatch)
    run_here(monkeypatch, similarity, "--model", tiny, "--out", tmp_path / "out.png")
    shown = words(drawn[0])
    assert "Cosine similarity of captions (rows) and images (columns)" in shown
    (about,) = (line for line in shown if "examples/images" in line)
    assert tiny.name in about
    (bar,) = (axes for axes in drawn[0].axes if axes.get_ylabel() == "cosine similarity")
    cells = drawn[0].axes[0].images[0]
    assert bar.get_ylim() == pytest.approx(cells.get_clim())  # the bar is that of the matrix
    assert not any(text.startswith((f"{MINUS}0.00", "-")) for text in shown)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_clipped(count: int, tmp_path: Path) -> None:
    """Around everything that is drawn there is a white edge, even where the words are longer than the matrix."""
    images = [make_image(seed=seed) for seed in range(count)]
    captions = ["a very long caption that needs four lines beside a cell that is not as high as they are"] * count
    about = "the model " + "x" * 150
    similarity.draw(torch.rand(count, count), images, captions, tmp_path / "out.png", about)
    assert not is_clipped(tmp_path / "out.png")


OWN_IMAGES = {
    "zero_shot": ("photo.jpg", "--labels", "a cat"),
    "similarity": ("my_images",),
    "retrieval": ("my_images",),
    "linear_probe": ("my_images",),
    "evaluate": ("cifar10",),
    "attention": ("photo.jpg", "a cat"),
}


@pytest.mark.parametrize("name", OWN_IMAGES)
def test_your_own_images_need_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence names two models, before an image is read or anything is downloaded."""
    module = pytest.importorskip(name)
    monkeypatch.setattr("miniclip.load", None)
    said = refusal(monkeypatch, module, *OWN_IMAGES[name])
    assert "--model demo" in said
    assert "--model ViT-B/32" in said


def test_the_sample_images_need_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.model_name(None, own_images=False) == "demo"
    assert "the demo model on examples/images" in capsys.readouterr().err
    assert common.model_name("ViT-B/16", own_images=True) == "ViT-B/16"
    assert capsys.readouterr().err == ""
