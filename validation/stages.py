"""What is measured, how far each stage may be off, and the comparison itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
from miniclip.checkpoint import non_finite
from validation.reference import openai_pixels, sample_images, token_ids

# Words of several scripts and lengths, an end token typed in the middle of a text, and one text that is cut to the
# context. OpenAI's and Hugging Face's cleaning agree on all of them. Where they differ, tests/data has the ids.
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


# -- the limits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How far each kind of stage may be off.

    Attributes:
        hidden: the largest max|Δ| / max|reference| of a hidden state.
        embedding: the largest max|Δ| of unit-length embeddings.
        logits: the largest max|Δ| of the logits.
        probabilities: the largest max|Δ| of the probabilities.
        cosine: the smallest cosine of any vector of a hidden state or embedding; 0 checks no cosine.
    """

    hidden: float = 0.0
    embedding: float = 0.0
    logits: float = 0.0
    probabilities: float = 0.0
    cosine: float = 0.0


def limits_for(dtype: torch.dtype) -> Limits:
    """The limits of a dtype, on every device. The reference is transformers in float32, or float64 for float64."""
    # The cosine is the limit that counts in half precision. The others only catch a wrong scale, which no cosine shows.
    if dtype == torch.float16:
        return Limits(hidden=2e-2, embedding=5e-3, logits=0.2, probabilities=0.05, cosine=0.99999)
    if dtype == torch.bfloat16:
        return Limits(hidden=1e-1, embedding=3e-2, logits=2.0, probabilities=0.2, cosine=0.9995)
    if dtype == torch.float64:
        return Limits(hidden=1e-12, embedding=1e-12, logits=1e-12, probabilities=1e-12)
    return Limits(hidden=5e-6, embedding=1e-6, logits=2e-4, probabilities=1e-4)


@dataclass(frozen=True)
class Row:
    """One stage: its largest differences, the smallest cosine of its vectors, its limit and the result."""

    stage: str
    max_abs: float
    relative: float
    cosine: float
    limit: str
    ok: bool


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
    images: Sequence[Image.Image] | None = None,
    texts: Sequence[str] = TEXTS,
    tokenize: Callable[..., Tensor] = miniclip.tokenize,
    processor: CLIPImageProcessorPil | None = None,
    limits: Limits | None = None,
) -> list[Row]:
    """Follow images and texts through both models, stage by stage.

    The stages up to the embedding, and the embedding named "plain", run with ``model.fast = False``. The embeddings
    named "as used", the logits and the probabilities run with the model's own setting, which is restored.

    Args:
        model: miniclip's model, as loaded.
        reference: transformers' model on the same device, in float32 (float64 for a float64 model), with sdpa.
        preprocess: miniclip's preprocessing, as loaded.
        images: PIL images; the sample images unless given.
        texts: strings on which OpenAI's and Hugging Face's cleaning agree.
        tokenize: the function that turns texts into ids, called as ``miniclip.tokenize`` is.
        processor: transformers' preprocessing; CLIP's usual one at the reference's image size unless given.
        limits: those of the model's device and dtype unless given.

    Returns:
        One row per stage, in the order in which data passes the stages.

    Raises:
        InputError: if the texts need ids that the model's vocabulary does not have.
    """
    limits = limits or limits_for(model.dtype)
    images = list(images) if images is not None else sample_images()
    rows = [_weights_row(model)]

    if processor is None:
        size: Any = reference.vision_model.config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    ids, padded = token_ids(texts, model.context_length)
    if padded.max() >= model.vocab_size:
        raise miniclip.InputError(f"the texts need ids up to {padded.max()}, the model has {model.vocab_size}")
    rows.append(measure("token ids", tokenize(list(texts), model.context_length, truncate=True), ids, "exact", limits))

    hf_pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    for convention, expected in (("openai", openai_pixels(images, processor)), ("huggingface", hf_pixels)):
        ours = replace(preprocess, convention=convention)(images)
        rows.append(measure(f"pixels ({convention})", ours, expected, "exact", limits))

    pixels, tokens = hf_pixels.to(model.device), padded.to(model.device)
    rows += _image_rows(model, reference, pixels, limits)
    rows += _text_rows(model, reference, tokens, limits)
    rows += _joint_rows(model, reference, pixels, tokens, limits)
    return rows


