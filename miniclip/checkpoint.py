"""Weights on disk: safetensors in Hugging Face's or OpenAI's layout, in one file or several, with every key checked.

Nothing here unpickles. A safetensors file is a JSON header and raw numbers. The header is checked against the length of
the file before any tensor is read. The safetensors library makes most of these checks again when it opens the file; the
checks here exist for their messages, which name the file, the tensor and the numbers.
"""

from __future__ import annotations

import json
import logging
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from miniclip import huggingface, open_clip
from miniclip.config import CLIPConfig, Heads
from miniclip.errors import CheckpointError, ConfigError
from miniclip.files import LARGEST_DESCRIPTION, read_description
from miniclip.shapes import Shape, config_from_shapes

_log = logging.getLogger("miniclip")

#: Tensors of OpenAI's layout that are dropped on purpose. OpenAI's archives store three settings as tensors; open_clip
#: stores its causal mask.
OPENAI_DROPPED = {"input_resolution", "context_length", "vocab_size", "attn_mask"}

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHT_DTYPES = tuple(_TORCH_DTYPES)
# Bytes per number. Tensors that are not weights may be stored as integers.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 300  # characters; messages hold up to 16 names

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
#: The files that may hold the weights, in the order of the search.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file, as the header of the file declares the tensor."""

    path: Path
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Checkpoint:
    """The headers of all tensors, and the configuration beside the weights.

    Attributes:
        path: the file of the weights, or the index of their shards.
        layout: "hf" or "openai".
        headers: by the name of each tensor in its layout. On disk, ``prefix`` may stand before the name.
        config_path: the configuration file, or None if there is none.
        config: its contents.
        prefix: what a training program put before the names, such as "module.".
    """

    path: Path
    layout: str
    headers: Mapping[str, TensorHeader]
    config_path: Path | None
    config: Mapping[str, Any]
    prefix: str = ""

    def clip_config(self, activation: str | None = None, heads: Heads | None = None) -> CLIPConfig:
        """The configuration beside the weights. If there is none, the one that the shapes reveal.

        Args:
            activation: "quick_gelu" or "gelu"; overrides the configuration file.
            heads: one number or (image, text); overrides the configuration file.

        Raises:
            ConfigError: if miniclip cannot follow the configuration, or if there is none and the caller does not give
                what shapes cannot reveal.
        """
        try:
            if self.config_path is None:
                return config_from_shapes(self.shapes(), activation, heads)
            is_open_clip = self.config_path.name == "open_clip_config.json"
            config = (open_clip if is_open_clip else huggingface).config_from_dict(self.config)
            return config.override(activation, heads)
        except ConfigError as error:
            raise ConfigError(f"{self.config_path or self.path}: {error}") from None

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, sorted."""
        return sorted({header.path for header in self.headers.values()})

    def shapes(self) -> dict[str, Shape]:
        """The shapes by OpenAI's names, of all tensors that both layouts store in one piece."""
        shapes = {name: header.shape for name, header in self.headers.items()}
        return shapes if self.layout == "openai" else huggingface.openai_shapes(shapes)

    def fill(self, model: nn.Module, dtype: torch.dtype, device: torch.device, strict: bool = True) -> None:
        """Give a model that was built on the meta device its parameters.

        On the CPU and in the dtype of the file, tensors stay views of the memory-mapped file; only tensors that the
        layout splits or transposes are copied. Writing to a parameter never changes the file. Overwriting the file in
        place while the model is in use does change the model.

        Args:
            model: its state_dict gives the names and shapes that are expected.
            dtype: the dtype of the parameters.
            device: the device of the parameters.
            strict: whether tensors beside the model's are an error.

        Raises:
            CheckpointError: if tensors are missing, unexpected or of the wrong shape. All of them are in one message,
                and no tensor is read before.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.layout == "hf":
            parts = huggingface.stored_parts(expected)
        else:
            parts = {target: {target: shape} for target, shape in expected.items()}
        self._check_tensors({name: shape for part in parts.values() for name, shape in part.items()}, strict)
        state = {}
        try:
            # Tensors that are copied are read through a mapping of their own, so that its pages are freed afterwards.
            mapped, temporary = ({path: safe_open(path, framework="pt") for path in self.files} for _ in range(2))
            for target, part in parts.items():
                transposed = self.layout == "hf" and target in huggingface.TRANSPOSED
                same_dtype = all(_TORCH_DTYPES[self.headers[name].dtype] == dtype for name in part)
                stays_mapped = same_dtype and device.type == "cpu" and len(part) == 1 and not transposed
                tensor = self._read(part, mapped if stays_mapped else temporary)
                state[target] = (tensor.T.contiguous() if transposed else tensor).to(device, dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from None
        model.load_state_dict(state, strict=True, assign=True)

    def _read(self, names: Iterable[str], files: Mapping[Path, Any]) -> torch.Tensor:
        """One tensor of the file, or several stacked into one."""
        tensors = [files[self.headers[name].path].get_tensor(self.prefix + name) for name in names]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def _check_tensors(self, expected: Mapping[str, Shape], strict: bool) -> None:
        """Compare the expected shapes, by the names of the layout, with the headers of the files."""
        dropped = huggingface.dropped_tensors() if self.layout == "hf" else OPENAI_DROPPED
        found = {name: header for name, header in self.headers.items() if name in expected}
        problems = {
            "missing": [name for name in expected if name not in found],
            "unexpected": [name for name in self.headers if strict and name not in expected and name not in dropped],
            "of wrong shape": [
                f"{name} is {header.shape}, expected {expected[name]}"
                for name, header in found.items()
                if header.shape != expected[name]
            ],
            f"stored in another dtype than {', '.join(_WEIGHT_DTYPES)}": [
                f"{name} is {header.dtype}" for name, header in found.items() if header.dtype not in _WEIGHT_DTYPES
            ],
        }
        if any(problems.values()):
            config = f"the configuration in {self.config_path.name}" if self.config_path else "the configuration"
            report = "; ".join(
                f"{len(names)} {kind} ({_first_few(names)})" for kind, names in problems.items() if names
            )
            # Training programs write the state of their optimizer, or a head for another task, beside a whole CLIP.
            left_over = [kind for kind, names in problems.items() if names] == ["unexpected"]
            advice = "; strict=False leaves tensors out that are not the CLIP's" if left_over else ""
            raise CheckpointError(f"{self.path}: the tensors do not fit {config}: {report}{advice}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers, not the numbers, of a checkpoint.

    Args:
        path: a safetensors file, the index of several, or a folder that contains either.

    Raises:
        CheckpointError: for a pickle, a damaged file, other tensors than a CLIP's, or a folder without weights.
        ConfigError: for a configuration or an index that is not JSON.
    """
    try:
        if path.is_dir():
            path = _weights_in(path)
        headers = _read_headers(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    if adapters := [name for name in headers if re.search(r"(^|\.)(lora_|base_layer\.|modules_to_save\.)", name)]:
        raise CheckpointError(
            f"{path}: holds {len(adapters)} tensors of an adapter ({_first_few(adapters)}): merge the adapter into the "
            "model before it is saved, with merge_and_unload()"
        )
    prefix = _prefix(path, headers)
    if prefix:
        _log.info("%s: the names of the tensors begin with %r, which is left out", path, prefix)
        headers = {name.removeprefix(prefix): header for name, header in headers.items()}
    layout = _layout(headers)
    if layout is None:
        found = f"the first names are {', '.join(list(headers)[:3])}" if headers else "there are none"
        raise CheckpointError(f"{path}: the tensors are not those of a CLIP ({found})")
    config_names = ["config.json", "open_clip_config.json"]
    for name in config_names if layout == "hf" else config_names[::-1]:
        config_path = path.parent / name
        if config_path.is_file():
            config = read_json(config_path)
            if name == "open_clip_config.json" or huggingface.is_clip_config(config):
                return Checkpoint(path, layout, headers, config_path, config, prefix)
    return Checkpoint(path, layout, headers, None, {}, prefix)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors that a safetensors file declares, checked against the length of the file.

    The format has three parts: eight bytes with the length of the header, little-endian; the header as JSON; the
    numbers without gaps (https://github.com/huggingface/safetensors#format).

    Raises:
        CheckpointError: if the file is truncated, too long, or not safetensors.
        OSError: if the file cannot be opened.
    """
    header, start = _read_json_header(path)
    header.pop("__metadata__", None)
    headers: dict[str, TensorHeader] = {}
    spans: list[tuple[int, int, str]] = []
    for name, info in header.items():
        if not name.isprintable() or len(name) > _LONGEST_NAME or not _describes_tensor(info):
            raise CheckpointError(f"{path}: the header is damaged at {name[:_LONGEST_NAME]!r}: {reprlib.repr(info)}")
        dtype, shape, (first, last) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        if dtype not in _BYTES:
            raise CheckpointError(
                f"{path}: {name} is stored as {reprlib.repr(dtype)}; miniclip reads {', '.join(_WEIGHT_DTYPES)}"
            )
        if last - first != _BYTES[dtype] * math.prod(shape):
            raise CheckpointError(f"{path}: damaged: {name}, {dtype} {shape}, does not fit bytes {first} to {last}")
        headers[name] = TensorHeader(path, dtype, shape)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise CheckpointError(f"{path}: damaged: {name} starts at byte {first}, the tensor before it ends at {end}")
        end = last
    if (size := path.stat().st_size) != start + end:
        raise CheckpointError(f"{path}: damaged: the file has {size} bytes, its header needs {start + end}")
    return headers


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: if the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        data = read_description(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def non_finite(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The parameters that contain NaN or infinity, each with the number of such values."""
    for name, tensor in model.state_dict().items():
        if bad := int((~tensor.isfinite()).sum()):
            yield name, bad


def pickle_refusal(name: str) -> str | None:
    """Why miniclip does not read a file of this name; None if the name is not a pickle's."""
    if Path(name).suffix.lower() not in _PICKLES:
        return None
    return (
        f"{name} is a pickle. Opening a pickle can run code, so miniclip does not read it. Convert it once: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def _refuse_pickle(path: Path) -> None:
    if refusal := pickle_refusal(path.name):
        raise CheckpointError(f"{path.parent}: {refusal}")


# -- finding the files ------------------------------------------------------------------------------------------------


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if len(found) > 1:
        # timm's repositories have only the image tower in model.safetensors, and the CLIP in
        # open_clip_model.safetensors.
        return next((path for path in found if _layout(_read_headers(path))), found[0])
    if found:
        return found[0]
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if len(others) > 1:
        raise CheckpointError(f"{folder}: holds {len(others)} safetensors files, name one ({_first_few(others)})")
    if others:
        return folder / others[0]
    for path in sorted(folder.iterdir()):
        _refuse_pickle(path)
    raise CheckpointError(f"{folder}: holds no weights; expected one of {', '.join(WEIGHTS)}")


def _read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file, or of all the shards of an index."""
    _refuse_pickle(path)
    if not path.name.endswith(".index.json"):
        return read_header(path)
    weight_map = _weight_map(path)
    headers: dict[str, TensorHeader] = {}
    for shard in shard_names(path):
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: the shard {shard!r} is missing")
        for name, header in read_header(path.parent / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path}: {name} is in {shard}, the index says {weight_map.get(name, 'nothing')}")
            headers[name] = header
    if lost := [name for name in weight_map if name not in headers]:
        raise CheckpointError(f"{path}: {len(lost)} tensors are missing from the shards ({_first_few(lost)})")
    return headers


def shard_names(path: Path) -> list[str]:
    """The names of the shards in an index. All shards are in the folder of the index.

    Raises:
        CheckpointError: for a name that leaves the folder, or names a pickle.
        ConfigError: if the index is not JSON.
    """
    shards = sorted(set(_weight_map(path).values()))
    for shard in shards:
        # Only the name is judged, not the target of a link: in the Hub's cache every file links out of its folder.
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
    """The header, and the position of the first byte after it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` to fetch them")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not safetensors: the file has {size} bytes, its header needs "
                f"{8 + length if size >= 8 else 8}"
            )
        if length > LARGEST_DESCRIPTION:
            raise CheckpointError(
                f"{path}: the header would have {length} bytes, the most is {LARGEST_DESCRIPTION}: the file is not a "
                "CLIP's, or not safetensors"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is damaged, or the file is not safetensors ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is damaged, or the file is not safetensors (expected a JSON object)")
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


# -- names ------------------------------------------------------------------------------------------------------------


def _layout(names: Iterable[str]) -> str | None:
    """The layout, "hf" or "openai", from the names of the tensors; None if they are not a CLIP's."""
    towers = {name.partition(".")[0] for name in names}
    if towers & {"vision_model", "text_model"}:
        return "hf"
    return "openai" if "visual" in towers else None


def _prefix(path: Path, names: Iterable[str]) -> str:
    """What stands before the names of a known layout: "module." of DataParallel, "_orig_mod." of torch.compile.

    Every CLIP has one tensor called logit_scale, in both layouts.

    Raises:
        CheckpointError: if there are several models.
    """
    names = list(names)
    prefixes = [name.removesuffix("logit_scale") for name in names if name.split(".")[-1] == "logit_scale"]
    found = [
        prefix
        for prefix in prefixes
        if _layout(name.removeprefix(prefix) for name in names if name.startswith(prefix)) is not None
    ]
    if len(found) > 1:
        models = ", ".join(f"{prefix}logit_scale" for prefix in found[:4])
        raise CheckpointError(f"{path}: holds {len(found)} models ({models}): save one of them alone")
    return found[0] if found else ""


def _first_few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
