"""The command line, as a person and as a pipe would use it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import miniclip
from miniclip.cli import main

LABELS = ["--labels", "a cat", "a dog", "a cup of coffee"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "grün.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def test_a_pipe_gets_plain_lines(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(photo), str(photo), *LABELS, "--model", str(tiny)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    assert {line[0] for line in lines} == {str(photo)}
    assert sorted(line[1] for line in lines[:3]) == sorted(LABELS[1:])
    assert sum(float(line[2]) for line in lines[:3]) == pytest.approx(1, abs=1e-3)
    assert float(lines[0][2]) >= float(lines[1][2]) >= float(lines[2][2])


def test_the_answer_is_the_classifiers(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    templates = ["a photo of {}.", "{}, close up"]
    arguments = ["classify", str(photo), *LABELS, "--model", str(tiny), "--template", *templates, "--json"]
    assert main([*arguments, "--device", "cpu", "--dtype", "float64"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    import torch

    classifier = miniclip.ZeroShotClassifier(*miniclip.load(tiny, "cpu", dtype=torch.float64), LABELS[1:], templates)
    expected = classifier(miniclip.open_image(photo))
    assert result["image"] == str(photo)
    assert [(item["label"], pytest.approx(item["probability"])) for item in result["labels"]] == expected


def test_json_keeps_the_order_and_reports_a_bad_file(
    tiny: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    arguments = [
        "classify",
        str(photo),
        str(broken),
        "nowhere.png",
        str(photo),
        *LABELS,
        "--model",
        str(tiny),
        "--json",
    ]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [result["image"] for result in results] == [str(photo), str(broken), "nowhere.png", str(photo)]
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


def run_in_terminal(arguments: list[str]) -> str:
    """What a person sees: the command's output on a pseudo-terminal."""
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen([sys.executable, "-m", "miniclip", *arguments], stdout=follower, stderr=follower, env=env):
        os.close(follower)
        output = b""
        try:
            while chunk := os.read(leader, 4096):
                output += chunk
        except OSError:  # Linux reports the closed terminal as an error
            pass
    os.close(leader)
    return output.decode()


def test_a_terminal_gets_bars(tiny: Path, photo: Path) -> None:
    out = run_in_terminal(["classify", str(photo), *LABELS, "--model", str(tiny)])
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
        (["classify", "x.jpg", "--labels", "cat", "--model", "ViT-Q/7"], "'ViT-Q/7' is neither an existing path"),
        (["classify", "x.jpg", "--labels", "cat", "--model", "RN50"], "RN50 is a ResNet"),
        (["classify", "x.jpg", "--labels", "cat", "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("miniclip: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_template_without_a_place_is_refused(tiny: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_output_cut_short_by_its_reader_is_no_error(tiny: Path, photo: Path) -> None:
    command = f"{sys.executable} -m miniclip classify {photo} {photo} {photo} --labels a b --model {tiny} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_the_pipe_does_not_have_are_escaped(tiny: Path, photo: Path, encoding: str) -> None:
    command = [
        sys.executable,
        "-m",
        "miniclip",
        "classify",
        str(photo),
        "--labels",
        "кошка",
        "🐱",
        "--model",
        str(tiny),
    ]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert b"\\u043a\\u043e" in done.stdout


def test_output_that_cannot_be_written_is_a_sentence() -> None:
    for redirection, status in ((">/dev/full", 1), (">&-", 0)):
        command = f"{sys.executable} -m miniclip models {redirection}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert ("could not be written" in done.stderr) == bool(status)


def test_with_no_place_for_errors_the_output_stays_whole(tiny: Path, photo: Path) -> None:
    command = f"{sys.executable} -m miniclip classify nowhere.png {photo} --labels a b --model {tiny} --json 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(json.loads(done.stdout)) == 2


def test_any_file_name_can_be_printed(tiny: Path, photo: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/odd\xff.png"
    Path(os.fsdecode(odd)).write_bytes(photo.read_bytes())
    for extra in ([], [b"--json"]):
        command = [
            sys.executable,
            "-m",
            "miniclip",
            "classify",
            odd,
            "--labels",
            "a",
            "b",
            "--model",
            str(tiny),
            *extra,
        ]
        env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        done = subprocess.run(command, capture_output=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        if extra:
            assert os.fsencode(json.loads(done.stdout)[0]["image"]) == odd
