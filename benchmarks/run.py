"""miniclip beside its peers: the same weights, the same machine, one run.

    pip install -c constraints.txt -e ".[dev,bench]"
    python benchmarks/run.py                      everything
    python benchmarks/run.py images tokenizer     some of it

The contenders of a row take turns, a round each, in another order every round, and their medians are compared: what
else the machine does falls on all of them. Each embedding is compared with transformers' before it is timed. Prints a
table of ratios and writes it, with all medians, to benchmarks/results/ as JSON and as a chart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # validation/ makes the checkpoints

import numpy as np
import peers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
import validate
from miniclip import embed, fast, hub, manifest, shard_files, sources, store
from miniclip.tokenizer import Tokenizer
from validation.reference import reference_tokenizer, sample_images, seeded_checkpoint

ROOT = Path(__file__).parent.parent
GFLOP = {"ViT-B/32": 8.8, "ViT-B/16": 35.1}  # of one image, as usually counted
CORES = "cores / core-seconds"
SHARES = ("matmul peak", CORES)
PARTS = ("model", "decoding on one core")
BATCH = 32
Work = Callable[[], object]


@dataclass
class Row:
    """One line of the table: how many times as fast (or as large) as a peer, or a share."""

    work: str
    beside: str
    ratio: float
    least: float
    aim: float
    lower_is_better: bool = False
    medians: dict[str, float] = field(default_factory=dict)  # seconds, or bytes
    section: str = ""

    @property
    def verdict(self) -> str:
        def reached(bound: float) -> bool:
            return self.ratio <= bound if self.lower_is_better else self.ratio >= bound

        return "aim" if reached(self.aim) else "least" if reached(self.least) else "below"


def take_turns(contenders: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """The median seconds of each, after a call or two that do not count."""
    for work in contenders.values():
        start = time.perf_counter()
        work()
        if time.perf_counter() - start < 2:
            work()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def agree(ours: Tensor, theirs: Tensor, what: str, least: float = 0.9999) -> None:
    cosine = F.cosine_similarity(ours.float(), theirs.float()).min().item()
    if not cosine >= least:
        raise SystemExit(f"benchmarks: {what} has a cosine of {cosine:.6f} to the reference's embedding")


# -- images -----------------------------------------------------------------------------------------------------------


def matmul_peak() -> Iterator[tuple[float, Work]]:
    """FLOPs and the multiplication of the largest layers of a batch of 16, from packed weights."""
    for rows, inner, outer in ((800, 768, 3072), (800, 3072, 768), (1576, 768, 3072)):
        x, matrix = torch.randn(rows, inner), fast.Matrix(torch.randn(outer, inner))
        yield 2.0 * rows * inner * outer * 8, lambda x=x, matrix=matrix: [matrix(x) for _ in range(8)]  # type: ignore[misc]


def images(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    limits = {
        ("ViT-B/32", 1): ((2.2, 2.6), (1.25, 1.4)),
        ("ViT-B/32", 16): ((2.2, 2.6), (1.05, 1.1)),
        ("ViT-B/16", 8): ((2.0, 2.4), (1.0, 1.05)),
    }
    bf16_limits = {("ViT-B/32", 1): (1.15, 1.25), ("ViT-B/32", 16): (1.03, 1.1), ("ViT-B/16", 8): (1.0, 1.05)}
    shares = {"ViT-B/32": (0.80, 0.92), "ViT-B/16": (0.75, 0.88)}
    bf16 = fast.has_packed_kernels(torch.bfloat16)
    for name, folder in folders.items():
        theirs = peers.transformers_model(folder)
        path = peers.onnx_file(theirs, "images", folder / "images.onnx")
        model, _ = miniclip.load(folder, "cpu")
        print(f"{name}: {fast.path_of(model)}", flush=True)
        encoders = {
            "miniclip": model.encode_image,
            "transformers": peers.images_of(theirs),
            "ONNX Runtime": peers.onnxruntime(path, options.threads),
            "OpenVINO": peers.openvino(path, options.threads),
        }
        if bf16:
            half, _ = miniclip.load(folder, "cpu", dtype=torch.bfloat16)
            encoders["miniclip bf16"] = half.encode_image
            encoders["OpenVINO bf16"] = peers.openvino(path, options.threads, "bf16")
        for batch in [b for n, b in limits if n == name]:
            pixels = torch.randn(batch, 3, 224, 224)
            expected = encoders["transformers"](pixels)
            for peer, encode in encoders.items():
                agree(encode(pixels), expected, f"{peer} on {name}", 0.999 if "bf16" in peer else 0.9999)
            medians = take_turns(
                {peer: partial(encode, pixels) for peer, encode in encoders.items()},
                options.rounds * (3 if batch == 1 else 1),
            )
            ours, work = medians["miniclip"], f"{name} images, batch {batch}"
            best = min(("ONNX Runtime", "OpenVINO"), key=medians.__getitem__)
            (least, aim), (least_best, aim_best) = limits[name, batch]
            yield Row(work, "transformers", medians["transformers"] / ours, least, aim, medians=medians)
            yield Row(work, best, medians[best] / ours, least_best, aim_best, medians=medians)
            if bf16:
                ratio = medians["OpenVINO bf16"] / medians["miniclip bf16"]
                yield Row(f"{work}, bf16", "OpenVINO bf16", ratio, *bf16_limits[name, batch], medians=medians)
        pixels = torch.randn(16, 3, 224, 224)
        peak = list(matmul_peak())
        contenders: dict[str, Work] = {f"matmul {i}": work for i, (_, work) in enumerate(peak)}
        medians = take_turns({"miniclip": partial(model.encode_image, pixels), **contenders}, options.rounds)
        best_peak = max(flops / medians[f"matmul {i}"] for i, (flops, _) in enumerate(peak))
        share = GFLOP[name] * 1e9 * 16 / medians["miniclip"] / best_peak
        medians["peak, GFLOP/s"] = best_peak / 1e9
        yield Row(f"{name} images, batch 16: nominal FLOPs", "matmul peak", share, *shares[name], medians=medians)


# -- texts ------------------------------------------------------------------------------------------------------------


def words(seed: int = 0, rare: float = 0.0) -> Iterator[str]:
    """English words as they recur in text: the tokenizer's own whole words, frequent ones more often.

    A share of them is ``rare``: 50,000 words of two or three tokens, which recur as rarely as such words do.
    """
    tokenizer, pick = Tokenizer(), random.Random(seed)
    whole = [token.removesuffix("</w>") for token in tokenizer._tokens[512:-2] if token.endswith("</w>")]
    whole = [word for word in whole if word.isascii() and word.isalpha() and len(word) > 2]
    glue = random.Random(0)
    glued = ["".join(glue.choices(whole, k=glue.choice((2, 2, 3)))) for _ in range(50_000 if rare else 0)]
    while True:
        some = glued if pick.random() < rare else whole
        yield some[int(len(some) * pick.random() ** 3)]


def class_names(n: int) -> list[str]:
    """Names of one to three words, as ImageNet's are."""
    pick, stream, names = random.Random(1), words(1), dict[str, None]()
    while len(names) < n:
        names[" ".join(next(stream) for _ in range(pick.choice((1, 1, 2, 2, 3))))] = None
    return list(names)


