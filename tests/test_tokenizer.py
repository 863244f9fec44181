"""The tokenizer compared with OpenAI's (pinned ids) and Hugging Face's, and at its limits."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

import miniclip.tokenizer
from miniclip import InputError, MiniclipError, TextTooLongError, Tokenizer, tokenize
from validation.reference import reference_tokenizer

# Written by data/make_tokenizer_goldens.py with the tokenizer of the openai-clip package.
GOLDENS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "tokenizer_goldens.json.gz").read_bytes()))
CASES: list[tuple[str, str, list[int]]] = [(name, text, ids) for name, text, ids in GOLDENS["cases"]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def huggingface() -> Callable[[str], list[int]]:
    reference: CLIPTokenizer = reference_tokenizer()
    return lambda text: list(reference(text, add_special_tokens=False).input_ids)


def failures(tokenizer: Tokenizer, cases: list[tuple[str, str, list[int]]] = CASES) -> list[tuple[str, str]]:
    return [(name, text) for name, text, ids in cases if tokenizer.encode(text) != ids]


# -- the ids --------------------------------------------------------------------------------------------------------


def test_ids_equal_all_goldens(tokenizer: Tokenizer) -> None:
    assert len({text for _, text, _ in CASES}) == len(CASES) > 3000
    assert failures(tokenizer) == []


@pytest.mark.parametrize(
    "trap",
    [
        "empty", "white space only", "curly apostrophe", "curly quote", "HTML entity", "HTML entity escaped twice",
        "ligature", "full-width", "byte order mark", "C0 control", "C1 control", "mojibake", "Greek final sigma",
        "special token, typed", "special token, upper case", "long s", "accents", "NFC", "NFD", "line ends", "tab",
        "no-break and other spaces", "separators \\x1c-\\x1f", "URL", "digits", "punctuation runs", "emoji",
        "emoji joined", "lone surrogate", "300 letters", "arabic", "hebrew", "hindi", "thai", "chinese", "korean",
    ],
)  # fmt: skip
def test_goldens_contain_every_trap(trap: str) -> None:
    assert trap in {name for name, _, _ in CASES}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello World!", [3306, 1002, 256]),
        ("a café", [320, 15304]),
        ("", []),
        ("<|startoftext|>a<|endoftext|>", [49406, 320, 49407]),
        ("\ud83d\ude00", [7334]),  # a pair of surrogates is read as its character, here 😀
    ],
)
def test_published_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_merge_table_is_openais() -> None:
    table = gzip.decompress((files("miniclip") / "data" / "merges.txt.gz").read_bytes())
    assert table.count(b"\n") == GOLDENS["merges"]["count"] == 48_894
    assert hashlib.sha256(table).hexdigest() == GOLDENS["merges"]["sha256"]


def test_merges_create_only_pairs_that_merge_later(tokenizer: Tokenizer) -> None:
    """Every merged token is newer than its two parts. So a merge creates only pairs that merge later than itself."""
    assert tokenizer.vocab_size == len(set(tokenizer._tokens)) == 49_408
    assert sorted(tokenizer._merges.values()) == list(range(512, 49_406))
    assert all(max(pair) < product for pair, product in tokenizer._merges.items())
    for (left, right), product in tokenizer._merges.items():
        assert tokenizer._tokens[product] == tokenizer._tokens[left] + tokenizer._tokens[right]


# -- planted mistakes ---------------------------------------------------------------------------------


def test_swapped_merges_are_caught() -> None:
    wrong = Tokenizer()
    pair = next(pair for pair, product in wrong._merges.items() if product == wrong.encode("cat")[0])
    other = next(pair for pair, product in wrong._merges.items() if product == 30_000)
    wrong._merges = wrong._merges | {pair: wrong._merges[other], other: wrong._merges[pair]}
    wrong._cache.clear()
    assert failures(wrong)


def test_rightmost_first_is_caught(tokenizer: Tokenizer) -> None:
    assert failures(_merging(lambda word: _by_definition(tokenizer, word))) == []
    wrong = failures(_merging(lambda word: _by_definition(tokenizer, word, leftmost=False)))
    assert ("repeated letters", "aaaa") in wrong


def _clean(text: str, repair: Callable[[str], str] = ftfy.fix_text, unescape: int = 2) -> str:
    """OpenAI's cleaning without miniclip's shortcut for ASCII, and without stripping white space."""
    text = repair(text)
    for _ in range(unescape):
        text = html.unescape(text)
    return text.lower()


WRONG_CLEANING: dict[str, tuple[Callable[[str], str], str]] = {
    "no ftfy": (lambda text: _clean(text, repair=str), "mojibake"),
    "no unescape": (lambda text: _clean(text, unescape=0), "HTML entity"),
    "unescape once": (lambda text: _clean(text, unescape=1), "entities beside a tag"),
    "unescape before ftfy": (lambda text: ftfy.fix_text(_clean(text, repair=str)).lower(), "entities beside a tag"),
    "casefold": (lambda text: _clean(text.casefold()), "sharp s"),
    "as Hugging Face": (lambda text: unicodedata.normalize("NFC", text).lower(), "curly apostrophe"),
}


def test_cleaning_written_out_gives_the_goldens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniclip.tokenizer, "_clean", _clean)
    assert failures(tokenizer) == []


@pytest.mark.parametrize("mistake", WRONG_CLEANING)
def test_wrong_cleaning_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, trap = WRONG_CLEANING[mistake]
    monkeypatch.setattr(miniclip.tokenizer, "_clean", clean)
    cases = [case for case in CASES if "surrogate" not in case[0]]  # without ftfy, a surrogate cannot be encoded
    assert trap in {name for name, _ in failures(Tokenizer(), cases)}


def test_shortcut_for_ascii_changes_nothing() -> None:
    source = random.Random(0)
    for size in range(2000):
        text = "".join(chr(source.randrange(32, 127)) for _ in range(size % 60))
        assert miniclip.tokenizer._clean(text) == _clean(text), text


def test_case_sensitive_words_are_caught(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = miniclip.tokenizer._WORD.pattern
    monkeypatch.setattr(miniclip.tokenizer, "_WORD", miniclip.tokenizer.regex.compile(pattern))
    assert {name for name, _ in failures(Tokenizer())} == {"long s", "special token, long s"}


def _merging(encode_word: Callable[[str], list[int]]) -> Tokenizer:
    tokenizer = Tokenizer()
    tokenizer._encode_word = encode_word  # type: ignore[method-assign]
    return tokenizer


def _by_definition(tokenizer: Tokenizer, word: str, leftmost: bool = True) -> list[int]:
    """Byte-pair encoding by its definition, slowly: every pair is looked at before each merge."""
    if word in tokenizer._special:
        return tokenizer._special[word]
    ids = [tokenizer._byte_ids[byte] for byte in word.encode()]
    ids[-1] += 256
    while True:
        places = range(len(ids) - 1) if leftmost else reversed(range(len(ids) - 1))
        merges = [(tokenizer._merges[pair], i) for i in places if (pair := (ids[i], ids[i + 1])) in tokenizer._merges]
        if not merges:
            return ids
        product, i = min(merges, key=lambda merge: merge[0])  # min returns the first of equal elements
        ids[i : i + 2] = [product]


# -- Hugging Face's tokenizer as a second oracle ---------------------------------------------------------------


def test_ids_equal_huggingfaces_where_cleaning_changes_nothing(huggingface: Callable[[str], list[int]]) -> None:
    """Equal ids for all texts that ftfy and unescape leave alone, except for three quirks of upper and lower case."""
    compared, scripts = 0, set()
    for name, text, ids in CASES:
        untouched = html.unescape(html.unescape(ftfy.fix_text(text))) == unicodedata.normalize("NFC", text)
        quirk = "Σ" in text or "ſ" in text or (text != text.lower() and "oftext|>" in text.lower())
        if untouched and not quirk:
            assert huggingface(text) == ids, ascii(text)
            compared += 1
            scripts.add(name)
    assert compared > 2000
    assert {"accents", "NFD", "chinese", "arabic", "hindi", "emoji", "emoji joined", "URL", "empty"} <= scripts


# (text, how OpenAI reads the text). miniclip follows OpenAI in all cases: the weights were trained on its ids.
DIFFERENCES = {
    "curly apostrophe": ("don’t", "don't"),
    "curly quotes": ("a “photo”", 'a "photo"'),
    "HTML entity": ("cats &amp; dogs", "cats & dogs"),
    "HTML entity escaped twice": ("cats &amp;amp; dogs", "cats & dogs"),
    "ligature": ("ﬁsh", "fish"),
    "full-width": ("ＣＡＴ", "cat"),
    "byte order mark": ("\ufeffa cat", "a cat"),
    "C0 control": ("a c\x07at", "a cat"),
    "C1 control": ("5\x80", "5€"),
    "terminal escape": ("\x1b[31mred\x1b[0m", "red"),
    "mojibake": ("cafÃ©", "café"),
    "special token, upper case": ("<|ENDOFTEXT|>", "<|endoftext|>"),
    "Greek final sigma": ("ΟΔΟΣ", "οδος"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_known_differences_from_huggingface(
    difference: str, tokenizer: Tokenizer, huggingface: Callable[[str], list[int]]
) -> None:
    text, read_as = DIFFERENCES[difference]
    assert tokenizer.encode(text) == tokenizer.encode(read_as) == huggingface(read_as)
    assert huggingface(text) != huggingface(read_as)


def test_long_s_is_read_as_s(tokenizer: Tokenizer, huggingface: Callable[[str], list[int]]) -> None:
    """Unicode has ſ as a lower case of S. OpenAI's pattern ignores case, so it takes 'ſ for the 's of "it's"."""
    assert tokenizer.encode("'ſ") == [6, 129, 379]  # one word: the apostrophe does not end a word
    assert huggingface("'ſ") == [262, 129, 379]