def _weights_row(model: miniclip.CLIP) -> Row:
    bad = [f"{name} holds {count}" for name, count in non_finite(model)]
    if bad:
        limit = f"none, but {', '.join(bad)} NaN or infinity"
        return Row("weights finite", math.nan, math.nan, math.nan, limit, ok=False)
    return Row("weights finite", 0.0, 0.0, 1.0, "all", ok=True)


def _image_rows(model: miniclip.CLIP, reference: CLIPModel, pixels: Tensor, limits: Limits) -> list[Row]:
    visual, theirs = model.visual, reference.vision_model
    embedded = theirs.embeddings(pixels.to(reference.dtype))
    outputs = theirs(pixels.to(reference.dtype), output_hidden_states=True)
    expected = F.normalize(reference.visual_projection(outputs.pooler_output), dim=1)
    with _plain(model):
        rows = [measure("patch embedding", visual.embed(pixels.to(model.dtype)), embedded, "hidden", limits)]
        states = visual.hidden_states(pixels)
        rows += _block_rows("image", "ln_pre", states, outputs.hidden_states, limits)
        pooled = visual.ln_post(states[-1][:, 0])
        rows.append(measure("image pooled", pooled, outputs.pooler_output, "hidden", limits))
        plain = F.normalize(visual(pixels.to(model.dtype)), dim=1)
        rows.append(measure("image embedding (plain)", plain, expected, "embedding", limits))
    used = F.normalize(_second_call(model.encode_image, pixels), dim=1)
    return [*rows, measure("image embedding (as used)", used, expected, "embedding", limits)]


def _text_rows(model: miniclip.CLIP, reference: CLIPModel, tokens: Tensor, limits: Limits) -> list[Row]:
    outputs = reference.text_model(tokens, output_hidden_states=True)
    expected = F.normalize(reference.text_projection(outputs.pooler_output), dim=1)
    with _plain(model):
        states = model.hidden_states(tokens)
        rows = _block_rows("text", "token embedding", states, outputs.hidden_states, limits)
        ends = states[-1][torch.arange(len(tokens)), model.end_positions(tokens)]  # (N, W)
        rows.append(measure("text pooled", model.ln_final(ends), outputs.pooler_output, "hidden", limits))
        plain = F.normalize(model.text(tokens), dim=1)
        rows.append(measure("text embedding (plain)", plain, expected, "embedding", limits))
    used = F.normalize(_second_call(model.encode_text, tokens), dim=1)
    return [*rows, measure("text embedding (as used)", used, expected, "embedding", limits)]


def _joint_rows(
    model: miniclip.CLIP, reference: CLIPModel, pixels: Tensor, tokens: Tensor, limits: Limits
) -> list[Row]:
    expected = reference(pixel_values=pixels.to(reference.dtype), input_ids=tokens).logits_per_image
    logits, _ = _second_call(model, pixels, tokens)
    probabilities = logits.to(reference.dtype).softmax(1)
    return [
        measure("logits", logits, expected, "logits", limits),
        measure("probabilities", probabilities, expected.softmax(1), "probabilities", limits),
    ]


def _block_rows(
    tower: str, first: str, states: Sequence[Tensor], expected: Sequence[Tensor], limits: Limits
) -> list[Row]:
    names = [f"{tower} {first}", *(f"{tower} block {i}" for i in range(1, len(states)))]
    triples = zip(names, states, expected, strict=True)
    return [measure(name, ours, theirs, "hidden", limits) for name, ours, theirs in triples]


@contextmanager
def _plain(model: miniclip.CLIP) -> Iterator[None]:
    """``model`` without its fast path, for a while."""
    before = model.fast
    model.fast = False
    try:
        yield
    finally:
        model.fast = before


def _second_call(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """The result of a second call: the first one may run before the weights are packed, all later ones run packed."""
    function(*inputs)
    return function(*inputs)


# -- numbers that others have published -----------------------------------------------------------------------------


@torch.no_grad()
def published(model: miniclip.CLIP) -> Row:
    """Compare with published logits of OpenAI's ViT-B/32: two constant images, two given rows of token ids.

    The numbers and their tolerance of 1e-4 are those of Bumblebee's CLIP test.
    """
    pixels = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 3, 224, 224)
    tokens = torch.tensor([[49406, 320, 1125, 539, 320, word, 49407] for word in (2368, 1929)])
    expected = torch.tensor([[22.7866, 22.8397], [23.2389, 22.8406]])
    _, logits_per_text = model(pixels.to(model.device), tokens.to(model.device))
    return measure("published logits", logits_per_text, expected, "logits", Limits(logits=1e-4))
