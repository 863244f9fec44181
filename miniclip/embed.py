"""Pictures -> vectors on disk: a long list in, shards of unit vectors out, whatever is among the files.

The files are listed and sorted once. A shard is a slice of that list, no batch reaches from one shard into the next,
and so a shard is a function of its files alone: a run killed and resumed any number of times leaves the same bytes as
one that was not, on the same machine with as many threads.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from miniclip import huggingface
from miniclip.errors import ConfigError, ImageError, InputError
from miniclip.hub import BUNDLED
from miniclip.images import decode_image
from miniclip.loading import load, weights_sha256
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.sources import Item, file_item, list_items
from miniclip.store import Failure, Shard, Store

# Of the place where a file is, not of what is in it. (A damaged picture has Pillow seek where nothing is: EINVAL.)
_OF_THE_SYSTEM = {
    getattr(errno, name, None)
    for name in (
        *("ENOENT", "EACCES", "EPERM", "EIO", "ENXIO", "ENODEV", "EMFILE", "ENFILE", "ESTALE", "ETIMEDOUT"),
        *("ENOTCONN", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
} - {None}
_AHEAD = 2  # batches that wait decoded: enough that the model never waits, and all the memory a long run takes


# -- one shard --------------------------------------------------------------------------------------------------------

Decoded = np.ndarray | Failure  # (3, S, S) uint8, or what is wrong with the picture


def decode(item: Item, preprocess: Preprocess, at_least: int | None) -> Decoded:
    """The model's view of one picture, before it is normalised."""
    if item.error is not None:
        return Failure(item.error)
    now = file_item(item.path)
    if now.error is not None:
        return Failure(now.error)
    if now.size != -1 and now[:3] != item[:3]:  # or it would be there twice, once under a name that is not its own
        return Failure("has changed since it was listed: the same command again takes it as it is now")
    try:
        if item.member is None:
            return preprocess.to_pixels(decode_image(item.path, item.path, at_least))
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            data = file.read(item.length)
        return preprocess.to_pixels(decode_image(io.BytesIO(data), item.name, at_least))
    except ImageError as error:
        return Failure(error.reason, again=item.size != -1 and _is_of_the_system(error.__cause__))
    except Exception as error:  # whatever a picture provokes, it must not end a run of a million others
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Failure(f"cannot be read ({reason})", again=_is_of_the_system(error))


def _is_of_the_system(error: BaseException | None) -> bool:
    """Whether the system could not give the bytes, rather than Pillow make something of them."""
    return isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM


def decode_ahead(
    items: Iterable[Item], preprocess: Preprocess, at_least: int | None, workers: int, ahead: int
) -> Generator[Decoded, None, None]:
    """``decode`` of every item in order, by threads that keep up to ``ahead`` results ready.

    Threads, because Pillow lets go of Python while it decodes and resizes.
    """
    with ThreadPoolExecutor(workers, "miniclip-decode") as pool:
        waiting: deque[Future[Decoded]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(decode, item, preprocess, at_least))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def warm_up(model: CLIP) -> None:
    """Bring a model to where all later calls go the same way.

    On a small first call the fast path still runs the plain modules, and those round differently.
    """
    size = model.visual.input_resolution
    image = torch.zeros(1, 3, size, size, device=model.device)
    with torch.inference_mode():
        for _ in range(2):
            model.encode_image(image)


def encode(model: CLIP, preprocess: Preprocess, pixels: Sequence[np.ndarray]) -> np.ndarray:
    """The unit vectors (N, D) float16 of a batch that is decoded.

    Raises:
        ConfigError: if the batch does not fit into the device's memory.
    """
    try:
        with torch.inference_mode():
            images = preprocess.normalise(torch.from_numpy(np.stack(pixels)).to(model.device))
            vectors: np.ndarray = F.normalize(model.encode_image(images).float(), dim=1).half().cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(
            f"a batch of {len(pixels)} pictures does not fit into the memory of {model.device}: choose a smaller one"
        ) from None
    return vectors


def encode_shards(
    model: CLIP,
    preprocess: Preprocess,
    shards: Iterable[Sequence[Item]],
    *,
    batch_size: int,
    fast_decode: bool = False,
    workers: int | None = None,
    report: Callable[[int, int], object] = lambda done, failed: None,
) -> Generator[Shard, None, None]:
    """Embed one slice of the list after another, and decode the next pictures meanwhile.

    ``report`` is told of every batch how many pictures it took from the list, and how many of them failed.
    """
    warm_up(model)
    slices, again = tee(shards)
    at_least = preprocess.size * 3 // 2 if fast_decode else None
    stream = decode_ahead(
        chain.from_iterable(again), preprocess, at_least, workers or available_cores(), _AHEAD * batch_size
    )
    with contextlib.closing(stream):
        for items in slices:
            shard = Shard(np.zeros((0, model.config.embed_dim), np.float16), [], {})
            parts = [shard.vectors]
            for start in range(0, len(items), batch_size):
                rows = range(start, min(start + batch_size, len(items)))
                failed = len(shard.failures)
                parts.append(_encode_batch(model, preprocess, rows, stream, shard))
                report(len(rows), len(shard.failures) - failed)
            shard.vectors = np.concatenate(parts)
            yield shard


