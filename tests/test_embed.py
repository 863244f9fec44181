"""Embedding a folder: the same bytes however often it was killed, whatever is in it, and found again by search."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from embedding_reader import EmbeddingReader
from helpers import ROOT
from PIL import Image

import miniclip
from miniclip import cli, embed, sources, store
from miniclip.errors import StorageError
from validation.reference import sample_images


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty-three pictures in folders, some of which are broken in every way a picture can be."""
    folder = tmp_path / "photos"
    for n in range(23):
        kind = ("jpg", "png", "webp", "JPG", "gif")[n % 5]
        picture(folder / f"{'abc'[n % 3]}" / f"{n:02}.{kind}", n)
    whole = (folder / "a" / "00.jpg").read_bytes()
    (folder / "a" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "empty.png").write_bytes(b"")
    (folder / "b" / "text.jpg").write_text("this is no picture")
    (folder / "b" / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "c" / "folder.jpg").mkdir()
    (folder / "c" / "notes.txt").write_text("skipped")
    (folder / "c" / "bomb.png").write_bytes(bomb())
    os.mkfifo(folder / "c" / "pipe.gif")
    return folder


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 900 million pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BROKEN = {"a/truncated.jpg", "a/empty.png", "b/text.jpg", "b/dangling.png", "c/bomb.png", "c/pipe.gif"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an embedded folder but its lock."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniclip", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)


def test_a_folder_with_everything_in_it(photos: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = miniclip.embed_images(photos, out, str(tiny), batch_size=4, shard_size=10, device="cpu")
    assert (done.embedded, done.failed, done.shards, done.total) == (23, 6, 3, 23)
    assert done.skipped == 1  # the notes
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {os.path.relpath(failure["path"], photos) for failure in failures} == BROKEN
    assert all(failure["error"] for failure in failures)

    model, preprocess = miniclip.load(tiny, "cpu")
    rows, paths = [], []
    for number in range(3):
        vectors = np.load(out / "img_emb" / f"img_emb_{number}.npy")
        metadata = pq.read_table(out / "metadata" / f"metadata_{number}.parquet")
        assert vectors.dtype == np.float16
        assert metadata.column_names == ["image_path", "key", "caption"]
        assert len(vectors) == metadata.num_rows
        rows.append(vectors)
        paths += metadata.column("image_path").to_pylist()
    assert paths == sorted(paths)
    expected = torch.cat([model.encode_image(preprocess([miniclip.open_image(path)])) for path in paths])
    difference = torch.from_numpy(np.concatenate(rows)).float() - F.normalize(expected, dim=1)
    assert difference.abs().max() < 1e-3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == str(tiny)
    assert manifest["weights_sha256"] == miniclip.loading.weights_sha256(tiny)
    assert {"preprocess", "dtype", "versions", "batch_size"} <= manifest.keys()


def test_killed_at_any_moment_it_ends_in_the_same_bytes(photos: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = ["embed", photos, "--model", tiny, "--batch-size", "4", "--shard-size", "5", "--device", "cpu", "--out"]
    assert run(*arguments, tmp_path / "whole").returncode == 0
    whole = contents(tmp_path / "whole")
    pick = random.Random(0)
    out = tmp_path / "killed"
    killed = 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, [*arguments, out])],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        started = time.monotonic()
        while not (out / ".lock").exists() and process.poll() is None and time.monotonic() - started < 120:
            time.sleep(0.01)
        time.sleep(pick.uniform(0, 1.5))
        before = complete(out)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        assert before <= complete(out)
    assert killed >= 3
    left = sum(min(5, 29 - 5 * number) for number in range(6) if str(number) not in complete(out))
    done = run(*arguments, out)
    assert done.returncode == 0
    if left:
        assert f"\n{left} of {left} pictures" in f"\n{done.stderr}"  # none of a complete shard
    assert contents(out) == whole


