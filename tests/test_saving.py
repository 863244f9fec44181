"""``save_pretrained`` as the inverse of ``load``, and what transformers reads from its folders."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import make_reference
from helpers import ROOT, run_python
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip


def have_equal_states(a: miniclip.CLIP, b: miniclip.CLIP) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_model_is_loaded_back_equal(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, preprocess = miniclip.load(tiny, "cpu", dtype=dtype)
    miniclip.save_pretrained(model, tmp_path / "new" / "folder", preprocess)
    again, preprocess_again = miniclip.load(tmp_path / "new" / "folder", "cpu", dtype=dtype)
    assert have_equal_states(model, again)
    assert again.config == model.config
    assert preprocess_again == preprocess
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert file.get_tensor("logit_scale").dtype == dtype
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    modes = {path.stat().st_mode for path in (tmp_path / "new" / "folder").iterdir()}
    assert len(modes) == 1  # all files have the same readers


def test_the_file_has_transformers_tensors(tiny: Path, tmp_path: Path) -> None:
    model, _ = miniclip.load(tiny, "cpu")
    miniclip.save_pretrained(model, tmp_path)
    with safe_open(tiny / "model.safetensors", "pt") as theirs, safe_open(tmp_path / "model.safetensors", "pt") as ours:
        assert set(theirs.keys()) == set(ours.keys())
        for name in theirs.keys():  # noqa: SIM118
            assert torch.equal(theirs.get_tensor(name), ours.get_tensor(name)), name


@pytest.fixture(scope="module")
def saved_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    miniclip.save_pretrained(*miniclip.load("demo", "cpu")[:1], folder, miniclip.load("demo", "cpu")[1])
    return folder


def test_transformers_tokenizer_gives_the_ids_of_a_thousand_captions(saved_demo: Path) -> None:
    """Of words that need no cleaning, which transformers leaves out."""
    goldens = json.loads(gzip.decompress((Path(__file__).parent / "data" / "tokenizer_goldens.json.gz").read_bytes()))
    words = sorted({word for _, text, _ in goldens["cases"] for word in re.findall(r"\b[A-Za-z0-9]+\b[.,!?]?", text)})
    assert len(words) > 1000
    choose = random.Random(0)
    captions = [" ".join(choose.choices(words, k=choose.randrange(1, 12))) for _ in range(1000)]
    for load in (AutoTokenizer.from_pretrained, lambda folder: CLIPProcessor.from_pretrained(folder).tokenizer):
        theirs = load(saved_demo)
        given = theirs(captions, padding="max_length", truncation=True, return_tensors="pt")
        ours = miniclip.tokenize(captions, truncate=True)
        assert theirs.model_max_length == 77
        assert torch.equal(given.input_ids * given.attention_mask, ours.long())


def test_a_pipeline_of_transformers_answers_as_the_classifier(saved_demo: Path) -> None:
    """Without the tokenizer's files, each of four labels got 0.25."""
    labels = ["cat", "dog", "guitar", "pizza"]
    image = ROOT / "examples" / "images" / "cat.png"
    theirs = pipeline("zero-shot-image-classification", model=str(saved_demo), device="cpu")
    given = {row["label"]: row["score"] for row in theirs(str(image), candidate_labels=labels)}
    classifier = miniclip.ZeroShotClassifier(*miniclip.load("demo", "cpu"), labels, ["This is a photo of {}."])
    ours = dict(classifier(miniclip.open_image(image)))
    assert max(ours.values()) > 0.9
    assert given == pytest.approx(ours, abs=1e-5)


