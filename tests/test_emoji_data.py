"""examples/emoji_data.py on small npm packages, and the arithmetic of examples/demo_quality.py."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import demo_quality
import emoji_data
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from PIL import Image

import miniclip

EXAMPLES = ROOT / "examples"
ENTRIES = [
    {"hexcode": "1F355", "label": "pizza", "tags": ["cheese", "slice"], "group": 4},
    {"hexcode": "1F1EB-1F1F7", "label": "flag: France", "tags": ["FR", "flag"], "group": 9},
    {"hexcode": "2602", "label": "umbrella", "tags": ["rain"], "group": 5},
    {"hexcode": "1F468-200D-1F469-200D-1F466", "label": "family: man, woman, boy", "group": 1},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
SVG = '<rect x="8" y="8" width="16" height="16" fill="currentColor"/>'


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 30, 30, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def document(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """What npm would have fetched, in miniature."""
    icons = {"prefix": "x", "width": 32, "height": 32, "icons": {"pizza": {"body": SVG}}}
    icons["aliases"] = {"slice": {"parent": "pizza"}, "umbrella": {"parent": "pizza", "hFlip": True}}
    flags = {**icons, "icons": {"pizza-2": {"body": SVG}, "flag-for-france": {"body": SVG}, "empty": {"body": ""}}}
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{SVG}</svg>'.encode()
    google = [{"unified": "1F355", "name": "SLICE OF PIZZA", "short_names": ["pizza"]}]
    contents: dict[str, dict[str, bytes]] = {name: {} for name in emoji_data.PACKAGES}
    contents["emojibase-data"] = {
        "en/data.json": document(ENTRIES),
        "en/shortcodes/emojibase.json": document({"1F355": "pizza", "2602": ["umbrella", "brolly_up"]}),
    }
    contents["emoji-datasource-google"] = {"emoji.json": document(google), "img/google/64/1f355.png": png()}
    contents["emoji-datasource-google"]["img/google/64/2602-fe0f.png"] = png()
    contents["emoji-datasource-twitter"] = {"img/twitter/64/1f1eb-1f1f7.png": png(), "img/twitter/64/1f355.png": png()}
    contents["openmoji"] = {f"{style}/svg/1F355.svg": svg for style in ("black", "color")}
    for name in emoji_data.ICONIFY:
        drawn = flags if name == "emojione" else icons
        contents[f"@iconify-json/{name}"] = {"icons.json": document(drawn), "chars.json": document({})}
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, files in contents.items():
        with tarfile.open(emoji_data.tarball(folder, name), "w:gz") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def make(out: Path, packages: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "emoji_data.py"), str(out), "--packages", str(packages)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(folder: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return captions


def test_the_folders(packages: Path, tmp_path: Path) -> None:
    done = make(tmp_path / "emoji", packages)
    assert done.returncode == 0, done.stderr
    train = rows(tmp_path / "emoji" / "train")
    assert {name for name in train if name.startswith("google/")} == {"google/1f355.png", "google/2602.png"}
    # By the name of the icon, its number dropped; a flag by its country; no mirrored alias and no empty drawing.
    assert {name for name in train if name.startswith("emojione/")} == {
        "emojione/1f355.png",
        "emojione/1f1eb-1f1f7.png",
    }
    assert {name for name in train if name.startswith("noto-v1/")} == {"noto-v1/1f355.png"}
    assert not any("twitter" in name or "twemoji" in name or "openmoji" in name for name in train)
    assert set(rows(tmp_path / "emoji" / "twemoji")) == {"twemoji/1f355.png", "twemoji/1f1eb-1f1f7.png"}
    names = (tmp_path / "emoji" / "names.txt").read_text().splitlines()
    assert names == ["pizza", "flag of France", "umbrella", "family of a man, a woman and a boy"]
    for name, captions in train.items():
        assert captions[0] in names
        assert len(captions) >= 8
        assert len(set(captions)) == len(captions)
        with Image.open(tmp_path / "emoji" / "train" / name) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGBA")
    every = [caption for captions in train.values() for caption in captions]
    assert any("slice of pizza" in caption for caption in every)  # the Unicode name beside the label
    prompts = {template.replace("{}", "a pizza") for template in demo_quality.TEMPLATES}
    assert not prompts & set(every)
    before = (tmp_path / "emoji" / "train" / "captions.csv").read_bytes()
    assert make(tmp_path / "again", packages).returncode == 0
    assert (tmp_path / "again" / "train" / "captions.csv").read_bytes() == before


def test_no_template_is_both_trained_and_measured_with() -> None:
    def bare(template: str) -> str:
        return template.replace("{a}", "{}").replace("{name}", "{}").rstrip(".")

    assert not {bare(t) for t in emoji_data.TEMPLATES} & {bare(t) for t in demo_quality.TEMPLATES}


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("pizza", "a pizza"),
        ("elephant", "an elephant"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("flag: France", "the flag of France"),
        ("keycap: 5", "keycap 5"),
        ("glasses", "glasses"),
        ("family: man, woman, girl, boy", "a family of a man, a woman, a girl and a boy"),
        ("kiss: woman, man", "a kiss of a woman and a man"),
        ("man: red hair", "a man with red hair"),
        ("woman: beard", "a woman with a beard"),
        ("person: bald", "a person who is bald"),
        ("man running: facing right", "a man running facing right"),
    ],
)
def test_labels_as_a_person_would_say_them(label: str, phrase: str) -> None:
    assert emoji_data.with_article(emoji_data.spoken(label)) == phrase


def test_what_is_wrong_with_a_package_is_a_sentence(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = emoji_data.tarball(packages, "openmoji")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = make(tmp_path / "emoji", packages)
    assert done.returncode == 1
    assert "openmoji-17.0.0.tgz cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "emoji" / "openmoji-black" / "captions.csv").exists()
    path.unlink()
    monkeypatch.setenv("PATH", "")
    done = make(tmp_path / "emoji", packages)
    assert "lacks openmoji-17.0.0.tgz, and there is no npm to fetch it" in done.stderr


def test_ranks_and_recall() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.8, 0.1], [0.3, 0.3, 0.3]])
    right = torch.tensor([0, 1, 2])
    rank = demo_quality.ranks(similarity, right)
    assert rank.tolist() == [1, 2, 3]  # a tie counts against it
    assert demo_quality.recall(rank, 1) == pytest.approx(1 / 3)
    assert demo_quality.recall(rank, 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("labels", [2, 3, 4])
def test_the_chance_among_a_few_labels_is_that_of_trying_all(labels: int) -> None:
    scores = torch.tensor([0.5, 0.2, 0.9, 0.1, 0.4, 0.3])
    for right in range(6):
        others = [i for i in range(6) if i != right]
        draws = list(itertools.combinations(others, labels - 1))
        expected = sum(all(scores[right] > scores[i] for i in draw) for draw in draws) / len(draws)
        rank = demo_quality.ranks(scores[None], torch.tensor([right]))
        assert demo_quality.accuracy(rank, 6, labels) == pytest.approx(expected)


def test_every_column_is_measured() -> None:
    """Ten pictures that all lie nearest to text 0: each finds its own second, and each text finds its own first."""
    texts = torch.eye(10)
    images = F.normalize(torch.eye(10) + 2 * texts[0], dim=1)
    values = demo_quality.measure(images, texts, torch.arange(10))
    assert values == pytest.approx(
        {
            "image→text R@1": 0.1,
            "image→text R@5": 1.0,
            "text→image R@1": 1.0,
            "text→image R@5": 1.0,
            "50-way": 0.1,  # of the ten there are
            "10-way": 0.1,
        }
    )


def test_the_measuring_command(packages: Path, tiny: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "emoji", packages).returncode == 0
    command = [
        sys.executable,
        str(EXAMPLES / "demo_quality.py"),
        "--model",
        str(tiny),
        "--data",
        str(tmp_path / "emoji"),
    ]
    command += ["--json", str(tmp_path / "q.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "q.json").read_text())
    # The same by hand for Twemoji's two pictures, one prompt at a time.
    model, preprocess = miniclip.load(tiny, "cpu")
    names = [emoji_data.with_article(name) for name in (tmp_path / "emoji" / "names.txt").read_text().splitlines()]
    classifier = miniclip.ZeroShotClassifier(model, preprocess, names, demo_quality.TEMPLATES)
    hits = 0
    for name, captions in rows(tmp_path / "emoji" / "twemoji").items():
        answer = classifier(miniclip.open_image(tmp_path / "emoji" / "twemoji" / name))
        hits += answer[0][0] == emoji_data.with_article(captions[0])
    assert list(result["sets"]["Twemoji"]) == ["pictures", *demo_quality.COLUMNS]
    assert result["sets"]["Twemoji"]["pictures"] == 2
    assert result["sets"]["Twemoji"]["image→text R@1"] == hits / 2
