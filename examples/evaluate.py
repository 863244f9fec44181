"""Zero-shot accuracy: the share of a data set's images that a model puts into the right class.

    python examples/evaluate.py                                the demo model on examples/images
    python examples/evaluate.py cifar10 --model ViT-B/32       downloaded from the Hub, shard by shard
    python examples/evaluate.py my_images --model ViT-B/32     my_images/cat/*.jpg, my_images/hot_dog/*.jpg, …

The Hub has the test sets of LAION's CLIP_benchmark: imagenet1k (several GB), cifar10, cifar100, stl10 and food101. Any
other is read by its full name, such as clip-benchmark/wds_sun397. These data sets come with class names and templates.

A folder can have one of three forms. It has the same files as a data set on the Hub, or a captions.csv (image,caption)
in which each caption is a class, or one subfolder for each class. Unreadable images are left out and counted.
"""

import argparse
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import common
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import miniclip
from miniclip.hub import ALIASES

with common.needs("examples"):
    from tqdm import tqdm

# CLIP_benchmark took the two CIFARs from VTAB, hence the names of their repositories.
REPOSITORIES = {
    "imagenet1k": "clip-benchmark/wds_imagenet1k",
    "cifar10": "clip-benchmark/wds_vtab-cifar10",
    "cifar100": "clip-benchmark/wds_vtab-cifar100",
    "stl10": "clip-benchmark/wds_stl10",
    "food101": "clip-benchmark/wds_food101",
}
# Top-1 accuracy on the whole test set, in percent, as published by open_clip for OpenAI's weights.
PUBLISHED = {
    "ViT-B/32": {"imagenet1k": 63.3, "cifar10": 89.8, "cifar100": 64.2, "stl10": 97.1, "food101": 84.0},
    "ViT-B/16": {"imagenet1k": 68.3, "cifar10": 90.8, "cifar100": 67.0, "stl10": 98.3, "food101": 88.7},
}
PUBLISHED_SOURCE = "open_clip's results"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TIMEOUT_SECONDS = 5

Sample = tuple[Path | bytes, int]  # an image's file or its contents, and the index of its class


@dataclass
class DataSet:
    """Classes, prompt templates with {} for the class, and samples, which are read when they are needed."""

    name: str
    classes: list[str]
    templates: list[str]
    samples: Iterator[Sample]


# -- sources of images ------------------------------------------------------------------------------------------------


def open_data_set(given: str) -> DataSet:
    """Open an existing folder, one of REPOSITORIES, or any other repository of the Hub."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        if any((folder / name).exists() for name in ("classnames.txt", "test/nshards.txt")):
            return shards(given, lambda name: local(folder, name))
        return captioned(folder) if (folder / "captions.csv").exists() else class_folders(folder)
    repo = REPOSITORIES.get(given, given)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        names = ", ".join(REPOSITORIES)
        raise SystemExit(f"{given!r} is neither a folder, nor one of {names}, nor a data set on the Hub (owner/name)")
    return shards(repo, lambda name: download(repo, name))


def shards(name: str, find: Callable[[str], Path]) -> DataSet:
    """A data set in CLIP_benchmark's form. ``find`` returns the path of a file of the data set."""
    classes = read_text(find("classnames.txt")).rstrip().splitlines()
    templates = read_text(find("zeroshot_classification_templates.txt")).split("\n")
    count = read_text(find("test/nshards.txt")).strip()
    if not count.isdecimal():
        raise SystemExit(f"test/nshards.txt of {name} should contain the number of shards, not {count!r}")
    return DataSet(
        name,
        [line.strip() for line in classes],
        [line.strip().replace("{c}", "{}") for line in templates if line.strip()],
        (sample for i in range(int(count)) for sample in shard_samples(find(f"test/{i}.tar"), len(classes))),
    )


