"""What the validation, the benchmarks and the tests share: inputs and checkpoints made without miniclip's own code."""

from __future__ import annotations

import gzip
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
from miniclip.huggingface import config_to_dict


def sample_images() -> list[Image.Image]:
    """Four RGB images that scikit-image ships. Their sizes need both roundings of the centre crop."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return [Image.open(folder / name).convert("RGB") for name in names]


def openai_pixels(images: Sequence[Image.Image], processor: CLIPImageProcessorPil) -> Tensor:
    """openai/CLIP's preprocessing by Pillow and torch, with the settings of ``processor``.

    (torchvision, which openai/CLIP uses, is not needed: tests/data holds its own outputs.)

    Returns:
        (N, 3, S, S), float32, normalised.
    """
    short, size = processor.size["shortest_edge"], processor.crop_size["height"]
    batch = []
    for image in images:
        scale = min(image.size)
        width, height = (short if side == scale else int(short * side / scale) for side in image.size)
        # torchvision's centre crop uses Python's round, which rounds a half to the even side
        left, top = round((width - size) / 2), round((height - size) / 2)
        crop = image.resize((width, height), processor.resample).crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(crop.convert("RGB"))).permute(2, 0, 1).float().div(255)
        batch.append(pixels)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (torch.stack(batch) - mean) / std


def reference_tokenizer() -> CLIPTokenizer:
    """Hugging Face's tokenizer (in Rust) with the package's merges: another algorithm over the same table."""
    table = gzip.decompress((files("miniclip") / "data" / "merges.txt.gz").read_bytes()).decode()
    merges: list[Any] = [tuple(line.split(" ")) for line in table.splitlines()]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def token_ids(texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
    """Hugging Face's ids, (N, L): once padded with zeros, as OpenAI does, and once with the end token."""
    encoded = reference_tokenizer()(
        list(texts), padding="max_length", truncation=True, max_length=context_length, return_tensors="pt"
    )
    return encoded.input_ids * encoded.attention_mask, encoded.input_ids


def seeded_checkpoint(config: miniclip.CLIPConfig, folder: Path, seed: int = 0) -> None:
    """Write a random Hugging Face checkpoint of an architecture. No bias is zero and no gain is one.

    Every matrix keeps the variance of its input. transformers' own initial matrices are so small that every token
    attends almost evenly to all others. In half precision that would hide a swapped query and key.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = CLIPModel(hf_config(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(4.6052)  # ln 100, the largest value that OpenAI's training allows
            elif parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    with quiet_transformers():
        model.save_pretrained(folder)
    torch.random.set_rng_state(state)


def hf_config(config: miniclip.CLIPConfig) -> CLIPConfig:
    """An architecture as transformers' configuration."""
    return CLIPConfig(**config_to_dict(config))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and notes, but not the bars of a later download."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
