"""What a CLIP is made of: frozen dataclasses, read from a Hub configuration or from the shapes of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miniclip.errors import ConfigError

ACTIVATIONS = ("quick_gelu", "gelu")
END_OF_TEXT = 49407  # "<|endoftext|>", the last of the 49,408 ids of OpenAI's vocabulary

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TransformerConfig:
    """The residual attention blocks of one tower (section 2.4 of the paper).

    ``width`` is the residual stream, ``mlp_width`` the hidden layer of each MLP (4 x width in every published model).
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp_width"):
            _positive(name, getattr(self, name))
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} cannot be divided among {self.heads} attention heads")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {self.activation!r}; miniclip knows {' and '.join(ACTIVATIONS)}")
        if not isinstance(self.layer_norm_eps, (int, float)) or not self.layer_norm_eps > 0:
            raise ConfigError(f"layer norm eps must be positive, got {self.layer_norm_eps!r}")


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """The image tower: a Vision Transformer over square patches of a square image, sizes in pixels."""

    patch_size: int = 32
    image_size: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("patch_size", self.patch_size)
        _positive("image_size", self.image_size)
        if self.patch_size > self.image_size:
            raise ConfigError(f"patches of {self.patch_size} pixels do not fit images of {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """The text tower: a causal transformer over ``context_length`` token ids.

    ``end_of_text`` is the id whose first occurrence is pooled. None is OpenAI's original rule, which Hugging Face
    writes as ``eos_token_id: 2``: pool where the largest id stands.
    """

    context_length: int = 77
    vocab_size: int = 49408
    end_of_text: int | None = END_OF_TEXT

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("context_length", self.context_length)
        _positive("vocab_size", self.vocab_size)
        if self.end_of_text is not None and not 0 <= self.end_of_text < self.vocab_size:
            raise ConfigError(f"end-of-text id {self.end_of_text} is outside a vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the space they meet in."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        _positive("embed_dim", self.embed_dim)

    # -- Hugging Face's config.json ---------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read the contents of a Hugging Face ``config.json``; a field it leaves out has transformers' default."""
        if (model_type := config.get("model_type", "clip")) != "clip":
            raise ConfigError(f"config.json describes a {model_type!r} model, miniclip loads 'clip'")
        vision, text = (_hf_section(config, name) for name in ("vision_config", "text_config"))
        if (channels := vision.get("num_channels", 3)) != 3:
            raise ConfigError(f"num_channels is {channels}, miniclip's images have 3")
        end_of_text = text.get("eos_token_id", END_OF_TEXT)
        vocab_size = text.get("vocab_size", 49408)
        if end_of_text == 2:
            # Written by transformers before 4.31, and pooled by it to this day at the largest id of the row. In
            # OpenAI's vocabulary that is the end of text, which lets a row without one be noticed.
            end_of_text = END_OF_TEXT if vocab_size == END_OF_TEXT + 1 else None
        elif not _is_int(end_of_text):
            raise ConfigError(f"eos_token_id must be one integer, got {end_of_text!r}")
        return cls(
            embed_dim=_get(config, "projection_dim", 512),
            vision=VisionConfig(
                **_hf_transformer(vision, width=768, heads=12, mlp_width=3072),
                patch_size=_side("patch_size", vision.get("patch_size", 32)),
                image_size=_side("image_size", vision.get("image_size", 224)),
            ),
            text=TextConfig(
                **_hf_transformer(text, width=512, heads=8, mlp_width=2048),
                context_length=text.get("max_position_embeddings", 77),
                vocab_size=vocab_size,
                end_of_text=end_of_text,
            ),
        )

    # -- open_clip_config.json --------------------------------------------------------------------------------------

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read the contents of an ``open_clip_config.json``. What it asks for beyond OpenAI's ViT is refused by name."""
        model = config.get("model_cfg", config)
        if not isinstance(model, Mapping) or "embed_dim" not in model:
            raise ConfigError("open_clip_config.json has no model_cfg with an embed_dim")
        _refuse_others("model_cfg", model, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"})
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        # patch_dropout acts in training only; the rest changes the mathematics and is not implemented here.
        _refuse_others("vision_cfg", vision, {*_OPEN_CLIP_BLOCK, "image_size", "patch_size", "head_width", "patch_dropout"})
        _refuse_others("text_cfg", text, {*_OPEN_CLIP_BLOCK, "context_length", "vocab_size", "heads"})
        activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"

        def block(section: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
            if not isinstance(ratio := section.get("mlp_ratio", 4.0), (int, float)):
                raise ConfigError(f"mlp_ratio must be a number, got {ratio!r}")
            return {
                "width": width,
                "layers": section.get("layers", 12),
                "heads": heads,
                "mlp_width": int(width * ratio),
                "activation": activation,
            }

        vision_width, text_width = vision.get("width", 768), text.get("width", 512)
        head_width = vision.get("head_width", 64)
        if not _is_int(head_width) or head_width < 1 or vision_width % head_width:
            raise ConfigError(f"vision width {vision_width} is not a multiple of head_width {head_width}")
        vocab_size = text.get("vocab_size", 49408)
        return cls(
            embed_dim=model["embed_dim"],
            vision=VisionConfig(
                **block(vision, vision_width, vision_width // head_width),
                patch_size=_side("patch_size", vision.get("patch_size", 16)),
                image_size=_side("image_size", vision.get("image_size", 224)),
            ),
            text=TextConfig(
                **block(text, text_width, text.get("heads", 8)),
                context_length=text.get("context_length", 77),
                vocab_size=vocab_size,
                end_of_text=_openai_end_of_text(vocab_size),
            ),
        )

    # -- no configuration at all ------------------------------------------------------------------------------------

    @classmethod
    def from_shapes(
        cls, shapes: Shapes, activation: str | None, heads: int | tuple[int, int] | None = None
    ) -> CLIPConfig:
        """Read everything that shapes reveal from tensors under OpenAI's names; the rest has to be said.

        No shape reveals the activation, nor the number of heads: ``heads`` is one number, or (image, text). Left out,
        it is width / 64, except for the widths at which published models are known to differ.
        """
        if activation is None:
            raise ConfigError(
                "these weights come without a config.json, and no tensor tells their activation: pass "
                "activation='quick_gelu' (OpenAI's weights) or activation='gelu' (most LAION weights)"
            )
        try:
            width, _, patch_size, _ = shapes["visual.conv1.weight"]
            positions, _ = shapes["visual.positional_embedding"]
            _, embed_dim = shapes["visual.proj"]
            vocab_size, text_width = shapes["token_embedding.weight"]
            context_length, _ = shapes["positional_embedding"]
            vision_mlp = shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0]
            text_mlp = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
        except KeyError as missing:
            raise ConfigError(f"the weights have no {missing.args[0]}, so they are not a CLIP ViT") from None
        except (ValueError, IndexError):
            raise ConfigError("the weights have tensors of another rank than a CLIP ViT's") from None
        grid = round((positions - 1) ** 0.5)
        if grid * grid + 1 != positions:
            raise ConfigError(f"{positions} position embeddings are not a square grid of patches and a class token")
        vision_heads, text_heads = heads if isinstance(heads, tuple) else (heads, heads)
        return cls(
            embed_dim=embed_dim,
            vision=VisionConfig(
                width=width,
                layers=_count_blocks(shapes, "visual.transformer.resblocks."),
                heads=vision_heads or _usual_heads("image", width, known_exceptions=(1280, 1408, 1664)),
                mlp_width=vision_mlp,
                activation=activation,
                patch_size=patch_size,
                image_size=grid * patch_size,
            ),
            text=TextConfig(
                width=text_width,
                layers=_count_blocks(shapes, "transformer.resblocks."),
                heads=text_heads or _usual_heads("text", text_width),
                mlp_width=text_mlp,
                activation=activation,
                context_length=context_length,
                vocab_size=vocab_size,
                end_of_text=_openai_end_of_text(vocab_size),
            ),
        )


_OPEN_CLIP_BLOCK = ("width", "layers", "mlp_ratio")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(name: str, value: object) -> None:
    if not _is_int(value) or value < 1:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")


def _get(section: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, or the default where it is absent or null."""
    value = section.get(key)
    return default if value is None else value


def _hf_section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One tower's settings. Old files carry a ``*_config_dict`` as well, which transformers lets win as a whole."""
    section = _get(config, f"{name}_dict", _get(config, name, {}))
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} must be an object, got {section!r}")
    return section


def _hf_transformer(section: Mapping[str, Any], width: int, heads: int, mlp_width: int) -> dict[str, Any]:
    return {
        "width": section.get("hidden_size", width),
        "layers": section.get("num_hidden_layers", 12),
        "heads": section.get("num_attention_heads", heads),
        "mlp_width": section.get("intermediate_size", mlp_width),
        "activation": section.get("hidden_act", "quick_gelu"),
        "layer_norm_eps": section.get("layer_norm_eps", 1e-5),
    }


def _side(name: str, value: object) -> int:
    """A side in pixels, also where it is written as [height, width]."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        if value[0] != value[1]:
            raise ConfigError(f"{name} {list(value)} is not square")
        value = value[0]
    _positive(name, value)
    assert isinstance(value, int)
    return value


def _refuse_others(where: str, section: object, known: set[str]) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} must be an object, got {section!r}")
    # null, false and "" switch a feature of open_clip off
    if others := sorted(key for key, value in section.items() if key not in known and value):
        raise ConfigError(f"open_clip_config.json: {where} asks for {', '.join(others)}, which miniclip does not have")


def _openai_end_of_text(vocab_size: int) -> int | None:
    return END_OF_TEXT if vocab_size == END_OF_TEXT + 1 else None


def _usual_heads(tower: str, width: int, known_exceptions: tuple[int, ...] = ()) -> int:
    if width % 64 or width in known_exceptions:
        raise ConfigError(
            f"these weights come without a config.json, and no tensor tells the attention heads of a {tower} tower "
            f"{width} wide: pass heads=N, or heads=(image, text)"
        )
    return width // 64


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in shapes if key.startswith(prefix))
