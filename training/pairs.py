"""The data of a run: images with captions, tokens, and batches that depend on the seed alone."""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import prompts
import shared
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

import miniclip

Captions = dict[str, list[str]]  # an image's path within the folder -> its captions, the first of which is its concept
BEGINNING = 0.1  # the first share of a run, without --later's images and without neighbours
DECODED_BYTES = 2**29  # of drawings that a process keeps in memory: all of the demo's, and not all of a million


class Pair(NamedTuple):
    """An image and C of its captions."""

    pixels: Tensor  # RGBA (4, S, S) uint8
    tokens: Tensor  # (C, L) token ids
    captions: list[str]  # C, as captions.csv has them
    truths: frozenset[str]  # all captions of the image's concept


class Batch(NamedTuple):
    """N images, each with C captions."""

    pixels: Tensor  # RGBA (N, 4, S, S) uint8
    tokens: Tensor  # (C, N, L) token ids
    also_true: Tensor  # (C, N, N) bool: the caption of column j is true of image i as well, though it is another pair's

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def read_captions(folder: Path) -> Captions:
    captions = shared.read_captions(folder)
    if not has_contrast(captions):
        raise SystemExit(f"{folder} has {len(captions)} images, and training needs two with different captions")
    return captions


def has_contrast(captions: Captions) -> bool:
    """Whether there are two concepts: with a single one the loss has nothing to tell apart."""
    return len({texts[0] for texts in captions.values()}) >= 2


def split(captions: Captions, validation: float, seed: int) -> tuple[Captions, Captions]:
    """Hold out a share of the images, drawn at random. Returns the training images, then the validation images."""
    names = list(captions)
    random.Random(seed).shuffle(names)
    held_out = set(names[: round(validation * len(names))])
    training = {name: texts for name, texts in captions.items() if name not in held_out}
    return training, {name: texts for name, texts in captions.items() if name in held_out}


def known_words(captions: Captions, model: miniclip.CLIP, prompted: bool) -> Tensor:
    """The ids of all tokens that occur in a caption or, if the captions are prompted, in a prompt, (K,) int64."""
    texts = sorted({text for group in captions.values() for text in group})
    if prompted:
        texts += [template.format(name="", a=article) for template in prompts.TEMPLATES for article in ("a", "an")]
    return miniclip.tokenize(texts, model.context_length, truncate=True).long().unique()


def unknown_words(captions: Captions, model: miniclip.CLIP, prompted: bool) -> Tensor:
    """The ids of all other tokens, (vocabulary - K,) int64."""
    known = known_words(captions, model, prompted)
    return torch.ones(model.vocab_size, dtype=torch.bool).index_fill(0, known, False).nonzero()[:, 0]


class Pairs(Dataset[Pair | None]):
    """(step, image) -> an image and one of its captions, or two with --two-captions.

    The same key always gives the same pair.

    Step -1 stands for validation: the central square instead of a random crop.
    """

    def __init__(
        self,
        captions: Captions,
        options: argparse.Namespace,
        model: miniclip.CLIP,
        unknown: Sequence[int] = (),  # ids of unknown words, which are put into some of the captions
    ) -> None:
        self.folder: Path = options.data
        self.names = list(captions)
        self.captions = list(captions.values())
        self.seed, self.crops = options.seed, options.augment == "photos"
        self.size, self.context_length = model.config.vision.image_size, model.context_length
        self.unknown, self.unknown_share = unknown, options.unknown_words
        self.prompts: float = options.prompts
        self.two_captions: bool = options.two_captions
        self.first_caption: float = options.first_caption
        self.reported: set[str] = set()
        self.decoded: dict[str, Tensor] = {}  # small drawings, each of which is used many times
        self.decoded_limit = DECODED_BYTES // (4 * self.size**2)
        truths: dict[str, set[str]] = {}
        for texts in self.captions:
            truths.setdefault(texts[0], set()).update(texts)
        self.truths = {concept: frozenset(texts) for concept, texts in truths.items()}

    def __getitem__(self, key: tuple[int, int]) -> Pair | None:
        """The pair, or None if the image cannot be read."""
        step, index = key
        name, rng = self.names[index], random.Random(f"{self.seed} {step} {index}")
        try:
            pixels = self.decoded.get(name)
            if pixels is None:
                pixels = open_square(self.folder / name, self.size, rng if self.crops and step >= 0 else None)
            if not self.crops and len(self.decoded) < self.decoded_limit:
                self.decoded[name] = pixels
        except miniclip.ImageError as error:
            if name not in self.reported:
                self.reported.add(name)
                print(f"\ntrain.py: left out: {error}", file=sys.stderr, flush=True)
            return None
        first, captions = self.captions[index][0], self.drawn(self.captions[index], rng)
        tokens = torch.stack([self.tokens(caption, rng) for caption in captions])
        return Pair(pixels, tokens, captions, self.truths[first])

    def drawn(self, captions: list[str], rng: random.Random) -> list[str]:
        """Those of an image's captions that this step uses."""
        first = captions[0]
        if self.two_captions:
            return [first, rng.choice([text for text in captions if text != first] or [first])]
        if rng.random() < self.first_caption:
            return [first]
        return [rng.choice(captions)]

    def tokens(self, caption: str, rng: random.Random) -> Tensor:
        """The token ids (L,) of the caption, which may be put into a sentence or get unknown words."""
        text = prompts.sentence(caption, rng) if rng.random() < self.prompts else caption
        tokens = miniclip.tokenize(text, self.context_length, truncate=True)[0]
        if self.unknown and rng.random() < self.unknown_share:
            tokens = with_unknown_words(tokens, self.unknown, rng)
        return tokens


