"""What the training programs take from examples/common.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from common import IMAGES, main, needs, read_captions

__all__ = ["IMAGES", "main", "needs", "read_captions"]
