"""Texts of unknown origin, such as the names of files, in lines for a terminal or a pipe.

A name may hold line ends, the control sequences of terminals, marks that turn the direction of writing, and bytes that
are not valid text. Printed unchanged, these would end the line early, or change what the terminal shows.
"""

from __future__ import annotations

import re
import unicodedata

# Control characters, separators of lines and paragraphs, marks of direction, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\e"}


def escaped(text: str) -> str:
    """A message in one line: each character that cannot be printed becomes an escape such as ``\\n``."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def printable(name: str) -> str:
    """A name in one line, and different names as different texts.

    A name without such characters stays unchanged. Another one gets the form ``$'two\\nlines'``, which bash reads as
    the name. So does a name that begins with ``$'``.
    """
    if not name.startswith("$'") and not _UNPRINTABLE.search(name):
        return name
    return "$'" + escaped(name.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not valid text
        code -= 0xDC00
    elif code > 0x7F:
        return f"\\u{code:04x}"
    return _SHORT.get(character, f"\\x{code:02x}")


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: East Asian letters and emoji take two, accents none."""
    return sum(
        0 if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf")
        else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )  # fmt: skip
