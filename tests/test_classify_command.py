"""``miniclip classify`` for people: labels from files, folders and patterns, tables, and what is told."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
from helpers import make_image, run_python
from wcwidth import wcswidth  # which ftfy needs

import miniclip
from miniclip import classify_command
from miniclip.cli import main

THREE = ["--labels", "cat", "dog", "pizza"]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three images in two folders, and what classify leaves out."""
    for n, name in enumerate(("a.png", "sub/b.png", "sub/c.jpg")):
        make_image(tmp_path / "photos" / name, n)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden").mkdir()
    make_image(tmp_path / "photos" / ".hidden" / "d.png", 9)
    return tmp_path / "photos"


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    """The lines of a run with the demo model, split at tabs."""
    assert main(["classify", *map(str, arguments), "--model", "demo"]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def sentence(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence of a run that fails."""
    assert main(["classify", *map(str, arguments), "--model", "demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_labels_come_from_a_file_and_from_standard_input(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(capsys, library / "a.png", *THREE)
    text = "cat\r\ndog\r\n\r\n  pizza  \r\n"
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes it
    assert answers(capsys, library / "a.png", "--labels-file", tmp_path / "labels.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert answers(capsys, library / "a.png", "--labels-file", "-") == expected
    (tmp_path / "labels.txt").write_text("pizza\n")
    assert answers(capsys, library / "a.png", "--labels", "cat", "dog", "--labels-file", tmp_path / "labels.txt") == (
        expected
    )


def test_a_labels_file_that_cannot_be_read_is_named(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, binary = tmp_path / "none.txt", tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"{binary} is not UTF-8 text" in sentence(capsys, library / "a.png", "--labels-file", binary)
    for path in (missing, tmp_path):
        assert f"{path} cannot be read" in sentence(capsys, library / "a.png", "--labels-file", path)
    monkeypatch.setattr(sys, "stdin", None)  # as after "<&-" in a shell
    assert "standard input is closed" in sentence(capsys, library / "a.png", "--labels-file", "-")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat"], "two labels or more, got ['cat']"),
        (["cat,dog,pizza"], "'cat,dog,pizza' is one label: separate labels by spaces, as in --labels cat dog pizza"),
        (["a cat, a dog"], '--labels "a cat" "a dog"'),
        (["cat", ""], "label 2 is empty"),
        (["  ", "dog"], "label 1 is empty"),
    ],
)
def test_labels_that_make_no_choice_are_told(
    labels: list[str], said: str, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in sentence(capsys, library / "a.png", "--labels", *labels)


def test_a_label_with_a_comma_beside_others_is_answered_with_a_note(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(library / "a.png"), "--labels", "cat,dog", "pizza", "--model", "demo"]) == 0
    captured = capsys.readouterr()
    assert "'cat,dog' is one label, with its comma" in captured.err
    assert len(captured.out.splitlines()) == 2


def test_top_k_and_csv(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = answers(capsys, library / "a.png", *THREE)
    assert answers(capsys, library / "a.png", *THREE, "--top-k", 2) == everything[:2]
    assert "--top-k must be at least 1, got 0" in sentence(capsys, library / "a.png", *THREE, "--top-k", 0)
    commas = library / 'so, "quoted".png'
    make_image(commas, 5)
    labels = ["a cat, asleep", "dog"]
    expected = answers(capsys, commas, "--labels", *labels)
    assert main(["classify", str(commas), "--labels", *labels, "--csv", "--model", "demo"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [["image", "label", "probability"], *expected]


def test_folders_and_patterns_stand_for_their_images(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def images(*arguments: object) -> list[str]:
        lines = answers(capsys, *arguments, *THREE, "--top-k", 1)
        return [str(Path(line[0]).relative_to(library)) for line in lines]

    assert images(library) == ["a.png", "sub/b.png", "sub/c.jpg"]
    assert images(library / "sub" / "*.png", library / "a.png") == ["sub/b.png", "a.png"]
    assert images(library / "**" / "*.png") == ["a.png", "sub/b.png"]
    bracketed = library / "c[1].png"  # a file of this name is no pattern
    make_image(bracketed, 4)
    assert images(bracketed) == ["c[1].png"]
    (library / "empty").mkdir()
    assert f"the folder {library / 'empty'} contains no images" in sentence(capsys, library / "empty", *THREE)
    assert "no file fits the pattern" in sentence(capsys, library / "*.gif", *THREE)


@pytest.mark.parametrize("address", ["https://example.org/cat.jpg", "s3://bucket/cat.png", "data:image/png;base64,AA"])
def test_a_url_gets_its_own_sentence(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a URL: download the image" in sentence(capsys, address, *THREE)


def test_json_holds_what_top_k_leaves(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(library), *THREE, "--top-k", "1", "--json", "--model", "demo"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [len(record["labels"]) for record in records] == [1, 1, 1]


def test_bars_stay_aligned_under_wide_letters() -> None:
    labels = ["cat", "猫", "ねこ犬", "naïve", "e\u0301te\u0301", "🐱 cat"]
    answer = [(label, 1 / len(labels)) for label in labels]
    _, *lines = classify_command.answer_lines("x.png", answer, bars=True)
    ends = {wcswidth(line[: line.index("%")]) for line in lines}
    assert len(ends) == 1
    assert len({len(line[: line.index("%")]) for line in lines}) > 1  # so counting letters would not do


@pytest.mark.parametrize(
    ("name", "meant"),
    [("vit-b/32", "ViT-B/32"), ("ViT-B-32", "ViT-B/32"), ("vitb16", "ViT-B/16"), ("ViT-L/14-336", "ViT-L/14@336px")],
)
def test_a_mistyped_model_is_guessed(name: str, meant: str, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(library / "a.png"), *THREE, "--model", name]) == 1
    assert f"did you mean {meant}?" in capsys.readouterr().err
    with pytest.raises(miniclip.UnknownModelError, match=meant):
        miniclip.load(name)


@pytest.mark.slow
def test_many_images_get_a_progress_bar_beside_a_file(library: Path, tmp_path: Path) -> None:
    """The answers go to a file, and standard error is a terminal."""
    for n in range(25):
        make_image(library / "many" / f"{n}.png", n)
    program = (
        "import sys, os, pty\n"
        "from miniclip.cli import main\n"
        "class Terminal:\n"
        "    encoding = 'utf-8'\n"
        "    def isatty(self): return True\n"
        "    def write(self, text): sys.__stderr__.write(text)\n"
        "    def flush(self): sys.__stderr__.flush()\n"
        "sys.stderr = Terminal()\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = run_python("-c", program, "classify", library / "many", *THREE, "--model", "demo")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 75
    assert "25/25" in done.stderr


def test_a_pipe_in_a_folder_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Opening a pipe waits for a writer."""
    os.mkfifo(tmp_path / "pipe.jpg")
    make_image(tmp_path / "image.png")
    assert main(["classify", str(tmp_path), "--labels", "cat", "dog", "--model", "demo"]) == 0
    assert "pipe.jpg" not in capsys.readouterr().out


def test_a_labels_file_in_another_encoding_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_bytes("Bär\nHund\n".encode("latin-1"))
    command = ["classify", "image.png", "--labels-file", str(tmp_path / "labels.txt"), "--model", "demo"]
    assert main(command) == 1
    assert "is not UTF-8 text (byte 1): save the file as UTF-8" in capsys.readouterr().err


def test_long_labels_are_cut_only_if_asked(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--labels", "cat", "dog " * 90]
    assert "holds 77; add --truncate" in sentence(capsys, library / "a.png", *labels)
    assert len(answers(capsys, library / "a.png", *labels, "--truncate")) == 2
