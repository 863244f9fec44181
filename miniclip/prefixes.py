"""A batch of texts as a tree of prefixes, in which every prefix is computed once.

Under a causal mask, the state of a token depends on the tokens before it and on nothing else. Texts that begin alike
(a photo of a …) therefore share the states of their common beginning, and no text needs padding. A node of the tree is
a token together with everything before it. The blocks of the text tower work on the nodes as on one long sequence;
only "who sees whom" is another, and that is what the views below say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.layers import attend

# Nodes in one pass of the blocks: enough to keep the cores busy, few enough for their activations to stay in the cache.
MAX_NODES = 1600
# Keys and values are laid out by text, so that one long text among many short ones costs memory.
MAX_POSITIONS = 8192
# Nodes are filled up to a multiple of this: oneDNN compiles a kernel for every number of rows that it meets.
MULTIPLE = 32


@dataclass
class Tree:
    """Sorted, distinct texts as a tree. As a ``View``, each node sees the nodes on its path.

    Each row shares some beginning with the row before it. Its own nodes are those after that beginning. The nodes are
    numbered row by row.
    """

    tokens: Tensor  # (nodes',) ids, filled up with zeros
    positions: Tensor  # (nodes',) the place of each in its text
    own: Tensor  # (rows, S) bool: whether a row has an s-th own node
    path: Tensor  # (rows, L) the node at each position of a row, and its last node after its end
    mask: Tensor  # (rows, 1, S, L) bool: whether an own node sees a position
    reach: Tensor  # (rows, 1, 1, L) bool: whether the end token sees a position
    ends: Tensor  # (rows,) the node of each end token

    @classmethod
    def of(cls, rows: Tensor, lengths: Tensor) -> Tree:
        """The tree of sorted, distinct rows (rows, L) of ids; the first ``lengths`` (rows,) ids of each row count."""
        columns = torch.arange(rows.shape[1])
        shared = shared_lengths(rows)
        inside = columns < lengths[:, None]  # (rows, L)
        new = inside & (columns >= shared[:, None])
        number = new.flatten().cumsum(0).view_as(new) - 1
        # Where a row shares, its nodes are those of the row before: the latest number in each column.
        path = torch.where(new, number, -1).cummax(dim=0).values
        ends = path.gather(1, lengths[:, None] - 1)  # (rows, 1)
        reach = shared[:, None] + torch.arange(int((lengths - shared).max()))  # (rows, S): the place of each own node
        filling = (0, -int(new.sum()) % MULTIPLE)
        return cls(
            tokens=F.pad(rows[new], filling),
            positions=F.pad(columns.expand_as(new)[new], filling),
            own=reach < lengths[:, None],
            path=torch.where(inside, path, ends),
            mask=(columns <= reach[:, :, None])[:, None],
            reach=inside[:, None, None],
            ends=ends[:, 0],
        )

    def asking(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """(nodes', 1, W) each -> (nodes', 1, W)."""
        nodes = int(self.ends[-1]) + 1
        queries = q.new_zeros(*self.own.shape, q.shape[-1])  # (rows, S, W)
        queries[self.own] = q[:nodes, 0]
        y = self.along_paths(queries.transpose(0, 1), k, v, heads, self.mask).transpose(0, 1)  # (rows, S, W)
        return F.pad(y[self.own], (0, 0, 0, len(q) - nodes))[:, None]

    def along_paths(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
        """Queries (S, rows, W) to the keys and values (nodes', 1, W) on each row's path -> (S, rows, W)."""
        k, v = (t[:, 0].index_select(0, self.path.T.flatten()).view(*self.path.T.shape, -1) for t in (k, v))
        return attend(q, k, v, heads, mask)  # k and v are (L, rows, W)


@dataclass
class Ends:
    """The view of the last block: the end token of each row asks, and sees its path."""

    tree: Tree

    def asking(self, x: Tensor) -> Tensor:
        """(nodes', 1, W) -> (rows, 1, W)."""
        return x[self.tree.ends]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """Queries (rows, 1, W), keys and values (nodes', 1, W) -> (rows, 1, W)."""
        return self.tree.along_paths(q.transpose(0, 1), k, v, heads, self.tree.reach).transpose(0, 1)


def trees(tokens: Tensor, lengths: Sequence[int]) -> tuple[list[Tree], Tensor]:
    """Token ids (N, L), of which the first ``lengths`` of each row count -> trees, and (N,) where each row is in them.

    The rows of all trees, one tree after the other, are the distinct texts.
    """
    inside = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    tokens = torch.where(inside, tokens.long(), -1)[:, : max(lengths)]
    rows, row_of = torch.unique(tokens, dim=0, return_inverse=True)  # sorted
    length = (rows >= 0).sum(dim=1)
    parts = [(rows[part, : int(length[part].max())], length[part]) for part in chunks(rows, length)]
    return [Tree.of(*part) for part in parts], row_of


def shared_lengths(rows: Tensor) -> Tensor:
    """How many first ids each row (rows, L) has in common with the row before it, (rows,)."""
    same = (rows[1:] == rows[:-1]).long().cumprod(dim=1).sum(dim=1)
    return torch.cat([same.new_zeros(1), same])


def chunks(rows: Tensor, lengths: Tensor) -> Iterator[slice]:
    """Parts of sorted rows, each of at most ``MAX_NODES`` nodes and ``MAX_POSITIONS`` positions, or of one row."""
    own, long = (lengths - shared_lengths(rows)).tolist(), lengths.tolist()
    start = nodes = longest = 0
    for row in range(len(rows)):
        longest = max(longest, long[row])
        if row > start and (nodes + own[row] > MAX_NODES or (row + 1 - start) * longest > MAX_POSITIONS):
            yield slice(start, row)
            start, nodes, longest = row, 0, long[row]
        nodes += own[row] if row > start else long[row]
    yield slice(start, len(rows))
