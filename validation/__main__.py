"""The command line: ``python validate.py`` or ``python -m validation``.

    python validate.py                      the demo model, ViT-B/32 and ViT-B/16, without network
    python validate.py --download           the same with OpenAI's weights, fetched if they are not in the cache
    python validate.py --model FOLDER       any Hugging Face folder
    python validate.py --markdown PAGE      also write the tables into a Markdown page

Where OpenAI's weights are missing, a model is validated on a seeded checkpoint of the same architecture: transformers
writes the checkpoint, ``miniclip.load`` reads it. The exit status is 1 if a stage drifts; the first one is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import miniclip
from miniclip import hub
from validation.report import Report, make_report, split_page, to_json, to_markdown, to_text, write_page
from validation.weights import weights_for

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STDOUT = "-"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="validate.py", description="Validate miniclip against transformers, stage by stage."
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["demo", "ViT-B/32", "ViT-B/16"],
        metavar="NAME_OR_PATH",
        help="known names, Hugging Face folders or Hub repositories (default: demo ViT-B/32 ViT-B/16)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: the CPU, and CUDA where there is one)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"one or more of {', '.join(DTYPES)} (default: float32, and on CUDA float16 as well)",
    )
    parser.add_argument("--download", action="store_true", help="fetch OpenAI's weights if they are not in the cache")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the rows as JSON")
    output.add_argument(
        "--markdown",
        nargs="?",
        const=_STDOUT,
        metavar="PAGE",
        help="print the tables as Markdown, or write them into PAGE, between its two marker lines",
    )
    return parser.parse_args(arguments)


def reports_of(name: str, options: argparse.Namespace) -> Iterator[Report]:
    """One report for each device and dtype."""
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    name = hub.ALIASES.get(name, name)
    with weights_for(name, options.download) as pair:
        for device in [options.device] if options.device else available:
            usual = ["float32", "float16"] if device.startswith("cuda") else ["float32"]
            for dtype in options.dtype or usual:
                yield make_report(pair, name, device, DTYPES[dtype])


def main(arguments: Sequence[str] | None = None) -> int:
    """Validate every model asked for and print the results.

    Returns:
        The exit status: 0, or 1 if a stage drifts, a model cannot be validated, or the page cannot be written.
    """
    options = parse(arguments)
    page = Path(options.markdown) if options.markdown and options.markdown != _STDOUT else None
    prints_text = not options.json and options.markdown != _STDOUT
    if page:
        try:
            split_page(page)  # a page that cannot take the tables is refused now, not after minutes of work
        except (OSError, ValueError) as error:
            return fail(error)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reports: list[Report] = []
    status = 0
    for name in options.model:
        try:
            for report in reports_of(name, options):
                reports.append(report)
                if prints_text:
                    print(to_text(report))
        except miniclip.MiniclipError as error:
            status = fail(error)
    if options.json:
        print(to_json(reports))
    elif options.markdown == _STDOUT:
        print(to_markdown(reports))

    for report in reports:
        if row := report.first_drift:
            numbers = f"max abs {row.max_abs:.1e}, relative {row.relative:.1e}, cosine {row.cosine:.6f}"
            status = fail(f"{report.title} first drifts at {row.stage!r}: {numbers}, limit {row.limit}")
    if status == 0 and prints_text:
        stages = sum(len(report.rows) for report in reports)
        print(f"{stages} stages of {len(reports)} validations within their limits.")
    if page and status:
        fail(f"{page} keeps its old tables")
    elif page:
        try:
            write_page(page, reports)
        except (OSError, ValueError) as error:
            return fail(error)
    return status


def fail(reason: object) -> int:
    """Print the reason and return the exit status."""
    print(f"validate.py: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
