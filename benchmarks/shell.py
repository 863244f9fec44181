"""From the shell to the answer: ``miniclip search`` beside rclip, with a warm and with a cold cache of files.

    python -m venv rclip && rclip/bin/pip install rclip
    python benchmarks/shell.py --rclip rclip/bin/rclip
    python benchmarks/shell.py                          miniclip alone

Both search one folder for a text and print ten paths. Neither looks for new images. rclip's program runs with ONNX
files of seeded weights in the place of those that it downloads, in the same architecture. Its own may be stored in
another precision. This program imports no torch: the system cannot drop the files of a library that some process uses.
For a cold cache, every file of both programs is dropped before each turn, those of Python included.

The commands take turns, in a seeded order. The figures are medians. They go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

from machine import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = "a dog in the snow"


def commands(place: Path, rclip: str | None) -> dict[str, Callable[[], str]]:
    """What takes turns: each returns what it printed."""

    def run(*command: str, **environment: str) -> str:
        variables = {**os.environ, "PYTHONPATH": "", **environment}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=place / "images")
        if done.returncode:
            raise SystemExit(f"shell.py: {command[0]} ended with status {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    found: dict[str, Callable[[], str]] = {
        "miniclip": lambda: run(
            sys.executable, "-m", "miniclip", "search", str(place / "vectors"), TEXT, PYTHONPATH=str(ROOT)
        )
    }
    if rclip:
        program, data = os.path.abspath(rclip), str(place / "rclip")
        run(program, "a cat", RCLIP_DATADIR=data)  # makes its index of the images
        found["rclip"] = lambda: run(program, "--no-indexing", "--filepath-only", TEXT, RCLIP_DATADIR=data)
    return found


def take_turns(contenders: dict[str, Callable[[], str]], rounds: int, before: Callable[[], None]) -> dict[str, float]:
    """The median seconds of each. ``before`` runs before each turn and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            before()
            start = time.perf_counter()
            printed = contenders[name]()
            times[name].append(time.perf_counter() - start)
            if len(printed.splitlines()) != 10:
                raise SystemExit(f"shell.py: {name} printed {len(printed.splitlines())} lines, expected 10")
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def drop(folders: Iterable[Path]) -> None:
    """Let the system forget the contents of all files in the folders."""
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rclip", metavar="PROGRAM", help="rclip's command, from a virtual environment of its own")
    parser.add_argument("--images", type=int, default=1000, help="in the folder that is searched (default: 1000)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each command (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        inputs = [ROOT / "benchmarks" / "children" / "shell_inputs.py", place, options.images]
        subprocess.run([sys.executable, *map(str, inputs), "rclip" if options.rclip else ""], check=True)
        contenders = commands(place, options.rclip)
        folders = [place, ROOT / "miniclip", Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("platlib"))]
        if options.rclip:
            folders.append(Path(options.rclip).absolute().parents[1])
        warm = take_turns(contenders, options.rounds, lambda: None)
        cold = take_turns(contenders, options.rounds, lambda: drop(folders))
    here = processor()
    result = {
        "date": str(date.today()),
        "processor": here.title,
        "cores": os.cpu_count(),
        "images": options.images,
        "rounds": options.rounds,
        "versions": {name: version(name) for name in ("torch", "pyarrow")} | {"python": sys.version.split()[0]},
        "seconds": {"warm": warm, "cold": cold},
    }
    if options.rclip:
        python = str(Path(options.rclip).absolute().with_name("python"))
        code = "from importlib.metadata import version as v; print(v('rclip'), v('onnxruntime'))"
        names = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        result["versions"] |= dict(zip(("rclip", "onnxruntime"), names))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"shell-{here.slug}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| from the shell to the answer | " + " | ".join(warm) + " |\n|---|" + "---|" * len(warm))
    for name, seconds in (("warm cache", warm), ("cold cache", cold)):
        print(f"| {name} | " + " | ".join(f"{value:.2f} s" for value in seconds.values()) + " |")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