def open_square(path: Path, size: int, rng: random.Random | None) -> Tensor:
    """A square of the image as (4, size, size) uint8: red, green, blue and opacity. Random with ``rng``, else central.

    Section 2.5 of the paper: a random square crop is the only augmentation of photos.
    """
    try:
        with Image.open(path) as opened:
            transparent = "A" in opened.getbands() or "transparency" in opened.info
            image = ImageOps.exif_transpose(opened).convert("RGBA") if transparent else None
    except Exception:
        image = None  # open_image, below, says what is wrong with the file
    image = image or miniclip.open_image(path).convert("RGBA")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if rng is not None:
        side = max(1, round(side * rng.uniform(0.85, 1)))
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 4).permute(2, 0, 1)


def with_unknown_words(tokens: Tensor, unknown: Sequence[int], rng: random.Random) -> Tensor:
    """Insert one to three unknown words between the start and the end token of a row (L,), as far as there is room."""
    ids = tokens[: int(tokens.argmax()) + 1].tolist()
    for _ in range(min(rng.randint(1, 3), len(tokens) - len(ids))):
        ids.insert(rng.randint(1, len(ids) - 1), rng.choice(unknown))
    return F.pad(torch.tensor(ids, dtype=tokens.dtype), (0, len(tokens) - len(ids)))


def collate(pairs: list[Pair | None]) -> Batch | None:
    """The readable pairs as one batch, or None if fewer than two are left."""
    readable = [pair for pair in pairs if pair is not None]
    if len(readable) < 2:
        return None
    pixels, tokens, captions, truths = zip(*readable)
    also_true = torch.tensor([[[text in known for text in drawn] for known in truths] for drawn in zip(*captions)])
    also_true.diagonal(dim1=1, dim2=2).fill_(False)
    return Batch(torch.stack(pixels), torch.stack(tokens, dim=1), also_true)


class Batches(Sampler[list[tuple[int, int]]]):
    """The keys of Pairs for the steps ``start`` to ``end`` of an endless reshuffling.

    The order depends on the seed alone, so a resumed run sees what an uninterrupted one would have seen.

    A batch never holds two images of one concept (the same first caption). Either caption would be right for the
    other image, and the loss would push them apart.

    In about the first tenth of a run the images that match --later are left out, and no neighbours are put together.
    The epoch in which the tenth ends is finished, but never beyond a fifth of the run.
    """

    def __init__(self, captions: Captions, options: argparse.Namespace, start: int, end: int) -> None:
        self.concepts = [texts[0] for texts in captions.values()]
        self.batch_size, self.seed, self.neighbours = options.batch_size, options.seed, options.neighbours
        self.start, self.end = start, end
        # Without --later and --neighbours the beginning is like the rest of the run.
        self.beginning = BEGINNING * options.steps if options.later or options.neighbours > 1 else 0
        self.early = {index for index, name in enumerate(captions) if not fnmatchcase(name, options.later)}

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = epoch = 0
        while True:
            beginning = step < self.beginning
            for batch in self.epoch(epoch, beginning):
                if step == self.end:
                    return
                if beginning and step >= 2 * self.beginning:
                    break  # an epoch may be longer than the run
                if step >= self.start:
                    yield [(step, index) for index in batch]
                step += 1
            epoch += 1

    def epoch(self, number: int, beginning: bool = False) -> list[list[int]]:
        """All batches of an epoch. Each image goes into the first batch that has room and lacks its concept."""
        rng, count = random.Random(f"{self.seed} {number}"), len(self.concepts)
        together = 1 if beginning else self.neighbours
        starts = list(range(-rng.randrange(together), count, together))
        rng.shuffle(starts)
        order = [index for start in starts for index in range(max(start, 0), min(start + together, count))]
        if beginning:
            order = [index for index in order if index in self.early]
        if self.batch_size > len({self.concepts[index] for index in order}):
            return self.rounds(order)
        batches: list[list[int]] = []
        held: list[set[str]] = []  # the concepts of each batch
        first_open = 0  # all batches before this one are full
        for index in order:
            concept = self.concepts[index]
            place = first_open
            while place < len(batches) and (len(batches[place]) == self.batch_size or concept in held[place]):
                place += 1
            if place == len(batches):
                batches.append([])
                held.append(set())
            batches[place].append(index)
            held[place].add(concept)
            while first_open < len(batches) and len(batches[first_open]) == self.batch_size:
                first_open += 1
        return [batch for batch in batches if len(batch) == self.batch_size] or [max(batches, key=len)]

    def rounds(self, order: list[int]) -> list[list[int]]:
        """The batches if there are fewer concepts than a batch holds: each has every concept, with changing images."""
        images: dict[str, list[int]] = {}
        for index in order:
            images.setdefault(self.concepts[index], []).append(index)
        count = max(map(len, images.values()))
        return [[group[turn % len(group)] for group in images.values()] for turn in range(count)]
