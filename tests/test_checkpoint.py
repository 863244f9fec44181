"""Checkpoints: every Hugging Face configuration, both layouts, shards and dtypes; and everything that is refused."""

from __future__ import annotations

import gc
import json
import random
import re
import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import make_reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

import miniclip
from miniclip import CLIP, CheckpointError, ConfigError, huggingface
from miniclip.checkpoint import open_checkpoint, read_header
from miniclip.huggingface import HF_TO_OPENAI, TRANSPOSED

# A vocabulary of 100 makes a file of 0.6 MB. The tests below make many damaged copies of this file.
SMALL: dict[str, Any] = {"text_config": {"vocab_size": 100, "eos_token_id": 99}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: the models are small, and on a busy machine two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a small vocabulary. Read only."""
    folder = tmp_path_factory.mktemp("small")
    make_reference(**SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy of ``small`` to damage."""
    return Path(shutil.copytree(small, tmp_path / "clip"))


@pytest.fixture(scope="module")
def state(small: Path) -> dict[str, Tensor]:
    """The tensors of ``small`` as loaded, under OpenAI's names."""
    return load(small).state_dict()


def load(path: Path, dtype: torch.dtype | None = None, **given: Any) -> CLIP:
    return miniclip.load(path, "cpu", dtype=dtype, **given)[0]


def tensors_of(file: Path) -> dict[str, Tensor]:
    """Copies, not views, because the test overwrites the file."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def rewrite(file: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file by name; None removes a tensor."""
    tensors = tensors_of(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def rewrite_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# -- parity, the whole model ------------------------------------------------------------------------------------------


def token_ids(reference: CLIPModel, rows: int = 4) -> Tensor:
    """Random ids with the pooled token early, late, twice, and at the very end."""
    text = reference.config.text_config
    length, vocab_size, end = text.max_position_embeddings, text.vocab_size, text.eos_token_id
    if end == 2:
        end = vocab_size - 1
    others = torch.tensor([i for i in range(vocab_size) if i != end])
    ids = others[torch.randint(len(others), (rows, length), generator=torch.Generator().manual_seed(0))]
    for row, position in enumerate((length // 2, length - 1, 0, length - 1)):
        ids[row % rows, position] = end
    ids[0, length // 2 :] = end
    return ids


def stages(model: CLIP, images: Tensor, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    for i, hidden in enumerate(model.visual.hidden_states(images)):
        yield f"image block {i}", hidden
    for i, hidden in enumerate(model.hidden_states(ids)):
        yield f"text block {i}", hidden
    yield "image embedding", model.encode_image(images)
    yield "text embedding", model.encode_text(ids)
    yield "logits per image", model(images, ids)[0]
    yield "logits per text", model(images, ids)[1]


@torch.no_grad()
def reference_stages(reference: CLIPModel, images: Tensor, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    vision = reference.vision_model(images, output_hidden_states=True)
    text = reference.text_model(ids, output_hidden_states=True)
    logits = reference(pixel_values=images, input_ids=ids)
    for i, hidden in enumerate(vision.hidden_states):
        yield f"image block {i}", hidden
    for i, hidden in enumerate(text.hidden_states):
        yield f"text block {i}", hidden
    yield "image embedding", reference.visual_projection(vision.pooler_output)
    yield "text embedding", reference.text_projection(text.pooler_output)
    yield "logits per image", logits.logits_per_image
    yield "logits per text", logits.logits_per_text


def assert_parity(model: CLIP, reference: CLIPModel) -> None:
    """Every stage of both towers equals transformers' in float64, to a relative error of 1e-12."""
    reference = reference.double()
    size = reference.config.vision_config.image_size
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = token_ids(reference)
    ours, theirs = dict(stages(model, images, ids)), dict(reference_stages(reference, images, ids))
    assert ours.keys() == theirs.keys()
    for stage, expected in theirs.items():
        assert ours[stage].shape == expected.shape, stage
        error = (ours[stage] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-12, f"{stage}: {error:.1e}"


def vision(**fields: Any) -> dict[str, Any]:
    return {"vision_config": fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"text_config": {"vocab_size": 100, "eos_token_id": 99} | fields}


SWEEP: dict[str, dict[str, Any]] = {
    "no changes": {},
    "one block each": vision(num_hidden_layers=1) | text(num_hidden_layers=1),
    "five and four blocks": vision(num_hidden_layers=5) | text(num_hidden_layers=4),
    "one head each": vision(num_attention_heads=1) | text(num_attention_heads=1),
    "heads one wide": vision(hidden_size=24, num_attention_heads=24) | text(hidden_size=16, num_attention_heads=16),
    "heads 11 and 80 wide": vision(hidden_size=66, num_attention_heads=6) | text(hidden_size=80, num_attention_heads=1),
    "text wider than image": vision(hidden_size=32) | text(hidden_size=120, num_attention_heads=5),
    "narrow and wide MLPs": vision(intermediate_size=7) | text(intermediate_size=500),
    "projection 256": {"projection_dim": 256} | text(),
    "projection 512, wider than both towers": {"projection_dim": 512} | text(),
    "projection 1": {"projection_dim": 1} | text(),
    "pixels left over": vision(patch_size=7, image_size=32) | text(),
    "more pixels left over": vision(patch_size=16, image_size=47) | text(),
    "one patch": vision(patch_size=32, image_size=33) | text(),
    "patches of one pixel": vision(patch_size=1, image_size=5) | text(),
    "short context": text(max_position_embeddings=5),
    "long context": text(max_position_embeddings=130),
    "eps": vision(layer_norm_eps=1e-2) | text(layer_norm_eps=1e-12),
    "gelu": vision(hidden_act="gelu") | text(hidden_act="gelu"),
    "gelu in the image tower": vision(hidden_act="gelu") | text(),
    "gelu in the text tower": text(hidden_act="gelu"),
    "end of text amid the vocabulary": text(eos_token_id=7),
    "end of text first in the vocabulary": text(eos_token_id=0),
    "largest id pooled, small vocabulary": text(eos_token_id=2, vocab_size=50),
    "largest id pooled, OpenAI's vocabulary": {"text_config": {"eos_token_id": 2}},
}


@pytest.mark.parametrize("name", SWEEP)
def test_every_configuration_gives_transformers_numbers(name: str, tmp_path: Path) -> None:
    reference = make_reference(**SWEEP[name])
    reference.save_pretrained(tmp_path)
    assert_parity(load(tmp_path, torch.float64), reference)


# -- mutations: the same check must fail -------------------------------------------------------------------------------

Q, K, V = (f"text_model.encoder.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv")
NORM_1, NORM_2 = (f"vision_model.encoder.layers.{{}}.layer_norm{i}.weight" for i in (1, 2))


def swapped(a: str, b: str) -> dict[str, str | None]:
    """The table with the targets of two rows exchanged."""
    rows = {a: b, b: a}
    return {rows.get(name, name): target for name, target in HF_TO_OPENAI.items()}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Q, K),
        (K, V),
        tuple(name.replace("weight", "bias").replace("text", "vision") for name in (Q, V)),
        (NORM_1, NORM_2),
        ("text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias"),
        ("vision_model.pre_layrnorm.bias", "vision_model.post_layernorm.bias"),
        ("visual_projection.weight", "text_projection.weight"),
    ],
)
def test_swapped_rows_of_the_table_are_noticed(a: str, b: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # both towers are 48 wide, so that no shape reveals the last swap
    reference = make_reference(**SMALL, vision_config={"hidden_size": 48})
    reference.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface, "HF_TO_OPENAI", swapped(a, b))
    model = load(tmp_path, torch.float64)
    with pytest.raises(AssertionError, match=r"block|embedding"):
        assert_parity(model, reference)


@pytest.mark.parametrize("forgotten", sorted(TRANSPOSED))
def test_a_forgotten_transpose_is_noticed(forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # square projections, so that no shape reveals the mistake
    reference = make_reference(**SMALL, vision_config={"hidden_size": 48})
    reference.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface, "TRANSPOSED", TRANSPOSED - {forgotten})
    model = load(tmp_path, torch.float64)
    with pytest.raises(AssertionError, match="embedding"):
        assert_parity(model, reference)


@pytest.mark.parametrize("dropped", [name for name, target in HF_TO_OPENAI.items() if target])
def test_a_dropped_row_of_the_table_is_noticed(dropped: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "HF_TO_OPENAI", {k: v for k, v in HF_TO_OPENAI.items() if k != dropped})
    with pytest.raises((CheckpointError, KeyError)):
        load(small)


def test_a_parameter_called_dropped_is_noticed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "HF_TO_OPENAI", HF_TO_OPENAI | {"logit_scale": None})
    with pytest.raises((CheckpointError, KeyError)):
        load(small)


# -- layouts, dtypes, shards ------------------------------------------------------------------------------------------


def test_every_number_of_the_file_is_used_once(small: Path, state: dict[str, Tensor]) -> None:
    tensors = tensors_of(small / "model.safetensors")
    assert len(tensors) > 80
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in state.values())
    everything = torch.cat([tensor.flatten() for tensor in tensors.values()]).sort().values
    assert torch.equal(everything, torch.cat([tensor.flatten() for tensor in state.values()]).sort().values)


def open_clip_config(**model_cfg: Any) -> str:
    """The configuration of ``small`` in open_clip's format."""
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.5}
    text = {"vocab_size": 100, "width": 48, "heads": 3, "layers": 2, "mlp_ratio": 2.0}
    model = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text} | model_cfg
    return json.dumps({"model_cfg": model, "preprocess_cfg": {}})


@pytest.fixture
def openai(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """The same numbers as ``small``, in OpenAI's layout and without a configuration."""
    path = tmp_path / "openai" / "weights.safetensors"
    path.parent.mkdir()
    save_file(state, path)
    return path


def test_openai_layout_without_a_configuration(openai: Path, state: dict[str, Tensor]) -> None:
    model = load(openai, torch.float64, activation="quick_gelu", heads=(4, 3))
    assert are_equal(load(openai, activation="gelu", heads=1).state_dict(), state)
    assert_parity(model, make_reference(**SMALL))
    gelu = load(openai, torch.float64, activation="gelu", heads=(4, 3))
    both = vision(hidden_act="gelu") | text(hidden_act="gelu")
    assert_parity(gelu, make_reference(**both))
    with pytest.raises(AssertionError, match="block 1"):
        assert_parity(gelu, make_reference(**SMALL))
    assert_parity(load(openai, torch.float64, activation="gelu", heads=(2, 6)), make_reference(**more_heads(both)))


def more_heads(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": config["vision_config"] | {"num_attention_heads": 2},
        "text_config": config["text_config"] | {"num_attention_heads": 6},
    }


def test_openai_layout_without_a_configuration_needs_activation_and_heads(openai: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"weights\.safetensors: there is no CLIP configuration .* pass activation='quick_gelu'"
    ):
        load(openai)
    with pytest.raises(ConfigError, match=r"heads of the text tower, 48 wide: pass heads=N"):
        load(openai, activation="gelu")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_openai_layout_beside_open_clips_configuration(openai: Path, quick_gelu: bool) -> None:
    (openai.parent / "open_clip_config.json").write_text(open_clip_config(quick_gelu=quick_gelu))
    act = "quick_gelu" if quick_gelu else "gelu"
    reference = make_reference(**(vision(hidden_act=act) | text(hidden_act=act)))
    assert_parity(load(openai, torch.float64), reference)
    assert_parity(load(openai.parent, torch.float64), reference)
    # OpenAI's layout takes open_clip's file even if there is a config.json
    (openai.parent / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert_parity(load(openai.parent, torch.float64), reference)


def test_arguments_override_the_configuration(openai: Path, small: Path) -> None:
    (openai.parent / "open_clip_config.json").write_text(open_clip_config(quick_gelu=False))
    assert_parity(load(openai, torch.float64, activation="quick_gelu"), make_reference(**SMALL))
    both = vision(hidden_act="gelu") | text(hidden_act="gelu")
    model = load(small, torch.float64, activation="gelu", heads=(2, 6))
    assert_parity(model, make_reference(**more_heads(both)))


def test_openai_layout_beside_hugging_faces_configuration(openai: Path, small: Path) -> None:
    shutil.copy(small / "config.json", openai.parent)
    assert_parity(load(openai, torch.float64), make_reference(**SMALL))


TIMM = {"architecture": "vit_base_patch32_clip_224", "num_classes": 512, "pretrained_cfg": {"tag": "openai"}}


@pytest.mark.parametrize("config", [{}, TIMM])
def test_a_config_json_of_another_model_is_ignored(config: Any, openai: Path, folder: Path) -> None:
    (openai.parent / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(config))
    for path in (openai, folder):
        with pytest.raises(ConfigError, match=r"there is no CLIP configuration beside these weights.*activation="):
            load(path)
        assert_parity(load(path, torch.float64, activation="quick_gelu", heads=(4, 3)), make_reference(**SMALL))


def test_timms_image_tower_does_not_hide_the_clip_beside_it(openai: Path) -> None:
    folder = openai.parent
    openai.rename(folder / "open_clip_model.safetensors")
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TIMM))
    (folder / "open_clip_config.json").write_text(open_clip_config())
    assert_parity(load(folder, torch.float64), make_reference(**SMALL))


def test_the_first_clip_of_several_is_taken(folder: Path, state: dict[str, Tensor]) -> None:
    (folder / "model.safetensors.index.json").write_text("left over and damaged")
    save_file({"visual.proj": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    assert are_equal(load(folder).state_dict(), state)


def test_hugging_face_layout_beside_open_clips_configuration_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "open_clip_config.json").write_text(open_clip_config())
    assert_parity(load(folder, torch.float64), make_reference(**SMALL))


def test_hugging_face_layout_without_a_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    model = load(folder / "model.safetensors", torch.float64, activation="quick_gelu", heads=(4, 3))
    assert_parity(model, make_reference(**SMALL))


@pytest.mark.parametrize("name", ["clip.safetensors", "open_clip_model.safetensors", "model.safetensors"])
def test_one_file_of_any_name(name: str, folder: Path, state: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert are_equal(load(folder).state_dict(), state)
    assert are_equal(load(folder / name).state_dict(), state)


def test_shards_are_loaded(small: Path, tmp_path: Path, state: dict[str, Tensor]) -> None:
    make_reference(**SMALL).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert are_equal(load(tmp_path).state_dict(), state)
    assert are_equal(load(tmp_path / "model.safetensors.index.json").state_dict(), state)
    assert_parity(load(tmp_path, torch.float64), make_reference(**SMALL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = make_reference(**SMALL).to(dtype)
    reference.save_pretrained(tmp_path)
    assert {entry.dtype for entry in read_header(tmp_path / "model.safetensors").values()} <= {"F16", "BF16"}
    assert load(tmp_path).dtype == torch.float32
    assert_parity(load(tmp_path, torch.float64), reference)
    assert {parameter.dtype for parameter in load(tmp_path, dtype).parameters()} == {dtype}


def test_mixed_precision_files_are_loaded(folder: Path) -> None:
    tensors = tensors_of(folder / "model.safetensors")
    for i, name in enumerate(tensors):
        tensors[name] = tensors[name].to((torch.float32, torch.float16, torch.bfloat16)[i % 3])
    save_file(tensors, folder / "model.safetensors")
    mixed = make_reference(**SMALL)
    mixed.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert_parity(load(folder, torch.float64), mixed)
    assert {parameter.dtype for parameter in load(folder).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_parameter_is_cast(dtype: torch.dtype, small: Path, state: dict[str, Tensor]) -> None:
    cast = load(small, dtype).state_dict()
    assert are_equal(cast, {name: tensor.to(dtype) for name, tensor in state.items()})


def test_position_ids_are_dropped(folder: Path, state: dict[str, Tensor]) -> None:
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(20)[None] for tower in ("vision", "text")}
    rewrite(folder / "model.safetensors", **ids)
    assert are_equal(load(folder).state_dict(), state)
    # some files store them as floats
    rewrite(folder / "model.safetensors", **{name: ids[name].float() for name in ids})
    assert are_equal(load(folder).state_dict(), state)


def test_leftovers_of_openais_archives_are_dropped(openai: Path, state: dict[str, Tensor]) -> None:
    leftovers = {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    rewrite(openai, **leftovers, attn_mask=torch.zeros(77, 77))
    assert are_equal(load(openai, activation="gelu", heads=1).state_dict(), state)


@pytest.mark.parametrize("spaces", range(1, 8))
def test_unaligned_numbers_are_loaded(spaces: int, folder: Path, state: dict[str, Tensor]) -> None:
    """The format allows a header of any length, so the numbers may be unaligned."""
    change_header(folder / "model.safetensors", lambda header: header + b" " * spaces)
    assert are_equal(load(folder).state_dict(), state)
    assert_parity(load(folder, torch.float64), make_reference(**SMALL))


# -- keys that are missing, unexpected or of wrong shape --------------------------------------------------------------


@contextmanager
def refused(folder: Path, pattern: str, error: type[Exception] = CheckpointError) -> Iterator[None]:
    """The block raises one error that names the folder and matches. Nothing in the folder changes."""
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}
    with pytest.raises(error, match=pattern) as caught:
        yield
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")} == before


def test_one_error_names_missing_unexpected_and_wrong_tensors(folder: Path) -> None:
    rewrite(
        folder / "model.safetensors",
        **{
            "logit_scale": None,
            "text_model.encoder.layers.1.self_attn.k_proj.bias": None,
            "text_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(96),
            "something_else": torch.zeros(1),
            "visual_projection.weight": torch.zeros(64, 48),  # its transpose
            "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(64, 65),
        },
    )
    with refused(folder, "do not fit the configuration in config.json"):
        load(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "2 missing (" in message
    assert "2 unexpected (something_else, text_model.encoder.layers.2.mlp.fc1.bias)" in message
    assert "2 of wrong shape (" in message
    assert "visual_projection.weight is (64, 48), expected (48, 64)" in message
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight is (64, 65), expected (64, 64)" in message
    assert "text_model.encoder.layers.1.self_attn.k_proj.bias" in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "openai"])
def test_every_tensor_is_required(layout: str, folder: Path, openai: Path) -> None:
    path = folder / "model.safetensors" if layout == "hf" else openai
    given = {} if layout == "hf" else {"activation": "gelu", "heads": 1}
    whole = path.read_bytes()
    tensors = tensors_of(path)
    for name, tensor in tensors.items():
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load(path, **given)
        assert name in str(caught.value) or "position embeddings" in str(caught.value)
        save_file(tensors | {name: torch.cat([tensor[None], tensor[None]])}, path)
        with pytest.raises((CheckpointError, ConfigError), match=r"wrong shape|another rank"):
            load(path, **given)
    path.write_bytes(whole)
    load(path, **given)


@pytest.mark.parametrize(
    ("section", "changes", "pattern"),
    [
        ("vision_config", {"num_hidden_layers": 4}, r"16 missing \(vision_model.encoder.layers.3."),
        ("text_config", {"num_hidden_layers": 1}, r"16 unexpected \(text_model.encoder.layers.1."),
        ("vision_config", {"hidden_size": 128}, r"53 of wrong shape"),
        ("text_config", {"intermediate_size": 95}, r"6 of wrong shape \(.*, expected \(95, 48\)"),
        ("vision_config", {"image_size": 40}, r"position_embedding.weight is \(17, 64\), expected \(26, 64\)"),
        ("vision_config", {"patch_size": 16}, r"2 of wrong shape"),
        ("text_config", {"max_position_embeddings": 78}, r"embedding.weight is \(77, 48\), expected \(78, 48\)"),
        ("text_config", {"vocab_size": 101}, r"token_embedding.weight is \(100, 48\), expected \(101, 48\)"),
        (None, {"projection_dim": 47}, r"text_projection.weight is \(48, 48\), expected \(47, 48\)"),
        (None, {"model_type": "siglip"}, r"config.json: model_type is 'siglip', miniclip loads 'clip'"),
        ("text_config", {"hidden_act": "relu"}, r"config.json: text_config.hidden_act is 'relu'"),
    ],
)
def test_a_contradicting_configuration_is_refused(
    section: str | None, changes: dict[str, Any], pattern: str, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    with refused(folder, pattern, (CheckpointError, ConfigError)):  # type: ignore[arg-type]
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder / "model.safetensors", **{"logit_scale": torch.tensor(1).to(dtype)})
    with refused(folder, r"logit_scale is .*[FIB]\w+.*F32, F16, BF16|F32, F16, BF16 \(logit_scale is"):
        load(folder)


@pytest.mark.parametrize("names", [[], ["a"], ["model.diffusion_model.x", "first_stage_model.y", "z", "w"]])
def test_tensors_of_another_model_are_refused(names: list[str], folder: Path) -> None:
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    found = f"the first names are {', '.join(sorted(names)[:3])}" if names else "there are none"
    with refused(folder, rf"the tensors are not those of a CLIP \({found}\)"):
        load(folder)


def test_both_layouts_in_one_file_are_refused(folder: Path, state: dict[str, Tensor]) -> None:
    rewrite(folder / "model.safetensors", **state)
    with refused(folder, r"\d+ unexpected \("):
        load(folder)


# -- pickles, folders and shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ViT-B-32.pt", "clip.PTH", "last.ckpt", "clip.pkl"])
def test_pickles_are_refused_and_the_advice_works(
    name: str, small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tensors_of(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name)
    for path in (folder, folder / name):
        with refused(
            folder, f"{name} is a pickle. Opening a pickle can run code.* Convert it once: safetensors.torch.save_file"
        ):
            load(path)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    advice = str(caught.value).partition("Convert it once: ")[2]
    monkeypatch.chdir(folder)
    eval(advice, {"safetensors": safetensors, "torch": torch, "path": folder / name})
    assert are_equal(load(folder).state_dict(), load(small).state_dict())


def test_a_pickle_called_safetensors_is_not_unpickled(folder: Path) -> None:
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    with refused(folder, "truncated or not safetensors: the file has"):
        load(folder)


def test_folders_without_weights_are_refused(tmp_path: Path, small: Path) -> None:
    with refused(tmp_path, "holds no weights; expected one of model.safetensors, model.safetensors.index.json"):
        load(tmp_path)
    for i in range(6):
        shutil.copy(small / "model.safetensors", tmp_path / f"{i}.safetensors")
    with refused(tmp_path, r"holds 6 safetensors files, name one \(0.safetensors, 1.safetensors, .*…\)"):
        load(tmp_path)


def test_a_folder_named_like_the_weights_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: is not a file"):
        open_checkpoint(folder / "missing.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    for path in (folder, folder / "model.safetensors"):
        with refused(folder, "holds no weights"):
            load(path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "a/b.safetensors", "/etc/passwd", "C:x", "a\\b", "", ".", ".."])
def test_shard_names_outside_the_folder_are_refused(shard: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": shard}}))
    with refused(folder, "the shard name '.*' leaves the folder"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"logit_scale": "shard.bin"}}))
    with refused(folder, "shard.bin is a pickle"):
        load(folder)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    make_reference(**SMALL).save_pretrained(folder, max_shard_size="200KB")
    return folder


def test_shards_that_contradict_the_index_are_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    names, shards = list(whole["weight_map"]), sorted(set(whole["weight_map"].values()))

    def write(**changes: str) -> None:
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | changes}))

    write(extra=shards[0])
    with refused(sharded, r"1 tensors are missing from the shards \(extra\)"):
        load(sharded)
    here = whole["weight_map"][names[0]]
    elsewhere = next(shard for shard in shards if shard != here)
    write(**{names[0]: elsewhere})
    with refused(sharded, f"{names[0]} is in {here}, the index says {elsewhere}"):
        load(sharded)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != names[0]}}))
    with refused(sharded, f"{names[0]} is in {here}, the index says nothing"):
        load(sharded)
    write(extra="model-9.safetensors")
    with refused(sharded, "the shard 'model-9.safetensors' is missing"):
        load(sharded)
    write(extra="x" * 5000)
    with refused(sharded, "File name too long|is missing"):
        load(sharded)
    write()
    (sharded / shards[1]).write_bytes((sharded / shards[1]).read_bytes()[:-1])
    with refused(sharded, f"{shards[1]}: damaged: the file has"):
        load(sharded)
    (sharded / shards[1]).unlink()
    with refused(sharded, f"the shard '{shards[1]}' is missing"):
        load(sharded)


