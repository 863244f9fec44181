"""``load``: the meaning of a name, devices and dtypes, the model it returns, and the preprocessing of that model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_reference
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import miniclip
from miniclip import CLIP, CheckpointError, ConfigError, Preprocess, UnknownModelError, hub, loading
from miniclip.checkpoint import open_checkpoint
from miniclip.config import CLIPConfig
from miniclip.errors import MiniclipError
from miniclip.huggingface import config_from_dict


@pytest.fixture(scope="module")
def state(tiny: Path) -> dict[str, Tensor]:
    return miniclip.load(tiny, "cpu")[0].state_dict()


def loads(name: str | os.PathLike[str], state: dict[str, Tensor], **options: Any) -> bool:
    loaded = miniclip.load(name, "cpu", **options)[0].state_dict()
    return all(torch.equal(loaded[key], state[key]) for key in state)


def nothing_is_fetched(*arguments: object) -> Path:
    raise AssertionError(f"fetched {arguments}")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may ask the Hub. Tests of names that lead there replace these functions again."""
    monkeypatch.setattr(hub, "fetch_known", nothing_is_fetched)
    monkeypatch.setattr(hub, "fetch_repository", nothing_is_fetched)


# -- the meaning of a name --------------------------------------------------------------------------------------------


def test_paths_of_all_kinds_are_loaded(
    tiny: Path, tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "clip").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Modèles 2").symlink_to(tiny)
    for name in (
        tiny,
        str(tiny),
        f"{tiny}/",
        tiny / "model.safetensors",
        f"{tiny}/../{tiny.name}/model.safetensors",
        "~/models/clip",
        Path("~/models/clip"),
        "models/clip",
        Path("models/clip"),
        "./models/clip/model.safetensors",
        "Modèles 2",
    ):
        assert loads(name, state), name


