"""training/emoji_data.py on small npm packages, and the arithmetic of training/demo_quality.py."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import tarfile
from pathlib import Path

import demo_quality
import emoji_data
import emoji_names
import npm_packages
import prompts
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_cli, run_script
from PIL import Image

import miniclip

ENTRIES = [
    {"hexcode": "1F355", "label": "pizza", "tags": ["cheese", "slice"], "group": 4, "subgroup": 44},
    {"hexcode": "1F1EB-1F1F7", "label": "flag: France", "tags": ["FR", "flag"], "group": 9, "subgroup": 98},
    {"hexcode": "2602", "label": "umbrella", "tags": ["rain"], "group": 5, "subgroup": 59},
    {"hexcode": "1F468-200D-1F469-200D-1F466", "label": "family: man, woman, boy", "group": 1, "subgroup": 30},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2, "subgroup": 32},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
for order, item in enumerate(ENTRIES):
    item |= {"version": 0.6, "order": order}
SUBGROUPS = {"30": "family", "44": "food-prepared", "59": "sky-weather", "98": "country-flag"}
SVG = '<rect x="8" y="8" width="16" height="16" fill="currentColor"/>'


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 30, 30, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def document(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Small packages in place of those that npm would download."""
    icons = {"prefix": "x", "width": 32, "height": 32, "icons": {"pizza": {"body": SVG}}}
    icons["aliases"] = {"slice": {"parent": "pizza"}, "umbrella": {"parent": "pizza", "hFlip": True}}
    flags = {**icons, "icons": {"pizza-2": {"body": SVG}, "flag-for-france": {"body": SVG}, "empty": {"body": ""}}}
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{SVG}</svg>'.encode()
    google = [{"unified": "1F355", "name": "SLICE OF PIZZA", "short_names": ["pizza"]}]
    contents: dict[str, dict[str, bytes]] = {name: {} for name in npm_packages.PACKAGES}
    contents["emojibase-data"] = {
        "en/data.json": document(ENTRIES),
        "meta/groups.json": document({"subgroups": SUBGROUPS}),
        "en/shortcodes/emojibase.json": document({"1F355": "pizza", "2602": ["umbrella", "brolly_up"]}),
    }
    contents["emoji-datasource-google"] = {"emoji.json": document(google), "img/google/64/1f355.png": png()}
    contents["emoji-datasource-google"]["img/google/64/2602-fe0f.png"] = png()
    contents["emoji-datasource-twitter"] = {"img/twitter/64/1f1eb-1f1f7.png": png(), "img/twitter/64/1f355.png": png()}
    contents["emoji-datasource-facebook"] = {"img/facebook/64/1f355.png": png()}
    contents["openmoji"] = {f"{style}/svg/1F355.svg": svg for style in ("black", "color")}
    for name in {*emoji_data.ICONIFY, *emoji_data.ICONS, *emoji_data.OUTLINED}:
        drawn = flags if name == "emojione" else icons
        contents[f"@iconify-json/{name}"] = {"icons.json": document(drawn)}
        if name not in emoji_data.ICONS:  # plain icons have no code points
            contents[f"@iconify-json/{name}"]["chars.json"] = document({})
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, files in contents.items():
        with tarfile.open(npm_packages.tarball(folder, name), "w:gz") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def make(out: Path, packages: Path) -> subprocess.CompletedProcess[str]:
    return run_script("training/emoji_data.py", out, "--packages", packages)