@pytest.mark.parametrize("index", [{}, [], None, {"weight_map": None}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_invalid_indexes_are_refused(index: Any, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(sharded, r"has no weight_map|expected an object", (CheckpointError, ConfigError)):  # type: ignore[arg-type]
        load(sharded)


# -- damaged files ----------------------------------------------------------------------------------------------------


def parse(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def change_header(file: Path, change: Any) -> None:
    header, numbers = parse(file.read_bytes())
    header = change(header)
    file.write_bytes(struct.pack("<Q", len(header)) + header + numbers)


def test_errors_for_truncated_files_give_both_lengths(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header_end = 8 + len(parse(data)[0])
    choose = random.Random(0)
    cuts = {*range(10), header_end - 1, header_end, header_end + 1, len(data) - 1}
    for cut in sorted(cuts | {choose.randrange(len(data)) for _ in range(60)}):
        file.write_bytes(data[:cut])
        needed = 8 if cut < 8 else header_end if cut < header_end else len(data)
        with refused(folder, rf"the file has {cut} bytes, its header needs {needed}$"):
            load(folder)
    file.write_bytes(data + b"\0")
    with refused(folder, rf"the file has {len(data) + 1} bytes, its header needs {len(data)}$"):
        load(folder)


@pytest.mark.parametrize("length", [2**62, 2**63, 2**64 - 1, 10**9, 0, 1])
def test_wrong_header_lengths_are_refused(length: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with refused(folder, f"header needs {length + 8}$" if length > 1 else "the header is damaged"):
        load(folder)


def test_a_sparse_file_with_a_header_of_two_gigabytes_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as sparse:  # two gigabytes that take no space on the disk
        sparse.write(struct.pack("<Q", 2**31 - 8))
        sparse.truncate(2**31)
    with refused(folder, "the header would have 2147483640 bytes, the most is 4194304"):
        load(folder)


@pytest.mark.parametrize("content", ["empty lists", "tensors of no numbers"])
def test_large_headers_are_refused_before_they_are_parsed(content: str, folder: Path) -> None:
    """Parsed, 24 MB of lists took 622 MB, and 600,000 tensors of no numbers 469 MB."""
    tensor = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    parts = ['"a":[' + "[]," * 8_000_000 + "[]]"] if "lists" in content else map(tensor.format, range(600_000))
    header = "{" + ",".join(parts) + "}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    tracemalloc.start()
    with refused(folder, rf"the header would have {len(header)} bytes, the most is 4194304"):
        load(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_the_largest_header_that_is_read(folder: Path, state: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    change_header(file, lambda header: header + b" " * (2**22 - len(header)))
    assert are_equal(load(folder).state_dict(), state)
    change_header(file, lambda header: header + b" ")
    with refused(folder, "the header would have 4194305 bytes"):
        load(folder)


def test_git_lfs_pointers_are_refused(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605156676\n"
    (folder / "model.safetensors").write_text(pointer)
    with refused(folder, "is a Git LFS pointer, not the weights; run `git lfs pull`"):
        load(folder)


def load_or_refuse(folder: Path, state: dict[str, Tensor]) -> str:
    try:
        model = load(folder)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    assert are_equal(model.state_dict(), state)
    return ""


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_in_the_header_never_load_a_wrong_model(
    seed: int, folder: Path, state: dict[str, Tensor]
) -> None:
    """Never a crash and never a wrong model: the file is refused, or the changed byte does not concern the tensors."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header_end = 8 + len(parse(data)[0])
    choose = random.Random(seed)
    outcomes = []
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 1, 1, 2, 5])):
            damaged[choose.randrange(header_end)] ^= choose.choice([1 << choose.randrange(8), choose.randrange(1, 256)])
        file.write_bytes(damaged)
        outcomes.append(load_or_refuse(folder, state))
    assert sum(bool(outcome) for outcome in outcomes) > 90


INVALID_NUMBERS = [-1, 0.0, 1.5, 1e300, True, None, "1", [], {}, [1], 2**53 + 1, 2**63, 2**64, 10**400]


@pytest.mark.parametrize("seed", range(2))
def test_invalid_values_in_the_header_are_refused(seed: int, folder: Path, state: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    choose = random.Random(seed)

    def damage(header: bytes) -> bytes:
        tensors = json.loads(header)
        name = choose.choice([name for name in tensors if name != "__metadata__"])
        key = choose.choice(["dtype", "shape", "data_offsets"])
        odd = choose.choice(INVALID_NUMBERS)
        if key != "dtype" and tensors[name][key] and choose.random() < 0.7:
            tensors[name][key][choose.randrange(len(tensors[name][key]))] = odd
        else:
            tensors[name][key] = odd
        return json.dumps(tensors).encode()

    for _ in range(60):
        file.write_bytes(data)
        change_header(file, damage)
        assert load_or_refuse(folder, state)


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SCALE = '"logit_scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "pattern"),
    [
        (b"[" * 100_000, "header is damaged, or the file is not safetensors"),
        (b'{"a":' * 100_000, "header is damaged, or the file is not safetensors"),
        (b"{" + ENTRY.encode() + b"," + ENTRY.encode() + b"}", "a name occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,4]}}', "a name occurs twice"),
        (b"\xff\xfe{}", "header is damaged, or the file is not safetensors"),
        ("{}".encode("utf-16"), "header is damaged, or the file is not safetensors"),
        (b"[]", "expected a JSON object"),
        (b"3", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"", "header is damaged, or the file is not safetensors"),
        (b'{"a":3}', "damaged at 'a': 3"),
        (b'{"a":{}}', "damaged at 'a'"),
        (b'{"a\\u001b[2J":3}', r"damaged at 'a\\x1b\[2J'"),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', r"damaged at '\\ud800'"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":NaN}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}', "damaged at 'a'"),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "damaged at 'a'"),
        (
            b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}',
            "stored as 'F4'; miniclip reads F64, F32, F16, BF16",
        ),
        (b'{"a":{"dtype":"%s","shape":[8],"data_offsets":[0,4]}}' % (b"F" * 3000), "as 'FFF.{,30}'"),
        (b'{"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' % (b"a" * 3000), "damaged at 'a{300}': {"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', r"a, F32 \(2,\), does not fit bytes 0 to 4"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', "does not fit bytes 4 to 0"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "starts at byte 4, the tensor before it ends at 0"),
        (b"{" + ENTRY.encode() + b"," + ENTRY.replace("a", "b", 1).encode() + b"}", "starts at byte 0, .* ends at 4"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}', "does not fit bytes 0 to 0"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "the file has .* bytes, its header needs"),
        (b"{" + SCALE.encode() + b"}", "not those of a CLIP"),
    ],
)
def test_invalid_headers_are_refused(header: bytes, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with refused(tmp_path, pattern):
        load(tmp_path)


def test_empty_tensors_are_refused(folder: Path) -> None:
    rewrite(folder / "model.safetensors", extra=torch.zeros(0, 3))
    with refused(folder, r"1 unexpected \(extra\)"):
        load(folder)
    rewrite(folder / "model.safetensors", extra=None, logit_scale=torch.zeros(0))
    with refused(folder, r"logit_scale is \(0,\), expected \(\)"):
        load(folder)


def test_errors_of_the_safetensors_library_become_checkpoint_errors(folder: Path) -> None:
    """Python reads "-0" as 0, and the library refuses it: both check the header."""
    change_header(folder / "model.safetensors", lambda header: header.replace(b"[0,", b"[-0,"))
    with refused(folder, "cannot be read"):
        load(folder)


# -- damaged configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "holds a JSON list, expected an object"),
        (b'"clip"', "holds a JSON str, expected an object"),
        (b"null", "holds a JSON NoneType, expected an object"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"projection_dim": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"model_type": "clip", "projection_dim": NaN}', "projection_dim must be an integer"),
        (b'{"model_type": "clip", "vision_config": []}', "vision_config must be an object"),
    ],
)
def test_invalid_configurations_are_refused(content: bytes, pattern: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with refused(folder, pattern, ConfigError):
        load(folder)


@pytest.mark.parametrize("seed", range(2))
def test_invalid_values_in_the_configuration_never_load_a_wrong_model(
    seed: int, folder: Path, state: dict[str, Tensor]
) -> None:
    config = (folder / "config.json").read_text()
    choose = random.Random(seed)
    for _ in range(60):
        damaged = json.loads(config)
        values = choose.choice([damaged, damaged["vision_config"], damaged["text_config"]])
        values[choose.choice(list(values))] = choose.choice(INVALID_NUMBERS)
        (folder / "config.json").write_text(json.dumps(damaged))
        assert len(load_or_refuse(folder, state)) < 1500


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_sparse_descriptions_of_two_gigabytes_are_refused_at_once(name: str, folder: Path) -> None:
    with (folder / name).open("wb") as sparse:
        sparse.truncate(2**31)
    tracemalloc.start()
    with refused(
        folder, f"{re.escape(name)}: cannot be read .it has 2147483648 bytes, the most is 4194304", ConfigError
    ):
        load(folder / name if "index" in name else folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_a_folder_named_like_the_configuration_is_ignored(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ConfigError, match="there is no CLIP configuration"):
        load(folder)


def test_the_error_lists_only_the_first_tensors(folder: Path) -> None:
    rewrite_json(folder / "config.json", text_config={"vocab_size": 100, "eos_token_id": 2})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert re.search(r"160 missing \(.*, …\); \d+ of wrong shape \(.*, …\)$", str(caught.value))
    assert len(str(caught.value)) < 1200


def test_copied_tensors_leave_no_mapping(tiny: Path) -> None:
    """A converted model keeps no mapping of the file. Checked where the system lists the mappings."""
    maps = Path("/proc/self/maps")
    mapped = {}
    gc.collect()  # models that tests before this one left behind
    for dtype in (torch.float64, torch.float32):
        model, _ = miniclip.load(tiny, "cpu", dtype=dtype)
        mapped[dtype] = maps.exists() and str((tiny / "model.safetensors").resolve()) in maps.read_text()
        del model
    assert not mapped[torch.float64]
    assert mapped[torch.float32] == maps.exists()  # views of the file
