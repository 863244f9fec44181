"""Run miniclip search many times on a busy machine, and check that every run ends with its answer and status 0.

    python fuzz/exits.py
    python fuzz/exits.py --runs 1000 --at-once 24

Many searches at once are the load. Threads that still run when a process exits may abort it after its answer is
complete, with status 134, and only now and then. pyarrow's reading threads did that in one of 14 runs.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import miniclip

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="default: 200")
    parser.add_argument("--at-once", type=int, default=12, help="default: 12")
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        miniclip.embed_images(ROOT / "examples" / "images", folder, "demo", device="cpu", shard_size=2)
        command = [sys.executable, "-m", "miniclip", "search", folder, "a cat", "--json"]

        def run(number: int) -> tuple[int, str, str]:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            print(f"\r{number + 1} runs", end="", file=sys.stderr, flush=True)
            return done.returncode, done.stdout, done.stderr

        results = collections.Counter(pool.map(run, range(options.runs)))
    print(file=sys.stderr)
    (status, answer, _), _ = results.most_common(1)[0]
    if len(results) > 1 or status != 0 or "cat.png" not in answer:
        others = "; ".join(f"{count} with status {key[0]}: {key[2][-200:]!r}" for key, count in results.items())
        raise SystemExit(f"the runs ended in {len(results)} ways: {others}")
    print(f"{options.runs} searches, {options.at_once} at once: the same answer and status 0 each time")


if __name__ == "__main__":
    main()
