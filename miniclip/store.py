"""The folder of embeddings, in clip-retrieval's layout, which autofaiss and clip-retrieval index read as it is.

    img_emb/img_emb_N.npy            (rows, D) float16, unit vectors
    metadata/metadata_N.parquet      a line for each row: image_path; key and caption if it is from a tar
    listing/listing_N.parquet        the files the shard is made of
    failures/failures_N.jsonl        {path, error} of each that could not be embedded
    manifest.json                    the model, the checksum of its weights, the settings, the versions
    failures.jsonl                   the failures of all shards

Every file appears whole or not at all, and is on the disk before it bears its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch

from miniclip.errors import ConfigError, StorageError
from miniclip.sources import Item, printable
from miniclip.version import __version__

_FORMAT = 1
_MANIFEST = "manifest.json"
_FAILURES = "failures.jsonl"
_KINDS = {"img_emb": "npy", "metadata": "parquet", "listing": "parquet", "failures": "jsonl"}
_TEMPORARY = re.compile(rf"\.({'|'.join(_KINDS)}|manifest)(_[0-9]+)?\.(npy|parquet|jsonl|json)\..+\.tmp")
_MOST_TRIES = 10  # of a picture that cannot be read


class Failure(NamedTuple):
    """What was wrong with a picture."""

    error: str
    again: bool = False  # it could not be read, which says nothing about the picture: tried again when it can be


@dataclass
class Shard:
    """The vectors of a slice of the list, the rows of the list they belong to, and what failed in which row."""

    vectors: np.ndarray  # (rows, D) float16
    rows: list[int]
    failures: dict[int, Failure]


class Store:
    """The folder of embeddings. A shard is there when its failures are, be there none: they are written last.

    A shard without rows has neither vectors nor metadata, because what reads the two side by side may skip a file
    without rows in one of the places only.

    Raises:
        ConfigError: if the packages that read and write it are missing.
    """

    def __init__(self, folder: Path) -> None:
        _pyarrow()  # missing, it is told before any work
        self.folder = folder

    def vectors(self, number: int) -> Path:
        return self.folder / "img_emb" / f"img_emb_{number}.npy"

    def metadata(self, number: int) -> Path:
        return self.folder / "metadata" / f"metadata_{number}.parquet"

    def listing(self, number: int) -> Path:
        return self.folder / "listing" / f"listing_{number}.parquet"

    def failed(self, number: int) -> Path:
        return self.folder / "failures" / f"failures_{number}.jsonl"

    def planned(self) -> list[int]:
        """The shards whose files are listed."""
        return self._numbers("listing")

    def complete(self) -> list[int]:
        """The shards that are there."""
        return self._numbers("failures")

    def todo(self) -> list[int]:
        """The shards that are listed and not complete."""
        return sorted({*self.planned()} - {*self.complete()})

    def _numbers(self, kind: str) -> list[int]:
        try:
            names = os.listdir(self.folder / kind)
        except FileNotFoundError:
            return []
        except OSError as error:  # taken for empty, it would be filled anew
            raise StorageError(f"{self.folder / kind} cannot be read ({error.strerror})") from None
        found = (re.fullmatch(rf"{kind}_(0|[1-9][0-9]*)\.{_KINDS[kind]}", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def manifest(self) -> dict[str, Any] | None:
        path = self.folder / _MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ConfigError(f"{path} is not a manifest of this version of miniclip (format {_FORMAT})")
        return manifest

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file whole or not at all, and have it on the disk before it bears its name.

        Raises:
            StorageError: if there is no room, or no permission.
        """
        # Of its own, because a worker that a cluster has given up may still be writing the same file.
        temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(
                f"{path} cannot be written ({error.strerror}); what was written before is complete, and the same "
                "command goes on from there"
            ) from None
        if os.name == "posix":
            with contextlib.suppress(OSError):  # the name as well, where the file system can
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def plan(self, found: Sequence[Item], shard_size: int) -> None:
        """List the files of the shards to come: slices of what is new, or can be read again, among those found."""
        planned, complete = self.planned(), {*self.complete()}
        known: set[tuple[Any, ...]] = set()
        tries: Counter[tuple[Any, ...]] = Counter()
        for number in planned:
            items = self.items(number)
            known |= {item[:5] for item in items}
            for failure in self.failures(number) if number in complete else []:
                if failure.get("again"):
                    item = items[failure["row"]]
                    tries[item[:5]] += 1
                    if tries[item[:5]] < _MOST_TRIES and os.access(item.path, os.R_OK):
                        known.discard(item[:5])
        new = [item for item in found if item[:5] not in known]
        first = planned[-1] + 1 if planned else 0
        for number, start in enumerate(range(0, len(new), shard_size), start=first):
            self.write(self.listing(number), _parquet(_as_table(new[start : start + shard_size])))

    def items(self, number: int) -> list[Item]:
        """What a shard is made of.

        Raises:
            ConfigError: if its listing is damaged.
        """
        path = self.listing(number)
        try:
            return _as_items(_read(path))
        except (OSError, KeyError, TypeError, ValueError, _pyarrow().ArrowException) as error:
            raise self.damaged(path, error) from None

    def write_shard(self, number: int, shard: Shard) -> None:
        """Its failures last: they say that it is complete."""
        pa = _pyarrow()
        listed = self.items(number)
        items = [listed[row] for row in shard.rows]
        columns = {"image_path": pa.array([printable(item.name) for item in items], pa.string())}
        # In every shard, because a reader of them all takes the columns of the first.
        columns["key"] = pa.array([item.key for item in items], pa.string())
        columns["caption"] = pa.array([item.caption for item in items], pa.string())
        if items:
            vectors = io.BytesIO()
            np.save(vectors, shard.vectors)
            self.write(self.vectors(number), vectors.getbuffer())
            self.write(self.metadata(number), _parquet(pa.table(columns)))
        else:  # its files may have been there before, and be gone
            _remove(self.vectors(number))
            _remove(self.metadata(number))
        lines = []
        for row, (error, again) in shard.failures.items():
            line = {"path": printable(listed[row].name), "error": error, "row": row}
            lines.append(json.dumps(line | {"again": True} if again else line) + "\n")
        self.write(self.failed(number), "".join(lines).encode())

    def failures(self, number: int) -> list[dict[str, Any]]:
        """What could not be embedded of a shard: the path, the error and the row in the listing of each.

        Raises:
            ConfigError: if it cannot be read.
        """
        path = self.failed(number)
        try:
            failures: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            if any(not {"path", "error", "row"} <= failure.keys() for failure in failures):
                raise ValueError("a line is not of this version")
            return failures
        except (OSError, ValueError, AttributeError) as error:
            raise self.damaged(path, error, number) from None

    def rows(self, number: int) -> int:
        """How many vectors a complete shard has."""
        return self.size(number) - len(self.failures(number))

    def check(self, number: int, rows: int) -> int:
        """See that a shard has as many vectors as it should, without reading them. Returns where they begin, in bytes.

        Raises:
            ConfigError: if the file is missing or damaged.
        """
        path = self.vectors(number)
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
                start, end = file.tell(), file.seek(0, os.SEEK_END)
            if (len(shape), shape[0], dtype, by_columns, start % 2) != (2, rows, np.dtype(np.float16), False, 0):
                raise ValueError(f"{shape} in {dtype} instead of {rows} rows of float16")
            if end - start != 2 * rows * shape[1]:
                raise ValueError(f"{end - start:,} bytes instead of {2 * rows * shape[1]:,}")
        except Exception as error:  # numpy reads the header as Python, which may be wrong in any way
            raise self.damaged(path, error, number) from None
        return start

    def load(self, number: int, rows: int) -> torch.Tensor:
        """The vectors of a shard, (rows, D) float16, mapped from their file.

        By torch, because numpy keeps a file open for as long as it is mapped, and there may be thousands.

        Raises:
            ConfigError: if the file is missing or damaged.
            StorageError: if the system cannot map it.
        """
        start = self.check(number, rows)
        path = self.vectors(number)
        size = path.stat().st_size
        try:
            mapped = torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.float16)
        except (RuntimeError, UnicodeError) as error:
            raise StorageError(f"{path} cannot be mapped ({str(error).splitlines()[0]})") from None
        return mapped[start // 2 :].view(rows, -1)

    def paths(self, number: int, rows: int) -> Any:
        """What the pictures of a shard's vectors, of which there are so many, are called, as a column.

        Raises:
            ConfigError: if its metadata is damaged.
        """
        path = self.metadata(number)
        try:
            column = _read(path, ["image_path"]).column("image_path")
        except (OSError, KeyError, _pyarrow().ArrowException) as error:
            raise self.damaged(path, error, number) from None
        if len(column) != rows:
            raise self.damaged(path, f"{len(column)} rows instead of {rows}", number)
        return column

    def size(self, number: int) -> int:
        """How many files a shard is made of.

        Raises:
            ConfigError: if its listing is damaged.
        """
        path = self.listing(number)
        try:
            with path.open("rb") as file:
                return int(_pyarrow().parquet.read_metadata(file).num_rows)
        except (OSError, _pyarrow().ArrowException) as error:
            raise self.damaged(path, error) from None

    def damaged(self, path: Path, error: Exception | str, number: int | None = None) -> ConfigError:
        """What to say of a damaged file, and how to mend it: a shard can be made again, a listing cannot."""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        mend = "embed into another folder" if number is None else f"remove {self.failed(number)} and embed again"
        return ConfigError(f"{path} is damaged ({reason}): {mend}")

    def finish(self) -> int:
        """Write failures.jsonl from what the shards say. Returns how many vectors there are.

        Raises:
            ConfigError: if a file of the folder is damaged.
        """
        failures: list[tuple[int, Item, dict[str, Any]]] = []
        total = 0
        for number in self.complete():
            if failed := self.failures(number):
                items = self.items(number)
                failures += [(number, items[failure["row"]], failure) for failure in failed]
            if rows := self.size(number) - len(failed):
                self.check(number, rows)
                total += rows
        # A file that was tried again, or has changed, is in a later shard as well; for a tar, a part of it is.
        last = {(item.path, member): number for number, item, _ in failures for member in (item.member, None)}
        for number in self.planned() if failures else []:
            for item in self.items(number):
                for key in (item.path, item.member), (item.path, None):
                    if key in last:
                        last[key] = number
        lines = [
            json.dumps({"path": failure["path"], "error": failure["error"]}) + "\n"
            for number, item, failure in failures
            if last[item.path, item.member] == number
        ]
        self.write(self.folder / _FAILURES, "".join(lines).encode())
        return total

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the folder's manifest; in a folder that holds vectors already, compare it.

        As long as no shard is complete an earlier run contradicts nothing, and what it planned is forgotten: it may
        have been ended because it was meant otherwise. What a killed run was just writing is removed.

        Raises:
            ConfigError: naming the first setting that contradicts the manifest.
        """
        if self.manifest() is None and any(
            path for kind in _KINDS for path in self.folder.glob(f"{kind}/{kind}_[0-9]*")
        ):
            raise ConfigError(f"{self.folder} holds vectors and no {_MANIFEST}: choose another folder")
        for folder in (self.folder, *(self.folder / kind for kind in _KINDS)):
            for path in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):  # the folder may hold other things as well
                    _remove(path)
        if complete := self.complete():
            if missing := sorted({*complete} - {*self.planned()}):
                name = self.listing(missing[0]).name
                raise ConfigError(f"{self.folder} holds vectors and no {name}: choose another folder")
            self.agree(settings)
            return
        for number in reversed(self.planned()):
            for path in (self.vectors(number), self.metadata(number), self.listing(number)):
                _remove(path)
        versions = {"miniclip": __version__, "torch": torch.__version__, "pillow": PIL.__version__}
        versions |= {"numpy": np.__version__, "python": platform.python_version()}
        manifest = {"format": _FORMAT, **settings, "embedding_dtype": "float16", "normalised": True}
        text = json.dumps({**manifest, "versions": versions}, indent=2) + "\n"
        self.write(self.folder / _MANIFEST, text.encode())

    def agree(self, settings: dict[str, Any]) -> None:
        """Compare the folder's manifest.

        Raises:
            ConfigError: if there is none, or naming the first setting that contradicts it.
        """
        if self.manifest() is None:
            raise ConfigError(f"{self.folder} has no {_MANIFEST}")
        if differing := self.difference(settings):
            name, before, now = differing
            raise ConfigError(
                f"{self.folder} was begun with {name} {before!r}, not {now!r}: choose another folder, or the settings "
                "it was begun with"
            )

    def difference(self, settings: dict[str, Any]) -> tuple[str, Any, Any] | None:
        """The first of these settings that is another in the manifest: its name, what it is there, and what here.

        Not the model's name: its weights are known by their checksum, wherever they lie.
        """
        as_read = json.loads(json.dumps({name: value for name, value in settings.items() if name != "model"}))
        return _difference(self.manifest(), as_read)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, which the system lets go of whatever becomes of this process.

        Raises:
            ConfigError: if another run holds it.
            StorageError: if the folder cannot be made or written.
        """
        try:
            import filelock
        except ImportError:
            raise ConfigError('the package filelock is missing: pip install "miniclip[embed]"') from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise ConfigError(f"another run is writing to {self.folder}") from None
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be removed ({error.strerror})") from None


def _difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting of ``now`` that is another in ``before``: its name and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = ((f"{name}.{key}".lstrip("."), before.get(key), value) for key, value in now.items())
        return next((found for key, old, new in inner if (found := _difference(old, new, key))), None)
    return None if before == now else (name, before, now)


# -- tables -----------------------------------------------------------------------------------------------------------

_COLUMNS = ("path", "size", "mtime_ns", "member", "offset", "length", "key", "caption", "error")


def _as_table(items: Sequence[Item]) -> Any:
    pa = _pyarrow()
    # A path is bytes: not every file has a name that is text.
    kinds = {
        "path": pa.binary(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "offset": pa.int64(),
        "length": pa.int64(),
    }
    columns: dict[str, tuple[Any, ...]] = dict(zip(_COLUMNS, zip(*items)))
    columns["path"] = tuple(map(os.fsencode, columns["path"]))
    return pa.table({name: pa.array(columns[name], kinds.get(name, pa.string())) for name in _COLUMNS})


def _as_items(table: Any) -> list[Item]:
    rows = zip(*(table.column(name).to_pylist() for name in _COLUMNS))
    return [Item(os.fsdecode(path), *rest) for path, *rest in rows]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError('the package pyarrow is missing: pip install "miniclip[embed]"') from None
    return pyarrow


def _read(path: Path, columns: list[str] | None = None) -> Any:
    # Opened here, because pyarrow wants a path to be text.
    with path.open("rb") as file, _pyarrow().parquet.ParquetFile(file) as table:
        return table.read(columns, use_threads=False)  # a column of a shard is less work than starting threads


def _parquet(table: Any) -> memoryview:
    buffer = io.BytesIO()
    _pyarrow().parquet.write_table(table, buffer)
    return buffer.getbuffer()
