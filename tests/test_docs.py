"""README and docs: every command and snippet is run or says why not, and every link leads somewhere.

How a fenced block is run:

- ``bash`` and ``python`` blocks of one page run in the order of the page, in one temporary folder. It holds sample
  images (``photos/``, ``photo.jpg``, ``CLIP.png``) and links to the repository's own folders. The Python blocks of a
  page share one namespace.
- A ``text`` block directly below such a block is its output and is compared: "…" stands for any text, and a number
  with a decimal point may differ by two units of its last digit.
- The demo model stands in for models that must be downloaded: "ViT-B/32" is read as "demo", and ``miniclip classify``
  and ``miniclip embed`` without ``--model`` use the demo model.
- ``pip`` does nothing: the packages are installed already, and .ci/run runs README's two commands as written.
- ``<!-- not run: reason -->`` above a block leaves it out. Any other block is an error.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, make_image
from test_package import ROOMS

import miniclip

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted(DOCS.glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

SECONDS = 300  # more than any block takes: one that takes longer is marked, or belongs to another test

# What stands before every shell block, so that it runs this checkout's miniclip with this Python.
PRELUDE = """
pip() { :; }
python() { "$PYTHON" "$@"; }
miniclip() {
    case "$*" in
        *--model*) python -m miniclip "$@" ;;
        classify*|embed*) python -m miniclip "$@" --model demo ;;
        *) python -m miniclip "$@" ;;
    esac
}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is the number of the line after the opening fence."""

    language: str
    text: str
    line: int
    reason: str | None  # why it is not run
    follows: bool  # nothing but blank lines and marker comments between it and the block before


def read_blocks(text: str) -> list[Block]:
    blocks: list[Block] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    last, distance = "", True  # the last line that is not blank, and whether there was one since the last block
    for number, line in lines:
        if match := re.fullmatch(r"```(\w*)", line):
            body = []
            for _, inner in lines:
                if inner == "```":
                    break
                body.append(inner)
            else:
                raise AssertionError(f"line {number}: the block is never closed")
            marker = re.fullmatch(r"<!-- not run: (.+) -->", last)
            blocks.append(Block(match[1], "\n".join(body), number + 1, marker and marker[1], not distance))
            last, distance = "", False
        elif line.strip() and not re.fullmatch(r"<!-- \w+: (begin|end) -->", line):  # what a script writes between
            last, distance = line.strip(), True
    return blocks


def check_blocks(blocks: list[Block]) -> list[str]:
    """What is wrong with the blocks of a page before any of them runs."""
    problems = []
    for before, block in pairwise([None, *blocks]):
        assert block is not None
        is_output = block.language == "text" and block.follows and before is not None and before.language != "text"
        if block.reason is None and block.language not in ("bash", "python") and not is_output:
            problems.append(
                f"line {block.line}: a block of {block.language or 'no language'} is neither run nor marked"
            )
        if block.reason is None and block.language == "bash":
            commands = [line for line in block.text.splitlines() if line.strip() and not line.startswith("#")]
            if all(line.startswith("pip ") and "&&" not in line for line in commands):
                problems.append(f"line {block.line}: pip alone is not run here: mark the block")
    return problems


def check_output(expected: str, output: str) -> None:
    """Compare what a page shows with what came out."""
    expected, output = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, output))
    number = r"-?\d+\.\d+"
    pattern = "".join(
        f"({number})" if re.fullmatch(number, part) else re.escape(part).replace("…", ".*")
        for part in re.split(f"({number})", expected)
    )
    match = re.fullmatch(pattern, output)
    assert match, f"the page shows\n{expected}\nand the output is\n{output}"
    for shown, found in zip(re.findall(number, expected), match.groups()):
        unit = 10.0 ** -len(shown.partition(".")[2])
        assert abs(float(shown) - float(found)) < 2.5 * unit, f"the page shows {shown}, the output is {found}"


def run_shell(text: str, folder: Path) -> str:
    """Run commands in bash, with a terminal for their output, which decides what ``miniclip`` prints."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "COLUMNS": "80"}
    environment |= {"HF_HUB_OFFLINE": "1", "npm_config_offline": "true"}
    terminal, end = pty.openpty()
    command = ["bash", "-euo", "pipefail", "-c", PRELUDE + text]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=end,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        os.close(end)
        timer = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        output = bytearray()
        with contextlib.suppress(OSError):  # EIO, once nobody writes to the terminal any more
            while data := os.read(terminal, 65536):
                output += data
        os.close(terminal)
        status = process.wait()
        timer.cancel()
        errors.seek(0)
        assert status == 0, f"{text}\nended with {status}:\n{errors.read()}"
    return output.decode().replace("\r\n", "\n")


