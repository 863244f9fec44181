"""The command line: on a terminal, in a pipe, and with output that cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from embedding import make_photos
from helpers import ROOT, make_image, run_cli
from PIL import Image

import miniclip
from miniclip import cli
from miniclip.cli import main

MINICLIP = [sys.executable, "-m", "miniclip"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
LABELS = ["--labels", "a cat", "a dog", "a cup of coffee"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "grün.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def test_a_pipe_gets_tab_separated_lines(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(photo), str(photo), *LABELS, "--model", str(tiny)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    assert {line[0] for line in lines} == {str(photo)}
    assert sorted(line[1] for line in lines[:3]) == sorted(LABELS[1:])
    assert sum(float(line[2]) for line in lines[:3]) == pytest.approx(1, abs=1e-3)
    assert float(lines[0][2]) >= float(lines[1][2]) >= float(lines[2][2])


def test_classify_prints_the_classifiers_answer(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    templates = ["a photo of {}.", "{}, close up"]
    arguments = ["classify", str(photo), *LABELS, "--model", str(tiny), "--template", *templates, "--json"]
    assert main([*arguments, "--device", "cpu", "--dtype", "float64"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    classifier = miniclip.ZeroShotClassifier(*miniclip.load(tiny, "cpu", dtype=torch.float64), LABELS[1:], templates)
    expected = classifier(miniclip.open_image(photo))
    assert result["image"] == str(photo)
    assert [(item["label"], pytest.approx(item["probability"])) for item in result["labels"]] == expected


def test_json_keeps_the_order_and_reports_bad_files(
    tiny: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    images = [str(photo), str(broken), "nowhere.png", str(photo)]
    assert main(["classify", *images, *LABELS, "--model", str(tiny), "--json"]) == 1
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [result["image"] for result in results] == images
    assert [sorted(result) for result in results] == [
        ["image", "labels"],
        *[["error", "image"]] * 2,
        ["image", "labels"],
    ]
    assert "broken.jpg: is not an image" in captured.err
    assert "nowhere.png: no such file" in captured.err


def test_a_bad_file_does_not_end_the_run(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "nowhere.png", str(photo), *LABELS, "--model", str(tiny)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 3
    assert "nowhere.png: no such file" in captured.err


def run_in_terminal(*arguments: object, columns: int = 80) -> str:
    """The output of a command on a pseudo-terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    env = {**ENVIRONMENT, "PYTHONIOENCODING": "utf-8"}
    env.pop("COLUMNS", None)
    process = subprocess.Popen([*MINICLIP, *map(str, arguments)], stdout=follower, stderr=follower, env=env)
    os.close(follower)
    parts = []
    with contextlib.suppress(OSError):  # Linux reports a closed terminal as an error
        while part := os.read(leader, 65536):
            parts.append(part)
    os.close(leader)
    assert process.wait() == 0
    return b"".join(parts).decode()


@pytest.mark.slow
def test_a_terminal_shows_bars(tiny: Path, photo: Path) -> None:
    out = run_in_terminal("classify", photo, *LABELS, "--model", tiny)
    heading, *rows = out.splitlines()
    assert heading == str(photo)
    assert len(rows) == 3
    assert all("%" in row and len(row) <= 80 for row in rows)
    assert "█" in rows[0]
    shares = [float(row.split("%")[0].split()[-1]) for row in rows]
    bars = [row.count("█") for row in rows]
    for share, bar in zip(shares, bars):
        assert bar == pytest.approx(share / 100 * 40, abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["classify", "x.jpg", "--labels", "a", "b", "--model", "ViT-Q/7"],
            "'ViT-Q/7' is neither an existing path",
        ),
        (["classify", "x.jpg", "--labels", "cat", "dog", "--model", "RN50"], "RN50 is a ResNet"),
        (["classify", "x.jpg", "--labels", "cat", "dog", "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("miniclip: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_template_without_braces_is_refused(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(photo), *LABELS, "--model", str(tiny), "--template", "a photo"]) == 1
    assert "'a photo' has no {}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["classify"], ["classify", "x.jpg"], ["sing"]])
def test_a_wrong_command_line_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_models_lists_the_known_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == miniclip.available_models()
    assert "605 MB" in lines[0]


def test_models_loads_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cli, "load", refuse)
    assert main(["models"]) == 0
    config = miniclip.load("demo", "cpu")[0].config
    demo = capsys.readouterr().out.splitlines()[-1]
    assert f"{config.vision.image_size} px  {config.embed_dim}-d" in demo


