"""The bundled demo model: it is what its card says, and it knows what it was trained on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import demo_quality
import demo_report
import pytest
import torch
from helpers import ROOT, run_cli
from safetensors import safe_open
from transformers import CLIPModel

import miniclip
from miniclip import hub
from validation.report import make_report
from validation.weights import weights_for

FOLDER = hub.BUNDLED["demo"]
PAGES = ["miniclip/data/demo/README.md", "docs/demo.md", "README.md"]


def test_the_demo_is_small_in_float16_and_has_clips_vocabulary() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    model, preprocess = miniclip.load("demo", "cpu")
    assert (model.vocab_size, model.context_length, preprocess.size) == (49408, 77, 64)
    assert "demo" in miniclip.available_models()


def test_the_demo_names_every_sample_image() -> None:
    captions = common.read_captions(common.IMAGES)
    labels = [lines[0] for lines in captions.values()]
    classifier = miniclip.ZeroShotClassifier(*miniclip.load("demo", "cpu"), labels, ["{}."])
    answers = classifier([miniclip.open_image(common.IMAGES / name) for name in captions])
    wrong = [(label, answer[0]) for label, answer in zip(labels, answers) if answer[0][0] != label]
    assert not wrong


def test_shuffled_token_embeddings_know_nothing() -> None:
    """The test above depends on the weights: with the words exchanged it fails."""
    captions = common.read_captions(common.IMAGES)
    labels = [lines[0] for lines in captions.values()]
    model, preprocess = miniclip.load("demo", "cpu")
    model.token_embedding.weight.copy_(model.token_embedding.weight[torch.arange(49408).roll(1)])
    classifier = miniclip.ZeroShotClassifier(model, preprocess, labels, ["{}."])
    answers = classifier([miniclip.open_image(common.IMAGES / name) for name in captions])
    assert sum(answer[0][0] == label for label, answer in zip(labels, answers)) < 8


def test_words_without_training_have_small_embeddings() -> None:
    model, _ = miniclip.load("demo", "cpu")
    norms = model.token_embedding.weight.norm(dim=1)
    seen = miniclip.tokenize(["a photo of pizza, cat and elephant"])[0].long().unique()
    assert norms.median() < 0.1 * norms[seen].median()


def test_transformers_gives_the_demo_s_logits() -> None:
    theirs = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="sdpa")
    model, preprocess = miniclip.load("demo", "cpu")
    pixels = preprocess([miniclip.open_image(common.IMAGES / name) for name in ("pizza.png", "cat.png")])
    tokens = miniclip.tokenize(["a slice of pizza", "a cat"])
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=tokens).logits_per_image
    torch.testing.assert_close(model(pixels, tokens)[0], expected, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_validate_finds_no_drift_in_the_demo() -> None:
    with weights_for("demo", download=False) as pair:
        report = make_report(pair, "demo", "cpu", torch.float32)
    assert report.first_drift is None
    assert len(report.rows) > 20


def test_the_name_demo_wins_over_a_folder_called_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()  # a user's folder
    monkeypatch.chdir(tmp_path)
    assert miniclip.load("demo", "cpu")[0].vocab_size == 49408
    with pytest.raises(miniclip.CheckpointError):
        miniclip.load("./demo", "cpu")


@pytest.mark.slow
def test_the_demo_never_replaces_a_missing_model(tmp_path: Path) -> None:
    arguments = ["classify", common.IMAGES / "pizza.png", "--labels", "pizza", "cat"]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_cli(*arguments, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ViT-B/32 is not in the cache" in done.stderr
    assert "--model demo" in done.stderr
    done = run_cli(*arguments, "--model", "demo", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[1] == "pizza"


@pytest.mark.slow
def test_the_first_command_of_the_readme_runs_offline(tmp_path: Path) -> None:
    """Its miniclip part, without a network. .ci/run runs the whole line, pip included."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("pip install"))
    command = [sys.executable, "-m", "miniclip", *shlex.split(line.partition("&& miniclip ")[2])]
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    path, label, probability = done.stdout.splitlines()[0].split("\t")
    assert Path(path).stem == label
    assert float(probability) > 0.5


def newest_result() -> dict[str, Any]:
    return json.loads(max((ROOT / "benchmarks" / "results").glob("demo-*.json")).read_text(encoding="utf-8"))


def test_the_pages_show_the_measured_numbers(tmp_path: Path) -> None:
    result = newest_result()
    assert result["parameters_sha256"] == demo_quality.checksum(miniclip.load("demo", "cpu", dtype=torch.float32)[0])
    for name, content in demo_report.pages(result, (ROOT / "README.md").read_text(encoding="utf-8")).items():
        text = (ROOT / name).read_text(encoding="utf-8")
        shown = text.partition(demo_report.BEGIN)[2].partition(demo_report.END)[0].strip()
        # Without the output of the command, which test_docs.py compares and whose last digit depends on the processor.
        assert shown.rpartition("```")[2] == content.rpartition("```")[2], name
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    # Other numbers would change each page, and a page without its markers would leave all pages as they are.
    result["sets"]["Twemoji"] = {key: value * 0.5 for key, value in result["sets"]["Twemoji"].items()}
    demo_report.publish(result, tmp_path)
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in PAGES]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = demo_report.pages(result, readme)
    for page, name in zip(pages, PAGES, strict=True):
        head, _, rest = (ROOT / name).read_text(encoding="utf-8").partition(demo_report.BEGIN)
        tail = rest.partition(demo_report.END)[2]
        assert page == f"{head}{demo_report.BEGIN}\n{expected[name]}\n{demo_report.END}{tail}"
    assert expected["README.md"].rpartition("```")[2] not in readme
    (tmp_path / "docs" / "demo.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"docs/demo\.md needs one <!-- demo: begin -->"):
        demo_report.publish(newest_result(), tmp_path)
    assert (tmp_path / PAGES[0]).read_text(encoding="utf-8") == pages[0]


def test_a_newly_trained_demo_must_be_at_least_this_good() -> None:
    result = newest_result()
    sets, samples = result["sets"], result["samples"]
    assert (samples["among 12"], samples["images"]) == (12, 12)
    assert samples["among 100"] >= 10
    assert sets["Twemoji"]["plain nouns"] >= 0.72
    assert sets["Twemoji"]["image→text R@1"] >= 0.52
    assert sets["Twemoji"]["50-way"] >= 0.90
    assert sets["OpenMoji, colour"]["image→text R@1"] >= 0.28
    assert sets["OpenMoji, black"]["image→text R@1"] >= 0.20
    assert sets["OpenMoji, black"]["10-way"] >= 0.78


def test_each_sample_image_is_found_by_its_plain_noun() -> None:
    """The bundled weights find each sample image by its noun, and tell a cat from a dog."""
    model, preprocess = miniclip.load("demo", "cpu")
    assert demo_quality.measure_samples(model, preprocess)["among 12"] == 12
    cat = miniclip.open_image(common.IMAGES / "cat.png")
    assert miniclip.ZeroShotClassifier(model, preprocess, ["cat", "dog"])(cat)[0][0] == "cat"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["zero_shot", "similarity", "retrieval", "linear_probe", "evaluate", "attention"])
def test_every_example_runs_without_arguments(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the demo model on examples/images" in done.stderr
    assert done.stdout
