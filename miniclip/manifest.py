"""manifest.json: which model, weights and settings the vectors of a folder were computed with.

Two runs may add to one folder only if their vectors can be compared with each other.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from miniclip.errors import ConfigError
from miniclip.hub import BUNDLED
from miniclip.huggingface import preprocess_to_dict
from miniclip.loading import weights_sha256
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.version import __version__

MANIFEST = "manifest.json"
_FORMAT = 1


def canonical_name(name: str | os.PathLike[str]) -> str:
    """A model's name that means the same in every working folder: paths become absolute, other names stay."""
    text = os.fspath(name)
    path = os.path.expanduser(text)
    return os.path.abspath(path) if text not in BUNDLED and os.path.exists(path) else text


def model_fingerprint(name: str | os.PathLike[str], model: CLIP, preprocess: Preprocess) -> dict[str, Any]:
    """Everything about the model that changes the vector of an image."""
    return {
        "model": canonical_name(name),
        "weights_sha256": weights_sha256(name),
        "config": asdict(model.config),
        "preprocess": {**preprocess_to_dict(preprocess), "convention": preprocess.convention},
    }


def run_settings(
    name: str | os.PathLike[str],
    model: CLIP,
    preprocess: Preprocess,
    *,
    batch_size: int,
    shard_size: int,
    fast_decode: bool,
) -> dict[str, Any]:
    """Everything that must be equal in all runs that add to one folder.

    The batch size is included, because the same image in batches of different sizes is rounded differently.
    """
    return {
        **model_fingerprint(name, model, preprocess),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "shard_size": shard_size,
        "fast_decode": fast_decode,
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
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ConfigError(f"{path} is not a manifest of this version of miniclip (format {_FORMAT})")
    return manifest


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
