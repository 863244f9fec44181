"""Keep a folder of embeddings true to its files: what is new, what is gone, and what is known under another name.

Vectors are never changed. A row that is no longer true is written to dead.parquet (dead_rows.py). A row that another
row replaces is copied into a new shard. So a crash at any moment loses nothing: each step is one atomic rename, and
the next run takes up the work where it stopped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from miniclip.dead_rows import (
    CHANGED,
    LEFT_OUT,
    MISSING,
    TAKEN,
    Death,
    Row,
    in_effect,
    read_dead_rows,
    settled,
    write_dead_rows,
)
from miniclip.errors import ConfigError
from miniclip.manifest import complete_settings
from miniclip.shard_files import Shard, ShardFiles
from miniclip.sources import Identity, ImageSource, Listing, checksum, is_gone, stat_image
from miniclip.store import EmbeddingStore

_READERS = 8  # threads that read files to know them again: storage, not the processor, is what they wait for
_SPARED = "spared"  # counted beside the reasons of the rows that prune removes
_MAX_ATTEMPTS = 10  # to read a file whose storage fails


def is_worth_retrying(image: ImageSource, attempts: int) -> bool:
    """Whether to plan an image again whose storage failed: the file is readable now, and had few attempts so far."""
    return attempts < _MAX_ATTEMPTS and os.access(image.path, os.R_OK)


# -- new shards -------------------------------------------------------------------------------------------------------


def plan(store: EmbeddingStore, found: Listing, shard_size: int) -> None:
    """Plan new shards for those images that no shard contains yet, or whose storage failed and works again.

    Rows whose files are gone, have changed or are left out die. New images that are known files under another name, or
    with another time, come into shards of their own, for ``take_over``.

    Raises:
        ConfigError: if a file of a shard is damaged.
        StorageError: if a file cannot be written.
    """
    _finish_removals(store)
    complete = {-1, *(shard.number for shard in store.complete())}
    current = {image.identity for image in found.images}
    for shard in reversed(store.pending()):
        # What a shard should copy has to be computed again, or an interrupted run planned files that have changed.
        if any(
            image.taken_shard not in complete or (image.identity not in current and found.covers(image))
            for image in shard.read_listing()
        ):
            shard.remove_plan()
    known = _known_images(store)
    new = [image for image in found.images if image.identity not in known]
    dead = _deaths(store, found)
    taken = _find_again(store, new, dead)
    if dead != read_dead_rows(store.folder):
        write_dead_rows(store.folder, dead)
    _write_plans(store, [taken[image.identity] for image in new if image.identity in taken], shard_size)
    _write_plans(store, [image for image in new if image.identity not in taken], shard_size)


def _known_images(store: EmbeddingStore) -> set[Identity]:
    """The images that need no new row."""
    known: set[Identity] = set()
    attempts: Counter[Identity] = Counter()
    complete = {*store.complete()}
    for shard in store.planned():
        listing = shard.read_listing()
        known.update(image.identity for image in listing)
        for row, failure in shard.read_failures().items() if shard in complete else ():
            if failure.retry:
                image = listing[row]
                attempts[image.identity] += 1
                if is_worth_retrying(image, attempts[image.identity]):
                    known.discard(image.identity)
    return known


def _deaths(store: EmbeddingStore, found: Listing) -> dict[Row, Death]:
    """The dead rows of a folder after its sources were listed again."""
    current = {image.identity for image in found.images}
    paths = {image.path for image in found.images if image.size != -1}
    # There, but could not be examined. A line of a text file may also name a file that is gone.
    unknown = {image.path for image in found.images if image.size == -1 and not is_gone(image.path)}
    before, planned = read_dead_rows(store.folder), store.planned()
    numbers = {shard.number for shard in planned}
    dead = {}
    for shard in planned:
        for row, image in enumerate(shard.read_listing()):
            death = settled(before.get((shard.number, row)), numbers)
            if death is None or death.by == -1:
                if image.identity in current:
                    death = None
                elif image.path not in unknown and found.covers(image):
                    death = Death(CHANGED if image.path in paths else _reason(image))
            if death is not None:
                dead[shard.number, row] = death
    return dead


def _reason(image: ImageSource) -> str:
    """Why a run over an image's source does not list the image."""
    if is_gone(image.path):
        return MISSING
    return LEFT_OUT if stat_image(image.path).stat == image.stat else CHANGED


def _write_plans(store: EmbeddingStore, images: Sequence[ImageSource], shard_size: int) -> None:
    first = _next_number(store)
    for number, start in enumerate(range(0, len(images), shard_size), start=first):
        store.shard(number).write_listing(images[start : start + shard_size])


