"""Train a CLIP, from scratch or from given weights, as in section 2 of the paper (arXiv:2103.00020).

    python training/emoji_data.py emoji
    python training/train.py emoji/train runs/first --half --prompts 0.5 --two-captions --neighbours 4 \\
        --later 'line/*' --steps 8000
    python training/train.py my_images runs/mine --config ViT-B/16 --augment photos --batch-size 1024 --steps 50000
    python training/train.py my_images runs/tuned --init ViT-B/32 --augment photos --learning-rate 1e-5

The first two commands begin the model that load("demo") gives. docs/training.md has all.

The first folder holds images and a captions.csv with the columns image,caption. An image may have several rows. The
first is its concept: a batch never holds two images of one concept. At each step one of the rows is drawn at random;
with --two-captions, the first one and another one. The second folder receives the model in Hugging Face's layout, which
miniclip.load and transformers read, the learning curve as CSV and PNG, and the state of the run. Ctrl-C saves the
state. The same command with --resume continues from there, with the same data in the same order.
"""

import argparse
import copy
import json
import signal
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import augment
import optimise
import pairs
import shared
import torch
from pairs import Batch, Captions
from run_folder import RunFolder
from torch import Tensor, nn
from torch.utils.data import DataLoader

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.hub import KNOWN
from miniclip.huggingface import config_from_dict

with shared.needs("examples"):
    from tqdm import tqdm

# 64 patches of 8 pixels, with OpenAI's vocabulary and context: code for OpenAI's models runs on this one.
DEMO = CLIPConfig(
    embed_dim=128,
    vision=VisionConfig(width=192, layers=6, heads=3, mlp_width=768, patch_size=8, image_size=64),
    text=TextConfig(width=128, layers=3, heads=2, mlp_width=512),
)
PLAIN_START = 0.2  # the first share of a run, in which augmentation grows from nothing to its full strength


