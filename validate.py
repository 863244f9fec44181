"""The proof: miniclip beside transformers.CLIPModel, stage by stage, on real photos and texts.

    python validate.py                      the demo model, ViT-B/32 and ViT-B/16, no network needed
    python validate.py --download           the same on OpenAI's weights, fetched where they are not in the cache
    python validate.py --model FOLDER       any Hugging Face folder

Without OpenAI's weights the models are validated on seeded checkpoints of exactly their architecture, written by
transformers and read by ``miniclip.load``. Exits 1 and names the first stage that drifts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

# transformers would otherwise fetch a second copy of every pickle it loads, in a thread of its own
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
from miniclip import hub
from miniclip.model import path_of
from miniclip.checkpoint import non_finite, open_checkpoint
from miniclip.huggingface import config_to_dict

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Words of several scripts and lengths, an end token typed in the middle of a text, and one text cut to the context.
# None of the strings on which OpenAI's and Hugging Face's cleaning differ: those are pinned in tests/data.
TEXTS = (
    "a photo of an astronaut.",
    "a photo of a cat.",
    "a cup of coffee on a wooden table",
    "A ROCKET ON ITS LAUNCH PAD AT NIGHT!",
    "",
    "um café à São Paulo, größer als 2 & 3",
    "一只猫 и кошка 🐱👩‍🚀",
    "first half <|endoftext|> second half",
    "a very long caption " * 40,
)


# -- what is measured, and how far it may be off --------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How far each kind of stage may be off.

    ``hidden`` bounds max|Δ| / max|reference|, ``embedding`` max|Δ| of unit vectors, ``logits`` and ``probabilities``
    max|Δ|; ``cosine`` is the least cosine that any vector of a hidden state or embedding may have.
    """

    hidden: float = 0.0
    embedding: float = 0.0
    logits: float = 0.0
    probabilities: float = 0.0
    cosine: float = 0.0


def limits_for(device: str, dtype: torch.dtype) -> Limits:
    """The limits of a device type and dtype. The reference is transformers in float32, or float64 for float64."""
    # Half precision is bound by the cosine; the other limits only notice what a cosine does not, a wrong scale.
    if dtype == torch.float16:
        return Limits(hidden=2e-2, embedding=5e-3, logits=0.2, probabilities=0.05, cosine=0.99999)
    if dtype == torch.bfloat16:
        return Limits(hidden=1e-1, embedding=3e-2, logits=2.0, probabilities=0.2, cosine=0.9995)
    if dtype == torch.float64:
        return Limits(hidden=1e-12, embedding=1e-12, logits=1e-12, probabilities=1e-12)
    if device == "cpu":
        return Limits(hidden=5e-6, embedding=1e-6, logits=2e-4, probabilities=1e-4)
    # Not yet measured on a device: ten times the CPU's, as the embeddings'.
    return Limits(hidden=5e-5, embedding=1e-5, logits=2e-3, probabilities=1e-3)


@dataclass(frozen=True)
class Row:
    """One stage: differences over all elements, the least cosine over its vectors, and the verdict."""

    stage: str
    max_abs: float
    relative: float
    cosine: float
    limit: str
    ok: bool


@dataclass(frozen=True)
class Report:
    """One model on one device in one dtype."""

    model: str
    weights: str
    device: str
    dtype: str
    path: str
    rows: tuple[Row, ...]

    @property
    def first_drift(self) -> Row | None:
        """The first stage beyond its limit."""
        return next((row for row in self.rows if not row.ok), None)


def measure(stage: str, ours: Tensor, reference: Tensor, kind: str, limits: Limits) -> Row:
    """Compare two tensors of one stage. ``kind`` is "exact" or the name of one of the limits."""
    if ours.shape != reference.shape:
        return Row(stage, math.nan, math.nan, math.nan, f"shape {tuple(reference.shape)}", ok=False)
    a, b = ours.detach().cpu().double(), reference.detach().cpu().double()
    max_abs = (a - b).abs().max().item()
    relative = max_abs / max(b.abs().max().item(), 1e-300)
    cosine = F.cosine_similarity(a, b, dim=-1).min().item()
    if kind == "exact":
        return Row(stage, max_abs, relative, cosine, "exact", ok=max_abs == 0)
    value, name = (relative, "rel") if kind == "hidden" else (max_abs, "abs")
    bound: float = getattr(limits, kind)
    limit, ok = f"{name} ≤ {bound:g}", value <= bound
    if limits.cosine and kind in ("hidden", "embedding"):
        limit, ok = f"{limit}, cosine ≥ {limits.cosine}", ok and cosine >= limits.cosine
    return Row(stage, max_abs, relative, cosine, limit, ok)


