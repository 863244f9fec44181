"""Half precision on a GPU, beside transformers eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from inputs import captions, checkpoint
from measure import Options, Row, Work, take_turns
from texts import cut_to_longest
from torch import Tensor

import miniclip


def cuda(options: Options, place: Path, device: str = "cuda") -> Iterator[Row]:
    """Both image towers and ViT-B/32's text tower, in float16 and bfloat16."""
    for name in options.batches:
        folder = checkpoint(name, place)
        for dtype in (torch.float16, torch.bfloat16):
            model, _ = miniclip.load(folder, device, dtype=dtype)
            reference: Any = peers.transformers_model(folder, dtype)
            reference.to(device)
            towers: dict[str, tuple[peers.Encoder, peers.Encoder]] = {
                "images": (model.encode_image, peers.images_of(reference))
            }
            if name == "ViT-B/32":
                towers["texts"] = (model.encode_text, peers.texts_of(reference))
            for kind, (ours, eager) in towers.items():
                encoders = {"miniclip": ours, "transformers": eager}
                encoders["transformers, compiled"] = peers.compiled(reference, kind)
                for batch in options.cuda_batches:
                    given = tower_input(kind, batch, model.visual.input_resolution).to(device)
                    given = given.to(dtype) if given.is_floating_point() else given
                    contenders = {peer: finished(partial(encode, given), device) for peer, encode in encoders.items()}
                    work = f"{name} {kind}, batch {batch}, {str(dtype).removeprefix('torch.')}"
                    yield Row("cuda", work, [take_turns(contenders, options.rounds, "transformers", 0.999)])


def tower_input(kind: str, batch: int, size: int) -> Tensor:
    if kind == "images":
        return torch.randn(batch, 3, size, size)
    return cut_to_longest(miniclip.tokenize(captions(batch, 36), truncate=True).long())  # cut for all contenders


def finished(work: Work, device: str) -> Work:
    """The work and the wait for the GPU to finish it."""

    def run() -> object:
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run
