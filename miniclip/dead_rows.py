"""dead.parquet: the rows that a search leaves out, because their file is gone, has changed or is no longer wanted.

Vectors are never overwritten. A row dies when a run over its source does not find its file as it was, and it lives
again when a later run does. ``miniclip prune`` removes the dead rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from miniclip.errors import ConfigError
from miniclip.parquet import as_parquet, import_pyarrow, read_parquet
from miniclip.shard_files import write_file
from miniclip.terminal import escaped

DEAD = "dead.parquet"
MISSING, CHANGED, LEFT_OUT, TAKEN = "missing", "changed", "left out", "taken"
DEATHS = frozenset({MISSING, CHANGED, LEFT_OUT, TAKEN})

_COLUMNS = ["shard", "row", "reason", "by"]
_CHECKSUM = b"checksum"  # in the metadata of the table: of its columns as JSON

Row = tuple[int, int]  # the number of a shard, and a row of its listing


class Death(NamedTuple):
    """Why a row is dead.

    Attributes:
        reason: ``missing``: the file is not there. ``changed``: it has other content or is another file now. ``left
            out``: the file is as it was, but a run no longer takes it, because of ``--exclude`` for example. ``taken``:
            another shard has the row.
        by: the number of the shard that has a copy of the row, or -1. A row is taken only once that shard is complete.
    """

    reason: str
    by: int = -1


def read_dead_rows(folder: Path) -> dict[Row, Death]:
    """All dead rows of a folder.

    Raises:
        ConfigError: if the file is damaged.
    """
    path = folder / DEAD
    try:
        table = read_parquet(path.read_bytes())
        shards, rows, reasons, by = columns = [table.column(name).to_pylist() for name in _COLUMNS]
        if (table.schema.metadata or {}).get(_CHECKSUM) != _checksum(columns):
            raise ValueError("its checksum has changed")
        if not DEATHS.issuperset(reasons) or not all(type(n) is int for column in (shards, rows, by) for n in column):
            raise ValueError("it has an unknown reason or a row without a number")
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError, import_pyarrow().ArrowException) as error:
        raise ConfigError(f"{path} is damaged ({escaped(str(error))}): remove the file and embed again") from None
    return {(shard, row): Death(*rest) for shard, row, *rest in zip(shards, rows, reasons, by)}


def write_dead_rows(folder: Path, dead: Mapping[Row, Death]) -> None:
    """Replace the file.

    Raises:
        StorageError: if the file cannot be written.
    """
    pa = import_pyarrow()
    rows = sorted((shard, row, death.reason, death.by) for (shard, row), death in dead.items())
    columns = list(zip(*rows)) or [(), (), (), ()]
    types = (pa.int64(), pa.int64(), pa.string(), pa.int64())
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types)]
    table = pa.table(arrays, names=_COLUMNS, metadata={_CHECKSUM: _checksum(columns)})
    write_file(folder / DEAD, as_parquet(table))


def _checksum(columns: Sequence[Sequence[object]]) -> bytes:
    return hashlib.blake2b(json.dumps([*map(list, columns)]).encode(), digest_size=16).hexdigest().encode()


def settled(death: Death | None, shards: Collection[int]) -> Death | None:
    """A death without a copy that never came to be, because a crash came first."""
    if death is None or death.by == -1 or death.by in shards:
        return death
    return None if death.reason == TAKEN else Death(death.reason)


def in_effect(dead: Mapping[Row, Death], complete: Iterable[int]) -> dict[int, dict[int, str]]:
    """Shard -> row -> why the row is dead. Rows that a shard shall take over which is not complete are still alive."""
    numbers = {*complete}
    reasons: dict[int, dict[int, str]] = {}
    for (shard, row), death in dead.items():
        if death.reason != TAKEN or death.by in numbers:
            reasons.setdefault(shard, {})[row] = death.reason
    return reasons
