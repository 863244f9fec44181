"""Train a CLIP, from scratch or from given weights, as in section 2 of the paper (arXiv:2103.00020).

    python examples/emoji_data.py emoji
    python examples/train.py emoji/train runs/demo --half               the model that load("demo") gives
    python examples/train.py my_photos runs/mine --config ViT-B/16 --augment photos --batch-size 1024 --steps 50000
    python examples/train.py my_photos runs/tuned --init ViT-B/32 --augment photos --learning-rate 1e-5

The first folder holds pictures and a captions.csv with the columns image,caption; a picture may have several rows, of
which one is drawn at random each time. The second receives the model in Hugging Face's layout (miniclip.load and
transformers read it), the learning curve as CSV and as a picture, and the state of the run. Ctrl-C saves that state;
the same command with --resume goes on from there, on the same data in the same order.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import common
import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.hub import KNOWN
from miniclip.huggingface import config_from_dict
from miniclip.model import VisionTransformer

matplotlib.use("Agg")  # a file is drawn, no window
import matplotlib.pyplot as plt

# 64 patches of 8 pixels; OpenAI's vocabulary and context, so that whatever runs on OpenAI's models runs on this one.
DEMO = CLIPConfig(
    embed_dim=128,
    vision=VisionConfig(width=192, layers=6, heads=3, mlp_width=768, patch_size=8, image_size=64),
    text=TextConfig(width=128, layers=3, heads=2, mlp_width=512),
)
LOGIT_SCALE_LIMIT = math.log(100)  # section 2.5: logits are never scaled by more than 100
EASY = 0.2  # the share of a run in which augmentation sets in
WHOLE = 0.1  # the share of a run, its last, that sees all patches

# -- data -------------------------------------------------------------------------------------------------------------


def read_captions(folder: Path) -> dict[str, list[str]]:
    captions = common.read_captions(folder)
    if len({texts[0] for texts in captions.values()}) < 2:
        raise SystemExit(f"{folder} has {len(captions)} pictures, and a contrast takes two of different captions")
    return captions


class Pairs(Dataset[tuple[Tensor, Tensor] | None]):
    """(step, picture) -> RGBA pixels (4, S, S) uint8 and token ids (77,), the same ones whenever it is asked again."""

    def __init__(
        self,
        folder: Path,
        captions: dict[str, list[str]],
        options: argparse.Namespace,
        size: int,
        unknown: Sequence[int] = (),
    ) -> None:
        self.folder = folder
        self.names = list(captions)
        self.captions = list(captions.values())
        self.seed, self.photos, self.size = options.seed, options.augment == "photos", size
        self.context_length = options.context_length
        self.unknown, self.share = unknown, options.unknown_words  # ids, and how many captions receive some of them
        self.reported: set[str] = set()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        step, index = key
        name, pick = self.names[index], random.Random(f"{self.seed} {step} {index}")
        try:
            picture = open_picture(self.folder / name, self.size, pick if self.photos and step >= 0 else None)
        except miniclip.ImageError as error:
            if name not in self.reported:
                self.reported.add(name)
                print(f"\ntrain.py: left out: {error}", file=sys.stderr, flush=True)
            return None
        tokens = miniclip.tokenize(pick.choice(self.captions[index]), self.context_length, truncate=True)[0]
        if self.unknown and pick.random() < self.share:
            tokens = with_unknown_words(tokens, self.unknown, pick)
        return picture, tokens


def with_unknown_words(tokens: Tensor, unknown: Sequence[int], pick: random.Random) -> Tensor:
    """One to three words put anywhere between the start and the end token of a row (77,), where there is room."""
    ids = tokens[: int(tokens.argmax()) + 1].tolist()
    for _ in range(min(pick.randint(1, 3), len(tokens) - len(ids))):
        ids.insert(pick.randint(1, len(ids) - 1), pick.choice(unknown))
    return F.pad(torch.tensor(ids, dtype=tokens.dtype), (0, len(tokens) - len(ids)))


def open_picture(path: Path, size: int, crop: random.Random | None) -> Tensor:
    """A square of the picture, random or central, as (4, size, size): red, green, blue and opacity."""
    try:
        with Image.open(path) as opened:
            transparent = "A" in opened.getbands() or "transparency" in opened.info
            picture = ImageOps.exif_transpose(opened).convert("RGBA") if transparent else None
    except Exception:  # open_image says what is wrong with it
        picture = None
    picture = picture or miniclip.open_image(path).convert("RGBA")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if crop is not None:  # section 2.5: a random square crop is the only augmentation
        side = max(1, round(side * crop.uniform(0.85, 1)))
        left, top = crop.randint(0, picture.width - side), crop.randint(0, picture.height - side)
    box = (left, top, left + side, top + side)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 4).permute(2, 0, 1)


class Batches(Sampler[list[tuple[int, int]]]):
    """Steps ``start`` to ``end`` of an endless reshuffling. It depends on the seed alone, so a run can be resumed.

    Two pictures of one thing (the first caption says so) never share a batch: either's caption would be right for the
    other, and the loss would push them apart.
    """

    def __init__(self, captions: dict[str, list[str]], batch_size: int, seed: int, start: int, end: int) -> None:
        self.things = [texts[0] for texts in captions.values()]
        self.batch_size, self.seed, self.start, self.end = batch_size, seed, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = epoch = 0
        while True:
            for batch in self.epoch(epoch):
                if step == self.end:
                    return
                if step >= self.start:
                    yield [(step, index) for index in batch]
                step += 1
            epoch += 1

    def epoch(self, number: int) -> list[list[int]]:
        order = list(range(len(self.things)))
        random.Random(f"{self.seed} {number}").shuffle(order)
        if self.batch_size > len(set(self.things)):
            return self.rounds(order)
        batches: list[list[int]] = []
        things: list[set[str]] = []
        first_open = 0
        for index in order:
            place = next((i for i in range(first_open, len(batches)) if self.things[index] not in things[i]), None)
            # A batch that is full takes no more; those before the first open one need not be asked.
            while place is not None and len(batches[place]) == self.batch_size:
                after = range(place + 1, len(batches))
                place = next((i for i in after if self.things[index] not in things[i]), None)
            if place is None:
                batches.append([])
                things.append(set())
                place = len(batches) - 1
            batches[place].append(index)
            things[place].add(self.things[index])
            while first_open < len(batches) and len(batches[first_open]) == self.batch_size:
                first_open += 1
        return [batch for batch in batches if len(batch) == self.batch_size] or [max(batches, key=len)]

    def rounds(self, order: list[int]) -> list[list[int]]:
        """Fewer things than a batch would hold: each batch has every one of them, in another picture each time."""
        pictures: dict[str, list[int]] = {}
        for index in order:
            pictures.setdefault(self.things[index], []).append(index)
        times = max(map(len, pictures.values()))
        return [[these[turn % len(these)] for these in pictures.values()] for turn in range(times)]


def collate(pairs: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    good = [pair for pair in pairs if pair is not None]
    if len(good) < 2:
        return None
    pictures, tokens = zip(*good)
    return torch.stack(pictures), torch.stack(tokens)


# -- augmentation: all of a batch at once, on the device ---------------------------------------------------------------


def plain(rgba: Tensor) -> Tensor:
    """(N, 4, S, S) uint8 on white -> RGB in 0..1."""
    rgba = rgba.float() / 255
    return rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])


def drawn(rgba: Tensor, random: torch.Generator, outlines: float = 0.2) -> Tensor:
    """Drawings in other colours, places and sizes, sometimes as outlines, on any ground: (N, 4, S, S) uint8 -> RGB.

    Never mirrored: arrows, hands and letters would change their meaning.
    """
    n, device = len(rgba), rgba.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape, device=device).uniform_(low, high, generator=random)

    def chance(probability: float) -> Tensor:
        return uniform(0, 1, 1, 1, 1) < probability

    rgba = rgba.float() / 255
    alpha = rgba[:, 3:]
    rgba = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)  # premultiplied, so that filtering mixes no hidden colours

    # Some become outlines: dark wherever colour or opacity changes, empty or white inside.
    some = (uniform(0, 1) < outlines).nonzero()[:, 0]
    shape, cover = rgba[some], alpha[some]
    change = (F.max_pool2d(shape, 3, 1, 1) + F.max_pool2d(-shape, 3, 1, 1)).amax(dim=1, keepdim=True)
    line = ((change - uniform(0.05, 0.3, 1, 1, 1)[some]) * uniform(1.5, 4, 1, 1, 1)[some]).clamp(0, 1)
    fill = torch.where(chance(0.5)[some], cover, 0) * (1 - line)
    ink = line * uniform(0, 0.3, 1, 1, 1)[some]
    rgba[some] = torch.cat([(ink + fill).expand(-1, 3, -1, -1), line + fill], dim=1)

    # Size, place and a slight turn.
    angle, stretch = uniform(-0.12, 0.12), uniform(-0.1, 0.1)
    scale = torch.exp(uniform(math.log(0.9), math.log(1.2)))  # of the window that is looked at
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    slack = 0.06 + (scale - 1).clamp(min=0)
    rows = [cos * (1 + stretch), -sin, uniform(-1, 1) * slack, sin, cos * (1 - stretch), uniform(-1, 1) * slack]
    theta = torch.stack(rows, dim=1).view(n, 2, 3)
    rgba = F.grid_sample(rgba, F.affine_grid(theta, list(rgba.shape), align_corners=False), align_corners=False)
    rgb, alpha = rgba[:, :3], rgba[:, 3:]

    # Colours: saturation, contrast, brightness; all linear, so premultiplied colours stay right.
    grey = rgb.mean(dim=1, keepdim=True)
    rgb = grey + (rgb - grey) * torch.where(chance(0.1), 0, uniform(0.7, 1.3, 1, 1, 1))
    rgb = rgb * uniform(0.85, 1.15, 3, 1, 1) + alpha * uniform(-0.1, 0.1, 1, 1, 1)
    rgb = torch.minimum(rgb.clamp(min=0), alpha)

    # The ground: white, one colour, or a soft gradient of four; light behind dark drawings and the other way round.
    corners = uniform(0, 1, 3, 2, 2)
    corners = torch.where(chance(0.5), corners[..., :1, :1].expand(-1, -1, 2, 2), corners)
    ground = F.interpolate(corners, size=rgb.shape[-1], mode="bilinear", align_corners=True)
    ink = rgb.sum(dim=(1, 2, 3)) / (3 * alpha.sum(dim=(1, 2, 3)) + 1e-3)
    clash = (ink - ground.mean(dim=(1, 2, 3))).abs() < 0.25
    opposite = torch.where(ink < 0.5, 0.9, 0.1)[:, None, None, None] * 0.7 + ground * 0.3
    ground = torch.where(clash[:, None, None, None], opposite, ground)
    ground = torch.where(chance(0.7) & (ink < 0.9)[:, None, None, None], 1.0, ground)
    return rgb + ground * (1 - alpha)


def normalise(rgb: Tensor, preprocess: miniclip.Preprocess) -> Tensor:
    mean, std = (rgb.new_tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (rgb - mean) / std


# -- model ------------------------------------------------------------------------------------------------------------


def initialise(model: miniclip.CLIP, vocabulary: Tensor) -> None:
    """Random weights of the sizes openai/CLIP starts from, but for the words that are not in the ``vocabulary``."""
    text, vision = model.config.text, model.config.vision
    for tower, transformer in ((vision, model.visual.transformer), (text, model.transformer)):
        residual = tower.width**-0.5 * (2 * tower.layers) ** -0.5
        sizes = {"in_proj_weight": tower.width**-0.5, "out_proj.weight": residual}
        sizes |= {"c_fc.weight": (2 * tower.width) ** -0.5, "c_proj.weight": residual}
        for name, parameter in transformer.named_parameters():
            for ending, std in sizes.items():
                if name.endswith(ending):
                    nn.init.normal_(parameter, std=std)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.visual.conv1.weight, std=(3 * 3 * vision.patch_size**2) ** -0.5)
    for parameter in (model.visual.class_embedding, model.visual.positional_embedding, model.visual.proj):
        nn.init.normal_(parameter, std=vision.width**-0.5)
    # OpenAI's 0.02 supposes that every row will be trained. A word that no caption holds should say little.
    nn.init.normal_(model.token_embedding.weight, std=0.001)
    with torch.no_grad():
        model.token_embedding.weight[vocabulary] *= 20
    nn.init.normal_(model.positional_embedding, std=0.01)
    nn.init.normal_(model.text_projection, std=text.width**-0.5)
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))


def known_words(captions: dict[str, list[str]], model: miniclip.CLIP) -> Tensor:
    """The ids of all tokens that any caption holds."""
    texts = sorted({text for group in captions.values() for text in group})
    return miniclip.tokenize(texts, model.context_length, truncate=True).long().unique()


def optimiser_for(model: miniclip.CLIP, options: argparse.Namespace) -> torch.optim.AdamW:
    """Weight decay on everything but gains and biases (section 2.5), which are the parameters of fewer dimensions."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def encode_some_patches(visual: VisionTransformer, images: Tensor, keep: int, random: torch.Generator) -> Tensor:
    """The image tower on ``keep`` of its patches, another choice for each image (FLIP, arXiv:2212.00794)."""
    x = visual.embed(images)  # (N, 1 + patches, W)
    chosen = torch.rand(x.shape[0], x.shape[1] - 1, device=x.device, generator=random).argsort(dim=1)[:, :keep] + 1
    x = torch.cat([x[:, :1], x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))], dim=1)  # (N, 1 + keep, W)
    x = visual.transformer(visual.ln_pre(x).transpose(0, 1))
    return visual.ln_post(x[0]) @ visual.proj


