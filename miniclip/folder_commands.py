"""``miniclip index``, ``check`` and ``prune``: the care of a folder of vectors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from miniclip.check import check_folder
from miniclip.inverted_build import LEAST, build_inverted_file
from miniclip.planning import prune
from miniclip.store import EmbeddingStore
from miniclip.terminal import escaped, printable


def add_folder_commands(commands: Any) -> None:
    """Add the commands to the subparsers of ``miniclip``."""
    fast = "make searches of many vectors fast: build an inverted file, or add new vectors to it"
    parser = commands.add_parser("index", help=fast, description=f"M{fast[1:]}.")
    parser.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="where the model of the vectors is now")
    parser.set_defaults(run=_index)

    whole = "compare every file of a folder of vectors with its checksum"
    parser = commands.add_parser("check", help=whole, description=f"C{whole[1:]}, and name what is damaged.")
    parser.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    parser.set_defaults(run=_check)

    parser = commands.add_parser(
        "prune",
        help="remove the vectors of missing and changed images",
        description="Remove from a folder that embed made the vectors of images that the last run no longer found, or "
        "found changed. A search does not show these images in any case. Mount all disks before.",
    )
    parser.add_argument(
        "--left-out",
        action="store_true",
        help="also those of images whose file is there, but which the last run left out (--exclude, --follow-links)",
    )
    parser.add_argument(
        "--gone",
        action="store_true",
        help="also look for every file: an image of a source that was deleted is missing, though no run can say so",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder of the vectors")
    parser.set_defaults(run=_prune)


def _index(options: argparse.Namespace) -> int:
    folder = printable(options.folder)
    done = build_inverted_file(options.folder, options.model, lambda text: print(f"{folder}: {text}", flush=True))
    if done is None:
        print(f"{folder}: fewer than {LEAST:,} vectors, so exact search is fast enough and nothing was built")
        return 0
    found = ", ".join(f"{share:.1%} for {kind}" for kind, share in done.recall.items())
    print(
        f"{folder}: {done.added:,} vectors added, {done.vectors:,} in {done.lists:,} lists; a search probes "
        f"{done.probes} and finds of the ten nearest images {found}"
    )
    return 0


def _prune(options: argparse.Namespace) -> int:
    done = prune(EmbeddingStore(Path(options.folder)), options.left_out, options.gone)
    left_out = f" and {done.left_out:,} left out" if options.left_out else ""
    print(
        f"{printable(options.folder)}: {done.missing:,} missing, {done.changed:,} changed{left_out} images removed, "
        f"{done.left:,} left"
    )
    if done.spared:
        print(f"hidden images that stay, because their files are left out or may come back: {done.spared:,}")
    return 0


def _check(options: argparse.Namespace) -> int:
    folder = printable(options.folder)
    done = check_folder(Path(options.folder))
    for text in done.damaged:
        print(escaped(text), flush=True)
    if done.pending:
        print(f"{folder}: {_shards(done.pending)} planned and not embedded: run the same embed command again")
    for text in done.notices:
        print(f"{folder}: {escaped(text)}")
    state = f"{len(done.damaged):,} damaged" if done.damaged else "every file is whole"
    print(f"{folder}: {_shards(done.shards)}, {done.vectors:,} vectors: {state}")
    return 1 if done.damaged else 0


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"
