"""Weights on disk: safetensors in Hugging Face's or OpenAI's layout, one file or many, every key accounted for.

Nothing here unpickles: a safetensors file is a JSON header and raw numbers, and the header is checked against the
file's length before a tensor is touched.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from miniclip.config import CLIPConfig, Heads
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


def _blocks(hf: str, openai: str) -> dict[str, str]:
    return {f"{hf}.{{}}.{name}": f"{openai}.{{}}.{target}" for name, target in _BLOCK.items()}


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
    **_blocks("vision_model.encoder.layers", "visual.transformer.resblocks"),
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.position_ids": None,
    **_blocks("text_model.encoder.layers", "transformer.resblocks"),
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}

#: Stored by Hugging Face as the weight of a Linear, by OpenAI as the matrix that x is multiplied with.
TRANSPOSED = {"visual.proj", "text_projection"}

#: Dropped on purpose from OpenAI's layout: facts of the configuration that its archives carry as tensors, and
#: open_clip's mask.
OPENAI_DROPPED = {"input_resolution", "context_length", "vocab_size", "attn_mask"}

# The number of a block in either layout's names.
_BLOCK_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=\.resblocks\.)\d+(?=\.)")

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHT_DTYPES = tuple(_TORCH)
# Bytes per number. What is no weight may be stored as an integer.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit; a CLIP's takes some 50,000
_MOST_DIMENSIONS = 8

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
#: The files weights are looked for in, in this order.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file, as its header declares it."""

    path: Path
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by the name they have on disk, in the "hf" or the "openai" layout, and the configuration beside them."""

    path: Path
    layout: str
    entries: Mapping[str, Entry]
    config_path: Path | None
    config: Mapping[str, Any]

    def clip_config(self, activation: str | None = None, heads: Heads | None = None) -> CLIPConfig:
        """The configuration beside the weights, or, without one, what the shapes reveal. What the caller says, wins.

        Raises:
            ConfigError: if it is not one miniclip can follow, or nobody says what no shape reveals.
        """
        try:
            if self.config_path is None:
                return CLIPConfig.from_shapes(self.shapes(), activation, heads)
            is_open_clip = self.config_path.name == "open_clip_config.json"
            config = CLIPConfig.from_open_clip(self.config) if is_open_clip else CLIPConfig.from_hf(self.config)
            return config.override(activation, heads)
        except ConfigError as error:
            raise ConfigError(f"{self.config_path or self.path}: {error}") from None

    @property
    def files(self) -> list[Path]:
        """The files the tensors are in, sorted."""
        return sorted({entry.path for entry in self.entries.values()})

    def shapes(self) -> dict[str, Shape]:
        """The shapes under OpenAI's names, of all tensors that both layouts keep whole."""
        if self.layout == "openai":
            return {name: entry.shape for name, entry in self.entries.items()}
        whole = {names[0]: target for target, names in _hf_names().items() if len(names) == 1}
        shapes = {}
        for name, entry in self.entries.items():
            row, number = _split(name)
            if target := whole.get(row):
                shapes[target.format(number)] = entry.shape[::-1] if target in TRANSPOSED else entry.shape
        return shapes

    def fill(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Give a model built on the meta device its parameters, in ``dtype`` on ``device``.

        On the CPU, in the dtype of the file, tensors stay views of the memory-mapped file; only those that the layout
        splits up or transposes are copied. Writing to a parameter never reaches the file; a file that is overwritten in
        place while the model is in use does reach the model.

        Raises:
            CheckpointError: naming all missing, unexpected and wrong-shape tensors, before anything is read.
        """
        parts = self._parts({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        self._account_for({name: shape for part in parts.values() for name, shape in part.items()})
        state = {}
        try:
            paths = {entry.path for entry in self.entries.values()}
            # What is copied is read through mappings of its own, whose pages leave memory with them.
            kept, passing = ({path: safe_open(path, framework="pt") for path in paths} for _ in range(2))
            for target, part in parts.items():
                turned = self.layout == "hf" and target in TRANSPOSED
                as_it_is = all(_TORCH[self.entries[name].dtype] == dtype for name in part) and device.type == "cpu"
                files: dict[Path, Any] = kept if as_it_is and len(part) == 1 and not turned else passing
                tensors = [files[self.entries[name].path].get_tensor(name) for name in part]
                tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
                state[target] = (tensor.T.contiguous() if turned else tensor).to(device, dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from None
        model.load_state_dict(state, strict=True, assign=True)

    def _parts(self, expected: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
        """What each of OpenAI's tensors is on disk: the names, in stacking order, and the shapes of its parts."""
        if self.layout == "openai":
            return {target: {target: shape} for target, shape in expected.items()}
        rows = _hf_names()
        parts = {}
        for target, shape in expected.items():
            row, number = _split(target)
            names = [name.format(number) for name in rows[row]]
            if target in TRANSPOSED:
                shape = shape[::-1]
            if len(names) > 1:
                shape = (shape[0] // len(names), *shape[1:])
            parts[target] = dict.fromkeys(names, shape)
        return parts

    def _account_for(self, wanted: Mapping[str, Shape]) -> None:
        """Compare the shapes that are wanted, by the names on disk, with what there is."""
        hf_dropped = {name for name, target in HF_TO_OPENAI.items() if target is None}
        dropped = hf_dropped if self.layout == "hf" else OPENAI_DROPPED
        found = {name: entry for name, entry in self.entries.items() if name in wanted}
        problems = {
            "missing": [name for name in wanted if name not in found],
            "unexpected": [name for name in self.entries if name not in wanted and name not in dropped],
            "of wrong shape": [
                f"{name} is {entry.shape}, expected {wanted[name]}"
                for name, entry in found.items()
                if entry.shape != wanted[name]
            ],
            f"stored as none of {', '.join(_WEIGHT_DTYPES)}": [
                f"{name} is {entry.dtype}" for name, entry in found.items() if entry.dtype not in _WEIGHT_DTYPES
            ],
        }
        if any(problems.values()):
            config = f"the configuration in {self.config_path.name}" if self.config_path else "the configuration"
            report = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names)
            raise CheckpointError(f"{self.path}: the tensors do not fit {config}: {report}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers, not the numbers, of a safetensors file, a sharded index, or the folder that holds either.

    Raises:
        CheckpointError: for a pickle, a damaged file, other tensors than a CLIP's, or a folder without weights.
        ConfigError: for a configuration or an index that is not JSON.
    """
    try:
        if path.is_dir():
            path = _weights_in(path)
        entries = _read_entries(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    layout = _layout(entries)
    if layout is None:
        first = ", ".join(list(entries)[:3]) or "none at all"
        raise CheckpointError(f"{path}: these are not the tensors of a CLIP (the first are {first})")
    config_names = ["config.json", "open_clip_config.json"]
    for name in config_names if layout == "hf" else config_names[::-1]:
        config_path = path.parent / name
        if config_path.is_file():
            config = read_json(config_path)
            if name == "open_clip_config.json" or _is_transformers(config):
                return Checkpoint(path, layout, entries, config_path, config)
    return Checkpoint(path, layout, entries, None, {})


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors a safetensors file declares, checked against its length.

    The format: eight bytes of header length, little-endian; the header as JSON; the numbers, without gaps
    (https://github.com/huggingface/safetensors#format).

    Raises:
        CheckpointError: if the file is truncated, padded, or not safetensors.
        OSError: if it cannot be opened.
    """
    header, start = _read_json_header(path)
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, info in header.items():
        if not name.isprintable() or not _describes_tensor(info):
            raise CheckpointError(f"{path}: its header is damaged at {name!r}: {reprlib.repr(info)}")
        dtype, shape, (first, last) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        if dtype not in _BYTES:
            raise CheckpointError(f"{path}: {name} is stored as {dtype!r}; miniclip reads {', '.join(_WEIGHT_DTYPES)}")
        if last - first != _BYTES[dtype] * math.prod(shape):
            raise CheckpointError(f"{path}: damaged: {name}, {dtype} {shape}, cannot lie at bytes {first} to {last}")
        entries[name] = Entry(path, dtype, shape)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise CheckpointError(f"{path}: damaged: {name} starts at byte {first}, the tensor before it ends at {end}")
        end = last
    if (size := path.stat().st_size) != start + end:
        raise CheckpointError(f"{path}: damaged: the file has {size} bytes, its header needs {start + end}")
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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def non_finite(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The parameters that hold NaN or infinity, each with how many."""
    for name, tensor in model.state_dict().items():
        if bad := int((~tensor.isfinite()).sum()):
            yield name, bad


def pickle_refusal(name: str) -> str | None:
    """Why a file of this name is not read, or None if it is no pickle."""
    if Path(name).suffix.lower() not in _PICKLES:
        return None
    return (
        f"{name} is a pickle, which can run code when it is opened, so miniclip reads none. Convert it once: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def _refuse_pickle(path: Path) -> None:
    if refusal := pickle_refusal(path.name):
        raise CheckpointError(f"{path.parent}: {refusal}")


# -- finding the files ------------------------------------------------------------------------------------------------


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if len(found) > 1:
        # timm's repositories keep the image tower alone in model.safetensors, the CLIP in open_clip_model.safetensors
        return next((path for path in found if _layout(_read_entries(path))), found[0])
    if found:
        return found[0]
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if len(others) > 1:
        raise CheckpointError(f"{folder}: holds {len(others)} safetensors files, name one ({_some(others)})")
    if others:
        return folder / others[0]
    for path in sorted(folder.iterdir()):
        _refuse_pickle(path)
    raise CheckpointError(f"{folder}: holds no weights; expected one of {', '.join(WEIGHTS)}")


def _is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is transformers'. Read as one, timm's would be a CLIP with nothing but default values."""
    return any(key.startswith(("model_type", "vision_config", "text_config")) for key in config)


def _read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of one file, or of all the shards of an index."""
    _refuse_pickle(path)
    if not path.name.endswith(".index.json"):
        return read_header(path)
    weight_map = _weight_map(path)
    entries: dict[str, Entry] = {}
    for shard in shard_names(path):
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: the shard {shard!r} is missing")
        for name, entry in read_header(path.parent / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path}: {name} is in {shard}, the index says {weight_map.get(name, 'nothing')}")
            entries[name] = entry
    if lost := [name for name in weight_map if name not in entries]:
        raise CheckpointError(f"{path}: {len(lost)} tensors are not in the shards the index names ({_some(lost)})")
    return entries


def shard_names(path: Path) -> list[str]:
    """The files that an index names, all of them in its own folder.

    Raises:
        CheckpointError: for a name that leads elsewhere, or to a pickle.
        ConfigError: if the index is not JSON.
    """
    shards = sorted(set(_weight_map(path).values()))
    for shard in shards:
        # The name is judged, not where it leads: in the Hub's cache every file is a link out of its folder.
        if shard in ("", ".", "..") or re.search(r"[/\\:]", shard):
            raise CheckpointError(f"{path}: the shard name {shard!r} leaves the folder")
        _refuse_pickle(path.parent / shard)
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensor names to file names")
    return weight_map


# -- reading headers --------------------------------------------------------------------------------------------------


def _read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands, and the byte behind it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{path}: is Git LFS's stand-in for the weights; `git lfs pull` fetches them")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not safetensors: the file has {size} bytes, its header needs "
                f"{8 + length if size >= 8 else 8}"
            )
        if length > _LARGEST_HEADER:
            raise CheckpointError(f"{path}: not safetensors: its header would have {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged, or it is not safetensors ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is damaged, or it is not safetensors (a JSON object is expected)")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _describes_tensor(info: object) -> bool:
    return (
        isinstance(info, dict)
        and info.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(info["dtype"], str)
        and _are_naturals(info["shape"])
        and len(info["shape"]) <= _MOST_DIMENSIONS
        and _are_naturals(info["data_offsets"])
        and len(info["data_offsets"]) == 2
    )


def _are_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


# -- writing ----------------------------------------------------------------------------------------------------------


def hf_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP's state_dict as Hugging Face stores it: under its names, contiguous, on the CPU, sharing no memory."""
    rows = _hf_names()
    tensors = {}
    for target, tensor in state.items():
        row, number = _split(target)
        tensor = tensor.detach().cpu()
        names = rows[row]
        parts = tensor.chunk(len(names)) if len(names) > 1 else [tensor.T if target in TRANSPOSED else tensor]
        for name, part in zip(names, parts, strict=True):
            tensors[name.format(number)] = part.clone(memory_format=torch.contiguous_format)
    return tensors


# -- names ------------------------------------------------------------------------------------------------------------


def _layout(names: Iterable[str]) -> str | None:
    """ "hf" or "openai", by the names of the tensors; None if they are not a CLIP's."""
    towers = {name.partition(".")[0] for name in names}
    if towers & {"vision_model", "text_model"}:
        return "hf"
    return "openai" if "visual" in towers else None


def _hf_names() -> dict[str, list[str]]:
    """The table from the other side: each of OpenAI's names and the Hugging Face tensors it is stacked from."""
    names = defaultdict(list)
    for name, target in HF_TO_OPENAI.items():
        if target is not None:
            names[target].append(name)
    return dict(names)


def _split(name: str) -> tuple[str, str]:
    """A name as its row of the table and the number of the block: "text_model.encoder.layers.{}.mlp.fc1.bias", "11"."""
    number = _BLOCK_NUMBER.search(name)
    return (name[: number.start()] + "{}" + name[number.end() :], number.group()) if number else (name, "")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
