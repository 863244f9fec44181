"""The functions of openai/CLIP's ``clip.clip``, for ``from clip import clip`` with only the import changed."""

from miniclip.hub import available_models
from miniclip.loading import load
from miniclip.tokenizer import tokenize

__all__ = ["available_models", "load", "tokenize"]
