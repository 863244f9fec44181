"""Configurations: transformers' defaults, open_clip's files, what shapes reveal, and refusals that name the field."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import pytest
import transformers
from conftest import TINY, merged

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.errors import ConfigError

NAN, INF = math.nan, math.inf


def expected_from(oracle: transformers.CLIPConfig) -> CLIPConfig:
    """transformers' own reading of a configuration, as ours."""
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


# -- Hugging Face -----------------------------------------------------------------------------------------------------

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
        "projection_dim": 7,  # of the tower used alone; a CLIP's is the one above
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
def test_a_field_left_out_has_transformers_default(seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(10):
        config = drop_at_random(FULL, choose)
        assert CLIPConfig.from_hf(config) == expected_from(transformers.CLIPConfig(**config))


@pytest.mark.parametrize("config", [{}, {"model_type": "clip"}, {"vision_config": None, "text_config": None}, FULL])
def test_empty_and_full(config: dict[str, Any]) -> None:
    assert CLIPConfig.from_hf(config) == expected_from(transformers.CLIPConfig(**config))


@pytest.mark.parametrize("seed", range(6))
def test_the_legacy_config_dicts_win_as_a_whole(seed: int) -> None:
    choose = random.Random(seed)
    config = drop_at_random(FULL, choose)
    for tower in ("vision", "text"):
        legacy = choose.choice([None, {}, drop_at_random(FULL[f"{tower}_config"], choose)])
        config[f"{tower}_config_dict"] = legacy
    oracle = transformers.CLIPConfig(**json.loads(json.dumps(config)))  # it changes its argument
    assert CLIPConfig.from_hf(config) == expected_from(oracle)


def test_what_transformers_writes_is_read() -> None:
    oracle = transformers.CLIPConfig(**merged(TINY, {"projection_dim": 256}))
    assert CLIPConfig.from_hf(json.loads(oracle.to_json_string(use_diff=True))) == expected_from(oracle)
    assert CLIPConfig.from_hf(json.loads(oracle.to_json_string(use_diff=False))) == expected_from(oracle)


def test_the_end_of_text() -> None:
    def end_of_text(**text: int) -> int | None:
        return CLIPConfig.from_hf({"text_config": text}).text.end_of_text

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


def test_square_sides_may_be_pairs() -> None:
    config = CLIPConfig.from_hf({"vision_config": {"patch_size": [16, 16], "image_size": [224, 224]}})
    assert (config.vision.patch_size, config.vision.image_size, config.vision.grid) == (16, 224, 14)
    with pytest.raises(ConfigError, match=r"vision_config\.image_size \[224, 336\] is not square"):
        CLIPConfig.from_hf({"vision_config": {"image_size": [224, 336]}})


@pytest.mark.parametrize("model_type", ["siglip", "clip_vision_model", "chinese_clip", "", None, 3, ["clip"]])
def test_other_models_are_refused_by_name(model_type: object) -> None:
    with pytest.raises(ConfigError, match="model_type is") as caught:
        CLIPConfig.from_hf({"model_type": model_type})
    assert repr(model_type) in str(caught.value)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_pytorch_tanh", "QuickGELU", "silu", ""])
@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
def test_unknown_activations_are_refused_by_name(tower: str, activation: str) -> None:
    with pytest.raises(ConfigError, match=f"{tower}.hidden_act is {activation!r}; the activations are quick_gelu and"):
        CLIPConfig.from_hf({tower: {"hidden_act": activation}})


ODD = [None, "768", "", True, False, -1, 0, 1.5, 768.0, 1e300, NAN, INF, [], [1], [1, 2], {}, {"a": 1}, 2**31, 10**400]
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
def test_sizes_that_are_none_are_refused_by_name(path: str) -> None:
    for value in ODD:
        with pytest.raises(ConfigError) as caught:
            CLIPConfig.from_hf(with_field(path, value))
        assert path in str(caught.value), value
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "fine"), [("hidden_act", set()), ("layer_norm_eps", {1.5, 768.0, 1e300}), ("eos_token_id", {0})]
)
def test_other_fields_of_odd_types_are_refused_by_name(key: str, fine: set[object]) -> None:
    for value in ODD:
        if type(value) in (int, float) and value in fine:
            continue
        with pytest.raises(ConfigError, match=key):
            CLIPConfig.from_hf({"text_config": {key: value}})


