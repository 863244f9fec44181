"""Running a script in the test's own process, which saves the seconds that a new process takes to import torch."""

from __future__ import annotations

import sys
from types import ModuleType

import common
import pytest


def run_here(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> None:
    """Run the script's main as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    common.main(script.main)


def refusal(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> str:
    """The one sentence with which the script stops."""
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, script, *arguments)
    sentence = str(stopped.value.code)
    assert sentence.startswith(f"{script.__name__}.py: ")
    assert "\n" not in sentence
    return sentence
