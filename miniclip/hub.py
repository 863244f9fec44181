"""The models that miniclip knows by name, and downloads from the Hugging Face Hub.

huggingface_hub downloads, resumes and caches files. It is imported on first use. This room adds a table of pinned
sources, a checksum, a second source if the first is gone, and error messages of one sentence.
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

_OFFLINE_HINT = "; load('demo'), or --model demo, is a small model in the package that works offline"

# How long to wait for an answer. A machine without a network gets its error message after this time.
_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class Source:
    """One file of a Hub repository.

    Attributes:
        repo: the repository, "owner/name".
        revision: a commit, branch or tag. Only a commit pins the file.
        filename: the path of the file inside the repository.
        sha256: the checksum that the file must have. Without one, the checksum that the Hub reports is used.
        megabytes: the size of the file in units of 10^6 bytes, for listings.
    """

    repo: str
    revision: str
    filename: str
    sha256: str | None = None
    megabytes: int | None = None


@dataclass(frozen=True)
class KnownModel:
    """One of OpenAI's models.

    Attributes:
        config: its architecture.
        sources: where its weights can be downloaded, the preferred source first.
    """

    config: CLIPConfig
    sources: tuple[Source, ...]


def _openai(embed_dim: int, width: int, layers: int, patch: int, size: int, text_width: int) -> CLIPConfig:
    """The architecture of OpenAI's Vision Transformers.

    All of them have heads 64 wide, MLPs 4 times as wide as the tower, 12 text layers and QuickGELU.
    """
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(width, layers, width // 64, 4 * width, patch_size=patch, image_size=size),
        text=TextConfig(text_width, 12, text_width // 64, 4 * text_width),
    )


_B32_SHA256 = "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d"

#: OpenAI's models by their names in openai/CLIP. Some sources are not OpenAI's own repositories, because the main
#: branches of OpenAI's repositories for B/32, B/16 and L/14@336px hold only pickles.
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

#: Repositories that mean a known model. People type them by habit, but the main branch may hold no safetensors, or its
#: configuration may contradict the activation that OpenAI trained with.
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

#: Models that are part of the package, by name: Hugging Face folders.
BUNDLED = {"demo": Path(__file__).parent / "data" / "demo"}

_SETTINGS_FILES = ("config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json")


def available_models() -> list[str]:
    """The names that ``load`` knows: OpenAI's models, and "demo", a small model in the package.

    ``load`` takes paths and Hub repositories too.
    """
    return [*KNOWN, *BUNDLED]


def cached_model(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """Find the weights of a known model in the cache, without a network request.

    Args:
        name: a key of ``KNOWN``.
        cache_dir: the cache; by default the Hub client's own.

    Returns:
        The path of an undamaged file from the first source that is cached, or None.
    """
    return next((path for source in KNOWN[name].sources if (path := _cached(source, cache_dir))), None)


def fetch_known(name: str, cache_dir: str | Path | None = None) -> Path:
    """Get the weights of a known model from the cache, or from the first source that provides them.

    Args:
        name: a key of ``KNOWN``.
        cache_dir: the cache; by default the Hub client's own.

    Returns:
        The path of the file in the cache.

    Raises:
        DownloadError: if no source has the file, the network fails, or the file arrives with the wrong checksum.
    """
    if path := cached_model(name, cache_dir):
        return path
    refusals = []
    for source in KNOWN[name].sources:
        try:
            return _download(source, cache_dir, what=name)
        except _Refused as error:
            refusals.append(f"{source.repo} ({error})")
    raise DownloadError(
        f"no source of {name} provides its weights: {', '.join(refusals)}; try again later, or pass the path of a copy"
        f"{_OFFLINE_HINT}"
    )


def fetch_repository(repo: str, revision: str = "main", cache_dir: str | Path | None = None) -> Path:
    """Get the weights and settings of a Hub repository, from the Hub or, if the Hub fails, from the cache.

    Args:
        repo: "owner/name".
        revision: a branch, tag or commit.
        cache_dir: the cache; by default the Hub client's own.

    Returns:
        The folder in the cache that holds the files.

    Raises:
        UnknownModelError: if there is no such repository or revision.
        CheckpointError: if the repository holds no safetensors.
        DownloadError: if a file is not in the cache and cannot be downloaded, or arrives with the wrong checksum.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    if not _is_revision(revision):
        raise UnknownModelError(f"{revision!r} cannot be a revision of {repo}: give a branch, a tag or a commit")
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
    except HFValidationError as error:  # no repository can have such a name
        raise _unknown(repo, revision, error) from None
    except Exception as error:  # all classes, as in _download; a login page also fails here because it is not JSON
        if cached := _cached_repository(repo, revision, cache_dir):
            return cached
        if _status(error) in (400, 401, 403, 404, 410):
            raise _unknown(repo, revision, error) from None
        raise _not_downloaded(repo, cache_dir, error) from None

    commit = info.sha or revision
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise DownloadError(f"{repo}: the Hub named {commit!r} as a commit, which is 40 hexadecimal digits")
    names = {sibling.rfilename for sibling in info.siblings or ()}
    weights = _weights_name(repo, names)
    for name in _SETTINGS_FILES:
        if name in names:
            fetch(Source(repo, commit, name), cache_dir)
    path = fetch(Source(repo, commit, weights), cache_dir)
    for shard in _shards(path):
        if shard in names:  # a shard that the repository lacks is reported by open_checkpoint
            fetch(Source(repo, commit, shard), cache_dir)
    _record_revision(path, revision)
    return path.parent


