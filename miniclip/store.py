"""The folder of embeddings: its shards, its plan, its lock.

    manifest.json                    the model, the checksum of its weights, the settings, the versions (manifest.py)
    img_emb/, metadata/, listing/, failures/
                                     the files of the shards (shard_files.py)
    failures.jsonl                   {path, error} of the images that no shard could embed

Every file is written by an atomic rename: after a crash at any moment a file is complete or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from miniclip.errors import ConfigError, StorageError
from miniclip.manifest import MANIFEST, encode_manifest, first_difference, read_manifest
from miniclip.shard_files import SUFFIXES, Failure, ShardFiles, import_pyarrow, remove_file, write_file
from miniclip.sources import Identity, ImageSource, printable

_FAILURES = "failures.jsonl"
_TEMPORARY = re.compile(
    rf"\.({'|'.join(SUFFIXES)}|manifest)(_[0-9]+)?\.({'|'.join({*SUFFIXES.values()})}|json)\..+\.tmp"
)
_MAX_ATTEMPTS = 10  # to read a file whose storage fails


def is_worth_retrying(image: ImageSource, attempts: int) -> bool:
    """Whether to plan an image again whose storage failed: the file is readable now, and had few attempts so far."""
    return attempts < _MAX_ATTEMPTS and os.access(image.path, os.R_OK)


class EmbeddingStore:
    """The folder of embeddings. The folder need not exist yet.

    A run works in these steps, inside ``lock``: ``open_run``, ``plan``, ``ShardFiles.write`` for each of ``pending``,
    ``write_failure_summary``.

    Raises:
        ConfigError: if the package pyarrow is missing.
    """

    def __init__(self, folder: Path) -> None:
        import_pyarrow()  # fail before any work if it is missing
        self.folder = folder

    # -- the shards ---------------------------------------------------------------------------------------------------

    def shard(self, number: int) -> ShardFiles:
        return ShardFiles(self.folder, number)

    def planned(self) -> list[ShardFiles]:
        """The shards that have a listing, complete or not, in order."""
        return self._shards("listing")

    def complete(self) -> list[ShardFiles]:
        """The shards that are complete, in order."""
        return self._shards("failures")

    def pending(self) -> list[ShardFiles]:
        """The shards that are planned and not complete, in order."""
        return sorted({*self.planned()} - {*self.complete()})

    def _shards(self, kind: str) -> list[ShardFiles]:
        try:
            names = os.listdir(self.folder / kind)
        except FileNotFoundError:
            return []
        except OSError as error:  # not the same as an empty folder: a run would compute everything again
            raise StorageError(f"{self.folder / kind} cannot be read ({error.strerror})") from None
        matches = (re.fullmatch(rf"{kind}_(0|[1-9][0-9]*)\.{SUFFIXES[kind]}", name) for name in names)
        return [self.shard(number) for number in sorted(int(match[1]) for match in matches if match)]

    def plan(self, images: Sequence[ImageSource], shard_size: int) -> None:
        """Plan new shards for those images that no shard contains yet, or whose storage failed and works again.

        Raises:
            ConfigError: if a file of a shard is damaged.
            StorageError: if a listing cannot be written.
        """
        planned, complete = self.planned(), {*self.complete()}
        known: set[Identity] = set()
        attempts: Counter[Identity] = Counter()
        for shard in planned:
            listing = shard.read_listing()
            known.update(image.identity for image in listing)
            for row, failure in shard.read_failures().items() if shard in complete else ():
                if failure.retry:
                    image = listing[row]
                    attempts[image.identity] += 1
                    if is_worth_retrying(image, attempts[image.identity]):
                        known.discard(image.identity)
        new = [image for image in images if image.identity not in known]
        first = planned[-1].number + 1 if planned else 0
        for number, start in enumerate(range(0, len(new), shard_size), start=first):
            self.shard(number).write_listing(new[start : start + shard_size])

    # -- the run ------------------------------------------------------------------------------------------------------

    def open_run(self, settings: Mapping[str, Any]) -> None:
        """Prepare the folder for a run with these settings: a new folder, or one whose vectors have the same settings.

        Raises:
            ConfigError: if the folder contains vectors of another program, or with other settings (the error names
                the first setting that differs).
            StorageError: if the folder cannot be written.
        """
        if self.manifest() is None:
            self._refuse_foreign_files()
        self._remove_temporary_files()
        if complete := self.complete():
            self._refuse_missing_listings(complete)
            self.check_settings(settings)
        else:
            self._remove_plans()
            write_file(self.folder / MANIFEST, encode_manifest(settings))

    def _refuse_foreign_files(self) -> None:
        if any(path for kind in SUFFIXES for path in self.folder.glob(f"{kind}/{kind}_[0-9]*")):
            raise ConfigError(f"{self.folder} contains vectors but no {MANIFEST}: choose another folder")

    def _remove_temporary_files(self) -> None:
        """Remove what a killed run was writing. The folder may contain other files, which stay."""
        for folder in (self.folder, *(self.folder / kind for kind in SUFFIXES)):
            for path in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    remove_file(path)

    def _refuse_missing_listings(self, complete: Sequence[ShardFiles]) -> None:
        if missing := sorted({*complete} - {*self.planned()}):
            name = missing[0].listing_path.name
            raise ConfigError(f"{self.folder} contains vectors but no {name}: choose another folder")

    def _remove_plans(self) -> None:
        """Remove the plan of an earlier run that completed no shard: the user may have stopped it to change a setting.

        The last shard goes first. After a crash here, the shards that remain are still numbered from 0.
        """
        for shard in reversed(self.planned()):
            shard.remove_plan()

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None if the folder has none. Raises ConfigError if the manifest cannot be read."""
        return read_manifest(self.folder)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Check that a run with these settings may add to the folder.

        Raises:
            ConfigError: if there is no manifest, or a setting differs (the error names the first).
        """
        manifest = self.manifest()
        if manifest is None:
            raise ConfigError(f"{self.folder} has no {MANIFEST}")
        if difference := first_difference(manifest, settings):
            name, before, now = difference
            raise ConfigError(
                f"{self.folder} was created with {name} {before!r}, not {now!r}: choose another folder, or the "
                "settings it was created with"
            )

    def write_failure_summary(self) -> int:
        """Write failures.jsonl from the failures of all complete shards, and verify the vectors of these shards.

        An image may be in several shards, because it was tried again or its file has changed. Its failure counts only
        in the last of them.

        Returns:
            The number of vectors in the folder.

        Raises:
            ConfigError: if a file of a shard is damaged.
            StorageError: if failures.jsonl cannot be written.
        """
        failed: list[tuple[ShardFiles, ImageSource, Failure]] = []
        total = 0
        for shard in self.complete():
            if failures := shard.read_failures():
                listing = shard.read_listing()
                failed += [(shard, listing[row], failure) for row, failure in failures.items()]
            if count := shard.count_images() - len(failures):
                shard.verify_vectors(count)
                total += count
        last = self._last_shards([image for _, image, _ in failed])
        lines = [
            json.dumps({"path": printable(image.name), "error": failure.error}) + "\n"
            for shard, image, failure in failed
            if last[image.path, image.member] == shard
        ]
        write_file(self.folder / _FAILURES, "".join(lines).encode())
        return total

    def _last_shards(self, images: Sequence[ImageSource]) -> dict[tuple[str, str | None], ShardFiles]:
        """The last shard that lists each of these images, by path and member.

        A tar that could not be read to its end is listed as an image without a member. It counts as listed again by
        any shard with a member of it.
        """
        wanted = {(image.path, member) for image in images for member in (image.member, None)}
        last: dict[tuple[str, str | None], ShardFiles] = {}
        for shard in self.planned() if wanted else ():
            for image in shard.read_listing():
                for key in (image.path, image.member), (image.path, None):
                    if key in wanted:
                        last[key] = shard
        return last

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the folder, which is created if missing. The OS releases the lock if this process dies.

        Raises:
            ConfigError: if another run holds the lock.
            StorageError: if the folder cannot be created or written.
        """
        try:
            import filelock
        except ImportError:
            raise ConfigError('the package filelock is missing: pip install -c constraints.txt -e ".[embed]"') from None
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
