"""One shard on disk: four files, in the layout that autofaiss and clip-retrieval index read.

img_emb/img_emb_N.npy            (rows, D) float16, unit vectors
metadata/metadata_N.parquet      one line for each row: image_path; key and caption if the image is from a tar; checksum
listing/listing_N.parquet        the images that the shard is made of
failures/failures_N.jsonl        the size and the checksums of the other three; then {path, error, row} of each image
                                 that could not be embedded
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from miniclip.errors import ConfigError, StorageError
from miniclip.files import atomic_write
from miniclip.parquet import as_parquet, import_pyarrow, read_parquet
from miniclip.sources import ImageSource, valid_text
from miniclip.terminal import escaped

SUFFIXES = {"img_emb": "npy", "metadata": "parquet", "listing": "parquet", "failures": "jsonl"}
_START = 4096  # bytes at the beginning of a file that have a checksum of their own


class Failure(NamedTuple):
    """Why an image could not be embedded."""

    error: str
    retry: bool = False  # the storage failed, not the image: a later run tries again


class FileSum(NamedTuple):
    """What a file was when its shard was completed."""

    size: int  # in bytes
    start: str  # the checksum of the first bytes, which costs little when a shard is opened
    whole: str  # the checksum of all bytes

    @classmethod
    def of(cls, data: bytes | memoryview) -> FileSum:
        return cls(len(data), _digest(data[:_START]), _digest(data))

    def check_start(self, file: BinaryIO) -> None:
        """Compare the size and the beginning of an open file, and go back to its beginning.

        Raises:
            ValueError: if one differs.
        """
        if (size := os.fstat(file.fileno()).st_size) != self.size:
            raise ValueError(f"{size:,} bytes instead of {self.size:,}")
        if _digest(file.read(_START)) != self.start:
            raise ValueError("its beginning has changed")
        file.seek(0)


@dataclass
class Shard:
    """The vectors of a slice of the list of images, or of one batch of it.

    Attributes:
        vectors: (rows, D) float16, unit vectors.
        rows: for each vector, the row of its image in the listing.
        failures: row in the listing -> why that image has no vector.
        checksums: for each vector, the checksum of its image's bytes.
    """

    vectors: np.ndarray
    rows: list[int]
    failures: dict[int, Failure]
    checksums: list[str]


@dataclass(frozen=True, order=True)
class ShardFiles:
    """The files of one shard of a folder.

    A shard is planned once its listing exists. A shard is complete once its failures file exists, which is written
    last. Its first line has the sizes and checksums of the other files, and the checksum of its other lines. The size
    and the beginning of a file are compared whenever a shard is opened, all bytes by ``verify``. A shard without
    vectors has no vector and no metadata file: readers that pair the two may skip an empty file in one folder only.
    """

    folder: Path
    number: int

    @property
    def vectors_path(self) -> Path:
        return self._path("img_emb")

    @property
    def metadata_path(self) -> Path:
        return self._path("metadata")

    @property
    def listing_path(self) -> Path:
        return self._path("listing")

    @property
    def failures_path(self) -> Path:
        return self._path("failures")

    def _path(self, kind: str) -> Path:
        return self.folder / kind / f"{kind}_{self.number}.{SUFFIXES[kind]}"

    # -- read and verify ----------------------------------------------------------------------------------------------

    def read_listing(self) -> list[ImageSource]:
        """The images that the shard is made of.

        Raises:
            ConfigError: if the listing is damaged.
        """
        try:
            return _from_table(read_parquet(self._read("listing")))
        except ConfigError:
            raise
        except (OSError, KeyError, TypeError, ValueError, import_pyarrow().ArrowException) as error:
            raise self._damaged_listing(error) from None

    def read_failures(self) -> dict[int, Failure]:
        """The images that could not be embedded: row in the listing -> reason.

        Raises:
            ConfigError: if the failures file is damaged.
        """
        try:
            first, _, rest = self.failures_path.read_bytes().partition(b"\n")
            if _digest(rest) != json.loads(first)["failures"]:
                raise ValueError("its checksum has changed")
            return dict(map(_as_failure, map(json.loads, rest.decode().splitlines())))
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise self._damaged(self.failures_path, error) from None

    def read_sums(self) -> dict[str, FileSum]:
        """The kinds of files that the shard has -> what each was when the shard was completed.

        Raises:
            ConfigError: if the failures file is missing or damaged.
        """
        try:
            with self.failures_path.open("rb") as file:
                first = json.loads(file.readline())
            return _as_sums(first)
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(self.failures_path, error) from None

    def count_images(self) -> int:
        """The number of images that the shard is made of.

        Raises:
            ConfigError: if the listing is damaged.
        """
        try:
            with self.listing_path.open("rb") as file:
                return int(import_pyarrow().parquet.read_metadata(file).num_rows)
        except (OSError, ValueError, import_pyarrow().ArrowException) as error:
            raise self._damaged_listing(error) from None

    def rows_with_vectors(self) -> list[int]:
        """The rows of the listing that have a vector, in the order of the vectors. The shard must be complete.

        Raises:
            ConfigError: if the listing or the failures file is damaged.
        """
        failures, count = self.read_failures(), self.count_images()
        if wrong := [row for row in failures if not 0 <= row < count]:
            raise self._damaged(self.failures_path, f"row {wrong[0]} of {count} images")
        return [row for row in range(count) if row not in failures]

    def count_vectors(self) -> int:
        """The number of vectors that the shard must have, which is complete. Errors are those of ``read_listing``."""
        return self.count_images() - len(self.read_failures())

    def verify_starts(self) -> None:
        """Check that the files of a complete shard are there, with their sizes and their beginnings.

        Raises:
            ConfigError: if a file is missing or damaged.
        """
        for kind, expected in self.read_sums().items():
            try:
                with self._path(kind).open("rb") as file:
                    expected.check_start(file)
            except (OSError, ValueError) as error:
                raise self._damaged_file(kind, error) from None

    def _vectors_offset(self, count: int) -> int:
        """Where the numbers begin in the vector file, in bytes.

        Reads its beginning and its size. Raises ConfigError if the file is missing or damaged.
        """
        sums = self.read_sums()
        try:
            with self.vectors_path.open("rb") as file:
                sums["img_emb"].check_start(file)
                np.lib.format.read_magic(file)
                shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
                start, end = file.tell(), file.seek(0, os.SEEK_END)
            if (len(shape), shape[0], dtype, by_columns, start % 2) != (2, count, np.dtype(np.float16), False, 0):
                raise ValueError(f"{shape} in {dtype} instead of {count} rows of float16")
            if end - start != 2 * count * shape[1]:
                raise ValueError(f"{end - start:,} bytes instead of {2 * count * shape[1]:,}")
        except Exception as error:  # numpy evaluates the header as Python, so a damaged one may raise anything
            raise self._damaged(self.vectors_path, error) from None
        return start

    def map_vectors(self, count: int, dimension: int | None = None) -> torch.Tensor:
        """The vectors (count, D) float16, memory-mapped. If ``dimension`` is given, D must be equal to it.

        Mapped by torch, because numpy keeps each file open while it is mapped, and there may be thousands of shards.

        Raises:
            ConfigError: if the file is missing or damaged.
            StorageError: if the operating system cannot map it.
        """
        start = self._vectors_offset(count)
        path = self.vectors_path
        size = path.stat().st_size
        try:
            mapped = torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.float16)
        except (RuntimeError, UnicodeError) as error:
            raise StorageError(f"{path} cannot be memory-mapped ({str(error).splitlines()[0]})") from None
        vectors = mapped[start // 2 :].view(count, -1)
        if dimension not in (None, vectors.shape[1]):
            raise self._damaged(self.vectors_path, f"vectors of {vectors.shape[1]} numbers instead of {dimension}")
        return vectors

    def stat_vectors(self) -> os.stat_result:
        """The status of the vector file. Raises ConfigError if the file is missing."""
        try:
            return self.vectors_path.stat()
        except OSError as error:
            raise self._damaged(self.vectors_path, error) from None

    def verify(self) -> None:
        """Read every byte of a complete shard, and compare the checksums.

        Raises:
            ConfigError: if a file is missing or has changed, if the numbers of rows differ, or if a vector is not
                finite.
        """
        for kind in self.read_sums():
            self._read(kind)
        if count := len(self.rows_with_vectors()):
            self.read_paths(count)
            finite = self.map_vectors(count).isfinite().all(dim=1)
            if not finite.all():
                raise self._damaged(self.vectors_path, f"{int((~finite).sum()):,} vectors are not finite")

    def read_paths(self, count: int) -> Any:
        """The paths of the images of the ``count`` vectors, as a pyarrow column.

        Raises:
            ConfigError: if the metadata file is missing, damaged, or has another number of rows.
        """
        return self._read_metadata("image_path", count)

    def read_checksums(self, count: int) -> list[str]:
        """The checksums of the images of the ``count`` vectors. Errors are those of ``read_paths``."""
        return list(self._read_metadata("checksum", count).to_pylist())

    def _read_metadata(self, name: str, count: int) -> Any:
        try:
            column = read_parquet(self._read("metadata"), [name]).column(name)
        except (OSError, KeyError, ValueError, import_pyarrow().ArrowException) as error:
            raise error if isinstance(error, ConfigError) else self._damaged(self.metadata_path, error) from None
        if len(column) != count:
            raise self._damaged(self.metadata_path, f"{len(column)} rows instead of {count}")
        return column

    def _read(self, kind: str) -> bytes:
        """The content of a file, compared with its checksum if the shard is complete.

        Raises:
            ConfigError: if the file is missing or has changed.
        """
        path = self._path(kind)
        try:
            data = path.read_bytes()
            if kind != "failures" and self.failures_path.exists() and FileSum.of(data) != self.read_sums().get(kind):
                raise ValueError("its checksum has changed")
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._damaged_file(kind, error) from None
        return data

    def _damaged_file(self, kind: str, error: Exception) -> ConfigError:
        return self._damaged_listing(error) if kind == "listing" else self._damaged(self._path(kind), error)

    def _damaged(self, path: Path, error: Exception | str) -> ConfigError:
        """The error for a damaged file that a new run can compute again."""
        return ConfigError(f"{path} is damaged ({_reason(error)}): remove {self.failures_path} and embed again")

    def _damaged_listing(self, error: Exception) -> ConfigError:
        """The error for a damaged listing. Nothing can restore it: the vectors' images are not known without it."""
        return ConfigError(f"{self.listing_path} is damaged ({_reason(error)}): embed into another folder")

    # -- write --------------------------------------------------------------------------------------------------------

    def write_listing(self, images: Sequence[ImageSource]) -> None:
        """Plan the shard.

        Raises:
            StorageError: if the file cannot be written.
        """
        write_file(self.listing_path, as_parquet(_as_table(images)))

    def write(self, shard: Shard) -> None:
        """Write the vectors, the metadata and, last, the failures, which make the shard complete.

        Raises:
            ConfigError: if the listing is damaged.
            StorageError: if a file cannot be written.
        """
        listing = self.read_listing()
        sums = {"listing": FileSum.of(self._read("listing"))}
        if shard.rows:
            vectors = io.BytesIO()
            np.save(vectors, shard.vectors)
            metadata = _metadata_table([listing[row] for row in shard.rows], shard.checksums)
            for kind, data in (("img_emb", vectors.getbuffer()), ("metadata", as_parquet(metadata))):
                sums[kind] = FileSum.of(data)
                write_file(self._path(kind), data)
        else:  # an earlier, interrupted run may have written them
            remove_file(self.vectors_path)
            remove_file(self.metadata_path)
        lines = []
        for row, failure in shard.failures.items():
            record = {"path": valid_text(listing[row].name), "error": failure.error, "row": row}
            lines.append(json.dumps(record | {"retry": True} if failure.retry else record) + "\n")
        rest = "".join(lines).encode()
        first = {"files": {kind: entry._asdict() for kind, entry in sums.items()}, "failures": _digest(rest)}
        write_file(self.failures_path, json.dumps(first).encode() + b"\n" + rest)

    def remove(self) -> None:
        """Remove a shard. The failures file goes first, so that what is left does not count as complete.

        Raises:
            StorageError: if a file cannot be removed.
        """
        remove_file(self.failures_path)
        self.remove_plan()

    def remove_plan(self) -> None:
        """Remove a shard that is not complete. The listing goes last: without it, nobody would know of the others.

        Raises:
            StorageError: if a file cannot be removed.
        """
        for path in (self.vectors_path, self.metadata_path, self.listing_path):
            remove_file(path)