# -- decode --------------------------------------------------------------------------------------------------------


def test_decode_returns_the_words(tokenizer: Tokenizer) -> None:
    for text in ("a photo of a cat", "café crème", "猫 と 犬", "год", "👩\u200d🚀 !"):
        assert tokenizer.decode(tokenizer.encode(text)) == text + " "
    assert tokenizer.decode(tokenizer.encode("It's 42!")) == "it 's 4 2 ! "


def test_decode_loses_only_white_space(tokenizer: Tokenizer) -> None:
    for _, text, ids in CASES:
        assert "".join(tokenizer.decode(ids).split()) == "".join(_clean(text).split()), ascii(text)


def test_decode_spells_out_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([49406, 320, 2368, 49407]) == "<|startoftext|>a cat <|endoftext|>"
    assert tokenizer.decode([]) == ""


def test_decode_takes_any_integers(tokenizer: Tokenizer) -> None:
    row = tokenize("a cat", context_length=5)[0]
    assert row.tolist() == [49406, 320, 2368, 49407, 0]
    expected = "<|startoftext|>a cat <|endoftext|>!"
    assert tokenizer.decode(row) == tokenizer.decode(row.numpy()) == tokenizer.decode(iter(row.tolist())) == expected


def test_decode_replaces_half_a_character(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("𠮷")
    assert tokenizer.decode([first]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 49408, 10**9])
