"""The command line: ``miniclip demo``, ``classify``, ``embed``, ``search``, ``index`` and so on."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from miniclip.checkpoint import open_checkpoint
from miniclip.classify_command import advice, answer_lines, as_csv, as_json, images_of, labels_of
from miniclip.config import CLIPConfig
from miniclip.demo_tour import tour
from miniclip.embed import embed_images
from miniclip.embed_command import EMOJI_ONLY, ProgressPrinter, print_summary
from miniclip.errors import ImageError, InputError, MiniclipError, StorageError
from miniclip.files import atomic_write
from miniclip.folder_commands import add_folder_commands
from miniclip.html_page import page
from miniclip.hub import BUNDLED, KNOWN, cached_model
from miniclip.images import MAX_BYTES, open_image
from miniclip.loading import load
from miniclip.parsers import CommandParser, Parser
from miniclip.search import Index
from miniclip.serve import serve
from miniclip.store import EmbeddingStore
from miniclip.terminal import escaped, printable
from miniclip.version import __version__
from miniclip.zero_shot import Answer, ZeroShotClassifier

T = TypeVar("T")
_MANY = 20  # images that take long enough for a progress bar
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 0, 1 if something failed, 2 for a wrong command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name need not be valid text, and the encoding of a pipe need not have every letter of a label.
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("source", "out", "folder", "model", "image", "html"):
        if "" in (value if isinstance(value := getattr(options, name, None), list) else [value]):
            parser.error(f"the {name} is an empty text: is a variable not set?")
    status = 0
    try:
        status = options.run(options)
        if sys.stdout is not None:  # None if it was closed before the program started
            sys.stdout.flush()
        return status
    except MiniclipError as error:
        _print_error(str(error).replace("pass truncate=True", "add --truncate"))
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
        print(f"miniclip: {escaped(message)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="miniclip", description="Images and words in one space: OpenAI's CLIP.")
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
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
    add_folder_commands(commands)
    served = commands.add_parser(
        "serve",
        help="look at a folder of vectors in a browser",
        description="Serve one page over a folder that embed made: search by words or by an image, and classify.",
    )
    served.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    served.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860; 0 takes a free one")
    served.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1, this computer alone")
    served.add_argument("--token", metavar="SECRET", help="what a client must know; needed with another --host")
    served.add_argument("--model", metavar="NAME_OR_PATH", help="where the model of the vectors is now")
    served.set_defaults(run=_serve)
    names = "list the models known by name"
    commands.add_parser("models", help=names, description=f"{names.capitalize()}.").set_defaults(run=_models)
    return parser


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or patterns such as '*.jpg'")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
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
    parser.add_argument("--truncate", action="store_true", help="cut labels that are too long for the model")
    parser.add_argument("--labels-file", metavar="FILE", help="more labels, one in each line; - is standard input")
    parser.add_argument("--top-k", type=int, metavar="N", help="print only the N most probable labels")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of {image, labels: [{label, probability}]}")
    form.add_argument("--csv", action="store_true", help="print lines of image,label,probability")
    parser.set_defaults(run=_classify, usage_error=parser.error)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="folders, images, .tar files, or text files of paths (relative paths start at the current folder)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the vectors")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="default: the model of DIR if it holds vectors, else ViT-B/32"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: cuda if available)")
    parser.add_argument("--dtype", choices=_DTYPES, help="for the computation; vectors are stored in float16")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images that go through the model together (default: that of DIR, else 32)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one for each core)")
    parser.add_argument(
        "--shard-size", type=int, metavar="N", help="images in one shard (default: that of DIR, else 1,000)"
    )
    parser.add_argument(
        "--fast-decode",
        action=argparse.BooleanOptionalAction,
        help="decode large JPEGs at a fraction of their size; faster, not exact (default: as DIR was made)",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave out files or folders, such as 'raw/'"
    )
    parser.add_argument(
        "--no-default-excludes",
        dest="default_excludes",
        action="store_false",
        help="take hidden folders, waste bins, thumbnails and the insides of photo libraries too",
    )
    parser.add_argument(
        "--max-image-bytes",
        type=int,
        default=MAX_BYTES,
        metavar="N",
        help="refuse images whose decoded pixels take more bytes (default: 2^29, which is 134 million pixels)",
    )
    parser.add_argument("--follow-links", action="store_true", help="enter folders through symbolic links")
    parser.add_argument("--quiet", action="store_true", help="print no progress, only errors")
    parser.set_defaults(run=_embed)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    parser.add_argument(
        "text", nargs="*", metavar="TEXT", help='what to look for, such as "a dog in the snow"; several texts are added'
    )
    parser.add_argument("--image", metavar="IMAGE", help="an image to compare with")
    parser.add_argument(
        "--not",
        dest="without",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text to avoid; repeatable",
    )
    parser.add_argument("--template", default="{}", metavar="TEXT", help='the prompt around a text (default: "{}")')
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long for the model")
    parser.add_argument("--min-score", type=float, metavar="COSINE", help="leave out images with a lower score")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="where the model of the vectors is now, if it has moved"
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="how many images (default: 10)")
    parser.add_argument("--html", metavar="FILE", help="also write a page with thumbnails, to look at or to send")
    parser.add_argument("--missing", action="store_true", help="show missing images too, marked as such")
    parser.add_argument("--exact", action="store_true", help="compare with every vector, also where index was run")
    parser.add_argument("--json", action="store_true", help="print a list of {path, score, missing}")
    parser.set_defaults(run=_search)


def _demo(options: argparse.Namespace) -> int:
    for line in tour(*load("demo", "cpu")):
        print(line, flush=True)
    return 0


def _classify(options: argparse.Namespace) -> int:
    if not options.labels and options.labels_file is None:
        options.usage_error("give --labels or --labels-file")
    if options.top_k is not None and options.top_k < 1:
        raise InputError(f"--top-k must be at least 1, got {options.top_k}")
    labels, images = labels_of(options.labels, options.labels_file), images_of(options.images)
    if text := advice(labels):
        _print_error(text)
    dtype = _DTYPES[options.dtype] if options.dtype else None
    model, preprocess = load(options.model, options.device, dtype=dtype)
    classifier = ZeroShotClassifier(model, preprocess, labels, options.template, truncate=options.truncate)
    results: list[tuple[str, Answer | ImageError]] = []
    failed = 0
    if options.csv:
        print(as_csv([("image", "label", "probability")]))
    for path, answer in _bar(_answers(classifier, images), len(images)):
        if isinstance(answer, ImageError):
            failed += 1
            _print_error(str(answer))
        else:
            answer = answer[: options.top_k]
        if options.json:
            results.append((path, answer))
        elif isinstance(answer, ImageError):
            continue
        elif options.csv:
            print(as_csv([(path, label, f"{probability:.4f}") for label, probability in answer]), flush=True)
        else:
            bars = sys.stdout is not None and sys.stdout.isatty()
            print("\n".join(answer_lines(path, answer, bars)), flush=True)
    if options.json:
        print(as_json(results))
    return 1 if failed else 0


def _bar(items: Iterable[T], total: int) -> Iterable[T]:
    """The items, with a progress bar if they are many and the answers do not appear on the same terminal."""
    if total < _MANY or sys.stderr is None or not sys.stderr.isatty() or (sys.stdout and sys.stdout.isatty()):
        return items
    with contextlib.suppress(ImportError):  # tqdm is not needed to classify
        from tqdm import tqdm

        return tqdm(items, total=total, unit=" images", dynamic_ncols=True)
    return items


def _answers(classifier: ZeroShotClassifier, paths: Sequence[str]) -> Iterator[tuple[str, Answer | ImageError]]:
    """For each image its answer, or why the image cannot be read."""
    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            yield path, error
        else:
            yield path, classifier(image)


def _embed(options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow would warn about many of a million files
    dtype = _DTYPES[options.dtype] if options.dtype else None
    printer = None if options.quiet or sys.stderr is None else ProgressPrinter(_print_error)
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
            exclude=options.exclude,
            default_excludes=options.default_excludes,
            follow_links=options.follow_links,
            max_image_bytes=options.max_image_bytes,
            progress=printer,
        )
    except KeyboardInterrupt:
        kept = sum(shard.count_vectors() for shard in EmbeddingStore(Path(options.out)).complete())
        _print_error(f"interrupted: {options.out} holds {kept:,} vectors, and the same command goes on after them")
        return 130
    finally:
        if printer:
            printer.close()
    with contextlib.suppress(BrokenPipeError):  # the run is complete, whether or not somebody reads the summary
        print_summary(options, done, _print_error)
    return 0 if done.total else 1


def _search(options: argparse.Namespace) -> int:
    if not all(text.strip() for text in (*options.text, *options.without)):
        raise InputError("a text to search for is empty: is a variable not set?")
    if options.html and not Path(options.html).absolute().parent.is_dir():
        raise InputError(f"{options.html} cannot be written: its folder does not exist")
    index = Index.open(options.folder, options.model)
    image = open_image(options.image) if options.image else None
    threads = torch.get_num_threads()
    if image is None:
        # A few texts are little work. On a busy machine, threads that wait for each other took thirty times as long.
        torch.set_num_threads(1)
    query = index.encode_query(
        options.text, image, without=options.without, template=options.template, truncate=options.truncate
    )
    torch.set_num_threads(threads)
    matches = index.nearest(query, options.k, min_score=options.min_score, missing=options.missing, exact=options.exact)
    if index.notice and not options.exact:
        _print_error(index.notice)
    if not matches and options.min_score is not None:
        _print_error(f"no image reaches --min-score {options.min_score:g}")
    if options.html:
        text = page(index, matches, _title(options))
        try:
            atomic_write(Path(options.html), text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise StorageError(f"{options.html} cannot be written ({error.strerror})") from None
    if index.manifest["model"] in BUNDLED and not options.json:  # a program that reads JSON needs no advice
        _print_error(EMOJI_ONLY)
    if options.json:
        rows = [{"path": match.path, "score": round(match.score, 6), "missing": match.missing} for match in matches]
        print(json.dumps(rows, indent=2))
    elif sys.stdout is not None and sys.stdout.isatty():
        for rank, match in enumerate(matches, start=1):
            print(f"{rank:>4}  {match.score:.3f}  {printable(match.path)}{'  (missing)' * match.missing}")
    else:
        for match in matches:
            print(f"{printable(match.path)}\t{match.score:.4f}{chr(9) + 'missing' if match.missing else ''}")
    return 0


def _title(options: argparse.Namespace) -> str:
    """What was searched for: "a dog + photo.jpg, but not snow"."""
    wanted = " + ".join([*options.text, *([options.image] if options.image else [])])
    return f"{wanted}, but not {', not '.join(options.without)}" if options.without else wanted


def _serve(options: argparse.Namespace) -> int:
    serve(
        Path(options.folder),
        options.host,
        options.port,
        options.token,
        options.model,
        lambda text: print(text, flush=True),
    )
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
