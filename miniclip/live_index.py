"""An open index that follows its folder: a run that adds shards, rows that die, a prune.

A client keeps rows for as long as its page is open, and a prune gives the numbers of rows to other images. So each
answer names its generation, which says what the rows are counted over: "12-8f…" is 12 shards and a checksum of them. A
generation that the folder has only been added to since is still good, also after a restart of the server.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from miniclip.dead_rows import DEAD
from miniclip.errors import InputError, MiniclipError
from miniclip.inverted_file import record_path
from miniclip.manifest import MANIFEST
from miniclip.search import Index

T = TypeVar("T")

_ATTEMPTS = 3  # to open a folder that a run is writing to


class StaleRowError(InputError):
    """A row of a generation that has passed: its number may be that of another image now."""


@dataclass(frozen=True)
class View:
    """The index at one moment.

    Attributes:
        index: the open index.
        marks: for each shard, what tells it from another one that has its number later.
        epoch: how often rows have got other numbers since the start.
    """

    index: Index
    marks: tuple[str, ...]
    epoch: int

    @property
    def generation(self) -> str:
        return _generation(self.marks)

    def check(self, generation: str) -> None:
        """Raises StaleRowError if the rows of a generation are not those of this view."""
        count = generation.partition("-")[0]
        known = count.isascii() and count.isdigit() and len(count) < 10 and int(count) <= len(self.marks)
        if not known or generation != _generation(self.marks[: int(count)]):
            raise StaleRowError("the folder has changed, and its images have other numbers now: search again")


class LiveIndex:
    """An index that is opened again when its folder has changed. May be used from several threads."""

    def __init__(self, folder: Path, model: str | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._look = _look_at(folder)
        index = Index.open(folder, model)
        index.load()
        self._view = View(index, _marks(index), 0)

    def view(self) -> View:
        """The index as the folder is now. Costs a listing of one folder if nothing has changed.

        Raises:
            MiniclipError: as ``Index.open`` does.
        """
        with self._lock:
            look = _look_at(self._folder)
            if look.shards != self._look.shards or look.files != self._look.files:
                self._view = self._reopened()
            elif look.folder != self._look.folder:  # a file came and went, or one took the place of another
                if _marks(self._view.index) == self._view.marks:
                    self._look = look
                else:
                    self._view = self._reopened()
            return self._view

    def answer(self, question: Callable[[View], T]) -> T:
        """What the index answers. A question that fails because the folder has just changed is asked again."""
        for _ in range(_ATTEMPTS - 1):
            view = self.view()
            try:
                return question(view)
            except MiniclipError:
                if self.view() is view:
                    raise
        return question(self.view())

    def _reopened(self) -> View:
        for last in (*[False] * (_ATTEMPTS - 1), True):
            before = _look_at(self._folder)
            try:
                index = self._view.index.reopen()
                index.load()
                marks = _marks(index)
            except MiniclipError:
                if last or _look_at(self._folder) == before:
                    raise
                continue
            if last or _look_at(self._folder) == before:
                break
        self._look = before  # what came later is seen by the next request
        kept = self._view.marks == marks[: len(self._view.marks)]
        return View(index, marks, self._view.epoch + (not kept))


class Look(NamedTuple):
    """What a look at a folder shows. If it is the same as before, the folder has not changed."""

    shards: tuple[str, ...]  # the names of the complete ones
    files: tuple[object, ...]  # which dead rows, which manifest and which inverted file there are
    folder: object  # which changes of names there were; alone it may miss one, because clocks have ticks


def _look_at(folder: Path) -> Look:
    try:
        names = sorted(name for name in os.listdir(folder / "failures") if not name.startswith("."))
    except OSError:
        names = []
    files = tuple(map(_stamp, (folder / DEAD, folder / MANIFEST, record_path(folder))))
    return Look(tuple(names), files, _stamp(folder / "failures"))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced, or when a name in a folder is."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _marks(index: Index) -> tuple[str, ...]:
    """For each shard of an index, what tells it from another one that has its number later."""
    paths = ((shard.failures_path, shard.listing_path) for shard in index.shards)
    return tuple(f"{pair[0].name} {[(_stamp(path) or ())[1:] for path in pair]}" for pair in paths)


def _generation(marks: tuple[str, ...]) -> str:
    return f"{len(marks)}-{hashlib.blake2b(repr(marks).encode(), digest_size=8).hexdigest()}"
