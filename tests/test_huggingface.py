"""Hugging Face's files: transformers' defaults, a round trip, and errors that name the field."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, merged
from data.make_preprocess_goldens import sample_image
from helpers import INVALID_VALUES
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from miniclip import ConfigError, Preprocess
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.huggingface import config_from_dict, config_to_dict, preprocess_from_dict, preprocess_to_dict

# -- config.json, read ------------------------------------------------------------------------------------------------


def expected_from(oracle: transformers.CLIPConfig) -> CLIPConfig:
    """The configuration as transformers reads it, in miniclip's dataclasses."""
    vision, text = oracle.vision_config, oracle.text_config
    return CLIPConfig(
        embed_dim=oracle.projection_dim,
        vision=VisionConfig(
            width=vision.hidden_size,
            layers=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            mlp_width=vision.intermediate_size,
            activation=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        text=TextConfig(
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            mlp_width=text.intermediate_size,
            activation=text.hidden_act,
            layer_norm_eps=text.layer_norm_eps,
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            end_of_text=text.eos_token_id,
        ),
    )


FULL: dict[str, Any] = {
    "model_type": "clip",
    "projection_dim": 256,
    "vision_config": {
        "hidden_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "intermediate_size": 200,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "patch_size": 14,
        "image_size": 100,
        "projection_dim": 7,  # for the tower alone; a CLIP uses the one above
        "num_channels": 3,
        "attention_dropout": 0.1,
    },
    "text_config": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 100,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-4,
        "max_position_embeddings": 20,
        "vocab_size": 49500,
        "eos_token_id": 49407,
        "bos_token_id": 0,
    },
}


def drop_at_random(config: dict[str, Any], choose: random.Random) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if choose.random() < 0.6}
    return {k: drop_at_random(v, choose) if isinstance(v, dict) else v for k, v in kept.items()}


@pytest.mark.parametrize("seed", range(12))
def test_a_missing_field_has_transformers_default(seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(10):
        config = drop_at_random(FULL, choose)
        assert config_from_dict(config) == expected_from(transformers.CLIPConfig(**config))


@pytest.mark.parametrize("config", [{}, {"model_type": "clip"}, {"vision_config": None, "text_config": None}, FULL])
def test_empty_and_full_configs_are_read(config: dict[str, Any]) -> None:
    assert config_from_dict(config) == expected_from(transformers.CLIPConfig(**config))


@pytest.mark.parametrize("seed", range(6))
def test_a_legacy_config_dict_replaces_the_section(seed: int) -> None:
    choose = random.Random(seed)
    config = drop_at_random(FULL, choose)
    for tower in ("vision", "text"):
        legacy = choose.choice([None, {}, drop_at_random(FULL[f"{tower}_config"], choose)])
        config[f"{tower}_config_dict"] = legacy
    oracle = transformers.CLIPConfig(**json.loads(json.dumps(config)))  # a copy: transformers changes it
    assert config_from_dict(config) == expected_from(oracle)


def test_configs_written_by_transformers_are_read() -> None:
    oracle = transformers.CLIPConfig(**merged(TINY, {"projection_dim": 256}))
    assert config_from_dict(json.loads(oracle.to_json_string(use_diff=True))) == expected_from(oracle)
    assert config_from_dict(json.loads(oracle.to_json_string(use_diff=False))) == expected_from(oracle)


def test_eos_token_id_gives_the_end_of_text() -> None:
    def end_of_text(**text: int) -> int | None:
        return config_from_dict({"text_config": text}).text.end_of_text

    assert end_of_text() == 49407
    assert end_of_text(eos_token_id=5) == 5
    assert end_of_text(eos_token_id=0) == 0
    assert end_of_text(eos_token_id=99, vocab_size=100) == 99
    assert end_of_text(eos_token_id=2) == 49407  # the largest id, which in this vocabulary is the end of text
    assert end_of_text(eos_token_id=2, vocab_size=100) is None
    with pytest.raises(ConfigError, match=r"eos_token_id\) is 100, outside a vocab_size of 100"):
        end_of_text(eos_token_id=100, vocab_size=100)
    with pytest.raises(ConfigError, match="49407, outside a vocab_size of 100"):
        end_of_text(vocab_size=100)


def test_a_pair_of_equal_sides_is_read() -> None:
    config = config_from_dict({"vision_config": {"patch_size": [16, 16], "image_size": [224, 224]}})
    assert (config.vision.patch_size, config.vision.image_size, config.vision.grid) == (16, 224, 14)
    with pytest.raises(ConfigError, match=r"vision_config\.image_size \[224, 336\] is not square"):
        config_from_dict({"vision_config": {"image_size": [224, 336]}})


@pytest.mark.parametrize("model_type", ["siglip", "clip_vision_model", "chinese_clip", "", None, 3, ["clip"]])
def test_other_models_are_refused_by_name(model_type: object) -> None:
    with pytest.raises(ConfigError, match="model_type is") as caught:
        config_from_dict({"model_type": model_type})
    assert repr(model_type) in str(caught.value)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_pytorch_tanh", "QuickGELU", "silu", ""])
@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
def test_unknown_activations_are_refused_by_name(tower: str, activation: str) -> None:
    with pytest.raises(ConfigError, match=f"{tower}.hidden_act is {activation!r}; the activations are quick_gelu and"):
        config_from_dict({tower: {"hidden_act": activation}})


HF_SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
HF_FIELDS = [
    "projection_dim",
    *(f"vision_config.{name}" for name in [*HF_SIZES, "num_channels", "patch_size", "image_size"]),
    *(f"text_config.{name}" for name in [*HF_SIZES, "max_position_embeddings", "vocab_size"]),
]


def with_field(path: str, value: object) -> dict[str, Any]:
    section, _, key = path.rpartition(".")
    return {section: {key: value}} if section else {key: value}


@pytest.mark.parametrize("path", HF_FIELDS)
def test_invalid_sizes_are_refused_by_name(path: str) -> None:
    for value in INVALID_VALUES:
        with pytest.raises(ConfigError) as caught:
            config_from_dict(with_field(path, value))
        assert path in str(caught.value), value
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "valid"), [("hidden_act", set()), ("layer_norm_eps", {1.5, 768.0, 1e300}), ("eos_token_id", {0})]
)
def test_other_invalid_fields_are_refused_by_name(key: str, valid: set[object]) -> None:
    for value in INVALID_VALUES:
        if type(value) in (int, float) and value in valid:
            continue
        with pytest.raises(ConfigError, match=key):
            config_from_dict({"text_config": {key: value}})