def _as_failure(record: Any) -> tuple[int, Failure]:
    """The row and the failure of a line. Raises ValueError if it is another line."""
    if isinstance(record, dict) and {"path", "error", "row"} <= record.keys():
        row, error, retry = record["row"], record["error"], record.get("retry", False)
        if (type(row), type(error), type(retry)) == (int, str, bool):
            return row, Failure(error, retry)
    raise ValueError("a line is not of this version")


def _as_sums(record: Any) -> dict[str, FileSum]:
    """The checksums in the first line. Raises ValueError if it is another line."""
    try:
        sums = {kind: FileSum(**entry) for kind, entry in record["files"].items()}
    except (AttributeError, KeyError, TypeError):
        sums = {}
    right = all(tuple(map(type, entry)) == (int, str, str) for entry in sums.values())
    if not (right and "listing" in sums and sums.keys() <= SUFFIXES.keys()):
        raise ValueError("its first line has no checksums")
    return sums


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _reason(error: Exception | str) -> str:
    return getattr(error, "strerror", None) or escaped(" ".join(str(error).split()))  # pyarrow quotes bytes


def write_file(path: Path, data: bytes | memoryview) -> None:
    """``atomic_write`` to a folder of embeddings, with an error that says how to continue.

    Raises:
        StorageError: if the file cannot be written.
    """
    try:
        atomic_write(path, data)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror}); the shards written before are complete, and the same "
            "command continues after them"
        ) from None


