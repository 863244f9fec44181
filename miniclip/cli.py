"""The command line: ``miniclip classify``, ``embed``, ``search`` and ``models``."""

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

from miniclip.config import CLIPConfig
from miniclip.embed import Progress, Summary, embed_images
from miniclip.errors import ConfigError, ImageError, MiniclipError
from miniclip.hub import BUNDLED, KNOWN, cached_model
from miniclip.images import open_image
from miniclip.loading import load
from miniclip.search import Index
from miniclip.version import __version__
from miniclip.zero_shot import Answer, ZeroShotClassifier

_SECONDS_BETWEEN_LINES = 30
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 0, 1 if something failed, 2 for a wrong command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name need not be valid text, and a pipe need not have every letter of a label.
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    options = _parser().parse_args(arguments)
    status = 0
    try:
        status = options.run(options)
        if sys.stdout is not None:  # None where it was closed before we started
            sys.stdout.flush()
        return status
    except MiniclipError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough, as `head` does. Python would complain once more at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return status
    except OSError as error:  # no space left for our output
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _complain(f"the output could not be written ({error.strerror})")
        return 1


def _complain(message: str) -> None:
    if sys.stderr is not None:  # where it was closed before we started, print would fall back to the output
        print(f"miniclip: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miniclip", description="Images and words in one space: OpenAI's CLIP.")
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    classify = commands.add_parser(
        "classify",
        help="say which of the labels a picture shows",
        description="Say which of the labels each picture shows, with probabilities.",
    )
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    classify.add_argument(
        "--labels", nargs="+", required=True, metavar="LABEL", help="what it may be, as it stands in the template"
    )
    classify.add_argument(
        "--model", default="ViT-B/32", metavar="NAME_OR_PATH", help="name, path or Hub repository (default: ViT-B/32)"
    )
    classify.add_argument(
        "--template",
        nargs="+",
        default=["a photo of a {}."],
        metavar="TEXT",
        help='the prompt around a label; several are averaged (default: "a photo of a {}.")',
    )
    classify.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    classify.add_argument("--dtype", choices=_DTYPES, help="default: float32 on the CPU, float16 on CUDA")
    classify.add_argument("--json", action="store_true", help="print a list of {image, labels: [{label, probability}]}")
    classify.set_defaults(run=_classify)

    embed = commands.add_parser(
        "embed",
        help="turn the pictures of a folder into vectors",
        description="Embed every picture of a source into a folder, in clip-retrieval's layout. The same command again "
        "goes on where it was ended, and adds what is new.",
    )
    embed.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, a .tar, or a text file of paths (relative ones are from where the command is run)",
    )
    embed.add_argument("--out", required=True, metavar="DIR", help="the folder of the vectors")
    embed.add_argument("--model", default="ViT-B/32", metavar="NAME_OR_PATH", help="default: ViT-B/32")
    embed.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    embed.add_argument("--dtype", choices=_DTYPES, help="what the model computes in; vectors are stored in float16")
    embed.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    embed.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one for each core)")
    embed.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="default: 10,000")
    embed.add_argument("--fast-decode", action="store_true", help="decode JPEGs no larger than needed; not exact")
    embed.add_argument("--quiet", action="store_true", help="no progress, only what failed")
    embed.set_defaults(run=_embed)

    search = commands.add_parser(
        "search",
        help="find pictures among embedded ones",
        description="Find the pictures nearest to a text, to a picture, or to both, in a folder that embed made.",
    )
    search.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    search.add_argument("text", nargs="?", metavar="TEXT", help='what to look for, such as "a dog in the snow"')
    search.add_argument("--image", metavar="IMAGE", help="a picture to find the likes of")
    search.add_argument("--model", metavar="NAME_OR_PATH", help="where the model of the vectors is, if it has moved")
    search.add_argument("-k", type=int, default=10, metavar="N", help="how many (default: 10)")
    search.add_argument("--json", action="store_true", help="print a list of {path, score}")
    search.set_defaults(run=_search)

    models = commands.add_parser("models", help="list the models known by name", description="The known models.")
    models.set_defaults(run=_models)
    return parser