def _next_number(store: EmbeddingStore) -> int:
    planned = store.planned()
    return planned[-1].number + 1 if planned else 0


# -- rows that another shard has --------------------------------------------------------------------------------------


def _find_again(
    store: EmbeddingStore, new: Sequence[ImageSource], dead: dict[Row, Death]
) -> dict[Identity, ImageSource]:
    """Those new images whose bytes some shard has embedded already, with the place of that row.

    Only files of a known size are read. The rows of a file that is no longer there, because it was moved, die.
    """
    sizes = {image.bytes_size for image in new if image.error is None and image.bytes_size > 0}
    known: dict[tuple[int, str], list[tuple[Row, str]]] = {}
    for shard in store.complete() if sizes else ():
        listing, embedded = shard.read_listing(), shard.rows_with_vectors()
        if any(listing[row].bytes_size in sizes for row in embedded):
            for row, digest in zip(embedded, shard.read_checksums(len(embedded)), strict=True):
                place = (shard.number, row), listing[row].path
                known.setdefault((listing[row].bytes_size, digest), []).append(place)
    sizes &= {size for size, _ in known}
    candidates = [image for image in new if image.error is None and image.bytes_size in sizes]
    taken = {}
    with ThreadPoolExecutor(_READERS, "miniclip-checksum") as pool:
        for image, found in zip(candidates, pool.map(_checksum_or_none, candidates)):
            places = known.get((image.bytes_size, found or ""), [])
            for (shard_number, row), path in places:
                taken[image.identity] = image._replace(taken_shard=shard_number, taken_row=row)
                if is_gone(path):
                    dead.setdefault((shard_number, row), Death(MISSING))
    return taken


def _checksum_or_none(image: ImageSource) -> str | None:
    try:
        with image.open() as file:
            return checksum(file)
    except (OSError, ValueError):
        return None  # decoding will report the reason


def take_over(store: EmbeddingStore) -> int:
    """Complete the planned shards whose rows other shards have, by copying these rows.

    Returns:
        The number of rows.

    Raises:
        ConfigError: if a file of a shard is damaged.
        StorageError: if a file cannot be written.
    """
    count = 0
    for shard in store.pending():
        listing = shard.read_listing()
        if listing and listing[0].taken_shard >= 0:
            shard.write(_copied(store, listing))
            count += len(listing)
    return count


class _Origin:
    """A complete shard, read to copy rows from it."""

    def __init__(self, shard: ShardFiles) -> None:
        self.failures = shard.read_failures()
        rows = shard.rows_with_vectors()
        self.places = {row: place for place, row in enumerate(rows)}  # row in the listing -> row of the vectors
        self.vectors = shard.map_vectors(len(rows)).numpy() if rows else np.zeros((0, 0), np.float16)
        self.checksums = shard.read_checksums(len(rows)) if rows else []


def _copied(store: EmbeddingStore, listing: Sequence[ImageSource]) -> Shard:
    """A shard made of rows of other shards, failed ones included."""
    origins = {number: _Origin(store.shard(number)) for number in {image.taken_shard for image in listing}}
    copied = Shard(np.zeros((0, 0), np.float16), [], {}, [])
    vectors = []
    for row, image in enumerate(listing):
        origin = origins[image.taken_shard]
        if (failure := origin.failures.get(image.taken_row)) is not None:
            copied.failures[row] = failure
            continue
        if (place := origin.places.get(image.taken_row)) is None:
            raise ConfigError(f"shard {image.taken_shard} lacks row {image.taken_row}: embed into another folder")
        vectors.append(origin.vectors[place])
        copied.rows.append(row)
        copied.checksums.append(origin.checksums[place])
    if vectors:
        copied.vectors = np.stack(vectors)
    return copied


