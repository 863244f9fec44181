"""``load``: the one place where a checkpoint, the model and its preprocessing meet."""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path

import torch

from miniclip import hub, huggingface, open_clip
from miniclip.checkpoint import Checkpoint, open_checkpoint, read_json
from miniclip.config import Heads
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
    heads: Heads | None = None,
) -> tuple[CLIP, Preprocess]:
    """Load a CLIP and the preprocessing that goes with it.

    Args:
        name: in this order of meaning, "demo" (the small model in the package), an existing path (a Hugging Face
            folder, a .safetensors file in Hugging Face's or OpenAI's layout, a model.safetensors.index.json), a name
            from ``available_models()``, or a Hub repository "owner/name", optionally "owner/name@revision".
        device: "cpu", "cuda", "cuda:1", …; CUDA where there is one, else the CPU. "mps" is accepted and untested.
        jit: refused if true; openai/CLIP's archives are pickles. Here for the signature's sake.
        download_root: the folder downloads are cached in; the Hub's own cache unless given.
        dtype: what the parameters are held and computed in: float32 (the default on the CPU), float16 (the default
            on CUDA), bfloat16 or float64.
        fast: False runs the plain modules on everything. Otherwise, on the CPU and where nothing requires grad, the
            same is computed in a faster order, up to rounding (see miniclip/fast.py). It keeps a packed copy of each
            tower's matrices, from that tower's second call on, or from a first one with many tokens.
        activation: "quick_gelu" or "gelu", for weights without a configuration. Where there is one, what is said here
            wins over it.
        heads: attention heads, one number or (image, text), for weights without a configuration whose heads are not
            64 wide. Wins likewise.

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

    if dtype == torch.float64 and torch_device.type == "mps":
        raise ConfigError("MPS has no float64")
    known, path = _find(name, download_root)
    checkpoint = open_checkpoint(path)
    config = known.config.override(activation, heads) if known else checkpoint.clip_config(activation, heads)
    size = config.vision.image_size
    preprocess = Preprocess(size) if known else _preprocess(checkpoint, size)
    with torch.inference_mode(False):  # parameters made in it could never require grad
        with torch.device("meta"):  # no memory and no random initialisation: the file provides every number
            model = CLIP(config)
        checkpoint.fill(model, dtype, torch_device)
    model.fast = fast
    return model.eval().requires_grad_(False), preprocess


def weights_sha256(name: str | os.PathLike[str], download_root: str | os.PathLike[str] | None = None) -> str:
    """The checksum of the weights that ``load`` reads under a name: the file's, or for several that of all of theirs.

    Raises:
        Those of ``load`` for a name that means nothing or weights that cannot be had.
    """
    checkpoint = open_checkpoint(_find(name, download_root)[1])
    digests = []
    for path in checkpoint.files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _find(
    name: str | os.PathLike[str], download_root: str | os.PathLike[str] | None
) -> tuple[hub.KnownModel | None, Path]:
    """What a name means: a known model with the path of its weights, or a path alone."""
    text = os.fspath(name)
    if not isinstance(text, str):
        raise TypeError(f"name must be a str or a path, got {type(name).__name__}")
    if name in hub.BUNDLED:  # before any folder of that name: the first thing a newcomer types must work anywhere
        return None, hub.BUNDLED[text]
    if os.path.exists(path := os.path.expanduser(text)):  # unlike Path.exists, false for what no file can be called
        return None, Path(path)
    cache_dir = Path(download_root).expanduser() if download_root is not None else None
    known = hub.ALIASES.get(text, text)
    if known in hub.KNOWN:
        return hub.KNOWN[known], hub.fetch_known(known, cache_dir)
    repo, _, revision = text.partition("@")
    if isinstance(name, str) and _is_repository(repo):
        return None, hub.fetch_repository(repo, revision or "main", cache_dir)
    names = ", ".join(hub.available_models())
    if re.fullmatch(r"RN\d+(x\d+)?", text):
        raise UnknownModelError(
            f"{text} is a ResNet; miniclip has OpenAI's Vision Transformers: {', '.join(hub.KNOWN)}"
        )
    raise UnknownModelError(
        f"{text!r} is neither an existing path, nor a known model ({names}), nor a Hub repository (owner/name)"
    )


def _is_repository(text: str) -> bool:
    """Whether it reads as owner/name, and not as the path of a missing file or one of OpenAI's names mistyped."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None
        and re.fullmatch(r"ViT-\w+/\d+\w*", text, re.IGNORECASE) is None
        and not text.endswith((".safetensors", ".json", ".bin", ".pt", ".pth"))
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")  # refused below
    if chosen.type == "cpu" or (chosen.type == "mps" and torch.backends.mps.is_available()):
        return chosen
    if chosen.type == "cuda" and torch.cuda.is_available():
        # "cuda" and "cuda:0" are one device under two names that do not compare equal
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"there is no device {device!r}, only {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", index)
    if chosen.type in ("cuda", "mps"):
        raise ConfigError(
            f"there is no device {device!r}: this torch ({torch.__version__}) sees no {chosen.type.upper()}"
        )
    raise ConfigError(f"unknown device {device!r}; use 'cpu', 'cuda', 'cuda:N' or 'mps'")


def _preprocess(checkpoint: Checkpoint, size: int) -> Preprocess:
    """The preprocessing that the files beside the weights describe; OpenAI's where there are none.

    Raises:
        ConfigError: if it is not one miniclip has, or makes images of another size than the model's.
    """
    path, config = _preprocess_config(checkpoint)
    if path is None:
        return Preprocess(size)
    try:
        if not isinstance(config, Mapping):
            raise ConfigError(f"the preprocessing must be an object, got {reprlib.repr(config)}")
        is_open_clip = path.name == "open_clip_config.json"
        if is_open_clip:
            preprocess = open_clip.preprocess_from_dict(config, size)
        else:
            preprocess = huggingface.preprocess_from_dict(config)
        if preprocess.size != size:
            raise ConfigError(f"crops images to {preprocess.size} pixels, the model takes {size}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return preprocess


def _preprocess_config(checkpoint: Checkpoint) -> tuple[Path | None, object]:
    folder = checkpoint.path.parent
    if (path := folder / "preprocessor_config.json").is_file():
        return path, read_json(path)
    if (path := folder / "processor_config.json").is_file() and "image_processor" in (config := read_json(path)):
        return path, config["image_processor"]  # transformers 5 writes all processors of a model into one file
    if checkpoint.config_path is not None and checkpoint.config_path.name == "open_clip_config.json":
        return checkpoint.config_path, checkpoint.config.get("preprocess_cfg", {})
    return None, None
