"""Embed one image with transformers. Arguments: a checkpoint folder, an image. Prints the peak memory in bytes."""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

model = CLIPModel.from_pretrained(sys.argv[1], attn_implementation="sdpa").eval()
pixels = CLIPImageProcessorPil.from_pretrained(sys.argv[1])(Image.open(sys.argv[2]), return_tensors="pt")
with torch.inference_mode():
    embedding = model.get_image_features(**pixels)
# From /proc: on Linux a process inherits getrusage's peak from its parent.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(1024 * int(status["VmHWM"].split()[0]))
