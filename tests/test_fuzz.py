"""The programs in fuzz/ run, in their smallest form. Their real runs take minutes to hours."""

from __future__ import annotations

import pytest
from helpers import run_script


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes() -> None:
    done = run_script("fuzz/kills.py", "--files", 30, "--kills", 2)
    assert done.returncode == 0, done.stderr
    assert "30 files" in done.stdout
    assert done.stdout.endswith("the same bytes each time\n")


@pytest.mark.slow
def test_searches_at_once_end_well() -> None:
    done = run_script("fuzz/exits.py", "--runs", 6, "--at-once", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6 searches, 3 at once: the same answer and status 0 each time\n"
