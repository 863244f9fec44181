"""``miniclip demo``: its answers are computed, its commands repeat them, and its sample images are in the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_cli

import miniclip
from miniclip import demo_tour
from miniclip.cli import main
from miniclip.demo_tour import DRAWINGS, IN_PHOTO, PHOTO, QUERY, SAMPLES, WANTED, tour

LABELS = sorted([*DRAWINGS.values(), IN_PHOTO])


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The cells behind the name of each sample. Those of the search stand under "search NAME"."""
    found = {}
    for line in lines:
        name, *cells = re.split(r"\s{2,}", re.sub(r"^(\S+) +", r"\1  ", line))
        if (SAMPLES / name).is_file():
            found[f"search {name}" if cells[0] == "cosine" else name] = cells
    return found


def test_demo_answers_plain_nouns_and_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = rows(captured.out.splitlines())
    for name, noun in DRAWINGS.items():
        assert found[name][0] == noun
        assert found[name][2] == "right"
    assert found[f"search {WANTED}"][2] == "right"
    assert PHOTO in found


@pytest.mark.parametrize("model", ["demo", "tiny"])
def test_every_answer_and_verdict_comes_from_the_model(model: str, tiny: Path) -> None:
    loaded = miniclip.load(tiny if model == "tiny" else "demo", "cpu")
    lines = list(tour(*loaded))
    found = rows(lines)
    classifier = miniclip.ZeroShotClassifier(*loaded, LABELS, ["a photo of a {}."])
    right = 0
    for name, truth in {**DRAWINGS, PHOTO: IN_PHOTO}.items():
        label, probability = classifier(miniclip.open_image(SAMPLES / name))[0]
        verdict = "right" if label == truth else f"wrong ({truth} is right)"
        assert found[name] == [label, f"{probability:.1%}", verdict]
        right += label == truth
    names = [key.removeprefix("search ") for key in found if key.startswith("search ")]
    right += names[0] == WANTED
    assert found[f"search {names[0]}"][2] == ("right" if names[0] == WANTED else f"wrong ({WANTED} is right)")
    assert any(line.startswith(f"{right} of 5 answers are right.") for line in lines)
    parameters = sum(p.numel() for p in loaded[0].parameters()) / 1e6
    assert f"{parameters:.1f} million parameters" in lines[0]
    if model == "tiny":  # random weights: a tour that only praised would not notice
        assert right < 5


def test_the_search_ranks_all_samples_by_cosine(tiny: Path) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    text = model.encode_text(miniclip.tokenize(QUERY, model.context_length))[0].double()
    expected = {}
    for path in sorted({*SAMPLES.iterdir()} - {SAMPLES / "LICENSE"}):
        image = model.encode_image(preprocess([miniclip.open_image(path)]))[0].double()
        expected[path.name] = torch.dot(image, text).item() / (image.norm() * text.norm()).item()
    best = sorted(expected, key=lambda name: -expected[name])[:3]
    found = [(key, cells) for key, cells in rows(list(tour(model, preprocess))).items() if key.startswith("search ")]
    assert [key for key, _ in found] == [f"search {name}" for name in best]
    for name, (_, cells) in zip(best, found):
        assert float(cells[1]) == pytest.approx(expected[name], abs=0.0051)


@pytest.mark.slow
def test_the_commands_repeat_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_tour.tempfile, "tempdir", str(tmp_path / "a place"))
    lines = list(tour(*miniclip.load("demo", "cpu")))
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert [command.split()[1] for command in commands[1:]] == ["classify", "embed", "search", "classify"]
    script = [f'miniclip() {{ PYTHONPATH="{ROOT}" "{sys.executable}" -m miniclip "$@"; }}', *commands]
    done = subprocess.run(["bash", "-euc", "\n".join(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    best: dict[str, list[str]] = {}
    for cells in printed:  # labels come with the best first
        if len(cells) == 3:
            best.setdefault(cells[0], cells[1:])
    found = rows(lines)
    assert best.keys() == {*DRAWINGS, PHOTO}
    for name, (label, probability) in best.items():
        assert found[name][0] == label
        assert float(found[name][1].rstrip("%")) == pytest.approx(100 * float(probability), abs=0.2)
    matches = [cells for cells in printed if len(cells) == 2]
    assert [f"search {Path(path).name}" for path, _ in matches] == [key for key in found if key.startswith("search ")]
    for path, score in matches:
        assert float(found[f"search {Path(path).name}"][1]) == pytest.approx(float(score), abs=0.007)


@pytest.mark.slow
def test_demo_runs_from_a_copy_of_the_package_alone(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for pattern in ["*.py", *project["tool"]["setuptools"]["package-data"]["miniclip"]]:  # what a wheel has
        for path in (ROOT / "miniclip").glob(pattern):
            if path.is_file():
                place = tmp_path / "site" / path.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
    done = run_cli("demo", PYTHONPATH=str(tmp_path / "site"), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site" / "miniclip" / "data" / "samples") in done.stdout
    assert (tmp_path / "site" / "miniclip" / "data" / "samples" / "LICENSE").is_file()


def test_the_samples_are_those_of_the_examples_and_are_credited() -> None:
    licence = (SAMPLES / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY 4.0" in licence
    names = {path.name for path in SAMPLES.iterdir()} - {"LICENSE"}
    assert {*DRAWINGS, PHOTO, WANTED} <= names
    for name in names:
        if name.endswith(".png"):  # copies, because a wheel has no examples: equal files are stored once in git
            assert (SAMPLES / name).read_bytes() == (ROOT / "examples" / "images" / name).read_bytes()
        else:
            assert name in licence


def test_a_missing_sample_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_tour, "SAMPLES", tmp_path)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"miniclip: {tmp_path / 'elephant.png'}: no such file\n"
