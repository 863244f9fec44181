"""Checkpoints as people have them: prefixes of training programs, extra tensors, adapters, several models, float64."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import miniclip
from miniclip import CheckpointError

PREFIXES = ["module.", "model.", "_orig_mod.", "clip.", "base_model.model.", "module._orig_mod.", "a.b.c.clip_model."]


@pytest.fixture(params=["hf", "openai"])
def folder(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    """A folder in Hugging Face's or OpenAI's layout, to change."""
    copy = Path(shutil.copytree(tiny, tmp_path / "folder"))
    if request.param == "openai":
        save_file(miniclip.load(tiny, "cpu")[0].state_dict(), copy / "model.safetensors")
    return copy


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in change(state).items()}, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / "model.safetensors")


def vectors(folder: Path, **options: bool) -> tuple[Tensor, Tensor]:
    model, _ = miniclip.load(folder, "cpu", **options)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model.encode_image(pixels), model.encode_text(miniclip.tokenize(["a cat", "two dogs"]))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_left_out_and_told(prefix: str, folder: Path, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The vectors are those of the plain file, to the bit."""
    rewrite(folder, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    with caplog.at_level(logging.INFO, "miniclip"):
        given = vectors(folder)
    assert all(torch.equal(a, b) for a, b in zip(given, vectors(tiny)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'model.safetensors'}: the names of the tensors begin with {prefix!r}, which is left out"
    ]


def test_a_plain_file_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "miniclip"):
        vectors(folder)
    assert caplog.records == []


@pytest.mark.parametrize("prefix", ["", "module."])
def test_tensors_of_a_training_program_are_named_and_refused_unless_not_strict(
    prefix: str, folder: Path, tiny: Path
) -> None:
    extra = {"optimizer.step": torch.ones(1), "classifier.weight": torch.ones(3, 48)}
    rewrite(folder, lambda state: {prefix + name: tensor for name, tensor in state.items()} | extra)
    with pytest.raises(CheckpointError, match=r"2 unexpected \(\S+, \S+\); strict=False leaves tensors out") as caught:
        vectors(folder)
    assert "optimizer.step" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(vectors(folder, strict=False), vectors(tiny)))


def test_not_strict_still_needs_every_tensor(folder: Path) -> None:
    rewrite(folder, lambda state: {name: tensor for name, tensor in state.items() if "logit_scale" not in name})
    with pytest.raises(CheckpointError, match=r"1 missing \(logit_scale\)$"):
        vectors(folder, strict=False)


def test_several_models_in_one_file_are_refused(folder: Path) -> None:
    rewrite(folder, lambda state: state | {f"ema.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match=r"holds 2 models \(.*logit_scale.*\): save one of them alone"):
        vectors(folder, strict=False)


@pytest.mark.parametrize("kind", ["lora_A.weight", "lora_B.default.weight", "base_layer.weight"])
def test_adapters_are_refused_with_what_to_do(kind: str, folder: Path) -> None:
    rewrite(folder, lambda state: state | {f"base_model.model.visual.proj.{kind}": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"holds 1 tensors of an adapter .*with merge_and_unload\(\)"):
        vectors(folder, strict=False)


def test_a_saved_peft_model_says_what_to_do(folder: Path, tiny: Path) -> None:
    """By the real library; merged, the same model loads."""
    from peft import LoraConfig, get_peft_model

    model, _ = miniclip.load(tiny, "cpu")
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_fc"], init_lora_weights=False))  # type: ignore[arg-type]
    rewrite(folder, lambda state: dict(adapted.state_dict()))
    with pytest.raises(CheckpointError, match="merge the adapter into the model"):
        vectors(folder)
    merged = adapted.merge_and_unload()
    rewrite(folder, lambda state: dict(merged.state_dict()))
    assert not torch.equal(vectors(folder)[0], vectors(tiny)[0])


def test_float64_is_read_and_converted(folder: Path, tiny: Path) -> None:
    rewrite(folder, lambda state: {name: tensor.double() for name, tensor in state.items()})
    assert all(torch.equal(a, b) for a, b in zip(vectors(folder), vectors(tiny)))
    model, _ = miniclip.load(folder, "cpu", dtype=torch.float64)
    assert model.dtype == torch.float64


def test_float8_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda state: state | {"logit_scale": torch.ones(1).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="logit_scale is stored as 'F8_E4M3'; miniclip reads F64, F32, F16, BF16"):
        vectors(folder)


def test_the_import_forms_of_openai_clip() -> None:
    import miniclip.clip as one
    from miniclip import clip as other
    from miniclip.model import convert_weights
    from miniclip.simple_tokenizer import SimpleTokenizer

    assert one is other
    assert (one.load, one.tokenize, one.available_models) == (
        miniclip.load,
        miniclip.tokenize,
        miniclip.available_models,
    )
    tokenizer = SimpleTokenizer()
    assert tokenizer.encoder["<|endoftext|>"] == 49407
    assert [tokenizer.decoder[i] for i in tokenizer.encode("a photograph")] == ["a</w>", "photograph</w>"]
    assert len(tokenizer.encoder) == len(tokenizer.decoder) == 49408
    model, _ = miniclip.load("demo", "cpu")
    convert_weights(model)
    assert model.dtype == torch.float16
