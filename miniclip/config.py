"""What a CLIP is made of: frozen dataclasses, read from a Hub configuration or from the shapes of the tensors."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from miniclip.errors import ConfigError

ACTIVATIONS = ("quick_gelu", "gelu")
END_OF_TEXT = 49407  # "<|endoftext|>", the last of the 49,408 ids of OpenAI's vocabulary

# No published CLIP comes near these. A damaged configuration is met here, before it builds a million modules, and the
# size of every tensor stays far below 2**63 bytes.
_LARGEST = 2**18
_MOST_LAYERS = 256

Shapes = Mapping[str, tuple[int, ...]]
Heads = int | tuple[int, int]
T = TypeVar("T")
Tower = TypeVar("Tower", bound="TransformerConfig")


@dataclass(frozen=True)
class TransformerConfig:
    """The residual attention blocks of one tower (section 2.4 of the paper).

    ``width`` is the residual stream, ``mlp_width`` the hidden layer of each MLP (4 x width in every published model).

    Raises:
        ConfigError: naming the field that cannot be, here and in the classes below.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check(_integer, "width", "heads", "mlp_width")
        self._check(_layers, "layers")
        self._check(_activation, "activation")
        self._check(_epsilon, "layer_norm_eps")
        if self.width % self.heads:
            raise ConfigError(
                f"{type(self).__name__}: width {self.width} cannot be divided among {self.heads} attention heads"
            )

    def _check(self, check: Callable[[str, object], object], *names: str) -> None:
        for name in names:
            check(f"{type(self).__name__}.{name}", getattr(self, name))


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """The image tower: a Vision Transformer over square patches of a square image, sizes in pixels."""

    patch_size: int = 32
    image_size: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(_integer, "patch_size", "image_size")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} does not fit into image_size {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image; pixels that fill no whole patch are left out."""
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
        self._check(_integer, "context_length", "vocab_size")
        if self.end_of_text is not None:
            self._check(_token_id, "end_of_text")
            if self.end_of_text >= self.vocab_size:
                raise ConfigError(
                    f"the end of text (eos_token_id) is {self.end_of_text}, outside a vocab_size of {self.vocab_size}"
                )


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the space they meet in."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        _integer("CLIPConfig.embed_dim", self.embed_dim)

    def override(self, activation: str | None = None, heads: Heads | None = None) -> CLIPConfig:
        """The same CLIP with another activation or other heads, one number or (image, text), where given."""
        vision_heads, text_heads = _image_and_text(heads)
        return replace(
            self,
            vision=_changed(self.vision, activation=activation, heads=vision_heads),
            text=_changed(self.text, activation=activation, heads=text_heads),
        )

    # -- Hugging Face's config.json -----------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read the contents of a Hugging Face ``config.json``; a field it leaves out has transformers' default.

        Raises:
            ConfigError: for another kind of model, or naming the field that miniclip cannot follow.
        """
        if (model_type := config.get("model_type", "clip")) != "clip":
            raise ConfigError(f"model_type is {model_type!r}, miniclip loads 'clip'")
        vision, text = (_hf_section(config, name) for name in ("vision_config", "text_config"))
        if (channels := vision.read("num_channels", 3, _integer)) != 3:
            raise ConfigError(f"vision_config.num_channels is {channels}, miniclip's images have 3")
        vocab_size = text.read("vocab_size", 49408, _integer)
        end_of_text: int | None = text.read("eos_token_id", END_OF_TEXT, _token_id)
        if end_of_text == 2:
            # Written by transformers before 4.31, and pooled by it to this day at the largest id of the row. In
            # OpenAI's vocabulary that is the end of text, which lets a row without one be noticed.
            end_of_text = _openai_end_of_text(vocab_size)
        return cls(
            embed_dim=_Section("", config).read("projection_dim", 512, _integer),
            vision=VisionConfig(
                **_hf_block(vision, width=768, heads=12, mlp_width=3072),
                patch_size=vision.read("patch_size", 32, _side),
                image_size=vision.read("image_size", 224, _side),
            ),
            text=TextConfig(
                **_hf_block(text, width=512, heads=8, mlp_width=2048),
                context_length=text.read("max_position_embeddings", 77, _integer),
                vocab_size=vocab_size,
                end_of_text=end_of_text,
            ),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a Hugging Face ``config.json``, from which ``from_hf`` makes this configuration again.

        Raises:
            ConfigError: if the end of text is the id 2, which Hugging Face takes for OpenAI's original rule.
        """
        vision, text = self.vision, self.text
        if text.end_of_text == 2:
            raise ConfigError(
                "eos_token_id 2 means OpenAI's original pooling rule to Hugging Face, and cannot be saved"
            )
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.embed_dim,
            "vision_config": {
                **_hf_values(vision),
                "model_type": "clip_vision_model",
                "projection_dim": self.embed_dim,
                "num_channels": 3,
                "patch_size": vision.patch_size,
                "image_size": vision.image_size,
            },
            "text_config": {
                **_hf_values(text),
                "model_type": "clip_text_model",
                "projection_dim": self.embed_dim,
                "max_position_embeddings": text.context_length,
                "vocab_size": text.vocab_size,
                "eos_token_id": 2 if text.end_of_text is None else text.end_of_text,
            },
        }

    # -- open_clip_config.json ----------------------------------------------------------------------------------------

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read the contents of an ``open_clip_config.json``; a field it leaves out has open_clip's default.

        Raises:
            ConfigError: naming the field that miniclip cannot follow, or what is asked for beyond OpenAI's ViT.
        """
        if not isinstance(config.get("model_cfg"), Mapping):
            raise ConfigError("there is no model_cfg in it")
        model = _Section("model_cfg.", config["model_cfg"])
        vision, text = (_Section(f"{name}.", model.read(name, {}, _object)) for name in ("vision_cfg", "text_cfg"))
        if isinstance(vision.values.get("layers"), list):
            raise ConfigError(f"vision_cfg.layers {vision.values['layers']} are a ResNet's, miniclip has ViTs")
        model.refuse_others("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
        # patch_dropout acts in training only; everything else changes the mathematics.
        vision.refuse_others(*_OPEN_CLIP_BLOCK, "image_size", "patch_size", "head_width", "patch_dropout")
        text.refuse_others(*_OPEN_CLIP_BLOCK, "context_length", "vocab_size", "heads")
        activation = "quick_gelu" if model.read("quick_gelu", False, _boolean) else "gelu"
        vision_width, head_width = vision.read("width", 768, _integer), vision.read("head_width", 64, _integer)
        if vision_width % head_width:
            raise ConfigError(f"vision_cfg.width {vision_width} is not a multiple of head_width {head_width}")
        vocab_size = text.read("vocab_size", 49408, _integer)
        return cls(
            embed_dim=model.read("embed_dim", None, _integer),
            vision=VisionConfig(
                **_open_clip_block(vision, vision_width, activation),
                heads=vision_width // head_width,
                patch_size=vision.read("patch_size", 16, _side),
                image_size=vision.read("image_size", 224, _side),
            ),
            text=TextConfig(
                **_open_clip_block(text, text.read("width", 512, _integer), activation),
                heads=text.read("heads", 8, _integer),
                context_length=text.read("context_length", 77, _integer),
                vocab_size=vocab_size,
                end_of_text=_openai_end_of_text(vocab_size),
            ),
        )

    # -- no configuration at all --------------------------------------------------------------------------------------

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str | None, heads: Heads | None = None) -> CLIPConfig:
        """Read everything that shapes reveal from tensors under OpenAI's names; the rest has to be said.

        No shape reveals the activation, nor the number of heads: ``heads`` is one number, or (image, text). Left out,
        it is width / 64, except for the widths at which published models are known to differ.

        Raises:
            ConfigError: if something has to be said and is not, or the tensors are not a CLIP ViT's.
        """
        if activation is None:
            raise ConfigError(
                "no configuration of a CLIP lies beside these weights, and no tensor tells their activation: pass "
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
        vision_heads, text_heads = _image_and_text(heads)
        return cls(
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
                end_of_text=_openai_end_of_text(vocab_size),
            ),
        )


# -- reading the sections of a configuration file ---------------------------------------------------------------------

_OPEN_CLIP_BLOCK = ("width", "layers", "mlp_ratio")


@dataclass(frozen=True)
class _Section:
    """One object of a configuration file. Its fields are checked as they are read, and errors call them by name."""

    name: str  # what its fields are called by in errors: "text_config."
    values: Mapping[str, Any]

    def read(self, key: str, default: object, check: Callable[[str, object], T]) -> T:
        return check(self.name + key, self.values.get(key, default))

    def refuse_others(self, *known: str) -> None:
        # null, false, 0 and "" switch a feature of open_clip off
        if others := sorted(key for key, value in self.values.items() if key not in known and value):
            raise ConfigError(f"{self.name.rstrip('.')} asks for {', '.join(others)}, which miniclip does not have")


def _hf_section(config: Mapping[str, Any], name: str) -> _Section:
    """One tower's settings. Old files carry a ``*_config_dict`` as well, which transformers lets win as a whole."""
    if config.get(f"{name}_dict") is not None:
        name = f"{name}_dict"
    values = config.get(name)
    return _Section(f"{name}.", {} if values is None else _object(name, values))


def _hf_block(section: _Section, width: int, heads: int, mlp_width: int) -> dict[str, Any]:
    """What both of Hugging Face's towers have, by our names; the arguments are transformers' defaults."""
    return {
        "width": section.read("hidden_size", width, _integer),
        "layers": section.read("num_hidden_layers", 12, _layers),
        "heads": section.read("num_attention_heads", heads, _integer),
        "mlp_width": section.read("intermediate_size", mlp_width, _integer),
        "activation": section.read("hidden_act", "quick_gelu", _activation),
        "layer_norm_eps": section.read("layer_norm_eps", 1e-5, _epsilon),
    }


def _hf_values(tower: TransformerConfig) -> dict[str, Any]:
    """What ``_hf_block`` reads."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.layer_norm_eps,
    }


def _open_clip_block(section: _Section, width: int, activation: str) -> dict[str, Any]:
    return {
        "width": width,
        "layers": section.read("layers", 12, _layers),
        "mlp_width": int(width * section.read("mlp_ratio", 4.0, _ratio)),
        "activation": activation,
    }


def _openai_end_of_text(vocab_size: int) -> int | None:
    """Of OpenAI's vocabulary the end of text is known; in any other it has the largest id of a row."""
    return END_OF_TEXT if vocab_size == END_OF_TEXT + 1 else None


def _image_and_text(heads: object) -> tuple[int | None, int | None]:
    if heads is None or isinstance(heads, int):
        return heads, heads
    if isinstance(heads, (tuple, list)) and len(heads) == 2:
        return heads[0], heads[1]
    raise ConfigError(f"heads must be one number, or (image, text), got {reprlib.repr(heads)}")


def _changed(tower: Tower, **changes: Any) -> Tower:
    return replace(tower, **{name: value for name, value in changes.items() if value is not None})


def _usual_heads(tower: str, width: int) -> int:
    # These are the widths of the image towers of ViT-H, g, bigG and e, whose heads are 80, 88, 104 and 112 wide.
    if width % 64 or (tower == "image" and width in (1280, 1408, 1664, 1792)):
        raise ConfigError(
            "no configuration of a CLIP lies beside these weights, and no tensor tells the attention heads of their "
            f"{tower} tower, {width} wide: pass heads=N, or heads=(image, text)"
        )
    return width // 64


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


# -- checks: (what to call the value, the value) -> the value ---------------------------------------------------------


def _integer(name: str, value: object, largest: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ConfigError(f"{name} must be an integer from 1 to {largest}, got {reprlib.repr(value)}")
    return value


def _layers(name: str, value: object) -> int:
    return _integer(name, value, _MOST_LAYERS)


def _token_id(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be one token id, got {reprlib.repr(value)}")
    return value


def _activation(name: str, value: object) -> str:
    if value not in ACTIVATIONS:
        raise ConfigError(f"{name} is {reprlib.repr(value)}; the activations are {' and '.join(ACTIVATIONS)}")
    return str(value)


def _epsilon(name: str, value: object) -> float:
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a finite float of at least 0.0, got {reprlib.repr(value)}")
    return value


def _ratio(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
        raise ConfigError(f"{name} must be a positive number, got {reprlib.repr(value)}")
    return value


def _side(name: str, value: object) -> int:
    """A side in pixels, also where it is written as [height, width]."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        if value[0] != value[1]:
            raise ConfigError(f"{name} {reprlib.repr(value)} is not square")
        value = value[0]
    return _integer(name, value)


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {reprlib.repr(value)}")
    return value


def _object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, got {reprlib.repr(value)}")
    return value
