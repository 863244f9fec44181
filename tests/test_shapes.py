"""What the shapes of tensors reveal, and what the caller has to give."""

from __future__ import annotations

import pytest

from miniclip import ConfigError
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.shapes import config_from_shapes

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
    assert config_from_shapes(SHAPES, "gelu") == CLIPConfig(
        48,
        VisionConfig(128, 12, 2, 100, "gelu", patch_size=8, image_size=32),
        TextConfig(192, 3, 3, 200, "gelu"),
    )
    small = SHAPES | {"token_embedding.weight": (100, 192)}
    assert config_from_shapes(small, "quick_gelu").text.end_of_text is None


def test_given_heads_are_used_and_checked() -> None:
    def heads(given: object) -> tuple[int, int]:
        config = config_from_shapes(SHAPES, "gelu", given)  # type: ignore[arg-type]
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
def test_heads_are_not_guessed_for_widths_known_to_differ(width: int) -> None:
    wide = {name: tuple(width if n == 128 else n for n in shape) for name, shape in SHAPES.items()}
    with pytest.raises(ConfigError, match=rf"heads of the image tower, {width} wide: pass heads=N, or heads=\(image"):
        config_from_shapes(wide, "gelu")
    assert config_from_shapes(wide, "gelu", heads=(4, 3)).vision.heads == 4


def test_a_missing_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pass activation='quick_gelu' \(OpenAI's weights\) or activation='gelu'"):
        config_from_shapes(SHAPES, None)
    with pytest.raises(ConfigError, match="activation is 'relu'; the activations are quick_gelu and gelu"):
        config_from_shapes(SHAPES, "relu")


@pytest.mark.parametrize("missing", [name for name in SHAPES if ".resblocks." not in name or ".0." in name])
def test_shapes_of_another_model_are_refused(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"the weights have no {missing}"):
        config_from_shapes({name: shape for name, shape in SHAPES.items() if name != missing}, "gelu")
    for shape in ((), (5,), (1, 2, 3), (1,) * 8):
        with pytest.raises(ConfigError, match="another rank"):
            config_from_shapes(SHAPES | {missing: shape}, "gelu")
    shape = tuple(0 for _ in SHAPES[missing])
    with pytest.raises(ConfigError, match=r"must be an integer from 1|not a square grid"):
        config_from_shapes(SHAPES | {missing: shape}, "gelu")


@pytest.mark.parametrize("positions", [0, 1, 3, 16, 18, 2**62, 2**62 + 1])
def test_positions_without_a_square_grid_are_refused(positions: int) -> None:
    with pytest.raises(ConfigError, match=r"not a square grid|must be an integer"):
        config_from_shapes(SHAPES | {"visual.positional_embedding": (positions, 128)}, "gelu", heads=1)


@pytest.mark.parametrize("block", ["x", "", "²", "9" * 5000, "1000000000"])
def test_an_odd_block_name_counts_as_one_block(block: str) -> None:
    name = f"transformer.resblocks.{block}.mlp.c_fc.weight"
    assert config_from_shapes(SHAPES | {name: (1,)}, "gelu").text.layers == 4  # the loader finds it unexpected
