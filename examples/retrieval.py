"""Search pictures by words and words by pictures, and measure how well: recall@1, @5 and @10 in both directions.

    python examples/retrieval.py                                  the demo model on examples/images
    python examples/retrieval.py my_photos                        my_photos/captions.csv holds image,caption
    python examples/retrieval.py my_photos --query "a red car"    the pictures that fit these words best

A picture may have several captions, as in Flickr30k and COCO, each in a row of its own. The protocol is the usual one:
a picture is found if any of its captions is among the k texts nearest to it, a caption if its picture is among the k
pictures nearest to it. Ties count against the model, so one that finds everything alike scores nothing. Captions
longer than the model's context are cut.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import miniclip

RECALL_AT = (1, 5, 10)
SHOWN = 5
MANY = 10  # batches, from which on a progress bar is worth its line


@torch.no_grad()
def encode_pictures(
    model: miniclip.CLIP, preprocess: miniclip.Preprocess, paths: Sequence[Path], batch_size: int
) -> tuple[Tensor, list[int]]:
    """Unit vectors (N, D) of the pictures that can be read, and which of the paths those are."""
    features, kept = [], []
    starts = range(0, len(paths), batch_size)
    for start in tqdm(starts, "pictures", unit="batch", disable=len(starts) < MANY or None):
        photos = []
        for index, path in enumerate(paths[start : start + batch_size], start):
            try:
                photos.append(miniclip.open_image(path))
            except miniclip.ImageError as error:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            else:
                kept.append(index)
        if photos:
            features.append(F.normalize(model.encode_image(preprocess(photos).to(model.device)).float(), dim=1).cpu())
    if not kept:
        raise SystemExit(f"none of the {len(paths)} pictures could be read")
    return torch.cat(features), kept


@torch.no_grad()
def encode_captions(model: miniclip.CLIP, captions: Sequence[str], batch_size: int) -> Tensor:
    """Unit vectors (M, D)."""
    features = []
    starts = range(0, len(captions), batch_size)
    for start in tqdm(starts, "captions", unit="batch", disable=len(starts) < MANY or None):
        tokens = miniclip.tokenize(captions[start : start + batch_size], model.context_length, truncate=True)
        features.append(F.normalize(model.encode_text(tokens.to(model.device)).float(), dim=1).cpu())
    return torch.cat(features)


def picture_ranks(similarities: Tensor, owner: Tensor) -> Tensor:
    """How many foreign captions come before a picture's own best one, (N,): 0 is a hit at 1.

    ``similarities`` is (N, M), ``owner`` (M,) the row of the picture that each caption belongs to.
    """
    own = owner == torch.arange(len(similarities))[:, None]  # (N, M)
    best = similarities.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return (~(similarities < best) & ~own).sum(dim=1)  # "not less" also holds for a NaN


def caption_ranks(similarities: Tensor, owner: Tensor) -> Tensor:
    """How many foreign pictures come before a caption's own, (M,)."""
    own = similarities.gather(0, owner[None])  # (1, M)
    return (~(similarities < own)).sum(dim=0) - 1  # but for its own


def recall(ranks: Tensor, k: int) -> float:
    return (ranks < k).double().mean().item()


def print_recalls(similarities: Tensor, owner: Tensor) -> None:
    """The table; a k larger than what is searched would say nothing and is left out."""
    pictures, captions = similarities.shape
    columns = [k for k in RECALL_AT if k <= max(pictures, captions)]
    print(" " * 16 + "".join(f"{f'recall@{k}':>11}" for k in columns))
    for name, ranks, searched in (
        ("image to text", picture_ranks(similarities, owner), captions),
        ("text to image", caption_ranks(similarities, owner), pictures),
    ):
        print(f"{name:16}" + "".join(f"{recall(ranks, k):11.1%}" if k <= searched else f"{'-':>11}" for k in columns))


def print_matches(similarities: Tensor, owner: Tensor, names: Sequence[str], captions: Sequence[str]) -> None:
    """The pictures that are surest of a caption, and whether it is one of theirs."""
    score, nearest = similarities.max(dim=1)
    print("\nbest matches (cosine similarity)")
    for row in score.argsort(descending=True)[:SHOWN].tolist():
        caption = int(nearest[row])
        verdict = "" if owner[caption] == row else f"   wrong, it is {names[int(owner[caption])]}'s"
        print(f"  {score[row]:.3f}  {names[row]}  {captions[caption]}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="pictures with a captions.csv (default: examples/images)")
    parser.add_argument("--query", help="print the pictures that fit these words best, instead of the recalls")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures or captions at a time (default: 32)")
    parser.add_argument("--model", help="a name, path or Hub repository")
    options = parser.parse_args()
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")

    folder = options.folder or common.IMAGES
    captions_of = common.read_captions(folder)
    model, preprocess = miniclip.load(common.model_name(options.model, own_images=options.folder is not None))
    paths = [folder / name for name in captions_of]
    pictures, kept = encode_pictures(model, preprocess, paths, options.batch_size)
    names = [list(captions_of)[index] for index in kept]
    if unread := len(paths) - len(kept):
        print(f"{unread} of {len(paths)} pictures could not be read and are left out, with their captions")

    if options.query is not None:
        scores = pictures @ encode_captions(model, [options.query], options.batch_size)[0]
        for row in scores.argsort(descending=True)[:SHOWN].tolist():
            print(f"  {scores[row]:.3f}  {names[row]}")
        return

    captions = [caption for name in names for caption in captions_of[name]]
    owner = torch.tensor([row for row, name in enumerate(names) for _ in captions_of[name]])
    similarities = pictures @ encode_captions(model, captions, options.batch_size).T  # (N, M)
    print(f"{len(names)} pictures, {len(captions)} captions\n")
    print_recalls(similarities, owner)
    print_matches(similarities, owner, names, captions)


if __name__ == "__main__":
    common.main(main)