def is_cached(source: Source) -> bool:
    """Whether the Hub client's cache holds a file undamaged. Makes no network request."""
    return _cached(source, None) is not None


def fetch(source: Source, cache_dir: str | Path | None = None) -> Path:
    """Get one file from the cache or the Hub.

    Args:
        source: the file.
        cache_dir: the cache; by default the Hub client's own.

    Returns:
        The path of the file in the cache.

    Raises:
        DownloadError: if the file cannot be downloaded, or arrives with the wrong checksum.
    """
    try:
        return _cached(source, cache_dir) or _download(source, cache_dir, what=source.repo)
    except _Refused as error:
        raise DownloadError(f"{source.repo}: {source.filename} cannot be downloaded ({error})") from None


class _Refused(Exception):
    """The server answered, but not with the file."""


def _download(source: Source, cache_dir: str | Path | None, what: str) -> Path:
    """Download one file and check its checksum. ``what`` names the file's owner in error messages."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # This request fails at once without a network. hf_hub_download would retry for half a minute.
        url = hf_hub_url(source.repo, source.filename, revision=source.revision)
        metadata = get_hf_file_metadata(url, timeout=_TIMEOUT_SECONDS)
        if metadata.commit_hash is None:
            raise ConnectionError("the server that answered is not a Hub, perhaps the login page of this network")
        path = Path(hf_hub_download(source.repo, source.filename, revision=source.revision, cache_dir=cache_dir))
    # All classes, because versions of the client raise different ones (of requests, httpx, httpx2 and hf_xet), which
    # have no base class in common.
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


def _weights_name(repo: str, names: set[str]) -> str:
    """The file that holds a repository's CLIP, or the index of the files that do.

    Raises:
        CheckpointError: if there is none.
    """
    # In timm's repositories model.safetensors is the image tower alone; open_clip_model.safetensors is the CLIP.
    order = reversed(WEIGHTS) if "open_clip_config.json" in names else WEIGHTS
    if weights := next((name for name in order if name in names), None):
        return weights
    for name in sorted(names):
        if refusal := pickle_refusal(name):
            raise CheckpointError(f"{repo}: has no safetensors; {refusal}")
    raise CheckpointError(f"{repo}: holds no weights; expected one of {', '.join(WEIGHTS)}")


def _cached(source: Source, cache_dir: str | Path | None) -> Path | None:
    """The path of a file in the cache, or None. A damaged file is removed, so that it is downloaded again."""
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
    """The folder of a repository in the cache, if all files of its weights are there."""
    for name in WEIGHTS:
        if path := _cached(Source(repo, revision, name), cache_dir):
            shards = [_cached(Source(repo, revision, shard), cache_dir) for shard in _shards(path)]
            return path.parent if all(shards) else None
    return None


def _shards(path: Path) -> list[str]:
    """The names of the weights files, if ``path`` is the index of several."""
    return shard_names(path) if path.name.endswith(".index.json") else []


def _record_revision(path: Path, revision: str) -> None:
    """Write into the cache which commit a branch or tag points to, so that it can be found offline.

    hf_hub_download writes this note when it is asked for a branch. miniclip asks for a commit, so that all files come
    from the same one, and therefore writes the note itself, once all files have arrived.
    """
    commit = path.parent.name
    ref = path.parents[2] / "refs" / revision  # beside snapshots/<commit>/<file>
    try:
        if revision != commit and not (ref.is_file() and ref.read_text() == commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    except OSError:
        pass  # the cache is read-only


def _is_verified(path: Path, sha256: str | None) -> bool:
    """Whether a cached file has its checksum.

    Computing a checksum takes longer than loading the model. A correct checksum is therefore recorded, with the size
    and modification time of the file, and not computed again while both stay the same. The record lies in
    HF_HOME/miniclip, because the cache is huggingface_hub's.

    Without a pinned checksum the one that the Hub reported is used: the cache names a file's blob by it.
    """
    from huggingface_hub import constants

    etag = path.readlink().name if path.is_symlink() else ""
    expected = sha256 or (etag if _is_sha256(etag) else None)
    if expected is None:
        return True  # a small text file, for which the Hub reports a git hash, or a cache without links
    stat = path.stat()
    record = Path(constants.HF_HOME) / "miniclip" / "verified" / expected
    identity = f"{stat.st_size} {stat.st_mtime_ns}"
    try:
        if record.read_text() == identity:
            return True
    except OSError:
        pass
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            return False
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(identity)
    except OSError:
        pass  # HF_HOME is read-only: the checksum is computed again next time
    return True


def _discard(path: Path) -> None:
    """Remove a file and all links on the way to it. A snapshot links to a blob, which may link to a shared blob."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)


def _is_revision(text: str) -> bool:
    """Whether git allows this name for a branch or tag (git-check-ref-format), which commits are as well.

    The cache notes which commit a branch is in a file of this name. A path through ".." would leave the cache.
    """
    forbidden = re.search(r"[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]|\.\.|@\{", text)
    wrong = (not part or part.startswith(".") or part.endswith(".lock") for part in text.split("/"))
    return not (forbidden or text == "@" or text.endswith(".") or any(wrong))


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
        f"{_OFFLINE_HINT if what in KNOWN else ''}"
    )


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer that refuses, or None if there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _reason(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if (status := _status(error)) is not None:
        hint = "; a private or gated repository needs a valid token in HF_TOKEN" if status in (401, 403) else ""
        return f"HTTP {status}{hint}"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")  # some fill paragraphs
