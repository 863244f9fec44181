"""The programs in fuzz/ run, in their smallest form. Their real runs take minutes to hours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import attacks
import pytest
import torch
from helpers import run_script

import fuzz
import miniclip
from miniclip import CLIP

CASES = {"checkpoints": 100, "configurations": 100, "texts": 200, "images": 150, "tars": 8, "folders": 15, "models": 8}


@pytest.mark.parametrize("name", attacks.ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_breaks(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz.attack(name, 600, CASES[name], 1, tmp_path, tmp_path / "crashes") == 0, capfd.readouterr().out
    assert f"{name}: {CASES[name]} cases" in capfd.readouterr().out
    assert not (tmp_path / "crashes").exists()


@pytest.mark.parametrize("case", sorted(fuzz.CRASHES.glob("*")), ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_what_once_broke_something_does_so_no_more(case: Path, tmp_path: Path) -> None:
    attacks.judge(case.name.partition("-")[0], case.read_bytes(), tmp_path / "work")


def wrong_weights(patch: pytest.MonkeyPatch) -> None:
    plain = CLIP.load_state_dict

    def load(model: CLIP, state: dict[str, torch.Tensor], **settings: bool) -> object:
        return plain(
            model, {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in state.items()}, **settings
        )

    patch.setattr(CLIP, "load_state_dict", load)


def untyped_errors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(miniclip, "load", lambda *_: {}["model_type"])


def other_ids(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(miniclip.Tokenizer, "encode", lambda self, text: [1])


def images_in_their_own_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(miniclip, "open_image", lambda path, **_: miniclip.images.Image.new("L", (3, 3)))


def a_row_less(patch: pytest.MonkeyPatch) -> None:
    nearest = miniclip.Index.nearest
    patch.setattr(miniclip.Index, "nearest", lambda self, query, k: nearest(self, query, k)[1:])


def stale_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("miniclip.packed._Known.holds_for", lambda self, weight: True)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("checkpoints", wrong_weights),
        ("configurations", untyped_errors),
        ("texts", other_ids),
        ("images", images_in_their_own_mode),
        ("tars", a_row_less),
        ("folders", a_row_less),
        ("models", stale_copies),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_planted_mistake_is_found_and_its_case_kept(
    name: str, mistake: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks.good_model(), attacks.good_folder()
    with monkeypatch.context() as patch:
        mistake(patch)
        assert fuzz.attack(name, 600, 30, 1, tmp_path, tmp_path / "crashes") > 0
        case, *_ = (tmp_path / "crashes").iterdir()
        with pytest.raises(attacks.Broken):
            attacks.judge(name, case.read_bytes(), tmp_path / "work")
    attacks.judge(name, case.read_bytes(), tmp_path / "work")


def test_cases_depend_on_the_seed_alone() -> None:
    for name, each in attacks.ATTACKS.items():
        first, again, other = (each.make(random.Random(seed)) for seed in ("7", "7", "8"))
        assert first == again, name
        assert first != other, name


def test_a_case_that_takes_too_long_ends_and_is_told(tmp_path: Path) -> None:
    done = run_script("fuzz/fuzz.py", "texts", "--patience", 0, "--minutes", 5, "--crashes", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "texts: a case ended the process with signal 9" in done.stdout
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_attacks_are_refused() -> None:
    done = run_script("fuzz/fuzz.py", "image")
    assert done.returncode == 2
    assert "there is no attack 'image': use checkpoints, configurations" in done.stderr


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes() -> None:
    done = run_script("fuzz/kills.py", "--files", 30, "--kills", 2)
    assert done.returncode == 0, done.stderr
    assert "30 files" in done.stdout
    assert done.stdout.endswith("the same bytes each time\n")


@pytest.mark.slow
def test_searches_at_once_end_well() -> None:
    done = run_script("fuzz/exits.py", "--runs", 6, "--at-once", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6 searches, 3 at once: the same answer and status 0 each time\n"
