"""The method: contenders that do the same work take turns, and their medians are compared."""

from __future__ import annotations

import gc
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from inputs import ROOT

Work = Callable[[], object]
SETTLE = 0.03  # seconds before a turn: torch's threads spin for some 10 ms after a call, and would slow the next one


@dataclass
class Options:
    """How much is measured. The works' names hold the numbers that differ from the published ones."""

    threads: int = os.cpu_count() or 1
    rounds: int = 9
    batches: Mapping[str, Sequence[int]] = field(
        default_factory=lambda: {"ViT-B/32": (1, 8, 16, 64), "ViT-B/16": (1, 8, 16)}
    )
    prompts: int = 256
    classes: int = 1000
    captions: int = 512
    texts: int = 20_000  # for the tokenizers
    images: int = 1_000  # in the folder that is embedded
    vectors: int = 1_000_000  # that are searched
    cuda_batches: Sequence[int] = (1, 32, 256, 1024)
    cuda_images: int = 6_000  # in each folder that is embedded on a GPU


QUICK = Options(
    rounds=1,
    batches={"ViT-B/32": (1, 2), "ViT-B/16": (1,)},
    prompts=8,
    classes=4,
    captions=8,
    texts=1_000,
    images=40,
    vectors=20_000,
    cuda_batches=(1,),
    cuda_images=20,
)


@dataclass
class Row:
    """One work: the medians of those who took turns at it, in seconds or bytes, miniclip among them.

    ``turns`` has more than one entry where the contenders ran in several processes; a peer is compared with the
    miniclip of its own process. ``missing`` says why nothing was measured.
    """

    section: str
    work: str
    turns: list[dict[str, float]] = field(default_factory=list)
    unit: str = "seconds"
    note: str = ""
    missing: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times the time, or memory, of miniclip each peer takes."""
        return {
            peer: median / medians["miniclip"]
            for medians in self.turns
            for peer, median in medians.items()
            if peer != "miniclip"
        }


def take_turns(
    contenders: Mapping[str, Work], rounds: int, reference: str | None = None, cosine: float = 0.9999
) -> dict[str, float]:
    """The median seconds of each contender, after one or two calls that do not count.

    In every round each has a turn, in a seeded order, so that whatever else the machine does falls on all of them.
    With a ``reference`` the results are embeddings (N, D), and none is timed that differs from the reference's.
    """
    results = {}
    for name, work in contenders.items():
        start = time.perf_counter()
        results[name] = work()
        if time.perf_counter() - start < 2:
            work()
    if reference is not None:
        for name, result in results.items():
            check_agreement(name, result, results[reference], cosine)
    del results
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            time.sleep(SETTLE)
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def check_agreement(name: str, result: object, expected: object, lowest: float = 0.9999) -> None:
    """Compare two batches of embeddings, (N, D).

    Raises:
        SystemExit: if the cosine of any pair is too low.
    """
    assert isinstance(result, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    cosine = F.cosine_similarity(result.float(), expected.float()).min().item()
    if not cosine >= lowest:
        raise SystemExit(f"benchmarks: {name} has a cosine of {cosine:.6f} to the reference's embedding")


def run_child(script: str, *arguments: object, threads: int) -> str:
    """What a program in ``children/`` prints, run in a process of its own."""
    place = Path(__file__).parent
    command = [sys.executable, str(place / "children" / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}", "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip has compiled the peers, so miniclip is compiled too
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"benchmarks: children/{script} failed:\n{done.stderr}")
    return done.stdout
