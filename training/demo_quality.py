"""Measure how well the demo model knows emoji by artists it has never seen. Prints the numbers of its model card.

    python training/demo_quality.py                     runs emoji_data.py first, if the data does not exist
    python training/demo_quality.py --publish           also writes the demo's card, docs/demo.md, README and results
    python training/demo_quality.py --model runs/mine   measures another model
    python training/demo_quality.py --model runs/mine --choose   only the set on which settings are chosen

Three sets were never trained on. Twemoji (ordinary colour images) and OpenMoji (thin black outlines, and the same
drawings in colour) measure the result. Settings are chosen on Facebook's. The recipe of the model of 2026-11-21, from
which the present one started, was chosen on the first two.

Names: find the right one of all emoji's names. The text vector of a name is the mean over several prompts, whose
templates were not used in training. Plain nouns: find the right one of the 200 nouns in everyday.txt, by the same
prompts; and the file names of examples/images as nouns, by the default template of "miniclip classify", among
themselves and among 100 nouns. The list of nouns was made by emoji_data.py, by a rule, from Unicode's data.
"""

import argparse
import csv
import hashlib
import json
import math
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import demo_report
import shared
import torch
import torch.nn.functional as F
from prompts import with_article
from torch import Tensor

import miniclip

ROOT = Path(__file__).parent.parent
TEMPLATES = ("an illustration of {}.", "this is {}.", "a sticker showing {}.", "clip art of {}.")
CHOOSE = {"Facebook": "facebook"}
SETS = {"Twemoji": "twemoji", "OpenMoji, black": "openmoji-black", "OpenMoji, colour": "openmoji-color"}
EVERYDAY = Path(__file__).parent / "everyday.txt"
COLUMNS = ("image→text R@1", "image→text R@5", "text→image R@1", "text→image R@5", "50-way", "10-way")


@torch.no_grad()
def text_features(model: miniclip.CLIP, names: list[str]) -> Tensor:
    """One unit vector per name, (names, D)."""
    total = torch.zeros(len(names), model.config.embed_dim)
    for template in TEMPLATES:
        tokens = miniclip.tokenize([template.format(with_article(name)) for name in names])
        total += torch.cat([F.normalize(model.encode_text(part).float(), dim=1) for part in tokens.split(256)])
    return F.normalize(total, dim=1)


@torch.no_grad()
def image_features(model: miniclip.CLIP, preprocess: miniclip.Preprocess, paths: list[Path]) -> Tensor:
    """One unit vector per image, (images, D)."""
    batches = (paths[start : start + 64] for start in range(0, len(paths), 64))
    features = [model.encode_image(preprocess([miniclip.open_image(path) for path in batch])) for batch in batches]
    return F.normalize(torch.cat(features).float(), dim=1)


def ranks(similarity: Tensor, right: Tensor) -> Tensor:
    """The rank of the right column in each row, (rows,). The best rank is 1, and a tie counts against the model."""
    return (similarity >= similarity.gather(1, right[:, None])).sum(dim=1)


def recall(rank: Tensor, k: int) -> float:
    """The share of ranks up to k."""
    return (rank <= k).double().mean().item()


def accuracy(rank: Tensor, candidates: int, labels: int) -> float:
    """The accuracy of a choice between ``labels`` labels: the right one, and others drawn at random.

    This is the exact mean over all draws, without sampling. The right label has rank r among all ``candidates``. It
    wins a draw if all other labels come from the ``candidates - r`` that rank below it.
    """
    labels = min(labels, candidates)
    draws = math.comb(candidates - 1, labels - 1)
    won = [math.comb(candidates - r, labels - 1) / draws for r in range(1, candidates + 1)]
    return torch.tensor(won, dtype=torch.float64)[rank - 1].mean().item()


def measure(images: Tensor, texts: Tensor, right: Tensor) -> dict[str, float]:
    """All columns of the table for one set. ``right`` (images,) holds the index of each image's text."""
    similarity = images @ texts.T  # (images, texts)
    of_image = ranks(similarity, right)
    of_text = ranks(similarity.T[right], torch.arange(len(right)))  # among the images of this set
    values = (recall(of_image, 1), recall(of_image, 5), recall(of_text, 1), recall(of_text, 5))
    ways = (accuracy(of_image, len(texts), 50), accuracy(of_image, len(texts), 10))
    return dict(zip(COLUMNS, (*values, *ways), strict=True))


