"""The working tree beside another commit, in one run.

    python benchmarks/against.py 95e9c76

Each of the two runs in a process of its own and answers over a pipe, so only one computes at a time. They take turns,
in another order every round. Every turn starts with a call that does not count: the other process has emptied the
caches. Prints medians, their ratio (above 1: the working tree is faster), and the middle half of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from inputs import ROOT, checkpoint, class_names
from machine import processor

import miniclip

IMAGES = (("ViT-B/32", (1, 16)), ("ViT-B/16", (8,)))
PROMPTS = (64, 256)
TURN = 0.15  # seconds of calls in a turn, but never less than one call
SETTLE = 0.03  # seconds for the other process's threads to fall asleep


class Side:
    """A checkout's process."""

    def __init__(self, checkout: Path, folder: Path, dtype: str, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).parent / "children" / "answer.py")]
        command += [str(checkout), str(folder), dtype, str(threads)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment
        )

    def ask(self, given: Path, calls: int, result: Path | None = None) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"input": str(given), "calls": calls, "result": str(result) if result else None}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("against: a checkout's process has ended")
        seconds: list[float] = json.loads(line)
        return seconds


@contextmanager
def sides(checkouts: dict[str, Path], folder: Path, dtype: str, threads: int) -> Iterator[dict[str, Side]]:
    started = {name: Side(path, folder, dtype, threads) for name, path in checkouts.items()}
    try:
        yield started
    finally:
        for side in started.values():
            side.process.kill()
            side.process.wait()


def compare(both: dict[str, Side], given: Path, rounds: int, lowest_cosine: float) -> dict[str, list[float]]:
    """The seconds of a call in each round, by checkout. The two results are compared first."""
    results: dict[str, np.ndarray] = {}
    calls: dict[str, int] = {}
    for name, side in both.items():
        result = given.with_suffix(f".{len(results)}.npy")
        once = median(side.ask(given, 4, result)[2:])  # the first calls pack the weights
        results[name], calls[name] = np.load(result), max(1, round(TURN / once))
    a, b = results.values()
    cosine = float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    if not cosine >= lowest_cosine:
        raise SystemExit(f"against: the two embeddings have a cosine of {cosine:.6f}")
    order, shuffle = list(both), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(SETTLE)
            times[name].append(median(both[name].ask(given, 1 + calls[name])[1:]))
    return times


def inputs_of(model: str, place: Path) -> Iterator[tuple[str, Path]]:
    """What a model is timed on: a title and a .npy file."""
    size, seeded = 224, torch.Generator().manual_seed(0)
    for batch in dict(IMAGES)[model]:
        path = place / f"images-{batch}.npy"
        np.save(path, torch.randn(batch, 3, size, size, generator=seeded).numpy())
        yield f"{model} images, batch {batch}", path
    for count in PROMPTS if model == IMAGES[0][0] else ():
        path = place / f"prompts-{count}.npy"
        np.save(path, miniclip.tokenize([f"a photo of a {name}." for name in class_names(count)]).numpy())
        yield f"{model}, {count} prompts", path


def extract(revision: str, place: Path) -> Path:
    """The package of a revision, extracted into ``place``."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, "miniclip"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"against: git cannot read {revision}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(place, filter="data")
    return place.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit of this repository")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--quick", action="store_true", help="one round of ViT-B/32: only to see it run")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    here = processor()
    dtypes = ["float32", "bfloat16"] if here.bfloat16 else ["float32"]
    if not here.bfloat16:
        print("bfloat16 is not measured: this processor has no instructions for it")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        checkouts = {options.revision: extract(options.revision, place / "before"), "working tree": ROOT}
        print(f"{here.title}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds\n")
        print(f"| work | {options.revision}, ms | working tree, ms | ratio | middle half |\n|---|---|---|---|---|")
        for model, _ in IMAGES[:1] if options.quick else IMAGES:
            folder = checkpoint(model, place)
            given = list(inputs_of(model, place))
            for dtype in dtypes:
                with sides(checkouts, folder, dtype, options.threads) as both:
                    for title, path in given:
                        times = compare(both, path, options.rounds, 0.9999 if dtype == "float32" else 0.999)
                        before, now = (np.array(times[name]) for name in checkouts)
                        low, _, high = quantiles([*(before / now)] * 2, n=4)
                        milliseconds = [f"{1e3 * median(values):.1f}" for values in (before, now)]
                        ratio = f"{median(before) / median(now):.3f}×"
                        cells = [f"{title}, {dtype}", *milliseconds, ratio, f"{low:.3f} to {high:.3f}"]
                        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
