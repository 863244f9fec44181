"""Images: encoding batches of them, and preparing one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import peers
import torch
from inputs import camera_image, checkpoint
from machine import processor
from measure import Options, Row, Work, check_agreement, run_child, take_turns
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip

DTYPES = {"float32": ("", 0.9999), "bfloat16": (", bfloat16", 0.999)}  # the end of the title, and the lowest cosine


def images(options: Options, place: Path) -> Iterator[Row]:
    """Batches of pixels through the image towers, in float32 and bfloat16."""
    for name, batches in options.batches.items():
        folder = checkpoint(name, place)
        onnx = peers.onnx_file(peers.transformers_model(folder), "images", folder / "images.onnx")
        for dtype, (ending, cosine) in DTYPES.items():
            titles = [f"{name} images, batch {batch}{ending}" for batch in batches]
            if dtype == "bfloat16" and not processor().bfloat16:
                yield from (Row("images", title, missing="no bfloat16 instructions") for title in titles)
                continue
            model, _ = miniclip.load(folder, "cpu", dtype=getattr(torch, dtype))
            reference = peers.transformers_model(folder, getattr(torch, dtype))
            encoders = {"miniclip": model.encode_image, "transformers": peers.images_of(reference)}
            if dtype == "float32":
                encoders["ONNX Runtime"] = peers.onnxruntime(onnx, options.threads)
            size = model.visual.input_resolution
            given = [torch.randn(batch, 3, size, size) for batch in batches]
            tokens = len(model.visual.positional_embedding)
            rounds = [rounds_for(options.rounds, batch, batch * tokens) for batch in batches]
            alone = beside_openvino(folder, onnx, dtype, given, rounds, options.threads)
            for title, pixels, turns, openvino in zip(titles, given, rounds, alone):
                contenders = {peer: partial(encode, pixels) for peer, encode in encoders.items()}
                medians = take_turns(contenders, turns, "transformers", cosine)
                yield Row("images", title, [medians, openvino])


def rounds_for(rounds: int, batch: int, tokens: int) -> int:
    """More rounds of short calls, which vary more, and fewer of calls that take seconds."""
    return 3 * rounds if batch == 1 else max(1, rounds // 2) if tokens > 3000 else rounds


def beside_openvino(
    folder: Path, onnx: Path, dtype: str, given: Sequence[torch.Tensor], rounds: Sequence[int], threads: int
) -> list[dict[str, float]]:
    """The medians of miniclip and OpenVINO on each input, in a process without ONNX Runtime."""
    paths = []
    for number, tensor in enumerate(given):
        paths.append(folder / f"given-{number}.npy")
        np.save(paths[-1], tensor.numpy())
    inputs = [[str(path), turns] for path, turns in zip(paths, rounds)]
    request = {"folder": str(folder), "onnx": str(onnx), "dtype": dtype, "threads": threads, "inputs": inputs}
    medians: list[dict[str, float]] = json.loads(
        run_child("beside_openvino.py", json.dumps(request), threads=threads).splitlines()[-1]
    )
    return medians


def preprocess(options: Options, place: Path) -> Iterator[Row]:
    """One image from PIL to pixels, and a large JPEG from its file."""
    processor, prepare = CLIPImageProcessorPil(), miniclip.Preprocess(convention="huggingface")
    for title, size in (("640 × 480", (640, 480)), ("12 megapixels", (4000, 3000))):
        image = camera_image(*size)
        assert torch.equal(prepare([image]), processor(image, return_tensors="pt")["pixel_values"])
        contenders: dict[str, Work] = {
            "miniclip": partial(prepare, [image]),
            "transformers (PIL)": partial(processor, image, return_tensors="pt"),
        }
        yield Row("preprocess", f"preprocess one image, {title}", [take_turns(contenders, 2 * options.rounds)])
    path = place / "large.jpg"
    camera_image(4000, 3000).save(path, quality=85)
    model, prepare = miniclip.load(checkpoint("ViT-B/32", place), "cpu")

    def fast() -> torch.Tensor:
        return prepare([open_fast(path, prepare.size)])

    def exact() -> torch.Tensor:
        return prepare([miniclip.open_image(path)])

    check_agreement("fast decoding", model.encode_image(fast()), model.encode_image(exact()), 0.999)
    medians = take_turns({"miniclip": fast, "miniclip, exact": exact}, options.rounds)
    yield Row("preprocess", "fast decoding of a JPEG, 12 megapixels", [medians])


def open_fast(path: Path, size: int) -> Image.Image:
    """The image of a JPEG, decoded at a size that is large enough for the preprocessing."""
    return miniclip.open_image(path, min_side=size * 3 // 2)
