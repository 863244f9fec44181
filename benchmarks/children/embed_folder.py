"""Embed a folder, and print when the first image began and when the last vector was written, as JSON."""

import json
import sys
import time

import miniclip

source, out, model, device = sys.argv[1:]
moments: list[float] = []
summary = miniclip.embed_images(
    source, out, model, device=device, batch_size=250, progress=lambda _: moments.append(time.time())
)
assert not summary.failed
print(json.dumps([moments[0], time.time()]))
