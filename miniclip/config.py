"""The configuration of a CLIP: frozen dataclasses, and the checks that every source of a configuration shares."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from miniclip.errors import ConfigError

#: The activations that miniclip has, by Hugging Face's names. ``layers.py`` maps each name to its module.
ACTIVATIONS = ("quick_gelu", "gelu")
END_OF_TEXT = 49407  # "<|endoftext|>", the last of the 49,408 ids of OpenAI's vocabulary

# Every published CLIP is far below these limits. They stop a damaged configuration before it builds a million modules,
# and they keep the size of every tensor far below 2**63 bytes.
_LARGEST_SIZE = 2**18
_MOST_LAYERS = 256

Heads = int | tuple[int, int]
Value = TypeVar("Value")
AnyTransformerConfig = TypeVar("AnyTransformerConfig", bound="TransformerConfig")


@dataclass(frozen=True)
class TransformerConfig:
    """The residual attention blocks of one tower (section 2.4 of the paper).

    Attributes:
        width: the size of the residual stream.
        layers: the number of blocks.
        heads: the attention heads of each block; they divide the width.
        mlp_width: the size of the hidden layer of each MLP (4 x width in every published model).
        activation: the activation inside each MLP, one of ``ACTIVATIONS``.
        layer_norm_eps: the epsilon of every LayerNorm.

    Raises:
        ConfigError: if a field has a value that cannot work; the message names the field. The classes below do the
            same.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check(check_size, "width", "heads", "mlp_width")
        self._check(check_layers, "layers")
        self._check(check_activation, "activation")
        self._check(check_epsilon, "layer_norm_eps")
        if self.width % self.heads:
            raise ConfigError(
                f"{type(self).__name__}: width {self.width} cannot be divided among {self.heads} attention heads"
            )

    def _check(self, check: Callable[[str, object], object], *names: str) -> None:
        for name in names:
            check(f"{type(self).__name__}.{name}", getattr(self, name))


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """The image tower: a Vision Transformer over square patches of a square image.

    Attributes:
        patch_size: the side of a patch in pixels.
        image_size: the side of the image in pixels.
    """

    patch_size: int = 32
    image_size: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(check_size, "patch_size", "image_size")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} does not fit into image_size {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image. Pixels that do not fill a whole patch are left out."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """The text tower: a causal transformer over token ids.

    Attributes:
        context_length: the number of tokens in a row.
        vocab_size: the number of token ids.
        end_of_text: the token id whose first occurrence is pooled. None means OpenAI's original rule, which Hugging
            Face writes as ``eos_token_id: 2``: pool at the position of the largest id.
    """

    context_length: int = 77
    vocab_size: int = 49408
    end_of_text: int | None = END_OF_TEXT

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(check_size, "context_length", "vocab_size")
        if self.end_of_text is not None:
            self._check(check_token_id, "end_of_text")
            if self.end_of_text >= self.vocab_size:
                raise ConfigError(
                    f"the end of text (eos_token_id) is {self.end_of_text}, outside a vocab_size of {self.vocab_size}"
                )


@dataclass(frozen=True)
class CLIPConfig:
    """A CLIP: two towers and the width of their common embedding space.

    Attributes:
        embed_dim: the number of values in an embedding.
        vision: the image tower.
        text: the text tower.
    """

    embed_dim: int
    vision: VisionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        check_size("CLIPConfig.embed_dim", self.embed_dim)

    def override(self, activation: str | None = None, heads: Heads | None = None) -> CLIPConfig:
        """The same CLIP with another activation, other attention heads, or both.

        Args:
            activation: for both towers; None keeps the present one.
            heads: one number for both towers, or (image, text); None keeps the present ones.

        Raises:
            ConfigError: if the changed configuration cannot work.
        """
        vision_heads, text_heads = heads_per_tower(heads)
        return replace(
            self,
            vision=_replace_given(self.vision, activation=activation, heads=vision_heads),
            text=_replace_given(self.text, activation=activation, heads=text_heads),
        )


def heads_per_tower(heads: object) -> tuple[int | None, int | None]:
    """``heads`` as (image, text): it is one number for both, a pair, or None.

    Raises:
        ConfigError: if it is anything else.
    """
    if heads is None or isinstance(heads, int):
        return heads, heads
    if isinstance(heads, (tuple, list)) and len(heads) == 2:
        return heads[0], heads[1]
    raise ConfigError(f"heads must be one number, or (image, text), got {reprlib.repr(heads)}")


def openai_end_of_text(vocab_size: int) -> int | None:
    """The end of text under OpenAI's rule, which pools at the largest id.

    In OpenAI's vocabulary the largest id is known. In any other it is the largest id of each row: None.
    """
    return END_OF_TEXT if vocab_size == END_OF_TEXT + 1 else None


def _replace_given(tower: AnyTransformerConfig, **changes: Any) -> AnyTransformerConfig:
    return replace(tower, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Section:
    """One object of a configuration file. Its fields are checked when they are read.

    Attributes:
        prefix: what error messages put before the name of a field, for example ``"text_config."``.
        values: the object.
    """

    prefix: str
    values: Mapping[str, Any]

    def read(self, key: str, default: object, check: Callable[[str, object], Value]) -> Value:
        """The value of a field, or its default, after the check."""
        return check(self.prefix + key, self.values.get(key, default))


# -- checks: each takes the name for the error message and the value, and returns the value ---------------------------


def check_size(name: str, value: object, largest: int = _LARGEST_SIZE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ConfigError(f"{name} must be an integer from 1 to {largest}, got {reprlib.repr(value)}")
    return value


def check_layers(name: str, value: object) -> int:
    return check_size(name, value, _MOST_LAYERS)


def check_token_id(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be one token id, got {reprlib.repr(value)}")
    return value


def check_activation(name: str, value: object) -> str:
    if value not in ACTIVATIONS:
        raise ConfigError(f"{name} is {reprlib.repr(value)}; the activations are {' and '.join(ACTIVATIONS)}")
    return str(value)


def check_epsilon(name: str, value: object) -> float:
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a finite float of at least 0.0, got {reprlib.repr(value)}")
    return value


def check_ratio(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST_SIZE:
        raise ConfigError(f"{name} must be a positive number, got {reprlib.repr(value)}")
    return value


def check_side(name: str, value: object) -> int:
    """A side in pixels. Some files write it as [height, width]."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        if value[0] != value[1]:
            raise ConfigError(f"{name} {reprlib.repr(value)} is not square")
        value = value[0]
    return check_size(name, value)


def check_boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {reprlib.repr(value)}")
    return value


def check_object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, got {reprlib.repr(value)}")
    return value