# -- the comparison -------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    model: miniclip.CLIP,
    reference: CLIPModel,
    preprocess: miniclip.Preprocess,
    *,
    photos: Sequence[Image.Image] | None = None,
    texts: Sequence[str] = TEXTS,
    tokenize: Callable[..., Tensor] = miniclip.tokenize,
    processor: CLIPImageProcessorPil | None = None,
    limits: Limits | None = None,
) -> list[Row]:
    """Follow photos and texts through both models, stage by stage.

    Args:
        model, preprocess: miniclip's, as loaded.
        reference: transformers' model on the same device, in float32 (float64 for a float64 model), with sdpa.
        photos: PIL images; four of scikit-image's unless given.
        texts: strings on which OpenAI's and Hugging Face's cleaning agree.
        tokenize: what turns texts into ids.
        processor: transformers' preprocessing; CLIP's usual one at the reference's image size unless given.
        limits: those of the model's device and dtype unless given.

    Returns:
        One row per stage, in the order the data takes.
    """
    limits = limits or limits_for(model.device.type, model.dtype)
    photos = list(photos) if photos is not None else sample_photos()
    rows = [_weights(model)]

    if processor is None:
        size: Any = reference.vision_model.config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    ids, padded = _token_ids(texts, model.context_length)
    if padded.max() >= model.vocab_size:
        raise miniclip.InputError(f"the texts need ids up to {padded.max()}, the model has {model.vocab_size}")
    rows.append(measure("token ids", tokenize(list(texts), model.context_length, truncate=True), ids, "exact", limits))

    by_huggingface: Tensor = processor(photos, return_tensors="pt")["pixel_values"]
    for convention, pixels in (("openai", _openai_pixels(photos, processor)), ("huggingface", by_huggingface)):
        ours = replace(preprocess, convention=convention)(photos)
        rows.append(measure(f"pixels ({convention})", ours, pixels, "exact", limits))

    pixels, tokens = by_huggingface.to(model.device), padded.to(model.device)
    # A first small call may run the plain modules; what is compared is what all later ones run.
    model.encode_image(pixels)
    model.encode_text(tokens)
    rows += _image_stages(model, reference, pixels, limits)
    rows += _text_stages(model, reference, tokens, limits)
    rows += _joint_stages(model, reference, pixels, tokens, limits)
    return rows


def _weights(model: miniclip.CLIP) -> Row:
    bad = [f"{name} holds {count}" for name, count in non_finite(model)]
    if bad:
        return Row(
            "weights finite", math.nan, math.nan, math.nan, f"none, but {', '.join(bad)} NaN or infinity", ok=False
        )
    return Row("weights finite", 0.0, 0.0, 1.0, "all", ok=True)


def _image_stages(model: miniclip.CLIP, reference: CLIPModel, pixels: Tensor, limits: Limits) -> Iterator[Row]:
    visual, theirs = model.visual, reference.vision_model
    embedded = visual.embed(pixels.to(model.dtype))
    yield measure("patch embedding", embedded, theirs.embeddings(pixels.to(reference.dtype)), "hidden", limits)
    outputs = theirs(pixels.to(reference.dtype), output_hidden_states=True)
    states = visual.hidden_states(pixels)
    yield from _blocks("image", "ln_pre", states, outputs.hidden_states, limits)
    yield measure("image pooled", visual.ln_post(states[-1][:, 0]), outputs.pooler_output, "hidden", limits)
    expected = F.normalize(reference.visual_projection(outputs.pooler_output), dim=1)
    for path, features in (("plain", visual(pixels.to(model.dtype))), ("as used", model.encode_image(pixels))):
        yield measure(f"image embedding ({path})", F.normalize(features, dim=1), expected, "embedding", limits)


