"""The benchmark's own arithmetic. What it measures is in benchmarks/results/; no test knows how long anything took."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT
from PIL import Image


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run

    yield run
    for name in ("run", "peers"):
        sys.modules.pop(name)


def test_a_missing_peer_ends_the_run(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("openvino", "onnx"):
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(run.peers, "version", version)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match=r"missing onnx, openvino: pip install"):
        run.main()


@pytest.mark.parametrize(
    ("ratio", "lower", "verdict"),
    [(1.0, False, "below"), (2.2, False, "least"), (2.6, False, "aim"), (1.0, True, "aim"), (2.7, True, "below")],
)
def test_verdicts(run: ModuleType, ratio: float, lower: bool, verdict: str) -> None:
    bounds = (2.6, 2.2) if lower else (2.2, 2.6)
    row = run.Row("work", "peer", ratio, *bounds, lower_is_better=lower)
    assert row.verdict == verdict
    assert f"| work | peer | {ratio:.2f}× |" in run.table([row])


def test_contenders_take_turns(run: ModuleType) -> None:
    calls: list[str] = []
    medians = run.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 6)
    assert medians.keys() == {"a", "b"}
    turns = [calls[i : i + 2] for i in range(4, len(calls), 2)]  # behind two calls each that do not count
    assert len(turns) == 6
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    assert ["a", "b"] in turns
    assert ["b", "a"] in turns


def test_a_wrong_embedding_is_not_timed(run: ModuleType) -> None:
    right = torch.eye(3)
    run.agree(right, 2 * right, "a peer")
    wrong = right.clone()
    wrong[1, 2] = 0.1
    with pytest.raises(SystemExit, match=r"a peer has a cosine of 0\.995037"):
        run.agree(wrong, right, "a peer")


def test_the_rows_for_cuda_run_on_the_cpu(run: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.peers, "compiled", lambda model, kind: getattr(run.peers, f"{kind}_of")(model))
    options = argparse.Namespace(batches=[1, 3], rounds=2)
    rows = list(run.cuda(options, {"ViT-B/32": tiny}, device="cpu"))
    assert len(rows) == 2 * 2 * 2 * 2  # dtypes, towers, batches, peers
    assert all(row.ratio > 0 for row in rows)


def test_a_folder_beside_its_parts(run: ModuleType, tiny: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(photos=40, rounds=1, threads=torch.get_num_threads())
    place = Path(shutil.copytree(tiny, tmp_path / "model"))
    (row,) = run.folder(options, {"ViT-B/32": place})
    assert row.ratio > 0
    assert row.medians["embed, 40 photos"] > 0
    shown = run.table([row]).splitlines()[-1]
    assert "%" in shown
    assert "(each: model " in shown
    assert len(list((place / "photos").iterdir())) == 40


def test_a_search_of_many(run: ModuleType, tiny: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(tiny, tmp_path / "model"))
    options = argparse.Namespace(vectors=25_000, rounds=1, threads=torch.get_num_threads())
    files, seconds, memory = run.search(options, {"ViT-B/32": place})
    assert files.ratio > 0
    assert files.beside == "numpy, the same files"
    assert seconds.ratio == 0.3 / seconds.medians["miniclip"]
    assert 0 < memory.medians["miniclip"] < 300e6


def test_the_chart_and_the_readme_show_the_results_that_are_there(run: ModuleType, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))[-1]
    assert f"benchmarks/results/{results.stem}.png" in readme
    data: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    rows = [run.Row(**row) for row in data["rows"]]
    assert run.table(rows) in readme
    for row in rows:  # the ratios are those of the medians
        if row.beside == "transformers" and not row.lower_is_better:
            assert row.ratio == row.medians["transformers"] / row.medians["miniclip"]
    run.draw(rows, "title", tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart, Image.open(results.with_suffix(".png")) as committed:
        assert chart.size == committed.size
