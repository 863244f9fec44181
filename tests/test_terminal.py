"""Names that hold line ends, control sequences or bytes that are no text, in one line each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, make_image, run_script

import miniclip
from miniclip.cli import main
from miniclip.terminal import columns, escaped, printable

ODD = "two\nlines\x1b[2J\x9b\u202efdp.png"
SHOWN = r"$'two\nlines\e[2J\u009b\u202efdp.png'"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photo.png", "photo.png"),
        ("ein Bild „ö“ 日本 👩‍👩‍👧 it's.png", "ein Bild „ö“ 日本 👩‍👩‍👧 it's.png"),
        ("C:\\photos\\a.png", "C:\\photos\\a.png"),
        (ODD, SHOWN),
        ("tab\there", r"$'tab\there'"),
        ("nul\0", r"$'nul\x00'"),
        (os.fsdecode(b"caf\xe9.png"), r"$'caf\xe9.png'"),
        ("\ud800", r"$'\ud800'"),
        ("it's\n", r"$'it\'s\n'"),
        ("a\\nb", "a\\nb"),
        ("a\\n\nb", r"$'a\\n\nb'"),
        ("$'a\\nb'", r"$'$\'a\\nb\''"),
        ("", ""),
    ],
)
def test_a_name_is_one_line(name: str, expected: str) -> None:
    assert printable(name) == expected
    assert expected.splitlines() == ([expected] if expected else [])


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is the oracle")
def test_bash_reads_the_name_back() -> None:
    """In UTF-8. The zero byte cannot be in a name."""
    names = [bytes([byte, 97]) for byte in range(1, 256)] + [ODD.encode(), b"$'x\\n'", b"it's\\\n"]
    for name in names:
        command = f"printf %s {printable(os.fsdecode(name))}" if printable(os.fsdecode(name)).startswith("$'") else ""
        if command:
            done = subprocess.run(["bash", "-c", command], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
            assert done.stdout == name


def test_different_names_are_printed_differently() -> None:
    letters = ["\n", "\\", "n", "'", "$", "\x1b", "e", "\udcff", "\u00ff", "\x7f"]
    names = [a + b + c for a in letters for b in letters for c in letters]
    assert len({printable(name) for name in names}) == len(names)


def test_a_message_keeps_its_words() -> None:
    assert escaped("a'b\\c \n\x1b[31m \udcff ü") == "a'b\\c \\n\\e[31m \\xff ü"


def test_columns() -> None:
    assert [columns(text) for text in ("abc", "日本", "é", "e\u0301", "👍")] == [3, 4, 1, 1, 2]


def test_search_and_classify_print_one_line_per_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number, name in enumerate((ODD, "$'b.png", "plain.png")):
        make_image(photos / name, number)
    (photos / "broken\x1b[31m\n.png").write_bytes(b"no image")
    (photos / "film.\x1b[5m").write_bytes(b"")
    assert main(["embed", str(photos), "--out", str(out), "--model", str(tiny), "--device", "cpu"]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    assert main(["search", str(out), "a cat", "-k", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {printable(str(photos / name)) for name in (ODD, "$'b.png", "plain.png")}
    assert {line.split("\t")[0] for line in lines} == expected
    assert len(lines) == 3
    assert main(["classify", str(photos), "--labels", "a\x1b[31m", "b", "--model", str(tiny), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert len(printed.out.splitlines()) == 6  # three images, two labels
    assert len(printed.err.splitlines()) == 1  # the broken one
    assert r"broken\e[31m\n.png: " in printed.err
    assert main(["search", str(out), "--json", "a cat"]) == 0
    assert f"{photos / ODD}" in [row["path"] for row in json.loads(capsys.readouterr().out)]


def test_near_duplicates_prints_one_line_per_image(tmp_path: Path, tiny: Path) -> None:
    for name in (ODD, "plain.png"):
        make_image(tmp_path / "photos" / name, 1)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "out", tiny, device="cpu")
    done = run_script(ROOT / "examples" / "near_duplicates.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert SHOWN.removeprefix("$'") in done.stdout
