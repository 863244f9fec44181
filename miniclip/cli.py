"""The command line: ``miniclip classify`` and ``miniclip models``."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence

import torch

from miniclip import __version__
from miniclip.config import CLIPConfig
from miniclip.errors import ImageError, MiniclipError
from miniclip.hub import BUNDLED, KNOWN, cached_model
from miniclip.loading import load
from miniclip.preprocess import open_image
from miniclip.zero_shot import Answer, ZeroShotClassifier

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 0, 1 if something failed, 2 for a wrong command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name need not be valid text, and a pipe need not have every letter of a label.
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
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
        return 0
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