def test_decode_refuses_unknown_ids(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(InputError, match=rf"token id {bad} is outside the vocabulary of 49408"):
        tokenizer.decode([320, bad])


# -- tokenize -------------------------------------------------------------------------------------------------------


def test_rows_are_padded_with_zeros() -> None:
    tokens = tokenize(["Hello World!", ""])
    assert tokens.dtype == torch.int32
    assert tokens.shape == (2, 77)
    assert tokens[0].tolist() == [49406, 3306, 1002, 256, 49407] + [0] * 72
    assert tokens[1].tolist() == [49406, 49407] + [0] * 75


@pytest.mark.parametrize(
    "texts",
    [
        ["a cat", "a dog"],
        ("a cat", "a dog"),
        (f"a {animal}" for animal in ("cat", "dog")),
        np.array(["a cat", "a dog"]),
        np.array(["a cat", "a dog"], dtype=object),
        {"a cat": 0, "a dog": 1},
        iter(["a cat", "a dog"]),
    ],
    ids=["list", "tuple", "generator", "numpy", "objects", "keys", "iterator"],
)
def test_any_iterable_of_texts_is_tokenized(texts: Any) -> None:
    assert tokenize(texts)[:, :4].tolist() == [[49406, 320, 2368, 49407], [49406, 320, 1929, 49407]]


def test_one_text_is_one_row() -> None:
    assert torch.equal(tokenize("a cat"), tokenize(["a cat"]))
    assert torch.equal(tokenize(np.str_("a cat")), tokenize(["a cat"]))


@pytest.mark.parametrize("nothing", [[], (), iter([]), np.array([], dtype=str)])
def test_empty_list_gives_no_rows(nothing: Any) -> None:
    tokens = tokenize(nothing)
    assert tokens.shape == (0, 77)
    assert tokens.dtype == torch.int32


@pytest.mark.parametrize("bad", [7, None, b"a cat", ["a", "cat"], 1.5])
def test_error_names_an_element_that_is_not_a_text(bad: object) -> None:
    with pytest.raises(TypeError, match=rf"text 2 must be a str, got {type(bad).__name__}"):
        tokenize(["a", "b", bad])  # type: ignore[list-item]


@pytest.mark.parametrize("bad", [7, None, b"a cat", torch.zeros(1, 77)])
def test_argument_that_is_not_a_list_of_texts_is_a_type_error(bad: Any) -> None:
    with pytest.raises(TypeError):
        tokenize(bad)


def test_error_for_a_long_text_names_the_text_and_both_lengths() -> None:
    with pytest.raises(TextTooLongError) as caught:
        tokenize(["a cat", "a dog", "word " * 89])
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)  # what openai/CLIP raises
    assert isinstance(caught.value, MiniclipError)
    message = str(caught.value)
    assert message.startswith("text 2 ('word word ")
    assert "has 91 tokens, the context holds 77; pass truncate=True" in message
    assert len(message) < 150
    assert len(message.splitlines()) == 1


