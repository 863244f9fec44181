"""A checkout's miniclip behind a pipe; against.py starts one for each checkout.

Arguments: the checkout, a checkpoint folder, a dtype, a number of threads. Every line on standard input names an input
(.npy), a number of calls and a file for the result, or null. The answer is the list of the calls' seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import numpy as np
import torch

import miniclip

checkout, folder, dtype, threads = sys.argv[1:]
assert Path(miniclip.__file__).parent.parent == Path(checkout), f"{miniclip.__file__} is not of {checkout}"
torch.set_num_threads(int(threads))
clip = miniclip.load(folder, "cpu", dtype=getattr(torch, dtype))[0]
inputs: dict[str, torch.Tensor] = {}
for line in sys.stdin:
    request = json.loads(line)
    path = request["input"]
    if path not in inputs:
        inputs[path] = torch.from_numpy(np.load(path))
    given = inputs[path]
    encode = clip.encode_image if given.ndim == 4 else clip.encode_text
    seconds = []
    for _call in range(request["calls"]):
        start = time.perf_counter()
        result = encode(given)
        seconds.append(time.perf_counter() - start)
    if request["result"]:
        np.save(request["result"], result.float().numpy())
    print(json.dumps(seconds), flush=True)
