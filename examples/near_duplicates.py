"""List groups of near-identical pictures in a folder that ``miniclip embed`` made.

    miniclip embed photos --out vectors
    python examples/near_duplicates.py vectors
    python examples/near_duplicates.py vectors --at-least 0.99

Two pictures are near-identical when the cosine of their vectors is at least the threshold; a group is whatever hangs
together by such pairs, so its ends may lie further apart. Which threshold is right depends on the model and on what
shall count as the same: look at the groups before deleting anything. (1 is too much to ask: in float16 the product of
a vector with itself may be 0.9997.) Every pair is compared, block by block, so time grows with the square of the number
of pictures.
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement, islice

import common
import numpy as np
import torch

import miniclip

with common.needs("examples"):
    from tqdm import tqdm

ROWS = 2048


def blocks(parts: Iterable[np.ndarray]) -> list[tuple[int, torch.Tensor]]:
    """The vectors in pieces, each with the row it begins at. Pieces of a file are read when they are compared."""
    found, start = [], 0
    for part in parts:
        for piece in torch.from_numpy(part).split(ROWS):
            found.append((start, piece))
            start += len(piece)
    return found


def near_pairs(pieces: list[tuple[int, torch.Tensor]], at_least: float) -> Iterator[np.ndarray]:
    """The pairs (2, N) of rows whose cosine reaches the threshold, of two pieces at a time."""
    todo = combinations_with_replacement(pieces, 2)
    count = len(pieces) * (len(pieces) + 1) // 2
    for (i, left), (j, right) in tqdm(todo, total=count, unit=" blocks", disable=count < 10 or None):
        near = left.float() @ right.float().T >= at_least
        if i == j:
            near.triu_(diagonal=1)
        yield near.nonzero().T.numpy() + np.array([[i], [j]])


def groups(count: int, pairs: Iterable[np.ndarray]) -> list[list[int]]:
    """What hangs together by the pairs, the largest group first; alone, nothing is a group."""
    parent = np.arange(count)  # of each row, another of its group that is not behind it; itself for the first

    def first(rows: np.ndarray) -> np.ndarray:
        while not np.array_equal(above := parent[rows], rows):
            rows = above
        return rows

    for some in pairs:
        ends = first(some)
        while (apart := ends[0] != ends[1]).any():
            ends = np.sort(ends[:, apart], axis=0)
            np.minimum.at(parent, ends[1], ends[0])  # of several, the first; others are still apart in the next turn
            ends = first(ends)
    parent = first(parent)
    order = np.argsort(parent, kind="stable")
    found = np.split(order, np.flatnonzero(np.diff(parent[order])) + 1)
    return sorted((group.tolist() for group in found if len(group) > 1), key=lambda group: (-len(group), group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what miniclip embed --out made")
    parser.add_argument("--at-least", type=float, default=0.97, metavar="COSINE", help="default: 0.97")
    options = parser.parse_args()
    if not -1 <= options.at_least <= 1:
        parser.error(f"a cosine is from -1 to 1, not {options.at_least}")

    index = miniclip.Index.open(options.folder)
    found = groups(len(index), near_pairs(blocks(index.vectors()), options.at_least))
    paths = iter(index.paths(row for group in found for row in group))
    for number, group in enumerate(found, start=1):
        print(f"group {number}")
        for path in islice(paths, len(group)):
            print(f"  {path}")
    more = sum(len(group) - 1 for group in found)
    print(f"{len(index):,} pictures, {len(found):,} groups: {more:,} could go")


if __name__ == "__main__":
    common.main(main)
