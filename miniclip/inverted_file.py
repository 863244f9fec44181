"""An inverted file beside the vectors of a folder: a search compares a query with some lists of vectors, not with all.

    inverted_file/inverted_file.json     which shards the file covers, and how many lists a search probes
    inverted_file/centroids_X.npy        (lists, D) float32: each vector is in the list of its nearest centroid
    inverted_file/lists_X.faiss          the float16 vectors of some shards, list by list, with their places

The lists are FAISS's (Johnson et al. 2017), memory-mapped. One file of lists holds half a gigabyte at most, so building
one needs little memory, and new shards get files of their own. The JSON is written last and names its files, whose
names are never used twice: after a crash at any moment it describes files that are complete.

Dead rows are in the lists, because they may live again. A search leaves them out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from miniclip.errors import ConfigError

FOLDER = "inverted_file"
MOST = 100  # images of one search. For more, the lists that it probes would hold too few: that search is exact.
_RECORD = "inverted_file.json"
_FORMAT = 1


def import_faiss() -> Any:
    """The package faiss, which only the inverted file needs.

    Raises:
        ConfigError: if the package is missing.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError('the package faiss is missing: pip install -c constraints.txt -e ".[faiss]"') from None
    return faiss


# -- what is on the disk ----------------------------------------------------------------------------------------------


class Covered(NamedTuple):
    """A shard whose vectors are in a file of lists.

    The time tells at no cost whether the vectors are still the same. If it differs, only the checksum knows.
    """

    number: int
    rows: int
    mtime_ns: int
    checksum: str


@dataclass(frozen=True)
class Segment:
    """A file of lists.

    Attributes:
        name: the file's name.
        size: its bytes.
        head: the checksum of its beginning, the table of the lists: FAISS trusts it, and would read anywhere.
        shards: what it holds. A vector's id is its place among the vectors of these shards.
    """

    name: str
    size: int
    head: str
    shards: list[Covered]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class Record:
    """The content of inverted_file.json.

    Attributes:
        centroids: the name of their file.
        trained_on: how many vectors the folder had when the centroids were trained.
        probes: how many lists a search compares with the query.
        recall: kind of query -> share of the true ten nearest images that a search with ``probes`` finds.
        segments: the files of lists.
    """

    centroids: str
    trained_on: int
    probes: int
    recall: dict[str, float]
    segments: list[Segment] = field(default_factory=list)

    @property
    def shards(self) -> list[Covered]:
        return [shard for segment in self.segments for shard in segment.shards]

    @property
    def names(self) -> set[str]:
        """Of all its files."""
        return {_RECORD, self.centroids, *(segment.name for segment in self.segments)}

    def encode(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self)}).encode()


def record_path(folder: Path) -> Path:
    return folder / FOLDER / _RECORD


def read_record(folder: Path) -> Record | None:
    """The record of a folder's inverted file, or None if there is none.

    Raises:
        ConfigError: if it is damaged, or of another version of miniclip.
    """
    path = record_path(folder)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r:.20} instead of {_FORMAT}")
        segments = [
            Segment(str(each["name"]), int(each["size"]), str(each["head"]), [_covered(*row) for row in each["shards"]])
            for each in data["segments"]
        ]
        recall = {str(kind): float(share) for kind, share in data["recall"].items()}
        record = Record(str(data["centroids"]), int(data["trained_on"]), int(data["probes"]), recall, segments)
        if record.probes < 1 or any("/" in name or "\\" in name for name in record.names):
            raise ValueError("it has no probes, or a file elsewhere")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from None


def _covered(number: int, rows: int, mtime_ns: int, checksum: str) -> Covered:
    return Covered(int(number), int(rows), int(mtime_ns), str(checksum))


def first_foreign(record: Record, shards: Mapping[int, tuple[int, int]]) -> int | None:
    """The first shard of a record whose vectors are no longer those of the folder, or None if all of them are.

    Args:
        shards: of the folder: number -> rows and time of the vectors.
    """
    for shard in record.shards:
        if shards.get(shard.number) != (shard.rows, shard.mtime_ns):
            return shard.number
    return None


def head_checksum(path: Path, size: int) -> str:
    """The checksum of the first ``size`` bytes of a file."""
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(size), digest_size=16).hexdigest()


# -- searching --------------------------------------------------------------------------------------------------------