def remove_file(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        StorageError: if the file cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be removed ({error.strerror})") from None


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _as_table(images: Sequence[ImageSource]) -> Any:
    """A listing as a table with one column for each field of ``ImageSource``."""
    pa = import_pyarrow()
    # A path is stored as bytes, because a file name need not be valid text.
    types = dict.fromkeys(("path", "source"), pa.binary())
    types |= dict.fromkeys(("size", "mtime_ns", "offset", "length", "taken_shard", "taken_row"), pa.int64())
    columns = dict(zip(ImageSource._fields, zip(*images)))
    columns |= {name: tuple(map(os.fsencode, columns[name])) for name in ("path", "source")}
    return pa.table({name: pa.array(column, types.get(name, pa.string())) for name, column in columns.items()})


def _from_table(table: Any) -> list[ImageSource]:
    columns = {name: table.column(name).to_pylist() for name in ImageSource._fields}
    columns |= {name: list(map(os.fsdecode, columns[name])) for name in ("path", "source")}
    return list(map(ImageSource, *columns.values()))


def _metadata_table(images: Sequence[ImageSource], checksums: Sequence[str]) -> Any:
    """Every shard has all columns, because readers of many files take the columns of the first file."""
    pa = import_pyarrow()
    columns = {
        "image_path": [valid_text(image.name) for image in images],
        "key": [image.key for image in images],
        "caption": [image.caption for image in images],
        "checksum": checksums,
    }
    return pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
