"""openai/CLIP's ``SimpleTokenizer``, for programs such as CoOp that read its ``encoder`` and ``decoder``."""

from __future__ import annotations

from miniclip.tokenizer import Tokenizer, vocabulary_and_merges


class SimpleTokenizer(Tokenizer):
    """``miniclip.Tokenizer`` with the two tables that openai/CLIP's class has.

    Attributes:
        encoder: token -> id. A token that ends a word ends in "</w>".
        decoder: id -> token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, _ = vocabulary_and_merges()
        self.decoder = {i: token for token, i in self.encoder.items()}
