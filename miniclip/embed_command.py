"""``miniclip embed``: what a run prints while it works, and at its end."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from miniclip.embed import Progress, Summary
from miniclip.errors import ConfigError
from miniclip.folders import describe_suffixes
from miniclip.hub import BUNDLED
from miniclip.terminal import escaped, printable

EMOJI_ONLY = "drawings of emoji are all that the demo model knows; for photos, embed them with --model ViT-B/32"
_SECONDS_BETWEEN_LINES = 30


def print_summary(options: argparse.Namespace, done: Summary, print_error: Callable[[str], None]) -> None:
    """The numbers of a run on standard output, and its failures on standard error."""
    if not options.quiet:
        rate = f" in {_duration(done.seconds)}" if done.embedded else ""
        taken = f", {done.taken:,} known under another name or time" if done.taken else ""
        print(f"{printable(options.out)}: {_images(done.embedded)} embedded{rate}{taken}, {done.total:,} in all")
        if done.skipped:
            print(f"no images by their names: {escaped(describe_suffixes(Counter(done.skipped)))}")
        if done.excluded:
            reasons = ["--exclude"] if options.exclude else []
            reasons += ["the defaults, which --no-default-excludes switches off"] if options.default_excludes else []
            print(f"files and folders that were left out: {done.excluded:,} (by {' and by '.join(reasons)})")
        if done.links:
            print(f"linked folders that were not followed: {done.links:,} (--follow-links follows them)")
    if done.failed:
        files = "1 file" if done.failed == 1 else f"{done.failed:,} files"
        print_error(f"{files} could not be embedded; see {os.path.join(options.out, 'failures.jsonl')}")
    if not options.quiet and done.total and sys.stdout is not None and sys.stdout.isatty():
        folder = printable(options.out)
        folder = shlex.quote(folder) if folder == options.out else folder
        print(f'now: miniclip search {folder} "a dog in the snow"\nor in a browser: miniclip serve {folder}')


class ProgressPrinter:
    """Prints the progress of a run to stderr: a bar on a terminal, otherwise a line now and then.

    What the demo model knows is printed once, before the first image is embedded. So a run that fails earlier prints
    only its error.
    """

    def __init__(self, print_error: Callable[[str], None]) -> None:
        self._print_error = print_error
        self._noted = False
        self._bar: Any = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):  # a closed stderr is no reason to stop the run
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        if not progress.total:
            return
        if progress.model in BUNDLED and not self._noted:
            self._print_error(EMOJI_ONLY)
        self._noted = True
        if sys.stderr.isatty():
            if self._bar is None:
                try:
                    from tqdm import tqdm
                except ImportError:
                    raise ConfigError(
                        'the package tqdm is missing: pip install -c constraints.txt -e ".[embed]"'
                    ) from None
                self._bar = tqdm(total=progress.total, unit=" images", dynamic_ncols=True)
            self._bar.set_postfix_str(f"{progress.failed:,} failed", refresh=False)
            self._bar.update(progress.done - self._bar.n)
        elif not progress.done:
            print(f"{progress.total:,} images to embed", file=sys.stderr, flush=True)
        elif progress.seconds >= self._next or progress.done == progress.total:
            self._next = progress.seconds + _SECONDS_BETWEEN_LINES
            rate = progress.done / progress.seconds if progress.seconds else 0.0
            left = (progress.total - progress.done) / rate if rate else 0.0
            print(
                f"{progress.done:,} of {progress.total:,} images, {progress.failed:,} failed, {rate:.1f} a second, "
                f"{_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