# -- dead rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """The result of ``prune``.

    Attributes:
        missing: vectors removed because their file is gone.
        changed: vectors removed because their file has other content or another time now.
        left_out: vectors removed because runs do not take their file any more.
        spared: dead vectors that stay, because they are left out or their file may come back.
        left: living vectors.
    """

    missing: int
    changed: int
    left_out: int
    spared: int
    left: int


def prune(store: EmbeddingStore, left_out: bool = False, gone: bool = False) -> Pruned:
    """Remove the dead rows: the other rows of each shard that has dead ones are copied into new shards.

    A missing image is spared if its file is there again, or if nothing is left where it lay but an empty folder: a disk
    that is not mounted looks like that.

    Args:
        store: the folder.
        left_out: whether to remove images that runs leave out too, though their files are there.
        gone: whether to look for every image, and to remove those that are missing though no run has said so. A run
            cannot list a source that was deleted.

    Raises:
        ConfigError: if the folder has no manifest, a file of a shard is damaged, or another run is writing to it.
        StorageError: if a file cannot be written or removed.
    """
    store.require_manifest()  # before the lock, which would create the folder
    with store.lock():
        store.open_again()
        _finish_removals(store)
        for shard in reversed(store.pending()):
            shard.remove_plan()
        # Entries about the removed plans go, because new shards get their numbers.
        numbers = {shard.number for shard in store.complete()}
        before = ((row, settled(death, numbers)) for row, death in read_dead_rows(store.folder).items())
        dead = {row: death for row, death in before if row[0] in numbers and death is not None}
        counts: Counter[str] = Counter()
        if gone:
            _look_for_all(store, dead)
        replaced, copied = _rows_to_copy(store, dead, counts, left_out)
        if replaced:
            _copy_rows(store, dead, copied)
            for shard in replaced:
                shard.remove()
            _forget_removed(store)
        left = store.write_failure_summary()
        return Pruned(counts[MISSING], counts[CHANGED], counts[LEFT_OUT], counts[_SPARED], left)


def _look_for_all(store: EmbeddingStore, dead: dict[Row, Death]) -> None:
    """Add the rows whose files are missing."""
    for shard in store.complete():
        for row, image in enumerate(shard.read_listing()):
            if (shard.number, row) not in dead and is_gone(image.path):
                dead[shard.number, row] = Death(MISSING)


def _rows_to_copy(
    store: EmbeddingStore, dead: dict[Row, Death], counts: Counter[str], left_out: bool
) -> tuple[list[ShardFiles], list[ImageSource]]:
    """The shards that ``prune`` replaces, and those of their rows that stay. Counts the dead rows."""
    reasons = in_effect(dead, (shard.number for shard in store.complete()))
    replaced: list[ShardFiles] = []
    copied: list[ImageSource] = []
    for shard in store.complete():
        if gone := reasons.get(shard.number):
            listing, with_vectors = shard.read_listing(), {*shard.rows_with_vectors()}
            spared = {row for row in gone if _is_spared(listing[row], dead[shard.number, row], left_out)}
            counts.update(_SPARED if row in spared else gone[row] for row in gone.keys() & with_vectors)
            if gone.keys() - spared:
                replaced.append(shard)
                rows = (row for row in range(len(listing)) if row not in gone or row in spared)
                copied += [listing[row]._replace(taken_shard=shard.number, taken_row=row) for row in rows]
    return replaced, copied


def _is_spared(image: ImageSource, death: Death, left_out: bool) -> bool:
    """Whether a dead row stays."""
    if death.by != -1:
        return False  # another shard has it
    if death.reason != MISSING:
        return death.reason == LEFT_OUT and not left_out
    return not is_gone(image.path) or _may_come_back(image.path)


def _may_come_back(path: str) -> bool:
    """Whether a missing file may be on a disk that is not mounted: nothing is left where it lay but an empty folder."""
    folder = os.path.dirname(path)
    while is_gone(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        return not os.listdir(folder)
    except OSError:
        return True  # storage that fails says nothing about its files


def _copy_rows(store: EmbeddingStore, dead: dict[Row, Death], copied: Sequence[ImageSource]) -> None:
    """Copy the rows into new shards. The originals die, each once its copy is complete."""
    size = complete_settings(store.manifest(), {}).shard_size
    first = _next_number(store)
    for place, image in enumerate(copied):
        number, origin = first + place // size, (image.taken_shard, image.taken_row)
        reason = TAKEN
        if origin in dead:  # spared: dead in its new shard as well
            reason = dead[origin].reason
            dead[number, place % size] = Death(reason)
        dead[origin] = Death(reason, by=number)
    write_dead_rows(store.folder, dead)
    _write_plans(store, copied, size)
    take_over(store)


def _finish_removals(store: EmbeddingStore) -> None:
    """Remove the shards whose removal a crash has interrupted: all their rows are dead, and they are not complete."""
    reasons = in_effect(read_dead_rows(store.folder), (shard.number for shard in store.complete()))
    for shard in store.pending():
        if len(reasons.get(shard.number, ())) == shard.count_images():
            shard.remove()
    _forget_removed(store)


def _forget_removed(store: EmbeddingStore) -> None:
    """Remove the rows of shards that do not exist any more from dead.parquet."""
    planned, dead = {shard.number for shard in store.planned()}, read_dead_rows(store.folder)
    if any(number not in planned for number, _ in dead):
        write_dead_rows(store.folder, {row: death for row, death in dead.items() if row[0] in planned})