def test_another_vocabulary_has_no_tokenizer_files(tmp_path: Path) -> None:
    make_reference(text_config={"vocab_size": 60, "eos_token_id": 7}).save_pretrained(tmp_path / "theirs")
    miniclip.save_pretrained(miniclip.load(tmp_path / "theirs", "cpu")[0], tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.parametrize("text", [{}, {"eos_token_id": 2}, {"eos_token_id": 7, "vocab_size": 60}])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_computes_the_same(tmp_path: Path, text: dict[str, int], activation: str) -> None:
    reference = make_reference(
        text_config={**text, "hidden_act": activation}, vision_config={"hidden_act": activation, "layer_norm_eps": 1e-3}
    )
    reference.save_pretrained(tmp_path / "theirs")
    model, _ = miniclip.load(tmp_path / "theirs", "cpu")
    miniclip.save_pretrained(model, tmp_path / "ours")
    loaded = CLIPModel.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="sdpa")
    tokens = torch.randint(3, 59, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 5] = model.config.text.end_of_text or 59
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, input_ids=tokens).logits_per_image
        again = loaded(pixel_values=pixels, input_ids=tokens).logits_per_image
    assert torch.equal(again, expected)
    torch.testing.assert_close(model(pixels, tokens)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "preprocess",
    [
        miniclip.Preprocess(32),
        miniclip.Preprocess(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), Image.Resampling.LANCZOS, shortest_edge=40),
    ],
)
def test_transformers_reads_the_saved_preprocessing(
    tiny: Path, tmp_path: Path, preprocess: miniclip.Preprocess
) -> None:
    model, _ = miniclip.load(tiny, "cpu")
    miniclip.save_pretrained(model, tmp_path, preprocess)
    assert miniclip.load(tmp_path, "cpu")[1] == preprocess
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    photo = Image.radial_gradient("L").convert("RGB").resize((91, 57))
    ours = dataclasses.replace(preprocess, convention="huggingface")(photo)
    assert torch.equal(processor(photo, return_tensors="pt").pixel_values[0], ours)


def test_a_model_is_saved_over_its_own_folder(tiny: Path, tmp_path: Path) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    miniclip.save_pretrained(model, tmp_path, preprocess)
    loaded, _ = miniclip.load(tmp_path, "cpu")  # a view of the file
    loaded.logit_scale.fill_(1.5)
    miniclip.save_pretrained(loaded, tmp_path, preprocess)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    again, _ = miniclip.load(tmp_path, "cpu")
    assert again.logit_scale.item() == 1.5
    again.logit_scale.copy_(model.logit_scale)
    assert have_equal_states(again, model)


def test_trained_weights_are_saved(tiny: Path, tmp_path: Path) -> None:
    model, _ = miniclip.load(tiny, "cpu")
    model.requires_grad_(True)
    tokens = miniclip.tokenize(["a", "b"])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    miniclip.contrastive_loss(model(torch.randn(2, 3, 32, 32), tokens)[0]).backward()
    optimiser.step()
    miniclip.save_pretrained(model, tmp_path)
    again, _ = miniclip.load(tmp_path, "cpu")
    assert have_equal_states(again, model)
    assert not have_equal_states(again, miniclip.load(tiny, "cpu")[0])


def test_a_failed_save_keeps_the_old_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    miniclip.save_pretrained(model, tmp_path, preprocess)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.logit_scale.fill_(0.5)

    def full(*arguments: object, **options: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("miniclip.saving.save_file", full)
    with pytest.raises(miniclip.CheckpointError, match="No space left"):
        miniclip.save_pretrained(model, tmp_path, preprocess)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(miniclip.CheckpointError, match="file: cannot be written"):
        miniclip.save_pretrained(model, tmp_path / "file")


def test_invalid_models_are_refused(tiny: Path, tmp_path: Path) -> None:
    model, _ = miniclip.load(tiny, "cpu", dtype=torch.float64)
    with pytest.raises(miniclip.InputError, match=r"torch\.float64, a checkpoint holds"):
        miniclip.save_pretrained(model, tmp_path)
    model, _ = miniclip.load(tiny, "cpu")
    with pytest.raises(miniclip.ConfigError, match="images of 224 pixels, the model takes 32"):
        miniclip.save_pretrained(model, tmp_path, miniclip.Preprocess())
    with pytest.raises(miniclip.InputError, match="got VisionTransformer"):
        miniclip.save_pretrained(model.visual, tmp_path)  # type: ignore[arg-type]
    model.visual.proj = torch.nn.Parameter(torch.zeros(64, 7))
    with pytest.raises(miniclip.InputError, match=r"visual\.proj \(\(64, 7\), expected \(64, 48\)\)"):
        miniclip.save_pretrained(model, tmp_path)
    model, _ = miniclip.load(tiny, "cpu")
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(miniclip.InputError, match="such as adapter"):
        miniclip.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_save_leaves_only_temporary_files(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys, miniclip, miniclip.saving\n"
        "model, preprocess = miniclip.load(sys.argv[1], 'cpu')\n"
        "miniclip.saving.os.fsync = lambda number: os.kill(os.getpid(), 9)\n"
        "miniclip.save_pretrained(model, sys.argv[2], preprocess)\n"
    )
    done = run_python("-c", code, tiny, tmp_path / "out")
    assert done.returncode == -9
    assert not [name for name in os.listdir(tmp_path / "out") if not name.endswith(".tmp")]
