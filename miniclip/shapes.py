"""The configuration that the shapes of a checkpoint's tensors reveal, for weights without a configuration file."""

from __future__ import annotations

import math
from collections.abc import Mapping

from miniclip.config import CLIPConfig, Heads, TextConfig, VisionConfig, heads_per_tower, openai_end_of_text
from miniclip.errors import ConfigError

Shape = tuple[int, ...]

# The widths of the image towers of ViT-H, g, bigG and e. Their heads are 80, 88, 104 and 112 wide, not 64.
_WIDTHS_OF_OTHER_HEADS = (1280, 1408, 1664, 1792)


def config_from_shapes(shapes: Mapping[str, Shape], activation: str | None, heads: Heads | None = None) -> CLIPConfig:
    """Read the configuration from the shapes of tensors. The caller adds what shapes do not reveal.

    Args:
        shapes: the shapes under OpenAI's names.
        activation: one of ``miniclip.config.ACTIVATIONS``. Shapes do not reveal it, and the wrong one gives plausible
            but wrong embeddings, so None is refused.
        heads: the attention heads, one number or (image, text). Shapes do not reveal them either. None means
            width / 64, except for the widths at which published models are known to differ.

    Raises:
        ConfigError: if the caller has to give a value and does not, or the tensors are not a CLIP ViT's.
    """
    if activation is None:
        raise ConfigError(
            "there is no CLIP configuration beside these weights, and tensors do not reveal the activation: pass "
            "activation='quick_gelu' (OpenAI's weights) or activation='gelu' (most LAION weights)"
        )
    try:
        width, _, patch_size, _ = shapes["visual.conv1.weight"]
        positions, _ = shapes["visual.positional_embedding"]
        _, embed_dim = shapes["visual.proj"]
        vocab_size, text_width = shapes["token_embedding.weight"]
        context_length, _ = shapes["positional_embedding"]
        vision_mlp, _ = shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"]
        text_mlp, _ = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    except KeyError as missing:
        raise ConfigError(f"the weights have no {missing.args[0]}, so they are not a CLIP ViT's") from None
    except ValueError:
        raise ConfigError("the weights have tensors of another rank than a CLIP ViT's") from None
    grid = math.isqrt(max(positions - 1, 0))
    if grid**2 + 1 != positions:
        raise ConfigError(f"{positions} position embeddings are not a square grid of patches and a class token")
    vision_heads, text_heads = heads_per_tower(heads)
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(
            width=width,
            layers=_count_blocks(shapes, "visual.transformer.resblocks."),
            heads=_usual_heads("image", width) if vision_heads is None else vision_heads,
            mlp_width=vision_mlp,
            activation=activation,
            patch_size=patch_size,
            image_size=grid * patch_size,
        ),
        text=TextConfig(
            width=text_width,
            layers=_count_blocks(shapes, "transformer.resblocks."),
            heads=_usual_heads("text", text_width) if text_heads is None else text_heads,
            mlp_width=text_mlp,
            activation=activation,
            context_length=context_length,
            vocab_size=vocab_size,
            end_of_text=openai_end_of_text(vocab_size),
        ),
    )


def _usual_heads(tower: str, width: int) -> int:
    if width % 64 or (tower == "image" and width in _WIDTHS_OF_OTHER_HEADS):
        raise ConfigError(
            "there is no CLIP configuration beside these weights, and tensors do not reveal the attention heads of the "
            f"{tower} tower, {width} wide: pass heads=N, or heads=(image, text)"
        )
    return width // 64


def _count_blocks(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})
