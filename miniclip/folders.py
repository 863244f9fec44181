"""Walk a folder of photos: every file below it, but for what other programs keep there for themselves."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import translate
from typing import NamedTuple

# The waste bins and thumbnails of NAS systems, Windows and desktops. A pattern that ends with "/" is for folders alone.
DEFAULT_EXCLUDES = (
    "._*",  # macOS's notes about a file of the same name
    ".*/",
    *("@eaDir/", "@SynoEAStream/", "#recycle/", "#snapshot/", "$RECYCLE.BIN/", "System Volume Information/"),
    *("thumbs/", "thumbnails/", "*.lrdata/"),
)
# The folders in which a library of Apple Photos or of Lightroom keeps the photos themselves. All else is derived.
_LIBRARIES = (".photoslibrary", ".photolibrary", ".aplibrary", ".lrlibrary")
_ORIGINALS = frozenset({"originals", "masters"})


class Rules(NamedTuple):
    """What a walk leaves out.

    Attributes:
        patterns: shell patterns without regard to case, for the name of a file or folder or, with a "/" that is not at
            the end, for the path below the source. A "/" at the end stands for folders alone.
        libraries: whether to enter only the originals of photo libraries.
        follow_links: whether to enter folders through symbolic links.
    """

    patterns: tuple[str, ...] = DEFAULT_EXCLUDES
    libraries: bool = True
    follow_links: bool = False

    @classmethod
    def of(cls, exclude: Sequence[str] = (), default_excludes: bool = True, follow_links: bool = False) -> Rules:
        return cls((*(DEFAULT_EXCLUDES if default_excludes else ()), *exclude), default_excludes, follow_links)

    def matcher(self, folders: bool) -> re.Pattern[str]:
        """Matches the paths below the source, with "/" and in lower case, of the folders or files to leave out."""
        shapes = []
        for pattern in map(str.lower, self.patterns):
            shape = pattern.rstrip("/")
            if folders or shape == pattern:
                anywhere = "" if "/" in shape else "(?:.*/)?"  # a name alone matches at every depth
                shapes.append(anywhere + translate(shape.lstrip("/")))
        return re.compile("|".join(shapes) or "(?!)", re.DOTALL)


DEFAULT_RULES = Rules()


class Walk:
    """The files below a folder, in a fixed order, and what was not entered. Iterate over it once.

    Attributes:
        unreadable: folders that could not be read -> the reason.
        excluded: how many files and folders the rules left out.
        links: links to folders that were not followed.
    """

    def __init__(self, root: str, rules: Rules) -> None:
        self.unreadable: dict[str, str] = {}
        self.excluded = 0
        self.links = 0
        self._root, self._rules = root, rules
        self._above = len(os.path.join(root, ""))
        self._no_file, self._no_folder = rules.matcher(folders=False), rules.matcher(folders=True)
        self._entered: set[tuple[int, int]] = set()  # device and inode, so that no folder is entered twice
        self._linked: list[str] = []

    def __iter__(self) -> Iterator[str]:
        """The paths of the files.

        Symbolic links to files are included. Links to folders come after all folders, so that a file that can be
        reached in both ways gets its plain path.

        Raises:
            OSError: if the root itself cannot be read.
        """
        yield from self._below(self._root)
        while self._linked:
            links, self._linked = sorted(self._linked, key=os.fsencode), []
            for link in links:
                yield from self._below(link)

    def _below(self, top: str) -> Iterator[str]:
        pending = [top]
        while pending:
            folder = pending.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in self._entered:
                    continue
                self._entered.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as scanned:
                    entries = sorted(scanned, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                if folder == self._root:
                    raise
                self.unreadable[folder] = error.strerror or str(error)
                continue
            derived = self._rules.libraries and _is_derived(folder)
            for entry in entries:
                is_folder = _is_folder(entry)
                below = entry.path[self._above :].replace(os.sep, "/").lower()
                if (derived and not is_folder) or (self._no_folder if is_folder else self._no_file).match(below):
                    self.excluded += 1
                elif not is_folder:
                    yield entry.path
                elif not entry.is_symlink():
                    pending.append(entry.path)
                elif self._rules.follow_links:
                    self._linked.append(entry.path)
                else:
                    self.links += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A link to itself is neither, and decoding reports it."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_derived(folder: str) -> bool:
    """Whether a folder lies in a photo library, but not among its originals."""
    names = folder.lower().split(os.sep)
    library = next((n for n, name in enumerate(names) if name.endswith(_LIBRARIES)), None)
    return library is not None and not _ORIGINALS.intersection(names[library + 1 :])


def describe_suffixes(skipped: Counter[str], shown: int = 5) -> str:
    """The skipped files by suffix, the most frequent first: "12 .mov, 3 .txt, 1 without a suffix"."""
    ranked = sorted(skipped.items(), key=lambda item: (-item[1], item[0] or "~"))
    parts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in ranked[:shown]]
    if others := sum(count for _, count in ranked[shown:]):
        parts.append(f"{others:,} with other suffixes")
    return ", ".join(parts)
