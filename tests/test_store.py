"""The folder of embeddings and the files of its shards: plans, settings, retries, crashes, damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedding import BROKEN, complete_shards, contents, make_photos
from embedding_reader import EmbeddingReader
from helpers import make_image, run_cli, run_python
from PIL import Image

import miniclip
from miniclip.dead_rows import CHANGED, Death, read_dead_rows, write_dead_rows
from miniclip.errors import StorageError
from miniclip.planning import is_worth_retrying, plan
from miniclip.shard_files import Failure, Shard, ShardFiles
from miniclip.sources import ImageSource, Listing
from miniclip.store import EmbeddingStore


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def test_a_second_run_embeds_only_new_files(photos: Path, tiny: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "shard_size": 10, "device": "cpu"}
    out = tmp_path / "out"
    miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    before = contents(out)
    make_image(photos / "a" / "0_new.png", 77)
    make_image(photos / "a" / "00.jpg", 78)  # another image under an old name
    done = miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert (done.embedded, done.failed, done.shards, done.total) == (2, 0, 1, 24)  # the old row of 00.jpg is dead
    after = contents(out)
    assert {name: data for name, data in after.items() if name in before} == before
    assert set(after) - set(before) == {
        "img_emb/img_emb_3.npy",
        "metadata/metadata_3.parquet",
        "failures/failures_3.jsonl",
        "listing/listing_3.parquet",
        "dead.parquet",
    }


def test_a_file_on_a_failing_disk_is_retried(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk with the images vanishes in the middle of a run and returns later."""
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    out = tmp_path / "out"
    write = ShardFiles.write

    def unplugged(files: ShardFiles, shard: Shard) -> None:
        write(files, shard)
        if files.number == 1:
            photos.rename(tmp_path / "away")

    with monkeypatch.context() as patched:
        patched.setattr(ShardFiles, "write", unplugged)
        first = miniclip.embed_images(photos, out, str(tiny), **settings, workers=1)  # type: ignore[arg-type]
    assert first.failed > 6
    (tmp_path / "away").rename(photos)
    second = miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert second.total == 23
    assert second.embedded == 23 - first.embedded
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {os.path.relpath(failure["path"], photos) for failure in failures} == BROKEN
    assert all(failure.keys() == {"path", "error"} for failure in failures)
    third = miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert (third.embedded, third.shards, third.total) == (0, 0, 23)


@pytest.mark.parametrize(("number", "tries"), [(errno.EIO, 10), (errno.EINVAL, 1)])
def test_unreadable_files_are_retried_ten_times(
    number: int, tries: int, photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector is retried. A damaged image, in which Pillow seeks before the start of the file, is not."""
    opened = Image.open

    def fails(file: object, *arguments: object) -> Image.Image:
        if str(getattr(file, "name", file)).endswith("00.jpg"):
            raise OSError(number, os.strerror(number))
        return opened(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", fails)
    done = [miniclip.embed_images(photos, tmp_path / "out", str(tiny), device="cpu") for _ in range(12)]
    assert [summary.shards for summary in done] == [1] * tries + [0] * (12 - tries)
    failures = [json.loads(line)["path"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == len(set(failures)) == 7


def test_a_run_without_complete_shards_leaves_no_plan(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user sees that it is the wrong folder and stops the run before its first shard."""
    (tmp_path / "wrong").mkdir()
    for n in range(12):
        make_image(tmp_path / "wrong" / f"{n}.png", 100 + n)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardFiles, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            miniclip.embed_images(tmp_path / "wrong", tmp_path / "out", str(tiny), shard_size=2, device="cpu")
    assert len(list((tmp_path / "out" / "listing").iterdir())) == 6
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=10, device="cpu")
    miniclip.embed_images(photos, tmp_path / "direct", str(tiny), shard_size=10, device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


@pytest.mark.parametrize("name", ["img_emb/img_emb_00.npy", "metadata/metadata_12.parquet"])
def test_vectors_of_another_program_are_not_touched(name: str, photos: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(b"theirs")
    with pytest.raises(miniclip.ConfigError, match=r"contains vectors but no manifest\.json"):
        miniclip.embed_images(photos, tmp_path / "out", str(tiny), device="cpu")
    assert contents(tmp_path / "out") == {name: b"theirs"}


def test_other_files_in_the_folder_are_kept(photos: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    theirs = [
        out / name for name in (".draft.tmp", "deep/er/.x.tmp", "img_emb/.keep.tmp", "img_emb/img_emb_x.npy", "a")
    ]
    ours = [out / "img_emb" / ".img_emb_3.npy.host.17.tmp", out / ".manifest.json.host.17.tmp"]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for _ in range(2):
        assert miniclip.embed_images(photos, out, str(tiny), device="cpu").total == 23
    assert all(path.read_text() == "x" for path in theirs)
    assert not any(path.exists() for path in ours)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 5}, "batch_size 4, not 5"),
        ({"shard_size": 11}, "shard_size 10, not 11"),
        ({"dtype": torch.float64}, "dtype 'float32', not 'float64'"),
        ({"fast_decode": True}, "fast_decode False, not True"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, object], named: str, photos: Path, tiny: Path, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"batch_size": 4, "shard_size": 10, "device": "cpu"}
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), **settings)  # type: ignore[arg-type]
    before = contents(tmp_path / "out")
    with pytest.raises(miniclip.ConfigError, match=named):
        miniclip.embed_images(photos, tmp_path / "out", str(tiny), **{**settings, **change})  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == before


