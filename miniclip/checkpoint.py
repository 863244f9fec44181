"""Weights on disk: safetensors in Hugging Face's or OpenAI's layout, one file or many, every key accounted for.

Nothing here unpickles: a safetensors file is a JSON header and raw numbers, and the header is checked against the
file's length before a tensor is touched.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from miniclip.config import CLIPConfig
from miniclip.errors import CheckpointError, ConfigError

# One row of both towers' blocks, Hugging Face's name -> OpenAI's.
_BLOCK = {
    "layer_norm1.weight": "ln_1.weight",
    "layer_norm1.bias": "ln_1.bias",
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj.weight": "attn.out_proj.weight",
    "self_attn.out_proj.bias": "attn.out_proj.bias",
    "layer_norm2.weight": "ln_2.weight",
    "layer_norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}

#: Hugging Face's name -> OpenAI's, "{}" standing for the layer and None for what is dropped on purpose. Where several
#: names lead to one, their rows are stacked in the order of this table (query, key, value).
HF_TO_OPENAI: dict[str, str | None] = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.position_ids": None,  # 0, 1, 2, …, saved by old versions of transformers
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    **{f"vision_model.encoder.layers.{{}}.{hf}": f"visual.transformer.resblocks.{{}}.{ours}" for hf, ours in _BLOCK.items()},
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.position_ids": None,
    **{f"text_model.encoder.layers.{{}}.{hf}": f"transformer.resblocks.{{}}.{ours}" for hf, ours in _BLOCK.items()},
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}

#: Stored by Hugging Face as the weight of a Linear, by OpenAI as the matrix that x is multiplied with.
TRANSPOSED = {"visual.proj", "text_projection"}

#: In OpenAI's layout: facts of the configuration that its archives carry as tensors, and open_clip's mask.
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
_OTHER_DTYPES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
#: The files weights are looked for in, in this order.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")
_CONFIGS = ("config.json", "open_clip_config.json")


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by the name they have on disk, and the folder's configuration files."""

    path: Path
    entries: Mapping[str, Entry]
    config_path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """ "hf" or "openai", by the names of the tensors."""
        if any(name.startswith(("vision_model.", "text_model.")) for name in self.entries):
            return "hf"
        if any(name.startswith("visual.") for name in self.entries):
            return "openai"
        first = ", ".join(list(self.entries)[:3]) or "none at all"
        raise CheckpointError(f"{self.path}: these are not the tensors of a CLIP (the first are {first})")

    def sources(self) -> tuple[dict[str, list[str]], list[str]]:
        """The names on disk that make up each of OpenAI's names, in stacking order; and those that belong nowhere."""
        sources: dict[str, list[str]] = defaultdict(list)
        unknown = []
        if self.layout == "openai":
            return {name: [name] for name in self.entries if name not in _NOT_WEIGHTS}, []
        order = {name: position for position, name in enumerate(HF_TO_OPENAI)}
        rows = []
        for name in self.entries:
            layer = re.search(r"(?<=\.layers\.)\d+(?=\.)", name)
            row = name[: layer.start()] + "{}" + name[layer.end() :] if layer else name
            if row not in HF_TO_OPENAI:
                unknown.append(name)
            elif (target := HF_TO_OPENAI[row]) is not None:
                rows.append((order[row], target.format(layer.group() if layer else ""), name))
        for _, target, name in sorted(rows):
            sources[target].append(name)
        return dict(sources), unknown

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors under OpenAI's names."""
        return {target: self._shape_of(target, names) for target, names in self.sources()[0].items()}

    def _shape_of(self, target: str, names: list[str]) -> tuple[int, ...]:
        shape = self.entries[names[0]].shape
        if self.layout == "hf" and target in TRANSPOSED:
            return shape[::-1]
        return (sum(self.entries[name].shape[0] for name in names), *shape[1:]) if len(names) > 1 else shape

    def fill(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Give a model built on the meta device its parameters, in ``dtype`` on ``device``.

        On the CPU, and in the dtype of the file, tensors stay views of the memory-mapped file.

        Raises:
            CheckpointError: naming all missing, unexpected and wrong-shape tensors, before anything is read.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        sources, unexpected = self.sources()
        self._account_for(expected, sources, unexpected)
        files = {path: safe_open(path, framework="pt") for path in {entry.path for entry in self.entries.values()}}

        def read(name: str) -> Tensor:
            tensor: Tensor = files[self.entries[name].path].get_tensor(name)
            return tensor

        state = {}
        for target, names in sources.items():
            tensor = torch.cat([read(name) for name in names]) if len(names) > 1 else read(names[0])
            if self.layout == "hf" and target in TRANSPOSED:
                tensor = tensor.T.contiguous()
            state[target] = tensor.to(device, dtype)
        model.load_state_dict(state, strict=True, assign=True)

    def _account_for(
        self, expected: Mapping[str, tuple[int, ...]], sources: Mapping[str, list[str]], unexpected: list[str]
    ) -> None:
        wanted: dict[str, tuple[int, ...]] = {}  # by the names of this layout
        for target, shape in expected.items():
            for name in _names_on_disk(target) if self.layout == "hf" else [target]:
                if self.layout == "hf" and target in TRANSPOSED:
                    wanted[name] = shape[::-1]
                elif name.split(".")[-2:-1] and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                    wanted[name] = (shape[0] // 3, *shape[1:])
                else:
                    wanted[name] = shape
        present = [name for names in sources.values() for name in names]
        missing = [name for name in wanted if name not in self.entries]
        unexpected = unexpected + [name for name in present if name not in wanted]
        wrong = [
            f"{name} is {self.entries[name].shape}, expected {wanted[name]}"
            for name in present
            if name in wanted and self.entries[name].shape != wanted[name]
        ]
        problems = [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of wrong shape", wrong))
            if names
        ]
        if problems:
            config = f"the configuration in {self.config_path.name}" if self.config_path else "a CLIP"
            raise CheckpointError(f"{self.path}: the tensors do not fit {config}: {'; '.join(problems)}")
        for name in present:
            if (dtype := self.entries[name].dtype) not in _DTYPES:
                raise CheckpointError(f"{self.path}: {name} is stored as {dtype}; miniclip reads {', '.join(_DTYPES)}")

    def clip_config(self, activation: str | None = None, heads: int | tuple[int, int] | None = None) -> CLIPConfig:
        """The configuration beside the weights, or, without one, what the shapes and the caller say."""
        if self.config_path is None:
            try:
                return CLIPConfig.from_shapes(self.shapes(), activation, heads)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {error}") from None
        try:
            if self.config_path.name == "open_clip_config.json":
                return CLIPConfig.from_open_clip(self.config)
            return CLIPConfig.from_hf(self.config)
        except ConfigError as error:
            raise ConfigError(f"{self.config_path}: {error}") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers, not the numbers, of a safetensors file, a sharded index, or the folder that holds either.

    Raises:
        CheckpointError: for a pickle, a damaged file, or a folder without weights.
        ConfigError: for a configuration file that is not JSON.
    """
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(".index.json"):
        entries = _read_index(path)
    else:
        _refuse_pickle(path)
        entries = read_header(path)
    checkpoint = Checkpoint(path, entries)
    preferred = _CONFIGS if checkpoint.layout == "hf" else _CONFIGS[::-1]
    for name in preferred:
        if (config_path := path.parent / name).is_file():
            return Checkpoint(path, entries, config_path, read_json(config_path))
    return checkpoint


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors a safetensors file declares, checked against its length.

    The format: eight bytes of header length, little-endian; the header as JSON; the numbers
    (https://github.com/huggingface/safetensors#format).

    Raises:
        CheckpointError: if the file is truncated, padded, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_length = int.from_bytes(start, "little")
            if size < 8 or header_length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated or not safetensors: the file has {size} bytes, its header needs "
                    f"{8 + header_length if len(start) == 8 else 8}"
                )
            header = json.loads(file.read(header_length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # json's, and unicode's
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header is not JSON, so it is damaged or not safetensors") from None
    entries: dict[str, Entry] = {}
    end = 0
    try:
        header.pop("__metadata__", None)
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (first, last) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
            width = _DTYPES.get(dtype) or _OTHER_DTYPES.get(dtype)
            if first != end or (width and last - first != width * math.prod(shape)):
                raise CheckpointError(f"{path}: {name}, {dtype} {shape}, cannot lie at bytes {first} to {last}")
            entries[name] = Entry(path, dtype, shape)
            end = last
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header does not describe tensors") from None
    if size != 8 + header_length + end:
        raise CheckpointError(f"{path}: damaged: the file has {size} bytes, its header needs {8 + header_length + end}")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: if it cannot be read as one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def non_finite(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The parameters that hold NaN or infinity, each with how many."""
    for name, tensor in model.state_dict().items():
        if bad := int((~tensor.isfinite()).sum()):
            yield name, bad


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(f"{folder}: holds {len(others)} safetensors files, name one ({_some([p.name for p in others])})")
    for pickle in sorted(folder.iterdir()):
        _refuse_pickle(pickle)
    raise CheckpointError(f"{folder}: holds no weights; expected one of {', '.join(WEIGHTS)}")


def pickle_refusal(name: str) -> str | None:
    """Why a file of this name is not read, or None if it is no pickle."""
    if Path(name).suffix not in _PICKLES:
        return None
    return (
        f"{name} is a pickle, which can run code when it is opened, so miniclip reads none. Convert it once: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def _refuse_pickle(path: Path) -> None:
    if refusal := pickle_refusal(path.name):
        raise CheckpointError(f"{path.parent}: {refusal}")


def _read_index(path: Path) -> dict[str, Entry]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensor names to file names")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        # The name is judged, not where it leads: in the Hub's cache every file is a link out of its folder.
        if shard in ("", ".", "..") or re.search(r"[/\\:]", shard):
            raise CheckpointError(f"{path}: the shard name {shard!r} leaves the folder")
        _refuse_pickle(path.parent / shard)
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: the shard {shard} is missing")
        for name, entry in read_header(path.parent / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path}: {name} is in {shard}, the index says {weight_map.get(name, 'nothing')}")
            entries[name] = entry
    if lost := [name for name in weight_map if name not in entries]:
        raise CheckpointError(f"{path}: {len(lost)} tensors are not in the shards the index names ({_some(lost)})")
    return entries


def _names_on_disk(target: str) -> list[str]:
    """Hugging Face's names of one of OpenAI's tensors."""
    layer = re.search(r"(?<=\.resblocks\.)\d+(?=\.)", target)
    row = target[: layer.start()] + "{}" + target[layer.end() :] if layer else target
    return [hf.format(layer.group() if layer else "") for hf, ours in HF_TO_OPENAI.items() if ours == row]


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
