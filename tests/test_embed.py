"""Runs of embed_images: right vectors, and the same bytes however often a run was killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from embedding import BROKEN, complete_shards, contents, make_photos
from helpers import ROOT, make_image, run_cli

import miniclip
from miniclip import embed, sources
from miniclip.shard_files import Failure, Shard, ShardFiles


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def test_good_images_are_embedded_and_bad_files_are_listed(photos: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = miniclip.embed_images(photos, out, str(tiny), batch_size=4, shard_size=10, device="cpu")
    assert (done.embedded, done.failed, done.shards, done.total) == (23, 6, 3, 23)
    assert done.skipped == {".txt": 1}  # the notes
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {os.path.relpath(failure["path"], photos) for failure in failures} == BROKEN
    assert all(failure["error"] for failure in failures)

    model, preprocess = miniclip.load(tiny, "cpu")
    rows, paths = [], []
    for number in range(3):
        vectors = np.load(out / "img_emb" / f"img_emb_{number}.npy")
        metadata = pq.read_table(out / "metadata" / f"metadata_{number}.parquet")
        assert vectors.dtype == np.float16
        assert metadata.column_names == ["image_path", "key", "caption", "checksum"]
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


@pytest.mark.slow
def test_a_killed_and_resumed_run_leaves_the_same_bytes(photos: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = ["embed", photos, "--model", tiny, "--batch-size", "4", "--shard-size", "5", "--device", "cpu", "--out"]
    assert run_cli(*arguments, tmp_path / "whole").returncode == 0
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
        before = complete_shards(out)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        assert before <= complete_shards(out)
    assert killed >= 3
    left = sum(min(5, 29 - 5 * number) for number in range(6) if str(number) not in complete_shards(out))
    done = run_cli(*arguments, out)
    assert done.returncode == 0
    if left:
        assert f"\n{left} of {left} images" in f"\n{done.stderr}"  # nothing of a complete shard
    assert contents(out) == whole


# The command with slow writes, so that a kill may hit every moment of a write.
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


def test_a_resumed_run_repeats_only_the_interrupted_shard(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    decoded: list[str] = []
    decode = embed.decode

    def counted(source: sources.ImageSource, *arguments: object) -> embed.Decoded:
        decoded.append(source.name)
        return decode(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embed, "decode", counted)
    written: list[int] = []
    write = ShardFiles.write

    def interrupted(files: ShardFiles, shard: Shard) -> None:
        if files.number == 3:
            raise KeyboardInterrupt
        written.append(files.number)
        write(files, shard)

    with monkeypatch.context() as patched:
        patched.setattr(ShardFiles, "write", interrupted)
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


def test_a_file_that_changes_during_a_run_is_embedded_once(
    photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between listing and decoding, an image is replaced, another is removed, and a dangling link gets its target."""
    settings = {"batch_size": 4, "shard_size": 5, "device": "cpu"}
    out = tmp_path / "out"
    plan = embed.plan

    def then_changes(*arguments: object) -> None:
        plan(*arguments)  # type: ignore[arg-type]
        make_image(photos / "a" / "00.jpg", 78)
        (photos / "a" / "03.JPG").unlink()
        make_image(photos / "nowhere.png", 79)
        (photos / "a" / "06.png").unlink()
        os.mkfifo(photos / "a" / "06.png")  # opening it would wait for a writer

    with monkeypatch.context() as patched:
        patched.setattr(embed, "plan", then_changes)
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
    assert not {"00.jpg", "dangling.png"} & set(failures)  # both are embedded now
    assert len(failures) == 6  # 03.JPG is gone
    assert len(set(paths)) == 23


def test_a_file_of_the_same_size_and_another_time_has_changed(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    listed = sources.stat_image(str(tmp_path / "a.png"))
    assert not isinstance(embed.decode(listed, miniclip.Preprocess(), None), Failure)
    os.utime(tmp_path / "a.png", ns=(0, listed.mtime_ns + 1))
    changed = embed.decode(listed, miniclip.Preprocess(), None)
    assert isinstance(changed, Failure)
    assert "has changed since it was listed" in changed.error
    assert changed.retry  # the old file may be put back
    (tmp_path / "a.png").unlink()
    gone = embed.decode(listed, miniclip.Preprocess(), None)
    assert gone == Failure("no such file", retry=True)


def test_the_number_of_workers_does_not_change_the_bytes(photos: Path, tiny: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        miniclip.embed_images(photos, tmp_path / str(workers), str(tiny), batch_size=4, workers=workers, device="cpu")
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


def test_fast_decoding_uses_a_smaller_image(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    make_image(size=(1200, 900)).save(tmp_path / "photos" / "photo.jpg", quality=90)
    vectors = []
    model, preprocess = miniclip.load(tiny, "cpu")
    for fast in (False, True):
        out = tmp_path / f"out_{fast}"
        miniclip.embed_images(tmp_path / "photos", out, str(tiny), device="cpu", fast_decode=fast)
        vectors.append(np.load(out / "img_emb" / "img_emb_0.npy")[0].astype(float))
        min_side = preprocess.size * 3 // 2 if fast else None
        image = miniclip.open_image(tmp_path / "photos" / "photo.jpg", min_side=min_side)
        expected = F.normalize(model.encode_image(preprocess([image])), dim=1)[0].numpy()
        assert np.abs(vectors[-1] - expected).max() < 6e-4
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_the_first_shard_gets_the_same_vectors_as_later_ones(photos: Path, tiny: Path) -> None:
    listing = sources.list_images([photos]).images[:3]
    rounded = []
    for before in (0, 1, 2):  # shards that the process has embedded so far
        model, preprocess = miniclip.load(tiny, "cpu")
        seen: list[torch.Tensor] = []
        encode = model.encode_image
        model.encode_image = lambda images, encode=encode, seen=seen: seen.append(encode(images)) or seen[-1]  # type: ignore
        shards = [*embed.encode_shards(model, preprocess, [listing] * (before + 1), batch_size=2)]
        assert len(shards) == before + 1
        rounded.append(torch.cat(seen[-2:]))
    assert torch.equal(rounded[0], rounded[1])
    assert torch.equal(rounded[0], rounded[2])


def test_an_image_whose_vector_is_not_finite_fails(photos: Path, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "model"))
    model, preprocess = miniclip.load(copy, "cpu")
    model.visual.proj[0, 0] = torch.nan
    miniclip.save_pretrained(model, copy, preprocess)
    done = miniclip.embed_images(photos, tmp_path / "out", str(copy), device="cpu")
    assert done.embedded == 0
    assert "its vector is not finite" in (tmp_path / "out" / "failures.jsonl").read_text()