def _classify(options: argparse.Namespace) -> int:
    dtype = _DTYPES[options.dtype] if options.dtype else None
    model, preprocess = load(options.model, options.device, dtype=dtype)
    classifier = ZeroShotClassifier(model, preprocess, options.labels, options.template)
    results: list[dict[str, object]] = []
    failed = 0
    for path, answer in _answers(classifier, options.images):
        if isinstance(answer, ImageError):
            failed += 1
            _complain(str(answer))
            results.append({"image": path, "error": answer.reason})
        elif options.json:
            labels = [{"label": label, "probability": probability} for label, probability in answer]
            results.append({"image": path, "labels": labels})
        else:
            print("\n".join(_lines(path, answer, bars=sys.stdout is not None and sys.stdout.isatty())), flush=True)
    if options.json:
        print(json.dumps(results, indent=2, allow_nan=False))  # ASCII, so that any file name survives any encoding
    return 1 if failed else 0


def _answers(classifier: ZeroShotClassifier, paths: Sequence[str]) -> Iterator[tuple[str, Answer | ImageError]]:
    """One answer per picture, as it comes; a picture that cannot be read is an answer too."""
    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            yield path, error
        else:
            yield path, classifier(image)


def _lines(path: str, answer: Answer, bars: bool) -> Iterator[str]:
    """For a person a heading and bars, for a program one line per label: path, label, probability, tab-separated."""
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
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a sentence for each odd file of a million is no news
    dtype = _DTYPES[options.dtype] if options.dtype else None
    report = None if options.quiet or sys.stderr is None else _Report()
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
            progress=report,
        )
    finally:
        if report:
            report.close()
    with contextlib.suppress(BrokenPipeError):  # by now the status is another matter
        _summarise(options, done)
    return 0 if done.total else 1


def _summarise(options: argparse.Namespace, done: Summary) -> None:
    if not options.quiet:
        rate = f" in {_duration(done.seconds)}" if done.embedded else ""
        skipped = f"; {done.skipped:,} other files were skipped" if done.skipped else ""
        print(f"{options.out}: {done.embedded:,} pictures embedded{rate}, {done.total:,} in all{skipped}")
    if done.failed:
        files = "1 file" if done.failed == 1 else f"{done.failed:,} files"
        _complain(f"{files} could not be embedded; {os.path.join(options.out, 'failures.jsonl')} says why")


class _Report:
    """A bar with pictures a second, failures and the time left for a person, a line now and then for a file."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more, which is no reason to stop
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        if not progress.todo:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                try:
                    from tqdm import tqdm
                except ImportError:
                    raise ConfigError('the package tqdm is missing: pip install "miniclip[embed]"') from None
                self._bar = tqdm(total=progress.todo, unit=" pictures", dynamic_ncols=True)
            self._bar.set_postfix_str(f"{progress.failed:,} failed", refresh=False)
            self._bar.update(progress.done - self._bar.n)
        elif not progress.done:
            print(f"{progress.todo:,} pictures to embed", file=sys.stderr, flush=True)
        elif progress.seconds >= self._next or progress.done == progress.todo:
            self._next = progress.seconds + _SECONDS_BETWEEN_LINES
            rate = progress.done / progress.seconds if progress.seconds else 0.0
            left = (progress.todo - progress.done) / rate if rate else 0.0
            print(
                f"{progress.done:,} of {progress.todo:,} pictures, {progress.failed:,} failed, {rate:.1f} a second, "
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
        _print_model(name, load(name, "cpu")[0].config, megabytes, "in this package, to try things out offline")
    return 0


def _print_model(name: str, config: CLIPConfig, megabytes: int | None, place: str) -> None:
    size = f"{megabytes} MB" if megabytes else ""
    print(f"{name:<16}{config.vision.image_size:>3} px  {config.embed_dim:>3}-d  {size:>8}  {place}")