@pytest.mark.parametrize("name", ["vision_config", "text_config", "vision_config_dict", "text_config_dict"])
def test_invalid_sections_are_refused_by_name(name: str) -> None:
    for value in INVALID_VALUES:
        if value is not None and not isinstance(value, dict):
            with pytest.raises(ConfigError, match=f"{name} must be an object"):
                config_from_dict({name: value})


def test_contradicting_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="VisionConfig: width 768 cannot be divided among 7 attention heads"):
        config_from_dict({"vision_config": {"num_attention_heads": 7}})
    with pytest.raises(ConfigError, match="TextConfig: width 100 cannot be divided among 8 attention heads"):
        config_from_dict({"text_config": {"hidden_size": 100}})
    with pytest.raises(ConfigError, match="patch_size 32 does not fit into image_size 31"):
        config_from_dict({"vision_config": {"image_size": 31}})
    with pytest.raises(ConfigError, match="num_channels is 4, miniclip's images have 3"):
        config_from_dict({"vision_config": {"num_channels": 4}})


# -- config.json, written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CLIPConfig(32, VisionConfig(48, 2, 3, 100, "gelu", 1e-6, 7, 45), TextConfig(40, 1, 5, 77, context_length=9)),
        CLIPConfig(16, VisionConfig(8, 1, 1, 8), TextConfig(8, 2, 2, 8, vocab_size=100, end_of_text=None)),
        CLIPConfig(16, VisionConfig(8, 1, 1, 8), TextConfig(8, 2, 2, 8, vocab_size=100, end_of_text=42)),
    ],
)
def test_a_written_config_is_read_back_equal(config: CLIPConfig) -> None:
    assert config_from_dict(config_to_dict(config)) == config


def test_end_of_text_2_is_not_written() -> None:
    config = CLIPConfig(16, VisionConfig(8, 1, 1, 8), TextConfig(8, 2, 2, 8, vocab_size=100, end_of_text=2))
    with pytest.raises(ConfigError, match="eos_token_id 2"):
        config_to_dict(config)


# -- preprocessor_config.json -----------------------------------------------------------------------------------------

