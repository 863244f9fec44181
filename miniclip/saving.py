"""``save_pretrained``: a model as a Hugging Face folder, the inverse of ``load``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from miniclip import huggingface
from miniclip.errors import CheckpointError, ConfigError, InputError
from miniclip.files import atomic_replace
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_pretrained(model: CLIP, folder: str | os.PathLike[str], preprocess: Preprocess | None = None) -> None:
    """Write a model as a Hugging Face folder: for ``load``, transformers and sentence-transformers.

    The files are config.json, preprocessor_config.json, model.safetensors and, for a model with OpenAI's vocabulary,
    vocab.json, merges.txt and tokenizer_config.json.

    The files have temporary names until all of them are complete on the disk, so a failure leaves the old files as they
    were. A model may be saved into the folder from which it was loaded.

    Args:
        model: the parameters are written in the dtype that they have, from any device.
        folder: created if it does not exist.
        preprocess: the preprocessing of the model; None means OpenAI's at the model's image size. The format has no
            field for the ``convention``, which is therefore not saved.

    Raises:
        InputError: if ``model`` is not a CLIP with exactly its own parameters, in float32, float16 or bfloat16.
        ConfigError: if Hugging Face's format cannot describe the model, or ``preprocess`` has another image size.
        CheckpointError: if the files cannot be written.
    """
    if not isinstance(model, CLIP):
        raise InputError(f"save_pretrained takes a miniclip.CLIP, got {type(model).__name__}")
    size = model.config.vision.image_size
    preprocess = preprocess or Preprocess(size)
    if preprocess.size != size:
        raise ConfigError(f"the preprocessing makes images of {preprocess.size} pixels, the model takes {size}")
    tensors = huggingface.tensors_to_hf(_checked_state(model))
    dtype = str(model.dtype).removeprefix("torch.")
    documents: dict[str, dict[str, Any]] = {
        "config.json": {**huggingface.config_to_dict(model.config), "dtype": dtype},
        "preprocessor_config.json": huggingface.preprocess_to_dict(preprocess),
    }
    contents = {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
    contents |= huggingface.tokenizer_to_files(model.config.text)
    folder = Path(folder)
    # Renamed, never overwritten: a model loaded from the old weights is a memory-mapped view of that file. The weights
    # come last, so that a new folder that is cut off has no weights.
    targets = [folder / name for name in (*contents, "model.safetensors")]
    try:
        with atomic_replace(*targets) as (*texts, weights):
            for path, text in zip(texts, contents.values()):
                path.write_text(text, encoding="utf-8")
            mode = weights.stat().st_mode
            save_file(tensors, weights, metadata={"format": "pt"})
            weights.chmod(mode)  # safetensors makes the file readable only for its owner, whatever the umask says
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from None


def _checked_state(model: CLIP) -> dict[str, torch.Tensor]:
    """The state_dict of a model, after a check that it has the tensors that its configuration describes."""
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