def captions(n: int, longest: int, seed: int = 2, rare: float = 0.0) -> list[str]:
    """Sentences of three to ``longest`` words, all different."""
    pick, stream, found = random.Random(seed), words(seed, rare), dict[str, None]()
    while len(found) < n:
        sentence = " ".join(next(stream) for _ in range(pick.randint(3, longest)))
        found[pick.choice(("{}", "{}.", "A {}", "a photo of {}!", "{}, 2026")).format(sentence)] = None
    return list(found)


def texts(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    folder = folders["ViT-B/32"]
    theirs_model = peers.transformers_model(folder)
    path = peers.onnx_file(theirs_model, "texts", folder / "texts.onnx")
    model, _ = miniclip.load(folder, "cpu")
    theirs = peers.texts_of(theirs_model)
    few = max(3, options.rounds // 3)

    tokens = miniclip.tokenize([f"a photo of a {name}." for name in class_names(256)])
    longest = tokens[:, : int((tokens > 0).sum(dim=1).max())]
    full, cut = tokens.long(), longest.long().contiguous()
    encoders: dict[str, Work] = {
        "miniclip": lambda: model.encode_text(tokens),
        "transformers, 77": lambda: theirs(full),
        "transformers, longest": lambda: theirs(cut),
    }
    runtime, vino = peers.onnxruntime(path, options.threads), peers.openvino(path, options.threads)
    encoders |= {"ONNX Runtime": lambda: runtime(full), "OpenVINO": lambda: vino(full)}
    expected = theirs(full)
    for peer, encode in encoders.items():
        agree(encode(), expected, f"{peer} on texts")  # type: ignore[arg-type]
    medians = take_turns(encoders, few)
    best = min(("ONNX Runtime", "OpenVINO"), key=medians.__getitem__)
    limits = {"transformers, 77": (40, 60), "transformers, longest": (5, 7), best: (10, 15)}
    for peer, (least, aim) in limits.items():
        ratio = medians[peer] / medians["miniclip"]
        yield Row("256 zero-shot prompts", peer + (", 77" if peer == best else ""), ratio, least, aim, medians=medians)

    templates = ["a photo of a {}.", "a drawing of a {}.", "itap of a {}.", "a bad photo of the {}."]
    templates += ["a origami {}.", "a {} in a video game.", "art of the {}."]
    classes = class_names(1000)

    def classifier() -> Tensor:
        preprocess = miniclip.Preprocess()
        return miniclip.ZeroShotClassifier(model, preprocess, classes, templates).weights

    def reference() -> Tensor:
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        ids = miniclip.tokenize(prompts).long()
        cut = [part[:, : int((part > 0).sum(dim=1).max())] for part in ids.split(256)]
        parts = [F.normalize(theirs(part), dim=1) for part in cut]
        return F.normalize(torch.cat(parts).view(len(classes), len(templates), -1).mean(dim=1), dim=1)

    agree(classifier(), reference(), "the classifier")
    medians = take_turns({"miniclip": classifier, "transformers, longest": reference}, 3)
    ratio = medians["transformers, longest"] / medians["miniclip"]
    yield Row("classifier, 1,000 classes × 7 templates", "transformers, longest", ratio, 5, 7, medians=medians)

    ragged = miniclip.tokenize(captions(1000, 36), truncate=True)
    counts = (ragged > 0).sum(dim=1)
    ragged = ragged[(counts >= 5) & (counts <= 40)][:512]
    counts = (ragged > 0).sum(dim=1)

    def by_64() -> Tensor:
        sizes = [int(part.max()) for part in counts.split(64)]
        return torch.cat([theirs(part[:, :size].long()) for part, size in zip(ragged.split(64), sizes)])

    agree(model.encode_text(ragged), by_64(), "ragged captions")
    medians = take_turns({"miniclip": lambda: model.encode_text(ragged), "transformers by 64": by_64}, few)
    ratio = medians["transformers by 64"] / medians["miniclip"]
    yield Row(f"{len(ragged)} captions of 5–40 tokens", "transformers by 64", ratio, 2.7, 3.5, medians=medians)


# -- what stands before the model -------------------------------------------------------------------------------------


def tokenizer(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    rust, openai = reference_tokenizer(), peers.openai_tokenizer()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches = [captions(20_000, 20, seed, rare=0.15) for seed in range(100, 100 + options.rounds + 2)]
    for text in batches[0][:1000]:
        assert miniclip.Tokenizer().encode(text) == openai.encode(text)
    # Other captions in every round, each contender the same ones: no memory of a whole text can help.
    streams = {name: iter(batches) for name in ("miniclip", "Rust", "OpenAI")}
    medians = take_turns(
        {
            "miniclip": lambda: miniclip.tokenize(next(streams["miniclip"]), truncate=True),
            "Rust": lambda: rust(next(streams["Rust"]), truncation=True, max_length=77, padding="max_length"),
            "OpenAI": lambda: [openai.encode(text) for text in next(streams["OpenAI"])],
        },
        options.rounds,
    )
    ours, work = medians["miniclip"], "20,000 new captions to ids, one thread"
    yield Row(work, "transformers (Rust)", medians["Rust"] / ours, 1.5, 3, medians=medians)
    yield Row(work, "OpenAI", medians["OpenAI"] / ours, 3, 8, medians=medians)


def photo(width: int, height: int) -> Image.Image:
    """A photograph of this size, with the noise that a camera adds."""
    picture = sample_images()[0].resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.effect_noise((width, height), 24).convert("RGB")
    return Image.blend(picture, noise, 0.1)


def preprocessing(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    processor, preprocess = CLIPImageProcessorPil(), miniclip.Preprocess(convention="huggingface")
    for title, size, least, aim in (("640 × 480", (640, 480), 1.1, 1.5), ("12 megapixels", (4000, 3000), 2.5, 3.0)):
        picture = photo(*size)
        assert torch.equal(preprocess([picture]), processor(picture, return_tensors="pt")["pixel_values"])
        medians = take_turns(
            {
                "miniclip": partial(preprocess, [picture]),
                "transformers": partial(processor, picture, return_tensors="pt"),
            },
            2 * options.rounds,
        )
        ratio = medians["transformers"] / medians["miniclip"]
        yield Row(f"preprocessing, {title}", "transformers (PIL)", ratio, least, aim, medians=medians)
    path = folders["ViT-B/32"] / "photo.jpg"
    photo(4000, 3000).save(path, quality=85)
    for name in ("demo", folders["ViT-B/32"]):
        model, preprocess = miniclip.load(name, "cpu")
        exact, draft = (preprocess([opened]) for opened in (miniclip.open_image(path), draft_of(path, preprocess.size)))
        agree(model.encode_image(draft), model.encode_image(exact), "a photo decoded fast", 0.999)
    medians = take_turns(
        {
            "exact": lambda: preprocess([miniclip.open_image(path)]),
            "fast": lambda: preprocess([draft_of(path, preprocess.size)]),
        },
        options.rounds,
    )
    work = "opt-in fast JPEG decoding and preprocessing, 12 megapixels"
    yield Row(work, "our exact path", medians["exact"] / medians["fast"], 6, 8, medians=medians)


def draft_of(path: Path, size: int) -> Image.Image:
    return miniclip.open_image(path, min_side=size * 3 // 2)


# -- a process of its own ---------------------------------------------------------------------------------------------

_MINICLIP = """
import sys, miniclip
model, preprocess = miniclip.load(sys.argv[1], "cpu")
embedding = model.encode_image(preprocess([miniclip.open_image(sys.argv[2])]))
"""
_TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
model = CLIPModel.from_pretrained(sys.argv[1], attn_implementation="sdpa").eval()
pixels = CLIPImageProcessorPil.from_pretrained(sys.argv[1])(Image.open(sys.argv[2]), return_tensors="pt")
with torch.inference_mode():
    embedding = model.get_image_features(**pixels)
"""
# Not getrusage's: on Linux a process inherits that from the one that started it.
_PEAK = "\nprint(next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"


def start(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    folder = folders["ViT-B/32"]
    CLIPImageProcessorPil().save_pretrained(folder)
    picture = folder / "photo.png"
    photo(640, 480).save(picture)
    peaks: dict[str, list[float]] = {"miniclip": [], "transformers": []}

    def process(name: str, code: str) -> Work:
        def run() -> None:
            command = [sys.executable, "-c", code + _PEAK, str(folder), str(picture)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip has compiled transformers
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            peaks[name].append(float(done.stdout))

        return run

    contenders = {"miniclip": process("miniclip", _MINICLIP), "transformers": process("transformers", _TRANSFORMERS)}
    medians = take_turns(contenders, options.rounds)
    ratio = medians["transformers"] / medians["miniclip"]
    yield Row("from python to the first embedding", "transformers", ratio, 2.2, 2.6, medians=medians)
    memory = {name: statistics.median(values) for name, values in peaks.items()}
    share = memory["miniclip"] / memory["transformers"]
    yield Row("peak memory until then", "transformers", share, 1.2, 1.0, lower_is_better=True, medians=memory)


# -- a folder ---------------------------------------------------------------------------------------------------------


def folder(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    """``embed_images`` beside what its parts take alone: cores / (core-seconds of the model + of decoding)."""
    place = folders["ViT-B/32"]
    photos = place / "photos"
    photos.mkdir()
    different = min(100, options.photos)  # a file read for the second time is decoded all the same
    for n in range(options.photos):
        path = photos / f"{n:06}.jpg"
        if n < different:
            photo(640, 480).save(path, quality=90)
        else:
            os.link(photos / f"{n % different:06}.jpg", path)
    model, preprocess = miniclip.load(place, "cpu")
    items = sources.list_images(photos)[0][:BATCH]
    decoded = [embed.decode(item, preprocess, None) for item in items]
    pixels = [crop for crop in decoded if isinstance(crop, np.ndarray)]
    assert len(pixels) == len(items)
    done: list[miniclip.Summary] = []

    def run() -> None:
        done.append(
            miniclip.embed_images(
                photos, place / "vectors", place, device="cpu", batch_size=BATCH, workers=options.threads
            )
        )

    encode = partial(embed.encode, model, preprocess, pixels)
    parts: dict[str, Work] = dict(
        zip(PARTS, (encode, lambda: [embed.decode(item, preprocess, None) for item in items]))
    )
    before = take_turns(parts, options.rounds)
    run()
    after = take_turns(parts, options.rounds)  # a machine does not stay the same for minutes
    medians = {name: (before[name] + after[name]) / 2 / BATCH for name in parts}
    assert done[0].embedded == options.photos
    medians[f"embed, {options.photos:,} photos"] = done[0].seconds
    ideal = medians[PARTS[0]] + medians[PARTS[1]] / options.threads
    work = f"embed {options.photos:,} photos of 640 × 480, {done[0].seconds:.0f} s"
    yield Row(work, CORES, ideal * options.photos / done[0].seconds, 0.90, 0.95, medians=medians)


_SEARCH = """
import statistics, sys, threading, time, torch, miniclip
most, searching = 0, True
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    global most
    while searching:
        most = max(most, anonymous())
        time.sleep(0.001)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
index = miniclip.Index.open(sys.argv[1])
query = torch.nn.functional.normalize(torch.randn(index.dimension), dim=0)
index.nearest(query)
searching = False
watcher.join()
times = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    index.nearest(query)
    times.append(time.perf_counter() - start)
print(most - before, statistics.median(times))
"""


def search(options: argparse.Namespace, folders: Mapping[str, Path]) -> Iterator[Row]:
    """Exact search over vectors on disk, beside numpy on the same files and on a matrix in memory, twice as large."""
    place = folders["ViT-B/32"]
    millions = store.EmbeddingStore(place / "million")
    settings = {"batch_size": BATCH, "shard_size": min(10_000, options.vectors), "fast_decode": False}
    model, preprocess = miniclip.load(place, "cpu")
    millions.open_run(manifest.run_settings(place, model, preprocess, **settings))
    width = model.config.embed_dim
    randoms = torch.Generator().manual_seed(0)
    millions.plan([sources.ImageSource(f"{n:07}.jpg", 0, 0) for n in range(options.vectors)], settings["shard_size"])
    for shard in millions.planned():
        items = shard.read_listing()
        vectors = F.normalize(torch.randn(len(items), width, generator=randoms), dim=1).half().numpy()
        shard.write(shard_files.Shard(vectors, [*range(len(items))], {}))
    index = miniclip.Index.open(millions.folder)
    assert len(index) == options.vectors
    query = F.normalize(torch.randn(width, generator=randoms), dim=0)

    def numpy(parts: Iterable[np.ndarray]) -> list[int]:
        scores = np.concatenate([part.astype(np.float32, copy=False) @ query.numpy() for part in parts])
        best = np.argpartition(-scores, 10)[:10]
        order: list[int] = best[np.argsort(-scores[best])].tolist()
        return order

    contenders: dict[str, Work] = {
        "numpy, float32 in memory": partial(numpy, [np.concatenate([*index.vectors()]).astype(np.float32)]),
        "numpy, the same files": lambda: numpy(index.vectors()),
    }
    for name, contender in contenders.items():
        if [int(match.path[:-4]) for match in index.nearest(query)] != contender():
            raise SystemExit(f"benchmarks: {name} finds others")
    medians = take_turns({"miniclip": partial(index.nearest, query), **contenders}, options.rounds)
    work = f"search, {options.vectors:,} vectors of {width}"
    yield Row(work, name, medians[name] / medians["miniclip"], 1.0, 1.0, medians=medians)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-c", _SEARCH, str(millions.folder), str(options.rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    taken, seconds = map(float, done.stdout.split())
    work += ", in a process of its own"
    yield Row(f"{work}: {seconds:.2f} s", "0.3 s", 0.3 / seconds, 1.0, 1.5, medians={"miniclip": seconds})
    row = Row(f"{work}: {taken / 1e6:.0f} MB", "300 MB", taken / 300e6, 1.0, 0.5, lower_is_better=True)
    yield replace(row, medians={"miniclip": taken})


# -- CUDA -------------------------------------------------------------------------------------------------------------


def cuda(options: argparse.Namespace, folders: Mapping[str, Path], device: str = "cuda") -> Iterator[Row]:
    """Half precision at four batch sizes beside transformers, eager and compiled. Runs where there is a GPU."""

    def finished(work: Work) -> Work:
        def run() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    for name, folder in folders.items():
        for dtype in (torch.float16, torch.bfloat16):
            model, _ = miniclip.load(folder, device, dtype=dtype)
            theirs: Any = peers.transformers_model(folder, dtype)
            theirs = theirs.to(device)
            size, kind = model.visual.input_resolution, str(dtype).removeprefix("torch.")
            towers: dict[str, tuple[peers.Encoder, peers.Encoder]] = {
                "images": (model.encode_image, peers.images_of(theirs))
            }
            if name == "ViT-B/32":
                towers["texts"] = (model.encode_text, peers.texts_of(theirs))
            for what, (ours, eager) in towers.items():
                compiled = peers.compiled(theirs, what)
                for batch in options.batches:
                    if what == "images":
                        given = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
                    else:
                        tokens = miniclip.tokenize(captions(batch, 36), truncate=True).long()
                        given = tokens[:, : int((tokens > 0).sum(dim=1).max())].to(device)  # cut for both
                    agree(ours(given), eager(given), f"{name} {what} in {kind}", 0.999)
                    contenders = {"miniclip": ours, "transformers": eager, "transformers, compiled": compiled}
                    medians = take_turns(
                        {peer: finished(partial(encode, given)) for peer, encode in contenders.items()}, options.rounds
                    )
                    for peer in ("transformers", "transformers, compiled"):
                        ratio, work = medians[peer] / medians["miniclip"], f"{name} {what}, batch {batch}, {kind}, CUDA"
                        yield Row(work, peer, ratio, 1.0, 1.5, medians=medians)
                    if (name, what, batch) == ("ViT-B/16", "images", 256):
                        a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
                        seconds = take_turns({"matmul": finished(partial(torch.matmul, a, b))}, options.rounds)[
                            "matmul"
                        ]
                        share = GFLOP[name] * 1e9 * batch / medians["miniclip"] / (2 * 8192**3 / seconds)
                        work = f"{name} images, batch {batch}, {kind}, CUDA: nominal FLOPs"
                        yield Row(work, "matmul peak", share, 0.4, 0.5, medians={"matmul": seconds, **medians})


# -- the report -------------------------------------------------------------------------------------------------------

SECTIONS = {"images": images, "texts": texts, "tokenizer": tokenizer, "preprocessing": preprocessing, "start": start}
SECTIONS |= {"embed": folder, "search": search}
if torch.cuda.is_available():
    SECTIONS["cuda"] = cuda


def table(rows: Iterable[Row]) -> str:
    lines = ["| work | beside | ratio | least | aim | reached |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = [f"{value:.0%}" if row.beside in SHARES else f"{value:.2f}×" for value in (row.ratio,)]
        bounds = [f"{'≤ ' if row.lower_is_better else ''}{bound:g}×" for bound in (row.least, row.aim)]
        if row.beside in SHARES:
            bounds = [f"{bound:.0%}" for bound in (row.least, row.aim)]
        work = row.work
        if row.beside == CORES:
            model, decoding = (1e3 * row.medians[part] for part in PARTS)
            work += f" (each: model {model:.0f} ms on all cores, decoding {decoding:.1f} ms on one)"
        lines.append(f"| {' | '.join([work, row.beside, *numbers, *bounds, row.verdict])} |")
    return "\n".join(lines)


def draw(rows: list[Row], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speeds = [row for row in rows if row.beside not in SHARES and not row.lower_is_better]
    shares = [row for row in rows if row not in speeds]
    panels = [(part, name) for part, name in ((speeds, "times as fast"), (shares, "share")) if part]
    heights = [len(part) for part, _ in panels]
    figure, axes = plt.subplots(
        *(len(panels), 1),
        figsize=(10, 0.34 * sum(heights) + 1.6),
        dpi=130,
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    colours = {"aim": "#1b7837", "least": "#7fbf7b", "below": "#c2a5cf"}
    for ax, (part, name) in zip(axes[:, 0], panels):
        start = 1 if name == "times as fast" else 0
        for place, row in enumerate(reversed(part)):
            ax.barh(place, row.ratio - start, left=start, color=colours[row.verdict], height=0.7)
            ax.plot([row.least] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.5)
            right = max(row.ratio, row.least, start)
            ax.annotate(f"{row.ratio:.2f}", (right, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_yticks(range(len(part)), [f"{row.work} | {row.beside}" for row in reversed(part)], fontsize=8)
        ax.set_xlabel(name, fontsize=8)
        if start:
            ax.set_xscale("log")
            ticks = [0.5, 1, 2, 5, 10, 20, 50]
            ax.set_xlim(0.5, 80)
            ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=8)
            ax.minorticks_off()
            ax.axvline(1, color="0.5", linewidth=0.8)
        else:
            ax.set_xlim(0, 1.5)
            ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    legend = "black lines: the least that was asked for; green where it is reached, dark where the aim is too"
    figure.suptitle(f"{title}\n{legend}", fontsize=9)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections",
        nargs="*",
        choices=[*SECTIONS, []],
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 1024], help="on CUDA")
    parser.add_argument("--photos", type=int, default=10_000, help="in the folder that is embedded (default: 10,000)")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="that are searched (default: 1,000,000)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where JSON and chart go")
    options = parser.parse_args()

    versions = peers.check()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows: list[Row] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for name in GFLOP:
            folders[name] = Path(temporary) / name.replace("/", "-")
            seeded_checkpoint(hub.KNOWN[name].config, folders[name])
        for section in options.sections or SECTIONS:
            for row in SECTIONS[section](options, folders):
                row.section = section
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    machine: dict[str, Any] = {"cpu": peers.cpu(), "threads": options.threads, "platform": platform.platform()}
    machine["capability"] = torch.backends.cpu.get_cpu_capability()
    for dtype in (torch.float32, torch.bfloat16):
        machine[f"packed {str(dtype).removeprefix('torch.')}"] = fast.has_packed_kernels(dtype)
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions |= {"python": platform.python_version(), "torch": torch.__version__, "miniclip": miniclip.__version__}
    where, minutes = f"{machine['cpu']}, {options.threads} threads", (time.perf_counter() - began) / 60
    print(f"\n{where}; {minutes:.0f} minutes\n\n{table(rows)}")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"cpu-{date.today()}"
    if options.sections:  # in their places in today's table, if there is one
        try:
            before = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if (before["machine"], before["versions"]) != (machine, versions):
            raise SystemExit(f"benchmarks: {stem}.json is of another machine or other versions, and stays as it is")
        old = [Row(**row) for row in before["rows"]]
        sections = dict.fromkeys(row.section for row in [*old, *rows])
        new = set(options.sections)
        rows = [row for name in sections for row in (rows if name in new else old) if row.section == name]
        print(f"\n{table(rows)}")
    result = {
        "date": str(date.today()),
        "machine": machine,
        "versions": versions,
        "rows": [asdict(row) for row in rows],
    }
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"miniclip beside its peers, {date.today()}: {where}, torch {torch.__version__}"
    draw(rows, title, stem.with_suffix(".png"))
    print(f"\n{stem}.json and .png")


if __name__ == "__main__":
    main()
