"""Search captions by image and images by caption. Measures recall@1, @5 and @10 in both directions.

    python examples/retrieval.py                                   the demo model on examples/images
    python examples/retrieval.py my_images --model ViT-B/32
    python examples/retrieval.py my_images --model ViT-B/32 --query "a red car"    the images that match best

my_images/captions.csv has the columns image,caption. An image may have several captions, as in Flickr30k and COCO,
each in a row of its own. An image counts as a hit if any of its captions is among the k captions nearest to it. A
caption counts as a hit if its image is among the k images nearest to it. Ties count against the model, so a model that
gives everything the same score has no hits. Captions longer than the model's context are truncated.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor

import miniclip
from miniclip.terminal import printable

with common.needs("examples"):
    from tqdm import tqdm

RECALL_AT = (1, 5, 10)
SHOWN = 5
MANY = 10  # batches: with fewer there is no progress bar


@torch.no_grad()
def encode_images(
    model: miniclip.CLIP, preprocess: miniclip.Preprocess, paths: Sequence[Path], batch_size: int
) -> tuple[Tensor, list[int]]:
    """Unit vectors (N, D) of the readable images, and the index of each among the paths."""
    features, kept = [], []
    starts = range(0, len(paths), batch_size)
    for start in tqdm(starts, "images", unit="batch", disable=len(starts) < MANY or None):
        images = []
        for index, path in enumerate(paths[start : start + batch_size], start):
            try:
                images.append(miniclip.open_image(path))
            except miniclip.ImageError as error:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            else:
                kept.append(index)
        if images:
            features.append(F.normalize(model.encode_image(preprocess(images).to(model.device)).float(), dim=1).cpu())
    if not kept:
        raise SystemExit(f"none of the {len(paths)} images could be read")
    return torch.cat(features), kept


@torch.no_grad()
def encode_captions(model: miniclip.CLIP, captions: Sequence[str], batch_size: int) -> Tensor:
    """Unit vectors (M, D), one per caption."""
    features = []
    starts = range(0, len(captions), batch_size)
    for start in tqdm(starts, "captions", unit="batch", disable=len(starts) < MANY or None):
        tokens = miniclip.tokenize(captions[start : start + batch_size], model.context_length, truncate=True)
        features.append(F.normalize(model.encode_text(tokens.to(model.device)).float(), dim=1).cpu())
    return torch.cat(features)


def image_ranks(similarities: Tensor, owner: Tensor) -> Tensor:
    """How many captions of other images score at least as high as an image's own best caption, (N,). 0 is a hit at 1.

    Args:
        similarities: (N images, M captions).
        owner: (M,), the row of each caption's image.
    """
    own = owner == torch.arange(len(similarities))[:, None]  # (N, M)
    best = similarities.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return (~(similarities < best) & ~own).sum(dim=1)  # "not less" is also true for NaN


def caption_ranks(similarities: Tensor, owner: Tensor) -> Tensor:
    """How many other images score at least as high as a caption's own image, (M,)."""
    own = similarities.gather(0, owner[None])  # (1, M)
    return (~(similarities < own)).sum(dim=0) - 1  # without the caption's own image


def recall(ranks: Tensor, k: int) -> float:
    return (ranks < k).double().mean().item()


def print_recalls(similarities: Tensor, owner: Tensor) -> None:
    """Print the table. A k is left out if the collection is smaller, because the recall would always be 100 %."""
    images, captions = similarities.shape
    columns = [k for k in RECALL_AT if k <= max(images, captions)]
    print(" " * 16 + "".join(f"{f'recall@{k}':>11}" for k in columns))
    for name, ranks, searched in (
        ("image to text", image_ranks(similarities, owner), captions),
        ("text to image", caption_ranks(similarities, owner), images),
    ):
        print(f"{name:16}" + "".join(f"{recall(ranks, k):11.1%}" if k <= searched else f"{'-':>11}" for k in columns))


def print_matches(similarities: Tensor, owner: Tensor, names: Sequence[str], captions: Sequence[str]) -> None:
    """Print the images with the highest scores, their nearest caption, and whether that caption is right."""
    score, nearest = similarities.max(dim=1)
    print("\nbest matches (cosine similarity)")
    for row in score.argsort(descending=True)[:SHOWN].tolist():
        caption = int(nearest[row])
        verdict = "" if owner[caption] == row else f"   wrong: belongs to {printable(names[int(owner[caption])])}"
        print(f"  {score[row]:.3f}  {printable(names[row])}  {captions[caption]}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="images with a captions.csv (default: examples/images)")
    parser.add_argument("--query", help="print the images that match these words best, instead of the recalls")
    parser.add_argument("--batch-size", type=int, default=32, help="images or captions per batch (default: 32)")
    parser.add_argument("--model", help=common.MODEL_HELP)
    options = parser.parse_args()
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")

    name = common.model_name(options.model, own_images=options.folder is not None)
    folder = options.folder or common.IMAGES
    captions_of = common.read_captions(folder)
    model, preprocess = miniclip.load(name)
    paths = [folder / name for name in captions_of]
    images, kept = encode_images(model, preprocess, paths, options.batch_size)
    names = [list(captions_of)[index] for index in kept]
    if unread := len(paths) - len(kept):
        print(f"{unread} of {len(paths)} images could not be read and are left out, with their captions")

    if options.query is not None:
        scores = images @ encode_captions(model, [options.query], options.batch_size)[0]
        for row in scores.argsort(descending=True)[:SHOWN].tolist():
            print(f"  {scores[row]:.3f}  {printable(names[row])}")
        return

    captions = [caption for name in names for caption in captions_of[name]]
    owner = torch.tensor([row for row, name in enumerate(names) for _ in captions_of[name]])
    similarities = images @ encode_captions(model, captions, options.batch_size).T  # (N, M)
    print(f"{len(names)} images, {len(captions)} captions\n")
    print_recalls(similarities, owner)
    print_matches(similarities, owner, names, captions)


if __name__ == "__main__":
    common.main(main)
