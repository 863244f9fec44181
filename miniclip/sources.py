"""Find the images to embed: in folders, in tars, in text files of paths, sorted."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from miniclip.errors import InputError
from miniclip.folders import DEFAULT_RULES, Rules, Walk, describe_suffixes

_EXTENSIONS = "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff ppm pgm tga"
_EXTENSIONS += " avif avifs heic heics heif heifs hif jp2 j2k jpx"
SUFFIXES = frozenset(f".{extension}" for extension in _EXTENSIONS.split())
_MAX_INT64 = 2**63 - 1

# What a tar may make a program read into memory. Its headers declare sizes, and a sparse member has no bytes at all.
_LONGEST_HEADER = 2**20
_LONGEST_CAPTION = 2**16
_LONGEST_LINE = 2**16  # bytes; the paths of Linux end at 4,096
_LARGEST_IMAGE = 2**30

# How compressed files begin.
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "Zstandard": b"\x28\xb5\x2f\xfd",
    "zip": b"PK\x03\x04",
}

Identity = tuple[str, int, int, str | None, int]


class ImageSource(NamedTuple):
    """Where one image lies: a file, or a member of a tar.

    The names and the order of the fields are the columns of a shard's listing on disk.
    """

    path: str
    size: int  # of the file, in bytes; -1 if the file could not be examined
    mtime_ns: int
    member: str | None = None  # its name in the tar
    offset: int = 0  # of the member's bytes in the tar
    length: int = 0
    key: str | None = None
    caption: str | None = None
    error: str | None = None  # why the image cannot be decoded, if that was known while listing
    source: str = ""  # what was listed: a folder, a tar, a text file or the image itself
    taken_shard: int = -1  # if another shard has this image already: its number, and the row of its listing
    taken_row: int = -1

    @property
    def name(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"

    @property
    def stat(self) -> tuple[int, int]:
        """The size and the modification time of the file. If either differs, the file has changed."""
        return self.size, self.mtime_ns

    @property
    def bytes_size(self) -> int:
        """The size of the image itself, in bytes."""
        return self.size if self.member is None else self.length

    def open(self) -> io.BufferedReader | io.BytesIO:
        """The bytes of the image, as a file.

        Raises:
            OSError: if the file cannot be read.
        """
        if self.member is None:
            return open(self.path, "rb")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))

    @property
    def identity(self) -> Identity:
        """Two sources with the same identity are the same image."""
        return self.path, self.size, self.mtime_ns, self.member, self.offset


@dataclass
class Listing:
    """What the sources contain.

    Attributes:
        images: sorted by path.
        skipped: the suffixes that are not those of images -> how many files have them.
        excluded: how many files and folders the rules left out.
        links: how many links to folders were not followed.
        sources: the absolute paths of the sources.
        unreadable: folders that could not be read, and sources none of whose images is there.
    """

    images: list[ImageSource] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    excluded: int = 0
    links: int = 0
    sources: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def covers(self, image: ImageSource) -> bool:
        """Whether the listing would contain an image of an earlier listing if the image were still there."""
        if image.source in self.unreadable or any(is_below(image.path, folder) for folder in self.unreadable):
            return False
        return image.source in self.sources or any(is_below(image.path, source) for source in self.sources)


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies below it. Both are absolute."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def is_gone(path: str) -> bool:
    """Whether there is certainly no file of this name. Storage that fails says nothing about its files."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def checksum(file: io.BufferedReader | io.BytesIO) -> str:
    """A checksum of an image's bytes, by which a moved image is known again.

    Raises:
        OSError: if the file cannot be read.
    """
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def list_images(sources: Sequence[Path], rules: Rules = DEFAULT_RULES) -> Listing:
    """List the images of some sources.

    Args:
        sources: each is a folder, with all its subfolders; an image; a .tar, as img2dataset writes them; or a text file
            with one path in each line. A .tar inside a folder or a text file stands for the images in the tar.
        rules: what to leave out in folders. Paths in a text file are all taken.

    Raises:
        InputError: if a source cannot be read, the only source is another file, or none contains an image.
    """
    listing = Listing()
    for source in sources:
        try:
            _add_source(listing, source, rules)
        except InputError:  # InputError is a ValueError
            if len(sources) == 1:
                raise
            # Of many sources, as the shell makes them of photos/*, some may be films.
            listing.skipped[source.suffix.lower()] += 1
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not listing.images:
        raise InputError(f"{', '.join(map(str, sources))} {_without_images(listing)}")
    # Two sources, or two lines of a text file, may name the same image.
    listing.images = list({image.identity: image for image in listing.images}.values())
    listing.images.sort(key=lambda image: (os.fsencode(image.path), image.offset, image.member or ""))
    return listing


def _add_source(listing: Listing, source: Path, rules: Rules) -> None:
    suffix, start = source.suffix.lower(), len(listing.images)
    listing.sources.append(os.path.abspath(source))
    if source.is_dir():
        walk = Walk(os.path.abspath(source), rules)
        for path in walk:
            suffix = os.path.splitext(path)[1].lower()
            if suffix in SUFFIXES or suffix == ".tar":
                listing.images += _expand(path)
            else:
                listing.skipped[suffix] += 1
        listing.unreadable += walk.unreadable
        for folder, reason in walk.unreadable.items():
            listing.images.append(ImageSource(folder, -1, 0, error=f"the folder cannot be read ({reason})"))
        if len(listing.images) == start:  # a disk that is not mounted may leave an empty folder
            listing.unreadable.append(listing.sources[-1])
        listing.excluded += walk.excluded
        listing.links += walk.links
    elif suffix in SUFFIXES or suffix == ".tar":
        source.stat()  # a missing file is an error of the caller, not a failed image
        listing.images += _expand(os.path.abspath(source))
    else:
        listing.images += _read_list(source)
        if all(is_gone(image.path) for image in listing.images[start:]):
            listing.unreadable.append(listing.sources[-1])
    listing.images[start:] = [image._replace(source=listing.sources[-1]) for image in listing.images[start:]]


