"""Images -> vectors on disk: a long list in, shards of unit vectors out. A bad file never ends a run.

The images are listed and sorted once. A shard is a slice of that list, and no batch crosses the border of a shard.
Therefore the content of a shard depends on its images alone. A run that was killed and resumed leaves the same bytes
as an uninterrupted run, on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from miniclip.errors import ConfigError, ImageError, InputError
from miniclip.folders import Rules
from miniclip.images import MAX_BYTES, decode_image
from miniclip.loading import load
from miniclip.manifest import complete_settings, run_settings
from miniclip.model import CLIP
from miniclip.planning import plan, take_over
from miniclip.preprocess import Preprocess
from miniclip.shard_files import Failure, Shard
from miniclip.sources import ImageSource, checksum, list_images, stat_image
from miniclip.store import EmbeddingStore

# Storage errors, worth a retry. EINVAL is not among them: Pillow causes it by seeking in damaged files.
_STORAGE_ERRNOS = {
    getattr(errno, name, None)
    for name in (
        *("ENOENT", "EACCES", "EPERM", "EIO", "ENXIO", "ENODEV", "EMFILE", "ENFILE", "ESTALE", "ETIMEDOUT"),
        *("ENOTCONN", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
} - {None}

# Batches that wait decoded. Two are enough to keep the model busy; more would only take memory.
_BATCHES_AHEAD = 2


# -- shards -----------------------------------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """A decoded image."""

    values: np.ndarray  # (3, S, S) uint8
    checksum: str  # of the file's bytes


Decoded = Pixels | Failure  # or why the image could not be decoded


def decode(source: ImageSource, preprocess: Preprocess, min_side: int | None, max_bytes: int = MAX_BYTES) -> Decoded:
    """Decode one image to the pixels that the model sees, before normalisation. Never raises.

    Args:
        source: where the image lies.
        preprocess: resizes and crops the image.
        min_side: if given, JPEGs may be decoded at a fraction of their size, down to this side (see ``open_image``).
        max_bytes: as in ``open_image``.
    """
    if source.error is not None:
        return Failure(source.error)
    now = stat_image(source.path)
    if now.error is not None:
        return Failure(now.error, retry=source.size != -1)
    if now.size != -1 and now.stat != source.stat:
        # The next run lists the new file, which would then be there twice. The old one may be put back.
        text = "has changed since it was listed: run the same command again to embed the new file"
        return Failure(text, retry=source.size != -1)
    try:
        with source.open() as file:
            values = preprocess.to_pixels(decode_image(file, source.name, min_side, max_bytes))
            return Pixels(values, checksum(file))
    except ImageError as error:
        return Failure(error.reason, retry=source.size != -1 and is_storage_error(error.__cause__))
    except Exception as error:  # whatever one image provokes must not end a run of millions
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            return Failure("no such file", retry=source.size != -1)
        return Failure(f"cannot be read ({reason})", retry=source.size != -1 and is_storage_error(error))


def is_storage_error(error: BaseException | None) -> bool:
    """Whether the operating system failed to deliver the bytes. Otherwise the content of the file is at fault."""
    return isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS


def decode_ahead(
    sources: Iterable[ImageSource],
    preprocess: Preprocess,
    min_side: int | None,
    workers: int,
    ahead: int,
    max_bytes: int = MAX_BYTES,
) -> Generator[Decoded, None, None]:
    """``decode`` every image in order, in ``workers`` threads that keep up to ``ahead`` results ready.

    Threads are enough, because Pillow releases Python's lock while it decodes and resizes.
    """
    with ThreadPoolExecutor(workers, "miniclip-decode") as pool:
        pending: deque[Future[Decoded]] = deque()
        try:
            for source in sources:
                pending.append(pool.submit(decode, source, preprocess, min_side, max_bytes))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def warm_up(model: CLIP) -> None:
    """Run the model twice, so that all later calls take the same path through it.

    The first calls may run without packed weights (see ``load``), and those results are rounded differently.
    """
    size = model.visual.input_resolution
    image = torch.zeros(1, 3, size, size, device=model.device)
    with torch.inference_mode():
        for _ in range(2):
            model.encode_image(image)


def encode(model: CLIP, preprocess: Preprocess, pixels: Sequence[np.ndarray]) -> np.ndarray:
    """A batch of decoded images, N of (3, S, S) uint8 -> unit vectors (N, D) float16.

    Raises:
        ConfigError: if the batch does not fit into the memory of the device.
    """
    try:
        with torch.inference_mode():
            images = preprocess.normalise(torch.from_numpy(np.stack(pixels)).to(model.device))
            vectors: np.ndarray = F.normalize(model.encode_image(images).float(), dim=1).half().cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(
            f"a batch of {len(pixels)} images does not fit into the memory of {model.device}: choose a smaller batch"
        ) from None
    return vectors


def encode_shards(
    model: CLIP,
    preprocess: Preprocess,
    listings: Iterable[Sequence[ImageSource]],
    *,
    batch_size: int,
    fast_decode: bool = False,
    workers: int | None = None,
    max_image_bytes: int = MAX_BYTES,
    report: Callable[[int, int], object] = lambda done, failed: None,
) -> Generator[Shard, None, None]:
    """Embed one shard after another. Threads decode the next images while the model works on a batch.

    Args:
        model, preprocess: as ``load`` returns them.
        listings: for each shard, its images. The listings are read as they are needed.
        batch_size: images that go through the model together.
        fast_decode: decode large JPEGs at a fraction of their size (see ``embed_images``).
        workers: threads that decode; by default one for each core.
        max_image_bytes: as ``max_bytes`` in ``open_image``.
        report: called after each batch with the number of its images, and how many of them failed.

    Raises:
        ConfigError: if a batch does not fit into the memory of the device.
    """
    warm_up(model)
    min_side = preprocess.size * 3 // 2 if fast_decode else None
    ahead = _BATCHES_AHEAD * batch_size
    listings, listings_to_decode = tee(listings)  # decoding runs ahead of encoding, also across shards
    to_decode = chain.from_iterable(listings_to_decode)
    with contextlib.closing(
        decode_ahead(to_decode, preprocess, min_side, workers or available_cores(), ahead, max_image_bytes)
    ) as stream:
        for listing in listings:
            shard = Shard(np.zeros((0, model.config.embed_dim), np.float16), [], {}, [])
            batches = [shard.vectors]
            for start in range(0, len(listing), batch_size):
                rows = range(start, min(start + batch_size, len(listing)))
                batch = _encode_batch(model, preprocess, dict(zip(rows, stream)))
                batches.append(batch.vectors)
                shard.rows += batch.rows
                shard.failures |= batch.failures
                shard.checksums += batch.checksums
                report(len(rows), len(batch.failures))
            shard.vectors = np.concatenate(batches)
            yield shard


def _encode_batch(model: CLIP, preprocess: Preprocess, decoded: Mapping[int, Decoded]) -> Shard:
    """One batch of a shard, given by row in the listing: its vectors, their rows, and the failed rows."""
    failures = {row: result for row, result in decoded.items() if isinstance(result, Failure)}
    images = {row: result for row, result in decoded.items() if isinstance(result, Pixels)}
    if not images:
        return Shard(np.zeros((0, model.config.embed_dim), np.float16), [], failures, [])
    vectors = encode(model, preprocess, [image.values for image in images.values()])
    finite = np.isfinite(vectors).all(axis=1)
    dtype = str(model.dtype).removeprefix("torch.")
    failures |= {row: Failure(f"its vector is not finite in {dtype}") for row, good in zip(images, finite) if not good}
    rows = [row for row, good in zip(images, finite) if good]
    return Shard(vectors[finite], rows, failures, [images[row].checksum for row in rows])


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The result of one call of ``embed_images``.

    Attributes:
        embedded: images that this run embedded.
        failed: images that this run could not embed.
        taken: images that were embedded before, under another name or with another time.
        skipped: the suffixes that are not those of images -> how many files have them.
        excluded: files and folders that were left out, by the default rules or by ``exclude``.
        links: links to folders that were not followed.
        shards: shards that this run wrote.
        total: vectors in the folder that a search finds, those of earlier runs included.
        seconds: how long the run took.
    """

    embedded: int
    failed: int
    taken: int
    skipped: Mapping[str, int]
    excluded: int
    links: int
    shards: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """The state of a run, in images.

    Attributes:
        done: images that have been processed, failed ones included.
        failed: images that could not be embedded.
        total: images that this run has to process.
        seconds: time since the first image.
        model: the name of the model.
    """

    done: int
    failed: int
    total: int
    seconds: float
    model: str


