"""What shell.py needs. Arguments: a folder, how many images, and whether to export rclip's files.

Writes a seeded ViT-B/32, images, their vectors, and, for rclip, ONNX files of a seeded ViT-B/32 with 256 pixels. That
is the architecture that rclip downloads. Speed does not depend on the values of the weights.
"""

import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from inputs import camera_image, checkpoint
from peers import onnx_file
from transformers import CLIPModel

import miniclip
from miniclip.hub import KNOWN
from validation.reference import hf_config

DIFFERENT = 50  # image files; the rest are links to them
place, count, rclip = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "rclip"
model, images = checkpoint("ViT-B/32", place), place / "images"
images.mkdir()
for number in range(count):
    path = images / f"{number:06}.jpg"
    if number < DIFFERENT:
        camera_image(640, 480).save(path, quality=90)
    else:
        os.link(images / f"{number % DIFFERENT:06}.jpg", path)
miniclip.embed_images(images, place / "vectors", model, device="cpu")
if rclip:
    config = KNOWN["ViT-B/32"].config
    config = replace(config, vision=replace(config.vision, image_size=256))
    torch.manual_seed(0)
    peer = CLIPModel(hf_config(config)).eval()
    folder = place / "rclip" / "ViT-B-32-256-datacomp_s34b_b86k"
    folder.mkdir(parents=True)
    onnx_file(peer, "texts", folder / "textual.onnx", "input")
    onnx_file(peer, "images", folder / "visual.onnx", "input")
    (place / "rclip" / "tokenizer").mkdir()
    clip = find_spec("clip")
    assert clip is not None
    assert clip.origin is not None
    shutil.copy(Path(clip.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), place / "rclip" / "tokenizer")
