"""Attack every kind of input with random damage, and check that the answer is right or one clear, typed error.

    python fuzz/fuzz.py                                 # all attacks, a minute each
    python fuzz/fuzz.py images tars --minutes 60 --seed 7

Each attack makes cases from good files: it cuts, repeats, exchanges and overwrites bytes, and it replaces values in
JSON. Then it judges what miniclip makes of a case, by another reader of the same bytes where there is one. A case that
breaks something is written to tests/data/crashes/ATTACK-CHECKSUM, where tests/test_fuzz.py judges it from then on.

An attack runs in a process of its own, with 3 GB of memory: a case that kills the process, or that takes longer than
``--patience`` seconds, is reported as well. Ends with status 1 if any case broke something.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from attacks import ATTACKS, Broken, judge

CRASHES = Path(__file__).resolve().parents[1] / "tests" / "data" / "crashes"
SAME = 3  # cases that are kept of those whose messages begin alike
MEMORY = 3 * 2**30  # bytes beyond what the process has when it starts


def attack(name: str, seconds: float, most: int, seed: int, place: Path, crashes: Path) -> int:
    """Make and judge cases until the time is over. Returns the number of cases that broke something."""
    case = place / "case"
    outcomes: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    started, number = time.monotonic(), 0
    while time.monotonic() - started < seconds and number < most:
        data = ATTACKS[name].make(random.Random(f"{name} {seed} {number}"))
        number += 1
        case.write_bytes(data)  # the parent finds the case here if this process dies
        try:
            outcomes[judge(name, data, place / "work")] += 1
        except Broken as error:
            outcomes["broke something"] += 1
            kind = str(error)[:12]
            kinds[kind] += 1
            if kinds[kind] <= SAME:
                kept = keep(name, data, crashes)
                print(f"{name}, case {number - 1} of seed {seed}: {error}; kept as {kept}", flush=True)
    told = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{name}: {number:,} cases in {time.monotonic() - started:.0f} s: {told}", flush=True)
    return outcomes["broke something"]


def keep(name: str, data: bytes, crashes: Path) -> Path:
    crashes.mkdir(parents=True, exist_ok=True)
    path = crashes / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def attack_in_a_process(name: str, options: argparse.Namespace) -> bool:
    """Run an attack in a process of its own, and watch the process. Returns whether nothing broke."""
    with tempfile.TemporaryDirectory(prefix="miniclip-fuzz-") as folder:
        case = Path(folder) / "case"
        arguments = ["--minutes", options.minutes, "--seed", options.seed, "--cases", options.cases]
        arguments += ["--crashes", options.crashes]
        command = [sys.executable, __file__, name, *map(str, arguments), "--here", folder]
        process = subprocess.Popen(command)
        started = time.time()
        while process.poll() is None:
            time.sleep(0.2)
            last = case.stat().st_mtime if case.exists() else started + 60  # imports and good files come first
            if time.time() - last > options.patience:
                process.kill()
                process.wait()
        if process.returncode < 0:
            kept = keep(name, case.read_bytes(), options.crashes) if case.exists() else "no case was made"
            print(f"{name}: a case ended the process with signal {-process.returncode}: {kept}", flush=True)
        return process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=1, help="for each attack (default: 1)")
    parser.add_argument("--cases", type=int, default=10**12, help="the most for each attack")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--patience", type=float, default=60, help="seconds for one case (default: 60)")
    parser.add_argument("--crashes", type=Path, default=CRASHES, help="default: tests/data/crashes")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.attacks or list(ATTACKS)
    if unknown := [name for name in names if name not in ATTACKS]:
        parser.error(f"there is no attack {unknown[0]!r}: use {', '.join(ATTACKS)}")
    if options.here is None:
        results = [attack_in_a_process(name, options) for name in names]
        raise SystemExit(0 if all(results) else 1)
    warnings.simplefilter("ignore")
    shutil.rmtree(options.here / "work", ignore_errors=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    broke = attack(names[0], options.minutes * 60, options.cases, options.seed, options.here, options.crashes)
    raise SystemExit(1 if broke else 0)


if __name__ == "__main__":
    main()