def shard_samples(path: Path, classes: int) -> Iterator[Sample]:
    """The samples of a tar file. The files of one sample are neighbours, and their names differ in the suffix only."""
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile() and (file := shard.extractfile(member)):
                    kind = "".join(PurePosixPath(member.name).suffixes)
                    if parts and key != member.name.removesuffix(kind):
                        yield sample(f"{path}: {key}", parts, classes)
                        parts = {}
                    key = member.name.removesuffix(kind)
                    parts[kind.lower()] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SystemExit(f"{path} cannot be read as a tar ({error})") from None
    if parts:
        yield sample(f"{path}: {key}", parts, classes)


def sample(name: str, parts: dict[str, bytes], classes: int) -> Sample:
    """The sample made of these files, given by suffix. ``name`` is for error messages."""
    image = next((parts[kind] for kind in parts if kind in SUFFIXES), None)
    if image is None or ".cls" not in parts:
        raise SystemExit(f"{name} should be an image and its .cls, but is {' and '.join(parts)}")
    try:
        index = int(parts[".cls"])
    except ValueError:
        raise SystemExit(f"{name}.cls should contain a number, not {parts['.cls'][:20]!r}") from None
    if not 0 <= index < classes:
        raise SystemExit(f"{name}.cls says class {index}, but classnames.txt has {classes}, 0 to {classes - 1}")
    return image, index


def captioned(folder: Path) -> DataSet:
    """The first caption of each image is its class."""
    captions = {name: lines[0] for name, lines in common.read_captions(folder).items()}
    classes = list(dict.fromkeys(captions.values()))
    samples = ((folder / name, classes.index(caption)) for name, caption in captions.items())
    return DataSet(str(folder), classes, ["{}"], samples)


def class_folders(folder: Path) -> DataSet:
    """Every subfolder is a class. Its name is that of the folder, with spaces for underscores."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [
        (path, index)
        for index, subfolder in enumerate(folders)
        for path in sorted(subfolder.iterdir())
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise SystemExit(f"{folder} has no subfolders with images, no classnames.txt and no captions.csv")
    names = [path.name.replace("_", " ") for path in folders]
    return DataSet(str(folder), names, ["a photo of a {}."], iter(found))


def local(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise SystemExit(f"{folder} has no {name}")
    return folder / name


def download(repo: str, name: str) -> Path:
    """The path of a file of a data set on the Hub, in the local cache. Downloads the file if it is not cached."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        if isinstance(cached := try_to_load_from_cache(repo, name, repo_type="dataset"), str):
            return Path(cached)
        # This fails at once without a network, while hf_hub_download would retry for half a minute.
        get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset"), timeout=TIMEOUT_SECONDS)
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except Exception as error:  # the client's errors have no common base class in all versions
        if isinstance(error, errors.RepositoryNotFoundError):
            raise SystemExit(f"the Hub has no data set {repo}, or it needs a token in HF_TOKEN") from None
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise SystemExit(f"{repo} has no {name}") from None
        reason = " ".join(str(error).split())[:200]  # some messages are paragraphs long
        raise SystemExit(f"{name} of {repo} is not in the cache and could not be downloaded ({reason})") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read ({error})") from None


# -- accuracy ---------------------------------------------------------------------------------------------------------


def pixels(image: Path | bytes, preprocess: miniclip.Preprocess) -> Tensor | None:
    """The preprocessed image (3, S, S), or None if it cannot be read.

    An image of a shard is opened as in CLIP_benchmark, without EXIF rotation, so that the published numbers compare.
    """
    try:
        if isinstance(image, Path):
            return preprocess(miniclip.open_image(image))
        with Image.open(io.BytesIO(image)) as opened:
            return preprocess(opened.convert("RGB"))
    except Exception:  # Pillow's decoders raise many kinds of exception on damaged files
        return None


