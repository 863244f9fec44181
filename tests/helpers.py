"""What several test files do: run a program in a process of its own, and make an image."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

#: Values that a size in a configuration file cannot have.
INVALID_VALUES: list[object] = [None, "768", "", True, False, -1, 0, 1.5, 768.0, 1e300, math.nan, math.inf]
INVALID_VALUES += [[], [1], [1, 2], {}, {"a": 1}, 2**31, 10**400]


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with this checkout's miniclip; the exit status is for the caller to judge."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=600)


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``miniclip ARGUMENTS``."""
    return run_python("-m", "miniclip", *arguments, **environment)


def run_script(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python SCRIPT ARGUMENTS``, the script named by its path in the repository."""
    return run_python(ROOT / script, *arguments, **environment)


def make_image(path: Path | None = None, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An RGB image of coloured blocks, another for each seed; saved to ``path``, folders included, if one is given."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return image
