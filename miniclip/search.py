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

from miniclip.dead_rows import DEATHS, MISSING
from miniclip.errors import CheckpointError, ConfigError, InputError, UnknownModelError
from miniclip.loading import load
from miniclip.manifest import canonical_name, describe_difference, model_fingerprint, remembered_sha256
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.shard_files import ShardFiles
from miniclip.sources import ImageSource
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
        missing: whether the last run over its source did not find the image. Only a search that asks for missing images
            returns any.
        row: the image's row in the index.
    """

    path: str
    score: float
    missing: bool
    row: int


class Index:
    """The vectors of a folder, memory-mapped. ``Index.open`` makes one.

    Attributes:
        manifest: the content of manifest.json: how the vectors were computed.
        dead: (rows,) bool: the images that are gone or have changed, which a search leaves out.
        missing: (rows,) bool: those that are gone.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        shards: Sequence[ShardFiles],
        vectors: Sequence[Tensor],
        dead: Tensor,
        missing: Tensor,
        model: str,
    ) -> None:
        self.manifest = manifest
        self.dead, self.missing = dead, missing
        self._folder = folder
        self._shards = shards
        self._vectors = vectors
        self._ends = list(accumulate(len(part) for part in vectors))  # of each shard, the row after its last
        self._model_name = model
        self._model: tuple[CLIP, Preprocess] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Index:
        """Open the complete shards of a folder. Shards that a run completes later need ``reopen``.

        Args:
            folder: a folder that ``embed_images`` made.
            model: where the model of the vectors is now, if it has moved.

        Raises:
            ConfigError: if it is not such a folder, contains no vectors, or one of its files is damaged.
            StorageError: if the operating system cannot map its files.
        """
        store = EmbeddingStore(Path(folder))
        manifest = store.require_manifest()
        if not isinstance(manifest.get("model"), str):
            raise ConfigError(f"the manifest of {folder} names no model")
        rows = {shard: found for shard in store.complete() if (found := shard.rows_with_vectors())}
        if not rows:
            raise ConfigError(f"{folder} contains no vectors yet")
        reasons = store.dead_rows()
        deaths = [reasons.get(shard.number, {}).get(row) for shard, listed in rows.items() for row in listed]
        dead, missing = (torch.tensor([death in kinds for death in deaths]) for kinds in (DEATHS, {MISSING}))
        vectors = [shard.map_vectors(len(listed)) for shard, listed in rows.items()]
        name = str(manifest["model"]) if model is None else canonical_name(model)
        return cls(store.folder, manifest, list(rows), vectors, dead, missing, name)

    def reopen(self) -> Index:
        """The folder as it is now: another index, which shares the loaded model. Errors are those of ``open``."""
        same = self._model_name == self.manifest["model"]
        index = Index.open(self._folder, None if same else self._model_name)
        if index.manifest == self.manifest:
            index._model = self._model
        return index

    @property
    def shards(self) -> Sequence[ShardFiles]:
        """The files of the shards that have vectors, in the order of the rows."""
        return self._shards

    def __len__(self) -> int:
        """The number of rows, dead ones included."""
        return self._ends[-1]

    @property
    def dimension(self) -> int:
        """The number of components of a vector, D."""
        return int(self._vectors[0].shape[1])

    def search(
        self,
        text: str | Sequence[str] | None = None,
        image: Image.Image | None = None,
        k: int = 10,
        *,
        without: str | Sequence[str] = (),
        template: str = "{}",
        truncate: bool = False,
        min_score: float | None = None,
        missing: bool = False,
    ) -> list[Match]:
        """Find the ``k`` images nearest to texts, to an image, or to both, and far from other texts.

        The query is the sum of the unit vectors of the texts and the image, minus those of the texts of ``without``,
        scaled to length 1. The first search loads the model that made the vectors.

        Args:
            text: what to look for: a text, or several whose vectors are added.
            image: an image to compare with.
            k: how many images to return.
            without: a text, or several, to stay away from.
            template: the prompt around each text, such as ``a photo of {}``.
            truncate: cut texts that are longer than the model's context, as ``tokenize`` does.
            min_score: leave out images with a lower score.
            missing: whether to return missing images too.

        Returns:
            The images, best first.

        Raises:
            InputError: if neither text nor image is given, the query cancels itself out, the template has no ``{}``, or
                ``k`` is below 1.
            TypeError: if a text is not a string, the image is not a PIL image, or ``k`` is not an int.
            TextTooLongError: if a text does not fit into the context of the model.
            CheckpointError: if the model has changed since it made the vectors.
            MiniclipError: as ``load`` does, if the model cannot be loaded.
        """
        _check_k(k)
        query = self.encode_query(text, image, without=without, template=template, truncate=truncate)
        matches = self.nearest(query, k, missing=missing)
        return [match for match in matches if min_score is None or match.score >= min_score]

    def encode_query(
        self,
        text: str | Sequence[str] | None = None,
        image: Image.Image | None = None,
        *,
        without: str | Sequence[str] = (),
        template: str = "{}",
        truncate: bool = False,
        start: Tensor | None = None,
    ) -> Tensor:
        """The unit vector (D,) float32 of a query. Arguments and errors are those of ``search``, but for one.

        Args:
            start: a vector (D,) to start from, such as ``vector(row)`` for "more like this one". Its unit vector is
                added to the others, and no text and no image is needed.
        """
        texts, others = _texts(text, "text"), _texts(without, "without")
        if not texts and image is None and start is None:
            raise InputError("the query is empty: give a text, an image, or both")
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no {{}} for the text")
        if start is not None and tuple(start.shape) != (self.dimension,):
            raise InputError(f"start must be a vector of {self.dimension} numbers, got shape {tuple(start.shape)}")
        model, preprocess = self.load()
        parts = []
        with torch.inference_mode():
            if start is not None:
                parts.append(F.normalize(start.to(model.device).float(), dim=0)[None])
            if texts or others:
                prompts = [template.replace("{}", each) for each in texts + others]
                tokens = tokenize(prompts, model.context_length, truncate).to(model.device)
                signs = torch.tensor([1.0] * len(texts) + [-1.0] * len(others), device=model.device)[:, None]
                parts.append(F.normalize(model.encode_text(tokens).float(), dim=1) * signs)  # (texts, D)
            if image is not None:
                pixels = preprocess([image]).to(model.device)
                parts.append(F.normalize(model.encode_image(pixels).float(), dim=1))
            total = torch.cat(parts).double().sum(dim=0)
            if total.norm() < 1e-3:
                raise InputError("the query cancels itself out: it looks for what it excludes")
            return F.normalize(total, dim=0).float().cpu()

    def nearest(self, query: Tensor, k: int = 10, *, missing: bool = False) -> list[Match]:
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
        best = self._best(query, k, self.dead & ~self.missing if missing else self.dead)
        paths = self.paths(row for row, _ in best)
        return [Match(path, score, bool(self.missing[row]), row) for path, (row, score) in zip(paths, best)]

    def _best(self, query: Tensor, k: int, hidden: Tensor) -> list[tuple[int, float]]:
        """The rows with the ``k`` highest scores that are not ``hidden`` (rows,), and these scores.

        float32 selects the candidates, float64 decides. A sum in float32 also depends on the row's position in a block,
        but equal vectors must get equal scores.
        """
        scores = self._scores(query).masked_fill_(hidden, -torch.inf)
        k = min(k, len(self) - int(hidden.sum()))
        if k == 0:
            return []
        # The largest error of a sum of D products in float32, for unit vectors: D units in the last place.
        error = self.dimension * torch.finfo(torch.float32).eps * query.norm().item()
        candidates = (scores >= scores.topk(k).values[-1] - 2 * error).nonzero()[:, 0]
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
        for part, place in map(self._place, rows):
            if part not in columns:
                columns[part] = self._shards[part].read_paths(len(self._vectors[part]))
            paths.append(columns[part][place].as_py())
        return paths

    def sources(self, rows: Iterable[int]) -> list[ImageSource]:
        """Where the images of ``rows`` lie. Errors are those of ``paths``."""
        listings: dict[int, list[ImageSource]] = {}
        sources = []
        for part, place in map(self._place, rows):
            if part not in listings:
                listing = self._shards[part].read_listing()
                listings[part] = [listing[row] for row in self._shards[part].rows_with_vectors()]
            sources.append(listings[part][place])
        return sources

    def _place(self, row: int) -> tuple[int, int]:
        """The shard of a row, and the row within the shard."""
        if not 0 <= row < len(self):
            raise InputError(f"row {row:,} does not exist: rows are 0 to {len(self) - 1:,}")
        part = bisect_right(self._ends, row)
        return part, row - (self._ends[part - 1] if part else 0)

    def vectors(self) -> Iterator[np.ndarray]:
        """The vectors of each shard, in order: (rows, D) float16, memory-mapped."""
        return (part.numpy() for part in self._vectors)

    def vector(self, row: int) -> Tensor:
        """The stored unit vector of a row, (D,) float32. Raises InputError if the row does not exist."""
        part, place = self._place(row)
        return self._vectors[part][place].float()

    def load(self) -> tuple[CLIP, Preprocess]:
        """The model that made the vectors, and its preprocessing. Errors are those of ``search``."""
        if self._model is None:
            try:
                model, preprocess = load(self._model_name)
            except UnknownModelError as error:
                raise UnknownModelError(f"{error}; if the model of these vectors has moved, say where it is") from None
            sha256 = remembered_sha256(self._folder, self._model_name)
            fingerprint = model_fingerprint(self._model_name, model, preprocess, sha256)
            if difference := describe_difference(self.manifest, fingerprint):
                raise CheckpointError(
                    f"the vectors of {self._folder} were made with {difference}: embed again into another folder, or "
                    "say where the model is that made the vectors"
                )
            self._model = model, preprocess
        return self._model


def _texts(given: str | Sequence[str] | None, name: str) -> list[str]:
    """One text or several as a list. Raises TypeError if one is not a string."""
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(each, str) for each in texts):
        raise TypeError(f"{name} must be a str or a list of str, got {given!r:.60}")
    return list(texts)


def _check_k(k: int) -> None:
    if type(k) is not int:
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
