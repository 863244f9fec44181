"""``load``: the one room in which a checkpoint, the model and its preprocessing meet."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
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
    strict: bool = True,
    image_size: int | None = None,
) -> tuple[CLIP, Preprocess]:
    """Load a CLIP and the preprocessing that belongs to it.

    Args:
        name: what to load. The first meaning that applies is taken:

            - "demo", the small model in the package;
            - an existing path: a Hugging Face folder, a .safetensors file in Hugging Face's or OpenAI's layout, or a
              model.safetensors.index.json;
            - a name from ``available_models()``;
            - a repository of the Hugging Face Hub, "owner/name" or "owner/name@revision".
        device: "cpu", "cuda", "cuda:1", ... By default CUDA if there is a CUDA device, else the CPU. "mps" is accepted
            but not tested.
        jit: if true, a warning. openai/CLIP has this argument for TorchScript archives, which are pickles.
        download_root: the folder that keeps downloads. By default the Hub client's own cache.
        dtype: the dtype of the parameters and of the computation: float32, float16, bfloat16 or float64. By default
            float16 on CUDA, float32 elsewhere.
        fast: true (the default) computes only those tokens of the last block that are pooled. On the CPU it also
            shares common beginnings of texts, and multiplies with packed copies of the weights, which take
            additional memory. False computes every token with the plain weights, for comparison. The results agree
            up to rounding.
        activation: "quick_gelu" or "gelu". Needed for weights without a configuration; overrides one that is there.
        heads: the number of attention heads, one integer or (image tower, text tower). Needed for weights without a
            configuration if a head is not 64 wide; overrides a configuration that is there.
        strict: whether tensors that are not the CLIP's, such as the state of an optimizer, are an error. A tensor that
            is missing or of the wrong shape always is.
        image_size: the side of the images in pixels, a multiple of the patch size. The position embeddings are
            resampled to this size, as transformers' ``interpolate_pos_encoding`` does. By default the model's own.

    Returns:
        The model, in eval mode and with frozen parameters, and its ``Preprocess``.

    Raises:
        UnknownModelError: if the name means nothing.
        CheckpointError: if the weights are a pickle, are damaged, or do not fit their configuration.
        ConfigError: if an argument is wrong, the configuration describes a model that miniclip does not run, or there
            is no configuration and ``activation`` is not given.
        DownloadError: if the weights cannot be downloaded, or arrive with the wrong checksum.
        TypeError: if the name is neither a string nor a path.
    """
    if jit:  # openai/CLIP also warns and goes on, unless the file is an archive
        warnings.warn("jit=True is for openai/CLIP's TorchScript archives: miniclip loads a module", stacklevel=2)
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
    with torch.inference_mode(False):  # parameters created in inference mode can never require grad
        with torch.device("meta"):  # takes no memory and draws no random numbers: the file has every number
            model = CLIP(config)
        checkpoint.fill(model, dtype, torch_device, strict)
        if image_size is not None:
            model.visual.resample_positions(image_size)
    if image_size not in (None, size):
        model.config = replace(config, vision=replace(config.vision, image_size=image_size))
        preprocess = replace(preprocess, size=image_size, shortest_edge=None)
    model.fast = fast
    return model.eval().requires_grad_(False), preprocess


def weights_files(name: str | os.PathLike[str]) -> list[Path]:
    """The files from which ``load(name)`` reads weights. Errors are those of ``load``."""
    return [Path(path) for path in open_checkpoint(_find(name, None)[1]).files]


def weights_sha256(name: str | os.PathLike[str]) -> str:
    """The checksum of the weights that ``load(name)`` reads.

    Args:
        name: as for ``load``.

    Returns:
        The sha256 of the weights file, 64 hexadecimal digits. For several files, the sha256 of their checksums.

    Raises:
        MiniclipError: as ``load`` does, if the name means nothing or the weights cannot be read or downloaded.
    """
    digests = []
    for path in weights_files(name):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _find(
    name: str | os.PathLike[str], download_root: str | os.PathLike[str] | None
) -> tuple[hub.KnownModel | None, Path]:
    """Find the weights that a name means: the known model, if the name is one, and the path of its weights."""
    text = os.fspath(name)
    if not isinstance(text, str):
        raise TypeError(f"name must be a str or a path, got {type(name).__name__}")
    if name in hub.BUNDLED:  # wins over a folder of that name, so that a newcomer's first command works everywhere
        return None, hub.BUNDLED[text]
    # os.path.exists, unlike Path.exists, does not raise for a text that cannot be a file name.
    if os.path.exists(path := os.path.expanduser(text)):
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
        f"{text!r} is neither an existing path, nor a known model ({names}), nor a Hub repository "
        f"(owner/name){_did_you_mean(text)}"
    )


def _did_you_mean(text: str) -> str:
    """The known name that a mistyped one resembles, as a question: "vit-b32" resembles ViT-B/32."""
    plain = {re.sub("[^a-z0-9]", "", name.lower()): name for name in hub.available_models()}
    near = difflib.get_close_matches(re.sub("[^a-z0-9]", "", text.lower()), plain, n=1, cutoff=0.75)
    return f": did you mean {plain[near[0]]}?" if near else ""


def _is_repository(text: str) -> bool:
    """Whether a text looks like owner/name. A mistyped OpenAI name or the path of a missing file does not."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None
        and re.fullmatch(r"ViT-\w+/\d[\w-]*", text, re.IGNORECASE) is None
        and not text.endswith((".safetensors", ".json", ".bin", ".pt", ".pth"))
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")  # any device that the last line refuses
    if chosen.type == "cpu" or (chosen.type == "mps" and torch.backends.mps.is_available()):
        return chosen
    if chosen.type == "cuda" and torch.cuda.is_available():
        # The index is filled in because torch.device("cuda") and torch.device("cuda:0") do not compare equal.
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
    """The preprocessing that a file beside the weights describes, or OpenAI's if there is no such file.

    Raises:
        ConfigError: if miniclip does not have this preprocessing, or its image size is not the model's.
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
    """The file that describes the preprocessing, and the part of its content that does so."""
    folder = checkpoint.path.parent
    if (path := folder / "preprocessor_config.json").is_file():
        return path, read_json(path)
    if (path := folder / "processor_config.json").is_file() and "image_processor" in (config := read_json(path)):
        return path, config["image_processor"]  # transformers 5 writes all processors of a model to one file
    if checkpoint.config_path is not None and checkpoint.config_path.name == "open_clip_config.json":
        return checkpoint.config_path, checkpoint.config.get("preprocess_cfg", {})
    return None, None