HF_CONFIGS: dict[str, dict[str, Any]] = {
    "empty": {},
    "OpenAI's, as transformers 5 writes it": CLIPImageProcessorPil().to_dict(),
    "OpenAI's, as transformers 4 wrote it": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "other sizes": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "edge beyond crop": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
    "edge beyond crop, as numbers": {"size": 40, "crop_size": 33},
    "other mean and std": {"size": 32, "crop_size": 32, "image_mean": [0.5, 0.4, 0], "image_std": [0.5, 1, 0.25]},
    "bilinear": {"size": 32, "crop_size": 32, "resample": 2},
    "lanczos": {"size": 32, "crop_size": 32, "resample": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_a_preprocessor_config_gives_transformers_pixels(name: str) -> None:
    config = HF_CONFIGS[name]
    before = json.dumps(config)
    processor = CLIPImageProcessorPil(**{key: value for key, value in config.items() if not key.endswith("_type")})
    preprocess = replace(preprocess_from_dict(json.loads(before)), convention="huggingface")
    for size in ((100, 75), (75, 103), (20, 31)):
        image = sample_image("RGB", *size)
        assert torch.equal(preprocess(image), processor(image, return_tensors="pt")["pixel_values"][0]), size
    assert json.dumps(config) == before


def test_openais_preprocessor_config_is_the_default() -> None:
    for name in ("empty", "OpenAI's, as transformers 5 writes it", "OpenAI's, as transformers 4 wrote it"):
        assert preprocess_from_dict(HF_CONFIGS[name]) == Preprocess()
    larger = preprocess_from_dict({"size": {"shortest_edge": 256}, "crop_size": 224})
    assert (larger.size, larger.shortest_edge, larger.convention) == (224, 256, "openai")


BAD_HF_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no resize": ({"do_resize": False}, "do_resize is off"),
    "no crop": ({"do_center_crop": False}, "do_center_crop is off"),
    "no rescale": ({"do_rescale": False}, "do_rescale is off"),
    "no normalize": ({"do_normalize": False}, "do_normalize is off"),
    "stretched to a square": ({"size": {"height": 224, "width": 224}}, "size must be a shortest_edge"),
    "longest edge as well": ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "size must be a shortest_edge"),
    "edge as text": ({"size": {"shortest_edge": "224"}}, "size must be a shortest_edge"),
    "size as text": ({"size": "224"}, "size must be a shortest_edge in pixels and nothing else, got '224'"),
    "true size": ({"size": True}, "size must be a shortest_edge"),
    "size 0": ({"size": 0}, "size must be a shortest_edge"),
    "null size": ({"size": None}, "size must be a shortest_edge"),
    "null resize": ({"do_resize": None}, "do_resize is off"),
    "null rescale": ({"rescale_factor": None}, "rescale_factor must be 1/255, got None"),
    "null crop": ({"crop_size": None}, "crop_size must be a square"),
    "null mean": ({"image_mean": None}, "mean must be three numbers"),
    "null filter": ({"resample": None}, "unknown resampling None"),
    "size list": ({"size": [224, 224]}, "size must be a shortest_edge"),
    "fractional size": ({"size": 224.5}, "size must be a shortest_edge"),
    "oblong crop": ({"crop_size": {"height": 224, "width": 200}}, "crop_size must be a square in pixels, got {"),
    "crop without width": ({"crop_size": {"height": 224}}, "crop_size must be a square"),
    "crop as text": ({"crop_size": "224"}, "crop_size must be a square"),
    "true crop": ({"crop_size": True}, "crop_size must be a square"),
    "crop list": ({"crop_size": [224, 224]}, "crop_size must be a square"),
    "crop beyond the edge": ({"size": 200, "crop_size": 224}, "a short side of 200 pixels cannot be cropped to 224"),
    "rescale to -1..1": ({"rescale_factor": 1 / 127.5}, "rescale_factor must be 1/255, got 0.0078"),
    "rescale as text": ({"rescale_factor": "1/255"}, "rescale_factor must be 1/255, got '1/255'"),
    "rescale by NaN": ({"rescale_factor": float("nan")}, "rescale_factor must be 1/255, got nan"),
    "rescale list": ({"rescale_factor": [1]}, "rescale_factor must be 1/255"),
    "unknown filter": ({"resample": 42}, "unknown resampling 42"),
    "unknown filter name": ({"resample": "best"}, "unknown resampling 'best'"),
    "two means": ({"image_mean": [0.5, 0.5]}, "mean must be three numbers"),
    "mean as text": ({"image_mean": "imagenet"}, "mean must be three numbers, got 'imagenet'"),
    "std 0": ({"image_std": [0, 0, 0]}, "std must be positive"),
}


@pytest.mark.parametrize("mistake", BAD_HF_CONFIGS)
def test_a_preprocessor_config_with_other_steps_is_refused(mistake: str) -> None:
    config, message = BAD_HF_CONFIGS[mistake]
    with pytest.raises(ConfigError, match=message):
        preprocess_from_dict(config)


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(32, (0.5, 0.4, 0.3), shortest_edge=40)])
def test_a_written_preprocessor_config_is_read_back_equal(preprocess: Preprocess) -> None:
    assert preprocess_from_dict(json.loads(json.dumps(preprocess_to_dict(preprocess)))) == preprocess