def checksum(model: miniclip.CLIP) -> str:
    """A SHA-256 over all parameters, in float32."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def entries_of(folder: Path) -> dict[str, str]:
    """The first caption of each image, which is the name of its emoji."""
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["caption"] for row in reversed(list(csv.DictReader(file)))}


def measure_sets(
    model: miniclip.CLIP, preprocess: miniclip.Preprocess, names: list[str], data: Path, sets: dict[str, str]
) -> dict[str, dict[str, float]]:
    """The rows of the table, by title."""
    texts = text_features(model, names)
    nouns = EVERYDAY.read_text(encoding="utf-8").split()
    noun_texts = text_features(model, nouns)
    table = {}
    for title, folder in sets.items():
        entries = entries_of(data / folder)
        if strange := set(entries.values()) - set(names):
            raise SystemExit(f"{data / folder} has captions that names.txt lacks, such as {strange.pop()!r}")
        images = image_features(model, preprocess, [data / folder / name for name in entries])
        right = torch.tensor([names.index(name) for name in entries.values()])
        table[title] = {"images": len(entries), **measure(images, texts, right)}
        plain = [(index, nouns.index(name)) for index, name in enumerate(entries.values()) if name in nouns]
        if plain:
            rows, columns = torch.tensor(plain).T
            table[title]["plain nouns"] = recall(ranks(images[rows] @ noun_texts.T, columns), 1)
    return table


def measure_samples(model: miniclip.CLIP, preprocess: miniclip.Preprocess) -> dict[str, int]:
    """How many sample images are found by their file name as a noun, among so many nouns."""
    paths = sorted(shared.IMAGES.glob("*.png"))
    nouns = [path.stem for path in paths]
    others = [noun for noun in EVERYDAY.read_text(encoding="utf-8").split() if noun not in nouns]
    images = [miniclip.open_image(path) for path in paths]
    found = {"images": len(paths)}
    for count in (len(paths), 100):
        labels = (nouns + others)[:count]
        answers = miniclip.ZeroShotClassifier(model, preprocess, labels)(images)
        found[f"among {count}"] = sum(answer[0][0] == noun for answer, noun in zip(answers, nouns))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a name, path or Hub repository (default: demo)")
    parser.add_argument("--data", type=Path, default=ROOT / "emoji", help="from emoji_data.py (default: emoji)")
    parser.add_argument("--choose", action="store_true", help="measure only the set on which settings are chosen")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--publish", action="store_true", help="write the demo's numbers into its card and docs")
    options = parser.parse_args()

    if options.publish and (options.model != "demo" or options.choose or options.json):
        parser.error("--publish is for all numbers of the demo model: leave out --model, --choose and --json")
    if options.json and not options.json.resolve().parent.is_dir():
        raise SystemExit(f"there is no folder {options.json.resolve().parent}")
    sets = CHOOSE if options.choose else CHOOSE | SETS
    if any(not (options.data / folder / "captions.csv").is_file() for folder in sets.values()):
        command = [sys.executable, str(Path(__file__).parent / "emoji_data.py"), str(options.data)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{options.data} has no data to measure with, and emoji_data.py could not make it")
    model, preprocess = miniclip.load(options.model, "cpu", dtype=torch.float32)
    names = (options.data / "names.txt").read_text(encoding="utf-8").splitlines()
    table = measure_sets(model, preprocess, names, options.data, sets)

    print(f"{options.model}: {len(names):,} emoji, {len(TEMPLATES)} templates\n\n{demo_report.table(table)}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "miniclip": miniclip.__version__}
    result = {"date": str(date.today()), "model": options.model, "parameters_sha256": checksum(model)}
    result |= {"versions": versions, "entries": len(names), "templates": TEMPLATES, "sets": table}
    if not options.choose:
        result["samples"] = measure_samples(model, preprocess)
        print(f"\n{demo_report.samples(result['samples'])}")
    if options.publish:
        demo_report.publish(result)
        options.json = ROOT / "benchmarks" / "results" / f"demo-{result['date']}.json"
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    shared.main(main)
