"""Half precision on a GPU, beside transformers and open_clip, and folders of images embedded on one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from inputs import ROOT, camera_image, captions, checkpoint
from measure import Options, Row, Work, take_turns
from texts import cut_to_longest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import miniclip

FULL = 256  # a batch that keeps a GPU busy
COMPILED = 1, 256  # batches of the compiled contenders, in float16: compiling for one shape takes some 15 s
PROCESSES = 1, 2, 4  # that embed at the same time
DIFFERENT = 100  # image files; the rest are links to them, because a file is decoded every time it is read


def cuda(options: Options, place: Path, device: str = "cuda") -> Iterator[Row]:
    """Both image towers and ViT-B/32's text tower, in float16 and bfloat16; then folders of images."""
    for name in options.batches:
        folder = checkpoint(name, place)
        for dtype in (torch.float16, torch.bfloat16):
            model, _ = miniclip.load(folder, device, dtype=dtype)
            sdpa: Any = peers.transformers_model(folder, dtype)
            eager: Any = peers.transformers_model(folder, dtype, "eager")
            sdpa.to(device)
            eager.to(device)
            other = peers.open_clip_model(name, model)
            peak = product_rate(dtype, device, options.rounds)
            for kind in ("images", "texts") if name == "ViT-B/32" else ("images",):
                image = kind == "images"
                of = peers.images_of if image else peers.texts_of
                encoders: dict[str, peers.Encoder] = {
                    "miniclip": model.encode_image if image else model.encode_text,
                    "transformers": of(sdpa),
                    "transformers, eager attention": of(eager),
                }
                if image:
                    encoders["open_clip"] = other.encode_image
                else:
                    encoders["open_clip, padded to 77"] = peers.padded(other.encode_text, model.context_length)
                for batch in options.cuda_batches:
                    given = tower_input(kind, batch, model.visual.input_resolution).to(device)
                    given = given.to(dtype) if image else given
                    chosen = dict(encoders)
                    if dtype == torch.float16 and batch in COMPILED:
                        chosen["miniclip, compiled"] = peers.compiled(model.visual if image else model.text)
                        chosen["transformers, compiled"] = peers.compiled(peers.Tower(sdpa, kind))
                    yield half_precision_row(f"{name} {kind}, batch {batch}", chosen, given, dtype, peak, options)
    for processes in PROCESSES:
        yield embed_row(processes, options.cuda_images, place, device)


def half_precision_row(
    work: str, encoders: dict[str, peers.Encoder], given: Tensor, dtype: torch.dtype, peak: float, options: Options
) -> Row:
    """One batch. What miniclip computes in a second is compared with a large square product."""
    device = given.device.type
    contenders = {peer: finished(partial(encode, given), device) for peer, encode in encoders.items()}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        contenders["miniclip"]()
    with torch.inference_mode():
        medians = take_turns(contenders, options.rounds, "transformers", 0.999)
    rate, note = counter.get_total_flops() / medians["miniclip"], ""
    if len(given) >= FULL:
        note = f"{rate / 1e12:.3g} TFLOP/s, {rate / peak:.0%} of a product of 8192 × 8192 matrices"
    return Row("cuda", f"{work}, {str(dtype).removeprefix('torch.')}", [medians], note=note)


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


def product_rate(dtype: torch.dtype, device: str, rounds: int) -> float:
    """Operations per second in a product of two square matrices."""
    side = 8192 if device == "cuda" else 64
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    medians = take_turns({"product": finished(lambda: a @ b, device)}, rounds)
    return 2 * side**3 / medians["product"]


def embed_row(processes: int, images: int, place: Path, device: str) -> Row:
    """``processes`` at the same time, each with a folder of ``images``: seconds per image, of all."""
    folder = checkpoint("ViT-B/32", place)
    commands = []
    for number in range(processes):
        source, out = place / f"small-{number}", place / f"small-{processes}-{number}"
        if not source.exists():
            source.mkdir()
            for image in range(images):
                path, first = source / f"{image:06}.jpg", place / "small-0" / f"{image % DIFFERENT:06}.jpg"
                if path == first:
                    camera_image(224, 224).save(path, quality=90)
                else:
                    os.link(first, path)
        child = Path(__file__).parent / "children" / "embed_folder.py"
        commands.append([sys.executable, str(child), str(source), str(out), str(folder), device])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split()])}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
    times = [json.loads(child.communicate()[0] or "null") for child in running]
    if any(child.returncode for child in running):
        raise SystemExit("benchmarks: children/embed_folder.py failed")
    seconds = max(end for _, end in times) - min(start for start, _ in times)
    work = f"embed folders of 224 × 224 JPEGs, {processes} {'process' if processes == 1 else 'processes'}, per image"
    note = f"{processes * images / seconds:,.0f} images/s from {os.cpu_count()} cores"
    return Row("cuda", work, [{"miniclip": seconds / (processes * images)}], note=note)