@pytest.mark.parametrize("name", ["vision_config", "text_config", "vision_config_dict", "text_config_dict"])
def test_sections_that_are_none_are_refused_by_name(name: str) -> None:
    for value in ODD:
        if value is not None and not isinstance(value, dict):
            with pytest.raises(ConfigError, match=f"{name} must be an object"):
                CLIPConfig.from_hf({name: value})


def test_sizes_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="VisionConfig: width 768 cannot be divided among 7 attention heads"):
        CLIPConfig.from_hf({"vision_config": {"num_attention_heads": 7}})
    with pytest.raises(ConfigError, match="TextConfig: width 100 cannot be divided among 8 attention heads"):
        CLIPConfig.from_hf({"text_config": {"hidden_size": 100}})
    with pytest.raises(ConfigError, match="patch_size 32 does not fit into image_size 31"):
        CLIPConfig.from_hf({"vision_config": {"image_size": 31}})
    with pytest.raises(ConfigError, match="num_channels is 4, miniclip's images have 3"):
        CLIPConfig.from_hf({"vision_config": {"num_channels": 4}})


# -- open_clip --------------------------------------------------------------------------------------------------------

OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def open_clip(**model_cfg: Any) -> CLIPConfig:
    return CLIPConfig.from_open_clip(merged(OPEN_CLIP, {"model_cfg": model_cfg}))


def test_open_clip_huge() -> None:
    assert open_clip() == CLIPConfig(
        1024,
        VisionConfig(1280, 32, 16, 5120, "gelu", patch_size=14, image_size=224),
        TextConfig(1024, 24, 16, 4096, "gelu"),
    )


def test_open_clip_defaults() -> None:
    assert CLIPConfig.from_open_clip({"model_cfg": {"embed_dim": 512}}) == CLIPConfig(
        512, VisionConfig(768, 12, 12, 3072, "gelu", patch_size=16), TextConfig(512, 12, 8, 2048, "gelu")
    )


def test_open_clip_fields() -> None:
    assert {tower.activation for tower in (open_clip(quick_gelu=True).vision, open_clip(quick_gelu=True).text)} == {
        "quick_gelu"
    }
    assert open_clip(quick_gelu=False).vision.activation == "gelu"
    # bigG's: 1664 * 4.9231 is not a whole number, and open_clip truncates it to 8192
    assert open_clip(vision_cfg={"width": 1664, "head_width": 104, "mlp_ratio": 4.9231}).vision.mlp_width == 8192
    assert open_clip(text_cfg={"mlp_ratio": 2}).text.mlp_width == 2048
    assert open_clip(vision_cfg={"patch_dropout": 0.5, "ls_init_value": None, "timm_model_name": ""}) == open_clip()
    assert open_clip(text_cfg={"vocab_size": 1000}).text.end_of_text is None
    assert open_clip(vision_cfg={"image_size": [224, 224]}) == open_clip()


@pytest.mark.parametrize(
    ("section", "feature"),
    [
        ("model_cfg", "custom_text"),
        ("model_cfg", "multimodal_cfg"),
        ("vision_cfg", "timm_model_name"),
        ("vision_cfg", "no_ln_pre"),
        ("text_cfg", "hf_model_name"),
        ("text_cfg", "no_causal_mask"),
    ],
)
def test_what_open_clip_has_beyond_clip_is_refused_by_name(section: str, feature: str) -> None:
    changes = {feature: "x"} if section == "model_cfg" else {section: {feature: "x"}}
    with pytest.raises(ConfigError, match=f"{section} asks for {feature}, which miniclip does not have"):
        open_clip(**changes)