def test_other_weights_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "model"))
    out = tmp_path / "out"
    miniclip.embed_images(photos, out, str(copy), device="cpu")
    model, preprocess = miniclip.load(copy, "cpu")
    model.logit_scale.add_(1)
    miniclip.save_pretrained(model, copy, preprocess)
    with pytest.raises(miniclip.ConfigError, match="created with other weights of the model"):
        miniclip.embed_images(photos, out, str(copy), device="cpu")
    with pytest.raises(miniclip.CheckpointError, match="were made with other weights of the model"):
        miniclip.Index.open(out).search("a cat")


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    with EmbeddingStore(tmp_path / "out").lock():
        done = run_cli("embed", photos, "--model", tiny, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "another run is writing" in done.stderr
    assert run_cli("embed", photos, "--model", tiny, "--out", tmp_path / "out").returncode == 0


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    fsync = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2 + 6 * 2 + 2 * 6:  # the manifest, six listings, two shards; each a file and its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert complete_shards(out) == {"0", "1"}
    assert not list(out.rglob("*.tmp"))
    miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    miniclip.embed_images(photos, tmp_path / "whole", str(tiny), **settings)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_file_over_the_size_limit_is_named(photos: Path, tiny: Path, tmp_path: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from miniclip import cli\n"
    code += "sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["embed", photos, "--model", tiny, "--device", "cpu", "--out"]
    assert run_cli(*arguments, tmp_path / "whole").returncode == 0
    done = run_python("-c", code, *arguments, tmp_path / "out")
    assert done.returncode == 1
    assert "cannot be written (File too large); the shards written before are complete" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_cli(*arguments, tmp_path / "out").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_without_vectors_has_no_vector_file(photos: Path, tiny: Path, tmp_path: Path) -> None:
    """Readers that pair vectors and metadata would otherwise mix up the shards."""
    for n in range(3):
        (photos / "b" / f"0{n}_broken.jpg").write_bytes(b"broken")
    done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=2, device="cpu")
    assert (done.embedded, done.failed, done.shards) == (23, 9, 16)
    names = {
        kind: {path.stem.split("_")[-1] for path in (tmp_path / "out" / kind).iterdir()}
        for kind in ("img_emb", "metadata", "failures")
    }
    assert names["img_emb"] == names["metadata"] < names["failures"] == set(map(str, range(16)))
    # autofaiss and clip-retrieval index read such a folder with this package.
    folders = {"embeddings_folder": str(tmp_path / "out/img_emb"), "metadata_folder": str(tmp_path / "out/metadata")}
    reader = EmbeddingReader(file_format="parquet_npy", meta_columns=["image_path"], **folders)
    assert (reader.count, reader.dimension) == (23, 48)
    model, preprocess = miniclip.load(tiny, "cpu")
    for vectors, metadata in reader(batch_size=5, show_progress=False):
        for path, vector in zip(metadata["image_path"], vectors):
            expected = F.normalize(model.encode_image(preprocess([miniclip.open_image(path)])), dim=1)
            assert np.abs(vector - expected[0].numpy()).max() < 1e-3
    index = miniclip.Index.open(tmp_path / "out")
    last = index.paths([22])[0]
    assert index.search(image=miniclip.open_image(last), k=1)[0].path == last
    done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=2, device="cpu")
    assert (done.embedded, done.shards, done.total) == (0, 0, 23)


