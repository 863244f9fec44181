"""miniclip: OpenAI's CLIP for inference, small enough to read and validated against transformers.

import miniclip
model, preprocess = miniclip.load("ViT-B/32")
"""

from miniclip.config import CLIPConfig
from miniclip.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    ImageError,
    InputError,
    MiniclipError,
    TextTooLongError,
    UnknownModelError,
)
from miniclip.hub import available_models
from miniclip.loading import load
from miniclip.loss import contrastive_loss
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess, open_image
from miniclip.saving import save_pretrained
from miniclip.tokenizer import Tokenizer, tokenize
from miniclip.zero_shot import ZeroShotClassifier

__version__ = "0.1.0"

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CheckpointError",
    "ConfigError",
    "DownloadError",
    "ImageError",
    "InputError",
    "MiniclipError",
    "Preprocess",
    "TextTooLongError",
    "Tokenizer",
    "UnknownModelError",
    "ZeroShotClassifier",
    "available_models",
    "contrastive_loss",
    "load",
    "open_image",
    "save_pretrained",
    "tokenize",
]
