"""The models miniclip knows by name, and fetching weights from the Hugging Face Hub into its cache.

huggingface_hub downloads, resumes and caches; it is imported on first use. What is added here is the table of pinned
sources, a checksum, a second source when the first is gone, and errors of one sentence.
"""

from __future__ import annotations

import hashlib
import os
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

from miniclip.checkpoint import WEIGHTS, pickle_refusal, shard_names
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.errors import CheckpointError, DownloadError, UnknownModelError

_OFFLINE = "; --model demo, or load('demo'), is a small model that is in the package and works offline"

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

#: Models that come with the package, as Hugging Face folders.
BUNDLED = {"demo": Path(__file__).parent / "data" / "demo"}

_SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json")


def available_models() -> list[str]:
    """The names ``load`` knows: OpenAI's models, and the small "demo" in the package. It takes paths and Hub
    repositories as well."""
    return [*KNOWN, *BUNDLED]


def cached_model(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The weights of a known model where they already are, undamaged, in the Hub's cache; asks no network."""
    return next((path for source in KNOWN[name].sources if (path := _cached(source, cache_dir))), None)


def fetch_known(name: str, cache_dir: str | Path | None = None) -> Path:
    """The weights of a known model, from the cache or the first of its sources that gives them.

    Raises:
        DownloadError: if no source has them, the network is away, or what arrives has the wrong checksum.
    """
    if path := cached_model(name, cache_dir):
        return path
    refused = []
    for source in KNOWN[name].sources:
        try:
            return _download(source, cache_dir, what=name)
        except _Refused as error:
            refused.append(f"{source.repo} ({error})")
    raise DownloadError(
        f"none of the sources of {name} gave it: {', '.join(refused)}; try again later, or pass the path of a copy"
        f"{_OFFLINE}"
    )


def fetch_repository(repo: str, revision: str = "main", cache_dir: str | Path | None = None) -> Path:
    """The folder with the weights and settings of a Hub repository, from the Hub or, where it fails, its cache.

    Raises:
        UnknownModelError: if there is no such repository or revision.
        CheckpointError: if it holds no safetensors.
        DownloadError: if it is not in the cache and cannot be downloaded, or arrives with the wrong checksum.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
    except HFValidationError as error:  # no repository can have such a name
        raise _unknown(repo, revision, error) from None
    except Exception as error:  # as in _download; and a login page is not the JSON that is expected here
        if cached := _cached_repository(repo, revision, cache_dir):
            return cached
        if _status(error) in (400, 401, 403, 404, 410):
            raise _unknown(repo, revision, error) from None
        raise _not_downloaded(repo, cache_dir, error) from None
    commit = info.sha or revision
    names = {sibling.rfilename for sibling in info.siblings or ()}
    # timm's repositories keep the image tower alone in model.safetensors, the CLIP in open_clip_model.safetensors
    order = reversed(WEIGHTS) if "open_clip_config.json" in names else WEIGHTS
    weights = next((name for name in order if name in names), None)
    if weights is None:
        for name in sorted(names):
            if refusal := pickle_refusal(name):
                raise CheckpointError(f"{repo}: has no safetensors; {refusal}")
        raise CheckpointError(f"{repo}: holds no weights; expected one of {', '.join(WEIGHTS)}")

    for name in _SETTINGS:
        if name in names:
            fetch(Source(repo, commit, name), cache_dir)
    path = fetch(Source(repo, commit, weights), cache_dir)
    for shard in _shards(path):
        if shard in names:  # one the repository lacks is reported by the one who reads the index
            fetch(Source(repo, commit, shard), cache_dir)
    _remember(path, revision)
    return path.parent


def is_cached(source: Source) -> bool:
    """Whether a file is, undamaged, in the Hub's cache; asks no network."""
    return _cached(source, None) is not None


def fetch(source: Source, cache_dir: str | Path | None = None) -> Path:
    """One file, from the cache or the Hub.

    Raises:
        DownloadError: if it cannot be had, or arrives with the wrong checksum.
    """
    try:
        return _cached(source, cache_dir) or _download(source, cache_dir, what=source.repo)
    except _Refused as error:
        raise DownloadError(f"{source.repo}: {source.filename} cannot be had ({error})") from None


class _Refused(Exception):
    """A source that answers, but not with the file."""


def _download(source: Source, cache_dir: str | Path | None, what: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # Asked first and once, because hf_hub_download retries for half a minute before it reports a dead network.
        url = hf_hub_url(source.repo, source.filename, revision=source.revision)
        metadata = get_hf_file_metadata(url, timeout=_TIMEOUT_SECONDS)
        if metadata.commit_hash is None:
            raise ConnectionError("what answers there is not a Hub, perhaps the login page of this network")
        path = Path(hf_hub_download(source.repo, source.filename, revision=source.revision, cache_dir=cache_dir))
    # The classes depend on the client's version: requests', httpx's and httpx2's errors share no base, xet has its own.
    except Exception as error:
        if _status(error) is not None:
            raise _Refused(_reason(error)) from None
        raise _not_downloaded(what, cache_dir, error) from None
    etag = metadata.etag or ""
    expected = source.sha256 or (etag if _is_sha256(etag) else None)
    if expected and not _is_verified(path, expected):
        size = path.stat().st_size
        _discard(path)
        raise DownloadError(
            f"{source.filename} of {source.repo} arrived with the wrong checksum ({size} bytes, expected sha256 "
            f"{expected}) and was discarded; try again, or pass the path of a copy you trust"
        )
    return path


def _cached(source: Source, cache_dir: str | Path | None) -> Path | None:
    """A file in the cache. A damaged one is removed from it, to be downloaded again."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repo, source.filename, cache_dir=cache_dir, revision=source.revision)
    if not isinstance(found, str):
        return None
    path = Path(found)
    if not _is_verified(path, source.sha256):
        warnings.warn(f"{path} no longer has its checksum and is removed from the cache", stacklevel=2)
        _discard(path)
        return None
    return path


def _cached_repository(repo: str, revision: str, cache_dir: str | Path | None) -> Path | None:
    """The folder of a repository in the cache, if all of its weights are there."""
    for name in WEIGHTS:
        if path := _cached(Source(repo, revision, name), cache_dir):
            shards = [_cached(Source(repo, revision, shard), cache_dir) for shard in _shards(path)]
            return path.parent if all(shards) else None
    return None


def _shards(path: Path) -> list[str]:
    """The other files that belong to the weights, if ``path`` is an index."""
    return shard_names(path) if path.name.endswith(".index.json") else []


def _remember(path: Path, revision: str) -> None:
    """Note in the cache which commit a branch or tag is, to find its files without network.

    hf_hub_download does so when it is asked for a branch. It was asked for a commit, so that all files are of one; and
    the note moves to the next when all of its files are there.
    """
    commit = path.parent.name
    ref = path.parents[2] / "refs" / revision  # beside snapshots/<commit>/<file>
    try:
        if revision != commit and not (ref.is_file() and ref.read_text() == commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    except OSError:
        pass  # a read-only cache


def _is_verified(path: Path, sha256: str | None) -> bool:
    """Whether a cached file has its checksum: computed once, then remembered by the file's size and time.

    Without a pinned one it is the one the Hub reported, by which its cache names the blob that ``path`` links to.
    """
    from huggingface_hub import constants

    etag = path.readlink().name if path.is_symlink() else ""
    expected = sha256 or (etag if _is_sha256(etag) else None)
    if expected is None:
        return True  # a small text file, which the Hub knows by its git hash; or a cache without links
    stat = path.stat()
    mark = Path(constants.HF_HOME) / "miniclip" / "verified" / expected
    identity = f"{stat.st_size} {stat.st_mtime_ns}"
    try:
        if mark.read_text() == identity:
            return True
    except OSError:
        pass
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            return False
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(identity)
    except OSError:
        pass  # a read-only home: the checksum is computed again next time
    return True


def _discard(path: Path) -> None:
    """Remove a file and the links to it: from a snapshot to its blob, and from there to one that repositories share."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _unknown(repo: str, revision: str, error: Exception) -> UnknownModelError:
    return UnknownModelError(
        f"{repo!r} is neither an existing path, nor one of {', '.join(available_models())}, nor a repository that can "
        f"be read on the Hub at revision {revision!r} ({_reason(error)})"
    )


def _not_downloaded(what: str, cache_dir: str | Path | None, error: Exception) -> DownloadError:
    from huggingface_hub import constants

    return DownloadError(
        f"{what} is not in the cache ({os.fspath(cache_dir or constants.HF_HUB_CACHE)}) and could not be downloaded "
        f"from {constants.ENDPOINT} ({_reason(error)}); try again online, or pass the path of a folder with its weights"
        f"{_OFFLINE if what in KNOWN else ''}"
    )


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer that was no; None if there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _reason(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if (status := _status(error)) is not None:
        hint = "; a private or gated one needs a valid token in HF_TOKEN" if status in (401, 403) else ""
        return f"HTTP {status}{hint}"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")  # some go on for paragraphs
