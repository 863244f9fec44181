"""examples/embed_ray.py on a Ray of this machine's own: the command's own bytes, also when a worker is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image
from test_embed import contents, picture, run


def started(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    # One thread each, as the command that they are compared with: sums of other lengths round differently.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "embed_ray.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**env, **environment})


def workers(mark: str) -> list[int]:
    """The actors that run below the process with this mark in its environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if not process.name.isdecimal() or b"ray::MapWorker" not in (process / "cmdline").read_bytes():
                continue
            if f"MINICLIP_TEST={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for n in range(60):
        picture(folder / f"{n:02}.png", n)
    (folder / "07.png").write_bytes(b"broken")
    return folder


def test_the_same_bytes_as_the_command_though_a_worker_is_killed(photos: Path, tiny: Path, tmp_path: Path) -> None:
    common = [photos, "--model", tiny, "--batch-size", 4, "--shard-size", 2]
    environment = {"OMP_NUM_THREADS": "1"}
    assert run("embed", *common, "--device", "cpu", "--out", tmp_path / "alone", **environment).returncode == 0
    mark = str(tmp_path)
    process = started(*common, "--out", tmp_path / "cluster", "--actors", 2, MINICLIP_TEST=mark)
    assert process.stdout is not None
    said = process.stdout.readline()
    killed = workers(mark)[:1]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    rest, errors = process.communicate(timeout=300)
    said += rest
    assert process.returncode == 0, errors
    assert killed
    shards = re.findall(r"shard (\d+): \d pictures", said)  # in a line that Ray may have begun
    assert sorted(map(int, shards)) == list(range(30))
    assert said.endswith("59 pictures in all\n")
    assert contents(tmp_path / "cluster") == contents(tmp_path / "alone")


def test_what_is_wrong_is_a_sentence(tiny: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    assert run("embed", tmp_path, "--model", tiny, "--device", "cpu", "--out", tmp_path / "out").returncode == 0
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "more" / "photo.png")
    shutil.move(tmp_path / "out" / "img_emb", tmp_path / "vectors")
    (tmp_path / "out" / "img_emb").write_bytes(b"a file, where a worker needs a folder")
    for arguments, said in (
        ([tmp_path / "nowhere"], "nowhere: cannot be read (No such file or directory)"),
        ([tmp_path, "--batch-size", 3], "was begun with batch_size 32, not 3"),
        ([tmp_path, "--actors", 0], "--actors must be at least 1"),
        ([tmp_path / "more", "--gpus", 0.5, "--dtype", "float32"], "--gpus 0.5: this machine has fewer"),
        ([tmp_path / "more"], "img_emb_1.npy cannot be written (File exists); what was written before is complete"),
    ):
        process = started(*arguments, "--model", tiny, "--out", tmp_path / "out")
        _, errors = process.communicate(timeout=100)
        assert process.returncode != 0
        assert said in errors
        assert "Traceback" not in errors
