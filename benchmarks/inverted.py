"""The inverted file beside exact search: build, size, memory, latency, and recall of words and images apart.

    python benchmarks/inverted.py --emoji emoji      a million clustered vectors, and the demo model's of these images
    python benchmarks/inverted.py                    only the clustered ones; the other section of the file stays
    python benchmarks/inverted.py --vectors 20000    fewer; written only with --out

Writes benchmarks/results/inverted-<processor>.json. training/emoji_data.py makes the folder of emoji. Every figure of a
section comes from one run on one machine; the contenders take turns, and their medians are compared. The load is that
of the machine when the run began: more than 0 means that others computed, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from embed import write_vectors
from machine import processor
from measure import run_child, take_turns
from PIL import Image, ImageOps
from report import RESULTS
from run import commit

import miniclip
from miniclip.inverted_build import lowest_scores
from miniclip.inverted_file import FOLDER, InvertedFile

WIDTH = 512
PER_CENTRE = 50  # vectors, on average; the rarest have half as many
NOISE = 0.8  # its length beside a centre of length 1: two vectors of a cluster have a cosine of about 0.6
PROBES = (1, 4, 8, 16, 32, 64, 128)
QUERIES = 200
ROUNDING = 1e-6
EMOJI_SETS = ("train", "facebook", "openmoji-black", "openmoji-color", "twemoji")
PROMPTS = ("a drawing of {}", "{}")


def clustered(count: int, total: int, seed: int) -> Iterator[torch.Tensor]:
    """Some of ``total`` unit vectors (rows, 512) around seeded centres, in blocks of 10,000.

    Clusters differ in size by a power law.
    """
    centres = F.normalize(torch.randn(total // PER_CENTRE, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = torch.arange(1, len(centres) + 1).double().pow(-0.5)
    randoms = torch.Generator().manual_seed(seed)
    for start in range(0, count, 10_000):
        rows = min(10_000, count - start)
        chosen = centres[torch.multinomial(weights, rows, replacement=True, generator=randoms)]
        noise = F.normalize(torch.randn(rows, WIDTH, generator=randoms), dim=1)
        yield F.normalize(chosen + NOISE * noise, dim=1)


def recall_at(
    index: miniclip.Index, inverted: InvertedFile, queries: np.ndarray, count: int, probes: Sequence[int]
) -> dict[str, float]:
    """Number of probes -> the share of the true ``count`` nearest vectors that the lists hold; equal scores count."""
    lowest = lowest_scores(index, queries, count)[:, None] - ROUNDING
    hidden = inverted.selectors(index.dead.numpy())
    found = {}
    for number in probes:
        _, scores = inverted.search(queries, count, min(number, inverted.lists), hidden)
        found[str(number)] = round(float((scores >= lowest).mean()), 4)
    return found


def opened(index: miniclip.Index) -> InvertedFile:
    index.nearest(index.vector(0))
    if index.notice or index._inverted is None:
        raise SystemExit(f"benchmarks: the inverted file is not used ({index.notice})")
    return index._inverted


def latency(index: miniclip.Index, queries: torch.Tensor, rounds: int, probes: Sequence[int]) -> dict[str, float]:
    """The median seconds of ``Index.nearest``, and of what the lists alone take."""
    inverted = opened(index)
    hidden = inverted.selectors(index.dead.numpy())

    def nearest(number: int) -> Callable[[], object]:
        turns = itertools.cycle(queries)

        def search() -> object:
            inverted.probes = number
            return index.nearest(next(turns))

        return search

    def lists(number: int) -> Callable[[], object]:
        turns = itertools.cycle(queries.numpy())
        return lambda: inverted.search(next(turns)[None], 100, number, hidden)

    turns = itertools.cycle(queries)
    contenders: dict[str, Callable[[], object]] = {"exact": lambda: index.nearest(next(turns), exact=True)}
    contenders |= {f"{number} probes": nearest(number) for number in probes}
    contenders |= {f"{number} probes, the lists alone": lists(number) for number in probes}
    return take_turns(contenders, rounds)


def measure_clustered(place: Path, count: int, threads: int, rounds: int) -> dict[str, Any]:
    folder = write_vectors(clustered(count, count, 1), "demo", place)
    queries = next(clustered(QUERIES, count, 2))
    np.save(place / "queries.npy", queries.numpy())
    exact_memory = int(run_child("search_memory.py", folder, threads=threads))
    built = json.loads(run_child("build_inverted.py", folder, place / "queries.npy", threads, threads=threads))
    memory = int(run_child("search_memory.py", folder, threads=threads))
    start = time.perf_counter()
    index = miniclip.Index.open(folder)
    folder_seconds = time.perf_counter() - start
    record, starts = index._record, index.table.starts()
    assert record is not None
    start = time.perf_counter()
    InvertedFile(folder, record, starts, index.dimension)
    seconds = time.perf_counter() - start
    probes = sorted({*PROBES, built["chosen_probes"]})
    return {
        "vectors": count,
        "dimension": WIDTH,
        "build": built,
        "file_bytes": sum(path.stat().st_size for path in (folder / FOLDER).iterdir()),
        "open_folder_seconds": folder_seconds,
        "open_inverted_file_seconds": seconds,
        "search_memory_bytes": {"exact": exact_memory, "inverted file": memory},
        "recall_at_10": recall_at(index, opened(index), queries.numpy(), 10, probes),
        "recall_at_100": recall_at(index, opened(index), queries.numpy(), 100, probes),
        "median_seconds": latency(index, queries, rounds, [n for n in probes if n > 4]),
        "rounds": rounds,
    }


def variant(image: Image.Image, randoms: np.random.Generator) -> Image.Image:
    """The image turned a little, cropped, and mirrored half of the time."""
    image = image.convert("RGB").rotate(float(randoms.uniform(-15, 15)), Image.Resampling.BILINEAR, fillcolor="white")
    scale = float(randoms.uniform(0.8, 1))
    width, height = (int(side * scale) for side in image.size)
    left, top = (int(randoms.integers(0, side - kept + 1)) for side, kept in zip(image.size, (width, height)))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if randoms.random() < 0.5 else image


def encoded(paths: Sequence[Path], seed: int) -> torch.Tensor:
    """The demo model's unit vectors (N, 128) of a variant of each image."""
    model, preprocess = miniclip.load("demo", "cpu")
    randoms, parts = np.random.default_rng(seed), []
    for start in range(0, len(paths), 100):
        images = [variant(miniclip.open_image(path), randoms) for path in paths[start : start + 100]]
        with torch.inference_mode():
            parts.append(F.normalize(model.encode_image(preprocess(images)), dim=1))
    return torch.cat(parts)