@torch.no_grad()
def evaluate(
    model: miniclip.CLIP, preprocess: miniclip.Preprocess, data: DataSet, batch_size: int, limit: int | None
) -> dict[str, int]:
    """Counts of readable images, unreadable images, and images with the right class first or among the first five."""
    # ImageNet has two classes called "missile". It is encoded once. Both stay in the ranking, in their order.
    labels = list(dict.fromkeys(data.classes))
    classifier = miniclip.ZeroShotClassifier(model, preprocess, labels, data.templates)
    # In float32, because half precision would round close similarities to ties.
    weights = classifier.weights[[labels.index(name) for name in data.classes]].float()  # (classes, D)

    counts = {"images": 0, "unreadable": 0, "top1": 0, "top5": 0}
    samples = islice(data.samples, limit)
    with ThreadPoolExecutor() as pool, tqdm(total=limit, unit=" images", dynamic_ncols=True, disable=None) as bar:
        while batch := list(islice(samples, batch_size)):
            opened = list(pool.map(lambda sample: pixels(sample[0], preprocess), batch))
            images = [image for image in opened if image is not None]
            indices = [index for image, (_, index) in zip(opened, batch) if image is not None]
            if images:
                embeddings = F.normalize(model.encode_image(torch.stack(images).to(model.device)).float(), dim=1)
                if not embeddings.isfinite().all():
                    raise SystemExit(f"the model's embeddings in {model.dtype} are not finite; try --dtype float32")
                ranked = (embeddings @ weights.T).argsort(dim=1, descending=True, stable=True)
                hits = ranked == torch.tensor(indices, device=ranked.device)[:, None]  # (images, classes)
                counts["top1"] += int(hits[:, :1].sum())
                counts["top5"] += int(hits[:, :5].sum())
            counts["images"] += len(images)
            counts["unreadable"] += len(batch) - len(images)
            bar.update(len(batch))
    if not counts["images"]:
        unread = counts["unreadable"]
        raise SystemExit(
            f"none of the {unread} images of {data.name} could be read" if unread else f"{data.name} has no images"
        )
    return counts


def published(model: str, data: DataSet) -> float | None:
    """The published accuracy, if the model is one of OpenAI's by name (not a path) and the data set is on the Hub."""
    if Path(model).expanduser().exists():
        return None
    figures = PUBLISHED.get(ALIASES.get(model, model), {})
    return next((figure for name, figure in figures.items() if REPOSITORIES[name] == data.name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="a folder, a name or a Hub data set (default: examples/images)")
    parser.add_argument("--model", help=common.MODEL_HELP)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if available)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "float64"])
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images; many sets are sorted by class")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--batch-size and --limit must be at least 1")

    name = common.model_name(options.model, own_images=options.dataset is not None)
    data = open_data_set(options.dataset or str(common.IMAGES))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, preprocess = miniclip.load(name, options.device, dtype=dtype)
    print(f"{len(data.classes)} classes with {len(data.templates)} prompts each", file=sys.stderr)
    counts = evaluate(model, preprocess, data, options.batch_size, options.limit)

    images, unreadable = counts["images"], counts["unreadable"]
    top1 = counts["top1"] / images
    top5 = counts["top5"] / images if len(data.classes) > 5 else None  # with five classes, top-5 is always 100 %
    figure = published(name, data)
    if options.json:
        result = {"dataset": data.name, "model": name, "classes": len(data.classes), "images": images}
        result |= {"unreadable": unreadable, "top1": top1, "top5": top5}
        if figure is not None:
            result |= {"published_top1": round(figure / 100, 4), "published_source": PUBLISHED_SOURCE}
        print(json.dumps(result))
        return
    print(f"{name} on {data.name}")
    beside = f"   published for the whole test set: {figure} % ({PUBLISHED_SOURCE})" if figure is not None else ""
    print(f"top-1   {top1:7.2%}{beside}")
    if top5 is not None:
        print(f"top-5   {top5:7.2%}")
    print(f"images  {images:,}" + (f"; {unreadable:,} more could not be read and are left out" if unreadable else ""))


if __name__ == "__main__":
    common.main(main)
