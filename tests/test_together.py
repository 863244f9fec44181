"""Many at once: threads of mixed calls, the worker processes of a DataLoader, and processes that load or download."""

# ruff: noqa: F811 (the parameters of the tests bear the names of imported fixtures)
from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, left_in, server  # noqa: F401 (a fixture)
from helpers import ROOT, make_image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import miniclip
from miniclip import CLIP, Preprocess

THREADS = 16
TEXTS = ["a cat", "a photo of a dog", "two red bicycles beside a wall"]


def mixed_calls(model: CLIP, preprocess: Preprocess, photo: Path) -> dict[str, Callable[[], Tensor]]:
    """Calls of every kind, by name. Each gives the same tensor every time, up to rounding."""
    images = [make_image(None, seed) for seed in range(5)]
    pixels = torch.stack([preprocess(image) for image in images])
    classifier = miniclip.ZeroShotClassifier(model, preprocess, ["cat", "dog", "bicycle"])
    tokens = miniclip.tokenize(TEXTS)
    return {
        "one image": lambda: model.encode_image(pixels[:1]),
        "images": lambda: model.encode_image(pixels),
        "one text": lambda: model.encode_text(tokens[:1]),
        "texts": lambda: model.encode_text(tokens),
        "logits": lambda: model(pixels[:2], tokens)[0],
        "probabilities": lambda: classifier.probabilities(pixels),
        "a new classifier": lambda: miniclip.ZeroShotClassifier(model, preprocess, ["cat", "dog"]).probabilities(
            pixels
        ),
        "tokens": lambda: miniclip.tokenize(TEXTS),
        "pixels": lambda: preprocess(images),
        "a file": lambda: preprocess(miniclip.open_image(photo)),
    }


@pytest.fixture
def loaded(tiny: Path) -> tuple[CLIP, Preprocess]:
    return miniclip.load(tiny, "cpu")


def test_16_threads_of_mixed_calls_equal_one_thread(
    loaded: tuple[CLIP, Preprocess], tiny: Path, tmp_path: Path
) -> None:
    """Some of the threads also load models of their own, and free the packed copies that the others use."""
    make_image(tmp_path / "photo.png", 9)
    calls = mixed_calls(*loaded, tmp_path / "photo.png")
    expected = {name: call() for name, call in calls.items()}
    start = threading.Barrier(THREADS)

    def work(seed: int) -> list[tuple[str, Tensor]]:
        choose = random.Random(seed)
        mine = mixed_calls(*miniclip.load(tiny, "cpu"), tmp_path / "photo.png") if seed % 4 == 0 else calls
        names = [choose.choice(list(calls)) for _ in range(40)]
        start.wait(60)
        results = []
        for name in names:
            if choose.random() < 0.1:
                loaded[0].repack()
            results.append((name, mine[name]()))
        return results

    with ThreadPoolExecutor(THREADS) as pool:
        given = [result for results in pool.map(work, range(THREADS)) for result in results]
    assert len(given) == THREADS * 40
    for name, tensor in given:
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


class Photos(Dataset[Tensor]):
    """As torchvision's ImageFolder: files and a transform."""

    def __init__(self, files: list[Path], transform: Callable[..., Tensor], model: CLIP | None = None) -> None:
        self.files, self.transform, self.model = files, transform, model

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self.transform(miniclip.open_image(self.files[index]))
        return pixels if self.model is None else self.model.encode_image(pixels[None])[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fork", "spawn"])
@pytest.mark.parametrize("encode", [False, True])
def test_the_workers_of_a_data_loader(way: str, encode: bool, loaded: tuple[CLIP, Preprocess], tmp_path: Path) -> None:
    """Preprocess as a DataLoader's transform, while the parent encodes; and workers that encode themselves.

    Sending a model to a process moves its weights into shared memory, in place. That must come before another thread
    computes with the weights: PyTorch frees the old memory at once.
    """
    model, preprocess = loaded
    if encode:
        model.share_memory()
    for n in range(12):
        make_image(tmp_path / f"{n:02}.png", n)
    photos = Photos(sorted(tmp_path.glob("*.png")), preprocess, model if encode else None)
    expected = torch.stack([photos[n] for n in range(12)])
    vectors = model.encode_image(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about forking beside threads
        loader = DataLoader(photos, batch_size=4, num_workers=2, multiprocessing_context=way, timeout=120)
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(lambda: [model.encode_image(torch.zeros(8, 3, 32, 32)) for _ in range(20)])
            given = torch.cat(list(loader))
            work.result()
    if encode:
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(given, expected)
    again = model.encode_image(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(again, vectors, rtol=1e-4, atol=1e-5)


LOAD = """
import sys, torch, miniclip
sys.stdin.readline()  # until all processes are ready
model, preprocess = miniclip.load("owner/name", "cpu")
print(float(model.encode_image(torch.ones(1, 3, 32, 32)).double().abs().sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("downloaded", [False, True], ids=["downloading", "loading"])
def test_four_processes_download_and_load_at_once(
    downloaded: bool, server: FakeHub, tiny: Path, tmp_path: Path
) -> None:
    names = ("config.json", "model.safetensors")
    server.add("owner/name", {name: (tiny / name).read_bytes() for name in names})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    pipe = subprocess.PIPE

    def start(count: int) -> list[tuple[str, str]]:
        command = [sys.executable, "-c", LOAD]
        processes = [
            subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            for _ in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda process: process.communicate("go\n", timeout=120), processes))

    if downloaded:
        start(1)
    results = start(4)
    expected = float(miniclip.load(tiny, "cpu")[0].encode_image(torch.ones(1, 3, 32, 32)).double().abs().sum())
    for out, error in results:
        assert out, error
        assert float(out) == pytest.approx(expected, rel=1e-4)
    blobs = [path for path in left_in(tmp_path / "cache") if path.parent.name == "blobs"]
    assert len(blobs) == len(names)  # nothing half-written stays