def train(options: argparse.Namespace) -> None:
    """A whole run: data, model and optimiser, then the steps, then what is left in the folder."""
    torch.manual_seed(options.seed)
    device = usable_device(options.device)
    captions = pairs.read_captions(options.data)
    training, validation = pairs.split(captions, options.validation, options.seed)
    check_data(captions, training, options)
    folder = RunFolder(options)
    model, preprocess = new_model(options, captions, device)
    optimiser = optimise.optimiser_for(model, options)
    step = folder.resume(model, optimiser) if options.resume else 0

    unknown = (
        pairs.unknown_words(captions, model, options.prompts > 0)
        if options.unknown_words
        else torch.zeros(0, dtype=torch.long)
    )
    batches = training_batches(training, options, model, unknown, start=step)
    held_out = validation_batch(validation, options, model)
    trainer = Trainer(model, preprocess, optimiser, unknown.to(device), options)
    if options.compile:
        model.visual.transformer.compile()

    stop = _Stop()
    losses: list[Tensor] = []
    bar = tqdm(batches, initial=step, total=options.steps, unit="step", disable=options.quiet, dynamic_ncols=True)
    for batch in bar:
        losses.append(trainer.step(step, batch))
        step += 1
        if step % options.every == 0 or step == options.steps or stop.asked:
            mean, validated = torch.stack(losses).mean().item(), trainer.validate(held_out)
            losses.clear()
            folder.curve.append((step, mean, validated))
            folder.save(step, model, optimiser)
            shown = "" if validated is None else f", validation {validated:.3f}"
            bar.set_postfix_str(f"loss {mean:.3f}{shown}, scale {model.logit_scale.exp().item():.1f}")
        if stop.asked:
            bar.close()
            folder.draw()
            raise SystemExit(f"stopped after {step} of {options.steps} steps; --resume continues the run")

    trained = copy.deepcopy(model).to("cpu").half() if options.half else model
    miniclip.save_pretrained(trained, options.out, preprocess)
    folder.draw()
    print(f"{options.out}: {step} steps, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


# -- model and data, before the first step ----------------------------------------------------------------------------


def check_data(captions: Captions, training: Captions, options: argparse.Namespace) -> None:
    """Refuse data of which too little is left to train on."""
    if not pairs.has_contrast(training):
        raise SystemExit(f"of {len(captions)} images --validation {options.validation} leaves too few to train on")
    early = {name: texts for name, texts in training.items() if not fnmatchcase(name, options.later)}
    if options.later and len(early) == len(training):
        raise SystemExit(f"--later {options.later!r} matches none of the {len(training)} training images")
    if not pairs.has_contrast(early):
        raise SystemExit(f"--later {options.later!r} leaves {len(early)} of {len(training)} training images, too few")


def usable_device(name: str | None) -> torch.device:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise SystemExit(f"--device {chosen} cannot be used ({str(error).splitlines()[0]})") from None


def new_model(
    options: argparse.Namespace, captions: Captions, device: torch.device
) -> tuple[miniclip.CLIP, miniclip.Preprocess]:
    """A trainable float32 model, with the weights of --init or with random ones, and its preprocessing."""
    if options.init:
        model, preprocess = miniclip.load(options.init, device, dtype=torch.float32)
    else:
        model = miniclip.CLIP(architecture(options.config)).to(device)
        preprocess = miniclip.Preprocess(size=model.config.vision.image_size)
        optimise.initialise(model, pairs.known_words(captions, model, options.prompts > 0).to(device))
    model.requires_grad_(True).train()
    return model, preprocess


def architecture(name: str) -> CLIPConfig:
    """The configuration called "demo", that of a known model, or the one in a config.json."""
    if name == "demo":
        return DEMO
    if name in KNOWN:
        return KNOWN[name].config
    try:
        config = config_from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        known = ", ".join(KNOWN)
        raise SystemExit(
            f"--config {name} is neither 'demo', nor one of {known}, nor a readable config.json ({error})"
        ) from None
    if config.text.vocab_size < (ids := miniclip.Tokenizer().vocab_size):
        raise SystemExit(f"{name} has room for {config.text.vocab_size} tokens, the vocabulary has {ids}")
    return config


def training_batches(
    captions: Captions, options: argparse.Namespace, model: miniclip.CLIP, unknown: Tensor, start: int
) -> Iterable[Batch | None]:
    """The batches of the steps from ``start`` on, decoded by --workers processes."""
    return DataLoader(
        pairs.Pairs(captions, options, model, unknown.tolist()),
        batch_sampler=pairs.Batches(captions, options, start, options.steps),
        collate_fn=pairs.collate,
        num_workers=options.workers,
        worker_init_fn=_ignore_interrupts,
        pin_memory=model.device.type == "cuda",
    )


def validation_batch(captions: Captions, options: argparse.Namespace, model: miniclip.CLIP) -> Batch | None:
    """One batch of held-out images, the same at every validation."""
    if not captions:
        return None
    examples = pairs.Pairs(captions, options, model)
    indices = pairs.Batches(captions, options, 0, 1).epoch(0)[0]
    return pairs.collate([examples[-1, index] for index in indices])


# -- one step ---------------------------------------------------------------------------------------------------------


class Trainer:
    """Steps of gradient descent. A step's randomness depends on the seed and the step's number alone."""

    def __init__(
        self,
        model: miniclip.CLIP,
        preprocess: miniclip.Preprocess,
        optimiser: torch.optim.AdamW,
        unknown: Tensor,  # ids of the words that no caption contains
        options: argparse.Namespace,
    ) -> None:
        self.model, self.preprocess, self.optimiser = model, preprocess, optimiser
        self.unknown, self.options = unknown, options
        self.patches = model.config.vision.grid**2
        self.dtype = optimise.mixed_precision(model.device)
        self.generator = torch.Generator(model.device)

    def step(self, number: int, batch: Batch | None) -> Tensor:
        """Train on one batch. Returns its loss, a scalar."""
        options, model = self.options, self.model
        if batch is None:
            raise SystemExit(f"fewer than two images of a batch of {options.batch_size} could be read")
        self.generator.manual_seed(options.seed * 1_000_003 + number)
        batch = batch.to(model.device)
        images = augment.normalise(self.augmented(number, batch.pixels), self.preprocess)
        keep = optimise.patches_to_keep(number, self.patches, options)
        for group in self.optimiser.param_groups:
            group["lr"] = optimise.learning_rate(number, options)
        with torch.autocast(model.device.type, self.dtype, enabled=self.dtype is not None):
            loss = optimise.loss_of(model, images, batch, keep, self.generator)
        if not loss.isfinite():
            raise SystemExit(f"the loss of step {number} is {loss.item()}: try a smaller --learning-rate")
        self.optimiser.zero_grad()
        loss.backward()
        if len(self.unknown):  # these words stand for any word, so they must not learn a meaning
            model.token_embedding.weight.grad.index_fill_(0, self.unknown, 0)  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        self.optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=optimise.LOGIT_SCALE_LIMIT)
        return loss.detach()

    def augmented(self, number: int, pixels: Tensor) -> Tensor:
        """(N, 4, S, S) uint8 -> (N, 3, S, S) RGB from 0 to 1. A growing share of the drawings is disguised."""
        images = augment.on_white(pixels)
        if self.options.augment == "photos":
            return images
        # Starts from none, because a tower that has seen nothing yet learns little from disguised drawings.
        share = 0.9 * min(1, number / (PLAIN_START * self.options.steps))
        chosen = torch.rand(len(images), 1, 1, 1, device=images.device, generator=self.generator) < share
        return torch.where(chosen, augment.disguise(pixels, self.generator, self.options.outlines), images)

    @torch.no_grad()
    def validate(self, batch: Batch | None) -> float | None:
        """The loss on held-out images, plain and whole."""
        if batch is None:
            return None
        batch = batch.to(self.model.device)
        images = augment.normalise(augment.on_white(batch.pixels), self.preprocess)
        return optimise.loss_of(self.model, images, batch, self.patches, None).item()


