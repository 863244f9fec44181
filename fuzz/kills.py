"""Kill miniclip embed and miniclip prune at random moments, and check that nothing is lost and nothing differs.

    python fuzz/kills.py
    python fuzz/kills.py --kills 500 --seed 7

A thousand mixed files are made: images in several formats, tars, damaged files, links, and what other programs leave
beside photos. They are embedded with the demo model once without interruption, and once by a command that is killed
(SIGKILL) again and again. Both folders must hold the same bytes. Then a part of the files is deleted, changed, touched,
moved and left out. The same is done with prune. After every kill a search must find exactly the images that it should.

Each write to the disk is slowed down, so that a kill may hit any moment of it. Ends with status 1 at the first
difference, and leaves the folder for a look.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import miniclip

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from embedding import contents  # noqa: E402
from helpers import make_image  # noqa: E402

SLOW = """
import os, sys, time
from miniclip import cli
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.02)
    fsync(descriptor)
os.fsync = slow
print("started", flush=True)
sys.exit(cli.main(sys.argv[1:]))
"""
SUFFIXES = ("jpg", "png", "webp", "gif", "bmp", "tif", "JPG", "ppm", "avif")


def make_library(folder: Path, count: int, pick: random.Random) -> None:
    """``count`` files, most of which are images."""
    for n in range(count):
        place = folder / f"{pick.randrange(2010, 2026)}" / pick.choice("abcdef")
        place.mkdir(parents=True, exist_ok=True)
        kind = pick.random()
        if kind < 0.8:
            make_image(place / f"{n}.{pick.choice(SUFFIXES)}", n, (pick.randrange(10, 120), pick.randrange(10, 120)))
        elif kind < 0.84:
            make_tar(place / f"{n}.tar", n, pick.randrange(0, 6))
        elif kind < 0.88:
            make_damaged(place / f"{n}.{pick.choice(SUFFIXES)}", n, pick)
        elif kind < 0.92:
            (place / f"{n}.jpg").symlink_to(pick.choice(["nowhere.png", "../link.png", str(folder)]))
        else:
            name = pick.choice(
                ["._{}.jpg", ".hidden/{}.png", "@eaDir/{}.jpg", "{}.mov", "{}.txt", "{}", "thumbs/{}.png"]
            )
            (place / name.format(n)).parent.mkdir(exist_ok=True)
            (place / name.format(n)).write_text("not for an index")


def make_tar(path: Path, seed: int, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for n in range(count):
            data = io.BytesIO()
            make_image(None, seed * 10 + n).save(data, "PNG")
            member = tarfile.TarInfo(f"{n:04}.png")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))


def make_damaged(path: Path, seed: int, pick: random.Random) -> None:
    make_image(path, seed, (100, 80))
    data = bytearray(path.read_bytes())
    if pick.random() < 0.5:
        del data[pick.randrange(len(data)) :]
    else:
        for _ in range(20):
            data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    path.write_bytes(data)


def disturb(folder: Path, pick: random.Random) -> None:
    """Delete, change, touch and move a part of the files."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        chance = pick.random()
        if chance < 0.1:
            path.unlink()
        elif chance < 0.2 and path.suffix == ".png":
            make_image(path, pick.randrange(10**6, 10**7))
        elif chance < 0.3:
            os.utime(path, (10**9, 10**9))
        elif chance < 0.4:
            path.rename(path.with_name(f"moved_{path.name}"))


def found(out: Path) -> list[str] | None:
    """The paths that a search finds, or None if there are no vectors yet."""
    try:
        index = miniclip.Index.open(out)
    except miniclip.ConfigError:
        return None
    return sorted(match.path for match in index.nearest(torch.eye(index.dimension)[0], k=len(index)))


def killed_again_and_again(
    arguments: list[str], kills: int, pick: random.Random, check: Callable[[], None], expected_seconds: float
) -> int:
    """Run a command, kill it, check; until it was killed ``kills`` times or ended by itself. Returns the kills."""
    done = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    while done < kills:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        process.stdout.readline()  # the imports are over
        time.sleep(pick.uniform(0, expected_seconds))
        process.kill()
        process.communicate()
        check()
        if process.returncode in (0, 1):
            break  # it had ended already
        done += 1
        print(f"\r{arguments[0]}: {done} kills", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done


def command(*arguments: str) -> float:
    """Run a command to its end. Returns its seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SLOW, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"{arguments[0]} ended with status {done.returncode}: {done.stderr.decode()}")
    return time.monotonic() - started


def compare(first: Path, second: Path) -> None:
    one, other = contents(first), contents(second)
    if different := sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)):
        raise SystemExit(f"{first} and {second} differ in {len(different)} files, such as {different[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="default: 1000")
    parser.add_argument("--kills", type=int, default=50, help="of each command (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    pick = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="miniclip-kills-"))
    photos, whole, killed = folder / "photos", folder / "whole", folder / "killed"
    make_library(photos, options.files, pick)
    settings = ["--model", "demo", "--device", "cpu", "--batch-size", "8", "--shard-size", "20"]
    embed = ["embed", str(photos), *settings, "--out"]
    prune = ["prune", "--left-out"]

    def run(arguments: list[str], check: Callable[[], None]) -> int:
        """The same command on both folders: whole, and killed."""
        seconds = command(*arguments, str(whole))
        count = killed_again_and_again(
            [*arguments, str(killed)], options.kills, pick, check, 2 * seconds / options.kills
        )
        command(*arguments, str(killed))
        compare(whole, killed)
        return count

    complete: set[str] = set()

    def check_embed() -> None:
        now = set(found(killed) or ())
        if not complete <= now:
            raise SystemExit(f"after a kill {killed} lacks {len(complete - now)} images, such as {min(complete - now)}")
        complete.update(now)

    def check_again() -> None:
        paths = found(killed) or []
        if len(paths) != len(set(paths)):
            raise SystemExit(f"after a kill, a search in {killed} finds an image twice")

    counts = {"embed": run(embed, check_embed)}
    disturb(photos, pick)
    narrower = [*embed[:-1], "--exclude", "2020/", "--out"]
    complete.clear()  # what is gone is hidden from now on
    counts["embed again"] = run(narrower, check_again)
    expected = found(whole)

    def check_prune() -> None:
        if found(killed) != expected:
            raise SystemExit(f"after a kill of prune, a search in {killed} finds other images than before")

    counts["prune"] = run(prune, check_prune)
    if found(whole) != expected:
        raise SystemExit(f"a search in {whole} finds other images than before prune")
    print(f"{options.files} files, {len(expected or ())} images found; kills: {counts}; the same bytes each time")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
