"""Hugging Face's formats, in and out: ``config.json``, ``preprocessor_config.json``, and the names of the tensors.

The functions take and return parsed JSON. ``checkpoint.py`` and ``saving.py`` read and write the files.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from miniclip.config import (
    END_OF_TEXT,
    CLIPConfig,
    Section,
    TextConfig,
    TransformerConfig,
    VisionConfig,
    check_activation,
    check_epsilon,
    check_layers,
    check_object,
    check_side,
    check_size,
    check_token_id,
    openai_end_of_text,
)
from miniclip.errors import ConfigError
from miniclip.images import is_side
from miniclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from miniclip.shapes import Shape
from miniclip.tokenizer import END_OF_TEXT as END_OF_TEXT_TOKEN
from miniclip.tokenizer import START_OF_TEXT, vocabulary_and_merges

# The tensors of one block in either tower: Hugging Face's name -> OpenAI's.
_BLOCK = {
    "layer_norm1.weight": "ln_1.weight",
    "layer_norm1.bias": "ln_1.bias",
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj.weight": "attn.out_proj.weight",
    "self_attn.out_proj.bias": "attn.out_proj.bias",
    "layer_norm2.weight": "ln_2.weight",
    "layer_norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}


def _blocks(hf: str, openai: str) -> dict[str, str]:
    return {f"{hf}.{{}}.{name}": f"{openai}.{{}}.{target}" for name, target in _BLOCK.items()}


#: Hugging Face's name -> OpenAI's. "{}" stands for the number of the block. None marks a tensor that is dropped on
#: purpose. Where several names have one target, their rows are stacked in the order of this table (query, key, value).
HF_TO_OPENAI: dict[str, str | None] = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.position_ids": None,  # 0, 1, 2, …, saved by old versions of transformers
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    **_blocks("vision_model.encoder.layers", "visual.transformer.resblocks"),
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.position_ids": None,
    **_blocks("text_model.encoder.layers", "transformer.resblocks"),
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}

#: OpenAI's tensors that Hugging Face stores transposed: as the weight of a Linear, where OpenAI computes ``x @ proj``.
TRANSPOSED = {"visual.proj", "text_projection"}

# The number of a block in either layout's names.
_BLOCK_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=\.resblocks\.)\d+(?=\.)")


# -- config.json ------------------------------------------------------------------------------------------------------


def is_clip_config(document: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is transformers'. timm's has none of these fields, and only defaults would be read."""
    return any(key.startswith(("model_type", "vision_config", "text_config")) for key in document)


def config_from_dict(document: Mapping[str, Any]) -> CLIPConfig:
    """Read the contents of a ``config.json``. A missing field has transformers' default.

    Raises:
        ConfigError: for another kind of model, or for a value that miniclip cannot follow. The message names the field.
    """
    if (model_type := document.get("model_type", "clip")) != "clip":
        raise ConfigError(f"model_type is {reprlib.repr(model_type)}, miniclip loads 'clip'")
    vision, text = (_tower_section(document, name) for name in ("vision_config", "text_config"))
    if (channels := vision.read("num_channels", 3, check_size)) != 3:
        raise ConfigError(f"vision_config.num_channels is {channels}, miniclip's images have 3")
    vocab_size = text.read("vocab_size", 49408, check_size)
    end_of_text: int | None = text.read("eos_token_id", END_OF_TEXT, check_token_id)
    if end_of_text == 2:
        # transformers before 4.31 wrote 2 for every CLIP, and still pools such a model at the largest id of the row.
        # In OpenAI's vocabulary that id is the end of text. Knowing the id lets the model refuse a row without it.
        end_of_text = openai_end_of_text(vocab_size)
    return CLIPConfig(
        embed_dim=Section("", document).read("projection_dim", 512, check_size),
        vision=VisionConfig(
            **_read_block(vision, width=768, heads=12, mlp_width=3072),
            patch_size=vision.read("patch_size", 32, check_side),
            image_size=vision.read("image_size", 224, check_side),
        ),
        text=TextConfig(
            **_read_block(text, width=512, heads=8, mlp_width=2048),
            context_length=text.read("max_position_embeddings", 77, check_size),
            vocab_size=vocab_size,
            end_of_text=end_of_text,
        ),
    )


def config_to_dict(config: CLIPConfig) -> dict[str, Any]:
    """The contents of a ``config.json``, from which ``config_from_dict`` makes an equal configuration.

    Raises:
        ConfigError: if the end of text is the id 2, by which Hugging Face means OpenAI's original rule.
    """
    vision, text = config.vision, config.text
    if text.end_of_text == 2:
        raise ConfigError("eos_token_id 2 cannot be saved: Hugging Face takes it for OpenAI's original pooling rule")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": {
            **_block_to_dict(vision),
            "model_type": "clip_vision_model",
            "projection_dim": config.embed_dim,
            "num_channels": 3,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        "text_config": {
            **_block_to_dict(text),
            "model_type": "clip_text_model",
            "projection_dim": config.embed_dim,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "eos_token_id": 2 if text.end_of_text is None else text.end_of_text,
        },
    }


def _tower_section(document: Mapping[str, Any], name: str) -> Section:
    """The settings of one tower. Old files also have a ``*_config_dict``, which transformers uses in its place."""
    if document.get(f"{name}_dict") is not None:
        name = f"{name}_dict"
    values = document.get(name)
    return Section(f"{name}.", {} if values is None else check_object(name, values))


