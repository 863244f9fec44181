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
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_pretrained(model: CLIP, folder: str | os.PathLike[str], preprocess: Preprocess | None = None) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors, for ``load`` and for transformers.

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
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_files(folder, documents, tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from None


def _write_files(folder: Path, documents: dict[str, dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    """Write all files under temporary names, then rename them. If one cannot be written, none is renamed."""
    # The weights come last: if the process is killed between two renames, a new folder has no weights.
    names = [*documents, "model.safetensors"]
    temporary = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in names}
    try:
        for target, path in temporary.items():
            if target.name in documents:
                path.write_text(json.dumps(documents[target.name], indent=2) + "\n", encoding="utf-8")
            else:
                save_file(tensors, path, metadata={"format": "pt"})
                # safetensors lets only the owner read the file. The other files follow the user's umask.
                path.chmod(next(iter(temporary.values())).stat().st_mode)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for target, path in temporary.items():
            # The old file is replaced, not overwritten: a model that was loaded from it is a view of its contents.
            path.replace(target)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


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
