"""Build the inverted file of a folder of vectors once. Arguments: the folder, a file of queries (N, D), threads.

The queries stand in for the words that choose the number of probes: the vectors of this benchmark belong to no model.
Prints JSON: seconds of each step, and the highest anonymous memory, above what the imported packages take.
"""

import json
import sys
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import torch

import miniclip
from miniclip import inverted_build

highest, building = 0, True
steps: dict[str, float] = {}
torch.set_num_threads(int(sys.argv[3]))
faiss.omp_set_num_threads(int(sys.argv[3]))
miniclip.load("demo", "cpu")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def watch() -> None:
    global highest
    while building:
        highest = max(highest, anonymous_bytes())
        time.sleep(0.01)


def say(text: str) -> None:
    global last
    now = time.perf_counter()
    steps[name[-1]] = now - last
    name.append(text.partition(" ")[0])
    last = now


if sys.argv[2] != "-":
    queries = np.load(sys.argv[2])
    inverted_build._encode_words = lambda index: queries
before, name = anonymous_bytes(), ["opening"]
watcher = threading.Thread(target=watch)
watcher.start()
last = start = time.perf_counter()
done = inverted_build.build_inverted_file(sys.argv[1], say=say)
end = time.perf_counter()
building = False
watcher.join()
assert done is not None
steps[name[-1]] = end - last
print(
    json.dumps(
        {
            "seconds": end - start,
            "steps": steps,
            "memory_bytes": highest - before,
            "lists": done.lists,
            "chosen_probes": done.probes,
            "recall_of_chosen": done.recall,
        }
    )
)
