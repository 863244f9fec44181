"""Atomic replacement of files: the old content or the new content, and nothing else in the folder."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_python

from miniclip.files import atomic_replace, atomic_write


def test_atomic_write_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    atomic_write(path, b"old")
    assert path.read_bytes() == b"old"
    atomic_write(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_synced_before_and_its_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    events: list[tuple[str, bytes]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = "folder" if synced == str(tmp_path) else "temporary" if synced.endswith(".tmp") else synced
        events.append((kind, path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    atomic_write(path, b"new")
    assert events == [("temporary", b"old"), ("folder", b"new")]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_replacement_leaves_the_old_files(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    atomic_write(first, b"old")

    def fail(*_: object) -> None:
        raise error

    def replace(last_step: Callable[[], None]) -> None:
        with atomic_replace(first, second) as temporaries:
            for temporary in temporaries:
                temporary.write_bytes(b"new")
            last_step()

    with pytest.raises(type(error)):
        replace(fail)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            replace(lambda: None)
    assert first.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [first]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_replace(path) as (one,), atomic_replace(path) as (other,):
        assert one != other
        assert {entry.name for entry in tmp_path.iterdir()} == {one.name, other.name}
        one.write_bytes(b"one, longer")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one, longer"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_is_created_exclusively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can redirect a write by placing a link under the temporary name."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".file.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "file", b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == [".file.guessed.tmp"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = "import os, pathlib, sys; from miniclip.files import atomic_write\n"
    code += "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
    code += "atomic_write(pathlib.Path(sys.argv[1]), b'new')"
    assert run_python("-c", code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
