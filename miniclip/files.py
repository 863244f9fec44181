"""Files that appear complete or not at all (written under another name, synced, renamed), and reading with a limit."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

#: The most bytes of a description that miniclip reads: the header of a checkpoint, a configuration, a manifest. The
#: header of a large CLIP has 150,000 and a configuration 5,000. Parsed JSON takes up to 25 times as much memory.
LARGEST_DESCRIPTION = 4 * 2**20


def read_description(path: Path) -> bytes:
    """The content of a small file. No more than the limit is read, whatever the size of the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file has more than ``LARGEST_DESCRIPTION`` bytes.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_DESCRIPTION + 1)
        if len(data) > LARGEST_DESCRIPTION:
            size = os.fstat(file.fileno()).st_size
            raise ValueError(f"it has {size} bytes, the most is {LARGEST_DESCRIPTION}")
    return data


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write a file. Readers see the old content or the new content, also after a crash at any moment.

    Args:
        path: the file. Its folder is created if it is missing.
        data: the new content.

    Raises:
        OSError: if the file cannot be written. The old file is then unchanged.
    """
    with atomic_replace(path) as (temporary,):
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_replace(*paths: Path) -> Iterator[list[Path]]:
    """Replace files: yields one temporary path for each, which the caller writes.

    At the end of the block all temporary files are synced to the disk. Then each is renamed, in the order of ``paths``.
    If the block raises, or a file cannot be synced, no file is replaced.

    The name of a temporary file is ``.NAME.RANDOM.tmp``, in the folder of its target: only a rename within one file
    system is atomic. Creation is exclusive, so two processes that write the same target never share a temporary file.

    Args:
        paths: the files to replace. Missing folders are created.

    Raises:
        OSError: if a file cannot be created, synced or renamed.
    """
    temporaries: list[Path] = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            temporary.open("xb").close()
            temporaries.append(temporary)
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):  # renamed by now, or the reason is already on its way to the caller
                temporary.unlink()
    for folder in dict.fromkeys(path.parent for path in paths):
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable as well, where the file system can do that."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
