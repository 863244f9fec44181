"""The parsers of the command line: argparse, with a hint, and with options between positional arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that tells what to do with a text that begins with "-"."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -") or message.endswith("expected one argument"):
            message += ' (put "--" before texts that begin with "-", and write --not=TEXT)'
        super().error(message)


class CommandParser(Parser):
    """The parser of one command. Options may stand between its positional arguments: DIR -k 3 TEXT."""

    _intermixed = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if self._intermixed:  # the call below calls this method
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False