# -- signals ----------------------------------------------------------------------------------------------------------


class _Stop:
    """Lets Ctrl-C or a termination wait for the end of the current step, so that the saved state is complete."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once


def _ignore_interrupts(worker: int) -> None:
    """For the processes that decode images: the run decides when they end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


# -- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of images with a captions.csv (image,caption)")
    parser.add_argument("out", type=Path, help="the folder of the run")
    parser.add_argument("--config", default="demo", help="demo, a known model's name or a config.json (default: demo)")
    parser.add_argument("--init", help="start from this model (a name, path or repository) and its configuration")
    parser.add_argument("--augment", choices=("drawings", "photos"), default="drawings", help="default: drawings")
    parser.add_argument("--outlines", type=float, default=0.2, help="share of drawings made outlines (default: 0.2)")
    parser.add_argument("--steps", type=int, default=3200, help="default: 3200")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: 0.001")
    parser.add_argument("--warmup", type=int, default=200, help="steps (default: 200)")
    parser.add_argument("--weight-decay", type=float, default=0.2, help="default: 0.2")
    parser.add_argument("--clip", type=float, default=1.0, help="the largest norm of all gradients (default: 1)")
    parser.add_argument(
        "--patch-dropout",
        type=float,
        default=0.5,
        help="share of patches dropped until the last tenth of the run (default: 0.5)",
    )
    add_caption_and_batch_options(parser)
    parser.add_argument("--validation", type=float, default=0.03, help="share of images held out (default: 0.03)")
    parser.add_argument("--every", type=int, default=100, help="steps between saved states (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images (default: 1)")
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--half", action="store_true", help="save the model in float16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the image tower; needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    options = parser.parse_args()
    if options.unknown_words is None:
        options.unknown_words = 0.0 if options.init else 0.3
    check(options, parser)
    return options


def add_caption_and_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unknown-words",
        type=float,
        help="share of captions into which words are put that occur in no caption, so that a model trained from "
        "scratch learns to ignore them (default: 0.3, and 0 with --init, where every word may have a meaning)",
    )
    parser.add_argument(
        "--prompts",
        type=float,
        default=0.0,
        help="share of captions put into a sentence such as 'a photo of {a}', for captions that are names (default: 0)",
    )
    parser.add_argument(
        "--two-captions",
        action="store_true",
        help="at each step use an image's first caption and another one, each with a loss of its own "
        "(default: one caption, drawn at random)",
    )
    parser.add_argument(
        "--first-caption",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the steps in which an image comes with its first caption, without drawing among all of them "
        "(default: 0)",
    )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=1,
        help="how many images that follow each other in captions.csv are put into a batch together: neighbours that "
        "resemble each other are hard to tell apart; not in about the first tenth of the run, and not if a batch has "
        "room for all concepts (default: 1)",
    )
    parser.add_argument(
        "--later",
        default="",
        help="leave images whose path matches this pattern, such as 'line/*', out of about the first tenth of the run "
        "(default: none)",
    )


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.learning_rate <= 0 or options.clip <= 0 or options.weight_decay < 0:
        parser.error("--learning-rate and --clip must be above 0, --weight-decay at least 0")
    if options.workers < 0 or options.warmup < 0 or not -(2**63) <= options.seed < 2**63:
        parser.error("--workers and --warmup must be at least 0, and --seed must fit into 64 bits")
    if options.steps < 1 or options.every < 1 or options.neighbours < 1 or options.batch_size < 2:
        parser.error(
            "--steps, --every and --neighbours must be at least 1, --batch-size at least 2: one pair has no contrast"
        )
    shares = (options.outlines, options.unknown_words, options.prompts, options.first_caption)
    if not all(0 <= share <= 1 for share in shares):
        parser.error("--outlines, --unknown-words, --prompts and --first-caption are shares from 0 to 1")
    if options.two_captions and options.first_caption:
        parser.error("--two-captions always uses the first caption: leave --first-caption out")
    if not (0 <= options.patch_dropout < 1 and 0 <= options.validation < 1):
        parser.error("--patch-dropout and --validation are shares from 0 to below 1")


def main() -> None:
    train(parse_arguments())


if __name__ == "__main__":
    shared.main(main)