def _text_stages(model: miniclip.CLIP, reference: CLIPModel, tokens: Tensor, limits: Limits) -> Iterator[Row]:
    text = model.text
    outputs = reference.text_model(tokens, output_hidden_states=True)
    states = model.hidden_states(tokens)
    yield from _blocks("text", "token embedding", states, outputs.hidden_states, limits)
    ends = states[-1][torch.arange(len(tokens)), model.end_positions(tokens)]
    yield measure("text pooled", model.ln_final(ends), outputs.pooler_output, "hidden", limits)
    expected = F.normalize(reference.text_projection(outputs.pooler_output), dim=1)
    for path, features in (("plain", text(tokens)), ("as used", model.encode_text(tokens))):
        yield measure(f"text embedding ({path})", F.normalize(features, dim=1), expected, "embedding", limits)


def _joint_stages(
    model: miniclip.CLIP, reference: CLIPModel, pixels: Tensor, tokens: Tensor, limits: Limits
) -> Iterator[Row]:
    expected = reference(pixel_values=pixels.to(reference.dtype), input_ids=tokens).logits_per_image
    logits, _ = model(pixels, tokens)
    yield measure("logits", logits, expected, "logits", limits)
    yield measure("probabilities", logits.to(reference.dtype).softmax(1), expected.softmax(1), "probabilities", limits)


def _blocks(
    tower: str, first: str, states: Sequence[Tensor], expected: Sequence[Tensor], limits: Limits
) -> Iterator[Row]:
    for i, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
        yield measure(f"{tower} block {i}" if i else f"{tower} {first}", ours, theirs, "hidden", limits)


# -- independent references for the inputs --------------------------------------------------------------------------


def reference_tokenizer() -> CLIPTokenizer:
    """Hugging Face's tokenizer (Rust) over the merges in the package: its algorithm, none of miniclip's code."""
    table = gzip.decompress((files("miniclip") / "data" / "merges.txt.gz").read_bytes()).decode()
    merges: list[Any] = [tuple(line.split(" ")) for line in table.splitlines()]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def _token_ids(texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
    """Hugging Face's ids, (N, L), padded with zeros as OpenAI does, and with the end token as Hugging Face does."""
    encoded = reference_tokenizer()(
        list(texts), padding="max_length", truncation=True, max_length=context_length, return_tensors="pt"
    )
    return encoded.input_ids * encoded.attention_mask, encoded.input_ids


def _openai_pixels(photos: Sequence[Image.Image], processor: CLIPImageProcessorPil) -> Tensor:
    """openai/CLIP's steps with Pillow and torch, to transformers' settings. torchvision's own outputs are pinned in
    tests/data."""
    short, size = processor.size["shortest_edge"], processor.crop_size["height"]
    batch = []
    for photo in photos:
        scale = min(photo.size)
        width, height = (short if side == scale else int(short * side / scale) for side in photo.size)
        # "centre" in torchvision is Python's round, which takes halves to the even side
        left, top = round((width - size) / 2), round((height - size) / 2)
        crop = photo.resize((width, height), processor.resample).crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(crop.convert("RGB"))).permute(2, 0, 1).float().div(255)
        batch.append(pixels)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (torch.stack(batch) - mean) / std


def sample_photos() -> list[Image.Image]:
    """Four photographs that scikit-image ships, of sizes that exercise both roundings of the crop."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return [Image.open(folder / name).convert("RGB") for name in names]


# -- which weights --------------------------------------------------------------------------------------------------

# transformers' own copies of OpenAI's weights. Where OpenAI's repository has a pickle only, so has transformers.
REFERENCES = {
    "ViT-B/32": hub.KNOWN["ViT-B/32"].sources[1],
    "ViT-B/16": hub.Source("openai/clip-vit-base-patch16", "main", "pytorch_model.bin"),
    "ViT-L/14": hub.KNOWN["ViT-L/14"].sources[0],
    "ViT-L/14@336px": hub.Source("openai/clip-vit-large-patch14-336", "main", "pytorch_model.bin"),
}


@dataclass(frozen=True)
class Pair:
    """Where each side reads its weights: miniclip a name or path, transformers ``from_pretrained``'s arguments."""

    description: str
    ours: str
    theirs: str
    revision: str | None = None
    real: bool = False

    def load(
        self, device: str, dtype: torch.dtype
    ) -> tuple[miniclip.CLIP, miniclip.Preprocess, CLIPModel, CLIPImageProcessorPil | None]:
        model, preprocess = miniclip.load(self.ours, device, dtype=dtype)
        processor = None
        try:
            with _quiet():
                reference = CLIPModel.from_pretrained(
                    self.theirs,
                    revision=self.revision or "main",
                    dtype=torch.float64 if dtype == torch.float64 else torch.float32,
                    attn_implementation="sdpa",
                    local_files_only=True,
                )
                if any((Path(self.theirs) / name).is_file() for name in _PROCESSOR_FILES):
                    processor = CLIPImageProcessorPil.from_pretrained(self.theirs)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise miniclip.ConfigError(f"{self.theirs}: transformers cannot load it ({reason})") from None
        return model, preprocess, reference.eval().to(model.device), processor


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and notes from transformers, and those of a download left as they were."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


