"""Exact search in a folder that ``embed_images`` made: the query is compared with every vector."""

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

from miniclip.errors import CheckpointError, ConfigError, InputError, UnknownModelError
from miniclip.loading import load
from miniclip.manifest import canonical_name, first_difference, model_fingerprint
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.shard_files import ShardFiles
from miniclip.store import EmbeddingStore
from miniclip.tokenizer import tokenize

# Rows that are converted to float32 at a time. 512 numbers per row make 8 MB, which stays in the caches. Fewer rows are
# up to a tenth faster alone, but far slower when other threads run, because torch's threads sleep between operations.
_ROWS = 4096


@dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
        path: where the image lies.
        score: the cosine of the image's vector and the query. float16 rounding makes vector lengths 1 ± 0.0003, so an
            image may score 1.0003 against itself.
    """

    path: str
    score: float


class Index:
    """The vectors of a folder, memory-mapped. ``Index.open`` makes one.

    Attributes:
        manifest: the content of manifest.json: how the vectors were computed.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        shards: Sequence[ShardFiles],
        vectors: Sequence[Tensor],
        model: str,
    ) -> None:
        self.manifest = manifest
        self._folder = folder
        self._shards = shards
        self._vectors = vectors
        self._ends = list(accumulate(len(part) for part in vectors))  # of each shard, the row after its last
        self._model_name = model
        self._model: tuple[CLIP, Preprocess] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Index:
        """Open the complete shards of a folder. Shards that a run completes later need another ``open``.

        Args:
            folder: a folder that ``embed_images`` made.
            model: where the model of the vectors is now, if it has moved.

        Raises:
            ConfigError: if it is not such a folder, contains no vectors, or one of its files is damaged.
            StorageError: if the operating system cannot map its files.
        """
        store = EmbeddingStore(Path(folder))
        manifest = store.manifest()
        if manifest is None:
            raise ConfigError(f"{folder} has no manifest.json: is it a folder that miniclip embed made?")
        counts = {shard: count for shard in store.complete() if (count := shard.count_vectors())}
        if not counts:
            raise ConfigError(f"{folder} contains no vectors yet")
        vectors = [shard.map_vectors(count) for shard, count in counts.items()]
        name = str(manifest["model"]) if model is None else canonical_name(model)
        return cls(store.folder, manifest, list(counts), vectors, name)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def dimension(self) -> int:
        """The number of components of a vector, D."""
        return int(self._vectors[0].shape[1])

    def search(self, text: str | None = None, image: Image.Image | None = None, k: int = 10) -> list[Match]:
        """Find the ``k`` images nearest to a text, to an image, or to the mean of both.

        The first search loads the model that made the vectors.

        Args:
            text: what to look for.
            image: an image to compare with.
            k: how many images to return.

        Returns:
            The images, best first.

        Raises:
            InputError: if neither text nor image is given, or ``k`` is below 1.
            TypeError: if the text is not a string, the image is not a PIL image, or ``k`` is not an int.
            TextTooLongError: if the text does not fit into the context of the model.
            CheckpointError: if the model has changed since it made the vectors.
            MiniclipError: as ``load`` does, if the model cannot be loaded.
        """
        _check_k(k)
        return self.nearest(self.encode_query(text, image), k)

    def encode_query(self, text: str | None = None, image: Image.Image | None = None) -> Tensor:
        """The unit vector (D,) float32 of a query. Arguments and errors are those of ``search``."""
        if text is None and image is None:
            raise InputError("the query is empty: give a text, an image, or both")
        if not isinstance(text, str | None):
            raise TypeError(f"the text of a query must be a str, got {type(text).__name__}")
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
        """Find the ``k`` images nearest to a unit vector (D,).

        Returns:
            The images, best first. Images with equal scores stay in the order in which they were listed.

        Raises:
            InputError: if the vector has another size, is not finite or far from length 1, or ``k`` is below 1.
            TypeError: if ``k`` is not an int.
        """
        _check_k(k)
        if tuple(query.shape) != (self.dimension,):
            raise InputError(f"the query must be a vector of {self.dimension} numbers, got shape {tuple(query.shape)}")
        query = query.detach().float().cpu()
        if not (length := query.double().norm().item()) < 1e3:  # also true for nan
            raise InputError(f"the query must be a unit vector, but its length is {length:g}")
        best = self._best(query, k)
        return [Match(path, score) for path, (_, score) in zip(self.paths(row for row, _ in best), best)]

    def _best(self, query: Tensor, k: int) -> list[tuple[int, float]]:
        """The rows with the ``k`` highest scores, and these scores.

        float32 selects the candidates, float64 decides. A sum in float32 also depends on the row's position in a block,
        but equal vectors must get equal scores.
        """
        scores = self._scores(query)
        # The largest error of a sum of D products in float32, for unit vectors: D units in the last place.
        error = self.dimension * torch.finfo(torch.float32).eps * query.norm().item()
        candidates = (scores >= scores.topk(min(k, len(scores))).values[-1] - 2 * error).nonzero()[:, 0]
        exact = torch.cat([(part.double() * query.double()).sum(dim=1) for part in self._gather(candidates)])
        best = exact.sort(descending=True, stable=True)
        return list(zip(candidates[best.indices[:k]].tolist(), best.values[:k].tolist()))

    def _scores(self, query: Tensor) -> Tensor:
        """The product of every vector and the query, (rows,) float32."""
        scores, start = torch.empty(len(self)), 0
        # One buffer for all blocks: allocating one for each may fragment the heap to gigabytes.
        buffer = torch.empty(_ROWS, self.dimension)
        for part in self._vectors:
            for rows in part.split(_ROWS):  # views of the mapped file
                block = buffer[: len(rows)].copy_(rows)
                torch.mv(block, query, out=scores[start : start + len(rows)])
                start += len(rows)
        return scores

    def _gather(self, rows: Tensor) -> Iterator[Tensor]:
        """The vectors of ``rows``, which are in ascending order, in blocks of at most ``_ROWS``."""
        start = 0
        for part, end in zip(self._vectors, self._ends):
            first, last = torch.searchsorted(rows, torch.tensor([start, end])).tolist()
            for block in (rows[first:last] - start).split(_ROWS):
                yield part[block]
            start = end

    def paths(self, rows: Iterable[int]) -> list[str]:
        """The paths of the images of ``rows``, which count over all shards from 0.

        Raises:
            InputError: if a row does not exist.
            ConfigError: if a file of the folder is damaged.
        """
        columns: dict[int, Any] = {}
        paths = []
        for row in rows:
            if not 0 <= row < len(self):
                raise InputError(f"row {row:,} does not exist: rows are 0 to {len(self) - 1:,}")
            part = bisect_right(self._ends, row)
            if part not in columns:
                columns[part] = self._shards[part].read_paths(len(self._vectors[part]))
            paths.append(columns[part][row - (self._ends[part - 1] if part else 0)].as_py())
        return paths

    def vectors(self) -> Iterator[np.ndarray]:
        """The vectors of each shard, in order: (rows, D) float16, memory-mapped."""
        return (part.numpy() for part in self._vectors)

    def _load(self) -> tuple[CLIP, Preprocess]:
        if self._model is None:
            try:
                model, preprocess = load(self._model_name)
            except UnknownModelError as error:
                raise UnknownModelError(f"{error}; if the model of these vectors has moved, say where it is") from None
            fingerprint = model_fingerprint(self._model_name, model, preprocess)
            if difference := first_difference(self.manifest, fingerprint):
                name, before, now = difference
                raise CheckpointError(
                    f"the vectors of {self._folder} were made with {name} {before!r}, but {self._model_name} has "
                    f"{now!r}: embed again into another folder, or say where the model is that made the vectors"
                )
            self._model = model, preprocess
        return self._model


def _check_k(k: int) -> None:
    if type(k) is not int:
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
