"""The package as a whole: its architecture, its prose, the cost of importing it, and code written for openai/CLIP."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.resources import files
from pathlib import Path

import pytest
from helpers import ROOT, make_image, run_python, run_script
from PIL import Image

import miniclip

# -- the architecture and the prose -----------------------------------------------------------------------------------

# Each room and the rooms it may import: down only.
ROOMS = {
    "errors": set(),
    "version": set(),
    "parsers": set(),
    "config": {"errors"},
    "packed": set(),
    "layers": {"packed"},
    "prefixes": {"layers"},
    "loss": {"errors"},
    "clip": {"hub", "loading", "tokenizer"},
    "simple_tokenizer": {"tokenizer"},
    "model": {"config", "errors", "layers", "packed", "prefixes"},
    "tokenizer": {"errors"},
    "images": {"errors", "terminal"},
    "resize": set(),
    "transforms": {"errors"},
    "preprocess": {"errors", "images", "resize", "transforms"},
    "shapes": {"config", "errors"},
    "huggingface": {"config", "errors", "images", "preprocess", "shapes", "tokenizer"},
    "open_clip": {"config", "errors", "preprocess"},
    "checkpoint": {"config", "errors", "files", "huggingface", "open_clip", "shapes"},
    "hub": {"checkpoint", "config", "errors"},
    "loading": {"checkpoint", "config", "errors", "hub", "huggingface", "model", "open_clip", "preprocess"},
    "saving": {"errors", "files", "huggingface", "model", "preprocess"},
    "zero_shot": {"errors", "model", "preprocess", "tokenizer"},
    "demo_tour": {"hub", "images", "model", "preprocess", "tokenizer", "zero_shot"},
    "files": set(),
    "folders": set(),
    "terminal": set(),
    "sources": {"errors", "folders"},
    "parquet": {"errors"},
    "shard_files": {"errors", "files", "parquet", "sources", "terminal"},
    "dead_rows": {"errors", "parquet", "shard_files", "terminal"},
    "manifest": {"errors", "files", "hub", "huggingface", "loading", "model", "preprocess", "version"},
    "store": {"dead_rows", "errors", "manifest", "parquet", "shard_files", "sources"},
    "planning": {"dead_rows", "errors", "manifest", "shard_files", "sources", "store"},
    "embed": {
        *("errors", "folders", "images", "loading", "manifest", "model", "planning", "preprocess", "shard_files"),
        *("sources", "store"),
    },
    "inverted_file": {"errors"},
    "vector_table": {"errors", "shard_files"},
    "search": {
        *(
            "dead_rows",
            "errors",
            "inverted_file",
            "loading",
            "manifest",
            "model",
            "preprocess",
            "shard_files",
            "sources",
            "store",
        ),
        *("tokenizer", "vector_table"),
    },
    "inverted_build": {
        *("errors", "files", "inverted_file", "search", "shard_files", "store", "tokenizer"),
    },
    "html_page": {"errors", "images", "search"},
    "check": {"errors", "inverted_file", "search", "store"},
    "live_index": {"dead_rows", "errors", "inverted_file", "manifest", "search"},
    "gallery": {"errors", "html_page", "images", "live_index", "search", "sources", "zero_shot"},
    "web_app": {"errors", "gallery", "html_page", "images", "live_index"},
    "serve": {"errors", "gallery", "web_app"},
    "embed_command": {"embed", "errors", "folders", "hub", "terminal"},
    "classify_command": {"errors", "folders", "sources", "terminal", "zero_shot"},
    "folder_commands": {"check", "inverted_build", "planning", "store", "terminal"},
    "cli": {
        *("checkpoint", "classify_command", "config", "demo_tour", "embed", "embed_command", "errors", "files"),
        *("folder_commands", "html_page", "hub", "images", "loading", "parsers", "search", "serve", "store"),
        *("terminal", "version", "zero_shot"),
    },
    "__main__": {"cli"},
}

MAX_FUNCTION_LINES = 60  # without the docstring, which is a page of the API reference
MAX_ROOM_LINES = 450

# "room.function" -> why it may be longer.
LONG_FUNCTIONS: dict[str, str] = {}

# Turns of phrase that hide the subject or the noun, and words that this package does not use.
UNWANTED = {
    "write subject, verb, object": r"\bbe there (none|no)\b|\bof what (has|had)\b|\bthan is there\b",
    "write 'is not a'": r"(?<!there )\b(is|was) no (?!longer\b|more\b|less\b|reason\b|need\b)[a-z]+\b",
    "name what is not there": r"\bthat (is|are) none\b",
    "write 'unchanged', or nothing": r"\bas (it is|they are)(?=[.,;:)]|$)",
    "write 'available', 'downloaded' or 'exists'": r"\b(can|cannot|to) be had\b",
    "write 'free' or 'release'": r"\blets? go of\b",
    "write 'reported'": r"\b(is|are) told (in|of|by)\b",
    "write 'second to last'": r"\blast but one\b",
    "write 'image'": r"\bpictures?\b",
    'write: pip install -c constraints.txt -e ".[extra]"': r"pip install [\"']?miniclip\b",  # it is not published
}


def source(room: str) -> str:
    return (ROOT / "miniclip" / f"{room}.py").read_text(encoding="utf-8")


def imports(text: str) -> set[str]:
    """The rooms that a room imports, inside functions and under TYPE_CHECKING too; the package itself is "miniclip"."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(filter(None, ["miniclip" if node.level else "", node.module]))
            names = [f"miniclip.{alias.name}" for alias in node.names] if package == "miniclip" else [package]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"miniclip\.\w+", str(node.value)):
            names = [node.value]  # importlib.import_module("miniclip.room"), sys.modules["miniclip.room"]
        parts = [name.split(".") for name in names]
        found |= {part[1] if len(part) > 1 else part[0] for part in parts if part[0] == "miniclip"}
    return found