@contextmanager
def weights_for(name: str, download: bool) -> Iterator[Pair]:
    """The weights to validate a model on: OpenAI's if both sides have them, else seeded ones in a temporary folder."""
    if name in hub.BUNDLED:
        yield Pair("the trained weights in the package", name, str(hub.BUNDLED[name]))
        return
    if name not in hub.KNOWN:
        path = Path(name).expanduser()
        if not path.exists():
            path = hub.fetch_repository(*name.split("@", 1)) if "/" in name else path
        if not (path / "config.json").is_file():
            raise miniclip.ConfigError(f"{name}: transformers can only read a Hugging Face folder with a config.json")
        yield Pair(f"the weights in {name}", str(path), str(path))
        return
    source = REFERENCES[name]
    ours = hub.cached_model(name)
    if download and not _both_can_read(ours):
        _download(name, source)
        ours = hub.cached_model(name)
    if ours and _is_cached(source):
        both = f"{source.repo}'s {source.filename}"
        yield Pair(f"OpenAI's weights, transformers reading {both}", name, source.repo, source.revision, real=True)
        return
    with tempfile.TemporaryDirectory(prefix="miniclip-validate-") as folder:
        if ours and _both_can_read(ours):
            (Path(folder) / "model.safetensors").symlink_to(ours.resolve())
            hf_config(hub.KNOWN[name].config).save_pretrained(folder)
            yield Pair("OpenAI's weights, both reading one file", name, folder, real=True)
            return
        seeded_checkpoint(hub.KNOWN[name].config, Path(folder))
        whose = f"transformers' copy of OpenAI's weights ({source.repo})" if ours else "OpenAI's weights"
        reason = f"{whose} not in the cache; --download fetches them"
        yield Pair(f"a seeded checkpoint of {name}'s architecture ({reason})", folder, folder)


def _both_can_read(weights: Path | None) -> bool:
    return weights is not None and open_checkpoint(weights).layout == "hf"


def seeded_checkpoint(config: miniclip.CLIPConfig, folder: Path, seed: int = 0) -> None:
    """Write a Hugging Face checkpoint of an architecture, random, but with no bias at zero and no gain at one.

    Matrices keep the variance of what passes through them. With transformers' own small ones every token attends
    almost evenly to all others, and half precision hides a swapped query and key.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = CLIPModel(hf_config(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(4.6052)  # ln 100, where OpenAI's training clamps it
            elif parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    with _quiet():
        model.save_pretrained(folder)
    torch.random.set_rng_state(state)


def hf_config(config: miniclip.CLIPConfig) -> CLIPConfig:
    """An architecture in transformers' words."""
    return CLIPConfig(**config_to_dict(config))


def _is_cached(source: hub.Source) -> bool:
    return hub.is_cached(source) and hub.is_cached(replace(source, filename="config.json", sha256=None))


