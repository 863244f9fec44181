"""A folder of images to vectors on disk, and a search among a million of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import peers
import torch
import torch.nn.functional as F
from inputs import camera_image, checkpoint
from measure import Options, Row, Work, run_child, take_turns
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
from miniclip.shard_files import Shard, ShardFiles
from miniclip.sources import ImageSource

BATCH = 32
SHARD = 10_000
DIFFERENT = 100  # image files; the rest are links to them, because a file is decoded every time it is read


def embed(options: Options, place: Path) -> Iterator[Row]:
    """``embed_images`` on a folder of JPEGs, beside a loop over batches with transformers. Seconds per image."""
    folder, images = checkpoint("ViT-B/32", place), place / "images"
    images.mkdir()
    paths = [images / f"{number:06}.jpg" for number in range(options.images)]
    for number, path in enumerate(paths):
        if number < DIFFERENT:
            camera_image(640, 480).save(path, quality=90)
        else:
            os.link(paths[number % DIFFERENT], path)
    model, preprocess = miniclip.load(folder, "cpu")
    theirs = peers.images_of(peers.transformers_model(folder))
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = preprocess([miniclip.open_image(path) for path in paths[:BATCH]])
    runs: list[miniclip.Summary] = []

    def ours() -> None:
        out = place / f"vectors-{len(runs)}"
        runs.append(miniclip.embed_images(images, out, folder, device="cpu", batch_size=BATCH, workers=options.threads))

    def loop() -> Tensor:
        batches = (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))
        opened = ([Image.open(path).convert("RGB") for path in batch] for batch in batches)
        return torch.cat([theirs(processor(batch, return_tensors="pt")["pixel_values"]) for batch in opened])

    parts: dict[str, Work] = {
        "the model on all cores": lambda: model.encode_image(pixels),
        "decoding on one core": lambda: [preprocess([miniclip.open_image(path)]) for path in paths[:BATCH]],
    }
    before = take_turns(parts, options.rounds)
    seconds = one_turn({"miniclip": ours, "transformers, a loop": loop})
    medians = {name: total / options.images for name, total in seconds.items()}
    after = take_turns(parts, options.rounds)  # a machine's speed drifts within minutes
    assert [run.embedded for run in runs] == [options.images]
    encoding, decoding = ((before[name] + after[name]) / 2 / len(pixels) for name in parts)
    share = (encoding + decoding / options.threads) / medians["miniclip"]
    note = f"{options.images:,} images; the model alone takes {1e3 * encoding:.1f} ms on all cores and decoding "
    note += f"{1e3 * decoding:.1f} ms on one, together {share:.0%} of the time"
    yield Row("embed", "embed a folder, per image of 640 × 480", [medians], note=note)


def one_turn(contenders: dict[str, Work]) -> dict[str, float]:
    """The seconds of one call each: these calls take minutes, and start-up is a part of them."""
    seconds = {}
    for name, work in contenders.items():
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start
    return seconds


def search(options: Options, place: Path) -> Iterator[Row]:
    """Exact search over vectors on disk, beside numpy on the same files and on a float32 matrix in memory."""
    folder = checkpoint("ViT-B/32", place)
    width = miniclip.load(folder, "cpu")[0].visual.output_dim
    index = miniclip.Index.open(write_vectors(random_vectors(options.vectors, width), folder, place))
    assert len(index) == options.vectors
    query = F.normalize(torch.randn(index.dimension, generator=torch.Generator().manual_seed(1)), dim=0)
    in_memory = np.concatenate([*index.vectors()]).astype(np.float32)

    def numpy(parts: Iterable[np.ndarray]) -> list[int]:
        scores = np.concatenate([part.astype(np.float32, copy=False) @ query.numpy() for part in parts])
        best = np.argpartition(-scores, 10)[:10]
        order: list[int] = best[np.argsort(-scores[best])].tolist()
        return order

    contenders: dict[str, Work] = {
        "numpy, the same files": lambda: numpy(index.vectors()),
        "numpy, float32 in memory": lambda: numpy([in_memory]),
    }
    for name, contender in contenders.items():
        if [int(match.path.removesuffix(".jpg")) for match in index.nearest(query)] != contender():
            raise SystemExit(f"benchmarks: {name} finds other images")
    medians = take_turns({"miniclip": partial(index.nearest, query), **contenders}, options.rounds)
    work = f"search {options.vectors:,} vectors"
    yield Row("search", work, [medians])
    memory = {"miniclip": float(run_child("search_memory.py", place / "vectors", threads=options.threads))}
    memory["numpy, float32 in memory"] = float(in_memory.nbytes)
    yield Row("search", f"{work}, memory", [memory], "bytes")


def random_vectors(count: int, width: int) -> Iterator[Tensor]:
    """Blocks of one shard each of (rows, width) unit vectors."""
    randoms = torch.Generator().manual_seed(0)
    for start in range(0, count, SHARD):
        yield F.normalize(torch.randn(min(SHARD, count - start), width, generator=randoms), dim=1)


def write_vectors(blocks: Iterable[Tensor], model: Path | str, place: Path) -> Path:
    """A folder with one shard for each block of vectors. ``embed_images`` makes the manifest, from one image."""
    out, images = place / "vectors", place / "one"
    images.mkdir()
    camera_image(64, 64).save(images / "one.png")
    miniclip.embed_images(images, out, model, device="cpu")
    row = 0
    for number, block in enumerate(blocks):
        shard = ShardFiles(out, number)
        shard.remove()
        shard.write_listing([ImageSource(f"{row + n:07}.jpg", 0, 0) for n in range(len(block))])
        shard.write(Shard(block.half().numpy(), [*range(len(block))], {}, [""] * len(block)))
        row += len(block)
    return out
