"""Whether memory grows: ten thousand encodes, and a thousand loads, in a process of their own.

    python benchmarks/memory.py                                  the demo model, two minutes
    python benchmarks/memory.py --model ViT-B/32 --loads 100     another one; written only with --out

Writes benchmarks/results/memory-<processor>.json: the anonymous memory of the process in MB after each tenth of the
calls. The first tenth warms up: it packs weights and fills the caches of the allocator. A leak of 1 kB for each call
would show as 9 MB between the first tenth and the last one.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import processor
from report import RESULTS
from run import commit

import miniclip

CAPTIONS = ["a cat", "a photo of a dog", "two red bicycles beside a wall", "a drawing of a guitar on a table"]


def anonymous_megabytes() -> float:
    """Without the pages of mapped files, which the system drops when it needs room."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6, 1)


def grown(call: Callable[[int], object], count: int) -> list[float]:
    """The anonymous memory in MB after each tenth of ``count`` calls."""
    memory = []
    for number in range(count):
        call(number)
        if (number + 1) % max(count // 10, 1) == 0:
            memory.append(anonymous_megabytes())
    return memory


def measure(name: str, encodes: int, loads: int) -> dict[str, Any]:
    """Images and texts of changing numbers and lengths; then loads, each with one encode, that are dropped."""
    model, preprocess = miniclip.load(name, "cpu")
    size = preprocess.size
    batches = [torch.randn(n, 3, size, size) for n in (1, 2, 3)]

    def encode(number: int) -> None:
        model.encode_image(batches[number % 3])
        model.encode_text(miniclip.tokenize([f"{CAPTIONS[number % 4]} {number}", *CAPTIONS[: number % 3]]))

    def load(number: int) -> None:
        miniclip.load(name, "cpu")[0].encode_image(batches[0])

    return {"encodes": grown(encode, encodes), "loads": grown(load, loads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--encodes", type=int, default=10_000, help="default: 10,000")
    parser.add_argument("--loads", type=int, default=1_000, help="default: 1,000")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, for the default numbers only")
    options = parser.parse_args()
    found = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "processor": processor().name,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "model": options.model,
        "calls": {"encodes": options.encodes, "loads": options.loads},
        "anonymous_megabytes": measure(options.model, options.encodes, options.loads),
    }
    for kind, memory in found["anonymous_megabytes"].items():
        print(f"{found['calls'][kind]:,} {kind}: {memory[0]} MB after a tenth, {memory[-1]} MB at the end")
    whole = (options.model, options.encodes, options.loads) == ("demo", 10_000, 1_000)
    out = options.out or (RESULTS / f"memory-{processor().slug}.json" if whole else None)
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
