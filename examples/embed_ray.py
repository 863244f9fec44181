"""``miniclip embed`` on a Ray cluster: the same list, the same shards, the same folder.

    pip install -c constraints.txt -e ".[ray]"
    python examples/embed_ray.py photos --out vectors                        a Ray of this machine's own
    python examples/embed_ray.py /mnt/photos --out /mnt/vectors --address auto --actors 16 --gpus 0.5

An actor holds one model. It is given the number of a shard, writes that shard, and takes the next. One that dies is
replaced, and its shard is begun anew: a shard is a function of its files, and there only when it is complete, so no
row is lost or doubled. The same command again goes on where a run was ended, and so does ``miniclip embed``. Source
and folder must be where every machine sees them under the same path. ``--gpus 0.5`` puts two actors on each GPU: one
computes while the other waits for its pictures.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

import miniclip
from miniclip import embed
from miniclip.sources import Item, list_items
from miniclip.store import Shard, Store

with common.needs("ray"):
    import ray
    import ray.data

RETRIES = 4  # of a shard whose actor dies: machines go, but what kills five of them is the shard
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Worker:
    """A model, and what it takes to embed one shard after another with it."""

    def __init__(self, source: str, out: str, model: str, device: str, dtype: torch.dtype, threads: int) -> None:
        self.source, self.store, self.threads = Path(source), Store(Path(out)), threads
        self.load = partial(miniclip.load, model, device, dtype=dtype)
        self.model = model
        self.encode: Callable[[list[list[Item]]], Iterator[Shard]] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["shard"])
        try:
            if not self.store.failed(number).exists():  # or an actor has written it that died before it could say so
                self.encode = self.encode or self.encoder()
                (shard,) = self.encode([self.store.items(number)])
                self.store.write_shard(number, shard)
            failed = len(self.store.failures(number))
            return {"shard": number, "embedded": self.store.rows(number), "failed": failed, "error": ""}
        except miniclip.MiniclipError as error:  # a sentence, of which Ray would make a page
            return {"shard": number, "embedded": 0, "failed": 0, "error": str(error)}

    def encoder(self) -> Callable[[list[list[Item]]], Iterator[Shard]]:
        torch.set_num_threads(self.threads)
        manifest = self.store.manifest()
        if manifest is None or not self.source.exists():  # its pictures would all fail
            raise miniclip.ConfigError(
                f"{self.store.folder if manifest is None else self.source} is not on {platform.node()}: every machine "
                "must see it under this path"
            )
        clip, preprocess = self.load()
        settings = {name: manifest[name] for name in ("batch_size", "shard_size", "fast_decode")}
        self.store.agree(embed.settings_of(self.model, clip, preprocess, **settings))
        batch_size, fast_decode = manifest["batch_size"], manifest["fast_decode"]
        given = {"batch_size": batch_size, "fast_decode": fast_decode, "workers": self.threads}
        return partial(embed.encode_shards, clip, preprocess, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, a .tar, or a text file of paths")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--model", default="ViT-B/32", metavar="NAME_OR_PATH", help="default: ViT-B/32")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 with --gpus, else float32")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="default: 10,000")
    parser.add_argument("--fast-decode", action="store_true", help="decode JPEGs no larger than needed; not exact")
    parser.add_argument("--address", metavar="ADDRESS", help="of a cluster, or auto (default: a Ray of this machine)")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="models at a time (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, metavar="SHARE", help="of a GPU for each actor (default: 0)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="cores for each actor (default: 1)")
    options = parser.parse_args()
    for name in ("batch_size", "shard_size", "actors", "cpus"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    items, _ = list_items(Path(options.source))
    # Actors have folders of their own to work in.
    store = Store(Path(options.out).absolute())
    model = embed.absolute(options.model)
    dtype = DTYPES[options.dtype or ("float16" if options.gpus else "float32")]
    with store.locked():
        numbers = {name: getattr(options, name) for name in ("batch_size", "shard_size", "fast_decode")}
        store.begin(embed.settings_of(model, *miniclip.load(model, "cpu", dtype=dtype), **numbers))
        store.plan(items, options.shard_size)
        if todo := store.todo():
            ray.init(address=options.address, log_to_driver=False)
            if not options.address and ray.cluster_resources().get("GPU", 0) < options.gpus:
                parser.error(f"--gpus {options.gpus:g}: this machine has fewer")
            done = ray.data.from_items([{"shard": number} for number in todo], override_num_blocks=len(todo)).map(
                Worker,
                fn_constructor_args=(
                    str(Path(options.source).absolute()),
                    str(store.folder),
                    model,
                    "cuda" if options.gpus else "cpu",
                    dtype,
                    options.cpus,
                ),
                compute=ray.data.ActorPoolStrategy(size=options.actors),
                num_cpus=options.cpus,
                num_gpus=options.gpus,
                max_task_retries=RETRIES,
            )
            try:
                for row in done.iter_rows():
                    if row["error"]:
                        raise miniclip.MiniclipError(f"shard {row['shard']}: {row['error']}")
                    line = f"shard {row['shard']}: {row['embedded']:,} pictures, {row['failed']:,} failed\n"
                    print(line, end="", flush=True)  # in one piece, because Ray prints from a thread of its own
            except ray.exceptions.RayError as error:
                left = store.todo()
                raise miniclip.MiniclipError(
                    f"{error} ({len(left):,} shards are left, shard {left[0]} first)"
                ) from None
            ray.shutdown()
        total = store.finish()
    print(f"{options.out}: {total:,} pictures in all")


if __name__ == "__main__":
    common.main(main)
