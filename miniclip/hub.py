"""The models miniclip knows by name, and fetching weights from the Hugging Face Hub into its cache.

huggingface_hub downloads, resumes and caches; it is imported on first use. What is added here is the table of pinned
sources, a checksum, a second source when the first is gone, and errors of one sentence.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from miniclip.checkpoint import WEIGHTS, pickle_refusal, read_json
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.errors import CheckpointError, DownloadError, UnknownModelError

# How long a machine without network is left waiting before it is told so.
_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class Source:
    """One file of a Hub repository. Without a pinned ``sha256`` the one the Hub reports is checked."""

    repo: str
    revision: str
    filename: str
    sha256: str | None = None
    megabytes: int | None = None


@dataclass(frozen=True)
class KnownModel:
    """One of OpenAI's models: its architecture and where its weights lie, in order of preference."""

    config: CLIPConfig
    sources: tuple[Source, ...]


def _openai(embed_dim: int, width: int, layers: int, patch: int, size: int, text_width: int) -> CLIPConfig:
    """OpenAI's Vision Transformers: heads 64 wide, MLPs 4 times the width, 12 text layers, QuickGELU."""
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(width, layers, width // 64, 4 * width, patch_size=patch, image_size=size),
        text=TextConfig(text_width, 12, text_width // 64, 4 * text_width),
    )


_B32_SHA256 = "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d"

# The main branches of openai's own B/32, B/16 and L/14@336px repositories hold pickles only.
KNOWN: dict[str, KnownModel] = {
    "ViT-B/32": KnownModel(
        _openai(512, 768, 12, 32, 224, 512),
        (
            Source(
                "sentence-transformers/clip-ViT-B-32",
                "327ab6726d33c0e22f920c83f2ff9e4bd38ca37f",
                "0_CLIPModel/model.safetensors",
                _B32_SHA256,
                605,
            ),
            Source(
                "openai/clip-vit-base-patch32",
                "b33cedfd0df4e43b8238760678fcc89e1a0d38b3",  # refs/pr/15
                "model.safetensors",
                _B32_SHA256,
                605,
            ),
            Source(
                "timm/vit_base_patch32_clip_224.openai",
                "a6f597a30f7b82c51704746581f9a4e41421e878",
                "open_clip_model.safetensors",
            ),
        ),
    ),
    "ViT-B/16": KnownModel(
        _openai(512, 768, 12, 16, 224, 512),
        (
            Source(
                "timm/vit_base_patch16_clip_224.openai",
                "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
                "open_clip_model.safetensors",
            ),
        ),
    ),
    "ViT-L/14": KnownModel(
        _openai(768, 1024, 24, 14, 224, 768),
        (
            Source(
                "openai/clip-vit-large-patch14",
                "32bd64288804d66eefd0ccbe215aa642df71cc41",
                "model.safetensors",
                "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
                1711,
            ),
        ),
    ),
    "ViT-L/14@336px": KnownModel(
        _openai(768, 1024, 24, 14, 336, 768),
        (Source("timm/vit_large_patch14_clip_336.openai", "main", "open_clip_model.safetensors"),),
    ),
}

#: Repositories people type by habit whose main branch has no weights miniclip reads, or whose configuration may
#: contradict the activation OpenAI trained with.
ALIASES = {
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336px",
    "sentence-transformers/clip-ViT-B-32": "ViT-B/32",
    "timm/vit_base_patch32_clip_224.openai": "ViT-B/32",
    "timm/vit_base_patch16_clip_224.openai": "ViT-B/16",
    "timm/vit_large_patch14_clip_336.openai": "ViT-L/14@336px",
}

_SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")


def available_models() -> list[str]:
    """The names ``load`` knows. It takes paths and Hub repositories as well."""
    return list(KNOWN)


def cached_model(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The weights of a known model where they already are in the Hub's cache, without asking the network."""
    for source in KNOWN[name].sources:
        if path := _cached(source.repo, source.revision, source.filename, cache_dir):
            return path
    return None


def fetch_known(name: str, cache_dir: str | Path | None = None) -> Path:
    """The weights of a known model, from the cache or the first of its sources that still has them.

    Raises:
        DownloadError: if no source has them, the network is away, or what arrives has the wrong checksum.
    """
    sources = KNOWN[name].sources
    for source in sources:
        if path := _cached(source.repo, source.revision, source.filename, cache_dir):
            if _is_verified(path, source.sha256):
                return path
            _discard(path)
    gone = []
    for source in sources:
        try:
            return _download(source, cache_dir, what=name)
        except _Gone as error:
            gone.append(f"{source.repo} ({error})")
    raise DownloadError(f"none of the sources of {name} has it any more: {', '.join(gone)}; pass the path of a copy")


def fetch_repository(repo: str, revision: str = "main", cache_dir: str | Path | None = None) -> Path:
    """The folder with the weights and settings of a Hub repository, from the Hub or, without network, its cache.

    Raises:
        UnknownModelError: if there is no such repository or revision.
        CheckpointError: if it holds no safetensors.
        DownloadError: if it is not in the cache and the network is away.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        _raise_if_offline()
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
    except _network_errors() as error:
        if (cached := _cached_repository(repo, revision, cache_dir)) is not None:
            return cached
        raise _unreachable(repo, cache_dir, error) from None
    except HfHubHTTPError as error:
        raise UnknownModelError(
            f"{repo!r} is neither an existing path, nor one of {', '.join(KNOWN)}, nor a repository that can be read "
            f"on the Hub at revision {revision!r} ({_status(error)})"
        ) from None
    commit = info.sha or revision
    names = {sibling.rfilename for sibling in info.siblings or ()}
    weights = next((name for name in WEIGHTS if name in names), None)
    if weights is None:
        for name in sorted(names):
            if refusal := pickle_refusal(name):
                raise CheckpointError(f"{repo}: has no safetensors; {refusal}")
        raise CheckpointError(f"{repo}: holds no weights; expected one of {', '.join(WEIGHTS)}")

    def get(names: Iterable[str]) -> Path:
        for name in names:
            if (path := _cached(repo, commit, name, cache_dir)) is None or not _is_verified(path, None):
                try:
                    path = _download(Source(repo, commit, name), cache_dir, what=repo)
                except _Gone as error:
                    raise DownloadError(f"{repo}: {name} cannot be had ({error})") from None
        return path

    path = get([*(name for name in _SETTINGS if name in names), weights])
    if weights.endswith(".index.json"):
        shards = {str(shard) for shard in read_json(path).get("weight_map", {}).values()}
        get(sorted(shards & names))  # a shard the repository lacks is reported by the one who reads the index
    return path.parent


class _Gone(Exception):
    """A source that answers, but no longer with the file."""


def _download(source: Source, cache_dir: str | Path | None, what: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        _raise_if_offline()
        # Asked first and once, because hf_hub_download retries for half a minute before it reports a dead network.
        url = hf_hub_url(source.repo, source.filename, revision=source.revision)
        etag = get_hf_file_metadata(url, timeout=_TIMEOUT_SECONDS).etag or ""
        path = Path(hf_hub_download(source.repo, source.filename, revision=source.revision, cache_dir=cache_dir))
    except _network_errors() as error:
        raise _unreachable(what, cache_dir, error) from None
    except HfHubHTTPError as error:
        raise _Gone(_status(error)) from None
    except OSError as error:  # no space, no permission, or more bytes lost than could be resumed
        raise DownloadError(f"{source.filename} of {source.repo} could not be downloaded: {error}") from error
    expected = source.sha256 or (etag if _is_sha256(etag) else None)
    if expected and not _is_verified(path, expected):
        size = path.stat().st_size
        _discard(path)
        raise DownloadError(
            f"{source.filename} of {source.repo} arrived with the wrong checksum ({size} bytes, expected sha256 "
            f"{expected}) and was discarded; try again, or pass the path of a copy you trust"
        )
    return path


def _cached(repo: str, revision: str, filename: str, cache_dir: str | Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _cached_repository(repo: str, revision: str, cache_dir: str | Path | None) -> Path | None:
    for name in WEIGHTS:
        if path := _cached(repo, revision, name, cache_dir):
            return path.parent
    return None


def _is_verified(path: Path, sha256: str | None) -> bool:
    """Whether a cached file has its checksum: computed once, then remembered by the file's size and time.

    Without a pinned one it is the one the Hub reported, by which its cache names the blob behind the link.
    """
    from huggingface_hub import constants

    blob = path.resolve()
    expected = sha256 or (blob.name if _is_sha256(blob.name) else None)
    if expected is None:
        return True  # a small text file, which the Hub knows by its git hash
    stat = blob.stat()
    mark = Path(constants.HF_HOME) / "miniclip" / "verified" / expected
    identity = f"{stat.st_size} {stat.st_mtime_ns}"
    try:
        if mark.read_text() == identity:
            return True
    except OSError:
        pass
    with blob.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            return False
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(identity)
    except OSError:
        pass  # a read-only home: the checksum is computed again next time
    return True


def _discard(path: Path) -> None:
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _raise_if_offline() -> None:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")


def _network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when nobody answers, which depends on the HTTP library of its version."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    errors: list[type[Exception]] = [OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError]
    for library, base in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "RequestException")):
        try:
            errors.append(getattr(__import__(library), base))
        except (ImportError, AttributeError):
            continue
    return tuple(errors)


def _unreachable(what: str, cache_dir: str | Path | None, error: Exception) -> DownloadError:
    from huggingface_hub import constants

    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DownloadError(
        f"{what} is not in the cache ({os.fspath(cache_dir or constants.HF_HUB_CACHE)}) and {constants.ENDPOINT} cannot "
        f"be reached ({reason}): connect to the network once, or pass the path of a folder with its weights"
    )


def _status(error: Exception) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