def measure_emoji(place: Path, emoji: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Words and images apart. The image queries are other variants than the stored ones, and 400 of them."""
    paths = sorted(path for name in EMOJI_SETS for path in (emoji / name).rglob("*.png"))
    if len(paths) < 10_000:
        raise SystemExit(f"benchmarks: {emoji} holds {len(paths):,} images: make it with training/emoji_data.py")
    vectors = encoded(paths, 0)
    folder = write_vectors(vectors.split(10_000), "demo", place)
    built = json.loads(run_child("build_inverted.py", folder, "-", threads, threads=threads))
    index = miniclip.Index.open(folder)
    inverted = opened(index)
    names = [name for name in (emoji / "names.txt").read_text(encoding="utf-8").splitlines() if name][::4]
    model, _ = miniclip.load("demo", "cpu")
    queries = {"images": encoded(paths[:: len(paths) // 400][:400], 1)}
    for prompt in PROMPTS:
        with torch.inference_mode():
            tokens = miniclip.tokenize([prompt.format(name) for name in names])
            queries[f"texts: {prompt}"] = F.normalize(model.encode_text(tokens), dim=1)
    probes = sorted({*PROBES, built["chosen_probes"]})
    return {
        "vectors": len(vectors),
        "dimension": int(vectors.shape[1]),
        "build": built,
        "queries": {kind: len(each) for kind, each in queries.items()},
        "recall_at_10": {kind: recall_at(index, inverted, each.numpy(), 10, probes) for kind, each in queries.items()},
        "recall_at_100": {
            kind: recall_at(index, inverted, each.numpy(), 100, probes) for kind, each in queries.items()
        },
        "median_seconds": latency(index, queries["images"], rounds, [built["chosen_probes"]]),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000, metavar="N", help="default: 1,000,000")
    parser.add_argument("--emoji", type=Path, metavar="DIR", help="the folder that training/emoji_data.py makes")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="turns of each contender (default: 21)")
    parser.add_argument("--out", type=Path, help="another folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    here = processor()
    about: dict[str, Any] = {
        "date": str(date.today()),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "processor": {"name": here.name, "title": here.title, "threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "faiss": version("faiss-cpu")},
    }
    out = options.out or (RESULTS if options.vectors >= 1_000_000 else None)
    path = out / f"inverted-{here.slug}.json" if out else None
    result = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        places = [Path(temporary) / name for name in ("emoji", "clustered")]
        for place in places:
            place.mkdir()
        if options.emoji:
            result["emoji"] = about | measure_emoji(places[0], options.emoji, options.threads, options.rounds)
        result["clustered"] = about | measure_clustered(places[1], options.vectors, options.threads, options.rounds)
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
