"""``miniclip embed`` on a Ray cluster: the same list of images, the same shards, the same folder.

    pip install -c constraints.txt -e ".[ray]"
    python examples/embed_ray.py photos --out vectors                        a Ray of this machine's own
    python examples/embed_ray.py /mnt/photos --out /mnt/vectors --address auto --actors 16 --gpus 0.5

Each actor holds one model. It gets the number of a shard, writes that shard, and takes the next. If an actor dies, Ray
replaces it and the shard starts again. No row is lost or doubled, because the content of a shard depends on its images
alone, and a shard counts only when it is complete. Run the same command again to continue an interrupted run;
``miniclip embed`` continues it too. All machines must see the source and the folder under the same paths.
``--gpus 0.5`` puts two actors on each GPU: one computes while the other waits for its images.
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
from miniclip.manifest import Settings, canonical_name, complete_settings, run_settings
from miniclip.planning import plan, take_over
from miniclip.shard_files import Shard
from miniclip.sources import ImageSource, list_images
from miniclip.store import EmbeddingStore

with common.needs("ray"):
    import ray
    import ray.data

RETRIES = 4  # of a shard whose actor dies. Machines may fail, but if five actors die, the shard itself is the reason.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Worker:
    """One actor: a model that embeds one shard after another."""

    def __init__(self, source: str, out: str, model: str, device: str, dtype: torch.dtype, threads: int) -> None:
        self.source, self.store, self.threads = Path(source), EmbeddingStore(Path(out)), threads
        self.load = partial(miniclip.load, model, device, dtype=dtype)
        self.model = model
        self.encode: Callable[[list[list[ImageSource]]], Iterator[Shard]] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["shard"])
        files = self.store.shard(number)
        try:
            if not files.failures_path.exists():  # another actor may have completed the shard before it died
                self.encode = self.encode or self.make_encoder()
                (shard,) = self.encode([files.read_listing()])
                files.write(shard)
            failed = len(files.read_failures())
            return {"shard": number, "embedded": files.count_vectors(), "failed": failed, "error": ""}
        except miniclip.MiniclipError as error:  # raised, Ray would wrap its sentence in a page of traceback
            return {"shard": number, "embedded": 0, "failed": 0, "error": str(error)}

    def make_encoder(self) -> Callable[[list[list[ImageSource]]], Iterator[Shard]]:
        torch.set_num_threads(self.threads)
        manifest = self.store.manifest()
        if manifest is None or not self.source.exists():  # without this check, every image would fail
            raise miniclip.ConfigError(
                f"{self.store.folder if manifest is None else self.source} is not on {platform.node()}: every machine "
                "must see it under this path"
            )
        clip, preprocess = self.load()
        settings = complete_settings(manifest, {"model": self.model})
        self.store.check_settings(run_settings(settings, clip, preprocess))
        return partial(
            embed.encode_shards,
            clip,
            preprocess,
            batch_size=manifest["batch_size"],
            fast_decode=manifest["fast_decode"],
            workers=self.threads,
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, a .tar, or a text file of paths")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the vectors")
    parser.add_argument("--model", default="ViT-B/32", metavar="NAME_OR_PATH", help="default: ViT-B/32")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 with --gpus, else float32")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--shard-size", type=int, default=1_000, metavar="N", help="default: 1,000")
    parser.add_argument("--fast-decode", action="store_true", help="decode large JPEGs at a fraction of their size")
    parser.add_argument("--address", metavar="ADDRESS", help="of a cluster, or auto (default: a local Ray)")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="models at a time (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, metavar="SHARE", help="of a GPU for each actor (default: 0)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="cores for each actor (default: 1)")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    for name in ("batch_size", "shard_size", "actors", "cpus"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    found = list_images([Path(options.source)])
    store = EmbeddingStore(Path(options.out).absolute())  # actors run in other working folders
    model = canonical_name(options.model)
    dtype = DTYPES[options.dtype or ("float16" if options.gpus else "float32")]
    with store.lock():
        settings = Settings(model, dtype, options.batch_size, options.shard_size, options.fast_decode)
        store.open_run(run_settings(settings, *miniclip.load(model, "cpu", dtype=dtype)))
        plan(store, found, options.shard_size)
        take_over(store)
        if store.pending():
            ray.init(address=options.address, log_to_driver=False)
            if not options.address and ray.cluster_resources().get("GPU", 0) < options.gpus:
                parser.error(f"--gpus {options.gpus:g}: this machine has fewer")
            embed_pending(store, model, dtype, options)
            ray.shutdown()
        total = store.write_failure_summary()
    print(f"{options.out}: {total:,} images in all")


def embed_pending(store: EmbeddingStore, model: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Let the actors write all pending shards, and print a line for each."""
    numbers = [{"shard": files.number} for files in store.pending()]
    results = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
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
        for row in results.iter_rows():
            if row["error"]:
                raise miniclip.MiniclipError(f"shard {row['shard']}: {row['error']}")
            line = f"shard {row['shard']}: {row['embedded']:,} images, {row['failed']:,} failed\n"
            print(line, end="", flush=True)  # one write for the whole line, because Ray prints from another thread
    except ray.exceptions.RayError as error:
        left = store.pending()
        raise miniclip.MiniclipError(
            f"{error} ({len(left):,} shards are left, the first is shard {left[0].number})"
        ) from None


if __name__ == "__main__":
    common.main(main)
