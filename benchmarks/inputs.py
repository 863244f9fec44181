"""What the contenders get: seeded checkpoints, images with a camera's noise, class names and captions."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # miniclip and its validation, of this checkout

from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
from miniclip import hub
from validation.reference import reference_tokenizer, sample_images, seeded_checkpoint

ROOT = Path(__file__).resolve().parent.parent
__all__ = ["ROOT", "camera_image", "captions", "checkpoint", "class_names", "reference_tokenizer"]


def checkpoint(name: str, folder: Path) -> Path:
    """Write a seeded checkpoint of a known architecture and transformers' preprocessing, once."""
    path = folder / name.replace("/", "-")
    if not path.exists():
        seeded_checkpoint(hub.KNOWN[name].config, path)
        CLIPImageProcessorPil().save_pretrained(path)
    return path


def camera_image(width: int, height: int) -> Image.Image:
    """An image of this size, with the noise that a camera adds."""
    image = sample_images()[0].resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.effect_noise((width, height), 24).convert("RGB")
    return Image.blend(image, noise, 0.1)


def words(seed: int = 0, rare: float = 0.0) -> Iterator[str]:
    """English words with the frequencies of a text: the tokenizer's own whole words, some of them often.

    A share of ``rare`` of them comes from 50,000 words of two or three tokens, which recur as rarely as such words do.
    """
    tokenizer, pick = miniclip.Tokenizer(), random.Random(seed)
    decoded = [tokenizer.decode([number]) for number in range(512, 49_406)]
    whole = [token[:-1] for token in decoded if token.endswith(" ")]  # the token ends a word
    whole = [word for word in whole if word.isascii() and word.isalpha() and len(word) > 2]
    glue = random.Random(0)
    glued = ["".join(glue.choices(whole, k=glue.choice((2, 2, 3)))) for _ in range(50_000 if rare else 0)]
    while True:
        some = glued if pick.random() < rare else whole
        yield some[int(len(some) * pick.random() ** 3)]


def class_names(n: int) -> list[str]:
    """Names of one to three words, like ImageNet's."""
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
