"""The package as a whole: what importing it costs, which room may know which, and code written for openai/CLIP."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

import miniclip
import validate

ROOT = Path(validate.__file__).parent

# Each room and the rooms it may import: down only.
ROOMS = {
    "errors": set(),
    "version": set(),
    "config": {"errors"},
    "layers": set(),
    "loss": {"errors"},
    "fast": {"layers"},
    "model": {"config", "errors", "fast", "layers"},
    "tokenizer": {"errors"},
    "preprocess": {"errors"},
    "checkpoint": {"config", "errors"},
    "hub": {"checkpoint", "config", "errors"},
    "loading": {"checkpoint", "config", "errors", "hub", "model", "preprocess"},
    "saving": {"checkpoint", "errors", "model", "preprocess"},
    "zero_shot": {"errors", "model", "preprocess", "tokenizer"},
    "sources": {"errors"},
    "store": {"errors", "sources", "version"},
    "embed": {"errors", "hub", "loading", "model", "preprocess", "sources", "store"},
    "search": {"embed", "errors", "loading", "model", "preprocess", "store", "tokenizer"},
    "cli": {"config", "embed", "errors", "hub", "loading", "preprocess", "search", "version", "zero_shot"},
    "__main__": {"cli"},
}


def test_imports_point_down_only() -> None:
    found = {path.stem for path in (ROOT / "miniclip").glob("*.py")} - {"__init__"}
    assert found == set(ROOMS)
    for room, allowed in ROOMS.items():
        tree = ast.parse((ROOT / "miniclip" / f"{room}.py").read_text(encoding="utf-8"))
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "miniclip":
                imported |= {alias.name for alias in node.names}  # a name that is no room comes from the package itself
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("miniclip."):
                imported.add(str(node.module).split(".")[1])
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name.split(".")[0] == "miniclip"}
        assert imported <= allowed, f"{room} imports {sorted(imported - allowed)}"


def test_importing_opens_no_data_and_imports_no_client() -> None:
    code = (
        "import builtins, io, sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import miniclip\n"
        "assert not [p for p in opened if 'miniclip' in p and 'data' in p.split('miniclip')[-1]], opened\n"
        "unwanted = 'transformers huggingface_hub httpx requests torchvision matplotlib ftfy pyarrow filelock'\n"
        "for name in unwanted.split():\n"
        "    assert name not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_documented() -> None:
    for name in miniclip.__all__:
        assert getattr(miniclip, name).__doc__, name
    assert files("miniclip").joinpath("py.typed").is_file()


def test_the_version_is_one() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == miniclip.__version__
    assert f"## {miniclip.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_dependency() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=~ ]", wish)[0].lower().replace("_", "-") for wish in wanted} - {"miniclip"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line and line[0] != "#"}
    assert names <= pinned, names - pinned


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


def test_a_program_for_openai_clip_runs_with_its_import_changed(tiny: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((300, 200)).save(photo)
    program = OPENAI_PROGRAM.format(module="miniclip as clip", name=str(tiny), photo=str(photo))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(ast.literal_eval(done.stdout)[0]) == 3


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
    Image.linear_gradient("L").convert("RGB").save(photo)
    (tmp_path / "captions.csv").write_text("image,caption\nphoto.png,a gradient\nphoto.png,a cat\n", encoding="utf-8")
    places = {"photo": str(photo), "tiny": str(tiny), "out": str(tmp_path / "out.png"), "folder": str(tmp_path)}
    command = [str(ROOT / "examples" / arguments[0]), *(argument.format(**places) for argument in arguments[1:])]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "--out" in arguments:
        with Image.open(places["out"]) as drawn:
            assert drawn.width > 300
            assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 50
    else:
        assert "%" in done.stdout


def test_examples_say_what_is_wrong_in_a_sentence(tiny: Path, tmp_path: Path) -> None:
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
        command = [sys.executable, str(ROOT / "examples" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
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
def test_a_missing_package_is_one_sentence(script: str, package: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name='{package}')", encoding="utf-8")
    path = ROOT / script
    code = f"import runpy, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(path.parent)!r}]; sys.argv = [{str(path)!r}]\n"
    code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    command = f'pip install -c constraints.txt -e ".[{extra}]"'
    assert done.stderr == f"{path.name}: the package {package} is missing: in a clone, run {command}\n"