def aliases_of_any(text: str) -> list[str]:
    """Module-level names for Any, such as those for a class that a room cannot import without a circle."""
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return [ast.unparse(node) for node in assignments if node.value and ast.unparse(node.value).endswith("Any")]


def function_lines(text: str) -> dict[str, int]:
    """The number of lines of every function without its docstring; the longest, if several bear one name."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            found[node.name] = max(found.get(node.name, 0), node.end_lineno - node.lineno + 1 - docstring)
    return found


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string, docstrings included, and of every block of comments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comments = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    block: list[str] = []
    for i, comment in enumerate(comments):
        block.append(comment.string.lstrip("#: "))
        following = comments[i + 1].start if i + 1 < len(comments) else None
        if following != (comment.start[0] + 1, comment.start[1]):  # the block ends here
            yield comment.start[0] - len(block) + 1, "\n".join(block)
            block = []


def unwanted(text: str) -> list[tuple[int, str, str]]:
    """(line where the text begins, words, advice) for every unwanted turn of phrase."""
    return [
        (line, match[0], advice)
        for line, words in prose(text)
        for advice, pattern in UNWANTED.items()
        for match in re.finditer(pattern, " ".join(words.split()), re.IGNORECASE)
    ]


def test_every_module_is_a_room() -> None:
    folder = ROOT / "miniclip"
    found = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py")} - {"__init__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_the_rooms_below(room: str) -> None:
    assert imports(source(room)) <= ROOMS[room]
    assert ROOMS[room] <= set(ROOMS)


def test_rooms_form_no_circle() -> None:
    assert set(TopologicalSorter(ROOMS).static_order()) == set(ROOMS)  # a CycleError names the circle


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_short_typed_and_plainly_written(room: str) -> None:
    text = source(room)
    assert aliases_of_any(text) == []
    assert len(text.splitlines()) <= MAX_ROOM_LINES
    long = {f"{room}.{name}": lines for name, lines in function_lines(text).items() if lines > MAX_FUNCTION_LINES}
    assert long.keys() == {name for name in LONG_FUNCTIONS if name.startswith(f"{room}.")}
    assert unwanted(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if TYPE_CHECKING:\n    from miniclip.model import CLIP", {"model"}),
        ("def f():\n    import miniclip.model", {"model"}),
        ("from miniclip import hub, model as m", {"hub", "model"}),
        ("from .model import CLIP\nfrom . import hub", {"hub", "model"}),
        ("importlib.import_module('miniclip.model')", {"model"}),
        ("import miniclip", {"miniclip"}),
        ("from miniclip import __version__", {"__version__"}),
        ("import torch\nfrom miniclip_tools import model", set()),
    ],
)
def test_guard_sees_every_spelling_of_an_import(text: str, expected: set[str]) -> None:
    assert imports(text) == expected


def test_guard_sees_aliases_and_long_functions() -> None:
    assert aliases_of_any("CLIP: TypeAlias = Any") == ["CLIP: TypeAlias = Any"]
    assert aliases_of_any("CLIP = typing.Any") == ["CLIP = typing.Any"]
    assert aliases_of_any("Sizes = tuple[int, int]") == []
    text = 'def f():\n    """One.\n\n    Two."""\n' + "    x = 1\n" * 60
    assert function_lines(text) == {"f": 61}


@pytest.mark.parametrize(
    "text",
    [
        "# A shard is there when its failures are, be\n# there none.",
        'def f():\n    """Slices of what\n    has changed."""',
        "x = f'{path} is no pickle'",
        "x = 1  # It is read as it is.",
        "# The last but one.\n\n# A line of its own.",
        "x = 'pip install \"miniclip[embed]\"'",
        "# one picture",
    ],
)
def test_guard_sees_unwanted_prose(text: str) -> None:
    assert len(unwanted(text)) == 1
    assert unwanted("# There is no device, it is no longer there; read it as it is written.\n# A photo.") == []


# -- what importing the package costs, and its metadata ---------------------------------------------------------------


@pytest.mark.slow
def test_importing_opens_no_data_file_and_imports_no_client() -> None:
    code = (
        "import builtins, io, sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import miniclip\n"
        "assert not [p for p in opened if 'miniclip' in p and 'data' in p.split('miniclip')[-1]], opened\n"
        "unwanted = 'transformers huggingface_hub httpx requests torchvision matplotlib ftfy pyarrow filelock faiss'\n"
        "for name in unwanted.split():\n"
        "    assert name not in sys.modules, name\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_documented() -> None:
    for name in miniclip.__all__:
        assert getattr(miniclip, name).__doc__, name
    assert files("miniclip").joinpath("py.typed").is_file()


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == miniclip.__version__
    assert f"## {miniclip.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=~ ]", wish)[0].lower().replace("_", "-") for wish in wanted} - {"miniclip"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line and line[0] != "#"}
    assert names <= pinned, names - pinned


# -- code written for openai/CLIP --------------------------------------------------------------------------------------

OPENAI_PROGRAM = """
import {module}
import torch
from PIL import Image