def test_existing_path_wins_over_a_known_name(
    tiny: Path, tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ViT-B/32", "openai/clip-vit-base-patch32"):
        shutil.copytree(tiny, tmp_path / name)
        assert loads(name, state)
    (tmp_path / "RN50").symlink_to(tiny)
    assert loads("RN50", state)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_known_name_has_a_pinned_configuration(
    quick_gelu: bool, tmp_path: Path, state: dict[str, Tensor], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights need QuickGELU, whatever the file beside them says."""
    config = open_checkpoint(tiny).clip_config()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    wrong = {"model_cfg": {"embed_dim": 48, "quick_gelu": quick_gelu}, "preprocess_cfg": {"mean": [0, 0, 0]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(wrong))
    asked = []

    def fetch_known(name: str, cache_dir: Path | None) -> Path:
        asked.append((name, cache_dir))
        return tmp_path / "open_clip_model.safetensors"

    monkeypatch.setitem(hub.KNOWN, "ViT-B/16", hub.KnownModel(config, ()))
    monkeypatch.setattr(hub, "fetch_known", fetch_known)
    for name in ("ViT-B/16", "openai/clip-vit-base-patch16", "timm/vit_base_patch16_clip_224.openai"):
        model, preprocess = miniclip.load(name, "cpu", download_root="~/cache")
        assert model.config == config
        assert preprocess == Preprocess(32)
    assert asked == [("ViT-B/16", Path.home() / "cache")] * 3
    # arguments win over the pinned configuration
    model = miniclip.load("ViT-B/16", "cpu", activation="gelu", heads=(2, 6))[0]
    assert model.config == config.override("gelu", (2, 6))


def test_default_model_is_vit_b32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch_known", lambda name, cache_dir: Path(f"/nowhere/{name}/{cache_dir}"))
    with pytest.raises(CheckpointError, match=r"^/nowhere/ViT-B/32/None: is not a file"):
        miniclip.load(device="cpu")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "main")),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/15", ("owner/name", "refs/pr/15")),
        ("owner/name@", ("owner/name", "main")),
        ("openai/clip-vit-base-patch32@abc", ("openai/clip-vit-base-patch32", "abc")),
    ],
)
def test_repository_names_are_split_into_name_and_revision(
    name: str, expected: tuple[str, str], tiny: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch_repository(repo: str, revision: str, cache_dir: Path | None) -> Path:
        asked.append((repo, revision))
        return tiny

    monkeypatch.setattr(hub, "fetch_repository", fetch_repository)
    assert loads(name, state)
    assert asked == [expected]


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32",
        "ViT-B/33",
        "vit-b/32",
        "ViT-L/14@448px",
        "ViT-L/14-336px",
        "ViT-bigG/14",
        "",
        " ",
        "/no/such/folder",
        "./missing",
        "../missing/clip",
        "missing/model.safetensors",
        "~nobody-of-this-name/clip",
        "a/b/c",
        "x" * 5000,
        "null\0byte",
        "http://huggingface.co/openai/clip",
        Path("missing/folder"),
        Path("missing"),
    ],
)
def test_error_for_an_unknown_name_lists_the_known_names(name: str | Path) -> None:
    with pytest.raises(UnknownModelError) as caught:
        miniclip.load(name, "cpu")
    message = str(caught.value)
    assert repr(str(name)) in message
    assert "neither an existing path, nor a known model (ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, demo)" in message
    assert isinstance(caught.value, RuntimeError)  # as in openai/CLIP


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x64"])
def test_error_for_a_resnet_lists_the_vision_transformers(name: str) -> None:
    with pytest.raises(UnknownModelError, match=f"{name} is a ResNet; miniclip has OpenAI's Vision Transformers: "):
        miniclip.load(name, "cpu")


@pytest.mark.parametrize("name", [None, 3, b"ViT-B/32", ["ViT-B/32"]])
def test_name_of_another_type_is_a_type_error(name: Any) -> None:
    with pytest.raises(TypeError):
        miniclip.load(name, "cpu")


def test_folder_of_links_as_in_the_hubs_cache_is_loaded(tiny: Path, tmp_path: Path, state: dict[str, Tensor]) -> None:
    """snapshots/<commit>/ holds only links, such as model.safetensors to ../../blobs/<sha256>."""

    def snapshot(source: Path) -> Path:
        blobs, commit = (tmp_path / "cache" / source.name / part for part in ("blobs", "snapshots/c0ffee"))
        blobs.mkdir(parents=True)
        commit.mkdir(parents=True)
        for file in source.iterdir():
            blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (commit / file.name).symlink_to(os.path.relpath(blob, commit))
        return commit

    commit = snapshot(tiny)
    assert loads(commit, state)
    assert loads(commit / "model.safetensors", state)  # its configuration lies beside the link, not beside the blob
    make_reference().save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    commit = snapshot(tmp_path / "sharded")
    assert loads(commit, state)
    (commit / "config.json").unlink()
    (commit / "config.json").symlink_to("../../blobs/gone")
    with pytest.raises(ConfigError, match="there is no CLIP configuration beside"):
        miniclip.load(commit, "cpu")


# -- options ----------------------------------------------------------------------------------------------------------


def test_jit_is_a_warning(tiny: Path) -> None:
    with pytest.warns(UserWarning, match="jit=True is for openai/CLIP's TorchScript archives: miniclip loads a module"):
        miniclip.load(tiny, "cpu", True)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.int64, torch.bool, torch.complex64, float, 32])
def test_unknown_dtypes_are_refused(dtype: Any, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of torch\.float32, .*torch\.float16, got"):
        miniclip.load(tiny, "cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "cpu:1", torch.device("cpu"), torch.device("cpu", 0)])
def test_cpu_is_known_by_all_its_names(device: Any, tiny: Path) -> None:
    model = miniclip.load(tiny, device)[0]
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.encode_text(miniclip.tokenize("a dog")).shape == (1, 48)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cuda:-1", "CPU", "meta", torch.device("meta"), 1.5, [], True])
def test_unknown_devices_are_refused(device: Any, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown device .*; use 'cpu', 'cuda', 'cuda:N' or 'mps'"):
        miniclip.load(tiny, device)


def test_missing_devices_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0), "mps"):
        with pytest.raises(ConfigError, match=r"there is no device .*: this torch \(2.* sees no (CUDA|MPS)"):
            miniclip.load(tiny, device)
    assert miniclip.load(tiny)[0].device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="there is no device 'cuda:2', only 2 CUDA devices"):
        miniclip.load(tiny, "cuda:2")


@pytest.mark.parametrize("options", [{"device": "gpu"}, {"dtype": "half"}])
def test_options_are_checked_before_any_download(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        miniclip.load("ViT-B/32", **({"device": "cpu"} | options))


def test_fast_is_passed_to_the_model(tiny: Path) -> None:
    assert miniclip.load(tiny, "cpu")[0].fast is True
    assert miniclip.load(tiny, "cpu", fast=False)[0].fast is False


# -- the model --------------------------------------------------------------------------------------------------------


def test_model_is_frozen_and_in_eval_mode(tiny: Path) -> None:
    model = miniclip.load(tiny, "cpu")[0]
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.encode_text(miniclip.tokenize("a dog")).requires_grad
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_loading_draws_no_random_numbers(tiny: Path, state: dict[str, Tensor]) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert loads(tiny, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_is_built_on_the_meta_device(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Spy(CLIP):
        def __init__(self, config: CLIPConfig) -> None:
            super().__init__(config)
            built.append({tensor.device.type for tensor in self.state_dict().values()})

    monkeypatch.setattr(loading, "CLIP", Spy)
    miniclip.load(tiny, "cpu")
    assert built == [{"meta"}]


def file_positions(path: Path) -> dict[str, int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {name: 8 + length + header[name]["data_offsets"][0] for name in header if name != "__metadata__"}


def test_cpu_tensors_are_views_of_the_memory_mapped_file(tiny: Path) -> None:
    """Tensors that need no stacking and no transposing have the same distances in memory as in the file: no copies."""
    model = miniclip.load(tiny, "cpu")[0]
    positions = file_positions(tiny / "model.safetensors")
    views = {
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "vision_model.embeddings.patch_embedding.weight": model.visual.conv1.weight,
        "vision_model.encoder.layers.2.mlp.fc1.weight": model.visual.transformer.resblocks[2].mlp.c_fc.weight,
        "text_model.encoder.layers.1.self_attn.out_proj.weight": model.transformer.resblocks[1].attn.out_proj.weight,
        "logit_scale": model.logit_scale,
    }
    starts = {tensor.data_ptr() - positions[name] for name, tensor in views.items()}
    assert len(starts) == 1
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux lists the mapped files
        (start,) = starts
        mapped = [line for line in maps.read_text().splitlines() if str(tiny / "model.safetensors") in line]
        assert start in [int(line.partition("-")[0], 16) for line in mapped]


def test_changing_the_model_does_not_change_the_file(tiny: Path, state: dict[str, Tensor]) -> None:
    before = (tiny / "model.safetensors").read_bytes()
    model = miniclip.load(tiny, "cpu")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (tiny / "model.safetensors").read_bytes() == before
    assert loads(tiny, state)


def test_parameters_do_not_share_memory(tiny: Path) -> None:
    spans = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes)
        for parameter in miniclip.load(tiny, "cpu")[0].parameters()
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_model_keeps_its_configuration(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    assert miniclip.load(tiny, "cpu")[0].config == config_from_dict(config)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_every_parameter_arrives_on_cuda(dtype: torch.dtype | None, tiny: Path, state: dict[str, Tensor]) -> None:
    for device in (None, "cuda", "cuda:0"):
        model = miniclip.load(tiny, device, dtype=dtype)[0]
        expected = torch.float16 if dtype is None else dtype
        assert model.device == torch.device("cuda", torch.cuda.current_device())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu(), state[name].to(expected)), name


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "clip"))


HALF = (0.5, 0.5, 0.5)
PROCESSOR = {"crop_size": 32, "size": {"shortest_edge": 40}, "image_mean": HALF, "image_std": HALF}


def test_preprocessing_fits_the_model(tiny: Path) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    assert preprocess == Preprocess(32)
    assert model.encode_image(preprocess([Image.new("RGB", (50, 40))])).shape == (1, 48)


@pytest.mark.parametrize(
    ("name", "content"),
    [("preprocessor_config.json", PROCESSOR), ("processor_config.json", {"image_processor": PROCESSOR})],
)
def test_preprocessor_config_beside_the_weights_is_used(name: str, content: Any, folder: Path) -> None:
    (folder / name).write_text(json.dumps(content))
    expected = Preprocess(32, mean=HALF, std=HALF, shortest_edge=40)
    assert miniclip.load(folder, "cpu")[1] == expected
    assert miniclip.load(folder / "model.safetensors", "cpu")[1] == expected
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"image_std": [1.0, 1.0, 1.0]}))
    assert miniclip.load(folder, "cpu")[1] == replace(expected, std=(1.0, 1.0, 1.0))


def test_preprocessing_of_open_clip_is_used(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.5}
    text = {"width": 48, "heads": 3, "layers": 2, "mlp_ratio": 2.0}
    model_cfg = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}
    config: dict[str, Any] = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": HALF, "std": HALF}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert miniclip.load(tmp_path, "cpu")[1] == Preprocess(32, mean=HALF, std=HALF)
    del config["preprocess_cfg"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert miniclip.load(tmp_path, "cpu")[1] == Preprocess(32)


def no_crop(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"do_center_crop": False}


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("preprocessor_config.json", PROCESSOR | {"crop_size": 24}, "crops images to 24 pixels, the model takes 32"),
        ("preprocessor_config.json", no_crop(PROCESSOR), "do_center_crop"),
        ("preprocessor_config.json", [], "expected an object"),
        ("processor_config.json", {"image_processor": []}, "the preprocessing must be an object"),
        ("processor_config.json", {"image_processor": None}, "the preprocessing must be an object"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused(name: str, content: Any, pattern: str, folder: Path) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=pattern) as caught:
        miniclip.load(folder, "cpu")
    assert str(caught.value).count(str(folder / name)) == 1


def test_no_tensor_is_read_before_everything_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **options: object) -> None:
        raise AssertionError("the numbers were read")

    monkeypatch.setattr("miniclip.checkpoint.safe_open", read)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError):
        miniclip.load(folder, "cpu")
    (folder / "preprocessor_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"projection_dim": 9}, {"projection_dim": "x"}, {"model_type": "bert"}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(MiniclipError):
            miniclip.load(folder, "cpu")


def test_errors_are_also_builtin_errors() -> None:
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnknownModelError, RuntimeError)