def rows(folder: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return captions


@pytest.mark.slow
def test_each_folder_holds_the_images_and_captions_of_its_sets(packages: Path, tmp_path: Path) -> None:
    done = make(tmp_path / "emoji", packages)
    assert done.returncode == 0, done.stderr
    train = rows(tmp_path / "emoji" / "train")
    assert {name for name in train if name.startswith("google/")} == {"google/1f355.png", "google/2602.png"}
    # An icon is found by its name without a number, a flag by its country. Mirrored aliases and empty drawings are not.
    assert {name for name in train if name.startswith("emojione/")} == {
        "emojione/1f355.png",
        "emojione/1f1eb-1f1f7.png",
    }
    assert {name for name in train if name.startswith("noto-v1/")} == {"noto-v1/1f355.png"}
    assert not any("twitter" in name or "twemoji" in name or "openmoji" in name for name in train)
    assert set(rows(tmp_path / "emoji" / "twemoji")) == {"twemoji/1f355.png", "twemoji/1f1eb-1f1f7.png"}
    names = (tmp_path / "emoji" / "names.txt").read_text().splitlines()
    assert names == ["pizza", "flag of France", "umbrella", "family of a man, a woman and a boy"]
    assert (tmp_path / "emoji" / "everyday.txt").read_text().split() == ["pizza", "umbrella"]
    for name, captions in train.items():
        assert captions[0] in names
        assert len(captions) >= 8
        if name.endswith("1f355.png"):
            assert {"pizza", "pizzas", "cheese", "slice"} < set(captions)
            assert {"food", "meal", "something to eat"} & set(captions)
        with Image.open(tmp_path / "emoji" / "train" / name) as image:
            assert (image.size, image.mode) == ((64, 64), "RGBA")
    every = [caption for captions in train.values() for caption in captions]
    assert any("slice of pizza" in caption for caption in every)  # the Unicode name beside the label
    before = (tmp_path / "emoji" / "train" / "captions.csv").read_bytes()
    assert make(tmp_path / "again", packages).returncode == 0
    assert (tmp_path / "again" / "train" / "captions.csv").read_bytes() == before


def test_an_outline_is_black_on_white_and_thin(packages: Path) -> None:
    """The square of the icon set, from 8 to 24 of 32 units: a frame of two pixels around white."""
    svg = emoji_data.svg_document({"width": 32, "height": 32, "icons": {"x": {"body": SVG}}}, "x")
    filled, drawn = emoji_data.draw(svg), emoji_data.draw(emoji_data.outlined(svg, 2))
    assert filled.getpixel((32, 32)) == (0, 0, 0, 255)
    assert drawn.getpixel((32, 32)) == (255, 255, 255, 255)
    assert [drawn.getpixel((x, 32)) for x in (13, 15, 16, 18)] == [
        (0, 0, 0, 0),
        (0, 0, 0, 255),
        (0, 0, 0, 255),
        (255, 255, 255, 255),
    ]


@pytest.mark.parametrize(
    ("name", "tags", "plain"),
    [
        ("cat", ["animal"], ["cat"]),
        ("red apple", ["apple", "red"], ["apple", "red apple"]),
        ("dog face", ["dog", "face"], ["dog"]),
        ("smiling cat with heart-eyes", ["cat", "heart"], ["cat"]),
        ("hot dog", ["sausage"], ["hot dog"]),
        ("bald person", [], ["bald person"]),
    ],
)
def test_a_plain_name_drops_what_only_describes(name: str, tags: list[str], plain: list[str]) -> None:
    assert emoji_names.plain_names(name, tags) == plain


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("cat", "cats"), ("box", "boxes"), ("cherry", "cherries"), ("monkey", "monkeys"), ("glasses", "glasses")],
)
def test_plurals_follow_simple_rules(noun: str, expected: str) -> None:
    assert emoji_names.plural(noun) == expected


