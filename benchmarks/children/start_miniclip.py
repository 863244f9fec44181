"""Embed one image with miniclip. Arguments: a checkpoint folder, an image. Prints the peak memory in bytes."""

import sys
from pathlib import Path

import miniclip

model, preprocess = miniclip.load(sys.argv[1], "cpu")
embedding = model.encode_image(preprocess([miniclip.open_image(sys.argv[2])]))
# From /proc: on Linux a process inherits getrusage's peak from its parent.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(1024 * int(status["VmHWM"].split()[0]))