# The command, with writing slowed down so that a kill meets it at every point of it.
SLOW = """
import os, sys, time
from miniclip import cli
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.05)
    fsync(descriptor)
os.fsync = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def complete(out: Path) -> set[str]:
    """The shards that say they are there, each with metadata, vectors and failures for all its files."""
    done = set()
    for path in out.glob("failures/failures_*.jsonl"):
        number = path.stem.removeprefix("failures_")
        rows = pq.read_metadata(out / "metadata" / f"metadata_{number}.parquet").num_rows
        assert len(np.load(out / "img_emb" / f"img_emb_{number}.npy")) == rows
        files = pq.read_metadata(out / "listing" / f"listing_{number}.parquet").num_rows
        assert rows + len(path.read_text().splitlines()) == files
        done.add(number)
    return done


def test_only_the_shard_in_work_is_encoded_again(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    decoded: list[str] = []
    decode = embed.decode

    def counted(item: sources.Item, *arguments: object) -> embed.Decoded:
        decoded.append(item.name)
        return decode(item, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embed, "decode", counted)
    written: list[int] = []
    write = store.Store.write_shard

    def dies(self: store.Store, number: int, shard: store.Shard) -> None:
        if number == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, shard)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            miniclip.embed_images(photos, tmp_path / "out", str(tiny), **settings)  # type: ignore[arg-type]
    assert written == [0, 1, 2]
    decoded.clear()
    done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), **settings)  # type: ignore[arg-type]
    assert len(decoded) == 29 - 15
    assert done.total == 23
    decoded.clear()
    done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), **settings)  # type: ignore[arg-type]
    assert not decoded
    assert (done.embedded, done.shards, done.total) == (0, 0, 23)


def test_new_files_are_added_and_nothing_else(photos: Path, tiny: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "shard_size": 10, "device": "cpu"}
    out = tmp_path / "out"
    miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    before = contents(out)
    picture(photos / "a" / "0_new.png", 77)
    picture(photos / "a" / "00.jpg", 78)  # another picture under an old name
    done = miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert (done.embedded, done.failed, done.shards, done.total) == (2, 0, 1, 25)
    after = contents(out)
    assert {name: data for name, data in after.items() if name in before} == before
    assert set(after) - set(before) == {
        "img_emb/img_emb_3.npy",
        "metadata/metadata_3.parquet",
        "failures/failures_3.jsonl",
        "listing/listing_3.parquet",
    }


def test_what_changes_during_a_run_is_there_once(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between listing and decoding a picture is replaced, one vanishes, and a dangling link finds its picture."""
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    out = tmp_path / "out"
    plan = store.Store.plan

    def then_changes(*arguments: object) -> None:
        plan(*arguments)  # type: ignore[arg-type]
        picture(photos / "a" / "00.jpg", 78)
        (photos / "a" / "03.JPG").unlink()
        picture(photos / "nowhere.png", 79)
        (photos / "a" / "06.png").unlink()
        os.mkfifo(photos / "a" / "06.png")  # whoever opens it waits for a writer

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "plan", then_changes)
        done = miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert (done.embedded, done.failed) == (20, 9)
    failures = {Path(line["path"]).name: line["error"] for line in map(json.loads, (out / "failures.jsonl").open())}
    assert "has changed since it was listed" in failures["00.jpg"]
    assert "has changed since it was listed" in failures["dangling.png"]
    assert failures["03.JPG"] == "no such file"
    assert failures["06.png"] == "is not a regular file"
    done = miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    assert (done.embedded, done.failed, done.total) == (3, 1, 23)
    paths = miniclip.Index.open(out).paths(range(23))
    assert sorted(Path(path).name for path in paths[20:]) == ["00.jpg", "dangling.png", "nowhere.png"]
    failures = {Path(line["path"]).name: line["error"] for line in map(json.loads, (out / "failures.jsonl").open())}
    assert not {"00.jpg", "dangling.png"} & set(failures)  # which have been embedded since
    assert len(failures) == 7
    assert len(set(paths)) == 23


