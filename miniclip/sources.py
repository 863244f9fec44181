"""Find the images to embed: in a folder, in a .tar, or in a text file of paths, sorted."""

from __future__ import annotations

import codecs
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from miniclip.errors import InputError

_EXTENSIONS = "jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif jp2 ppm pgm tga"
SUFFIXES = frozenset(f".{extension}" for extension in _EXTENSIONS.split())
_MAX_INT64 = 2**63 - 1

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

    @property
    def name(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"

    @property
    def stat(self) -> tuple[int, int]:
        """The size and the modification time of the file. If either differs, the file has changed."""
        return self.size, self.mtime_ns

    @property
    def identity(self) -> Identity:
        """Two sources with the same identity are the same image."""
        return self.path, self.size, self.mtime_ns, self.member, self.offset


def list_images(source: Path) -> tuple[list[ImageSource], int]:
    """List the images of a source.

    Args:
        source: a folder, with all its subfolders; a .tar, as img2dataset writes them; or a text file with one path in
            each line. A .tar inside a folder or a text file stands for the images in the tar.

    Returns:
        The images, sorted by path, and how many files were skipped because their suffix is not that of an image.

    Raises:
        InputError: if the source cannot be read or contains no images.
    """
    images: list[ImageSource] = []
    skipped = 0
    try:
        if source.is_dir():
            for path in _walk(os.path.abspath(source), images):
                suffix = os.path.splitext(path)[1].lower()
                if suffix in SUFFIXES or suffix == ".tar":
                    images += _expand(path)
                else:
                    skipped += 1
        elif source.suffix.lower() == ".tar":
            source.stat()  # a missing tar is an error of the caller, not a failed image
            images += _expand(os.path.abspath(source))
        else:
            images += _read_list(source)
    except InputError:  # InputError is a ValueError
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{source} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not images:
        only = f", only {skipped:,} other files" if skipped else ""
        raise InputError(f"{source} contains no images{only}")
    images = list({image.identity: image for image in images}.values())  # a text file may name an image twice
    images.sort(key=lambda image: (os.fsencode(image.path), image.offset, image.member or ""))
    return images, skipped


def _walk(folder: str, unreadable: list[ImageSource]) -> Iterator[str]:
    """Every file below a folder. Subfolders that cannot be read are added to ``unreadable``.

    Symbolic links to files are included. Links to folders are not followed, because they may form a cycle.
    """
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif not entry.is_dir():
                        yield entry.path
        except OSError as error:
            if current == folder:
                raise
            unreadable.append(ImageSource(current, -1, 0, error=f"the folder cannot be read ({error.strerror})"))


def _read_list(path: Path) -> Iterator[ImageSource]:
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if b"\0" in text:
        raise InputError(f"{path} is not a folder, not a .tar, and not a text file of paths")
    for line in text.splitlines():
        if line.strip():
            yield from _expand(_resolve_list_line(line))


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
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                members[os.path.normpath(member.name)] = member
                folder, name = os.path.split(member.name)
                key = printable(os.path.join(folder, name.partition(".")[0]))
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES and (member.isfile() or member.islnk() or member.issym()):
                    images.append((tar_file._replace(member=printable(member.name), key=key), member))
                elif suffix == ".txt" and member.isfile() and (file := tar.extractfile(member)):
                    captions[key] = file.read().decode("utf-8", errors="replace")
            _check_tar_end(tar)
    except Exception as error:  # a damaged header may raise anything, even RecursionError
        failed = [tar_file._replace(error=f"the tar cannot be read to its end ({error or type(error).__name__})")]
    located = (_locate_in_tar(image, member, members) for image, member in images)
    return [image._replace(caption=captions.get(image.key or "")) for image in located] + failed


def _locate_in_tar(image: ImageSource, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> ImageSource:
    """Add where the image's bytes lie in the tar. For a link, these are the bytes of the link's target."""
    if link := member.linkname if member.islnk() or member.issym() else "":
        # The target of a hard link is relative to the top of the tar, that of a symbolic link to the link's folder.
        target = link if member.islnk() else os.path.join(os.path.dirname(member.name), link)
        if (found := members.get(os.path.normpath(target))) is None:
            return image._replace(error=f"is a link to {printable(link)}, which is not in the tar")
        member = found
    if not member.isreg() or member.issparse():
        return image._replace(error="is not stored as a plain file in the tar")
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


def printable(text: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")
