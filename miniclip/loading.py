"""``load``: the one place where a checkpoint, the model and its preprocessing meet."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from miniclip import hub
from miniclip.checkpoint import Checkpoint, open_checkpoint, read_json
from miniclip.config import CLIPConfig
from miniclip.errors import ConfigError, UnknownModelError
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def load(
    name: str | os.PathLike[str] = "ViT-B/32",
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    fast: bool = True,
    activation: str | None = None,
    heads: int | tuple[int, int] | None = None,
) -> tuple[CLIP, Preprocess]:
    """Load a CLIP and the preprocessing that goes with it.

    Args:
        name: in this order of meaning, an existing path (a Hugging Face folder, a .safetensors file in Hugging Face's
            or OpenAI's layout, a model.safetensors.index.json), a name from ``available_models()``, or a Hub
            repository "owner/name", optionally "owner/name@revision".
        device: "cpu", "cuda", "cuda:1", …; CUDA where there is one, else the CPU. "mps" is accepted and untested.
        jit: refused if true; openai/CLIP's archives are pickles. Here for the signature's sake.
        download_root: the folder downloads are cached in; the Hub's own cache unless given.
        dtype: what the parameters are held and computed in: float32 (the default on the CPU), float16 (the default
            on CUDA), bfloat16 or float64.
        fast: False runs texts at full length instead of cutting each batch to its longest row.
        activation: "quick_gelu" or "gelu", for weights without a configuration file; where there is one, this wins.
        heads: attention heads, one number or (image, text), for weights without a configuration file.

    Returns:
        The model, in eval mode and frozen, and its ``Preprocess``.

    Raises:
        UnknownModelError: if the name means nothing.
        CheckpointError: if the weights are a pickle, damaged, or do not fit their configuration.
        ConfigError: if the configuration is not one miniclip runs, or is missing and not said.
        DownloadError: if the weights cannot be fetched, or arrive wrong.
    """
    if jit:
        raise ConfigError("jit=True loads openai/CLIP's TorchScript archives, which miniclip does not read")
    torch_device = _device(device)
    if dtype is None:
        dtype = torch.float16 if torch_device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")

    known, path = _find(name, download_root)
    checkpoint = open_checkpoint(path)
    config = known.config if known else checkpoint.clip_config(activation, heads)
    if known is None and activation is not None:
        config = _with_activation(config, activation)
    with torch.device("meta"):  # no memory and no random initialisation: the file provides every number
        model = CLIP(config)
    checkpoint.fill(model, dtype, torch_device)
    model.fast = fast
    size = config.vision.image_size
    preprocess = Preprocess(size) if known else _preprocess(checkpoint, size)
    return model.eval().requires_grad_(False), preprocess


def _find(name: str | os.PathLike[str], download_root: str | os.PathLike[str] | None) -> tuple[hub.KnownModel | None, Path]:
    """What a name means: a known model with the path of its weights, or a path alone."""
    text = os.fspath(name)
    if (path := Path(text).expanduser()).exists():
        return None, path
    cache_dir = Path(download_root).expanduser() if download_root is not None else None
    known = hub.ALIASES.get(text, text)
    if known in hub.KNOWN:
        return hub.KNOWN[known], hub.fetch_known(known, cache_dir)
    repo, _, revision = text.partition("@")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo) and not isinstance(name, os.PathLike) and not _is_file_name(repo):
        return None, hub.fetch_repository(repo, revision or "main", cache_dir)
    if re.fullmatch(r"RN\d+(x\d+)?", text):
        raise UnknownModelError(f"{text} is a ResNet; miniclip has OpenAI's Vision Transformers: {', '.join(hub.KNOWN)}")
    raise UnknownModelError(
        f"{text!r} is neither an existing path, nor a known model ({', '.join(hub.KNOWN)}), nor a Hub repository "
        "(owner/name)"
    )


def _is_file_name(text: str) -> bool:
    return text.endswith((".safetensors", ".json", ".bin", ".pt", ".pth"))


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"unknown device {device!r}; use 'cpu', 'cuda', 'cuda:N' or 'mps'") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} was asked for, and this torch ({torch.__version__}) sees no CUDA device")
        # "cuda" and "cuda:0" are one device under two names that do not compare equal
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device {device!r} was asked for, and there are {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", index)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {device!r} was asked for, and this torch ({torch.__version__}) sees no MPS device")
    if chosen.type not in ("cpu", "mps"):
        raise ConfigError(f"unknown device {device!r}; use 'cpu', 'cuda', 'cuda:N' or 'mps'")
    return chosen


def _with_activation(config: CLIPConfig, activation: str) -> CLIPConfig:
    from dataclasses import replace

    return replace(
        config,
        vision=replace(config.vision, activation=activation),
        text=replace(config.text, activation=activation),
    )


def _preprocess(checkpoint: Checkpoint, size: int) -> Preprocess:
    """The preprocessing that the files beside the weights describe; OpenAI's where there are none."""
    folder = checkpoint.path.parent
    try:
        if (path := folder / "preprocessor_config.json").is_file():
            preprocess = Preprocess.from_hf(read_json(path))
        elif (path := folder / "processor_config.json").is_file() and "image_processor" in (config := read_json(path)):
            preprocess = Preprocess.from_hf(config["image_processor"])
        elif checkpoint.config_path is not None and checkpoint.config_path.name == "open_clip_config.json":
            path = checkpoint.config_path
            preprocess = Preprocess.from_open_clip(checkpoint.config.get("preprocess_cfg", {}), size)
        else:
            return Preprocess(size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if preprocess.size != size:
        raise ConfigError(f"{path}: crops images to {preprocess.size} pixels, the model takes {size}")
    return preprocess
