"""Search a folder of vectors once. Argument: the folder. Prints the bytes of memory that the search takes.

Anonymous memory only: the system drops the pages of mapped files when it needs room.
"""

import sys
import threading
import time
from pathlib import Path

import torch

import miniclip

highest, searching = 0, True


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def watch() -> None:
    global highest
    while searching:
        highest = max(highest, anonymous_bytes())
        time.sleep(0.001)


before = anonymous_bytes()
watcher = threading.Thread(target=watch)
watcher.start()
index = miniclip.Index.open(sys.argv[1])
index.nearest(torch.nn.functional.normalize(torch.randn(index.dimension), dim=0))
searching = False
watcher.join()
print(highest - before)
