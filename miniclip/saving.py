"""``save_pretrained``: a model as a Hugging Face folder, the inverse of ``load``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from miniclip.checkpoint import hf_tensors
from miniclip.errors import CheckpointError, ConfigError, InputError
from miniclip.files import atomic_replace
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_pretrained(model: CLIP, folder: str | os.PathLike[str], preprocess: Preprocess | None = None) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors, for ``load`` and for transformers.

    The files appear whole or not at all, under temporary names until all of them are on the disk. A model may be saved
    over the folder it was loaded from.

    Args:
        model: its parameters are written in the dtype they have, from any device.
        folder: made if it is missing.
        preprocess: what goes with the model; OpenAI's at the model's size unless given. Its ``convention`` is no part
            of the format and is not kept.

    Raises:
        InputError: if it is not a CLIP with its own parameters in float32, float16 or bfloat16.
        ConfigError: if Hugging Face's configuration has no words for the model, or ``preprocess`` is of another size.
        CheckpointError: if the files cannot be written; what was there before is then still there.
    """
    if not isinstance(model, CLIP):
        raise InputError(f"save_pretrained takes a miniclip.CLIP, got {type(model).__name__}")
    size = model.config.vision.image_size
    preprocess = preprocess or Preprocess(size)
    if preprocess.size != size:
        raise ConfigError(f"the preprocessing makes images of {preprocess.size} pixels, the model takes {size}")
    tensors = hf_tensors(_checked_state(model))
    dtype = str(model.dtype).removeprefix("torch.")
    documents: dict[str, dict[str, Any]] = {
        "config.json": {**model.config.to_hf(), "dtype": dtype},
        "preprocessor_config.json": preprocess.to_hf(),
    }
    folder = Path(folder)
    # Renamed, never overwritten: a model loaded from the old weights is a memory-mapped view of that file. The weights
    # come last, so that a new folder that is cut off has no weights.
    targets = [folder / name for name in (*documents, "model.safetensors")]
    try:
        with atomic_replace(*targets) as (*texts, weights):
            for path, document in zip(texts, documents.values()):
                path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            mode = weights.stat().st_mode
            save_file(tensors, weights, metadata={"format": "pt"})
            weights.chmod(mode)  # safetensors makes the file readable only for its owner, whatever the umask says
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from None


def _checked_state(model: CLIP) -> dict[str, torch.Tensor]:
    """The state_dict of a model that is what its configuration says."""
    state: dict[str, torch.Tensor] = model.state_dict()
    with torch.device("meta"):
        expected = CLIP(model.config).state_dict()
    wrong = [name for name in {**expected, **state} if _shape(expected, name) != _shape(state, name)]
    if wrong:
        raise InputError(
            f"{len(wrong)} parameters are not those of the model's configuration, such as {wrong[0]} "
            f"({_shape(state, wrong[0])}, expected {_shape(expected, wrong[0])}); merge adapters before saving"
        )
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPES or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else str(tensor.dtype)
            raise InputError(f"{name} is {kind}, a checkpoint holds float32, float16 or bfloat16")
    return state


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