def test_what_could_not_be_read_is_tried_again(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk is gone in the middle of a run, and is there again later."""
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    out = tmp_path / "out"
    write = store.Store.write_shard

    def unplugged(self: store.Store, number: int, shard: store.Shard) -> None:
        write(self, number, shard)
        if number == 1:
            photos.rename(tmp_path / "away")

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "write_shard", unplugged)
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
def test_what_can_never_be_read_is_not_tried_for_ever(
    number: int, tries: int, photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, and a damaged picture that has Pillow seek before its beginning."""
    opened = Image.open

    def fails(file: object, *arguments: object) -> Image.Image:
        if str(file).endswith("00.jpg"):
            raise OSError(number, os.strerror(number))
        return opened(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", fails)
    done = [miniclip.embed_images(photos, tmp_path / "out", str(tiny), device="cpu") for _ in range(12)]
    assert [summary.shards for summary in done] == [1] * tries + [0] * (12 - tries)
    failures = [json.loads(line)["path"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == len(set(failures)) == 7


@pytest.mark.parametrize("name", ["img_emb/img_emb_00.npy", "metadata/metadata_12.parquet"])
def test_vectors_of_another_program_are_left_alone(name: str, photos: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(b"theirs")
    with pytest.raises(miniclip.ConfigError, match=r"holds vectors and no manifest\.json"):
        miniclip.embed_images(photos, tmp_path / "out", str(tiny), device="cpu")
    assert contents(tmp_path / "out") == {name: b"theirs"}


def test_a_folder_with_other_things_in_it_keeps_them(photos: Path, tiny: Path, tmp_path: Path) -> None:
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


def test_a_run_that_made_nothing_leaves_no_plan(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before its first shard, as by somebody who sees that it is the wrong folder."""
    (tmp_path / "wrong").mkdir()
    for n in range(12):
        picture(tmp_path / "wrong" / f"{n}.png", 100 + n)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            miniclip.embed_images(tmp_path / "wrong", tmp_path / "out", str(tiny), shard_size=2, device="cpu")
    assert len(list((tmp_path / "out" / "listing").iterdir())) == 6
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=10, device="cpu")
    miniclip.embed_images(photos, tmp_path / "direct", str(tiny), shard_size=10, device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


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


def test_the_number_of_workers_is_no_setting(photos: Path, tiny: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        miniclip.embed_images(photos, tmp_path / str(workers), str(tiny), batch_size=4, workers=workers, device="cpu")
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


def test_a_model_may_move_but_not_change(photos: Path, tiny: Path, tmp_path: Path) -> None:
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    shutil.copytree(tiny, here)
    miniclip.embed_images(photos, out, str(here), device="cpu")
    here.rename(there)
    assert miniclip.embed_images(photos, out, str(there), device="cpu").shards == 0
    with pytest.raises(miniclip.UnknownModelError, match="if the model of these vectors has moved, say where it is"):
        miniclip.Index.open(out).search("a cat")
    moved = miniclip.Index.open(out, there).search("a cat")
    config = json.loads((there / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(miniclip.CheckpointError, match=r"made with config\.vision\.activation 'quick_gelu'"):
        miniclip.Index.open(out, there).search("a cat")
    done = run("search", out, "a cat", "--json", "--model", tiny)
    assert [match["path"] for match in json.loads(done.stdout)] == [match.path for match in moved]


def test_fast_decoding_decodes_less(tiny: Path, tmp_path: Path) -> None:
    photo = sample_images()[0].resize((1200, 900))
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "photo.jpg", quality=90)
    vectors = []
    model, preprocess = miniclip.load(tiny, "cpu")
    for fast in (False, True):
        out = tmp_path / f"out_{fast}"
        miniclip.embed_images(tmp_path / "photos", out, str(tiny), device="cpu", fast_decode=fast)
        vectors.append(np.load(out / "img_emb" / "img_emb_0.npy")[0].astype(float))
        at_least = preprocess.size * 3 // 2 if fast else None
        image = miniclip.open_image(tmp_path / "photos" / "photo.jpg", min_side=at_least)
        expected = F.normalize(model.encode_image(preprocess([image])), dim=1)[0].numpy()
        assert np.abs(vectors[-1] - expected).max() < 6e-4
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_the_status_when_nobody_listens(photos: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"broken")
    for source, status in ((photos, 0), (tmp_path / "broken", 1)):
        out = tmp_path / f"{source.name}_out"
        command = [sys.executable, "-m", "miniclip", "embed", source, "--out", out, "--model", tiny, "--device", "cpu"]
        reading, writing = os.pipe()
        os.close(reading)  # as by head, which has had enough
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(list(map(str, command)), stdout=writing, stderr=writing, check=False, env=env)
        os.close(writing)
        assert done.returncode == status
        assert (out / "failures.jsonl").exists()


def test_other_weights_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "model"))
    out = tmp_path / "out"
    miniclip.embed_images(photos, out, str(copy), device="cpu")
    model, preprocess = miniclip.load(copy, "cpu")
    model.logit_scale.add_(1)
    miniclip.save_pretrained(model, copy, preprocess)
    with pytest.raises(miniclip.ConfigError, match="begun with weights_sha256"):
        miniclip.embed_images(photos, out, str(copy), device="cpu")
    with pytest.raises(miniclip.CheckpointError, match="were made with weights_sha256"):
        miniclip.Index.open(out).search("a cat")


def test_a_shard_without_rows_is_no_file(photos: Path, tiny: Path, tmp_path: Path) -> None:
    """Readers that walk vectors and metadata side by side would take one shard's for another's."""
    for n in range(3):
        (photos / "b" / f"0{n}_broken.jpg").write_bytes(b"broken")
    done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), shard_size=2, device="cpu")
    assert (done.embedded, done.failed, done.shards) == (23, 9, 16)
    names = {
        kind: {path.stem.split("_")[-1] for path in (tmp_path / "out" / kind).iterdir()}
        for kind in ("img_emb", "metadata", "failures")
    }
    assert names["img_emb"] == names["metadata"] < names["failures"] == set(map(str, range(16)))
    # What autofaiss and clip-retrieval index read such a folder with.
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


def test_two_runs_in_one_folder_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    with store.Store(tmp_path / "out").locked():
        done = run("embed", photos, "--model", tiny, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "another run is writing" in done.stderr
    assert run("embed", photos, "--model", tiny, "--out", tmp_path / "out").returncode == 0


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(
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
    assert complete(out) == {"0", "1"}
    assert not list(out.rglob("*.tmp"))
    miniclip.embed_images(photos, out, str(tiny), **settings)  # type: ignore[arg-type]
    miniclip.embed_images(photos, tmp_path / "whole", str(tiny), **settings)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_that_cannot_grow_is_named(photos: Path, tiny: Path, tmp_path: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from miniclip import cli\n"
    code += "sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["embed", str(photos), "--out", str(tmp_path / "out"), "--model", str(tiny), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = run(*arguments[:2], *arguments[2:3], tmp_path / "whole", *arguments[4:])
    assert whole.returncode == 0
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 1
    assert "cannot be written (File too large); what was written before is complete" in done.stderr
    assert "Traceback" not in done.stderr
    assert run(*arguments).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_every_call_behind_the_first_two_goes_the_same_way(photos: Path, tiny: Path) -> None:
    items = sources.list_items(photos)[0][:3]
    rounded = []
    for before in (0, 1, 2):  # shards that the same process has embedded
        model, preprocess = miniclip.load(tiny, "cpu")
        seen: list[torch.Tensor] = []
        encode = model.encode_image
        model.encode_image = lambda images, encode=encode, seen=seen: seen.append(encode(images)) or seen[-1]  # type: ignore
        shards = [*embed.encode_shards(model, preprocess, [items] * (before + 1), batch_size=2)]
        assert len(shards) == before + 1
        rounded.append(torch.cat(seen[-2:]))
    assert torch.equal(rounded[0], rounded[1])
    assert torch.equal(rounded[0], rounded[2])


def test_tars_that_are_not_whole(tmp_path: Path) -> None:
    """Nothing is lost in silence: either all pictures are listed, or it is said that some are not."""
    picture(tmp_path / "a.png", 1)
    data = (tmp_path / "a.png").read_bytes()

    def archive(**pax: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for n in range(4):
                info = tarfile.TarInfo(f"{n}.png")
                info.size = len(data)
                if n == 1:
                    info.pax_headers = pax
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    whole = archive()
    cut = [whole[:size] for size in range(512, len(whole), 128)]
    zeros = next(n for n in range(0, len(whole), 512) if not whole[n:].strip(b"\0"))
    headers = [n for n in range(0, zeros, 512) if whole[n : n + 1].isdigit() and b"ustar" in whole[n : n + 512]]
    assert len(headers) == 4
    damaged = [whole[:n] + b"\xff" * 300 + whole[n + 300 :] for n in headers]
    odd = [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"size": "9" * 23}]
    for content in [*cut, *damaged, *(archive(**pax) for pax in odd)]:
        (tmp_path / "cut.tar").write_bytes(content)
        items = sources.list_items(tmp_path / "cut.tar")[0]
        told = any("cannot be read to its end as a tar" in (item.error or "") for item in items)
        assert told or len(content) > zeros
        assert len(items) > told or content[:512] != whole[:512] or len(content) < 1024
    (tmp_path / "cut.tar").write_bytes(whole)
    assert [item.error for item in sources.list_items(tmp_path / "cut.tar")[0]] == [None] * 4


def test_links_in_a_tar(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    picture(folder / "a" / "one.png", 1)
    os.link(folder / "a" / "one.png", folder / "a" / "two.png")
    (folder / "three.png").symlink_to("a/one.png")
    (folder / "four.png").symlink_to("nowhere.png")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.add(folder / "a", "./a")
        tar.add(folder, ".", filter=lambda info: None if info.name.startswith("./a") else info)
    (tmp_path / "twice.txt").write_text(f"{tmp_path}/links.tar\n" * 2)
    done = miniclip.embed_images(tmp_path / "twice.txt", tmp_path / "out", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (3, 1)
    assert "four.png" in (tmp_path / "out" / "failures.jsonl").read_text()
    vectors = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    assert np.abs(vectors - vectors[0]).max() < 1e-3


def test_odd_times_and_places(tiny: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    os.utime(picture(photos / "future.png", 1), (2**34, 2**34))  # the year 2514
    deep = photos
    for n in range(1100):
        deep = deep / "d"
        if n % 100 == 0:
            os.makedirs(deep, exist_ok=True)
    os.makedirs(deep)
    try:
        picture(deep / "deep.png", 2)
        picture(tmp_path / "real" / "folder" / "x.png", 3)
        picture(tmp_path / "real" / "y.png", 4)
        picture(tmp_path / "y.png", 5)
        (tmp_path / "link").symlink_to(tmp_path / "real" / "folder")
        (photos / "list").write_text(f"{tmp_path}/link/../y.png\n")
        for _ in range(2):
            done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), device="cpu")
            assert (done.failed, done.total) == (0, 2)
        (item,) = sources.list_items(photos / "list")[0]
        assert os.path.samefile(item.path, tmp_path / "real" / "y.png")
    finally:
        subprocess.run(["rm", "-r", photos / "d"], check=True)  # what Python cannot, pytest neither


def test_a_shard_that_loses_all_its_pictures_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for n in range(4):
        picture(photos / f"{n}.png", n)
    miniclip.embed_images(photos, out, str(tiny), shard_size=2, device="cpu")
    (out / "failures" / "failures_1.jsonl").unlink()  # as if killed before it was written
    for n in (2, 3):
        (photos / f"{n}.png").rename(tmp_path / f"{n}.png")
    done = miniclip.embed_images(photos, out, str(tiny), shard_size=2, device="cpu")
    assert (done.failed, done.total) == (2, 2)
    assert [path.name for path in (out / "img_emb").iterdir()] == ["img_emb_0.npy"]
    assert [path.name for path in (out / "metadata").iterdir()] == ["metadata_0.parquet"]


def test_a_missing_file_of_vectors_is_noticed(photos: Path, tiny: Path, tmp_path: Path) -> None:
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


def test_sources(photos: Path, tiny: Path, tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    with tarfile.open(tar, "w") as archive:
        for n in range(4):
            data = {
                f"{n:05}.jpg": (photos / "a" / "00.jpg").read_bytes() if n != 2 else b"broken",
                f"{n:05}.txt": f"caption {n}".encode(),
                f"{n:05}.json": b"{}",
            }
            for name, content in data.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    done = miniclip.embed_images(tar, tmp_path / "from_tar", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (3, 1)
    table = pq.read_table(tmp_path / "from_tar" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["key"] == ["00000", "00001", "00003"]
    assert table["caption"] == ["caption 0", "caption 1", "caption 3"]
    assert table["image_path"][0] == f"{tar}/00000.jpg"
    same = np.load(tmp_path / "from_tar" / "img_emb" / "img_emb_0.npy")

    # As a Windows editor saves it, with a path twice, a tar among the pictures, and a name that ends in a space.
    spaced = picture(tmp_path / "spaced.png", 5).rename(tmp_path / "spaced.png ")
    lines = ["", f"{photos}/a/00.jpg", "  ", f"{photos}/a/00.jpg", f"{photos}/missing.jpg", str(tar), str(spaced)]
    (tmp_path / "list.txt").write_bytes("\r\n".join(["\ufeff" + lines[1], *lines]).encode())
    done = miniclip.embed_images(tmp_path / "list.txt", tmp_path / "from_list", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (5, 2)
    table = pq.read_table(tmp_path / "from_list" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["caption"] == ["caption 0", "caption 1", "caption 3", None, None]
    assert table["image_path"][3:] == [f"{photos}/a/00.jpg", str(spaced)]
    vectors = np.load(tmp_path / "from_list" / "img_emb" / "img_emb_0.npy")
    assert np.abs(vectors[[0, 1, 2, 3]].astype(float) - same[[0, 1, 2, 0]]).max() < 1e-3

    tar.write_bytes(tar.read_bytes()[:2500])
    done = miniclip.embed_images(tar, tmp_path / "from_cut", str(tiny), device="cpu")
    assert done.failed >= 1
    with pytest.raises(miniclip.InputError, match=r"^\S+01\.png is neither a folder, nor a \.tar, nor a text file"):
        miniclip.embed_images(photos / "b" / "01.png", tmp_path / "never", str(tiny))
    for source in (tmp_path / "nowhere", tmp_path / "out_of_nothing"):
        (tmp_path / "out_of_nothing").mkdir(exist_ok=True)
        with pytest.raises(miniclip.InputError):
            miniclip.embed_images(source, tmp_path / "never", str(tiny))
    assert not (tmp_path / "never").exists()


def test_names_that_are_no_text(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    picture(folder / "ok.png", 1)
    os.rename(folder / "ok.png", os.fsencode(folder) + b"/caf\xe9 \xff.png")
    picture(folder / "naïve \n 猫.png", 2)
    done = miniclip.embed_images(folder, tmp_path / "out", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (2, 0)
    paths = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").column("image_path").to_pylist()
    assert paths == [f"{folder}/caf\\xe9 \\xff.png", f"{folder}/naïve \n 猫.png"]
    done = miniclip.embed_images(folder, tmp_path / "out", str(tiny), device="cpu")
    assert done.shards == 0

    with tarfile.open(tmp_path / "latin.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name in ("caf\xe9.png", "caf\xe9.txt"):
            archive.add(folder / "naïve \n 猫.png", name)
    for embedded in (1, 0):  # known again
        done = miniclip.embed_images(tmp_path / "latin.tar", tmp_path / "from_tar", str(tiny), device="cpu")
        assert done.embedded == embedded
    table = pq.read_table(tmp_path / "from_tar" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["key"] == ["caf\\xe9"]
    assert table["caption"][0]


def test_nothing_but_failures_is_a_failure(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "no.jpg").write_text("no")
    arguments = ["embed", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--model", str(tiny), "--quiet"]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert cli.main(arguments) == 1  # nothing is left to do, and still there is nothing
    picture(tmp_path / "photos" / "yes.jpg", 1)
    assert cli.main(arguments) == 0
    assert captured.out == ""
    assert "1 file could not be embedded" in captured.err


def test_a_run_of_weights_that_overflow_names_the_pictures(photos: Path, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "model"))
    model, preprocess = miniclip.load(copy, "cpu")
    model.visual.proj[0, 0] = torch.nan
    miniclip.save_pretrained(model, copy, preprocess)
    done = miniclip.embed_images(photos, tmp_path / "out", str(copy), device="cpu")
    assert done.embedded == 0
    assert "its vector is not finite" in (tmp_path / "out" / "failures.jsonl").read_text()


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(photos: Path, tiny: Path, tmp_path: Path) -> Path:
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), batch_size=4, shard_size=7, device="cpu")
    return tmp_path / "out"


def test_search_is_exact(out: Path, photos: Path, tiny: Path) -> None:
    index = miniclip.Index.open(out)
    assert (len(index), index.dimension) == (23, 48)
    vectors = np.concatenate([np.load(out / "img_emb" / f"img_emb_{n}.npy") for n in range(4)]).astype(np.float64)
    paths = [
        path
        for n in range(4)
        for path in pq.read_table(out / "metadata" / f"metadata_{n}.parquet").column("image_path").to_pylist()
    ]
    model, preprocess = miniclip.load(tiny, "cpu", dtype=torch.float64)
    photo = miniclip.open_image(photos / "a" / "03.JPG")
    text = F.normalize(model.encode_text(miniclip.tokenize("a dog in the snow"))[0], dim=0)
    image = F.normalize(model.encode_image(preprocess([photo]))[0], dim=0)
    for given, query in (
        ({"text": "a dog in the snow"}, text),
        ({"image": photo}, image),
        ({"text": "a dog in the snow", "image": photo}, F.normalize(text + image, dim=0)),
    ):
        scores = vectors @ query.numpy()
        for k in (1, 5, 23, 100):
            found = index.search(**given, k=k)  # type: ignore[arg-type]
            best = np.argsort(-scores, kind="stable")[:k]
            assert [match.path for match in found] == [paths[row] for row in best]
            assert np.abs(np.array([match.score for match in found]) - scores[best]).max() < 1e-5
    assert index.search(image=photo, k=1)[0].path == str(photos / "a" / "03.JPG")


def test_search_says_what_it_cannot(out: Path, tmp_path: Path) -> None:
    index = miniclip.Index.open(out)
    with pytest.raises(miniclip.InputError, match="what to search for"):
        index.search()
    with pytest.raises(miniclip.InputError, match="k must be at least 1, got 0"):
        index.search("cat", k=0)
    for wrong in ({"k": 2.0}, {"text": ["a cat", "a dog"]}, {"image": "photo.png"}):
        with pytest.raises(TypeError):
            index.search(**{"text": "cat", **wrong})  # type: ignore[arg-type]
    with pytest.raises(miniclip.TextTooLongError):
        index.search("cat " * 100)
    for number in (torch.nan, torch.inf, 1e38):
        with pytest.raises(miniclip.InputError, match="must be a unit vector, and its length is"):
            index.nearest(torch.full((48,), number))
    with pytest.raises(miniclip.InputError, match="rows 0 to 22, not -1"):
        index.paths([-1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text((out / "manifest.json").read_text())
    with pytest.raises(miniclip.ConfigError, match="holds no vectors"):
        miniclip.Index.open(tmp_path / "empty")
    with pytest.raises(miniclip.InputError, match="vector of 48"):
        index.nearest(torch.zeros(5))
    with pytest.raises(miniclip.ConfigError, match=r"has no manifest\.json"):
        miniclip.Index.open(tmp_path)
    (out / "img_emb" / "img_emb_1.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(miniclip.ConfigError, match=r"img_emb_1\.npy is damaged"):
        miniclip.Index.open(out)


def test_a_damaged_shard_is_made_again_as_the_error_says(out: Path, photos: Path, tiny: Path) -> None:
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


def test_the_two_commands(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("embed", photos, "--out", out, "--model", "demo", "--fast-decode")
    assert done.returncode == 0, done.stderr
    assert "23 pictures embedded" in done.stdout
    assert "6 files could not be embedded" in done.stderr
    assert "29 of 29 pictures, 6 failed" in done.stderr
    done = run("search", out, "a red square", "-k", "3", "--json")
    assert done.returncode == 0, done.stderr
    matches = json.loads(done.stdout)
    assert [list(match) for match in matches] == [["path", "score"]] * 3
    assert matches == sorted(matches, key=lambda match: -match["score"])
    done = run("search", out, "--image", photos / "b" / "01.png", "-k", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[0] == str(photos / "b" / "01.png")


def test_a_terminal_sees_a_bar_and_ranks(photos: Path, tiny: Path, tmp_path: Path) -> None:
    import pty
    import termios

    def shown(*arguments: object) -> str:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 200))
        command = [sys.executable, "-m", "miniclip", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        parts = []
        with contextlib.suppress(OSError):  # how the end of a terminal looks on Linux
            while part := os.read(ours, 65536):
                parts.append(part)
        os.close(ours)
        assert process.wait() == 0
        return b"".join(parts).decode()

    out = tmp_path / "out"
    bar = shown("embed", photos, "--out", out, "--model", tiny, "--device", "cpu")
    assert "100%" in bar
    assert "29/29" in bar
    assert " pictures/s" in bar
    assert "6 failed" in bar
    ranks = shown("search", out, "a dog", "-k", "3").splitlines()
    assert [line.split()[0] for line in ranks] == ["1", "2", "3"]
    assert all(line.split()[2].startswith(str(photos)) for line in ranks)


def test_equal_scores_keep_the_order_of_the_list(tiny: Path, tmp_path: Path) -> None:
    for n in range(40):
        picture(tmp_path / "photos" / f"{n:02}.png", n % 4)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "out", str(tiny), batch_size=4, shard_size=12, device="cpu")
    index = miniclip.Index.open(tmp_path / "out")
    found = index.search(image=miniclip.open_image(tmp_path / "photos" / "02.png"), k=7)
    assert [Path(match.path).stem for match in found] == [f"{n:02}" for n in range(2, 30, 4)]


def made_of(vectors: torch.Tensor, folder: Path, tiny: Path, shard_size: int) -> miniclip.Index:
    """An index of these vectors (N, 48), whose pictures are called by their numbers."""
    made = store.Store(folder)
    model, preprocess = miniclip.load(tiny, "cpu")
    made.begin(embed.settings_of(tiny, model, preprocess, batch_size=1, shard_size=shard_size, fast_decode=False))
    made.plan([sources.Item(f"{n:06}", 0, 0) for n in range(len(vectors))], shard_size)
    for number, part in enumerate(vectors.split(shard_size)):
        made.write_shard(number, store.Shard(part.numpy(), [*range(len(part))], {}))
    return miniclip.Index.open(folder)


@pytest.mark.parametrize("rows", [23, 4097, 9999])
def test_equal_vectors_score_the_same_wherever_they_lie(rows: int, tiny: Path, tmp_path: Path) -> None:
    randoms = torch.Generator().manual_seed(0)
    vector = F.normalize(torch.randn(1, 48, generator=randoms), dim=1).half()
    index = made_of(vector.repeat(rows, 1), tmp_path, tiny, 5000)
    found = index.nearest(F.normalize(torch.randn(48, generator=randoms), dim=0), k=15)
    assert [int(match.path) for match in found] == list(range(15))
    assert len({match.score for match in found}) == 1


def test_many_shards_take_no_open_files(tiny: Path, tmp_path: Path) -> None:
    randoms = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(300, 48, generator=randoms), dim=1).half()
    made_of(vectors, tmp_path, tiny, 2)
    code = "import os, resource, sys, torch, miniclip, pyarrow.parquet\n"
    code += "few = len(os.listdir('/proc/self/fd')) + 12; resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))\n"
    code += "index = miniclip.Index.open(sys.argv[1])\n"
    code += "print(len(index), index.nearest(torch.from_numpy(next(index.vectors())[0]), 1)[0].path)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.stdout == "300 000000\n", done.stderr


def test_groups_are_what_hangs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scipy, in several blocks, from no pair to all of them."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    import near_duplicates

    monkeypatch.setattr(near_duplicates, "ROWS", 50)
    randoms = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(170, 6, generator=randoms), dim=1).half()
    for at_least in (0.999, 0.95, 0.9, 0.8, -1):
        pieces = near_duplicates.blocks([vectors[:120].numpy(), vectors[120:].numpy()])
        found = near_duplicates.groups(170, near_duplicates.near_pairs(pieces, at_least))
        near = coo_matrix((vectors.float() @ vectors.float().T >= at_least).numpy())
        _, labels = connected_components(near, directed=False)
        expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
        assert sorted(found) == sorted(group for group in expected if len(group) > 1)
    for name in ("near_duplicates", "common"):
        sys.modules.pop(name)


def test_near_duplicates_are_grouped(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for n in range(6):
        picture(folder / f"{n}.png", n, (200, 150))
    with Image.open(folder / "4.png") as opened:
        opened.resize((100, 75)).save(folder / "4_small.png")
        opened.save(folder / "4_again.jpg", quality=95)
    (folder / "1_copy.png").write_bytes((folder / "1.png").read_bytes())
    miniclip.embed_images(folder, tmp_path / "out", str(tiny), shard_size=4, device="cpu")
    command = [sys.executable, str(ROOT / "examples" / "near_duplicates.py"), str(tmp_path / "out"), "--at-least"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "0.99"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    expected = ["group 1", *(f"  {folder}/{name}" for name in ("4.png", "4_again.jpg", "4_small.png"))]
    expected += ["group 2", *(f"  {folder}/{name}" for name in ("1.png", "1_copy.png"))]
    assert done.stdout.splitlines() == [*expected, "9 pictures, 2 groups: 3 could go"]
    done = subprocess.run([*command, "2"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "a cosine is from -1 to 1, not 2.0" in done.stderr