def test_a_shard_that_lost_its_images_leaves_no_vectors(tiny: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for n in range(4):
        make_image(photos / f"{n}.png", n)
    miniclip.embed_images(photos, out, str(tiny), shard_size=2, device="cpu")
    (out / "failures" / "failures_1.jsonl").unlink()  # as if the run was killed before it wrote this file
    for n in (2, 3):
        (photos / f"{n}.png").rename(tmp_path / f"{n}.png")
    done = miniclip.embed_images(photos, out, str(tiny), shard_size=2, device="cpu")
    assert (done.failed, done.total) == (0, 2)
    assert [path.name for path in (out / "img_emb").iterdir()] == ["img_emb_0.npy"]
    assert [path.name for path in (out / "metadata").iterdir()] == ["metadata_0.parquet"]


def test_a_damaged_vector_file_is_noticed(photos: Path, tiny: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "shard_size": 10, "device": "cpu"}
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), **settings)  # type: ignore[arg-type]
    path = tmp_path / "out" / "img_emb" / "img_emb_1.npy"
    whole = path.read_bytes()
    header = whole.index(b"{")
    for damage in (
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(whole.replace(b"False", b"True ")),
        lambda: path.write_bytes(whole[:header] + b"((((((" + whole[header + 6 :]),
        path.unlink,
    ):
        damage()
        with pytest.raises(miniclip.ConfigError, match=r"img_emb_1\.npy is damaged .*remove .*failures_1\.jsonl"):
            miniclip.embed_images(photos, tmp_path / "out", str(tiny), **settings)  # type: ignore[arg-type]


def test_a_damaged_shard_is_restored_as_the_error_says(photos: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    miniclip.embed_images(photos, out, str(tiny), batch_size=4, shard_size=7, device="cpu")
    whole = contents(out)
    for path in (out / "img_emb" / "img_emb_2.npy", out / "metadata" / "metadata_2.parquet"):
        for damage in (
            b"",
            path.read_bytes()[:200],
            (out / path.relative_to(out).parent / path.name.replace("2", "3")).read_bytes(),
        ):
            path.write_bytes(damage)
            with pytest.raises(miniclip.ConfigError) as refused:
                miniclip.Index.open(out).search("a dog", k=23)
            assert path.name in str(refused.value)
            (out / "failures" / "failures_2.jsonl").unlink()
            done = miniclip.embed_images(photos, out, str(tiny), batch_size=4, shard_size=7, device="cpu")
            assert done.shards == 1
            assert contents(out) == whole


def test_a_damaged_listing_or_failures_file_is_named(photos: Path, tiny: Path, tmp_path: Path) -> None:
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=10, device="cpu")
    files = EmbeddingStore(tmp_path / "out").shard(1)
    for path, damage, advice in (
        (files.failures_path, b"not JSON", "remove .*failures_1"),
        (files.failures_path, b"[]", "remove .*failures_1"),
        (files.failures_path, b'{"path": "a"}', "remove .*failures_1"),
        (files.listing_path, b"not Parquet", "embed into another folder"),
    ):
        good = path.read_bytes()
        path.write_bytes(damage)
        with pytest.raises(miniclip.ConfigError, match=rf"{path.name} is damaged \(.*\): {advice}"):
            miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=10, device="cpu")
        path.write_bytes(good)


