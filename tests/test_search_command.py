"""``miniclip search`` for people: several texts, texts to avoid, prompts, a page to send; and what embed reports."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, make_image
from PIL import Image

import miniclip
from miniclip.cli import main

NASTY = '<img src=x onerror="alert(1)">&.png'


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the twelve samples and a file with a name in HTML, and their vectors in ``vectors``."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copytree(ROOT / "examples" / "images", folder / "photos")
    make_image(folder / "photos" / NASTY, 1)
    miniclip.embed_images(folder / "photos", folder / "vectors", "demo", device="cpu")
    return folder


@pytest.fixture
def vectors(library: Path, tmp_path: Path) -> Path:
    """A copy of the vectors, for tests that change them."""
    return Path(shutil.copytree(library / "vectors", tmp_path / "vectors"))


def search(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> list[tuple[str, float]]:
    """Names and scores, as a pipe gets them."""
    assert main(["search", str(folder), *map(str, arguments)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return [(os.path.basename(line[0]), float(line[1])) for line in lines]


def by_hand(library: Path, wanted: list[str], unwanted: list[str]) -> list[tuple[str, float]]:
    """normalize(sum of unit(text) - sum of unit(not)), in float64 and without miniclip.search."""
    model, _ = miniclip.load("demo", "cpu")

    def unit(text: str) -> torch.Tensor:
        return F.normalize(model.encode_text(miniclip.tokenize(text))[0].double(), dim=0)

    query = sum(map(unit, wanted), torch.zeros(128).double()) - sum(map(unit, unwanted), torch.zeros(128).double())
    index = miniclip.Index.open(library / "vectors")
    scores = torch.cat([torch.from_numpy(part).double() for part in index.vectors()]) @ F.normalize(query, dim=0)
    paths = index.paths(range(len(index)))
    ranked = sorted(zip(paths, scores.tolist()), key=lambda row: -row[1])
    return [(os.path.basename(path), pytest.approx(score, abs=1e-4)) for path, score in ranked]


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [(["cat"], []), (["cat", "pizza"], []), (["animal"], ["elephant"]), (["animal", "sea"], ["octopus", "a boat"])],
)
def test_texts_are_added_and_those_to_avoid_are_subtracted(
    wanted: list[str], unwanted: list[str], library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    avoided = [f"--not={text}" for text in unwanted]
    found = search(capsys, library / "vectors", *wanted, *avoided, "-k", 13)
    assert found == by_hand(library, wanted, unwanted)
    index = miniclip.Index.open(library / "vectors")
    matches = index.search(wanted, without=unwanted, k=13)
    assert [os.path.basename(match.path) for match in matches] == [name for name, _ in found]


def test_a_template_stands_around_every_text(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(capsys, library / "vectors", "cat", "--not", "dog", "--template", "a photo of a {}.", "-k", 13)
    assert found == by_hand(library, ["a photo of a cat."], ["a photo of a dog."])
    assert main(["search", str(library / "vectors"), "cat", "--template", "no braces"]) == 1
    assert "has no {} for the text" in capsys.readouterr().err


def test_long_texts_are_cut_only_if_asked(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "cat " * 100
    assert main(["search", str(library / "vectors"), long]) == 1
    said = capsys.readouterr().err
    assert "the context holds 77; add --truncate" in said
    assert search(capsys, library / "vectors", long, "--truncate", "-k", 1) == search(
        capsys, library / "vectors", "cat " * 75, "-k", 1
    )


def test_a_lowest_score(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = search(capsys, library / "vectors", "cat", "-k", 13)
    limit = everything[3][1] - 0.001
    assert search(capsys, library / "vectors", "cat", "-k", 13, "--min-score", limit) == [
        row for row in everything if row[1] >= limit
    ]
    assert main(["search", str(library / "vectors"), "cat", "--min-score", "2"]) == 0
    answer = capsys.readouterr()
    assert answer.out == ""
    assert "no image reaches --min-score 2" in answer.err


def test_empty_texts_and_names_are_told(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable that is not set. An empty name would be the current folder."""
    monkeypatch.chdir(tmp_path)
    for arguments in ([""], ["cat", " "], ["cat", "--not", ""]):
        assert main(["search", str(library / "vectors"), *arguments]) == 1
        assert "a text to search for is empty" in capsys.readouterr().err
    for command in (
        ["search", "", "cat"],
        ["search", str(library / "vectors"), "cat", "--html", ""],
        ["embed", str(library / "photos"), "--out", ""],
        ["embed", str(library / "photos"), "", "--out", "out"],
        ["prune", ""],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        assert "is an empty text: is a variable not set?" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_query_that_is_none_is_one_sentence(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([], "the query is empty"),
        (["--not", "cat"], "the query is empty"),
        (["cat", "--not", "cat"], "the query cancels itself out"),
    ):
        assert main(["search", str(library / "vectors"), *arguments]) == 1
        assert said in capsys.readouterr().err


def test_a_text_that_begins_with_a_dash_gets_a_hint(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-snow"], ["cat", "--not", "-snow"], ["--snow"]):
        with pytest.raises(SystemExit) as stopped:
            main(["search", str(library / "vectors"), *arguments])
        assert stopped.value.code == 2
        assert 'put "--" before texts that begin with "-"' in capsys.readouterr().err
    expected = by_hand(library, ["-snow"], ["-ice"])
    assert search(capsys, library / "vectors", "--not=-ice", "-k", 13, "--", "-snow") == expected
    assert search(capsys, library / "vectors", "-20 degrees", "-k", 13) == by_hand(library, ["-20 degrees"], [])


def test_options_may_stand_anywhere(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, expected = str(library / "vectors"), by_hand(library, ["cat", "dog"], ["pizza"])[:2]
    for arguments in (
        ["search", folder, "cat", "dog", "-k", "2", "--not", "pizza"],
        ["search", folder, "-k", "2", "cat", "--not", "pizza", "dog"],
        ["search", "-k", "2", "--not", "pizza", folder, "cat", "dog"],
    ):
        assert main(arguments) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [(os.path.basename(line[0]), float(line[1])) for line in lines] == expected


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its texts, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_the_images_themselves(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = search(capsys, library / "vectors", "cat & dog", "-k", 13, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == len(found) == 13
    assert not {"script", "iframe", "link", "object", "form"}.intersection(page.tags)
    assert page.handlers == []
    assert "url(" not in text
    sizes = []
    for address in page.addresses:
        assert address.startswith("data:image/jpeg;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        sizes.append(max(image.size))
    assert max(sizes) <= 320
    shown = " ".join(page.texts)
    assert NASTY in shown  # as text
    assert "cat & dog" in shown
    places = [shown.index(f"photos/{name}") for name, _ in found]
    assert places == sorted(places)


def test_the_page_says_which_image_is_gone(
    library: Path, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = library / "photos" / "cat.png"
    data = gone.read_bytes()
    gone.unlink()
    try:
        search(capsys, vectors, "cat", "--html", tmp_path / "page.html", "-k", 13)
    finally:
        gone.write_bytes(data)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 12
    assert "No such file or directory" in " ".join(page.texts)


def test_a_page_that_cannot_be_written_is_one_sentence(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "page.html", tmp_path / "nowhere" / "page.html", tmp_path):
        assert main(["search", str(library / "vectors"), "cat", "--html", str(place)]) == 1
        assert f"{place} cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# -- what embed reports -----------------------------------------------------------------------------------------------


def test_missing_images_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "pizza", "guitar"):
        shutil.copy(ROOT / "examples" / "images" / f"{name}.png", tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(photos / path.name)
    embed = ["embed", str(photos), "--out", str(tmp_path / "v"), "--quiet"]
    assert main([*embed, "--model", "demo"]) == 0
    (photos / "guitar.png").unlink()
    assert main(embed) == 0
    assert [name for name, _ in search(capsys, tmp_path / "v", "a guitar")][:1] != ["guitar.png"]
    assert main(["search", str(tmp_path / "v"), "a guitar", "--missing"]) == 0
    first = capsys.readouterr().out.splitlines()[0].split("\t")
    assert (os.path.basename(first[0]), first[2]) == ("guitar.png", "missing")
    assert main(["search", str(tmp_path / "v"), "a guitar", "--missing", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {os.path.basename(record["path"]): record["missing"] for record in records} == {
        "guitar.png": True,
        "cat.png": False,
        "pizza.png": False,
    }
    assert main(["prune", str(tmp_path / "v")]) == 0
    assert "1 missing, 0 changed images removed, 2 left" in capsys.readouterr().out


def test_the_summary_names_what_was_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    for n in range(3):
        make_image(photos / f"{n}.png", n)
    for name in ("a.mov", "b.MOV", "c.txt", "noext", "._0.png"):
        (photos / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    assert main(["embed", str(photos), "--out", str(tmp_path / "v"), "--model", "demo"]) == 0
    out = capsys.readouterr().out
    assert "3 images embedded" in out
    assert "no images by their names: 2 .mov, 1 .txt, 1 without a suffix" in out
    assert "left out: 1 (by the defaults, which --no-default-excludes switches off)" in out
    assert "not followed: 1 (--follow-links follows them)" in out


def test_the_summary_says_what_left_files_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        make_image(tmp_path / "photos" / f"{n}.png", n)
    command = ["embed", str(tmp_path / "photos"), "--out", str(tmp_path / "v"), "--model", "demo", "--exclude", "1.png"]
    for options, said in (
        ([], "left out: 1 (by --exclude and by the defaults, which --no-default-excludes switches off)"),
        (["--no-default-excludes"], "left out: 1 (by --exclude)"),
    ):
        assert main([*command, *options]) == 0
        assert said in capsys.readouterr().out


def test_a_settings_conflict_names_models(
    tiny: Path, library: Path, vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(library / "photos"), "--out", str(vectors), "--model", str(tiny), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert f"created with model 'demo', not '{tiny}'" in said
    assert not re.search("[0-9a-f]{40}", said)


@pytest.mark.slow
def test_ctrl_c_says_what_was_kept(tmp_path: Path) -> None:
    for n in range(400):
        make_image(tmp_path / "photos" / f"{n:03}.png", n)
    command = [sys.executable, "-m", "miniclip", "embed", str(tmp_path / "photos"), "--out", str(tmp_path / "v")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    slowly = ["--model", "demo", "--shard-size", "10", "--batch-size", "1"]
    process = subprocess.Popen([*command, *slowly], env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "v" / "failures" / "failures_2.jsonl").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = re.search(r"interrupted: .* holds (\d+) vectors, and the same command goes on after them\n$", said)
    assert kept is not None
    assert int(kept[1]) >= 30
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert f"{400 - int(kept[1])} images embedded" in done.stdout
