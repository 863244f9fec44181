"""open_clip's file: its defaults, the meaning of its fields, and errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import merged
from data.make_preprocess_goldens import SETTINGS
from helpers import INVALID_VALUES
from PIL import Image

from miniclip import ConfigError, Preprocess
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.open_clip import config_from_dict, preprocess_from_dict

OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def open_clip(**model_cfg: Any) -> CLIPConfig:
    return config_from_dict(merged(OPEN_CLIP, {"model_cfg": model_cfg}))


def test_vit_h_is_read() -> None:
    assert open_clip() == CLIPConfig(
        1024,
        VisionConfig(1280, 32, 16, 5120, "gelu", patch_size=14, image_size=224),
        TextConfig(1024, 24, 16, 4096, "gelu"),
    )


def test_a_missing_field_has_open_clips_default() -> None:
    assert config_from_dict({"model_cfg": {"embed_dim": 512}}) == CLIPConfig(
        512, VisionConfig(768, 12, 12, 3072, "gelu", patch_size=16), TextConfig(512, 12, 8, 2048, "gelu")
    )


def test_fields_have_open_clips_meaning() -> None:
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
def test_other_features_are_refused_by_name(section: str, feature: str) -> None:
    changes = {feature: "x"} if section == "model_cfg" else {section: {feature: "x"}}
    with pytest.raises(ConfigError, match=f"{section} asks for {feature}, which miniclip does not have"):
        open_clip(**changes)


def test_resnets_are_refused() -> None:
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
def test_invalid_sizes_are_refused_by_name(path: str) -> None:
    section, _, key = path.partition(".")
    for value in INVALID_VALUES:
        with pytest.raises(ConfigError) as caught:
            open_clip(**({key: value} if section == "model_cfg" else {section: {key: value}}))
        assert path in str(caught.value), value


def test_other_invalid_fields_are_refused_by_name() -> None:
    for value in INVALID_VALUES:
        if not isinstance(value, bool):
            with pytest.raises(ConfigError, match=r"model_cfg\.quick_gelu must be true or false"):
                open_clip(quick_gelu=value)
        if type(value) not in (int, float) or not 0 < value < 2**18:
            with pytest.raises(ConfigError, match=r"text_cfg\.mlp_ratio must be a positive number"):
                open_clip(text_cfg={"mlp_ratio": value})
        if not isinstance(value, dict):
            with pytest.raises(ConfigError, match=r"model_cfg\.text_cfg must be an object"):
                config_from_dict({"model_cfg": {"embed_dim": 1, "text_cfg": value}})
            with pytest.raises(ConfigError, match="there is no model_cfg"):
                config_from_dict({"model_cfg": value})
    with pytest.raises(ConfigError, match=r"text_cfg\.mlp_ratio|TextConfig\.mlp_width"):
        open_clip(text_cfg={"mlp_ratio": 1e-9})
    with pytest.raises(ConfigError, match=r"vision_cfg\.width 1280 is not a multiple of head_width 90"):
        open_clip(vision_cfg={"head_width": 90})
    with pytest.raises(ConfigError, match=r"model_cfg\.embed_dim"):
        config_from_dict({"model_cfg": {}})


# -- preprocess_cfg ---------------------------------------------------------------------------------------------------


def test_preprocess_cfg_is_read() -> None:
    assert preprocess_from_dict({}, 224) == Preprocess()
    assert preprocess_from_dict({"mean": None, "interpolation": None}, 224) == Preprocess()
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
    size, edge, resample, mean, std = SETTINGS["bilinear"]
    expected = Preprocess(size, mean, std, Image.Resampling[resample])  # type: ignore[arg-type]
    assert size == edge
    assert preprocess_from_dict(config, size) == expected  # test_preprocess.py compares its pixels with torchvision's


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resize_mode": "squash"}, "resize_mode must be 'shortest', got 'squash'"),
        ({"interpolation": "random"}, "unknown resampling 'random'"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"std": [0.5, 0.5, 0]}, "std must be positive"),
    ],
)
def test_a_preprocess_cfg_with_other_steps_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocess_from_dict(config, 224)