def test_a_keyword_that_names_something_else_is_no_caption(packages: Path, tmp_path: Path) -> None:
    """A hot dog is no dog, though Unicode's keywords say so. A cat's face is a cat."""
    labels = [
        ("1F408", "cat", [], 3, 34),
        ("1F415", "dog", ["pet"], 3, 34),
        ("1F32D", "hot dog", ["dog", "hot"], 4, 44),
    ]
    labels += [("1F63A", "grinning cat", ["cat", "dog"], 0, 12)]
    keys = ("hexcode", "label", "tags", "group", "subgroup", "version", "order")
    listed = [dict(zip(keys, (*label, 1, order))) for order, label in enumerate(labels)]
    files = {"en/data.json": document(listed), "en/shortcodes/emojibase.json": document({})}
    files["meta/groups.json"] = document({"subgroups": {**SUBGROUPS, "12": "cat-face", "34": "animal-mammal"}})
    with tarfile.open(npm_packages.tarball(packages, "emojibase-data"), "w:gz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    entries = {entry.name: entry for entry in emoji_names.read_entries(packages)}
    assert entries["hot dog"].tags == ["hot"]
    assert entries["grinning cat"].tags == ["cat"]
    assert entries["dog"].tags == ["pet"]
    assert [name for name, entry in entries.items() if entry.everyday] == ["cat", "dog"]


def test_the_committed_nouns_are_two_hundred_different_words() -> None:
    nouns = demo_quality.EVERYDAY.read_text(encoding="utf-8").split()
    assert len(set(nouns)) == len(nouns) == emoji_names.EVERYDAY
    assert all(noun.isalpha() and noun.islower() for noun in nouns)


def test_training_and_measuring_share_no_template() -> None:
    def bare(template: str) -> str:
        return template.replace("{a}", "{}").replace("{name}", "{}").rstrip(".")

    assert not {bare(t) for t in prompts.TEMPLATES} & {bare(t) for t in demo_quality.TEMPLATES}


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
def test_labels_become_spoken_english(label: str, phrase: str) -> None:
    assert prompts.with_article(emoji_names.spoken(label)) == phrase


@pytest.mark.slow
def test_a_damaged_or_missing_package_is_reported_in_one_sentence(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = npm_packages.tarball(packages, "openmoji")
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
    assert "lacks openmoji-17.0.0.tgz, and npm is not installed" in done.stderr


def test_a_rank_counts_the_better_columns_and_the_ties() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.8, 0.1], [0.3, 0.3, 0.3]])
    right = torch.tensor([0, 1, 2])
    rank = demo_quality.ranks(similarity, right)
    assert rank.tolist() == [1, 2, 3]  # a tie counts against the model
    assert demo_quality.recall(rank, 1) == pytest.approx(1 / 3)
    assert demo_quality.recall(rank, 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("labels", [2, 3, 4])
def test_the_accuracy_among_a_few_labels_is_the_mean_over_all_draws(labels: int) -> None:
    scores = torch.tensor([0.5, 0.2, 0.9, 0.1, 0.4, 0.3])
    for right in range(6):
        others = [i for i in range(6) if i != right]
        draws = list(itertools.combinations(others, labels - 1))
        expected = sum(all(scores[right] > scores[i] for i in draw) for draw in draws) / len(draws)
        rank = demo_quality.ranks(scores[None], torch.tensor([right]))
        assert demo_quality.accuracy(rank, 6, labels) == pytest.approx(expected)


def test_measure_fills_every_column() -> None:
    """All ten images lie nearest to text 0: each finds its own text second, and each text finds its own image first."""
    texts = torch.eye(10)
    images = F.normalize(torch.eye(10) + 2 * texts[0], dim=1)
    values = demo_quality.measure(images, texts, torch.arange(10))
    assert values == pytest.approx(
        {
            "image→text R@1": 0.1,
            "image→text R@5": 1.0,
            "text→image R@1": 1.0,
            "text→image R@5": 1.0,
            "50-way": 0.1,  # of the ten that exist
            "10-way": 0.1,
        }
    )


def test_the_samples_are_measured_with_the_prompts_of_the_command_line() -> None:
    model, preprocess = miniclip.load("demo", "cpu")
    paths = sorted(str(path) for path in (ROOT / "examples" / "images").glob("*.png"))
    nouns = [Path(path).stem for path in paths]
    done = run_cli("classify", *paths, "--labels", *nouns, "--model", "demo", "--json")
    answers = [answer["labels"][0]["label"] for answer in json.loads(done.stdout)]
    found = demo_quality.measure_samples(model, preprocess)
    assert found["among 12"] == sum(answer == noun for answer, noun in zip(answers, nouns, strict=True))
    assert list(found) == ["images", "among 12", "among 100"]
    assert found["among 100"] <= found["among 12"]


@pytest.mark.slow
def test_demo_quality_equals_a_zero_shot_classifier(packages: Path, tiny: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "emoji", packages).returncode == 0
    arguments = ["--model", tiny, "--data", tmp_path / "emoji", "--json", tmp_path / "q.json"]
    done = run_script("training/demo_quality.py", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "q.json").read_text())
    # The same with the classifier of the library, for the two images of Twemoji.
    model, preprocess = miniclip.load(tiny, "cpu")
    names = [prompts.with_article(name) for name in (tmp_path / "emoji" / "names.txt").read_text().splitlines()]
    classifier = miniclip.ZeroShotClassifier(model, preprocess, names, demo_quality.TEMPLATES)
    hits = 0
    for name, captions in rows(tmp_path / "emoji" / "twemoji").items():
        answer = classifier(miniclip.open_image(tmp_path / "emoji" / "twemoji" / name))
        hits += answer[0][0] == prompts.with_article(captions[0])
    assert list(result["sets"]) == ["Facebook", "Twemoji", "OpenMoji, black", "OpenMoji, colour"]
    assert list(result["sets"]["Twemoji"]) == ["images", *demo_quality.COLUMNS, "plain nouns"]
    assert result["sets"]["Twemoji"]["images"] == 2
    assert result["sets"]["Twemoji"]["image→text R@1"] == hits / 2
    arguments = ["--model", tiny, "--data", tmp_path / "emoji", "--choose", "--json", tmp_path / "choose.json"]
    assert run_script("training/demo_quality.py", *arguments).returncode == 0
    assert list(json.loads((tmp_path / "choose.json").read_text())["sets"]) == ["Facebook"]
    done = run_script("training/demo_quality.py", *arguments, "--publish")
    assert done.returncode == 2
    assert "--publish is for all numbers of the demo model" in done.stderr