def embed_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shard_size: int | None = None,
    fast_decode: bool | None = None,
    exclude: Sequence[str] = (),
    default_excludes: bool = True,
    follow_links: bool = False,
    max_image_bytes: int = MAX_BYTES,
    progress: Callable[[Progress], object] | None = None,
) -> Summary:
    """Embed every image of ``source`` into the folder ``out``, or continue an interrupted run.

    A later call embeds only new files, into new shards. A file is identified by its path, its size and its modification
    time. A bad file does not end a run: failures.jsonl lists it with the reason. It is tried again once it has changed,
    or, if it could not be read, once it can be read.

    Model and settings that are not given are those with which ``out`` was made, and for a new folder the defaults.

    Args:
        source: one source or several: a folder, with all its subfolders; an image; a .tar, as img2dataset writes them;
            or a text file of paths.
        out: the folder of the embeddings. It is created if it is missing.
        model: what to load, as ``name`` in ``load``. Default: ViT-B/32.
        device: as in ``load``.
        dtype: as in ``load``, for the computation. Vectors are stored in float16.
        batch_size: images that go through the model together. Default: 32.
        workers: threads that decode; by default one for each core.
        shard_size: images in one shard, which an interruption loses at most. Default: 1,000.
        fast_decode: decode large JPEGs at a half, a quarter or an eighth of their size, if that is still at least one
            and a half times the size that the model takes. This is several times faster for photos of many megapixels,
            and not exact (see ``open_image``). Default: no.
        exclude: patterns of what to leave out in folders (see ``folders.Rules``).
        default_excludes: leave out what other programs keep beside photos: hidden folders, names that begin with "._",
            waste bins, thumbnails, and all but the originals in photo libraries.
        follow_links: enter folders through symbolic links. No folder is entered twice.
        max_image_bytes: as ``max_bytes`` in ``open_image``. Each thread decodes one image at a time.
        progress: called before the first batch and after every batch.

    Returns:
        What the run did.

    Raises:
        InputError: if a source cannot be read, if none contains images, or if a number is out of range.
        ConfigError: if ``out`` was created with another model or settings (the error names the difference), or if
            another run is writing to it.
        StorageError: if ``out`` cannot be written, or another program removes files of it during the run. Complete
            shards stay complete.
        MiniclipError: as ``load`` does, if the model cannot be loaded.
    """
    numbers = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}
    for name, number in (numbers | {"max_image_bytes": max_image_bytes}).items():
        if number is not None and (type(number) is not int or number < 1):
            raise InputError(f"{name} must be an int of at least 1, got {number!r}")
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources or not all(map(os.fspath, sources)):
        raise InputError("the source is an empty path" if sources else "there is no source")
    began = time.perf_counter()
    store = EmbeddingStore(Path(out))
    listing = list_images([*map(Path, sources)], Rules.of(exclude, default_excludes, follow_links))
    given = {"model": model, "dtype": dtype, "batch_size": batch_size, "shard_size": shard_size}
    chosen = complete_settings(store.manifest(), {**given, "fast_decode": fast_decode})
    clip, preprocess = load(chosen.model, device, dtype=chosen.dtype)
    with store.lock():
        store.open_run(run_settings(chosen, clip, preprocess))
        plan(store, listing, chosen.shard_size)
        listing.images.clear()  # the list may be long
        taken = take_over(store)
        pending = store.pending()
        counter = _Counter(sum(shard.count_images() for shard in pending), os.fspath(chosen.model), progress)
        shards = encode_shards(
            clip,
            preprocess,
            (shard.read_listing() for shard in pending),
            batch_size=chosen.batch_size,
            fast_decode=chosen.fast_decode,
            workers=workers,
            max_image_bytes=max_image_bytes,
            report=counter.add,
        )
        with contextlib.closing(shards):
            for files, shard in zip(pending, shards):
                store.check_run()
                files.write(shard)
        store.check_run(pending)
        total = store.write_failure_summary()
    embedded, seconds = counter.done - counter.failed, time.perf_counter() - began
    left_out = (dict(listing.skipped), listing.excluded, listing.links)
    return Summary(embedded, counter.failed, taken, *left_out, len(pending), total, seconds)


class _Counter:
    """Counts the images of a run and reports the progress."""

    def __init__(self, total: int, model: str, progress: Callable[[Progress], object] | None) -> None:
        self.done = self.failed = 0
        self._total = total
        self._model = model
        self._progress = progress
        self._started = time.perf_counter()
        self.add(0, 0)

    def add(self, done: int, failed: int) -> None:
        self.done += done
        self.failed += failed
        if self._progress:
            self._progress(
                Progress(self.done, self.failed, self._total, time.perf_counter() - self._started, self._model)
            )
