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
from miniclip.dead_rows import CHANGED, LEFT_OUT, MISSING, read_dead_rows
from miniclip.sources import ImageSource, list_images
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


def restored(path: Path, kept: tuple[bytes, os.stat_result]) -> None:
    path.write_bytes(kept[0])
    os.utime(path, ns=(kept[1].st_atime_ns, kept[1].st_mtime_ns))


def test_a_file_that_changes_during_a_run_and_is_put_back_is_embedded(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(photo := library.photos / "new.png", 20)
    kept = photo.read_bytes(), photo.stat()
    decode = embed.decode

    def late(source: ImageSource, *arguments: object) -> embed.Decoded:
        if source.path == str(photo):
            make_image(photo, 21)
        return decode(source, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(embed, "decode", late)
        assert library.embed().failed == 1
    restored(photo, kept)
    assert (library.embed().embedded, library.decoded) == (1, ["new.png"])
    assert library.found() == dict.fromkeys({*ALL, "new.png"}, False)


def test_what_an_interrupted_run_planned_and_has_changed_is_planned_anew(library: Library) -> None:
    """The old content is put back afterwards, with its time, as from a backup."""
    for n in range(4):
        make_image(library.photos / f"new{n}.png", 20 + n)
    photo = library.photos / "new1.png"
    kept = photo.read_bytes(), photo.stat()
    planning.plan(EmbeddingStore(library.out), list_images([library.photos]), 3)  # and the run is killed
    make_image(photo, 30)
    done = library.embed()
    assert (done.embedded, done.failed) == (4, 0)
    assert (library.out / "failures.jsonl").read_text() == ""
    changed = library.vector("new1.png")
    restored(photo, kept)
    assert (library.embed().embedded, library.decoded) == (1, ["new1.png"])
    assert not np.array_equal(library.vector("new1.png"), changed)


def test_plans_of_sources_that_a_run_does_not_list_stay(library: Library, tmp_path: Path) -> None:
    make_image(library.photos / "new.png", 20)
    make_image(tmp_path / "other" / "1.png", 21)
    planning.plan(EmbeddingStore(library.out), list_images([library.photos]), 3)
    assert library.embed(tmp_path / "other").embedded == 2
    assert "new.png" in library.found()


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


def test_the_files_and_the_lines_of_a_list_come_and_go(library: Library, tmp_path: Path) -> None:
    for n in (60, 61, 62):
        make_image(tmp_path / "listed" / f"{n}.png", n)
    paths = [str(tmp_path / "listed" / f"{n}.png") for n in (60, 61, 62)]
    list_file = tmp_path / "list.txt"

    def listed() -> dict[str, bool]:
        library.embed(list_file)
        return {name[10:12]: gone for name, gone in library.found(missing=True).items() if name.startswith("../listed")}

    list_file.write_text("\n".join(paths))
    assert listed() == {"60": False, "61": False, "62": False}
    list_file.write_text("\n".join(paths[:2]))  # its file is not missing, but it is not wanted any more
    assert listed() == {"60": False, "61": False}
    os.rename(paths[1], tmp_path / "gone.png")
    assert listed() == {"60": False, "61": True}
    os.rename(tmp_path / "listed", tmp_path / "unplugged")  # the disk that holds all listed files
    assert listed() == {"60": False, "61": True}
    os.rename(tmp_path / "unplugged", tmp_path / "listed")
    os.rename(tmp_path / "gone.png", paths[1])
    assert listed() == {"60": False, "61": False}
    assert library.decoded == []


def test_images_that_a_later_run_leaves_out_are_hidden_and_not_removed(library: Library, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    make_image(tmp_path / "linked" / "x.png", 80)
    (library.photos / "link").symlink_to(tmp_path / "linked")
    make_image(library.photos / "raw" / "y.png", 81)
    library.embed(follow_links=True)
    everything = library.found()
    assert everything.keys() == ALL | {"link/x.png", "raw/y.png"}
    library.embed(exclude=["raw/"])
    assert library.found(missing=True) == dict.fromkeys(ALL, False)
    done = planning.prune(EmbeddingStore(library.out))
    assert (done.missing, done.left_out, done.spared, done.left) == (0, 0, 2, 8)
    assert library.embed(follow_links=True).embedded == 0
    assert library.decoded == []
    assert library.found() == everything
    library.embed(exclude=["raw/"])
    done = planning.prune(EmbeddingStore(library.out), left_out=True)
    assert (done.missing, done.left_out, done.spared, done.left) == (0, 2, 0, 8)
    assert library.embed(follow_links=True).embedded == 2
    assert library.found() == everything


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
    """Two images gone, a third with an empty folder left, one changed, two touched, one left out, one that fails."""
    make_image(library.photos / "sub" / "x.png", 90)
    make_image(library.photos / "raw.png", 91)
    library.embed()
    (library.photos / "sub" / "x.png").unlink()
    for name in ("0.png", "5.png"):
        (library.photos / name).unlink()
    make_image(library.photos / "3.png", 100)
    for name in ("1.png", "6.png"):
        os.utime(library.photos / name, (1, 1))
    (library.photos / "broken.png").write_text("this is not an image")
    library.embed(exclude=["raw.png"])


def test_prune_removes_dead_rows_and_nothing_else(library: Library) -> None:
    disturb(library)
    expected = library.found()
    vectors = {name: library.vector(name) for name in expected}
    rows = len(miniclip.Index.open(library.out))
    done = planning.prune(EmbeddingStore(library.out))
    assert done == planning.Pruned(missing=2, changed=3, left_out=0, spared=2, left=6)
    index = miniclip.Index.open(library.out)
    assert len(index) == 8 < rows
    assert int(index.dead.sum()) == 2
    assert library.found(missing=True) == {**expected, "sub/x.png": True}  # its disk may not be mounted
    assert all(np.array_equal(library.vector(name), vectors[name]) for name in expected)
    assert "broken.png" in (library.out / "failures.jsonl").read_text()
    before = contents(library.out)
    assert planning.prune(EmbeddingStore(library.out)) == planning.Pruned(0, 0, 0, 2, 6)
    assert contents(library.out) == before
    # Nothing is embedded again, the broken file is not tried again, and what was spared comes back.
    make_image(library.photos / "sub" / "x.png", 90)
    assert library.embed().embedded == 0
    assert library.decoded == []
    assert library.found() == {**expected, "sub/x.png": False, "raw.png": False}


def test_prune_spares_an_image_that_is_there_again(library: Library) -> None:
    (library.photos / "3.png").rename(library.photos.parent / "away.png")
    library.embed()
    (library.photos.parent / "away.png").rename(library.photos / "3.png")
    assert planning.prune(EmbeddingStore(library.out)).spared == 1
    library.embed()
    assert library.found() == dict.fromkeys(ALL, False)
    assert library.decoded == []


def test_a_source_that_was_deleted_is_pruned_only_with_gone(library: Library) -> None:
    make_image(library.photos.parent / "other" / "1.png", 30)
    library.embed(library.photos.parent / "other")
    shutil.rmtree(library.photos)
    with pytest.raises(miniclip.InputError, match="cannot be read"):
        library.embed()
    store = EmbeddingStore(library.out)
    assert planning.prune(store).missing == 0
    done = planning.prune(store, gone=True)
    assert (done.missing, done.left) == (8, 1)
    assert library.found() == {"../other/1.png": False}
    assert planning.prune(store, gone=True).missing == 0


def test_gone_spares_a_disk_that_is_not_mounted(library: Library) -> None:
    before = contents(library.out)
    for path in library.photos.iterdir():
        path.unlink()
    done = planning.prune(EmbeddingStore(library.out), gone=True)
    assert (done.missing, done.spared) == (0, 8)
    assert {name: data for name, data in contents(library.out).items() if name in before} == before


def test_entries_of_plans_that_prune_removes_never_hide_images_of_new_shards(library: Library) -> None:
    """A killed run leaves a plan, and its files vanish. The shards that prune makes get the numbers of the plan."""
    kept = library.found()
    for n in range(20, 26):
        make_image(library.photos / f"{n}.png", n)
    store = EmbeddingStore(library.out)
    planning.plan(store, list_images([library.photos]), 3)  # killed before any shard
    for n in range(20, 26):
        (library.photos / f"{n}.png").unlink()
    make_image(library.photos / "30.png", 30)
    planning.plan(store, list_images([library.photos]), 3)  # killed again: the entries of the first plan are dead
    (library.photos / "30.png").unlink()
    (library.photos / "0.png").unlink()
    del kept["0.png"]
    library.embed()
    planning.prune(store)
    assert library.found() == kept
    library.embed()
    assert library.found() == kept
    assert library.decoded == []


def test_a_plan_to_copy_from_a_lost_shard_is_made_anew(library: Library) -> None:
    for name in ALL:
        os.utime(library.photos / name, (1, 1))
    store = EmbeddingStore(library.out)
    planning.plan(store, list_images([library.photos]), 3)  # killed before anything is copied
    for kind, suffix in (("failures", "jsonl"), ("listing", "parquet"), ("metadata", "parquet"), ("img_emb", "npy")):
        (library.out / kind / f"{kind}_0.{suffix}").unlink()
    done = library.embed()
    assert (done.taken, done.embedded, done.total) == (5, 3, 8)
    assert library.found() == dict.fromkeys(ALL, False)


def test_an_empty_source_hides_nothing_beside_a_full_one(library: Library, tmp_path: Path) -> None:
    make_image(tmp_path / "disk" / "x.png", 50)
    sources = library.photos, tmp_path / "disk"
    library.embed(*sources)
    (tmp_path / "disk" / "x.png").unlink()  # an empty mount point looks like this
    library.embed(*sources)
    assert library.found().keys() == ALL | {"../disk/x.png"}
    make_image(tmp_path / "disk" / "y.png", 51)
    library.embed(*sources)
    assert library.found().keys() == ALL | {"../disk/y.png"}


def test_a_manifest_without_a_model_is_named(library: Library) -> None:
    path = library.out / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["model"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(miniclip.ConfigError, match="names no model"):
        miniclip.Index.open(library.out)
    with pytest.raises(miniclip.ConfigError, match="no valid model"):
        miniclip.embed_images(library.photos, library.out, device="cpu")


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
        assert library.embed(exclude=["raw.png"]).embedded == 0
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
    for _ in range(10):
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
    assert sorted(death.reason for death in read_dead_rows(library.out).values()) == [LEFT_OUT, MISSING]