def _without_images(listing: Listing) -> str:
    """Why there is nothing to embed."""
    parts = [describe_suffixes(listing.skipped)] if listing.skipped else []
    parts += [f"{listing.excluded:,} excluded"] if listing.excluded else []
    parts += [f"{listing.links:,} not followed because they are links"] if listing.links else []
    return f"contains no images, only {'; '.join(parts)}" if parts else "contains no images"


def _read_list(path: Path) -> Iterator[ImageSource]:
    """The images of a text file, read line by line: a film that is given by mistake may be larger than the memory."""
    with path.open("rb") as file:
        first = True
        while line := file.readline(_LONGEST_LINE + 1):
            if b"\0" in line or len(line) > _LONGEST_LINE:
                raise InputError(f"{path} is not a folder, not a .tar, and not a text file of paths")
            for part in (line.removeprefix(codecs.BOM_UTF8) if first else line).splitlines():
                if part.strip():
                    yield from _expand(_resolve_list_line(part))
            first = False


def _resolve_list_line(line: bytes) -> str:
    """The absolute path in a line, with ``..`` after a symbolic link to a folder resolved as the OS does."""
    path = os.fsdecode(line)
    if os.pardir in path.split(os.sep):
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.abspath(path)


def _expand(path: str) -> list[ImageSource]:
    """The images that a path stands for: those in a tar, or the file itself."""
    return _tar_images(path) if path[-4:].lower() == ".tar" and os.path.isfile(path) else [stat_image(path)]


def stat_image(path: str) -> ImageSource:
    """A file with its current size and modification time. Does not open the file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a dangling link or an impossible path: decoding reports the reason
        return ImageSource(path, -1, 0)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opening a pipe would wait for a writer
        return ImageSource(path, -1, 0, error="is not a regular file")
    # The listing stores int64: as nanoseconds it ends in the year 2262, and file systems allow later times.
    return ImageSource(path, status.st_size, max(-_MAX_INT64, min(status.st_mtime_ns, _MAX_INT64)))


class _BoundedFile(io.BufferedReader):
    """A tar that is read in pieces of a bounded size: tarfile reads whole headers, whose size the tar declares."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"it has a header of {size or 0:,} bytes, and at most {_LONGEST_HEADER:,} are read")
        return super().read(size)


def _tar_images(path: str) -> list[ImageSource]:
    """The images of a tar with their captions, and one failed source if the tar cannot be read to its end.

    An image and its caption share their name up to the first dot.
    """
    tar_file = stat_image(path)
    members: dict[str, tarfile.TarInfo] = {}  # possible targets of links
    images: list[tuple[ImageSource, tarfile.TarInfo]] = []
    captions: dict[str, str] = {}
    failed: list[ImageSource] = []
    try:
        with _BoundedFile(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                members[os.path.normpath(member.name)] = member
                folder, name = os.path.split(member.name)
                key = valid_text(os.path.join(folder, name.partition(".")[0]))
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES and (member.isfile() or member.islnk() or member.issym()):
                    images.append((tar_file._replace(member=valid_text(member.name), key=key), member))
                elif suffix == ".txt" and member.isfile():
                    if member.issparse() or member.size > _LONGEST_CAPTION:
                        error = f"its caption has {member.size:,} bytes, and at most {_LONGEST_CAPTION:,} are read"
                        failed.append(tar_file._replace(member=valid_text(member.name), key=key, error=error))
                    elif text := tar.extractfile(member):
                        captions[key] = text.read().decode("utf-8", errors="replace")
            _check_tar_end(tar)
    except Exception as error:  # a damaged header may raise anything, even RecursionError
        reason = _compression(path) or f"the tar cannot be read to its end ({error or type(error).__name__})"
        failed.append(tar_file._replace(error=reason))
    located = (_locate_in_tar(image, member, members) for image, member in images)
    return [image._replace(caption=captions.get(image.key or "")) for image in located] + failed


def _compression(path: str) -> str | None:
    """What to do about a file that is compressed, whatever its name says."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError:
        return None
    kind = next((kind for kind, magic in _MAGIC.items() if start.startswith(magic)), None)
    return kind and f"is compressed ({kind}): unpack it to a plain .tar"


def _locate_in_tar(image: ImageSource, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> ImageSource:
    """Add where the image's bytes lie in the tar. For a link, these are the bytes of the link's target."""
    if link := member.linkname if member.islnk() or member.issym() else "":
        # The target of a hard link is relative to the top of the tar, that of a symbolic link to the link's folder.
        target = link if member.islnk() else os.path.join(os.path.dirname(member.name), link)
        if (found := members.get(os.path.normpath(target))) is None:
            return image._replace(error=f"is a link to {valid_text(link)}, which is not in the tar")
        member = found
    if not member.isreg() or member.issparse():
        return image._replace(error="is not stored as a plain file in the tar")
    if member.size > _LARGEST_IMAGE:
        return image._replace(error=f"has {member.size:,} bytes, and at most {_LARGEST_IMAGE:,} are read from a tar")
    return image._replace(offset=member.offset_data, length=member.size)


def _check_tar_end(tar: tarfile.TarFile) -> None:
    """Check that a block of zeros follows the last member. tarfile also stops, without an error, at a damaged header.

    Raises:
        tarfile.ReadError: if the tar is cut off or damaged there.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off")
    if block.count(0) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has a damaged header")


def valid_text(text: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")
