"""The result of one validation, and how it is shown: as text, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import miniclip
from miniclip.model import path_of
from validation.reference import processor_name
from validation.stages import Row, compare, published
from validation.weights import Pair

# ``--markdown PAGE`` replaces what stands between these two lines of the page.
BEGIN = "<!-- The tables below are written by validate.py: do not edit them. -->"
END = "<!-- End of the tables. -->"


@dataclass(frozen=True)
class Report:
    """One model on one device in one dtype. ``path`` tells what ran in the rows named "as used"."""

    model: str
    weights: str
    device: str
    dtype: str
    path: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.model} on {self.device} in {self.dtype}"

    @property
    def first_drift(self) -> Row | None:
        """The first stage beyond its limit."""
        return next((row for row in self.rows if not row.ok), None)


def make_report(pair: Pair, name: str, device: str, dtype: torch.dtype) -> Report:
    """Compare one model with transformers on one device in one dtype.

    Raises:
        MiniclipError: if either side cannot load the weights, or the model cannot read the texts.
    """
    model, preprocess, reference, processor = pair.load(device, dtype)
    rows = compare(model, reference, preprocess, processor=processor)
    if pair.real and name == "ViT-B/32" and dtype in (torch.float32, torch.float64):
        rows.append(published(model))
    dtype_name = str(dtype).removeprefix("torch.")
    return Report(name, pair.description, device, dtype_name, path_of(model), tuple(rows))


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# -- text -----------------------------------------------------------------------------------------------------------


def to_text(report: Report) -> str:
    """A table for the terminal."""
    line = "{:<26} {:>10} {:>10} {:>12}  {:<18} {}"
    lines = [f"{report.title}: {report.weights}", f'what runs "as used": {report.path}', ""]
    lines.append(line.format("stage", "max abs Δ", "relative", "cosine", "limit", "ok"))
    for row in report.rows:
        numbers = f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine:.9f}"
        lines.append(line.format(row.stage, *numbers, row.limit, "ok" if row.ok else "DRIFTS"))
    return "\n".join(lines) + "\n"


# -- JSON -----------------------------------------------------------------------------------------------------------


def to_json(reports: Sequence[Report]) -> str:
    """Versions and rows. A number that is not finite becomes null, because JSON cannot hold it."""
    result = {"versions": versions(), "reports": [_finite(asdict(report)) for report in reports]}
    return json.dumps(result, indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- Markdown -------------------------------------------------------------------------------------------------------


def to_markdown(reports: Sequence[Report]) -> str:
    """One line on when, where and with which versions; a table of the worst values; then a table per report."""
    gpus = dict.fromkeys(report.device for report in reports if report.device.startswith("cuda"))
    threads = f"threads: {torch.get_num_threads()}"
    processors = [f"{processor_name()} ({threads})", *(torch.cuda.get_device_name(gpu) for gpu in gpus)]
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = ["## Results", ""]
    lines += [f"Measured on {date.today()} on {' and '.join(processors)}.", ""]
    lines += [f"Versions: miniclip {miniclip.__version__}, {used}.", ""]
    lines += worst_table(reports)
    for report in reports:
        lines += [f"### {report.title}", ""]
        lines += [f"Weights: {report.weights}.", "", f'What runs "as used": {report.path}.', ""]
        lines += _table(
            ["stage", "max abs Δ", "relative Δ", "cosine", "limit", "result"],
            [_cells(row) for row in report.rows],
            numbers=range(1, 4),
        )
    return "\n".join(lines)


def worst_table(reports: Sequence[Report]) -> list[str]:
    """The lines of a table with the worst values of each report."""
    return _table(
        [
            "model",
            "device",
            "dtype",
            "hidden states, relative Δ",
            "embeddings, max abs Δ",
            "smallest cosine",
            "logits, max abs Δ",
            "result",
        ],
        [_worst_cells(report) for report in reports],
        numbers=range(3, 7),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: range) -> list[str]:
    """The lines of a Markdown table; the columns in ``numbers`` are aligned to the right."""
    rule = ["--:" if column in numbers else "---" for column in range(len(heads))]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *escaped)] + [""]


def _cells(row: Row) -> list[str]:
    result = "ok" if row.ok else "**drifts**"
    return [row.stage, _difference(row.max_abs), _difference(row.relative), f"{row.cosine:.9f}", row.limit, result]


def _worst_cells(report: Report) -> list[str]:
    """One line of the first table: the worst value of each kind of stage."""
    hidden = [row for row in report.rows if row.limit.startswith("rel")]
    embeddings = [row for row in report.rows if " embedding (" in row.stage]
    logits = [row.max_abs for row in report.rows if row.stage == "logits"]
    worst_cosine = _worst((row.cosine for row in (*hidden, *embeddings)), min)
    return [
        report.model,
        report.device,
        report.dtype,
        _difference(_worst((row.relative for row in hidden), max)),
        _difference(_worst((row.max_abs for row in embeddings), max)),
        f"{worst_cosine:.9f}",
        _difference(_worst(logits, max)),
        f"**drifts at {report.first_drift.stage}**" if report.first_drift else "ok",
    ]


def _worst(values: Iterable[float], choose: Callable[[list[float]], float]) -> float:
    """The largest or smallest value. Not a number if there is none, or if one of them is not a number."""
    found = list(values)
    return choose(found) if found and not any(map(math.isnan, found)) else math.nan


def _difference(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the tables of a page, the two marker lines included.

    Raises:
        OSError: if the page cannot be read.
        InputError: if the page does not have each marker line once and in order.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end and text.count(BEGIN) == text.count(END) == 1):
        raise miniclip.InputError(f"{page} must have the line {BEGIN!r}, then the line {END!r}, once each")
    return before + begin, end + after


def write_page(page: Path, reports: Sequence[Report]) -> None:
    """Replace the tables of a page and keep the rest of it.

    Raises:
        OSError: if the page cannot be read or written.
        InputError: if the page does not have each marker line once and in order.
    """
    before, after = split_page(page)
    page.write_text(f"{before}\n\n{to_markdown(reports)}\n{after}", encoding="utf-8")
