"""manifest.json: which model, weights and settings the vectors of a folder were computed with.

Two runs may add to one folder only if their vectors can be compared with each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch

from miniclip.errors import ConfigError
from miniclip.files import atomic_write, read_description
from miniclip.hub import BUNDLED
from miniclip.huggingface import preprocess_to_dict
from miniclip.loading import weights_files, weights_sha256
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.version import __version__

MANIFEST = "manifest.json"
_MEMORY = ".weights.json"  # which files had which checksum when they were last read
_FORMAT = 3
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def canonical_name(name: str | os.PathLike[str]) -> str:
    """A model's name that means the same in every working folder: paths become absolute, other names stay."""
    text = os.fspath(name)
    path = os.path.expanduser(text)
    return os.path.abspath(path) if text not in BUNDLED and os.path.exists(path) else text


def model_fingerprint(
    name: str | os.PathLike[str], model: CLIP, preprocess: Preprocess, sha256: str | None = None
) -> dict[str, Any]:
    """Everything about the model that changes the vector of an image. ``sha256`` of the weights spares reading them."""
    return {
        "model": canonical_name(name),
        "weights_sha256": sha256 or weights_sha256(name),
        "config": asdict(model.config),
        "preprocess": {**preprocess_to_dict(preprocess), "convention": preprocess.convention},
    }


def remembered_sha256(folder: Path, name: str | os.PathLike[str]) -> str:
    """``weights_sha256(name)``, from the folder's memory if the files have the same size, time and inode as then.

    Reading the weights takes longer than a search. A folder that cannot be written remembers nothing.
    """
    statuses = [path.stat() for path in weights_files(name)]
    files = [[status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino] for status in statuses]
    memory = folder / _MEMORY
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        seen = json.loads(read_description(memory).decode("utf-8"))
        if seen["files"] == files and re.fullmatch("[0-9a-f]{64}", seen["sha256"]):
            return str(seen["sha256"])
    sha256 = weights_sha256(name)
    with contextlib.suppress(OSError):
        atomic_write(memory, json.dumps({"files": files, "sha256": sha256}).encode())
    return sha256


class Settings(NamedTuple):
    """What a run was told about how to compute vectors. The model's own numbers are in ``model_fingerprint``."""

    model: str | os.PathLike[str] = "ViT-B/32"
    dtype: torch.dtype | None = None  # None: as ``load`` chooses
    batch_size: int = 32
    shard_size: int = 1_000
    fast_decode: bool = False


def complete_settings(manifest: Mapping[str, Any] | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a run: those that are given, else those of the manifest, else the defaults.

    Args:
        manifest: that of the folder the run adds to, if the folder has one.
        given: the fields of ``Settings``. None stands for one that was not given.

    Raises:
        ConfigError: if the manifest lacks a setting, or has one of another type.
    """
    known: dict[str, Any] = {}
    if manifest is not None:
        known = {name: manifest.get(name) for name in Settings._fields}
        types = {"model": str, "dtype": str, "batch_size": int, "shard_size": int, "fast_decode": bool}
        for name, kind in types.items():
            value, right = known[name], type(known[name]) is kind
            if not right or (kind is int and value < 1) or (name == "dtype" and value not in _DTYPES):
                raise ConfigError(f"{MANIFEST} has no valid {name}: {value!r:.80}")
        known["dtype"] = getattr(torch, known["dtype"])
    return Settings(**known | {name: value for name, value in given.items() if value is not None})


def run_settings(chosen: Settings, model: CLIP, preprocess: Preprocess) -> dict[str, Any]:
    """Everything that must be equal in all runs that add to one folder.

    The batch size is included, because the same image in batches of different sizes is rounded differently.
    """
    return {
        **model_fingerprint(chosen.model, model, preprocess),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": chosen.batch_size,
        "shard_size": chosen.shard_size,
        "fast_decode": chosen.fast_decode,
    }


def encode_manifest(settings: Mapping[str, Any]) -> bytes:
    """The content of manifest.json: the settings of a run, and the versions of the libraries."""
    versions = {
        "miniclip": __version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    manifest = {"format": _FORMAT, **settings, "embedding_dtype": "float16", "normalised": True, "versions": versions}
    return (json.dumps(manifest, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if the folder has none.

    Raises:
        ConfigError: if the file cannot be read, or another version of miniclip wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_description(path).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}): restore the file, or embed into another folder") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ConfigError(f"{path} is not a manifest of this version of miniclip (format {_FORMAT})")
    return manifest


def describe_difference(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """How the settings differ from the manifest: ``model 'ViT-B/32', not 'demo'``. None if they are equal.

    Two checksums of 64 digits tell a reader nothing, so the message has the names of the models.
    """
    difference = first_difference(manifest, settings)
    if difference is None:
        return None
    name, before, now = difference
    if name == "weights_sha256":
        old, new = manifest.get("model"), settings["model"]
        return f"model {old!r:.300}, not {new!r:.300}" if old != new else f"other weights of the model {old!r:.300}"
    return f"{name} {before!r:.300}, not {now!r:.300}"


def first_difference(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first of ``settings`` that differs from the manifest: its name, the manifest's value, the new value.

    The name of the model is not compared: the model may have moved, and the checksum identifies its weights.
    """
    compared = {name: value for name, value in settings.items() if name != "model"}
    as_read = json.loads(json.dumps(compared))  # JSON turns tuples into lists
    return _first_difference(dict(manifest), as_read)


def _first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (name, old, new)
    for key, value in new.items():
        if difference := _first_difference(old.get(key), value, f"{name}.{key}".lstrip(".")):
            return difference
    return None