device = "cpu"
assert "ViT-B/32" in clip.available_models()
model, preprocess = clip.load({name!r}, device=device, jit=False)
model.eval()
image = preprocess(Image.open({photo!r})).unsqueeze(0).to(device)
text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
assert text.shape == (3, model.context_length) and model.vocab_size == 49408
assert image.shape[-1] == model.visual.input_resolution
with torch.no_grad():
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    logits_per_image, logits_per_text = model(image, text)
    probs = logits_per_image.softmax(dim=-1).cpu().numpy()
image_features /= image_features.norm(dim=-1, keepdim=True)
text_features /= text_features.norm(dim=-1, keepdim=True)
similarity = (model.logit_scale.exp() * image_features @ text_features.T).softmax(dim=-1)
assert abs(similarity.numpy() - probs).max() < 1e-6
values, indices = similarity[0].topk(2)
try:
    clip.tokenize("word " * 100)
except RuntimeError:
    pass
else:
    raise AssertionError
assert clip.tokenize("word " * 100, truncate=True)[0, -1] == 49407
try:
    clip.load("no such model")
except RuntimeError:
    pass
else:
    raise AssertionError
print(probs.tolist())
"""


@pytest.mark.slow
def test_program_for_openai_clip_runs_with_its_import_changed(tiny: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    make_image(photo, size=(300, 200))
    done = run_python("-c", OPENAI_PROGRAM.format(module="miniclip as clip", name=str(tiny), photo=str(photo)))
    assert done.returncode == 0, done.stderr
    assert len(ast.literal_eval(done.stdout)[0]) == 3


# -- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["zero_shot.py", "{photo}", "--labels", "a cat", "a dog", "--model", "{tiny}"],
        ["similarity.py", "--model", "{tiny}", "--out", "{out}"],
        ["similarity.py", "{folder}", "--model", "{tiny}", "--out", "{out}"],
    ],
)
def test_examples_run(tiny: Path, tmp_path: Path, arguments: list[str]) -> None:
    photo = tmp_path / "photo.png"
    make_image(photo)
    (tmp_path / "captions.csv").write_text("image,caption\nphoto.png,a gradient\nphoto.png,a cat\n", encoding="utf-8")
    places = {"photo": str(photo), "tiny": str(tiny), "out": str(tmp_path / "out.png"), "folder": str(tmp_path)}
    script, *rest = arguments
    done = run_script(f"examples/{script}", *(argument.format(**places) for argument in rest))
    assert done.returncode == 0, done.stderr
    if "--out" in arguments:
        with Image.open(places["out"]) as drawn:
            assert drawn.width > 300
            assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 50
    else:
        assert "%" in done.stdout


@pytest.mark.slow
def test_examples_report_an_error_in_one_sentence(tiny: Path, tmp_path: Path) -> None:
    cases = {
        ("zero_shot.py", "nowhere.png", "--labels", "x", "--model", str(tiny)): "nowhere.png: no such file",
        ("zero_shot.py", "--model", "nothing"): "'nothing' is neither an existing path",
        ("similarity.py", str(tmp_path), "--model", str(tiny)): "has no captions.csv",
        ("similarity.py", str(tmp_path / "short"), "--model", str(tiny)): "no caption in line 3",
        ("similarity.py", "--out", str(tmp_path / "nowhere" / "x.png"), "--model", str(tiny)): "there is no folder",
    }
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "captions.csv").write_text("image,caption\na.png,a cat\nb.png\n", encoding="utf-8")
    for (script, *arguments), message in cases.items():
        done = run_script(f"examples/{script}", *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [
        ("examples/zero_shot.py", "miniclip", "examples"),
        ("examples/similarity.py", "matplotlib", "examples"),
        ("examples/attention.py", "matplotlib", "examples"),
        ("examples/retrieval.py", "tqdm", "examples"),
        ("examples/linear_probe.py", "sklearn", "examples"),
        ("training/train.py", "tqdm", "examples"),
        ("training/train.py", "matplotlib", "examples"),
        ("examples/evaluate.py", "tqdm", "examples"),
        ("examples/near_duplicates.py", "tqdm", "examples"),
        ("examples/embed_ray.py", "ray", "ray"),
    ],
)
def test_error_names_a_missing_package_and_its_extra(script: str, package: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name='{package}')", encoding="utf-8")
    path = ROOT / script
    code = f"import runpy, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(path.parent)!r}]; sys.argv = [{str(path)!r}]\n"
    code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
    done = run_python("-c", code)
    assert done.returncode == 1
    command = f'pip install -c constraints.txt -e ".[{extra}]"'
    assert done.stderr == f"{path.name}: the package {package} is missing: in a clone, run {command}\n"