def test_a_reader_that_stops_early_causes_no_error(tiny: Path, photo: Path) -> None:
    command = f"{sys.executable} -m miniclip classify {photo} {photo} {photo} --labels a b --model {tiny} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_outside_the_encoding_are_escaped(tiny: Path, photo: Path, encoding: str) -> None:
    command = [*MINICLIP, "classify", str(photo), "--labels", "кошка", "🐱", "--model", str(tiny)]
    done = subprocess.run(command, capture_output=True, check=False, env={**ENVIRONMENT, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert b"\\u043a\\u043e" in done.stdout


@pytest.mark.slow
def test_unwritable_output_is_one_sentence() -> None:
    for redirection, status in ((">/dev/full", 1), (">&-", 0)):
        command = f"{sys.executable} -m miniclip models {redirection}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert ("could not be written" in done.stderr) == bool(status)


def test_output_is_complete_when_stderr_is_closed(tiny: Path, photo: Path) -> None:
    command = f"{sys.executable} -m miniclip classify nowhere.png {photo} --labels a b --model {tiny} --json 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(json.loads(done.stdout)) == 2


@pytest.mark.slow
def test_file_names_that_are_not_text_can_be_printed(tiny: Path, photo: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/odd\xff.png"
    Path(os.fsdecode(odd)).write_bytes(photo.read_bytes())
    for extra in ([], [b"--json"]):
        command = [*MINICLIP, "classify", odd, "--labels", "a", "b", "--model", str(tiny), *extra]
        env = {**ENVIRONMENT, "PYTHONIOENCODING": "utf-8:strict"}
        done = subprocess.run(command, capture_output=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        if extra:
            assert os.fsencode(json.loads(done.stdout)[0]["image"]) == odd


# -- embed and search -------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.mark.slow
def test_embed_then_search(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_cli("embed", photos, "--out", out, "--model", "demo", "--fast-decode")
    assert done.returncode == 0, done.stderr
    assert "23 images embedded" in done.stdout
    assert "6 files could not be embedded" in done.stderr
    assert "29 of 29 images, 6 failed" in done.stderr
    done = run_cli("search", out, "a red square", "-k", "3", "--json")
    assert done.returncode == 0, done.stderr
    matches = json.loads(done.stdout)
    assert [list(match) for match in matches] == [["path", "score", "missing"]] * 3
    assert matches == sorted(matches, key=lambda match: -match["score"])
    done = run_cli("search", out, "--image", photos / "b" / "01.png", "-k", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[0] == str(photos / "b" / "01.png")


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar_and_ranks(photos: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bar = run_in_terminal("embed", photos, "--out", out, "--model", tiny, "--device", "cpu", columns=200)
    assert "100%" in bar
    assert "29/29" in bar
    assert " images/s" in bar
    assert "6 failed" in bar
    assert bar.replace("\r", "").endswith(f'search {out} "a dog in the snow"\nor in a browser: miniclip serve {out}\n')
    ranks = run_in_terminal("search", out, "a dog", "-k", "3", columns=200).splitlines()
    assert [line.split()[0] for line in ranks] == ["1", "2", "3"]
    assert all(line.split()[2].startswith(str(photos)) for line in ranks)


@pytest.mark.slow
def test_a_closed_pipe_does_not_change_the_exit_status_of_embed(photos: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"broken")
    for source, status in ((photos, 0), (tmp_path / "broken", 1)):
        out = tmp_path / f"{source.name}_out"
        command = [*MINICLIP, "embed", str(source), "--out", str(out), "--model", str(tiny), "--device", "cpu"]
        reading, writing = os.pipe()
        os.close(reading)  # as head does once it has read enough
        done = subprocess.run(command, stdout=writing, stderr=writing, check=False, env=ENVIRONMENT)
        os.close(writing)
        assert done.returncode == status
        assert (out / "failures.jsonl").exists()


def test_embed_fails_if_no_image_was_ever_embedded(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "no.jpg").write_text("no")
    arguments = ["embed", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--model", str(tiny), "--quiet"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert main(arguments) == 1  # nothing is left to do, but the folder has no vectors
    make_image(tmp_path / "photos" / "yes.jpg", 1)
    assert main(arguments) == 0
    assert captured.out == ""
    assert "1 file could not be embedded" in captured.err


NOTE = "miniclip: drawings of emoji are all that the demo model knows; for photos, embed them with --model ViT-B/32\n"


def test_embed_and_search_say_once_what_the_demo_knows(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["embed", str(photos), "--out", out, "--model", "demo", "--batch-size", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(NOTE)
    assert captured.err.count("ViT-B/32") == 1
    assert "ViT-B/32" not in captured.out
    assert main(["search", out, "a red square"]) == 0  # the manifest names the model
    captured = capsys.readouterr()
    assert captured.err == NOTE
    assert len(captured.out.splitlines()) == 10
    assert main(["search", out, "a red square", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(json.loads(captured.out)) == 10


def test_embed_says_it_neither_quietly_nor_beside_an_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--model", "demo"]
    assert main(["embed", str(tmp_path / "nowhere"), *out]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["embed", str(photos), *out, "--quiet"]) == 0
    assert "ViT-B/32" not in capsys.readouterr().err


def test_other_models_get_no_such_note(
    photos: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["embed", str(photos), "--out", out, "--model", str(tiny), "--device", "cpu"]) == 0
    assert main(["search", out, "a red square"]) == 0
    assert "emoji" not in capsys.readouterr().err
