"""examples/embed_ray.py on a local Ray: the same bytes as ``miniclip embed``, also if an actor is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from embedding import contents
from helpers import ROOT, make_image, run_cli
from PIL import Image


def started(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    # One thread each, like the command that they are compared with: the number of threads changes the rounding.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "embed_ray.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**env, **environment})


def workers(mark: str) -> list[int]:
    """The process ids of the actors that have this mark in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if not process.name.isdecimal() or b"ray::MapWorker" not in (process / "cmdline").read_bytes():
                continue
            if f"MINICLIP_TEST={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # the process has ended
            continue
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for n in range(60):
        make_image(folder / f"{n:02}.png", n)
    (folder / "07.png").write_bytes(b"broken")
    return folder


@pytest.mark.slow
def test_a_killed_actor_leaves_the_same_bytes_as_miniclip_embed(photos: Path, tiny: Path, tmp_path: Path) -> None:
    common = [photos, "--model", tiny, "--batch-size", 4, "--shard-size", 2]
    environment = {"OMP_NUM_THREADS": "1"}
    assert run_cli("embed", *common, "--device", "cpu", "--out", tmp_path / "alone", **environment).returncode == 0
    mark = str(tmp_path)
    process = started(*common, "--out", tmp_path / "cluster", "--actors", 2, MINICLIP_TEST=mark)
    assert process.stdout is not None
    output = process.stdout.readline()
    killed = workers(mark)[:1]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    rest, errors = process.communicate(timeout=300)
    output += rest
    assert process.returncode == 0, errors
    assert killed
    shards = re.findall(r"shard (\d+): \d images", output)  # not from the start of the line: Ray may have printed there
    assert sorted(map(int, shards)) == list(range(30))
    assert output.endswith("59 images in all\n")
    assert contents(tmp_path / "cluster") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_errors_are_one_sentence(tiny: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    assert run_cli("embed", tmp_path, "--model", tiny, "--device", "cpu", "--out", tmp_path / "out").returncode == 0
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "more" / "photo.png")
    shutil.move(tmp_path / "out" / "img_emb", tmp_path / "vectors")
    (tmp_path / "out" / "img_emb").write_bytes(b"a file, where a worker needs a folder")
    for arguments, said in (
        ([tmp_path / "nowhere"], "nowhere cannot be read (No such file or directory)"),
        ([tmp_path, "--batch-size", 3], "was created with batch_size 32, not 3"),
        ([tmp_path, "--actors", 0], "--actors must be at least 1"),
        ([tmp_path / "more", "--gpus", 0.5, "--dtype", "float32"], "--gpus 0.5: this machine has fewer"),
        ([tmp_path / "more"], "img_emb_1.npy cannot be written (File exists); the shards written before are complete"),
    ):
        process = started(*arguments, "--model", tiny, "--out", tmp_path / "out")
        _, errors = process.communicate(timeout=300)
        assert process.returncode != 0
        assert said in errors
        assert "Traceback" not in errors
