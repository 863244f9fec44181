"""open_clip's ``open_clip_config.json``: the model and its preprocessing, read from the parsed file."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from miniclip.config import (
    CLIPConfig,
    Section,
    TextConfig,
    VisionConfig,
    check_boolean,
    check_layers,
    check_object,
    check_ratio,
    check_side,
    check_size,
    openai_end_of_text,
)
from miniclip.errors import ConfigError
from miniclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess

_BLOCK_FIELDS = ("width", "layers", "mlp_ratio")


def config_from_dict(document: Mapping[str, Any]) -> CLIPConfig:
    """Read the contents of an ``open_clip_config.json``. A missing field has open_clip's default.

    Raises:
        ConfigError: if a field has a value that miniclip cannot follow, or asks for more than OpenAI's ViT has. The
            message names the field.
    """
    if not isinstance(document.get("model_cfg"), Mapping):
        raise ConfigError("there is no model_cfg")
    model = Section("model_cfg.", document["model_cfg"])
    vision, text = (Section(f"{name}.", model.read(name, {}, check_object)) for name in ("vision_cfg", "text_cfg"))
    if isinstance(vision.values.get("layers"), list):
        raise ConfigError(f"vision_cfg.layers {vision.values['layers']} are a ResNet's; miniclip has only ViTs")
    _refuse_other_fields(model, "embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    # patch_dropout acts in training only. Every other unknown field changes the arithmetic.
    _refuse_other_fields(vision, *_BLOCK_FIELDS, "image_size", "patch_size", "head_width", "patch_dropout")
    _refuse_other_fields(text, *_BLOCK_FIELDS, "context_length", "vocab_size", "heads")
    activation = "quick_gelu" if model.read("quick_gelu", False, check_boolean) else "gelu"
    vision_width, head_width = vision.read("width", 768, check_size), vision.read("head_width", 64, check_size)
    if vision_width % head_width:
        raise ConfigError(f"vision_cfg.width {vision_width} is not a multiple of head_width {head_width}")
    vocab_size = text.read("vocab_size", 49408, check_size)
    return CLIPConfig(
        embed_dim=model.read("embed_dim", None, check_size),
        vision=VisionConfig(
            **_read_block(vision, vision_width, activation),
            heads=vision_width // head_width,
            patch_size=vision.read("patch_size", 16, check_side),
            image_size=vision.read("image_size", 224, check_side),
        ),
        text=TextConfig(
            **_read_block(text, text.read("width", 512, check_size), activation),
            heads=text.read("heads", 8, check_size),
            context_length=text.read("context_length", 77, check_size),
            vocab_size=vocab_size,
            end_of_text=openai_end_of_text(vocab_size),
        ),
    )


def preprocess_from_dict(document: Mapping[str, Any], size: int) -> Preprocess:
    """Read the ``preprocess_cfg`` of an ``open_clip_config.json``. A missing field has open_clip's default.

    Args:
        document: the contents of ``preprocess_cfg``.
        size: the side of the model's images in pixels.

    Raises:
        ConfigError: if it asks for other steps than CLIP's.
    """
    values = {key: value for key, value in document.items() if value is not None}  # null means the default
    if (mode := values.get("resize_mode", "shortest")) != "shortest":
        raise ConfigError(f"resize_mode must be 'shortest', got {reprlib.repr(mode)}")
    return Preprocess(
        size=size,
        mean=values.get("mean", OPENAI_MEAN),
        std=values.get("std", OPENAI_STD),
        resample=values.get("interpolation", "bicubic"),
    )


def _refuse_other_fields(section: Section, *known: str) -> None:
    # null, false, 0 and "" switch a feature of open_clip off, so such a field does no harm.
    if others := sorted(key for key, value in section.values.items() if key not in known and value):
        name = section.prefix.rstrip(".")
        raise ConfigError(f"{name} asks for {', '.join(others)}, which miniclip does not have")


def _read_block(section: Section, width: int, activation: str) -> dict[str, Any]:
    return {
        "width": width,
        "layers": section.read("layers", 12, check_layers),
        "mlp_width": int(width * section.read("mlp_ratio", 4.0, check_ratio)),
        "activation": activation,
    }