def run_blocks(blocks: list[Block], folder: Path, name: str) -> None:
    """Run the blocks of a page in the current folder, and compare their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    output: str | None = None
    for block in blocks:
        if block.reason is not None:
            output = None
            continue
        if block.language == "text":
            assert output is not None, f"{name}: line {block.line}: this is the output of a block that is not run"
            check_output(block.text, output)
            continue
        text = block.text.replace("ViT-B/32", "demo")
        if block.language == "bash":
            output = run_shell(text, folder)
            continue
        code = compile("\n" * (block.line - 1) + text, name, "exec")  # so that a traceback has the page's line
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        output = printed.getvalue()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sample images and the repository's folders, as the current one."""
    for name in ("benchmarks", "examples", "training", "validation", "tests", "validate.py"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    for path in sorted((ROOT / "examples" / "images").glob("*.png")):
        shutil.copy(path, tmp_path / "photos")
    make_image(tmp_path / "photo.jpg", seed=1, size=(1600, 1200))
    make_image(tmp_path / "CLIP.png", seed=2, size=(400, 200))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_block_runs(name: str, workplace: Path) -> None:
    blocks = read_blocks((ROOT / name).read_text(encoding="utf-8"))
    assert check_blocks(blocks) == []
    run_blocks(blocks, workplace, name)


# -- links ------------------------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings have on GitHub and in the built site alike."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip()
        words = re.sub(r"[^\w\s-]", "", title.lower())
        if (github := re.sub(r"\s", "-", words)) == re.sub(r"[-\s]+", "-", words):
            found.add(github)
    return found


def check_links(text: str, folder: Path, inside: Path) -> list[str]:
    """The links of a page in ``folder`` that lead nowhere, or out of ``inside``."""
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", without_blocks(text))):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (folder / place).resolve() if place else None
        if target is not None and not target.exists():
            problems.append(f"{link}: there is no such file")
        elif target is not None and not target.is_relative_to(inside):
            problems.append(f"{link}: leaves {inside.name}, and the site has only that")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8") if target else text):
            problems.append(f"{link}: there is no such heading")
    return problems


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    inside = DOCS if page.parent == DOCS else ROOT
    assert check_links(page.read_text(encoding="utf-8"), page.parent, inside) == []


# -- what must be said ------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 10_000


def test_the_word_is_image() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("examples/pictures/", "")
        assert not re.search(r"\bpictures?\b", text, re.IGNORECASE), page.name


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: miniclip\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    errors = {name for name in miniclip.__all__ if name.endswith("Error")}  # one directive shows them all
    assert {*shown} - {"errors"} == {*miniclip.__all__} - errors - {"__version__"}


def test_every_directive_stands_below_a_sentence() -> None:
    lines = [line for line in (DOCS / "api.md").read_text(encoding="utf-8").splitlines() if line]
    for before, line in pairwise(lines):
        if line.startswith(":::"):
            assert re.match(r"[A-Z`\[].*\.$", before), f"{line} has no sentence above"


def test_every_error_is_explained() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    for name in miniclip.__all__:
        if name.endswith("Error"):
            assert f"`{name}`" in page, name


def test_the_design_page_has_every_room() -> None:
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `miniclip/(\w+)\.py` \|", page, re.MULTILINE)
    assert sorted(shown) == sorted(ROOMS)


def test_install_advice_works_before_the_package_is_published() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for extras in re.findall(r"(?:\.|miniclip)\[(\w+(?:,\w+)*)\]", line):
                assert {*extras.split(",")} <= project["optional-dependencies"].keys(), f"{page.name}: {line}"
            unpublished = re.search(r"pip install (-\S+ )*\"?miniclip(\[[^\]]*\])?(?! @)\"?( |`|$)", line)
            assert not unpublished, f"{page.name}: {line}"


# -- the checks themselves --------------------------------------------------------------------------------------------


def fences(*parts: str) -> str:
    """A page from parts: a language in front of a "|" makes a block, everything else is a line."""
    return "\n\n".join(re.sub(r"^(\w*)\|(.*)$", r"```\1\n\2\n```", part, flags=re.DOTALL) for part in parts)


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (fences("python|1 + 1"), None),
        (fences("bash|true", "text|output"), None),
        (fences("<!-- not run: needs a GPU -->", "bash|pip install x"), None),
        (fences("bash|pip install x && true"), None),
        (fences("bash|true", "Words between.", "text|output"), "line 8: a block of text is neither run nor marked"),
        (fences("json|{}"), "line 2: a block of json is neither run nor marked"),
        (fences("|anything"), "line 2: a block of no language is neither run nor marked"),
        (fences("<!-- not run: needs a GPU -->", "Words between.", "toml|x = 1"), "line 6: a block of toml"),
        (fences("bash|pip install x"), "line 2: pip alone is not run here"),
    ],
)
def test_a_block_that_is_neither_run_nor_marked_is_found(page: str, problem: str | None) -> None:
    problems = check_blocks(read_blocks(page))
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("page", "error"),
    [
        (fences("python|x = 1", "python|print(x + 1)", "text|2"), None),
        (fences("python|print(0.123456)", "text|0.12…"), None),
        (fences("python|print('ViT-B/32')", "text|demo"), None),
        (fences("bash|echo 'a  '; echo 0.51", "text|a\n0.50"), None),
        (fences("bash|echo x > made", "python|print(open('made').read())", "text|x"), None),
        (fences("<!-- not run: needs a cluster -->", "python|1 / 0"), None),
        (fences("python|print(2)", "text|3"), AssertionError),
        (fences("python|print(0.55)", "text|0.50"), AssertionError),
        (fences("python|1 / 0"), ZeroDivisionError),
        (fences("bash|false"), AssertionError),
        (fences("bash|false | true"), AssertionError),
        (fences("bash|echo nothing", "text|something"), AssertionError),
    ],
)
def test_a_block_that_fails_or_prints_something_else_is_found(
    page: str, error: type[Exception] | None, workplace: Path
) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext():
        run_blocks(read_blocks(page), workplace, "page")


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("other.md", None),
        ("other.md#two-words", None),
        ("#here", None),
        ("https://example.org/nothing", None),
        ("missing.md", "there is no such file"),
        ("other.md#missing", "there is no such heading"),
        ("#there", "there is no such heading"),
        ("other.md#a--b", "there is no such heading"),  # GitHub's anchor, and not the site's
        ("../outside.md", "leaves docs"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(link: str, problem: str | None, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "other.md").write_text("# Other\n\n## `two` words\n\n## a - b\n", encoding="utf-8")
    (tmp_path / "outside.md").write_text("# Outside\n", encoding="utf-8")
    problems = check_links(f"# Here\n\nA [link]({link}), and `[not](one.md)`.\n", docs, docs)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]
