"""What there is to embed: the pictures of a folder, of a .tar, or of a list of paths, in one order."""

from __future__ import annotations

import codecs
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from miniclip.errors import InputError

_KINDS = "jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif jp2 ppm pgm tga"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
_LATEST = 2**63 - 1


class Item(NamedTuple):
    """One picture of a list: a file, or a part of a tar."""

    path: str
    size: int  # of the file, in bytes; -1 if it could not be asked
    mtime_ns: int
    member: str | None = None  # the name in the tar
    offset: int = 0
    length: int = 0
    key: str | None = None
    caption: str | None = None
    error: str | None = None  # what was wrong before it came to decoding

    @property
    def name(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"


def list_items(source: Path) -> tuple[list[Item], int]:
    """What there is to embed, sorted, and how many files were skipped because their names are not pictures'.

    ``source`` is a folder, with all its subfolders; a .tar, as img2dataset writes them; or a text file with a path in
    each line. A .tar among the files counts as the pictures in it.

    Raises:
        InputError: if the source cannot be read or holds no pictures.
    """
    items: list[Item] = []
    skipped = 0
    try:
        if source.is_dir():
            for path in _files_below(os.path.abspath(source), items):
                suffix = os.path.splitext(path)[1].lower()
                if suffix in SUFFIXES or suffix == ".tar":
                    items += _items_at(path)
                else:
                    skipped += 1
        elif source.suffix.lower() == ".tar":
            source.stat()  # what is no file at all is the caller's mistake, not a picture's
            items += _items_at(os.path.abspath(source))
        else:
            text = source.read_bytes().removeprefix(codecs.BOM_UTF8)
            if b"\0" in text:
                raise InputError(f"{source} is neither a folder, nor a .tar, nor a text file of paths")
            for line in text.splitlines():
                if line.strip():
                    items += _items_at(_listed(line))
    except InputError:  # which is a ValueError
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not items:
        only = f", only {skipped:,} files of other kinds" if skipped else ""
        raise InputError(f"{source} holds no pictures{only}")
    items = list({item[:5]: item for item in items}.values())  # a list of paths may name one twice
    items.sort(key=lambda item: (os.fsencode(item.path), item.offset, item.member or ""))
    return items, skipped


def _files_below(folder: str, unreadable: list[Item]) -> Iterator[str]:
    """Every file, links to files included; links to folders are not followed, because they may lead back."""
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif not entry.is_dir():
                        yield entry.path
        except OSError as error:
            if place == folder:
                raise
            unreadable.append(Item(place, -1, 0, error=f"the folder cannot be read ({error.strerror})"))


def _listed(line: bytes) -> str:
    """The path in a line of a list, with what .. means where a folder is a link."""
    path = os.fsdecode(line)
    if os.pardir in path.split(os.sep):
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.abspath(path)


def _items_at(path: str) -> list[Item]:
    return _tar_items(path) if path[-4:].lower() == ".tar" and os.path.isfile(path) else [file_item(path)]


def file_item(path: str) -> Item:
    """A file as it is now."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a dangling link, or no path at all: told when its turn comes
        return Item(path, -1, 0)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opening a pipe would wait for a writer
        return Item(path, -1, 0, error="is not a regular file")
    # 64 bits of nanoseconds end in 2262, file systems do not.
    return Item(path, status.st_size, max(-_LATEST, min(status.st_mtime_ns, _LATEST)))


def _tar_items(path: str) -> list[Item]:
    """The pictures of a tar with their captions. The members of a sample share their name up to the first dot."""
    whole = file_item(path)
    members: dict[str, tarfile.TarInfo] = {}  # what a link may lead to
    pictures: list[tuple[Item, tarfile.TarInfo]] = []
    texts: dict[str, str] = {}
    broken: list[Item] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                members[os.path.normpath(member.name)] = member
                folder, name = os.path.split(member.name)
                key = printable(os.path.join(folder, name.partition(".")[0]))
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES and (member.isfile() or member.islnk() or member.issym()):
                    pictures.append((whole._replace(member=printable(member.name), key=key), member))
                elif suffix == ".txt" and member.isfile() and (file := tar.extractfile(member)):
                    texts[key] = file.read().decode("utf-8", errors="replace")
            _ends_well(tar)
    except Exception as error:  # a damaged header ends in anything, a RecursionError included
        broken = [whole._replace(error=f"cannot be read to its end as a tar ({error or type(error).__name__})")]
    located = (_located(item, member, members) for item, member in pictures)
    return [item._replace(caption=texts.get(item.key or "")) for item in located] + broken


def _located(item: Item, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> Item:
    """An item with the place of its bytes in the tar, which for a link are those of another member."""
    if link := member.linkname if member.islnk() or member.issym() else "":
        # A hard link is named from the top of the tar, a symbolic one from its own folder.
        target = link if member.islnk() else os.path.join(os.path.dirname(member.name), link)
        if (found := members.get(os.path.normpath(target))) is None:
            return item._replace(error=f"is a link to {printable(link)}, which is not in the tar")
        member = found
    if not member.isreg() or member.issparse():
        return item._replace(error="is not stored as a plain file in the tar")
    return item._replace(offset=member.offset_data, length=member.size)


def _ends_well(tar: tarfile.TarFile) -> None:
    """See that the last member is followed by the end of the archive: tarfile takes a damaged header for it as well.

    Raises:
        tarfile.ReadError: if it is not.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.count(0) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut off" if len(block) < tarfile.BLOCKSIZE else "a damaged header")


def printable(text: str) -> str:
    """Text that every program can read, with what was not text in a file's name written as \\xNN."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")