def _download(name: str, source: hub.Source) -> None:
    """Fetch both sides' weights, saying how much. Transformers' go first: those of B/32 serve miniclip as well."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    wanted = [source]
    if source not in (sources := hub.KNOWN[name].sources) and not hub.cached_model(name):
        wanted.append(sources[0])
    for item in wanted:
        if hub.is_cached(item):
            continue
        try:
            size = get_hf_file_metadata(hf_hub_url(item.repo, item.filename, revision=item.revision), timeout=5).size
        except Exception:  # whatever it is, fetching the file says it in a sentence
            size = None
        megabytes = f"{size / 1e6:,.0f} MB" if size else "of unknown size"
        print(f"downloading {item.filename} of {item.repo}: {megabytes}", file=sys.stderr)
    hub.fetch(replace(source, filename="config.json", sha256=None))
    hub.fetch(source)
    hub.fetch_known(name)


# -- numbers others have published ----------------------------------------------------------------------------------


@torch.no_grad()
def published(model: miniclip.CLIP) -> Row:
    """ViT-B/32's logits for two constant images and two typed-in texts, as Bumblebee's CLIP test has them, ± 1e-4.

    On CUDA, as for the other logits, ten times what the CPU is allowed.
    """
    pixels = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 3, 224, 224)
    tokens = torch.tensor([[49406, 320, 1125, 539, 320, word, 49407] for word in (2368, 1929)])
    expected = torch.tensor([[22.7866, 22.8397], [23.2389, 22.8406]])
    _, logits_per_text = model(pixels.to(model.device), tokens.to(model.device))
    limits = Limits(logits=1e-4 if model.device.type == "cpu" else 1e-3)
    return measure("published logits", logits_per_text, expected, "logits", limits)


# -- the command line -----------------------------------------------------------------------------------------------


def validate(pair: Pair, name: str, device: str, dtype: torch.dtype) -> Report:
    """Run the comparison of one model on one device in one dtype."""
    model, preprocess, reference, processor = pair.load(device, dtype)
    rows = compare(model, reference, preprocess, processor=processor)
    if pair.real and name == "ViT-B/32" and dtype in (torch.float32, torch.float64):
        rows.append(published(model))
    dtype_name = str(dtype).removeprefix("torch.")
    return Report(name, pair.description, device, dtype_name, path_of(model), tuple(rows))


def print_report(report: Report) -> None:
    print(f"{report.model} on {report.device} in {report.dtype}: {report.weights}")
    print(f"the path of what is used: {report.path}\n")
    line = "{:<26} {:>10} {:>10} {:>12}  {:<18} {}"
    print(line.format("stage", "max abs Δ", "relative", "cosine", "limit", "ok"))
    for row in report.rows:
        verdict = "ok" if row.ok else "DRIFTS"
        numbers = f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine:.9f}"
        print(line.format(row.stage, *numbers, row.limit, verdict))
    print()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Validate miniclip against transformers, stage by stage.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["demo", "ViT-B/32", "ViT-B/16"],
        metavar="NAME_OR_PATH",
        help="known names, Hugging Face folders or Hub repositories (default: demo ViT-B/32 ViT-B/16)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: the CPU, and CUDA where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, and on CUDA float16 as well")
    parser.add_argument("--download", action="store_true", help="fetch OpenAI's weights if they are not in the cache")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    devices = [options.device] if options.device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    reports: list[Report] = []
    failed = False
    for name in options.model:
        try:
            name = hub.ALIASES.get(name, name)
            with weights_for(name, options.download) as pair:
                for device in devices:
                    usual = ["float32", "float16"] if device.startswith("cuda") else ["float32"]
                    for dtype in [options.dtype] if options.dtype else usual:
                        reports.append(validate(pair, name, device, DTYPES[dtype]))
                        if not options.json:
                            print_report(reports[-1])
        except miniclip.MiniclipError as error:
            print(f"validate.py: {error}", file=sys.stderr)
            failed = True
    if options.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        result = {"versions": versions, "reports": [_finite(asdict(report)) for report in reports]}
        print(json.dumps(result, indent=2, allow_nan=False))
    drifting = [(report, row) for report in reports if (row := report.first_drift)]
    for report, row in drifting:
        print(
            f"validate.py: {report.model} on {report.device} in {report.dtype} first drifts at {row.stage!r}: "
            f"max abs {row.max_abs:.1e}, relative {row.relative:.1e}, cosine {row.cosine:.6f}, limit {row.limit}",
            file=sys.stderr,
        )
    if not (drifting or failed or options.json):
        stages = sum(len(report.rows) for report in reports)
        print(f"{stages} stages of {len(reports)} validations within their limits.")
    return 1 if drifting or failed else 0


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
