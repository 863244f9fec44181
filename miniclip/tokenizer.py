"""Text -> token ids and back: OpenAI's cleaning and byte-pair encoding (Sennrich et al. 2016), exactly.

Where Hugging Face's CLIP tokenizer differs (it repairs no mojibake, unescapes no HTML, keeps curly quotes), this one
follows OpenAI, whose cleaning the weights were trained with.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Iterable
from functools import cache
from heapq import heapify, heappop, heappush
from importlib.resources import files
from itertools import pairwise
from operator import index

import numpy as np
import regex
import torch
from torch import Tensor

from miniclip.errors import InputError, TextTooLongError

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_WORD = "</w>"

# A word is a special token, an English contraction, a run of letters, one digit, or a run of other visible characters.
_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)

# The cache is for the words that recur. Emptying it when full keeps it bounded without bookkeeping on every hit, and
# a word too long to recur is not worth its memory.
_CACHE_WORDS = 100_000
_CACHE_LETTERS = 40

_LONGEST_CONTEXT = 2**18


@cache
def _byte_symbols() -> dict[int, str]:
    """The 256 bytes in the order of their ids, each with the visible character that stands for it in the merges."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@cache
def _vocabulary() -> tuple[tuple[str, ...], dict[tuple[int, int], int]]:
    """Every token's symbols by id, and the id that each pair of ids merges into; a lower id merges first."""
    symbols = list(_byte_symbols().values())
    tokens = symbols + [symbol + END_OF_WORD for symbol in symbols]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = {}
    table = gzip.decompress((files("miniclip") / "data" / "merges.txt.gz").read_bytes()).decode()
    for line in table.splitlines():
        left, right = line.split(" ")
        merges[ids[left], ids[right]] = ids[left + right] = len(tokens)
        tokens.append(left + right)
    return (*tokens, START_OF_TEXT, END_OF_TEXT), merges


class Tokenizer:
    """OpenAI's tokenizer: 49,408 ids, lower-cased, byte-level. Safe to share between threads."""

    def __init__(self) -> None:
        self._tokens, self._merges = _vocabulary()
        self._byte_ids = {byte: i for i, byte in enumerate(_byte_symbols())}
        self._bytes = {symbol: byte for byte, symbol in _byte_symbols().items()}
        self.end_of_text = len(self._tokens) - 1
        self.start_of_text = self.end_of_text - 1
        self._special = {START_OF_TEXT: [self.start_of_text], END_OF_TEXT: [self.end_of_text]}
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end tokens.

        Raises:
            TypeError: if it is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        cached = self._cache
        ids: list[int] = []
        for word in _WORD.findall(_clean(text)):
            if (word_ids := cached.get(word)) is None:
                word_ids = self._encode_word(word)
                if len(word) <= _CACHE_LETTERS:
                    if len(cached) >= _CACHE_WORDS:
                        cached.clear()
                    cached[word] = word_ids
            ids += word_ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for: lower case, a space after every word, special tokens spelled out.

        Raises:
            InputError: for an id outside the vocabulary, or what is not an id.
        """
        symbols = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            try:
                number = index(i)
            except TypeError:
                raise InputError(f"decode takes the ids of one text, got {type(i).__name__} among them") from None
            if not 0 <= number < len(self._tokens):
                raise InputError(f"token id {number} is outside the vocabulary of {len(self._tokens)}")
            symbols.append(self._tokens[number])
        data = bytes(self._bytes[symbol] for symbol in "".join(symbols))
        return data.decode("utf-8", errors="replace").replace(END_OF_WORD, " ")

    def _encode_word(self, word: str) -> list[int]:
        """Merge the pair with the lowest id, leftmost first, until none is left.

        OpenAI's loop looks at every pair again after each merge, which is quadratic in a word's length. A merge only
        creates pairs of higher ids than its own, so a heap over a linked list visits the same merges in the same order.
        """
        if word in self._special:
            return self._special[word]
        ids = [self._byte_ids[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the same byte at the end of a word
        merges, size = self._merges, len(ids)
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))
        # Entries are id << 32 | position in one integer: comparing tuples is most of a heap's time.
        heap = [merges[pair] << 32 | i for i, pair in enumerate(pairwise(ids)) if pair in merges]
        heapify(heap)
        while heap:
            entry = heappop(heap)
            merged, i = entry >> 32, entry & 0xFFFFFFFF
            j = after[i]
            if j == size or merges.get((ids[i], ids[j])) != merged:
                continue  # one half was merged with its other neighbour in the meantime
            ids[i], ids[j] = merged, -1
            after[i] = right = after[j]
            if right < size:
                before[right] = i
                if (pair := (merged, ids[right])) in merges:
                    heappush(heap, merges[pair] << 32 | i)
            left = before[i]
            if left >= 0 and (pair := (ids[left], merged)) in merges:
                heappush(heap, merges[pair] << 32 | left)
        return [i for i in ids if i >= 0]


def _clean(text: str) -> str:
    # On printable ASCII without entities ftfy and unescape change nothing, and they are most of the time spent.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # half of the time that importing miniclip would take, and most programs never come here

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower()  # OpenAI also collapses and strips white space, but no word holds any


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(texts: str | Iterable[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Token ids of one or more texts, between start and end tokens and padded with zeros.

    Args:
        texts: one text, or any iterable of them.
        context_length: L, the length of every row; 77 for all of OpenAI's models.
        truncate: cut a text that does not fit, keeping its end token, instead of raising.

    Returns:
        An int32 tensor (N, L).

    Raises:
        TextTooLongError: (a ValueError and a RuntimeError) if a text does not fit and ``truncate`` is False.
        TypeError: if a text is not a string.
        InputError: if ``context_length`` cannot hold the start and end tokens, or no model has it.
    """
    if not isinstance(context_length, int) or not 2 <= context_length <= _LONGEST_CONTEXT:
        raise InputError(
            f"context_length must be from 2, a start and an end token, to {_LONGEST_CONTEXT}, got {context_length!r}"
        )
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or an iterable of them, got {type(texts).__name__}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = _tokenizer()
    result = np.zeros((len(texts), context_length), dtype=np.int32)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} must be a str, got {type(text).__name__}")
        ids = [tokenizer.start_of_text, *tokenizer.encode(text), tokenizer.end_of_text]
        if len(ids) > context_length:
            if not truncate:
                excerpt = text if len(text) <= 40 else text[:37] + "..."
                raise TextTooLongError(
                    f"text {i} ({excerpt!r}) has {len(ids)} tokens, the context holds {context_length}; "
                    "pass truncate=True"
                )
            ids = [*ids[: context_length - 1], tokenizer.end_of_text]
        result[i, : len(ids)] = ids
    return torch.from_numpy(result)