def loss_of(model: miniclip.CLIP, images: Tensor, tokens: Tensor, keep: int, random: torch.Generator | None) -> Tensor:
    patches = model.config.vision.grid**2
    if random is not None and keep < patches:
        image_features = encode_some_patches(model.visual, images, keep, random)
    else:
        image_features = model.encode_image(images)
    image_features = F.normalize(image_features.float(), dim=1)
    text_features = F.normalize(model.encode_text(tokens).float(), dim=1)
    with torch.autocast(images.device.type, enabled=False):  # half precision has no room for logits of a hundred
        return miniclip.contrastive_loss(model.logit_scale.exp() * image_features @ text_features.T)


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies matrices in it; it needs no loss scaling."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else None


# -- what a run leaves -------------------------------------------------------------------------------------------------


class Run:
    """The folder of a run: its state, written whole or not at all, and its learning curve."""

    # What may differ when a run goes on. Everything else would make it another run.
    FREE = frozenset({"data", "out", "resume", "device", "workers", "compile", "every", "quiet"})

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.out
        self.settings = {key: str(value) for key, value in vars(options).items() if key not in self.FREE}
        self.curve: list[tuple[int, float, float | None]] = []  # step, training loss, validation loss
        self.state = self.folder / "state.safetensors"
        if self.state.exists() and not options.resume:
            raise SystemExit(f"{self.folder} holds a run already: pass --resume to go on, or another folder")
        if (self.folder / "model.safetensors").exists() and not options.resume:
            raise SystemExit(f"{self.folder} holds a model already: choose another folder")
        if options.resume and not self.state.exists():
            raise SystemExit(f"there is no run to resume in {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self.folder} cannot be made ({error.strerror})") from None

    def save(self, step: int, model: miniclip.CLIP, optimiser: torch.optim.AdamW) -> None:
        tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in optimiser.state:
                    tensors[f"{moment}/{name}"] = optimiser.state[parameter][moment]
        notes = {"step": step, "settings": self.settings, "curve": self.curve}
        temporary = self.state.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"run": json.dumps(notes)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.state)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            kept = "the state saved before is still there" if self.state.exists() else "nothing was saved before"
            raise SystemExit(f"{self.state} cannot be written at step {step} ({error}); {kept}") from None

    def begins_with(self, data: Path) -> None:
        """The captions are a setting as well: of others, the pictures would be divided otherwise."""
        with (data / "captions.csv").open("rb") as file:
            self.settings["captions"] = hashlib.file_digest(file, "sha256").hexdigest()

    def resume(self, model: miniclip.CLIP, optimiser: torch.optim.AdamW) -> int:
        """Put everything back as it was; returns the number of steps done."""
        try:
            with safe_open(self.state, "pt") as file:
                notes = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise SystemExit(f"{self.state} is not the state of a run ({error})") from None
        for key, value in self.settings.items():
            if (before := notes["settings"].get(key)) != value:
                if key == "captions":
                    raise SystemExit(f"the run in {self.folder} was begun with other captions: its data has changed")
                flag = "--" + key.replace("_", "-")
                raise SystemExit(f"the run in {self.folder} had {flag} {before}, not {value}")
        self.curve = [tuple(point) for point in notes["curve"]]
        names = {parameter: name for name, parameter in model.named_parameters()}
        shapes = {f"model/{name}": parameter.shape for parameter, name in names.items()}
        if shapes != {name: value.shape for name, value in tensors.items() if name.startswith("model/")}:
            raise SystemExit(f"the run in {self.folder} has another architecture: its configuration has changed")
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(tensors[f"model/{name}"])
        blank = optimiser.state_dict()
        order = [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]
        state = {
            index: {
                "step": torch.tensor(float(notes["step"])),
                "exp_avg": tensors[f"exp_avg/{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
            }
            for index, name in enumerate(order)
            if f"exp_avg/{name}" in tensors
        }
        optimiser.load_state_dict({"state": state, "param_groups": blank["param_groups"]})
        return int(notes["step"])

    def draw(self) -> None:
        """The learning curve, as numbers and as a picture."""
        with (self.folder / "learning_curve.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "training_loss", "validation_loss"), *self.curve])
        figure, axes = plt.subplots(figsize=(6, 3.6), dpi=160, layout="constrained")
        axes.plot([step for step, *_ in self.curve], [loss for _, loss, _ in self.curve], label="training", color="C0")
        validated = [(step, loss) for step, _, loss in self.curve if loss is not None]
        if validated:
            axes.plot(*zip(*validated), label="validation (pictures never trained on)", color="C1")
        axes.set(xlabel="step", ylabel="contrastive loss", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(self.folder / "learning_curve.png")
        plt.close(figure)


# -- training ---------------------------------------------------------------------------------------------------------


def split(captions: dict[str, list[str]], share: float, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and validation pictures."""
    names = list(captions)
    random.Random(seed).shuffle(names)
    held_out = set(names[: round(share * len(names))])
    train = {name: texts for name, texts in captions.items() if name not in held_out}
    return train, {name: texts for name, texts in captions.items() if name in held_out}


def architecture(options: argparse.Namespace) -> CLIPConfig:
    if options.config == "demo":
        return DEMO
    if options.config in KNOWN:
        return KNOWN[options.config].config
    try:
        config = config_from_dict(json.loads(Path(options.config).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--config {options.config} is neither 'demo', nor one of {', '.join(KNOWN)}, nor a readable "
            f"config.json ({error})"
        ) from None
    if config.text.vocab_size < (ids := miniclip.Tokenizer().vocab_size):
        raise SystemExit(f"{options.config} has room for {config.text.vocab_size} tokens, the vocabulary has {ids}")
    return config


def usable(device: str | None) -> torch.device:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise SystemExit(f"--device {chosen} cannot be used ({str(error).splitlines()[0]})") from None


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    device = usable(options.device)
    captions = read_captions(options.data)
    training, validation = split(captions, options.validation, options.seed)
    if len({texts[0] for texts in training.values()}) < 2:
        raise SystemExit(f"of {len(captions)} pictures --validation {options.validation} leaves too few to train on")
    run = Run(options)
    run.begins_with(options.data)
    if options.init:
        model, preprocess = miniclip.load(options.init, device, dtype=torch.float32)
    else:
        model = miniclip.CLIP(architecture(options)).to(device)
        preprocess = miniclip.Preprocess(size=model.config.vision.image_size)
        initialise(model, known_words(captions, model).to(device))
    unknown = torch.zeros(0, dtype=torch.long)
    if options.unknown_words:
        known = known_words(captions, model)
        unknown = torch.ones(model.vocab_size, dtype=torch.bool).index_fill(0, known, False).nonzero()[:, 0]
    model.requires_grad_(True).train()
    options.context_length = model.context_length
    optimiser = optimiser_for(model, options)
    step = run.resume(model, optimiser) if options.resume else 0

    size, patches = model.config.vision.image_size, model.config.vision.grid**2
    pairs = Pairs(options.data, training, options, size, unknown.tolist())
    unknown = unknown.to(device)
    held_out = Pairs(options.data, validation, options, size)
    held_out_batch = Batches(validation, options.batch_size, options.seed, 0, 1).epoch(0)[0] if validation else []
    held_out_pairs = collate([held_out[-1, index] for index in held_out_batch])
    loader = DataLoader(
        pairs,
        batch_sampler=Batches(training, options.batch_size, options.seed, step, options.steps),
        collate_fn=collate,
        num_workers=options.workers,
        worker_init_fn=_ignore_interrupts,
        pin_memory=device.type == "cuda",
    )
    if options.compile:
        model.visual.transformer.compile()
    stop = _Stop()
    dtype = mixed_precision(device)
    generator = torch.Generator(device)
    losses: list[Tensor] = []
    bar = tqdm(loader, initial=step, total=options.steps, unit="step", disable=options.quiet, dynamic_ncols=True)
    for batch in bar:
        if batch is None:
            raise SystemExit(f"fewer than two pictures of a batch of {options.batch_size} could be read")
        generator.manual_seed(options.seed * 1_000_003 + step)
        pictures, tokens = (tensor.to(device, non_blocking=True) for tensor in batch)
        images = plain(pictures)
        if options.augment == "drawings":
            # From plain pictures to almost none: a tower that has seen nothing yet learns little from disguises.
            share = 0.9 * min(1, step / (EASY * options.steps))
            disguised = torch.rand(len(images), 1, 1, 1, device=device, generator=generator) < share
            images = torch.where(disguised, drawn(pictures, generator, options.outlines), images)
        images = normalise(images, preprocess)
        whole = step >= options.steps * (1 - WHOLE)
        keep = patches if whole else max(1, round(patches * (1 - options.patch_dropout)))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = loss_of(model, images, tokens, keep, generator)
        if not loss.isfinite():
            raise SystemExit(f"the loss of step {step} is {loss.item()}: try a smaller --learning-rate")
        optimiser.zero_grad()
        loss.backward()
        if len(unknown):  # they stand for any word, and none of them is to mean anything
            model.token_embedding.weight.grad.index_fill_(0, unknown, 0)  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=LOGIT_SCALE_LIMIT)
        losses.append(loss.detach())
        step += 1
        if step % options.every == 0 or step == options.steps or stop.asked:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            validated = None
            if held_out_pairs is not None:
                with torch.no_grad():
                    pictures, tokens = (tensor.to(device) for tensor in held_out_pairs)
                    validated = loss_of(model, normalise(plain(pictures), preprocess), tokens, patches, None).item()
            run.curve.append((step, mean, validated))
            run.save(step, model, optimiser)
            shown = "" if validated is None else f", validation {validated:.3f}"
            bar.set_postfix_str(f"loss {mean:.3f}{shown}, scale {model.logit_scale.exp().item():.1f}")
        if stop.asked:
            bar.close()
            run.draw()
            raise SystemExit(f"stopped after {step} of {options.steps} steps; the same with --resume goes on")
    trained = copy.deepcopy(model).to("cpu").half() if options.half else model
    miniclip.save_pretrained(trained, options.out, preprocess)
    run.draw()
    print(f"{options.out}: {step} steps, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


class _Stop:
    """Ctrl-C or a termination lets the step in work end, so that the state saved is that of a whole step."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait


def _ignore_interrupts(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the run decides when its workers end
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of pictures with a captions.csv (image,caption)")
    parser.add_argument("out", type=Path, help="the folder of the run")
    parser.add_argument("--config", default="demo", help="demo, a known model's name or a config.json (default: demo)")
    parser.add_argument("--init", help="start from the weights of this name, path or repository; it has its own config")
    parser.add_argument("--augment", choices=("drawings", "photos"), default="drawings", help="default: drawings")
    parser.add_argument("--outlines", type=float, default=0.2, help="share of drawings turned into them (default: 0.2)")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps (default: 200)")
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--clip", type=float, default=1.0, help="the largest norm of all gradients (default: 1)")
    parser.add_argument("--patch-dropout", type=float, default=0.5, help="until the last tenth (default: 0.5)")
    parser.add_argument(
        "--unknown-words",
        type=float,
        help="share of captions that get words which no caption holds, so that a model from scratch learns to read "
        "past them (default: 0.3; with --init 0, because its words may all mean something)",
    )
    parser.add_argument("--validation", type=float, default=0.03, help="share of pictures held out (default: 0.03)")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode pictures (default: 1)")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--half", action="store_true", help="write the model in float16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the image tower: takes a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if options.learning_rate <= 0 or options.clip <= 0 or options.weight_decay < 0:
        parser.error("--learning-rate and --clip must be above 0, --weight-decay not below it")
    if options.workers < 0 or options.warmup < 0 or not -(2**63) <= options.seed < 2**63:
        parser.error("--workers and --warmup must not be below 0, and --seed is a number of 64 bits")
    if options.steps < 1 or options.every < 1 or options.batch_size < 2:
        parser.error("--steps and --every must be at least 1, --batch-size at least 2: one pair has no contrast")
    if options.unknown_words is None:
        options.unknown_words = 0.0 if options.init else 0.3
    if not 0 <= options.outlines <= 1:
        parser.error("--outlines is a share, from 0 to 1")
    if not (0 <= options.patch_dropout < 1 and 0 <= options.validation < 1 and 0 <= options.unknown_words <= 1):
        parser.error("--patch-dropout, --validation and --unknown-words are shares, from 0 to (the last: up to) 1")
    train(options)


if __name__ == "__main__":
    common.run(main)