def test_open_clip_resnets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vision_cfg.layers \[3, 4, 6, 3\] are a ResNet's"):
        open_clip(vision_cfg={"layers": [3, 4, 6, 3], "width": 64, "patch_size": None})


@pytest.mark.parametrize(
    "path",
    [
        "model_cfg.embed_dim",
        *(f"vision_cfg.{name}" for name in ("width", "layers", "head_width", "patch_size", "image_size")),
        *(f"text_cfg.{name}" for name in ("width", "layers", "heads", "context_length", "vocab_size")),
    ],
)
def test_open_clip_sizes_that_are_none_are_refused_by_name(path: str) -> None:
    section, _, key = path.partition(".")
    for value in ODD:
        with pytest.raises(ConfigError) as caught:
            open_clip(**({key: value} if section == "model_cfg" else {section: {key: value}}))
        assert path in str(caught.value), value


def test_open_clip_odd_types_are_refused_by_name() -> None:
    for value in ODD:
        if not isinstance(value, bool):
            with pytest.raises(ConfigError, match=r"model_cfg\.quick_gelu must be true or false"):
                open_clip(quick_gelu=value)
        if type(value) not in (int, float) or not 0 < value < 2**18:
            with pytest.raises(ConfigError, match=r"text_cfg\.mlp_ratio must be a positive number"):
                open_clip(text_cfg={"mlp_ratio": value})
        if not isinstance(value, dict):
            with pytest.raises(ConfigError, match=r"model_cfg\.text_cfg must be an object"):
                CLIPConfig.from_open_clip({"model_cfg": {"embed_dim": 1, "text_cfg": value}})
            with pytest.raises(ConfigError, match="there is no model_cfg"):
                CLIPConfig.from_open_clip({"model_cfg": value})
    with pytest.raises(ConfigError, match=r"text_cfg\.mlp_ratio|TextConfig\.mlp_width"):
        open_clip(text_cfg={"mlp_ratio": 1e-9})
    with pytest.raises(ConfigError, match=r"vision_cfg\.width 1280 is not a multiple of head_width 90"):
        open_clip(vision_cfg={"head_width": 90})
    with pytest.raises(ConfigError, match=r"model_cfg\.embed_dim"):
        CLIPConfig.from_open_clip({"model_cfg": {}})


# -- shapes -----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "visual.conv1.weight": (128, 3, 8, 8),
    "visual.positional_embedding": (17, 128),
    "visual.proj": (128, 48),
    "token_embedding.weight": (49408, 192),
    "positional_embedding": (77, 192),
    **{f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": (100, 128) for i in range(12)},
    **{f"transformer.resblocks.{i}.mlp.c_fc.weight": (200, 192) for i in range(3)},
}


def test_shapes_reveal_all_but_activation_and_heads() -> None:
    assert CLIPConfig.from_shapes(SHAPES, "gelu") == CLIPConfig(
        48,
        VisionConfig(128, 12, 2, 100, "gelu", patch_size=8, image_size=32),
        TextConfig(192, 3, 3, 200, "gelu"),
    )
    small = SHAPES | {"token_embedding.weight": (100, 192)}
    assert CLIPConfig.from_shapes(small, "quick_gelu").text.end_of_text is None


def test_heads_that_are_said() -> None:
    def heads(said: object) -> tuple[int, int]:
        config = CLIPConfig.from_shapes(SHAPES, "gelu", said)  # type: ignore[arg-type]
        return config.vision.heads, config.text.heads

    assert heads(4) == (4, 4)
    assert heads((8, 6)) == (8, 6)
    assert heads((8, None)) == (8, 3)
    for wrong in ((4,), (4, 4, 4), "4", 4.0, {}):
        with pytest.raises(ConfigError, match=r"heads must be one number, or \(image, text\)"):
            heads(wrong)
    for wrong in (0, -1, True, (4, 0), (4, "6")):
        with pytest.raises(ConfigError, match=r"(Vision|Text)Config.heads must be an integer"):
            heads(wrong)
    with pytest.raises(ConfigError, match="width 128 cannot be divided among 5"):
        heads(5)