def test_shards_are_planned_pending_and_complete(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path)
    assert store.planned() == store.complete() == store.pending() == []
    images = [ImageSource(f"{n}.png", n, n, caption=None if n else "zero") for n in range(23)]
    plan(store, Listing(images), 2)
    assert [files.number for files in store.pending()] == [*range(12)]  # in the order of numbers, not of names
    assert [image for files in store.planned() for image in files.read_listing()] == images
    store.shard(10).write(Shard(np.zeros((1, 4), np.float16), [1], {0: Failure("broken", retry=True)}, [""]))
    assert store.complete() == [store.shard(10)]
    assert store.shard(10) not in store.pending()
    assert store.shard(10).read_failures() == {0: Failure("broken", retry=True)}
    assert (store.shard(10).count_images(), store.shard(10).count_vectors()) == (2, 1)
    assert store.shard(10).read_paths(1).to_pylist() == ["21.png"]


def test_reading_tables_starts_no_thread(tmp_path: Path) -> None:
    """A thread of pyarrow that runs when the process exits may abort it (see ``read_parquet``)."""
    files = EmbeddingStore(tmp_path).shard(0)
    files.write_listing([ImageSource("a.png", 1, 1)])
    files.write(Shard(np.zeros((1, 4), np.float16), [0], {}, [""]))
    code = "import os, pathlib, sys, pyarrow.parquet\n"
    code += "from miniclip.shard_files import ShardFiles\n"
    code += "before = len(os.listdir('/proc/self/task')); files = ShardFiles(pathlib.Path(sys.argv[1]), 0)\n"
    code += "files.read_listing(), files.read_paths(1), files.count_images()\n"
    code += "print(len(os.listdir('/proc/self/task')) - before)"
    done = run_python("-c", code, tmp_path)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize(("attempts", "worth_it"), [(1, True), (9, True), (10, False)])
def test_only_readable_files_are_worth_ten_attempts(attempts: int, worth_it: bool, tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    assert is_worth_retrying(ImageSource(str(tmp_path / "a.png"), 1, 1), attempts) == worth_it
    assert not is_worth_retrying(ImageSource(str(tmp_path / "missing.png"), 1, 1), attempts)


def test_complete_shards_without_a_listing_are_refused(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path)
    store.open_run({"batch_size": 4})
    plan(store, Listing([ImageSource(f"{n}.png", 1, 1) for n in range(4)]), 2)
    for files in store.pending():
        files.write(Shard(np.zeros((2, 4), np.float16), [0, 1], {}, ["", ""]))
    store.open_run({"batch_size": 4})
    store.shard(1).listing_path.unlink()
    with pytest.raises(miniclip.ConfigError, match=r"contains vectors but no listing_1\.parquet"):
        store.open_run({"batch_size": 4})


def test_a_file_of_the_same_size_and_another_time_is_new(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path)
    plan(store, Listing([ImageSource("a.png", 1, 1)]), 2)
    plan(store, Listing([ImageSource("a.png", 1, 1)]), 2)
    assert len(store.planned()) == 1
    plan(store, Listing([ImageSource("a.png", 1, 2)]), 2)
    assert [image.mtime_ns for files in store.planned() for image in files.read_listing()] == [1, 2]


def test_a_flipped_bit_in_the_dead_rows_is_noticed(tmp_path: Path) -> None:
    """Either the answer is the same, or the file is damaged."""
    dead = {(shard, row): Death(CHANGED) for shard in range(3) for row in range(40)}
    write_dead_rows(tmp_path, dead)
    path = tmp_path / "dead.parquet"
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            right = read_dead_rows(tmp_path) == dead
        except miniclip.ConfigError as error:
            right = str(error).isprintable()
            refused += 1
        assert right, place
    assert refused > len(whole) / 3