def test_truncating_keeps_the_end_token() -> None:
    tokens = tokenize(["word " * 89, "a cat"], truncate=True)
    word = tokens[0, 1].item()
    assert tokens[0].tolist() == [49406] + [word] * 75 + [49407]
    assert torch.equal(tokens[1:], tokenize("a cat"))


def test_text_may_fill_the_context_exactly() -> None:
    full = tokenize("word " * 75)
    assert full[0, [0, -1]].tolist() == [49406, 49407]
    assert (full != 0).all()
    assert torch.equal(full, tokenize("word " * 75, truncate=True))
    with pytest.raises(TextTooLongError, match="has 78 tokens, the context holds 77"):
        tokenize("word " * 76)


def test_context_length_sets_the_row_length() -> None:
    assert tokenize("a cat", context_length=4).tolist() == [[49406, 320, 2368, 49407]]
    assert tokenize("a cat", context_length=3, truncate=True).tolist() == [[49406, 320, 49407]]
    assert tokenize("a cat", context_length=2, truncate=True).tolist() == [[49406, 49407]]
    assert tokenize("a cat", context_length=1000).shape == (1, 1000)
    with pytest.raises(TextTooLongError, match="has 4 tokens, the context holds 2"):
        tokenize("a cat", context_length=2)


@pytest.mark.parametrize("length", [1, 0, -5])
def test_context_without_room_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=rf"from 2 \(a start and an end token\) to 262144, got {length}"):
        tokenize("a cat", context_length=length)


def test_typed_special_tokens_count_as_tokens() -> None:
    assert tokenize("<|endoftext|> cat", context_length=6).tolist() == [[49406, 49407, 2368, 49407, 0, 0]]


# -- long words -----------------------------------------------------------------------------------------------------