class Lists:
    """A file of lists, memory-mapped.

    Raises:
        ConfigError: if the file is missing or damaged.
    """

    def __init__(self, folder: Path, segment: Segment, centroids: Any, starts: Mapping[int, int]) -> None:
        self.ends = np.cumsum([shard.rows for shard in segment.shards])
        # What to add to a place to get a row of the folder, for each shard.
        self.shifts = np.array([starts[shard.number] for shard in segment.shards]) - (
            self.ends - np.diff(self.ends, prepend=0)
        )
        self.index = empty_lists(centroids)
        self.index.replace_invlists(open_lists(folder, segment, centroids.d), True)
        self.index.ntotal = segment.rows

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The rows of the folder at these places of the file; -1 stays."""
        if places.max(initial=-1) >= self.index.ntotal:
            raise ConfigError(f"a file of lists has place {places.max():,} of {self.index.ntotal:,}")
        return np.where(places < 0, -1, places + self.shifts[np.searchsorted(self.ends, places, side="right")])

    def selector(self, hidden: np.ndarray) -> Any:
        """What makes FAISS leave out the rows of the folder that are ``hidden`` (rows,), or None if none is."""
        starts = self.ends - np.diff(self.ends, prepend=0)
        spans = zip(starts + self.shifts, self.ends + self.shifts)
        here = np.concatenate([hidden[start:end] for start, end in spans])
        if not here.any():
            return None
        return import_faiss().IDSelectorBitmap(np.packbits(~here, bitorder="little"))


def empty_lists(centroids: Any) -> Any:
    """A FAISS index without vectors, whose lists hold float16 and belong to these centroids, an ``IndexFlatIP``."""
    faiss = import_faiss()
    kind, inner = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(centroids, centroids.d, centroids.ntotal, kind, inner, False)
    index.is_trained = True  # float16 has nothing to learn
    return index


def open_lists(folder: Path, segment: Segment, dimension: int, into_memory: bool = False) -> Any:
    """FAISS's inverted lists in a file, memory-mapped, or in memory to add to them.

    Raises:
        ConfigError: if the file is missing or damaged.
    """
    faiss = import_faiss()
    path = folder / FOLDER / segment.name
    try:
        head = segment.size - segment.rows * (2 * dimension + 8)  # a vector takes 2 bytes a number, and 8 for its id
        if (size := path.stat().st_size) != segment.size:
            raise ValueError(f"{size:,} bytes instead of {segment.size:,}")
        if head < 0 or head_checksum(path, head) != segment.head:
            raise ValueError("its table of lists has another checksum")
        flags = 0 if into_memory else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        return faiss.read_InvertedLists(faiss.FileIOReader(str(path)), flags)
    except (OSError, ValueError, RuntimeError, UnicodeError) as error:
        raise ConfigError(f"{path} is damaged ({str(error).splitlines()[0]})") from None


def open_centroids(folder: Path, record: Record, dimension: int) -> Any:
    """The centroids as a FAISS index. Raises ConfigError if their file is missing or damaged."""
    faiss = import_faiss()
    path = folder / FOLDER / record.centroids
    try:
        centroids = np.load(path, allow_pickle=False)
        if centroids.ndim != 2 or centroids.shape[1] != dimension or centroids.dtype != np.float32:
            raise ValueError(f"{centroids.shape} in {centroids.dtype} instead of (lists, {dimension}) in float32")
    except Exception as error:  # numpy evaluates the header as Python, so a damaged one may raise anything
        raise ConfigError(f"{path} is damaged ({error})") from None
    index = faiss.IndexFlatIP(dimension)
    index.add(centroids)
    return index


class InvertedFile:
    """An inverted file, opened. The package faiss must be installed.

    Args:
        folder: the folder of vectors.
        record: of its inverted file, which belongs to the vectors (``first_foreign``).
        starts: number of a shard -> its first row in the folder.
        dimension: of a vector, D.

    Raises:
        ConfigError: if a file is missing or damaged, or the package is missing.
    """

    def __init__(self, folder: Path, record: Record, starts: Mapping[int, int], dimension: int) -> None:
        self.probes = record.probes
        self._centroids = open_centroids(folder, record, dimension)
        self._segments = [Lists(folder, segment, self._centroids, starts) for segment in record.segments]

    @property
    def lists(self) -> int:
        """The number of lists."""
        return int(self._centroids.ntotal)

    def selectors(self, hidden: np.ndarray) -> list[Any]:
        """For ``search``: what leaves out the rows that are ``hidden`` (rows,), a bool for each row of the folder."""
        return [segment.selector(hidden) for segment in self._segments]

    def search(
        self, queries: np.ndarray, count: int, probes: int, selectors: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows (N, count) with the highest products in the ``probes`` lists nearest to each query, best first.

        Args:
            queries: (N, D) float32.
            count: how many rows.
            probes: how many lists.
            selectors: from ``selectors``.

        Returns:
            The rows, -1 where the lists hold too few, and their products (N, count) float32.
        """
        faiss = import_faiss()
        queries = np.ascontiguousarray(queries, np.float32)
        near, lists = self._centroids.search(queries, probes)
        rows, scores = [], []
        for segment, selector in zip(self._segments, selectors):
            products, places = np.empty((len(queries), count), np.float32), np.empty((len(queries), count), np.int64)
            # FAISS's own wrapper in Python takes no selector here.
            segment.index.search_preassigned_c(
                *(len(queries), faiss.swig_ptr(queries), count, faiss.swig_ptr(lists), faiss.swig_ptr(near)),
                *(faiss.swig_ptr(products), faiss.swig_ptr(places), False),
                faiss.SearchParametersIVF(nprobe=probes, sel=selector),
            )
            rows.append(segment.rows(places))
            scores.append(np.where(places < 0, -np.inf, products))
        all_rows, all_scores = np.concatenate(rows, axis=1), np.concatenate(scores, axis=1)
        best = np.argsort(-all_scores, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(all_rows, best, axis=1), np.take_along_axis(all_scores, best, axis=1)

    def nearest(
        self, query: np.ndarray, k: int, selectors: Sequence[Any], error: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates for the ``k`` nearest rows to a query (D,): rows and products.

        They are a hundred or more, and at least ``k`` while there are as many living rows. The rows whose product is
        within ``error`` of the k-th are all among them, as far as the probed lists hold them: which of them are best,
        float64 decides.
        """
        probes, count = min(self.probes, self.lists), max(k, MOST)
        while True:
            rows, scores = (found[0] for found in self.search(query[None], count, probes, selectors))
            found = int((rows >= 0).sum())
            if found < k and probes < self.lists:
                probes = min(2 * probes, self.lists)  # most of these lists' rows are dead, or the lists are short
            elif found == count and scores[-1] >= scores[k - 1] - error:
                count *= 4  # equal images, of which some may have been cut off
            else:
                return rows[:found], scores[:found]
