"""The command line: ``miniclip demo``, ``classify``, ``embed``, ``search`` and ``models``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from miniclip.checkpoint import open_checkpoint
from miniclip.config import CLIPConfig
from miniclip.demo_tour import tour
from miniclip.embed import Progress, Summary, embed_images
from miniclip.errors import ConfigError, ImageError, MiniclipError
from miniclip.hub import BUNDLED, KNOWN, cached_model
from miniclip.images import open_image
from miniclip.loading import load
from miniclip.search import Index
from miniclip.version import __version__
from miniclip.zero_shot import Answer, ZeroShotClassifier

_SECONDS_BETWEEN_LINES = 30
_EMOJI_ONLY = "drawings of emoji are all that the demo model knows; for photos, embed them with --model ViT-B/32"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 0, 1 if something failed, 2 for a wrong command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name need not be valid text, and the encoding of a pipe need not have every letter of a label.
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    options = _parser().parse_args(arguments)
    status = 0
    try:
        status = options.run(options)
        if sys.stdout is not None:  # None if it was closed before the program started
            sys.stdout.flush()
        return status
    except MiniclipError as error:
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of the output has stopped, as `head` does. Without this, Python prints an error at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return status
    except OSError as error:  # such as a full disk
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _print_error(f"the output could not be written ({error.strerror})")
        return 1


def _print_error(message: str) -> None:
    if sys.stderr is not None:  # if it was closed before the program started, print would write to stdout
        print(f"miniclip: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miniclip", description="Images and words in one space: OpenAI's CLIP.")
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shows = "show what the demo model can and cannot do"
    description = f"{shows.capitalize()}, on sample images in this package: in seconds, and offline."
    commands.add_parser("demo", help=shows, description=description).set_defaults(run=_demo)
    _add_classify(
        commands.add_parser(
            "classify",
            help="tell which of the labels fits an image",
            description="Tell which of the labels fits each image, with probabilities.",
        )
    )
    _add_embed(
        commands.add_parser(
            "embed",
            help="turn the images of a folder into vectors",
            description="Embed every image of a source into a folder, in clip-retrieval's layout. Run the same command "
            "again to continue an interrupted run, or to add new images.",
        )
    )
    _add_search(
        commands.add_parser(
            "search",
            help="find images in a folder of vectors",
            description="Find the images nearest to a text, to an image, or to both, in a folder that embed made.",
        )
    )
    names = "list the models known by name"
    commands.add_parser("models", help=names, description=f"{names.capitalize()}.").set_defaults(run=_models)
    return parser


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        metavar="LABEL",
        help="the possible answers; each one replaces {} in the template",
    )
    parser.add_argument(
        "--model", default="ViT-B/32", metavar="NAME_OR_PATH", help="name, path or Hub repository (default: ViT-B/32)"
    )
    parser.add_argument(
        "--template",
        nargs="+",
        default=["a photo of a {}."],
        metavar="TEXT",
        help='the text around a label; several templates are averaged (default: "a photo of a {}.")',
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: cuda if available)")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: float32 on the CPU, float16 on CUDA")
    parser.add_argument("--json", action="store_true", help="print a list of {image, labels: [{label, probability}]}")
    parser.set_defaults(run=_classify)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, a .tar, or a text file of paths (relative paths start at the current folder)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the vectors")
    parser.add_argument("--model", default="ViT-B/32", metavar="NAME_OR_PATH", help="default: ViT-B/32")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: cuda if available)")
    parser.add_argument("--dtype", choices=_DTYPES, help="for the computation; vectors are stored in float16")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images that go through the model together (default: 32)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one for each core)")
    parser.add_argument(
        "--shard-size", type=int, default=10_000, metavar="N", help="images in one shard (default: 10,000)"
    )
    parser.add_argument(
        "--fast-decode", action="store_true", help="decode large JPEGs at a fraction of their size; faster, not exact"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress, only errors")
    parser.set_defaults(run=_embed)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    parser.add_argument("text", nargs="?", metavar="TEXT", help='what to look for, such as "a dog in the snow"')
    parser.add_argument("--image", metavar="IMAGE", help="an image to compare with")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="where the model of the vectors is now, if it has moved"
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="how many images (default: 10)")
    parser.add_argument("--json", action="store_true", help="print a list of {path, score}")
    parser.set_defaults(run=_search)


def _demo(options: argparse.Namespace) -> int:
    for line in tour(*load("demo", "cpu")):
        print(line, flush=True)
    return 0


def _classify(options: argparse.Namespace) -> int:
    dtype = _DTYPES[options.dtype] if options.dtype else None
    model, preprocess = load(options.model, options.device, dtype=dtype)
    classifier = ZeroShotClassifier(model, preprocess, options.labels, options.template)
    results: list[dict[str, object]] = []
    failed = 0
    for path, answer in _answers(classifier, options.images):
        if isinstance(answer, ImageError):
            failed += 1
            _print_error(str(answer))
            results.append({"image": path, "error": answer.reason})
        elif options.json:
            labels = [{"label": label, "probability": probability} for label, probability in answer]
            results.append({"image": path, "labels": labels})
        else:
            print(
                "\n".join(answer_lines(path, answer, bars=sys.stdout is not None and sys.stdout.isatty())), flush=True
            )
    if options.json:
        print(json.dumps(results, indent=2, allow_nan=False))  # ASCII, so that any file name survives any encoding
    return 1 if failed else 0


def _answers(classifier: ZeroShotClassifier, paths: Sequence[str]) -> Iterator[tuple[str, Answer | ImageError]]:
    """For each image its answer, or why the image cannot be read."""
    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            yield path, error
        else:
            yield path, classifier(image)


def answer_lines(path: str, answer: Answer, bars: bool) -> Iterator[str]:
    """The lines of one answer: with ``bars`` a heading and a bar chart, else path, label, probability with tabs."""
    if not bars:
        for label, probability in answer:
            yield f"{path}\t{label}\t{probability:.4f}"
        return
    width = max(len(label) for label, _ in answer)
    room = max(10, min(40, shutil.get_terminal_size().columns - width - 12))
    full = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    yield path
    for label, probability in answer:
        yield f"  {label:<{width}}  {probability:6.1%}  {full * round(probability * room)}"


def _embed(options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow would warn about many of a million files
    dtype = _DTYPES[options.dtype] if options.dtype else None
    note = _EMOJI_ONLY if options.model in BUNDLED else None
    printer = None if options.quiet or sys.stderr is None else _ProgressPrinter(note)
    try:
        done = embed_images(
            options.source,
            options.out,
            options.model,
            device=options.device,
            dtype=dtype,
            batch_size=options.batch_size,
            workers=options.workers,
            shard_size=options.shard_size,
            fast_decode=options.fast_decode,
            progress=printer,
        )
    finally:
        if printer:
            printer.close()
    with contextlib.suppress(BrokenPipeError):  # the run is complete, whether or not somebody reads the summary
        _print_summary(options, done)
    return 0 if done.total else 1


def _print_summary(options: argparse.Namespace, done: Summary) -> None:
    if not options.quiet:
        rate = f" in {_duration(done.seconds)}" if done.embedded else ""
        skipped = f"; {done.skipped:,} other files were skipped" if done.skipped else ""
        print(f"{options.out}: {done.embedded:,} images embedded{rate}, {done.total:,} in all{skipped}")
    if done.failed:
        files = "1 file" if done.failed == 1 else f"{done.failed:,} files"
        _print_error(f"{files} could not be embedded; see {os.path.join(options.out, 'failures.jsonl')}")


class _ProgressPrinter:
    """Prints the progress of a run to stderr: a bar on a terminal, otherwise a line now and then.

    ``note`` is printed once, before the first image is embedded. So a run that fails earlier prints only its error.
    """

    def __init__(self, note: str | None) -> None:
        self._note = note
        self._bar: Any = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):  # a closed stderr is no reason to stop the run
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        if not progress.total:
            return
        if self._note:
            _print_error(self._note)
            self._note = None
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _search(options: argparse.Namespace) -> int:
    index = Index.open(options.folder, options.model)
    image = open_image(options.image) if options.image else None
    matches = index.search(options.text, image, options.k)
    if index.manifest["model"] in BUNDLED and not options.json:  # a program that reads JSON needs no advice
        _print_error(_EMOJI_ONLY)
    if options.json:
        print(json.dumps([{"path": match.path, "score": round(match.score, 6)} for match in matches], indent=2))
    elif sys.stdout is not None and sys.stdout.isatty():
        for rank, match in enumerate(matches, start=1):
            print(f"{rank:>4}  {match.score:.3f}  {match.path}")
    else:
        for match in matches:
            print(f"{match.path}\t{match.score:.4f}")
    return 0


def _models(options: argparse.Namespace) -> int:
    for name, known in KNOWN.items():
        source = known.sources[0]
        place = "in the cache" if cached_model(name) else f"from {source.repo}"
        _print_model(name, known.config, source.megabytes, place)
    for name, folder in BUNDLED.items():
        megabytes = round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6)
        _print_model(
            name, open_checkpoint(folder).clip_config(), megabytes, "in this package, to try things out offline"
        )
    return 0


def _print_model(name: str, config: CLIPConfig, megabytes: int | None, place: str) -> None:
    size = f"{megabytes} MB" if megabytes else ""
    print(f"{name:<16}{config.vision.image_size:>3} px  {config.embed_dim:>3}-d  {size:>8}  {place}")
