"""Exact search over a folder that ``embed_images`` made: the nearest of all its vectors, none left out."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.embed import absolute, model_settings
from miniclip.errors import CheckpointError, ConfigError, InputError, UnknownModelError
from miniclip.loading import load
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.store import Store
from miniclip.tokenizer import tokenize

# Rows that are widened to float32 at a time: 512 numbers in each make 8 MB, which stays in the caches. Fewer would be
# faster by a tenth, and far slower in a process with other threads, where torch's own sleep between two operations.
_ROWS = 4096


@dataclass(frozen=True)
class Match:
    """A picture that was found: where it lies, and its score.

    The score is the cosine of its vector and the query's, as far as a vector in float16 has a length of 1: a picture's
    own may be 1.0003.
    """

    path: str
    score: float


class Index:
    """The vectors of a folder, in memory only as far as the system keeps files there.

    Attributes:
        manifest: what is known of how the vectors were made.
    """

    def __init__(
        self, store: Store, manifest: dict[str, Any], shards: Sequence[int], vectors: Sequence[Tensor], model: str
    ) -> None:
        self.manifest = manifest
        self._store = store
        self._shards = shards
        self._vectors = vectors
        self._ends = list(accumulate(len(part) for part in vectors))
        self._name = model
        self._model: tuple[CLIP, Preprocess] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Index:
        """The complete shards of a folder; those of a run that is still going on come with the next opening.

        ``model`` says where the model of the vectors is, if that has changed since they were made.

        Raises:
            ConfigError: if it is not such a folder, holds no vectors, or a file of it is damaged.
            StorageError: if the system cannot map its files.
        """
        store = Store(Path(folder))
        manifest = store.manifest()
        if manifest is None:
            raise ConfigError(f"{folder} has no manifest.json: miniclip embed makes one")
        shards = {number: rows for number in store.complete() if (rows := store.rows(number))}
        if not shards:
            raise ConfigError(f"{folder} holds no vectors yet")
        vectors = [store.load(number, rows) for number, rows in shards.items()]
        name = str(manifest["model"]) if model is None else absolute(model)
        return cls(store, manifest, list(shards), vectors, name)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def dimension(self) -> int:
        return int(self._vectors[0].shape[1])

    def search(self, text: str | None = None, image: Image.Image | None = None, k: int = 10) -> list[Match]:
        """The ``k`` pictures nearest to a text, to a picture, or to the mean of both, best first.

        The first search loads the model the vectors were made with.

        Raises:
            InputError: for neither text nor image, or a ``k`` below 1.
            TypeError: if the text is not one, the image not PIL's, or ``k`` no int.
            TextTooLongError: if the text does not fit into the model's context.
            CheckpointError: if the model is another than it was.
            Those of ``load``.
        """
        _check(k)
        return self.nearest(self.embed(text, image), k)

    def embed(self, text: str | None = None, image: Image.Image | None = None) -> Tensor:
        """The unit vector (D,) of a query. Raises what ``search`` does."""
        if text is None and image is None:
            raise InputError("what to search for? Give a text, an image, or both")
        if not isinstance(text, str | None):
            raise TypeError(f"a search is for one text, got {type(text).__name__}")
        model, preprocess = self._load()
        parts = []
        with torch.inference_mode():
            if text is not None:
                tokens = tokenize(text, model.context_length).to(model.device)
                parts.append(F.normalize(model.encode_text(tokens)[0].float(), dim=0))
            if image is not None:
                pixels = preprocess([image]).to(model.device)
                parts.append(F.normalize(model.encode_image(pixels)[0].float(), dim=0))
            return F.normalize(torch.stack(parts).mean(dim=0), dim=0).cpu()

    def nearest(self, query: Tensor, k: int = 10) -> list[Match]:
        """The ``k`` pictures nearest to a unit vector (D,), best first; of equals the one that was listed first.

        Raises:
            InputError: for a vector of another size, not finite or far from length 1, or a ``k`` below 1.
            TypeError: if ``k`` is no int.
        """
        _check(k)
        if tuple(query.shape) != (self.dimension,):
            raise InputError(f"the query must be a vector of {self.dimension}, got {tuple(query.shape)}")
        query = query.detach().float().cpu()
        if not (length := query.double().norm().item()) < 1e3:  # or not finite
            raise InputError(f"the query must be a unit vector, and its length is {length:g}")
        best = self._best(query, k)
        return [Match(path, score) for path, (_, score) in zip(self.paths(row for row, _ in best), best)]

    def _best(self, query: Tensor, k: int) -> list[tuple[int, float]]:
        """The rows of the ``k`` highest scores, with these.

        float32 finds all that may be among them, float64 decides: a sum in float32 also depends on where in a block
        a row lies, and equal rows must score the same.
        """
        scores = self._scores(query)
        # What a sum of D products in float32 may be off by, for unit vectors: D units in the last place.
        error = self.dimension * torch.finfo(torch.float32).eps * query.norm().item()
        rows = (scores >= scores.topk(min(k, len(scores))).values[-1] - 2 * error).nonzero()[:, 0]
        exact = torch.cat([(part.double() * query.double()).sum(dim=1) for part in self._gathered(rows)])
        best = exact.sort(descending=True, stable=True)
        return list(zip(rows[best.indices[:k]].tolist(), best.values[:k].tolist()))

    def _scores(self, query: Tensor) -> Tensor:
        """The product (rows,) of every vector and the query, in float32."""
        scores, start = torch.empty(len(self)), 0
        # One buffer for all: what is allocated and freed a thousand times over, malloc may scatter over gigabytes.
        buffer = torch.empty(_ROWS, self.dimension)
        for part in self._vectors:
            for rows in part.split(_ROWS):  # views of the file
                wide = buffer[: len(rows)].copy_(rows)
                torch.mv(wide, query, out=scores[start : start + len(rows)])
                start += len(rows)
        return scores

    def _gathered(self, rows: Tensor) -> Iterator[Tensor]:
        """The vectors of these rows, which are in order, a few thousand at a time."""
        start = 0
        for part, end in zip(self._vectors, self._ends):
            first, last = torch.searchsorted(rows, torch.tensor([start, end])).tolist()
            for chosen in (rows[first:last] - start).split(_ROWS):
                yield part[chosen]
            start = end

    def paths(self, rows: Iterable[int]) -> list[str]:
        """What the pictures of these rows are called.

        Raises:
            InputError: for a row that is not there.
            ConfigError: if a file of the folder is damaged.
        """
        columns: dict[int, Any] = {}
        found = []
        for row in rows:
            if not 0 <= row < len(self):
                raise InputError(f"there are rows 0 to {len(self) - 1:,}, not {row:,}")
            part = bisect_right(self._ends, row)
            if part not in columns:
                columns[part] = self._store.paths(self._shards[part], len(self._vectors[part]))
            found.append(columns[part][row - (self._ends[part - 1] if part else 0)].as_py())
        return found

    def vectors(self) -> Iterator[np.ndarray]:
        """The shards' vectors in order, each (rows, D) float16, mapped from their files."""
        return (part.numpy() for part in self._vectors)

    def _load(self) -> tuple[CLIP, Preprocess]:
        if self._model is None:
            try:
                model, preprocess = load(self._name)
            except UnknownModelError as error:
                raise UnknownModelError(f"{error}; if the model of these vectors has moved, say where it is") from None
            if differing := self._store.difference(model_settings(self._name, model, preprocess)):
                name, before, now = differing
                raise CheckpointError(
                    f"the vectors of {self._store.folder} were made with {name} {before!r}, and {self._name} has "
                    f"{now!r}: embed again into another folder, or say where the model is that made them"
                )
            self._model = model, preprocess
        return self._model


def _check(k: int) -> None:
    if type(k) is not int:
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