class Counting(dict[Any, Any]):
    """A dict that counts its look-ups."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return super().__contains__(key)

    def __getitem__(self, key: object) -> Any:
        self.asked += 1
        return super().__getitem__(key)

    def get(self, key: object, default: Any = None) -> Any:
        self.asked += 1
        return super().get(key, default)


LETTERS: dict[str, Callable[[random.Random], str]] = {
    "one letter": lambda _: "a",
    "two letters": lambda source: source.choice("ab"),
    "frequent letters": lambda source: source.choice("etaoinshrdlu"),
    "signs": lambda source: source.choice("!?.-="),
    "Chinese": lambda _: "日",
}


@pytest.mark.parametrize("kind", LETTERS)
def test_work_on_a_long_word_is_linear(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's own loop is quadratic. The steps are counted, not timed: a merge pushes at most two new pairs."""
    pops = 0

    def counted(heap: list[int], pop: Callable[[list[int]], int] = miniclip.tokenizer.heappop) -> int:
        nonlocal pops
        pops += 1
        return pop(heap)

    monkeypatch.setattr(miniclip.tokenizer, "heappop", counted)
    tokenizer, source = Tokenizer(), random.Random(0)
    tokenizer._merges = merges = Counting(tokenizer._merges)
    length = 200_000 if kind in ("one letter", "frequent letters") else 50_000
    word = "".join(LETTERS[kind](source) for _ in range(length))
    ids = tokenizer.encode(word)
    size = len(word.encode())
    assert pops <= 3 * size
    assert merges.asked <= 9 * size
    assert tokenizer.decode(ids) == word + " "


@pytest.mark.parametrize("kind", LETTERS)
def test_long_words_equal_the_definition(kind: str, tokenizer: Tokenizer) -> None:
    source = random.Random(1)
    for length in (1, 2, 3, 40, 41, 300):
        word = "".join(LETTERS[kind](source) for _ in range(length))
        assert tokenizer.encode(word) == _by_definition(tokenizer, word)


# -- the cache and threads ------------------------------------------------------------------------------------------


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniclip.tokenizer, "_CACHE_WORDS", 50)
    tokenizer, largest = Tokenizer(), 0
    for _, text, ids in CASES[:1500]:
        assert tokenizer.encode(text) == ids
        largest = max(largest, len(tokenizer._cache))
    assert largest == 50


def test_only_short_words_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer()
    tokenizer.encode("cat " + "a" * 40 + " " + "b" * 41)
    assert set(tokenizer._cache) == {"cat", "a" * 40}
    ids = tokenizer.encode("cat cat")
    monkeypatch.setattr(tokenizer, "_encode_word", None)  # cached words do not need it
    assert tokenizer.encode("cat cat") == ids
    ids.append(0)  # the caller's own list
    assert tokenizer.encode("cat cat") == ids[:-1]


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_switches")
def test_threads_share_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniclip.tokenizer, "_CACHE_WORDS", 20)  # the cache is emptied again and again
    tokenizer, cases = Tokenizer(), CASES[::8]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda i: failures(tokenizer, cases[i:] + cases[:i]), range(8))] == [[]] * 8
        rows = [*pool.map(lambda _: tokenize(["a cat", "don’t"]), range(8))]
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert len(tokenizer._cache) < 20 + 8


def test_errors_name_what_was_given() -> None:
    with pytest.raises(TypeError, match="texts must be a str or an iterable of str, got NoneType"):
        tokenize(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got bytes"):
        tokenize(b"a cat")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        Tokenizer().encode(b"a cat")  # type: ignore[arg-type]
    for length in ("77", 77.0, 10**13):
        with pytest.raises(InputError, match="context_length must be"):
            tokenize("a cat", context_length=length)  # type: ignore[arg-type]
    for ids in (tokenize(["a cat", "a dog"]), "x", [1.5]):
        with pytest.raises(InputError, match="decode takes the ids of one text"):
            Tokenizer().decode(ids)  # type: ignore[arg-type]
    assert Tokenizer().decode(tokenize("a cat", context_length=4)[0]) == "<|startoftext|>a cat <|endoftext|>"
