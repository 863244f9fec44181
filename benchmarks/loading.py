"""How long a local ViT-B/32 takes to load, beside transformers: medians of interleaved runs on one seeded checkpoint.

python benchmarks/loading.py
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # validate.py makes the checkpoint

import torch
import transformers
from transformers import CLIPModel

import miniclip
import validate
from miniclip import hub

RUNS = 15


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        validate.seeded_checkpoint(hub.KNOWN["ViT-B/32"].config, Path(folder))
        ours, theirs = [], []
        for run in range(RUNS + 1):
            pair = (
                seconds(lambda: miniclip.load(folder, "cpu")),
                seconds(lambda: CLIPModel.from_pretrained(folder, attn_implementation="sdpa")),
            )
            if run:  # the first one fills the page cache and finishes imports
                ours.append(pair[0])
                theirs.append(pair[1])
    mine, reference = statistics.median(ours), statistics.median(theirs)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {RUNS} interleaved runs, medians")
    print(f"miniclip {mine * 1e3:.0f} ms, transformers {reference * 1e3:.0f} ms: {reference / mine:.2f} times as fast")


if __name__ == "__main__":
    main()
