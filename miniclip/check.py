"""``miniclip check``: reads every byte of a folder of vectors, and names what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from miniclip.errors import ConfigError
from miniclip.inverted_file import first_foreign, read_record
from miniclip.search import Index
from miniclip.store import EmbeddingStore


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        shards: complete shards.
        vectors: their vectors, as far as they could be counted.
        pending: shards that a run has planned and not completed.
        damaged: for each file that is damaged, what is wrong and how to make the file again.
        notices: what is not damage, but makes searches slower than they could be.
    """

    shards: int
    vectors: int
    pending: int
    damaged: list[str]
    notices: list[str]


def check_folder(folder: Path, progress: Callable[[int, int], object] = lambda done, total: None) -> Checked:
    """Compare every file of a folder with its checksum.

    Args:
        folder: a folder that ``embed_images`` made.
        progress: called after each shard with the number of shards done, and of all.

    Raises:
        ConfigError: if the folder is another one, or its manifest cannot be read.
    """
    store = EmbeddingStore(folder)
    store.require_manifest()
    complete, damaged, vectors = store.complete(), [], 0
    for done, shard in enumerate(complete, start=1):
        try:
            shard.verify()
            vectors += shard.count_vectors()
        except ConfigError as error:
            damaged.append(str(error))
        progress(done, len(complete))
    notices: list[str] = []
    for part in (store.dead_rows, lambda: notices.extend(_notices(folder))) if not damaged else (store.dead_rows,):
        try:
            part()
        except ConfigError as error:
            damaged.append(str(error))
    return Checked(len(complete), vectors, len(store.pending()), damaged, notices)


def _notices(folder: Path) -> Iterator[str]:
    """What is to be said of an inverted file that does not belong to the vectors, as in a copy with other times."""
    record = read_record(folder)
    if record is not None and first_foreign(record, Index.open(folder).shard_times()) is not None:
        yield f"searches are exact, because the inverted file is of other vectors or times: run miniclip index {folder}"
