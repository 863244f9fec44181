"""Running a script in the test's own process, which saves the seconds that a new process takes to import torch.

Also the figures that a script saves, and whether one is clipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import pytest
from matplotlib.figure import Figure
from PIL import Image


def run_here(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> None:
    """Run the script's main as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    common.main(script.main)


def refusal(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> str:
    """The one sentence with which the script stops."""
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, script, *arguments)
    sentence = str(stopped.value.code)
    assert sentence.startswith(f"{script.__name__}.py: ")
    assert "\n" not in sentence
    return sentence


def watch_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """A list that receives every figure that matplotlib saves from now on."""
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def is_clipped(path: Path, margin: int = 4) -> bool:
    """Whether something is drawn within ``margin`` pixels of the edge of a figure on white."""
    with Image.open(path) as opened:
        figure = opened.convert("L")
    width, height = figure.size
    top, bottom = (0, 0, width, margin), (0, height - margin, width, height)
    left, right = (0, 0, margin, height), (width - margin, 0, width, height)
    return any(figure.crop(edge).getextrema() != (255, 255) for edge in (top, bottom, left, right))