def _read_block(section: Section, width: int, heads: int, mlp_width: int) -> dict[str, Any]:
    """The fields of ``TransformerConfig``. The arguments are transformers' defaults, which differ between towers."""
    return {
        "width": section.read("hidden_size", width, check_size),
        "layers": section.read("num_hidden_layers", 12, check_layers),
        "heads": section.read("num_attention_heads", heads, check_size),
        "mlp_width": section.read("intermediate_size", mlp_width, check_size),
        "activation": section.read("hidden_act", "quick_gelu", check_activation),
        "layer_norm_eps": section.read("layer_norm_eps", 1e-5, check_epsilon),
    }


def _block_to_dict(tower: TransformerConfig) -> dict[str, Any]:
    """The inverse of ``_read_block``."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.layer_norm_eps,
    }


# -- preprocessor_config.json -----------------------------------------------------------------------------------------


def preprocess_from_dict(document: Mapping[str, Any]) -> Preprocess:
    """Read the contents of a ``preprocessor_config.json``. A missing field has CLIPImageProcessor's default.

    The format does not say the convention; the result has the default, ``"openai"``.

    Raises:
        ConfigError: if it asks for other steps than CLIP's.
    """
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not document.get(step, True):
            raise ConfigError(f"{step} is off, but CLIP's preprocessing needs it")
    factor = document.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or not abs(factor * 255 - 1) < 1e-6:
        raise ConfigError(f"rescale_factor must be 1/255, got {reprlib.repr(factor)}")
    size, crop = document.get("size", 224), document.get("crop_size", 224)
    shortest_edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if not is_side(shortest_edge) or (isinstance(size, Mapping) and size.get("longest_edge")):
        raise ConfigError(f"size must be a shortest_edge in pixels and nothing else, got {reprlib.repr(size)}")
    height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, Mapping) else (crop, crop)
    if not is_side(height) or height != width:
        raise ConfigError(f"crop_size must be a square in pixels, got {reprlib.repr(crop)}")
    return Preprocess(
        size=height,
        mean=document.get("image_mean", OPENAI_MEAN),
        std=document.get("image_std", OPENAI_STD),
        resample=document.get("resample", Image.Resampling.BICUBIC),
        shortest_edge=None if shortest_edge == height else shortest_edge,
    )


def preprocess_to_dict(preprocess: Preprocess) -> dict[str, Any]:
    """The contents of a ``preprocessor_config.json``. The format has no field for the convention."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.short_side},
        "resample": int(preprocess.resample),
        "do_center_crop": True,
        "crop_size": {"height": preprocess.size, "width": preprocess.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


# -- the tokenizer's files --------------------------------------------------------------------------------------------


def tokenizer_to_files(config: TextConfig) -> dict[str, str]:
    """The names and contents of the files from which transformers makes the tokenizer of a model.

    Without these files, transformers 5 makes a tokenizer of three tokens, and says nothing. A model with another
    vocabulary than OpenAI's has no such files, because its tokenizer is unknown.
    """
    vocabulary, merges = vocabulary_and_merges()
    if config.vocab_size != len(vocabulary) or config.end_of_text not in (None, END_OF_TEXT):
        return {}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.context_length,
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT_TOKEN,
        "pad_token": END_OF_TEXT_TOKEN,
        "unk_token": END_OF_TEXT_TOKEN,
        "do_lower_case": True,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


# -- tensors ----------------------------------------------------------------------------------------------------------


def dropped_tensors() -> set[str]:
    """The names of tensors that are dropped on purpose."""
    return {name for name, target in HF_TO_OPENAI.items() if target is None}


def openai_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes by Hugging Face's names -> shapes by OpenAI's names, of the tensors that are stored in one piece."""
    whole = {names[0]: target for target, names in _sources().items() if len(names) == 1}
    renamed = {}
    for name, shape in shapes.items():
        row, number = _split_block_number(name)
        if target := whole.get(row):
            renamed[target.format(number)] = shape[::-1] if target in TRANSPOSED else shape
    return renamed


def stored_parts(expected: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """The Hugging Face tensors of which each of OpenAI's is made.

    Args:
        expected: shapes by OpenAI's names.

    Returns:
        By OpenAI's name: the names of the parts in stacking order, with their shapes.
    """
    sources = _sources()
    stored = {}
    for target, shape in expected.items():
        row, number = _split_block_number(target)
        names = [name.format(number) for name in sources[row]]
        if target in TRANSPOSED:
            shape = shape[::-1]
        if len(names) > 1:
            shape = (shape[0] // len(names), *shape[1:])
        stored[target] = dict.fromkeys(names, shape)
    return stored


def tensors_to_hf(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP's state_dict under Hugging Face's names: contiguous copies on the CPU that share no memory."""
    stored = stored_parts({target: tuple(tensor.shape) for target, tensor in state.items()})
    tensors = {}
    for target, tensor in state.items():
        tensor = tensor.detach().cpu()
        names = list(stored[target])
        parts = tensor.chunk(len(names)) if len(names) > 1 else [tensor.T if target in TRANSPOSED else tensor]
        for name, part in zip(names, parts, strict=True):
            tensors[name] = part.clone(memory_format=torch.contiguous_format)
    return tensors


def _sources() -> dict[str, list[str]]:
    """The table from the other side: each of OpenAI's names and the Hugging Face tensors that are stacked into it."""
    names = defaultdict(list)
    for name, target in HF_TO_OPENAI.items():
        if target is not None:
            names[target].append(name)
    return dict(names)


def _split_block_number(name: str) -> tuple[str, str]:
    """A name as its row of the table and the number of the block.

    Example: "text_model.encoder.layers.11.mlp.fc1.bias" -> "text_model.encoder.layers.{}.mlp.fc1.bias", "11".
    """
    number = _BLOCK_NUMBER.search(name)
    return (name[: number.start()] + "{}" + name[number.end() :], number.group()) if number else (name, "")
