"""Search in a folder that ``embed_images`` made: exact, or through the inverted file that ``miniclip index`` made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.dead_rows import DEATHS, MISSING
from miniclip.errors import CheckpointError, ConfigError, InputError, UnknownModelError
from miniclip.inverted_file import MOST, InvertedFile, Record, first_foreign, import_faiss, read_record
from miniclip.loading import load
from miniclip.manifest import canonical_name, describe_difference, model_fingerprint, remembered_sha256
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.shard_files import ShardFiles
from miniclip.sources import ImageSource
from miniclip.store import EmbeddingStore
from miniclip.tokenizer import tokenize
from miniclip.vector_table import Query, VectorTable, as_vector

# How far the product in a list may be from the one with the stored vector. Both are of the same float16 numbers, so
# only the order of a sum in float32 differs: a thousand times less.
_SAME = 1e-3


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


class _Hidden(NamedTuple):
    """The rows that a search leaves out."""

    rows: Tensor  # (rows,) bool
    alive: int  # how many others there are


class Index:
    """The vectors of a folder, memory-mapped. ``Index.open`` makes one.

    Attributes:
        manifest: the content of manifest.json: how the vectors were computed.
        table: the vectors of all shards.
        notice: what is wrong, in one sentence, or None: why searches are exact though the folder has an inverted file,
            or that some vectors cannot be found.
        dead: (rows,) bool: the images that are gone or have changed, which a search leaves out.
        missing: (rows,) bool: those that are gone.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        table: VectorTable,
        dead: Tensor,
        missing: Tensor,
        model: str,
    ) -> None:
        self.manifest = manifest
        self.table = table
        self.notice: str | None = None
        self.dead, self.missing = dead, missing
        self._hidden = {
            shown: _Hidden(rows, len(rows) - int(rows.sum()))
            for shown, rows in ((False, dead), (True, dead & ~missing))
        }
        self._folder = folder
        self._model_name = model
        self._model: tuple[CLIP, Preprocess] | None = None
        self._record: Record | None = None  # of an inverted file that belongs to the vectors and is not opened yet
        self._inverted: InvertedFile | None = None
        self._selectors: dict[bool, list[Any]] = {}
        self._later: dict[int, int] = {}  # number of a shard that the inverted file lacks -> its first row

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
        table = VectorTable({shard: len(listed) for shard, listed in rows.items()}, _dimension_of(manifest))
        name = str(manifest["model"]) if model is None else canonical_name(model)
        index = cls(store.folder, manifest, table, dead, missing, name)
        index._find_inverted_file()
        return index

    def reopen(self) -> Index:
        """The folder as it is now: another index, which shares the loaded model. Errors are those of ``open``."""
        same = self._model_name == self.manifest["model"]
        index = Index.open(self._folder, None if same else self._model_name)
        if index.manifest == self.manifest:
            index._model = self._model
        return index

    def __len__(self) -> int:
        """The number of rows, dead ones included."""
        return len(self.table)

    @property
    def shards(self) -> list[ShardFiles]:
        """The shards that have vectors, in the order of the rows."""
        return self.table.shards

    @property
    def dimension(self) -> int:
        """The number of components of a vector, D."""
        return self.table.dimension

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
        exact: bool = False,
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
            exact: whether to compare the query with every vector, also where an inverted file would do.

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
        return self.nearest(query, k, min_score=min_score, missing=missing, exact=exact)

    def encode_query(
        self,
        text: str | Sequence[str] | None = None,
        image: Image.Image | None = None,
        *,
        without: str | Sequence[str] = (),
        template: str = "{}",
        truncate: bool = False,
        start: Query | None = None,
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
        first = None if start is None else as_vector(start, self.dimension, "start")
        model, preprocess = self.load()
        parts = []
        with torch.inference_mode():
            if first is not None:
                parts.append(F.normalize(first.to(model.device), dim=0)[None])
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

    def nearest(
        self, query: Query, k: int = 10, *, min_score: float | None = None, missing: bool = False, exact: bool = False
    ) -> list[Match]:
        """Find the ``k`` images nearest to a unit vector (D,), a tensor, an array or a list.

        The other arguments are those of ``search``.

        If the folder has an inverted file and ``k`` is at most 100, some images may be other than the nearest. Their
        scores are always exact.

        Returns:
            The images, best first. Images with equal scores stay in the order in which they were listed.

        Raises:
            InputError: if the vector has another size, is not finite or far from length 1, or ``k`` is below 1.
            TypeError: if the vector is something else, or ``k`` is not an int.
        """
        _check_k(k)
        query = as_vector(query, self.dimension, "the query")
        if not (length := query.double().norm().item()) < 1e3:  # also true for nan
            raise InputError(f"the query must be a unit vector, but its length is {length:g}")
        best = [(row, s) for row, s in self._best(query, k, missing, exact) if min_score is None or s >= min_score]
        paths = self.paths(row for row, _ in best)
        return [Match(path, score, bool(self.missing[row]), row) for path, (row, score) in zip(paths, best)]

    def _best(self, query: Tensor, k: int, missing: bool, exact: bool) -> list[tuple[int, float]]:
        """The rows with the ``k`` highest scores that are not hidden, and these scores.

        float32 selects the candidates, float64 decides. A sum in float32 also depends on the row's position in a block,
        but equal vectors must get equal scores.
        """
        k = min(k, self._hidden[missing].alive)
        if k == 0:
            return []
        # Twice the largest error of a sum of D products in float32, for unit vectors: D units in the last place.
        error = 2 * self.dimension * torch.finfo(torch.float32).eps * query.norm().item()
        if exact or k > MOST or (best := self._probed(query, k, missing, error)) is None:
            candidates = self._compared(query, k, self._hidden[missing].rows, error, self.table.starts())
            best = candidates, self.table.exact_products(query, candidates)
        candidates, scores = best
        order = scores.sort(descending=True, stable=True)
        return list(zip(candidates[order.indices[:k]].tolist(), order.values[:k].tolist()))

    def _compared(self, query: Tensor, k: int, hidden: Tensor, error: float, starts: Mapping[int, int]) -> Tensor:
        """Candidates for the ``k`` best rows of some shards, in ascending order: each of their vectors is compared.

        A vector that is not finite, because its file is damaged, is left out.
        """
        parts = [part for shard, part in zip(self.shards, self.table.parts) if shard.number in starts]
        here = torch.cat([hidden[start : start + len(part)] for start, part in zip(starts.values(), parts)])
        scores = self.table.products(query, parts)
        if wrong := int((~scores.isfinite() & ~here).sum()):
            here = here | ~scores.isfinite()
            self.notice = f"{wrong:,} vectors are not finite and cannot be found: run miniclip check {self._folder}"
        scores.masked_fill_(here, -torch.inf)
        if not (k := min(k, int((~here).sum()))):
            return here.nonzero()[:0, 0]
        lowest = scores.topk(k).values[-1]
        places = ((scores >= lowest - error) & ~here).nonzero()[:, 0]
        ends = torch.tensor([*accumulate(map(len, parts))])
        part = torch.searchsorted(ends, places, right=True)
        return places + (torch.tensor([*starts.values()]) - ends + torch.tensor([*map(len, parts)]))[part]

    # -- the inverted file --------------------------------------------------------------------------------------------

    def _find_inverted_file(self) -> None:
        """Look whether the folder has an inverted file that belongs to its vectors. Opens none of its large files."""
        try:
            record = read_record(self._folder)
        except ConfigError as error:
            self._search_exactly(str(error))
            return
        if record is None:
            return
        foreign = first_foreign(record, self.shard_times())
        if foreign is not None:
            self._search_exactly(f"the inverted file does not belong to the vectors of shard {foreign}")
        else:
            self._record = record

    def shard_times(self) -> dict[int, tuple[int, int]]:
        """Number of a shard -> the number of its vectors, and the time of their file in nanoseconds."""
        return {
            shard.number: (len(part), shard.stat_vectors().st_mtime_ns)
            for shard, part in zip(self.shards, self.table.parts)
        }

    def _search_exactly(self, reason: str) -> None:
        self._record = self._inverted = None
        self.notice = f"{reason}, so the search is exact: run miniclip index {self._folder} again"

    def _probed(self, query: Tensor, k: int, missing: bool, error: float) -> tuple[Tensor, Tensor] | None:
        """Candidates for the ``k`` best rows, ascending, with their exact scores; None without an inverted file.

        The vectors of shards that came after the inverted file are compared one by one.
        """
        if self._record is None:
            return None
        try:
            import_faiss()
        except ConfigError as problem:
            self._record, self.notice = None, f"{problem} (searches are exact without it)"
            return None
        hidden = self._hidden[missing].rows
        try:
            if self._inverted is None:
                starts, covered = self.table.starts(), {shard.number for shard in self._record.shards}
                self._later = {number: start for number, start in starts.items() if number not in covered}
                self._inverted = InvertedFile(self._folder, self._record, starts, self.dimension)
            if missing not in self._selectors:
                self._selectors[missing] = self._inverted.selectors(hidden.numpy())
            probed, products = self._inverted.nearest(query.numpy(), k, self._selectors[missing], error)
        except ConfigError as problem:
            self._search_exactly(str(problem))
            return None
        ascending = np.argsort(probed)
        rows = torch.from_numpy(probed[ascending])
        scores = self.table.exact_products(query, rows)
        if len(rows) and not (abs(scores.numpy() - products[ascending]).max() <= _SAME * query.norm().item()):
            self._search_exactly("the inverted file holds other vectors than the folder")
            return None
        if self._later:
            compared = self._compared(query, k, hidden, error, self._later)
            rows, order = torch.cat([rows, compared]).sort()
            scores = torch.cat([scores, self.table.exact_products(query, compared)])[order]
        return rows, scores

    # -- rows ---------------------------------------------------------------------------------------------------------

    def paths(self, rows: Iterable[int]) -> list[str]:
        """The paths of the images of ``rows``, which count over all shards from 0.

        Raises:
            InputError: if a row does not exist.
            ConfigError: if a file of the folder is damaged.
        """
        columns: dict[int, Any] = {}
        paths = []
        for part, place in map(self.table.place, rows):
            if part not in columns:
                columns[part] = self.shards[part].read_paths(len(self.table.parts[part]))
            paths.append(columns[part][place].as_py())
        return paths

    def sources(self, rows: Iterable[int]) -> list[ImageSource]:
        """Where the images of ``rows`` lie. Errors are those of ``paths``."""
        listings: dict[int, list[ImageSource]] = {}
        sources = []
        for part, place in map(self.table.place, rows):
            if part not in listings:
                listing = self.shards[part].read_listing()
                listings[part] = [listing[row] for row in self.shards[part].rows_with_vectors()]
            sources.append(listings[part][place])
        return sources

    def vectors(self) -> Iterator[np.ndarray]:
        """The vectors of each shard, in order: (rows, D) float16, memory-mapped."""
        return (part.numpy() for part in self.table.parts)

    def vector(self, row: int) -> Tensor:
        """The stored unit vector of a row, (D,) float32. Raises InputError if the row does not exist."""
        part, place = self.table.place(row)
        self.table.check_files()
        return self.table.parts[part][place].float()

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
                advice = "embed again into another folder, or say where the model is that made the vectors"
                raise CheckpointError(f"the vectors of {self._folder} were made with {difference}: {advice}")
            self._model = model, preprocess
        return self._model


def _dimension_of(manifest: Mapping[str, Any]) -> int | None:
    """The number of components that the vectors must have, if the manifest says it."""
    config = manifest.get("config")
    dimension = config.get("embed_dim") if isinstance(config, dict) else None
    return dimension if type(dimension) is int else None


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