def _encode_batch(
    model: CLIP, preprocess: Preprocess, rows: Iterable[int], stream: Iterator[Decoded], shard: Shard
) -> np.ndarray:
    """The vectors of a batch; what became of its rows is noted in ``shard``."""
    pixels, decoded = [], []
    for row, result in zip(rows, stream):
        if isinstance(result, Failure):
            shard.failures[row] = result
        else:
            pixels.append(result)
            decoded.append(row)
    if not pixels:
        return shard.vectors[:0]
    vectors = encode(model, preprocess, pixels)
    finite = np.isfinite(vectors).all(axis=1)
    for row, good in zip(decoded, finite):
        if good:
            shard.rows.append(row)
        else:
            shard.failures[row] = Failure(f"its vector is not finite in {str(model.dtype).removeprefix('torch.')}")
    return vectors[finite]


def available_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What a run of ``embed_images`` did, and what there is."""

    embedded: int
    failed: int
    skipped: int  # files whose name is not a picture's
    shards: int
    total: int  # vectors in the folder, those of earlier runs included
    seconds: float


def settings_of(
    name: str | os.PathLike[str],
    model: CLIP,
    preprocess: Preprocess,
    *,
    batch_size: int,
    shard_size: int,
    fast_decode: bool,
) -> dict[str, Any]:
    """What the vectors depend on. A run that differs in any of it would mix two kinds of vectors in one folder."""
    return {
        **model_settings(name, model, preprocess),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "shard_size": shard_size,
        "fast_decode": fast_decode,
    }


def model_settings(name: str | os.PathLike[str], model: CLIP, preprocess: Preprocess) -> dict[str, Any]:
    """What a vector depends on besides its picture."""
    return {
        "model": absolute(name),
        "weights_sha256": weights_sha256(name),
        "config": asdict(model.config),
        "preprocess": {**huggingface.preprocess_to_dict(preprocess), "convention": preprocess.convention},
    }


def absolute(name: str | os.PathLike[str]) -> str:
    """A model's name as it means the same from every folder."""
    text = os.fspath(name)
    path = os.path.expanduser(text)
    return os.path.abspath(path) if text not in BUNDLED and os.path.exists(path) else text


@dataclass(frozen=True)
class Progress:
    """Where a run stands, in pictures."""

    done: int
    failed: int
    todo: int
    seconds: float


def embed_images(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] = "ViT-B/32",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    shard_size: int = 10_000,
    fast_decode: bool = False,
    progress: Callable[[Progress], object] | None = None,
) -> Summary:
    """Embed every picture of ``source`` into the folder ``out``, or go on where an earlier run ended.

    A second call with new files in the source adds shards for those alone; a file is known by its path, size and time
    of last change. Nothing that is wrong with a file ends a run: it is told in failures.jsonl, and the file is tried
    again when it has changed, or when it could not be read and now can.

    Args:
        source: a folder, with all its subfolders; a .tar, as img2dataset writes them; or a text file of paths.
        out: the folder of the embeddings, made if it is missing.
        model, device, dtype: as in ``load``; what the vectors are computed in. They are stored in float16.
        batch_size: pictures that go through the model at a time.
        workers: threads that decode; one for each core unless given.
        shard_size: pictures of the list that make a shard.
        fast_decode: decode large JPEGs at the smallest half, quarter or eighth of their size that still has one and a
            half times the model's side. Several times as fast on photos of many megapixels, and not exact (see
            ``open_image``).
        progress: called before the first batch and after every one.

    Returns:
        What was done.

    Raises:
        InputError: if the source cannot be read, holds no pictures, or a number cannot be.
        ConfigError: if ``out`` was begun with other settings (naming the first), or another run is in it.
        StorageError: if ``out`` cannot be written; what was complete stays so.
        Those of ``load``.
    """
    for name, number in (("batch_size", batch_size), ("shard_size", shard_size), ("workers", workers)):
        if not (name == "workers" and number is None) and (type(number) is not int or number < 1):
            raise InputError(f"{name} must be an int of at least 1, got {number!r}")
    if not os.fspath(source):
        raise InputError("the source is an empty path")
    began = time.perf_counter()
    store = Store(Path(out))
    items, skipped = list_items(Path(source))
    clip, preprocess = load(model, device, dtype=dtype)
    with store.locked():
        numbers = {"batch_size": batch_size, "shard_size": shard_size}
        store.begin(settings_of(model, clip, preprocess, **numbers, fast_decode=fast_decode))
        store.plan(items, shard_size)
        del items  # the list may be long
        todo = store.todo()
        done = failed = 0
        planned, started = sum(map(store.size, todo)), time.perf_counter()

        def report(taken: int, bad: int) -> None:
            nonlocal done, failed
            done, failed = done + taken, failed + bad
            if progress:
                progress(Progress(done, failed, planned, time.perf_counter() - started))

        report(0, 0)
        shards = encode_shards(
            clip,
            preprocess,
            map(store.items, todo),
            batch_size=batch_size,
            fast_decode=fast_decode,
            workers=workers,
            report=report,
        )
        with contextlib.closing(shards):
            for number, shard in zip(todo, shards):
                store.write_shard(number, shard)
        total = store.finish()
    return Summary(done - failed, failed, skipped, len(todo), total, time.perf_counter() - began)
