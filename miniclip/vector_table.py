"""The vectors of all shards as one table of rows, memory-mapped, and their products with a query."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from miniclip.errors import ConfigError, InputError
from miniclip.shard_files import ShardFiles

#: A vector to search with.
Query = Tensor | np.ndarray | Sequence[float]

# Rows that are converted to float32 at a time. 512 numbers per row make 8 MB, which stays in the caches. Fewer rows are
# up to a tenth faster alone, but far slower when other threads run, because torch's threads sleep between operations.
_ROWS = 4096


class VectorTable:
    """The vectors of some shards, one after the other. Rows count over all shards from 0.

    Attributes:
        shards: the shards, each with at least one vector.
        parts: the vectors of each shard, (rows, D) float16.
        ends: of each shard, the row after its last.

    Raises:
        ConfigError: if a vector file is missing, damaged, or of another width than ``dimension`` or than the first.
        StorageError: if the operating system cannot map a file.
    """

    def __init__(self, counts: Mapping[ShardFiles, int], dimension: int | None = None) -> None:
        self.shards = [*counts]
        self.parts: list[Tensor] = []
        for shard, count in counts.items():
            self.parts.append(shard.map_vectors(count, dimension))
            dimension = self.parts[0].shape[1]
        self.ends = [*accumulate(map(len, self.parts))]
        self._files = [shard.stat_vectors() for shard in self.shards]

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def dimension(self) -> int:
        """The number of components of a vector, D."""
        return int(self.parts[0].shape[1])

    def starts(self) -> dict[int, int]:
        """Number of a shard -> its first row."""
        return dict(zip((shard.number for shard in self.shards), (0, *self.ends)))

    def place(self, row: int) -> tuple[int, int]:
        """The part of a row, and the row within the part. Raises InputError if the row does not exist."""
        if not 0 <= row < len(self):
            raise InputError(f"row {row:,} does not exist: rows are 0 to {len(self) - 1:,}")
        part = bisect_right(self.ends, row)
        return part, row - (self.ends[part - 1] if part else 0)

    def check_files(self) -> None:
        """Check that no file has become shorter since it was mapped. To read beyond its end would end the process.

        A file that was replaced or removed does not matter: its old content stays mapped.

        Raises:
            ConfigError: if a file has become shorter.
        """
        for shard, mapped in zip(self.shards, self._files):
            try:
                now = os.stat(shard.vectors_path)
            except OSError:
                continue
            if os.path.samestat(now, mapped) and now.st_size < mapped.st_size:
                raise ConfigError(
                    f"{shard.vectors_path} has become shorter while it was open: {now.st_size:,} instead of "
                    f"{mapped.st_size:,} bytes; remove {shard.failures_path} and embed again"
                )

    def gather(self, rows: Tensor) -> Iterator[Tensor]:
        """The vectors of ``rows``, which are in ascending order, in blocks of some thousand."""
        self.check_files()
        bounds = [0, *torch.searchsorted(rows, torch.tensor(self.ends)).tolist()]
        for part, end, (first, last) in zip(self.parts, self.ends, pairwise(bounds)):
            if first < last:
                for block in (rows[first:last] - (end - len(part))).split(_ROWS):
                    yield part[block]

    def products(self, query: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The product of every vector of ``parts`` and the query, (rows,) float32."""
        self.check_files()
        scores, start = torch.empty(sum(map(len, parts))), 0
        # One buffer for all blocks: allocating one for each may fragment the heap to gigabytes.
        buffer = torch.empty(_ROWS, self.dimension)
        for part in parts:
            for rows in part.split(_ROWS):  # views of the mapped file
                block = buffer[: len(rows)].copy_(rows)
                torch.mv(block, query, out=scores[start : start + len(rows)])
                start += len(rows)
        return scores

    def exact_products(self, query: Tensor, rows: Tensor) -> Tensor:
        """The products of ``rows``, which are in ascending order, and the query: (rows,) float64."""
        blocks = [(part.double() * query.double()).sum(dim=1) for part in self.gather(rows)]
        return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.float64)


def as_vector(given: Query, dimension: int, name: str) -> Tensor:
    """A vector (D,) float32 on the CPU.

    Raises:
        TypeError: if it is not a tensor, an array or a list of real numbers.
        InputError: if it has another shape.
    """
    expected = f"{name} must be a vector of {dimension} numbers"
    vector = given
    if isinstance(given, np.ndarray | list | tuple):
        try:
            array = np.asarray(given)
            vector = torch.as_tensor(array if np.iscomplexobj(array) else array.astype(np.float32))
        except (TypeError, ValueError):
            raise TypeError(f"{expected}, got {type(given).__name__} of something else") from None
    if not isinstance(vector, Tensor) or vector.layout != torch.strided or vector.is_meta or vector.is_complex():
        kind = (
            f"{vector.dtype}, {vector.layout}, {vector.device}" if isinstance(vector, Tensor) else type(given).__name__
        )
        raise TypeError(f"{expected}, got {kind}")
    if tuple(vector.shape) != (dimension,):
        raise InputError(f"{expected}, got shape {tuple(vector.shape)}")
    return vector.detach().float().cpu()
