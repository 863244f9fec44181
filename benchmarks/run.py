"""miniclip beside its peers: the same weights, the same machine, one run.

    pip install -c constraints.txt -e ".[dev,bench]"
    python benchmarks/run.py                      measure all sections, write this processor's file and the report
    python benchmarks/run.py images tokenizer     measure some sections; the others of this processor's file stay
    python benchmarks/run.py --report             only the report, from the files of all processors
    python benchmarks/run.py --quick images       see it run: tiny sizes, one round, nothing written

Results go to benchmarks/results/cpu-<processor>.json. The report is docs/figures/speed.png and the tables between the
markers in README.md and docs/speed.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's miniclip, whichever is installed

import peers
import torch
from embed import embed, search
from gpu import cuda
from images import images, preprocess
from inputs import ROOT
from machine import processor
from measure import QUICK, Options, Row
from report import RESULTS, Result, cell, merge, mergeable, table, write_report
from start import start
from texts import texts, tokenizer

import miniclip

Section = Callable[[Options, Path], Iterator[Row]]
SECTIONS: dict[str, Section] = {
    "images": images,
    "texts": texts,
    "tokenizer": tokenizer,
    "preprocess": preprocess,
    "start": start,
    "embed": embed,
    "search": search,
}
ALL_SECTIONS = SECTIONS | {"cuda": cuda}


def commit() -> str:
    """The commit that is measured, with a plus sign if files of the package differ from it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return "an unknown commit"
    changed = subprocess.run([*command[:3], "diff", "--quiet", "HEAD", "--", "miniclip"], check=False).returncode
    return done.stdout.strip() + ("+" if changed else "")


def blank_result(threads: int, versions: dict[str, str], gpu: bool) -> Result:
    """This machine and its versions, before anything is measured."""
    if gpu:
        name = torch.cuda.get_device_name()
        machine: dict[str, Any] = {"name": name, "title": name, "slug": name.lower().replace(" ", "-")}
    else:
        here = processor()
        machine = {"name": here.name, "title": here.title, "slug": here.slug}
    machine |= {"threads": threads, "platform": platform.platform()}
    numbers = {"python": platform.python_version(), "torch": torch.__version__, "miniclip": miniclip.__version__}
    return Result(machine, numbers | versions)


def measure_sections(names: Sequence[str], options: Options, result: Result) -> Iterator[Result]:
    """Run sections and show their rows as they come. Gives the result so far after each section."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            began, ran_at = time.perf_counter(), commit()
            for row in ALL_SECTIONS[name](options, Path(temporary)):
                result.rows.append(row)
                print(f"{row.work}: {cell(row)}", flush=True)
            minutes = round((time.perf_counter() - began) / 60, 1)
            result.sections[name] = {"date": str(date.today()), "commit": ran_at, "rounds": options.rounds}
            result.sections[name]["minutes"] = minutes
            print(f"{name}: {minutes} minutes\n", flush=True)
            yield result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ", ".join(ALL_SECTIONS)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {sections} (default: all but cuda)")
    parser.add_argument("--report", action="store_true", help="measure nothing, render the files that exist")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round; written only with --out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--rounds", type=int, help=f"turns of each contender (default: {Options().rounds})")
    parser.add_argument("--images", type=int, help=f"in the folder that is embedded (default: {Options().images:,})")
    parser.add_argument("--vectors", type=int, help=f"that are searched (default: {Options().vectors:,})")
    parser.add_argument("--out", type=Path, help="another folder for the JSON; README, docs and chart stay")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.sections) - set(ALL_SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}: choose from {sections}")
    return parsed


def main() -> None:
    parsed = parse()
    if parsed.report:
        print(*write_report(parsed.out or RESULTS), sep="\n")
        return
    if Path(miniclip.__file__).resolve().parents[1] != ROOT:
        raise SystemExit(f"benchmarks: {miniclip.__file__} is not of this checkout")
    given = {name: getattr(parsed, name) for name in ("threads", "rounds", "images", "vectors")}
    chosen = {name: value for name, value in given.items() if value is not None}
    options = replace(QUICK if parsed.quick else Options(), **chosen)
    torch.set_num_threads(options.threads)
    names = [name for name in ALL_SECTIONS if name in (parsed.sections or SECTIONS)]
    out = parsed.out or (None if parsed.quick else RESULTS)
    # The GPU's rows have a file of their own.
    for kind, part in (("cpu", [name for name in names if name != "cuda"]), ("cuda", [*({"cuda"} & {*names})])):
        if not part:
            continue
        versions = peers.check(peers.GPU_PACKAGES if kind == "cuda" else peers.PACKAGES)
        result = blank_result(options.threads, versions, gpu=kind == "cuda")
        path = out / f"{kind}-{result.processor['slug']}.json" if out else None
        old = mergeable(path, result, part) if path else None
        for finished in measure_sections(part, options, result):
            if path:  # after every section, so that a run that is ended keeps the finished ones
                path.parent.mkdir(parents=True, exist_ok=True)
                merged = merge(old, finished, list(ALL_SECTIONS)) if old else finished
                path.write_text(merged.to_json(), encoding="utf-8")
        print(table([result]))
        if path:
            print(f"\n{path}")
    if out == RESULTS:
        print(*write_report(out), sep="\n")


if __name__ == "__main__":
    main()
