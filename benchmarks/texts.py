"""Texts: prompts, classifiers, captions, and the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
from images import beside_openvino
from inputs import captions, checkpoint, class_names, reference_tokenizer
from measure import Options, Row, Work, take_turns
from torch import Tensor

import miniclip

TEMPLATES = (
    "a photo of a {}.",
    "a drawing of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a {} in a video game.",
    "art of the {}.",
)


def texts(options: Options, place: Path) -> Iterator[Row]:
    """Texts through ViT-B/32's text tower, in float32."""
    folder = checkpoint("ViT-B/32", place)
    reference = peers.transformers_model(folder)
    onnx = peers.onnx_file(reference, "texts", folder / "texts.onnx")
    model, _ = miniclip.load(folder, "cpu")
    theirs = peers.texts_of(reference)
    few = max(1, options.rounds // 3)  # the peers take seconds
    yield prompts(options, model, theirs, folder, onnx, few)
    yield classifier(options, model, theirs, few)
    yield ragged(options, model, theirs, few)


def prompts(
    options: Options, model: miniclip.CLIP, theirs: peers.Encoder, folder: Path, onnx: Path, rounds: int
) -> Row:
    tokens = miniclip.tokenize([f"a photo of a {name}." for name in class_names(options.prompts)])
    full, cut = tokens.long(), cut_to_longest(tokens).long()
    runtime = peers.onnxruntime(onnx, options.threads)
    contenders: dict[str, Work] = {
        "miniclip": lambda: model.encode_text(tokens),
        "transformers, padded to 77": lambda: theirs(full),
        "transformers, cut to the longest": lambda: theirs(cut),
        "ONNX Runtime, padded to 77": lambda: runtime(full),
    }
    medians = take_turns(contenders, rounds, "transformers, padded to 77")
    (alone,) = beside_openvino(folder, onnx, "float32", [full], [rounds], options.threads)
    alone["OpenVINO, padded to 77"] = alone.pop("OpenVINO")
    return Row("texts", f"{options.prompts:,} zero-shot prompts", [medians, alone])


def classifier(options: Options, model: miniclip.CLIP, theirs: peers.Encoder, rounds: int) -> Row:
    classes = class_names(options.classes)

    def ours() -> Tensor:
        return miniclip.ZeroShotClassifier(model, miniclip.Preprocess(), classes, TEMPLATES).weights

    def loop() -> Tensor:
        prompts = [template.replace("{}", name) for name in classes for template in TEMPLATES]
        batches = [cut_to_longest(part) for part in miniclip.tokenize(prompts).long().split(256)]
        embeddings = torch.cat([F.normalize(theirs(batch), dim=1) for batch in batches])
        return F.normalize(embeddings.view(len(classes), len(TEMPLATES), -1).mean(dim=1), dim=1)

    medians = take_turns({"miniclip": ours, "transformers, cut to the longest": loop}, rounds, "miniclip")
    return Row("texts", f"a classifier of {options.classes:,} classes × {len(TEMPLATES)} templates", [medians])


def ragged(options: Options, model: miniclip.CLIP, theirs: peers.Encoder, rounds: int) -> Row:
    """Captions of all lengths. transformers gets them in batches of 64, each cut to its longest."""
    tokens = miniclip.tokenize(captions(2 * options.captions, 36), truncate=True)
    counts = (tokens > 0).sum(dim=1)
    tokens = tokens[(counts >= 5) & (counts <= 40)][: options.captions]

    def loop() -> Tensor:
        return torch.cat([theirs(cut_to_longest(part).long()) for part in tokens.split(64)])

    contenders: dict[str, Work] = {"miniclip": lambda: model.encode_text(tokens), "transformers, batches of 64": loop}
    medians = take_turns(contenders, rounds, "miniclip")
    return Row("texts", f"{len(tokens):,} captions of 5 to 40 tokens", [medians])


def cut_to_longest(tokens: Tensor) -> Tensor:
    return tokens[:, : int((tokens > 0).sum(dim=1).max())].contiguous()


def tokenizer(options: Options, place: Path) -> Iterator[Row]:
    """New captions in every round, the same for each contender, so that no memory of a whole text can help."""
    rust, openai = reference_tokenizer(), peers.openai_tokenizer()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches = [captions(options.texts, 20, seed, rare=0.15) for seed in range(100, 100 + options.rounds + 2)]
    for text in batches[0][:1000]:
        assert miniclip.Tokenizer().encode(text) == openai.encode(text)
    names = ("miniclip", "transformers (Rust)", "openai/CLIP")
    ours, fast, original = (iter(batches) for _ in names)
    contenders: dict[str, Work] = {
        "miniclip": lambda: miniclip.tokenize(next(ours), truncate=True),
        "transformers (Rust)": lambda: rust(next(fast), truncation=True, max_length=77, padding="max_length"),
        "openai/CLIP": lambda: [openai.encode(text) for text in next(original)],
    }
    medians = take_turns(contenders, options.rounds)
    yield Row("tokenizer", f"{options.texts:,} new captions to ids, one thread", [medians])
