"""Parquet files, through the package pyarrow."""

from __future__ import annotations

import io
from typing import Any

from miniclip.errors import ConfigError


def import_pyarrow() -> Any:
    """The package pyarrow, which only embedding and searching need.

    Raises:
        ConfigError: if the package is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError('the package pyarrow is missing: pip install -c constraints.txt -e ".[embed]"') from None
    return pyarrow


def read_parquet(data: bytes, columns: list[str] | None = None) -> Any:
    """A table from the content of a file, read without threads.

    Starting threads costs more than reading a column. And with ``pre_buffer``, pyarrow starts a thread that may still
    run when the process exits. On a busy machine some searches then ended in SIGABRT, after their output was complete,
    with "terminate called without an active exception".
    """
    pa = import_pyarrow()
    with pa.parquet.ParquetFile(pa.BufferReader(data), pre_buffer=False) as table:
        return table.read(columns, use_threads=False)


def as_parquet(table: Any) -> memoryview:
    buffer = io.BytesIO()
    import_pyarrow().parquet.write_table(table, buffer)
    return buffer.getbuffer()
