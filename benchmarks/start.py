"""A process of its own: from ``python`` to the first embedding."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from inputs import camera_image, checkpoint
from measure import Options, Row, Work, run_child, take_turns

PROGRAMS = {"miniclip": "start_miniclip.py", "transformers": "start_transformers.py"}


def start(options: Options, place: Path) -> Iterator[Row]:
    """Import, load ViT-B/32, open an image of 640 × 480, preprocess and encode: seconds, and the peak memory."""
    folder = checkpoint("ViT-B/32", place)
    path = place / "small.png"
    camera_image(640, 480).save(path)
    peaks: dict[str, list[float]] = {name: [] for name in PROGRAMS}

    def process(name: str) -> Work:
        def run() -> None:
            peaks[name].append(float(run_child(PROGRAMS[name], folder, path, threads=options.threads)))

        return run

    medians = take_turns({name: process(name) for name in PROGRAMS}, options.rounds)
    yield Row("start", "from python to the first embedding", [medians])
    memory = {name: statistics.median(values) for name, values in peaks.items()}
    yield Row("start", "peak memory from python to the first embedding", [memory], "bytes")
