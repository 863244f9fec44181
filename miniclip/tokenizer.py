"""Text to token ids and back: OpenAI's cleaning and byte-pair encoding (Sennrich et al. 2016), id for id.

Hugging Face's CLIP tokenizer does not repair mojibake, does not unescape HTML and keeps curly quotes. miniclip follows
OpenAI in these cases, because the weights were trained on OpenAI's ids.
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

# A word is a special token, the end of an English contraction, a run of letters, one digit, or a run of other visible
# characters.
_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)

# The cache serves words that occur often. A full cache is emptied: that bounds its memory without any bookkeeping on a
# hit. Very long words hardly occur twice, so they are not cached.
_CACHE_WORDS = 100_000
_CACHE_LETTERS = 40

_LONGEST_CONTEXT = 2**18  # far beyond any model; a mistyped length must not exhaust the memory


@cache
def _byte_symbols() -> dict[int, str]:
    """Each of the 256 bytes, in the order of their ids, and the visible character that the merges write for it."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@cache
def _vocabulary() -> tuple[tuple[str, ...], dict[tuple[int, int], int]]:
    """The symbols of every token, by id, and the id that each pair of ids merges into. A lower id merges first."""
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


def vocabulary_and_merges() -> tuple[dict[str, int], list[str]]:
    """OpenAI's table as Hugging Face's vocab.json and merges.txt hold it: token -> id, and "left right" in order."""
    tokens, merges = _vocabulary()
    return {token: i for i, token in enumerate(tokens)}, [f"{tokens[left]} {tokens[right]}" for left, right in merges]


class Tokenizer:
    """OpenAI's byte-level tokenizer with 49,408 ids. Threads may share one instance.

    ``tokenize`` is enough for most programs. This class is for the ids of a text without start, end and padding, and
    for turning ids back into text.

    Attributes:
        start_of_text: the id of "<|startoftext|>", 49406.
        end_of_text: the id of "<|endoftext|>", 49407.
    """

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
        """The number of ids: 49,408."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without start and end tokens.

        The text is cleaned first, as in openai/CLIP: ftfy repairs its Unicode, HTML entities are unescaped twice, and
        all letters become lower case. A special token that is typed in the text becomes that special token.

        Args:
            text: a text of any length.

        Returns:
            The ids, each from 0 to 49,407. An empty text has none.

        Raises:
            TypeError: if ``text`` is not a string.
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
        """Turn ids back into text.

        Args:
            ids: the ids of one text: a list, a tensor (L,), an array (L,) or another iterable of integers.

        Returns:
            The text in lower case, with a space after every word. Special tokens are spelled out, and the padding id
            0 reads as "!". Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            InputError: if an element is not an integer, or not an id of the vocabulary.
        """
        symbols = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            try:
                number = index(i)
            except TypeError:
                raise InputError(f"decode takes the ids of one text, but one of them is a {type(i).__name__}") from None
            if not 0 <= number < len(self._tokens):
                raise InputError(f"token id {number} is outside the vocabulary of {len(self._tokens)}")
            symbols.append(self._tokens[number])
        data = bytes(self._bytes[symbol] for symbol in "".join(symbols))
        return data.decode("utf-8", errors="replace").replace(END_OF_WORD, " ")

    def _encode_word(self, word: str) -> list[int]:
        """Merge the pair with the lowest id, leftmost first, until no pair can be merged.

        OpenAI's loop looks at every pair again after each merge, so its time is quadratic in the length of a word. A
        merge creates only pairs with a higher id than its own. Therefore a heap over a linked list makes the same
        merges in the same order.
        """
        if word in self._special:
            return self._special[word]
        ids = [self._byte_ids[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the id of the same byte at the end of a word
        merges, size = self._merges, len(ids)
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))
        # An entry is one integer, id << 32 | position: a heap of tuples spends most of its time comparing tuples.
        heap = [merges[pair] << 32 | i for i, pair in enumerate(pairwise(ids)) if pair in merges]
        heapify(heap)
        while heap:
            entry = heappop(heap)
            merged, i = entry >> 32, entry & 0xFFFFFFFF
            j = after[i]
            if j == size or merges.get((ids[i], ids[j])) != merged:
                continue  # out of date: one half has been merged with its other neighbour
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
    # ftfy and unescape take most of the time, and change nothing in printable ASCII without "&".
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # here, because it would double the time of importing miniclip and few programs need it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower()  # OpenAI also collapses and strips white space; _WORD skips white space anyway


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(texts: str | Iterable[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Turn one or more texts into the token ids that ``CLIP.encode_text`` takes.

    Every row holds the start token, the ids of the text, the end token, and zeros up to ``context_length``.

    Args:
        texts: one text, or any iterable of texts.
        context_length: L, the length of every row. All of OpenAI's models have 77.
        truncate: if true, a text that is too long is cut and its last token becomes the end token.

    Returns:
        (N, L) int32, one row per text. One text alone is one row.

    Raises:
        TextTooLongError: if a text is too long and ``truncate`` is false. It is a ValueError and a RuntimeError.
        TypeError: if ``texts`` is neither a string nor an iterable of strings.
        InputError: if ``context_length`` is not an integer from 2 to 262,144.
    """
    if not isinstance(context_length, int) or not 2 <= context_length <= _LONGEST_CONTEXT:
        raise InputError(
            f"context_length must be from 2 (a start and an end token) to {_LONGEST_CONTEXT}, got {context_length!r}"
        )
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or an iterable of str, got {type(texts).__name__}")
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
