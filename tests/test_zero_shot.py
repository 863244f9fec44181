"""Zero-shot classification, compared with transformers and with the same sums written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_reference
from helpers import make_image
from PIL import Image

import miniclip
from miniclip import InputError, TextTooLongError, ZeroShotClassifier

LABELS = ["cat", "rocket", "cup of coffee", "astronaut {in} orbit", "größe"]
TEMPLATES = ("a photo of a {}.", "the {}", "{} {} {}!")

Loaded = tuple[miniclip.CLIP, miniclip.Preprocess]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return miniclip.load(tiny, "cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [make_image(seed=i, size=size) for i, size in enumerate([(40, 30), (30, 40), (64, 64), (200, 120)])]


def test_one_template_equals_transformers(loaded: Loaded, images: list[Image.Image]) -> None:
    reference = make_reference().double()
    prompts = [f"a photo of a {label}." for label in LABELS]
    with torch.no_grad():
        output = reference(pixel_values=loaded[1](images).double(), input_ids=miniclip.tokenize(prompts))
    expected = output.logits_per_image.softmax(dim=1)
    classifier = ZeroShotClassifier(*loaded, LABELS)
    for answer, row in zip(classifier(images), expected):
        assert [label for label, _ in answer] == [LABELS[i] for i in row.argsort(descending=True)]
        assert [p for _, p in answer] == pytest.approx(row.sort(descending=True).values.tolist(), rel=1e-5)
    assert torch.allclose(classifier.probabilities(loaded[1](images)).double(), expected, atol=1e-6)


def test_templates_are_averaged_as_unit_vectors(loaded: Loaded) -> None:
    model, preprocess = loaded
    classifier = ZeroShotClassifier(model, preprocess, LABELS, TEMPLATES)
    for label, weight in zip(LABELS, classifier.weights):
        texts = [template.replace("{}", label) for template in TEMPLATES]
        features = F.normalize(model.encode_text(miniclip.tokenize(texts)), dim=1)
        expected = features.mean(dim=0)
        assert torch.allclose(weight, expected / expected.norm(), atol=1e-12)
        unnormalised = model.encode_text(miniclip.tokenize(texts)).mean(dim=0)
        assert not torch.allclose(weight, unnormalised / unnormalised.norm(), atol=1e-4)


def test_prompts_in_several_batches_give_the_same_weights(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ZeroShotClassifier(*loaded, LABELS, TEMPLATES).weights
    monkeypatch.setattr("miniclip.zero_shot._TEXTS_PER_BATCH", 4)
    assert torch.allclose(ZeroShotClassifier(*loaded, LABELS, TEMPLATES).weights, whole, atol=1e-12)


def test_one_image_gives_one_answer_and_several_give_a_list(
    loaded: Loaded, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = ZeroShotClassifier(*loaded, LABELS)
    one = classifier(images[2])
    assert sorted(label for label, _ in one) == sorted(LABELS)
    assert sum(p for _, p in one) == pytest.approx(1)
    assert [p for _, p in one] == sorted((p for _, p in one), reverse=True)
    monkeypatch.setattr("miniclip.zero_shot._IMAGES_PER_BATCH", 3)
    many = classifier(iter(images))
    assert len(many) == 4
    assert [label for label, _ in many[2]] == [label for label, _ in one]
    assert classifier([]) == []


def test_prompts_are_encoded_once(loaded: Loaded, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = ZeroShotClassifier(*loaded, LABELS)
    monkeypatch.setattr(miniclip.CLIP, "encode_text", None)
    assert len(classifier(images)) == 4


def test_trainable_model_gets_no_graph(tiny: Path, images: list[Image.Image]) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    classifier = ZeroShotClassifier(model.requires_grad_(True), preprocess, LABELS)
    assert not classifier.weights.requires_grad
    assert not classifier.probabilities(preprocess(images)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_probabilities(tiny: Path, images: list[Image.Image], dtype: torch.dtype) -> None:
    model, preprocess = miniclip.load(tiny, "cpu", dtype=dtype)
    probabilities = ZeroShotClassifier(model, preprocess, LABELS).probabilities(preprocess(images))
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(4))


def test_model_may_be_cast_afterwards(tiny: Path, images: list[Image.Image]) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    classifier = ZeroShotClassifier(model, preprocess, LABELS)
    before = classifier.probabilities(preprocess(images))
    model.double()
    assert torch.allclose(classifier.probabilities(preprocess(images)), before, atol=1e-4)


def test_similarities_that_are_not_finite_are_refused(tiny: Path, images: list[Image.Image]) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    classifier = ZeroShotClassifier(model, preprocess, LABELS)
    pixels = preprocess(images)
    pixels[2, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"image 2 are not finite: .* overflow in torch\.float32"):
        classifier.probabilities(pixels)
    with pytest.raises(InputError, match="must be a tensor"):
        classifier.probabilities(pixels.numpy())  # type: ignore[arg-type]
    with torch.no_grad():
        model.visual.proj[0, 0] = float("inf")
    with pytest.raises(InputError, match="image 0 are not finite"):
        classifier(images[0])


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (None, ("{}",), "labels must be a list of strings, got NoneType"),
        ([], ("{}",), "labels must hold"),
        ("cat", ("{}",), "single string 'cat'"),
        (["cat", 3], ("{}",), r"labels\[1\] must be a string, got int"),
        (["cat", "dog", "cat"], ("{}",), "'cat' is given 2 times"),
        (["cat"], (), "templates must hold"),
        (["cat"], "a {}", "single string 'a {}'"),
        (["cat"], ("a photo",), "'a photo' has no {}"),
    ],
)
def test_bad_labels_and_templates_are_refused(
    loaded: Loaded, labels: list[str], templates: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ZeroShotClassifier(*loaded, labels, templates)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", "got str; miniclip.open_image"),
        (Path("a.png"), r"got \w*Path; miniclip.open_image"),
        (None, "got NoneType; miniclip.open_image"),
        (torch.zeros(1, 3, 32, 32), "got a tensor; for preprocessed pixels use probabilities"),
    ],
)
def test_error_says_how_to_get_an_image(loaded: Loaded, images: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ZeroShotClassifier(*loaded, LABELS)(images)


def test_error_names_a_prompt_that_is_too_long(loaded: Loaded) -> None:
    with pytest.raises(TextTooLongError, match=r"text 1 .* holds 77; pass truncate=True$"):
        ZeroShotClassifier(*loaded, ["cat", "cat " * 80])


def test_prompts_are_cut_if_asked(loaded: Loaded) -> None:
    long = ZeroShotClassifier(*loaded, ["dog", "cat " * 80], ["{}"], truncate=True)
    cut = ZeroShotClassifier(*loaded, ["dog", "cat " * 75], ["{}"])
    torch.testing.assert_close(long.weights, cut.weights)
