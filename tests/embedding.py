"""What the tests of embedding share: a folder with good and bad images, and a look at the files of a run."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from helpers import make_image

BROKEN = {"a/truncated.jpg", "a/empty.png", "b/text.jpg", "b/dangling.png", "c/bomb.png", "c/pipe.gif"}


def make_photos(folder: Path) -> Path:
    """Write 23 images into subfolders of ``folder``, with six bad ones (``BROKEN``) and two files to skip."""
    for n in range(23):
        suffix = ("jpg", "png", "webp", "JPG", "gif")[n % 5]
        make_image(folder / f"{'abc'[n % 3]}" / f"{n:02}.{suffix}", n)
    whole = (folder / "a" / "00.jpg").read_bytes()
    (folder / "a" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "empty.png").write_bytes(b"")
    (folder / "b" / "text.jpg").write_text("this is not an image")
    (folder / "b" / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "c" / "folder.jpg").mkdir()
    (folder / "c" / "notes.txt").write_text("skipped")
    (folder / "c" / "bomb.png").write_bytes(_bomb())
    os.mkfifo(folder / "c" / "pipe.gif")
    return folder


def _bomb() -> bytes:
    """A PNG of a few hundred bytes that claims to have 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def contents(folder: Path) -> dict[str, bytes]:
    """The name and content of every file in a folder of embeddings, except its lock and its memory."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".weights.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def complete_shards(out: Path) -> set[str]:
    """The numbers of the complete shards. Checks that each has vectors, metadata and failures for all its images."""
    complete = set()
    for path in out.glob("failures/failures_*.jsonl"):
        number = path.stem.removeprefix("failures_")
        rows = pq.read_metadata(out / "metadata" / f"metadata_{number}.parquet").num_rows
        assert len(np.load(out / "img_emb" / f"img_emb_{number}.npy")) == rows
        images = pq.read_metadata(out / "listing" / f"listing_{number}.parquet").num_rows
        assert rows + len(path.read_text().splitlines()) - 1 == images  # the first line has checksums
        complete.add(number)
    return complete
