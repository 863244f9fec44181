"""``miniclip index``: builds the inverted file of a folder, adds new shards to it, and measures what it finds."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.errors import ConfigError, StorageError
from miniclip.files import atomic_replace, atomic_write
from miniclip.inverted_file import (
    FOLDER,
    Covered,
    InvertedFile,
    Record,
    Segment,
    empty_lists,
    first_foreign,
    head_checksum,
    import_faiss,
    open_centroids,
    open_lists,
    read_record,
    record_path,
)
from miniclip.search import Index
from miniclip.shard_files import ShardFiles, remove_file
from miniclip.store import EmbeddingStore
from miniclip.tokenizer import Tokenizer, tokenize

LEAST = 5_000  # vectors: below, an exact search takes about a millisecond
SEGMENT_BYTES = 2**29  # of the vectors in one file of lists; while it is built, it is in memory
GROWTH = 4  # how many times the vectors that the centroids were trained on make them out of date
RECALL = 0.99  # of the true ten nearest images; as many lists are probed as that takes
_SAMPLE = 40  # vectors for each centroid that is trained. FAISS warns below 39.
_MOST_LISTS = 2**16
_LEAST_PROBES = 8  # however well a sample of queries is answered with fewer
_QUERIES = 200  # of each kind
_WORDS = 1_000  # of which the queries are chosen
_NEAREST = 10
_BLOCK = 2**14  # vectors that are added or compared at a time, as float32
_ROUNDING = 1e-6  # by which two float32 sums of one product differ

Say = Callable[[str], object]


@dataclass(frozen=True)
class Indexed:
    """The result of ``build_inverted_file``.

    Attributes:
        vectors: in the inverted file, those of dead rows included.
        added: how many of them this run put there.
        lists: how many lists they are in.
        probes: how many of these a search compares with the query.
        recall: ``words`` and ``images``: the share of the true ten nearest images that searches with ``probes`` find.
    """

    vectors: int
    added: int
    lists: int
    probes: int
    recall: dict[str, float]


def build_inverted_file(
    folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None, say: Say = lambda _: None
) -> Indexed | None:
    """Build the inverted file of a folder's vectors, or add the shards that it lacks.

    Args:
        folder: a folder that ``embed_images`` made.
        model: where the model of the vectors is now, if it has moved. It encodes words, to measure recall.
        say: called with a sentence before each long step.

    Returns:
        What the inverted file is now, or None if the folder has too few vectors for one.

    Raises:
        ConfigError: if a package is missing, the folder has no vectors, a file is damaged, or another run is writing.
        StorageError: if a file cannot be written or removed.
        MiniclipError: as ``Index.load`` does.
    """
    import_faiss()  # fail before any work if it is missing
    store = EmbeddingStore(Path(folder))
    store.require_manifest()  # before the lock, which would create the folder
    with store.lock():
        index = Index.open(folder, model)
        if len(index) < LEAST:
            if record_path(store.folder).exists():
                say(f"removing an inverted file, because {len(index):,} vectors need none")
                remove_file(record_path(store.folder))
                _remove_leftovers(store.folder, None)
            return None
        words = _encode_words(index)
        record = _usable_record(store.folder, index, say)
        _remove_leftovers(store.folder, record)
        if record is None:
            trained = _train(index, say)
            record = Record(f"centroids_{secrets.token_hex(8)}.npy", len(index), 1, {})
            buffer = io.BytesIO()
            np.save(buffer, trained)
            _write(store.folder / FOLDER / record.centroids, buffer.getbuffer())
        centroids = open_centroids(store.folder, record, index.dimension)
        before = sum(shard.rows for shard in record.shards)
        if (added := len(index) - before) or not record.recall:
            say(f"adding {added:,} vectors to {centroids.ntotal:,} lists")
            record = replace(record, segments=[*_add(store.folder, index, record, centroids)])
            say(f"measuring what {_QUERIES} words and {_QUERIES} images find")
            record = _measured(store.folder, index, record, words)
        _write(record_path(store.folder), record.encode())
        _remove_leftovers(store.folder, record)
        return Indexed(len(index), added, centroids.ntotal, record.probes, record.recall)


# -- what is there ----------------------------------------------------------------------------------------------------


def _usable_record(folder: Path, index: Index, say: Say) -> Record | None:
    """The record of an inverted file that can be added to, with the times of the shards as they are now."""
    try:
        record = read_record(folder)
        if record is None:
            return None
        times = index.shard_times()
        if first_foreign(record, times) is not None:  # copied to another disk, perhaps: only the times may differ
            record = _with_new_times(record, index)
            if (foreign := first_foreign(record, times)) is not None:
                say(f"the inverted file does not belong to the vectors of shard {foreign}: building it anew")
                return None
        centroids = open_centroids(folder, record, index.dimension)
        for segment in record.segments:
            empty_lists(centroids).replace_invlists(open_lists(folder, segment, index.dimension), True)
    except ConfigError as error:
        say(f"{error}: building the inverted file anew")
        return None
    if len(index) >= GROWTH * record.trained_on:
        say(f"the folder has grown from {record.trained_on:,} to {len(index):,} vectors: training the centroids anew")
        return None
    return record


def _with_new_times(record: Record, index: Index) -> Record:
    """The record with the current times of those shards whose vectors have the same checksum."""
    parts = {shard.number: (shard, vectors) for shard, vectors in zip(index.shards, index.vectors())}

    def renewed(covered: Covered) -> Covered:
        found = parts.get(covered.number)
        now = _cover(*found) if found else covered
        return now if now._replace(mtime_ns=covered.mtime_ns) == covered else covered

    segments = [replace(segment, shards=[*map(renewed, segment.shards)]) for segment in record.segments]
    return replace(record, segments=segments)


def _cover(shard: ShardFiles, vectors: np.ndarray) -> Covered:
    time = shard.stat_vectors().st_mtime_ns
    digest = hashlib.blake2b(np.ascontiguousarray(vectors).view(np.uint8).data, digest_size=16).hexdigest()
    return Covered(shard.number, len(vectors), time, digest)


def _remove_leftovers(folder: Path, record: Record | None) -> None:
    """Remove what killed or earlier runs left. A record that is out of date stays until another replaces it."""
    names = record.names if record else _names_in_use(folder)
    for path in (folder / FOLDER).glob("*"):
        ours = re.fullmatch(r"(centroids_[0-9a-f]{16}\.npy|lists_[0-9a-f]{16}\.faiss)", path.name)
        if path.name not in names and (ours or re.fullmatch(r"\.(centroids|lists|inverted_file).*\.tmp", path.name)):
            remove_file(path)


def _write(path: Path, data: bytes | memoryview) -> None:
    try:
        atomic_write(path, data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror})") from None


def _names_in_use(folder: Path) -> set[str]:
    try:
        record = read_record(folder)
    except ConfigError:
        return set()
    return record.names if record else set()


# -- the lists --------------------------------------------------------------------------------------------------------


def _train(index: Index, say: Say) -> np.ndarray:
    """Centroids (lists, D) float32 of a sample of the living rows, by spherical k-means."""
    faiss = import_faiss()
    alive = (~index.dead).nonzero()[:, 0]
    if len(alive) < LEAST:
        alive = torch.arange(len(index))
    lists = max(1, min(round(4 * math.sqrt(len(index))), len(alive) // _SAMPLE, _MOST_LISTS))
    randoms = torch.Generator().manual_seed(0)
    chosen = alive[torch.randperm(len(alive), generator=randoms)[: lists * _SAMPLE]].sort().values
    say(f"training {lists:,} centroids on {len(chosen):,} vectors")
    sample = np.empty((len(chosen), index.dimension), np.float32)
    start = 0
    for block in index.table.gather(chosen):
        sample[start : start + len(block)] = block.numpy()
        start += len(block)
    points = {"min_points_per_centroid": 1, "max_points_per_centroid": _SAMPLE}
    means = faiss.Kmeans(index.dimension, lists, niter=10, spherical=True, seed=0, **points)
    means.train(sample)
    return np.ascontiguousarray(means.centroids, np.float32)


def _add(folder: Path, index: Index, record: Record, centroids: Any) -> Iterable[Segment]:
    """The files of lists with all shards: the full ones unchanged, the last one filled up, and new ones."""
    limit = max(1, SEGMENT_BYTES // (2 * index.dimension))
    covered = {shard.number for shard in record.shards}
    later = [pair for pair in zip(index.shards, index.vectors()) if pair[0].number not in covered]
    segments = list(record.segments)
    last = segments.pop() if segments and segments[-1].rows < limit and later else None
    yield from segments
    rows = last.rows if last else 0
    group: list[tuple[ShardFiles, np.ndarray]] = []
    for shard, vectors in later:
        if rows and rows + len(vectors) > limit:
            yield _write_segment(folder, index.dimension, centroids, last, group)
            last, rows, group = None, 0, []
        group.append((shard, vectors))
        rows += len(vectors)
    if group:
        yield _write_segment(folder, index.dimension, centroids, last, group)


def _write_segment(
    folder: Path,
    dimension: int,
    centroids: Any,
    last: Segment | None,
    group: Sequence[tuple[ShardFiles, np.ndarray]],
) -> Segment:
    """Write a file with the lists of an old one, which stays, and with more shards."""
    faiss = import_faiss()
    lists, shards = empty_lists(centroids), list(last.shards) if last else []
    if last:
        lists.replace_invlists(open_lists(folder, last, dimension, into_memory=True), True)
    lists.ntotal = rows = sum(shard.rows for shard in shards)
    for shard, vectors in group:
        shards.append(_cover(shard, vectors))
        for start in range(0, len(vectors), _BLOCK):
            block = vectors[start : start + _BLOCK].astype(np.float32)
            lists.add_with_ids(block, np.arange(rows, rows + len(block)))
            rows += len(block)
    name = f"lists_{secrets.token_hex(8)}.faiss"
    path = folder / FOLDER / name
    try:
        with atomic_replace(path) as (temporary,):
            writer = faiss.FileIOWriter(str(temporary))
            faiss.write_InvertedLists(lists.invlists, writer)
            del writer  # closes the file, and says nothing if the disk is full
            size = temporary.stat().st_size
            head = size - rows * (2 * dimension + 8)
            if not 0 < head <= 32 + 16 * centroids.ntotal:
                raise StorageError(f"{path} cannot be written ({size:,} bytes arrived)")
            checksum = head_checksum(temporary, head)
    except (OSError, RuntimeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return Segment(name, size, checksum, shards)


# -- what searches find -----------------------------------------------------------------------------------------------


def _encode_words(index: Index) -> np.ndarray:
    """Unit vectors (N, D) float32 of words. They are another distribution than images, so recall differs.

    The words are frequent English ones, which the tokenizer knows as a whole. A model that has seen few words maps all
    others to much the same vector, so those are taken that the model tells apart best: each is the one farthest from
    all before.
    """
    model, _ = index.load()
    tokenizer = Tokenizer()
    known = (tokenizer.decode([token]).strip() for token in range(1_000, 11_000))
    words = [word for word in known if len(word) > 3 and word.isascii() and word.isalpha()]
    whole = [word for word in words if len(tokenizer.encode(word)) == 1]
    chosen = whole[:: max(1, len(whole) // _WORDS)][:_WORDS]
    with torch.inference_mode():
        parts = [chosen[start : start + 100] for start in range(0, len(chosen), 100)]
        tokens = [tokenize(part, model.context_length).to(model.device) for part in parts]
        vectors = F.normalize(torch.cat([model.encode_text(part).float().cpu() for part in tokens]), dim=1)
    farthest = [0]
    nearest = vectors @ vectors[0]  # of each word, the highest cosine to one that is taken
    while len(farthest) < min(_QUERIES, len(vectors)):
        farthest.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, vectors @ vectors[farthest[-1]])
    return vectors[farthest].numpy()


def _measured(folder: Path, index: Index, record: Record, words: np.ndarray) -> Record:
    """The record with as many probes as words and images need, and with their recall.

    An image that looks for others like it finds itself first. That is not counted.
    """
    alive = (~index.dead).nonzero()[:, 0]
    if not len(alive):
        return replace(record, probes=_LEAST_PROBES, recall={"words": 1.0, "images": 1.0})
    chosen = torch.randperm(len(alive), generator=torch.Generator().manual_seed(1))[:_QUERIES]
    images = torch.cat([*index.table.gather(alive[chosen].sort().values)]).float().numpy()
    starts = np.cumsum([0, *map(len, index.vectors())])
    numbers = [shard.number for shard in index.shards]
    inverted = InvertedFile(folder, record, dict(zip(numbers, starts.tolist())), index.dimension)
    hidden = inverted.selectors(index.dead.numpy())
    kinds = {"words": (words, 0), "images": (images, 1)}
    lowest = {kind: lowest_scores(index, queries, _NEAREST + own) for kind, (queries, own) in kinds.items()}
    for probes in _numbers_of_probes(inverted.lists):
        recall = {}
        for kind, (queries, own) in kinds.items():
            _, scores = inverted.search(queries, _NEAREST + own, probes, hidden)
            there = np.isfinite(lowest[kind])  # False if the folder has fewer living rows
            hits = (scores >= lowest[kind][:, None] - _ROUNDING).sum(axis=1) - own
            recall[kind] = float(np.where(there, hits / _NEAREST, 1).mean().round(4))
        if min(recall.values()) >= RECALL:
            break
    return replace(record, probes=probes, recall=recall)


def _numbers_of_probes(lists: int) -> Iterable[int]:
    """8, 12, 16, 24, 32 and so on, up to the number of lists."""
    probes = _LEAST_PROBES
    while probes < lists:
        yield probes
        probes += probes // 2 if probes & (probes - 1) == 0 else probes // 3
    yield lists


def lowest_scores(index: Index, queries: np.ndarray, count: int) -> np.ndarray:
    """Of each query (N, D) the product with the ``count``-th nearest living row, (N,) float32: exact search."""
    wanted, start = torch.from_numpy(queries), 0
    best = torch.full((len(wanted), count), -torch.inf)
    for vectors in index.vectors():
        for rows in torch.from_numpy(vectors).split(_BLOCK):
            scores: Tensor = wanted @ rows.float().T
            scores[:, index.dead[start : start + len(rows)]] = -torch.inf
            best = torch.cat([best, scores], dim=1).topk(count, dim=1).values
            start += len(rows)
    return best[:, -1].numpy()
