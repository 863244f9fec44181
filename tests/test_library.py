"""The index follows the photos: gone, changed, moved, touched; and what prune removes."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding import contents
from helpers import ROOT, make_image, run_cli
from test_embed import SLOW

import miniclip
from miniclip import embed, planning
from miniclip.dead_rows import CHANGED, MISSING, read_dead_rows
from miniclip.sources import ImageSource
from miniclip.store import EmbeddingStore


class Library:
    """A folder of eight photos and its vectors."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.photos, self.out, self.model = folder / "photos", folder / "vectors", model
        self.decoded: list[str] = []
        decode = embed.decode

        def counted(source: ImageSource, *arguments: object) -> embed.Decoded:
            self.decoded.append(os.path.basename(source.path))
            return decode(source, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(embed, "decode", counted)
        for n in range(8):
            make_image(self.photos / f"{n}.png", n)
        self.embed()

    def embed(self, *sources: Path, **options: object) -> embed.Summary:
        """Embed, by default the photos. ``decoded`` then holds what was decoded."""
        self.decoded.clear()
        settings = {"device": "cpu", "batch_size": 4, "shard_size": 3}
        model = None if (self.out / "manifest.json").exists() else self.model
        return miniclip.embed_images(sources or self.photos, self.out, model, **settings | options)  # type: ignore[arg-type]

    def found(self, missing: bool = False) -> dict[str, bool]:
        """All images that a search finds, by name, and whether they are shown as missing."""
        index = miniclip.Index.open(self.out)
        matches = index.nearest(unit(index.dimension), k=1000, missing=missing)
        assert len({match.path for match in matches}) == len(matches)  # of one path only the latest row is searched
        return {os.path.relpath(match.path, self.photos): match.missing for match in matches}

    def vector(self, name: str) -> np.ndarray:
        """The stored vector of an image that a search finds."""
        index = miniclip.Index.open(self.out)
        paths, vectors = index.paths(range(len(index))), np.concatenate([*index.vectors()])
        rows = [row for row, path in enumerate(paths) if path == str(self.photos / name) and not index.dead[row]]
        assert len(rows) == 1
        return vectors[rows[0]]


def unit(dimension: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(0), dimension).float()


@pytest.fixture
def library(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(tmp_path, tiny, monkeypatch)


ALL = {f"{n}.png" for n in range(8)}


def test_a_deleted_image_is_missing_and_comes_back_without_being_embedded(library: Library) -> None:
    kept = (library.photos / "3.png").read_bytes(), (library.photos / "3.png").stat()
    (library.photos / "3.png").unlink()
    assert library.embed().total == 7
    assert library.found() == dict.fromkeys(ALL - {"3.png"}, False)
    assert library.found(missing=True) == {**dict.fromkeys(ALL, False), "3.png": True}
    (library.photos / "3.png").write_bytes(kept[0])
    os.utime(library.photos / "3.png", ns=(kept[1].st_atime_ns, kept[1].st_mtime_ns))
    assert library.embed().total == 8
    assert library.decoded == []
    assert library.found() == dict.fromkeys(ALL, False)


def test_an_overwritten_image_is_found_as_what_it_is_now(library: Library) -> None:
    before = library.vector("3.png")
    make_image(library.photos / "3.png", 100)
    done = library.embed()
    assert (done.embedded, done.taken, done.total) == (1, 0, 8)
    assert not np.array_equal(library.vector("3.png"), before)
    assert library.found(missing=True) == dict.fromkeys(ALL, False)
    assert {death.reason for death in read_dead_rows(library.out).values()} == {CHANGED}


def test_an_image_that_becomes_what_it_was_is_found_as_that(library: Library) -> None:
    path, before = library.photos / "3.png", library.vector("3.png")
    old, status = path.read_bytes(), path.stat()
    make_image(path, 100)
    library.embed()
    path.write_bytes(old)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    library.embed()
    assert library.decoded == []
    assert np.array_equal(library.vector("3.png"), before)


def test_touched_and_moved_images_are_taken_over(library: Library, tmp_path: Path) -> None:
    before = {name: library.vector(name) for name in ALL}
    os.utime(library.photos / "3.png", (1, 1))
    done = library.embed()
    assert (done.embedded, done.taken, done.total, library.decoded) == (0, 1, 8, [])
    shutil.move(library.photos, tmp_path / "moved")
    library.photos = tmp_path / "moved"
    done = library.embed()
    assert (done.embedded, done.taken, done.total, library.decoded) == (0, 8, 8, [])
    assert library.found() == dict.fromkeys(ALL, False)
    assert all(np.array_equal(library.vector(name), before[name]) for name in ALL)


def test_a_copy_is_taken_over_and_the_original_stays(library: Library) -> None:
    shutil.copy(library.photos / "3.png", library.photos / "copy.png")
    done = library.embed()
    assert (done.taken, done.total) == (1, 9)
    assert library.found() == dict.fromkeys(ALL | {"copy.png"}, False)


def test_a_file_of_a_known_size_and_other_content_is_embedded(library: Library) -> None:
    """The mutation of the tests above: the checksum decides, not the size."""
    data = (library.photos / "3.png").read_bytes()
    changed = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    (library.photos / "other.png").write_bytes(changed)
    done = library.embed()
    assert done.taken == 0
    assert library.decoded == ["other.png"]


def test_an_unreadable_folder_deletes_nothing(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    (library.photos / "sub").mkdir()
    (library.photos / "3.png").rename(library.photos / "sub" / "3.png")
    library.embed()
    expected = library.found()
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("sub"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", failing)
        assert library.embed().failed == 1  # the folder
    assert library.found() == expected
    shutil.rmtree(library.photos / "sub")  # now the file is gone
    library.embed()
    assert library.found() == dict.fromkeys(ALL - {"3.png"}, False)


def test_an_empty_or_missing_source_deletes_nothing(library: Library, tmp_path: Path) -> None:
    library.photos.rename(tmp_path / "elsewhere")
    for make_source in (lambda: None, library.photos.mkdir):
        make_source()
        with pytest.raises(miniclip.InputError):
            library.embed()
        assert library.found() == dict.fromkeys(ALL, False)


def test_a_run_over_another_source_says_nothing_about_the_first(library: Library, tmp_path: Path) -> None:
    make_image(tmp_path / "other" / "x.png", 50)
    (library.photos / "3.png").unlink()
    library.embed(tmp_path / "other")
    assert "3.png" in library.found()
    library.embed(library.photos, tmp_path / "other")
    assert "3.png" not in library.found()
    assert "../other/x.png" in library.found()


def test_a_line_removed_from_a_list_is_missing(library: Library, tmp_path: Path) -> None:
    for n in (60, 61):
        make_image(tmp_path / "listed" / f"{n}.png", n)
    paths = [str(tmp_path / "listed" / f"{n}.png") for n in (60, 61)]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    library.embed(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(paths[0])
    library.embed(tmp_path / "list.txt")
    found = library.found(missing=True)
    assert (found["../listed/60.png"], found["../listed/61.png"]) == (False, True)


def test_model_and_settings_come_from_the_manifest(library: Library) -> None:
    make_image(library.photos / "new.png", 70)
    done = miniclip.embed_images(library.photos, library.out, device="cpu")  # not ViT-B/32, not batches of 32
    assert done.embedded == 1
    manifest = json.loads((library.out / "manifest.json").read_text())
    assert (manifest["batch_size"], manifest["shard_size"], manifest["dtype"]) == (4, 3, "float32")
    with pytest.raises(miniclip.ConfigError, match="created with batch_size 4, not 5"):
        miniclip.embed_images(library.photos, library.out, device="cpu", batch_size=5)
    with pytest.raises(miniclip.ConfigError, match=f"created with model '{library.model}', not 'demo'"):
        miniclip.embed_images(library.photos, library.out, "demo", device="cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "nn"), ("dtype", None), ("batch_size", 0), ("shard_size", "many"), ("fast_decode", 1), ("model", 7)],
)
def test_a_manifest_with_a_wrong_setting_is_named(name: str, value: object, library: Library) -> None:
    path = library.out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(miniclip.ConfigError, match=f"no valid {name}"):
        miniclip.embed_images(library.photos, library.out, device="cpu")


def test_a_damaged_list_of_dead_rows_is_named(library: Library) -> None:
    (library.photos / "3.png").unlink()
    library.embed()
    good = (library.out / "dead.parquet").read_bytes()
    for damage in (b"", b"not a table", good[:-20]):
        (library.out / "dead.parquet").write_bytes(damage)
        with pytest.raises(miniclip.ConfigError, match=r"dead\.parquet is damaged"):
            miniclip.Index.open(library.out)
        with pytest.raises(miniclip.ConfigError, match=r"dead\.parquet is damaged"):
            planning.prune(EmbeddingStore(library.out))


# -- prune ------------------------------------------------------------------------------------------------------------


def disturb(library: Library) -> None:
    """Two images gone, one changed, two touched, one that fails."""
    for name in ("0.png", "5.png"):
        (library.photos / name).unlink()
    make_image(library.photos / "3.png", 100)
    for name in ("1.png", "6.png"):
        os.utime(library.photos / name, (1, 1))
    (library.photos / "broken.png").write_text("this is not an image")
    library.embed()


def test_prune_removes_dead_rows_and_nothing_else(library: Library) -> None:
    disturb(library)
    expected = library.found()
    vectors = {name: library.vector(name) for name in expected}
    rows = len(miniclip.Index.open(library.out))
    done = planning.prune(EmbeddingStore(library.out))
    assert (done.missing, done.left) == (2, 6)
    index = miniclip.Index.open(library.out)
    assert len(index) == 6 < rows
    assert not index.dead.any()
    assert library.found(missing=True) == expected
    assert all(np.array_equal(library.vector(name), vectors[name]) for name in expected)
    assert "broken.png" in (library.out / "failures.jsonl").read_text()
    before = contents(library.out)
    assert planning.prune(EmbeddingStore(library.out)) == planning.Pruned(0, 0, 6)
    assert contents(library.out) == before
    assert library.embed().embedded == 0  # nothing is embedded again, and the broken file is not tried again
    assert library.decoded == []


def test_prune_of_a_folder_that_is_none_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(miniclip.ConfigError, match="has no manifest"):
        planning.prune(EmbeddingStore(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_prune_that_dies_at_any_write_ends_in_the_same_bytes(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write and each removal in turn is the last one. Searches see each image once at all times."""
    disturb(library)
    expected, disturbed = library.found(), library.out
    whole = tmp_path / "whole"
    shutil.copytree(disturbed, whole)
    planning.prune(EmbeddingStore(whole))
    calls = 0

    def dying(action: Callable[..., object], last: int) -> Callable[..., object]:
        def counted(*arguments: object, **keywords: object) -> object:
            nonlocal calls
            calls += 1
            if calls > last:
                raise KeyboardInterrupt
            return action(*arguments, **keywords)

        return counted

    for place in itertools.count():
        library.out, calls = tmp_path / f"dies after {place}", 0
        shutil.copytree(disturbed, library.out)
        try:
            with monkeypatch.context() as patched:
                for owner, name in ((os, "replace"), (Path, "replace"), (Path, "unlink")):
                    patched.setattr(owner, name, dying(getattr(owner, name), place))
                planning.prune(EmbeddingStore(library.out))
            break
        except KeyboardInterrupt:
            assert library.found() == expected
        shutil.copytree(library.out, tmp_path / f"embedded after {place}")
        planning.prune(EmbeddingStore(library.out))
        assert contents(library.out) == contents(whole)
        # A run of embed before the next prune finds nothing to do, and takes nothing twice.
        library.out = tmp_path / f"embedded after {place}"
        assert library.embed().embedded == 0
        assert library.found() == expected
        assert library.decoded == []
    assert place > 20


@pytest.mark.slow
def test_a_killed_prune_loses_nothing(library: Library, tmp_path: Path) -> None:
    disturb(library)
    expected, pick = library.found(), random.Random(0)
    whole = tmp_path / "whole"
    shutil.copytree(library.out, whole)
    assert run_cli("prune", whole).returncode == 0
    killed = 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "prune", str(library.out)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        started = time.monotonic()
        while not (library.out / ".lock").exists() and process.poll() is None and time.monotonic() - started < 120:
            time.sleep(0.01)
        time.sleep(pick.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        assert library.found() == expected
    assert killed >= 3
    assert run_cli("prune", library.out).returncode == 0
    assert contents(library.out) == contents(whole)
    assert MISSING not in {death.reason for death in read_dead_rows(library.out).values()}
