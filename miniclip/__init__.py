"""miniclip: OpenAI's CLIP for inference, small enough to read and validated against transformers.

import miniclip
model, preprocess = miniclip.load("ViT-B/32")
"""

from miniclip.config import CLIPConfig
from miniclip.embed import Progress, Summary, embed_images
from miniclip.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    ImageError,
    InputError,
    MiniclipError,
    StorageError,
    TextTooLongError,
    UnknownModelError,
)
from miniclip.hub import available_models
from miniclip.images import open_image
from miniclip.loading import load
from miniclip.loss import contrastive_loss
from miniclip.model import CLIP
from miniclip.preprocess import Preprocess
from miniclip.saving import save_pretrained
from miniclip.search import Index, Match
from miniclip.tokenizer import Tokenizer, tokenize
from miniclip.version import __version__
from miniclip.zero_shot import ZeroShotClassifier

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CheckpointError",
    "ConfigError",
    "DownloadError",
    "ImageError",
    "Index",
    "InputError",
    "Match",
    "MiniclipError",
    "Preprocess",
    "Progress",
    "StorageError",
    "Summary",
    "TextTooLongError",
    "Tokenizer",
    "UnknownModelError",
    "ZeroShotClassifier",
    "__version__",
    "available_models",
    "contrastive_loss",
    "embed_images",
    "load",
    "open_image",
    "save_pretrained",
    "tokenize",
]
