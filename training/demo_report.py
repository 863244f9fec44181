"""The pages that show what demo_quality.py measured: the demo model's card, docs/demo.md and README.md."""

import shlex
from pathlib import Path
from typing import Any

import miniclip
from miniclip import classify_command

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"
NOUNS = "plain nouns"  # the column that not every set has


def table(sets: dict[str, dict[str, float]]) -> str:
    """One row for each set, as Markdown."""
    columns = list(dict.fromkeys(column for values in sets.values() for column in values if column != "images"))
    lines = [f"| never seen in training | images | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for title, values in sets.items():
        numbers = " | ".join(f"{values[column]:.1%}" if column in values else "" for column in columns)
        lines.append(f"| {title} | {values['images']:,} | {numbers} |")
    return "\n".join(lines)


def samples(found: dict[str, int]) -> str:
    """How many of the sample images are found by one noun, as a sentence."""
    counts = [f"{count} {title} nouns" for title, count in found.items() if title != "images"]
    return (
        f"The file name, as a noun, is found for this many of the {found['images']} sample images: {', '.join(counts)}."
    )


def first_command(readme: str) -> str:
    """What the README's first command prints in a terminal."""
    line = next(line for line in readme.splitlines() if line.startswith("pip install"))
    arguments = shlex.split(line.partition("&& miniclip ")[2])
    path, labels = arguments[1], arguments[arguments.index("--labels") + 1 : arguments.index("--model")]
    classifier = miniclip.ZeroShotClassifier(*miniclip.load("demo", "cpu"), labels)
    answer = classifier(miniclip.open_image(ROOT / path))
    return "\n".join(line.rstrip() for line in classify_command.answer_lines(path, answer, bars=True))


def pages(result: dict[str, Any], readme: str) -> dict[str, str]:
    """What stands between the two marker comments of each page, by the page's path in the repository."""
    measured = f"Measured on {result['date']} with torch {result['versions']['torch']}."
    everything = f"{table(result['sets'])}\n\n{samples(result['samples'])} {measured}"
    twemoji = result["sets"]["Twemoji"]
    short = (
        f"The demo model never saw Twemoji's drawings in training. It finds the right one of 200 plain nouns for "
        f"{twemoji[NOUNS]:.0%} of the drawings of these things, and the right one of {result['entries']:,} names for "
        f"{twemoji['image→text R@1']:.0%} of all drawings."
    )
    return {
        "miniclip/data/demo/README.md": everything,
        "docs/demo.md": everything,
        "README.md": f"```text\n{first_command(readme)}\n```\n\n{short}",
    }


def publish(result: dict[str, Any], root: Path = ROOT) -> None:
    """Write the numbers into the three pages.

    Raises:
        SystemExit: if a page does not have each marker once, in order. No page is written then.
    """
    contents = pages(result, (root / "README.md").read_text(encoding="utf-8"))
    written = {}
    for name, content in contents.items():
        text = (root / name).read_text(encoding="utf-8")
        head, begin, rest = text.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if text.count(BEGIN) != 1 or text.count(END) != 1 or not end:
            raise SystemExit(f"{name} needs one {BEGIN} and one {END}")
        written[name] = f"{head}{begin}\n{content}\n{end}{tail}"
    for name, text in written.items():
        (root / name).write_text(text, encoding="utf-8")
