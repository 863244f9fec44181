"""The folder of embeddings: its shards, its plan, its lock.

    manifest.json                    the model, the checksum of its weights, the settings, the versions (manifest.py)
    img_emb/, metadata/, listing/, failures/
                                     the files of the shards (shard_files.py)
    failures.jsonl                   {path, error} of the images that no shard could embed
    dead.parquet                     the rows whose files are gone or have changed (dead_rows.py)

Every file is written by an atomic rename: after a crash at any moment a file is complete or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from miniclip.dead_rows import in_effect, read_dead_rows
from miniclip.errors import ConfigError, StorageError
from miniclip.manifest import MANIFEST, describe_difference, encode_manifest, read_manifest
from miniclip.parquet import import_pyarrow
from miniclip.shard_files import SUFFIXES, Failure, ShardFiles, remove_file, write_file
from miniclip.sources import ImageSource, valid_text

_FAILURES = "failures.jsonl"
_TEMPORARY = re.compile(
    rf"\.({'|'.join(SUFFIXES)}|manifest|dead)(_[0-9]+)?\.({'|'.join({*SUFFIXES.values()})}|json)\..+\.tmp"
)


class EmbeddingStore:
    """The folder of embeddings. The folder need not exist yet.

    A run works in these steps, inside ``lock``: ``open_run``, ``planning.plan``, ``planning.take_over``,
    ``ShardFiles.write`` for each of ``pending``, ``write_failure_summary``.

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

    def require_manifest(self) -> dict[str, Any]:
        """The manifest. Raises ConfigError if the folder has none, or one that cannot be read."""
        if (manifest := self.manifest()) is None:
            raise ConfigError(f"{self.folder} has no {MANIFEST}: is it a folder that miniclip embed made?")
        return manifest

    def open_again(self) -> None:
        """Prepare the folder for work on its vectors without a model. Raises ConfigError if a listing is missing."""
        self._remove_temporary_files()
        self._refuse_missing_listings(self.complete())

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

    def check_run(self, written: Sequence[ShardFiles] = ()) -> None:
        """Check that nobody removed the manifest, or a shard that this run wrote, while the run was going on.

        Raises:
            StorageError: if something is missing.
        """
        for path in (self.folder / MANIFEST, *(shard.failures_path for shard in written)):
            if not path.exists():
                raise StorageError(
                    f"{path} was removed during the run, so the folder is not whole: restore it, or embed into another "
                    "folder"
                )

    def dead_rows(self) -> dict[int, dict[int, str]]:
        """Shard -> row of its listing -> why the row is dead. Raises ConfigError if dead.parquet is damaged."""
        return in_effect(read_dead_rows(self.folder), (shard.number for shard in self.complete()))

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
        if difference := describe_difference(manifest, settings):
            raise ConfigError(
                f"{self.folder} was created with {difference}: choose another folder, or leave out the setting to use "
                "that of the folder"
            )

    def write_failure_summary(self) -> int:
        """Write failures.jsonl from the failures of all complete shards, and verify the files of these shards.

        An image may be in several shards, because it was tried again or its file has changed. Its failure counts only
        in the last of them.

        Returns:
            The number of vectors in the folder, without dead rows.

        Raises:
            ConfigError: if a file of a shard is damaged.
            StorageError: if failures.jsonl cannot be written.
        """
        failed: list[tuple[ShardFiles, ImageSource, Failure]] = []
        total = 0
        dead = self.dead_rows()
        for shard in self.complete():
            failures, gone = shard.read_failures(), dead.get(shard.number, {})
            if alive := failures.keys() - gone.keys():
                listing = shard.read_listing()
                failed += [(shard, listing[row], failures[row]) for row in sorted(alive)]
            shard.verify_starts()
            if count := shard.count_images() - len(failures):
                total += count - len(gone.keys() - failures.keys())
        last = self._last_shards([image for _, image, _ in failed])
        lines = [
            json.dumps({"path": valid_text(image.name), "error": failure.error}) + "\n"
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
