"""List groups of near-identical images in a folder that ``miniclip embed`` made.

    miniclip embed photos --out vectors
    python examples/near_duplicates.py vectors
    python examples/near_duplicates.py vectors --at-least 0.97

Two images are near-identical when the cosine of their vectors is at least the threshold. A group contains all images
that are connected by such pairs, so two images of a group may be less similar. Beside each image stands its cosine with
the first one of the group.

The right threshold depends on the model and on what you call identical: look at the groups before you delete anything.
The default is measured on the demo model. Half-size JPEGs (quality 70) of the sample images and of letters have 0.999
with their originals. Of every second drawing of Twemoji, 953 files, 0.97 joins 42 pairs and 0.99 joins 26: these
are flags and families that look the same or almost the same. Do not use 1: because of float16 rounding an image
may score 0.9997 against itself. Every pair is compared, so the time grows with the square of the number of images.
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement, islice

import common
import numpy as np
import torch

import miniclip
from miniclip.terminal import printable

with common.needs("examples"):
    from tqdm import tqdm

ROWS = 2048


def blocks(parts: Iterable[np.ndarray]) -> list[tuple[int, torch.Tensor]]:
    """Split the vectors into blocks of at most ``ROWS``, each with its first row. Nothing is read from the disk yet."""
    result, start = [], 0
    for part in parts:
        for block in torch.from_numpy(part).split(ROWS):
            result.append((start, block))
            start += len(block)
    return result


def near_pairs(pieces: list[tuple[int, torch.Tensor]], threshold: float) -> Iterator[np.ndarray]:
    """For every two blocks the pairs of rows, (2, N), whose cosine is at least the threshold."""
    block_pairs = combinations_with_replacement(pieces, 2)
    count = len(pieces) * (len(pieces) + 1) // 2
    for (i, left), (j, right) in tqdm(block_pairs, total=count, unit=" blocks", disable=count < 10 or None):
        near = left.float() @ right.float().T >= threshold
        if i == j:
            near.triu_(diagonal=1)  # each pair once, and no row with itself
        yield near.nonzero().T.numpy() + np.array([[i], [j]])


def groups(count: int, pairs: Iterable[np.ndarray]) -> list[list[int]]:
    """The connected components of ``count`` rows with two or more members, the largest first (union-find)."""
    parent = np.arange(count)  # of each row a row of its group with a lower or equal number; itself for the lowest

    def find_roots(rows: np.ndarray) -> np.ndarray:
        while not np.array_equal(above := parent[rows], rows):
            rows = above
        return rows

    for edges in pairs:
        roots = find_roots(edges)
        while (separate := roots[0] != roots[1]).any():
            roots = np.sort(roots[:, separate], axis=0)
            # Of several new parents of a row, the lowest wins. The other pairs are still separate in the next round.
            np.minimum.at(parent, roots[1], roots[0])
            roots = find_roots(roots)
    parent = find_roots(parent)
    order = np.argsort(parent, kind="stable")
    components = np.split(order, np.flatnonzero(np.diff(parent[order])) + 1)
    return sorted((group.tolist() for group in components if len(group) > 1), key=lambda group: (-len(group), group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that miniclip embed made")
    parser.add_argument("--at-least", type=float, default=0.99, metavar="COSINE", help="default: 0.99")
    options = parser.parse_args()
    if not -1 <= options.at_least <= 1:
        parser.error(f"--at-least must be from -1 to 1, got {options.at_least}")

    index = miniclip.Index.open(options.folder)
    alive = (~index.dead).nonzero()[:, 0].tolist()
    living = (part[~dead] if dead.any() else part for part, dead in zip(index.vectors(), dead_parts(index)))
    found = [
        [alive[row] for row in group] for group in groups(len(alive), near_pairs(blocks(living), options.at_least))
    ]
    paths = iter(index.paths(row for group in found for row in group))
    for number, group in enumerate(found, start=1):
        print(f"group {number}")
        first = index.vector(group[0])
        for row, path in zip(group, islice(paths, len(group))):
            print(f"  {first @ index.vector(row):.4f}  {printable(path)}")
    duplicates = sum(len(group) - 1 for group in found)
    print(f"{len(alive):,} images, {len(found):,} groups: {duplicates:,} near-duplicates")


def dead_parts(index: miniclip.Index) -> Iterator[np.ndarray]:
    """For each shard, which of its rows are dead."""
    start = 0
    for part in index.vectors():
        yield index.dead[start : start + len(part)].numpy()
        start += len(part)


if __name__ == "__main__":
    common.main(main)
