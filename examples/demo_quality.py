"""How well the demo model knows emoji drawn by artists it has never seen: the numbers of its model card.

    python examples/demo_quality.py                    makes the data with examples/emoji_data.py where it is missing
    python examples/demo_quality.py --model runs/mine  the same of another model

Two sets were held out of its training whole: Twemoji (ordinary colour pictures) and OpenMoji (thin black outlines, and
the same drawings with colours). An entry's text is the mean of its prompts, which use templates that training did not.
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

import common
import emoji_data
import torch
import torch.nn.functional as F
from torch import Tensor

import miniclip

ROOT = Path(__file__).parent.parent
TEMPLATES = ("an illustration of {}.", "this is {}.", "a sticker showing {}.", "clip art of {}.")
SETS = {"Twemoji": "twemoji", "OpenMoji, black": "openmoji-black", "OpenMoji, colour": "openmoji-color"}
COLUMNS = ("image→text R@1", "image→text R@5", "text→image R@1", "text→image R@5", "50-way", "10-way")


@torch.no_grad()
def text_features(model: miniclip.CLIP, names: list[str]) -> Tensor:
    """One unit vector per name, (names, D)."""
    total = torch.zeros(len(names), model.config.embed_dim)
    for template in TEMPLATES:
        tokens = miniclip.tokenize([template.format(emoji_data.with_article(name)) for name in names])
        total += torch.cat([F.normalize(model.encode_text(part).float(), dim=1) for part in tokens.split(256)])
    return F.normalize(total, dim=1)


@torch.no_grad()
def image_features(model: miniclip.CLIP, preprocess: miniclip.Preprocess, paths: list[Path]) -> Tensor:
    """One unit vector per picture, (pictures, D)."""
    batches = (paths[start : start + 64] for start in range(0, len(paths), 64))
    features = [model.encode_image(preprocess([miniclip.open_image(path) for path in batch])) for batch in batches]
    return F.normalize(torch.cat(features).float(), dim=1)


def ranks(similarity: Tensor, right: Tensor) -> Tensor:
    """For every row the rank of its right column, (rows,), 1 being the best; a tie counts against it."""
    return (similarity >= similarity.gather(1, right[:, None])).sum(dim=1)


def recall(rank: Tensor, k: int) -> float:
    return (rank <= k).double().mean().item()


def accuracy(rank: Tensor, candidates: int, labels: int) -> float:
    """The chance that the right label wins among ``labels``, the others drawn at random from the candidates.

    Not sampled: a label of rank r wins if all the others come from the ``candidates - r`` that it beats.
    """
    labels = min(labels, candidates)
    draws = math.comb(candidates - 1, labels - 1)
    won = [math.comb(candidates - r, labels - 1) / draws for r in range(1, candidates + 1)]
    return torch.tensor(won, dtype=torch.float64)[rank - 1].mean().item()


def measure(images: Tensor, texts: Tensor, right: Tensor) -> dict[str, float]:
    """Every column for one set: ``right`` is the entry of each picture."""
    similarity = images @ texts.T  # (pictures, entries)
    of_image = ranks(similarity, right)
    of_text = ranks(similarity.T[right], torch.arange(len(right)))  # among the pictures of this set
    values = (recall(of_image, 1), recall(of_image, 5), recall(of_text, 1), recall(of_text, 5))
    ways = (accuracy(of_image, len(texts), 50), accuracy(of_image, len(texts), 10))
    return dict(zip(COLUMNS, (*values, *ways), strict=True))


def checksum(model: miniclip.CLIP) -> str:
    """What tells this model's parameters from any others."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def entries_of(folder: Path) -> dict[str, str]:
    """picture -> the name of its entry, which is its first caption."""
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["caption"] for row in reversed(list(csv.DictReader(file)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a name, path or Hub repository (default: demo)")
    parser.add_argument("--data", type=Path, default=ROOT / "emoji", help="made by emoji_data.py (default: ./emoji)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args()

    if options.json and not options.json.resolve().parent.is_dir():
        raise SystemExit(f"there is no folder {options.json.resolve().parent}")
    if any(not (options.data / folder / "captions.csv").is_file() for folder in SETS.values()):
        command = [sys.executable, str(ROOT / "examples" / "emoji_data.py"), str(options.data)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{options.data} holds no data to measure on, and could not be made")
    model, preprocess = miniclip.load(options.model, "cpu", dtype=torch.float32)
    names = (options.data / "names.txt").read_text(encoding="utf-8").splitlines()
    texts = text_features(model, names)
    table = {}
    for title, folder in SETS.items():
        entries = entries_of(options.data / folder)
        images = image_features(model, preprocess, [options.data / folder / name for name in entries])
        if strange := set(entries.values()) - set(names):
            raise SystemExit(f"{options.data / folder} has captions that names.txt has not, such as {strange.pop()!r}")
        right = torch.tensor([names.index(name) for name in entries.values()])
        table[title] = {"pictures": len(entries), **measure(images, texts, right)}

    print(f"{options.model}: {len(names):,} entries, {len(TEMPLATES)} templates\n")
    print(f"| never seen in training | pictures | {' | '.join(COLUMNS)} |")
    print(f"|---|---|{'---|' * len(COLUMNS)}")
    for title, values in table.items():
        numbers = " | ".join(f"{values[column]:.1%}" for column in COLUMNS)
        print(f"| {title} | {values['pictures']:,} | {numbers} |")
    if options.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "miniclip": miniclip.__version__}
        result = {"date": str(date.today()), "model": options.model, "parameters_sha256": checksum(model)}
        result |= {"versions": versions, "entries": len(names), "templates": TEMPLATES, "sets": table}
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    common.run(main)