@pytest.mark.parametrize("width", [1280, 1408, 1664, 1792, 100])
def test_heads_are_not_guessed_where_they_are_known_to_differ(width: int) -> None:
    wide = {name: tuple(width if n == 128 else n for n in shape) for name, shape in SHAPES.items()}
    with pytest.raises(ConfigError, match=rf"heads of their image tower, {width} wide: pass heads=N, or heads=\(image"):
        CLIPConfig.from_shapes(wide, "gelu")
    assert CLIPConfig.from_shapes(wide, "gelu", heads=(4, 3)).vision.heads == 4


def test_the_activation_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match=r"pass activation='quick_gelu' \(OpenAI's weights\) or activation='gelu'"):
        CLIPConfig.from_shapes(SHAPES, None)
    with pytest.raises(ConfigError, match="activation is 'relu'; the activations are quick_gelu and gelu"):
        CLIPConfig.from_shapes(SHAPES, "relu")


@pytest.mark.parametrize("missing", [name for name in SHAPES if ".resblocks." not in name or ".0." in name])
def test_shapes_that_are_not_a_clips(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"the weights have no {missing}"):
        CLIPConfig.from_shapes({name: shape for name, shape in SHAPES.items() if name != missing}, "gelu")
    for shape in ((), (5,), (1, 2, 3), (1,) * 8):
        with pytest.raises(ConfigError, match="another rank"):
            CLIPConfig.from_shapes(SHAPES | {missing: shape}, "gelu")
    shape = tuple(0 for _ in SHAPES[missing])
    with pytest.raises(ConfigError, match=r"must be an integer from 1|not a square grid"):
        CLIPConfig.from_shapes(SHAPES | {missing: shape}, "gelu")


@pytest.mark.parametrize("positions", [0, 1, 3, 16, 18, 2**62, 2**62 + 1])
def test_positions_that_are_no_square(positions: int) -> None:
    with pytest.raises(ConfigError, match=r"not a square grid|must be an integer"):
        CLIPConfig.from_shapes(SHAPES | {"visual.positional_embedding": (positions, 128)}, "gelu", heads=1)


@pytest.mark.parametrize("block", ["x", "", "²", "9" * 5000, "1000000000"])
def test_block_names_that_are_no_small_numbers(block: str) -> None:
    name = f"transformer.resblocks.{block}.mlp.c_fc.weight"
    assert CLIPConfig.from_shapes(SHAPES | {name: (1,)}, "gelu").text.layers == 4  # the loader finds it unexpected


# -- the dataclasses --------------------------------------------------------------------------------------------------


def test_override() -> None:
    config = CLIPConfig.from_hf(FULL)
    assert config.override() == config
    assert config.override("quick_gelu", (12, 4)) == CLIPConfig(
        256,
        dataclasses.replace(config.vision, activation="quick_gelu", heads=12),
        dataclasses.replace(config.text, activation="quick_gelu", heads=4),
    )
    with pytest.raises(ConfigError, match="activation is 'tanh'"):
        config.override("tanh")
    with pytest.raises(ConfigError, match="cannot be divided among 5"):
        config.override(heads=5)


def test_fields_are_checked_whoever_builds_them() -> None:
    for value in (0, -1, 1.0, "64", None, True, 10**9):
        with pytest.raises(ConfigError, match=r"VisionConfig\.width"):
            VisionConfig(width=value, layers=1, heads=1, mlp_width=1)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"CLIPConfig\.embed_dim"):
            CLIPConfig(value, VisionConfig(8, 1, 1, 1), TextConfig(8, 1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"TextConfig\.layers must be an integer from 1 to 256, got 257"):
        TextConfig(8, 257, 1, 1)
    with pytest.raises(ConfigError, match=r"TextConfig\.layer_norm_eps"):
        TextConfig(8, 1, 1, 1, layer_norm_eps=-1e-5)
