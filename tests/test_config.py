"""The dataclasses check every field, and ``override`` changes what the caller gives."""

from __future__ import annotations

import dataclasses

import pytest

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.errors import ConfigError


def test_override_changes_activation_and_heads() -> None:
    config = CLIPConfig(
        256, VisionConfig(96, 5, 6, 200, "gelu", 1e-6, 14, 100), TextConfig(48, 3, 2, 100, "gelu", 1e-4)
    )
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


def test_every_field_is_checked() -> None:
    for value in (0, -1, 1.0, "64", None, True, 10**9):
        with pytest.raises(ConfigError, match=r"VisionConfig\.width"):
            VisionConfig(width=value, layers=1, heads=1, mlp_width=1)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"CLIPConfig\.embed_dim"):
            CLIPConfig(value, VisionConfig(8, 1, 1, 1), TextConfig(8, 1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"TextConfig\.layers must be an integer from 1 to 256, got 257"):
        TextConfig(8, 257, 1, 1)
    with pytest.raises(ConfigError, match=r"TextConfig\.layer_norm_eps"):
        TextConfig(8, 1, 1, 1, layer_norm_eps=-1e-5)
