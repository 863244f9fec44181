"""``miniclip classify``: its images, its labels, and the forms of its answers."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from miniclip.errors import ImageError, InputError
from miniclip.folders import DEFAULT_RULES, Walk
from miniclip.sources import SUFFIXES
from miniclip.terminal import columns, printable
from miniclip.zero_shot import Answer


def images_of(arguments: Sequence[str]) -> list[str]:
    """The image files that the arguments name: files, folders with their subfolders, and shell patterns.

    Raises:
        InputError: if an argument is a URL, a folder without images, or a pattern that fits no file.
    """
    images = []
    for argument in arguments:
        if re.match(r"(https?|ftp|file|data|s3|gs)://|data:", argument, re.IGNORECASE):
            raise InputError(f"{argument:.80} is a URL: download the image, and give its file")
        if os.path.isdir(argument):
            files = Walk(os.path.abspath(argument), DEFAULT_RULES)
            found = sorted(
                os.path.join(argument, os.path.relpath(path, argument))
                for path in files
                if os.path.splitext(path)[1].lower() in SUFFIXES and not _waits_for_a_writer(path)
            )
            if not found:
                raise InputError(f"the folder {argument} contains no images")
            images += found
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            if not (found := sorted(glob.glob(argument, recursive=True))):
                raise InputError(f"no file fits the pattern {argument}")
            images += found
        else:
            images.append(argument)
    return images


def _waits_for_a_writer(path: str) -> bool:
    """Whether a file in a folder is a pipe, for example. As an argument of its own, a pipe is wanted."""
    return os.path.exists(path) and not os.path.isfile(path)


def labels_of(labels: Sequence[str], file: str | None) -> list[str]:
    """The labels of the command line and those of a file, one in each line ("-" is standard input).

    Raises:
        InputError: if the file cannot be read, a label is empty, or there are fewer than two.
    """
    labels = [*labels]
    if file is not None:
        if file == "-" and sys.stdin is None:
            raise InputError("standard input is closed: give --labels-file a file")
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text (byte {error.start}): save the file as UTF-8") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        labels += [line.strip() for line in text.splitlines() if line.strip()]
    for number, label in enumerate(labels, start=1):
        if not label.strip():
            raise InputError(f"label {number} is empty")
    if len(labels) < 2:
        parts = [part.strip() for part in re.split("[,;|]", labels[0]) if part.strip()] if labels else []
        if len(parts) > 1:
            words = " ".join(f'"{part}"' if " " in part else part for part in parts)
            raise InputError(f"{labels[0]!r} is one label: separate labels by spaces, as in --labels {words}")
        raise InputError(f"there must be two labels or more, got {labels}: one alone would always get 100%")
    return labels


def advice(labels: Sequence[str]) -> str | None:
    """What to tell a user whose labels may not be what they meant."""
    if with_comma := [label for label in labels if "," in label]:
        return f"{with_comma[0]!r} is one label, with its comma; separate labels by spaces"
    return None


def as_csv(rows: Sequence[tuple[str, str, str]]) -> str:
    """Rows of image, label and probability in CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def as_json(results: Sequence[tuple[str, Answer | ImageError]]) -> str:
    """All results as JSON in ASCII, so that any file name survives any encoding."""
    records: list[dict[str, object]] = []
    for path, answer in results:
        if isinstance(answer, ImageError):
            records.append({"image": path, "error": answer.reason})
        else:
            labels = [{"label": label, "probability": probability} for label, probability in answer]
            records.append({"image": path, "labels": labels})
    return json.dumps(records, indent=2, allow_nan=False)


def answer_lines(path: str, answer: Answer, bars: bool) -> Iterator[str]:
    """The lines of one answer: with ``bars`` a heading and a bar chart, else path, label, probability with tabs."""
    if not bars:
        for label, probability in answer:
            yield f"{printable(path)}\t{printable(label)}\t{probability:.4f}"
        return
    answer = [(printable(label), probability) for label, probability in answer]
    width = max(columns(label) for label, _ in answer)
    room = max(10, min(40, shutil.get_terminal_size().columns - width - 12))
    full = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    yield printable(path)
    for label, probability in answer:
        padding = " " * (width - columns(label))
        yield f"  {label}{padding}  {probability:6.1%}  {full * round(probability * room)}"
