"""examples/evaluate.py: its counts against transformers, the Hub, and its messages about a malformed data set."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluate
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import refusal, run_here
from test_hub import FakeHub, Handler, server  # noqa: F401 (a fixture)
from transformers import CLIPModel

import miniclip

CLASSES = ["cat", "dog", "cup of coffee", "rocket", "tree", "house", "red car", "boat", "shoe", "bird", "hat", "key"]
TEMPLATES = ["a photo of a {c}.", "the {c}, {c}", "{c}"]
RANKS = [0, 0, 0, 1, 4, 4, 5, 9, 11]  # the rank of each image's class: 3 of 9 are first, 6 of 9 are in the first five
REPO = "clip-benchmark/wds_vtab-cifar10"

Files = dict[str, bytes]
Run = Callable[..., tuple[str, str]]
Answer = dict[str, object]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script. Returns its standard output and its standard error."""

    def run(*arguments: object) -> tuple[str, str]:
        run_here(monkeypatch, evaluate, *arguments, "--device", "cpu")
        return capsys.readouterr()

    return run


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the script. Returns the one sentence with which it stops."""

    def fail(*arguments: object) -> str:
        return refusal(monkeypatch, evaluate, *arguments, "--device", "cpu")

    return fail


def noise_image(seed: int) -> Image.Image:
    """An image of the model's own size, so that it is not resized."""
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(noise[None], size=(32, 32), mode="nearest")[0]
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG"}.get(kind, kind.upper()), **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


@torch.no_grad()
def ranking(reference: CLIPModel, image: Image.Image, classes: list[str], templates: list[str]) -> list[int]:
    """The classes by falling similarity, computed with transformers, one prompt at a time."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = torch.tensor(list(image.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    feature = reference.get_image_features(pixel_values=((pixels - mean) / std)[None]).pooler_output[0]
    similarities = []
    for name in classes:
        total = torch.zeros_like(feature)
        for template in templates:
            tokens = miniclip.tokenize(template.replace("{c}", name)).long()
            prompt = reference.get_text_features(input_ids=tokens).pooler_output[0]
            total += prompt / prompt.norm()
        similarities.append(float(total @ feature / total.norm() / feature.norm()))
    return sorted(range(len(classes)), key=lambda i: -similarities[i])


def tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(scope="module")
def samples(reference: CLIPModel) -> list[tuple[Image.Image, int]]:
    """Images, each with the class that has the rank in RANKS."""
    images = [noise_image(seed) for seed in range(len(RANKS))]
    orders = [ranking(reference, image, CLASSES, TEMPLATES) for image in images]
    assert len({tuple(order) for order in orders}) > len(images) // 2  # so that mixed-up images would be noticed
    return [(image, order[rank]) for image, order, rank in zip(images, orders, RANKS)]


@pytest.fixture
def files(samples: list[tuple[Image.Image, int]]) -> Files:
    """A data set as on the Hub, in two shards. The image comes before or after its class."""
    members: list[list[tuple[str, bytes]]] = [[], []]
    for number, (image, label) in enumerate(samples):
        kind = ("webp", "png")[number % 2]
        pair = [(f"s{number:07}.cls", b"%d" % label), (f"s{number:07}.{kind}", encoded(image, kind))]
        members[number >= 5] += pair if number % 3 else pair[::-1]
    return {
        "classnames.txt": "\n".join(CLASSES).encode() + b"\n",
        "zeroshot_classification_templates.txt": "\n".join(TEMPLATES).encode() + b"\n",
        "test/nshards.txt": b"2\n",
        "test/0.tar": tar(members[0]),
        "test/1.tar": tar(members[1]),
    }


def written(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def hub(server: FakeHub) -> FakeHub:  # noqa: F811
    """The Hub of test_hub.py, with data sets as its repositories."""

    class DataSets(Handler):
        def answer(self, server: FakeHub) -> None:
            assert self.path.startswith("/datasets/")
            self.path = self.path.removeprefix("/datasets")
            super().answer(server)

    server.RequestHandlerClass = DataSets
    return server


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_accuracy_equals_transformers(run: Run, files: Files, tiny: Path, tmp_path: Path, batch_size: int) -> None:
    folder = written(tmp_path, files)
    output, said = run(folder, "--model", tiny, "--json", "--batch-size", batch_size)
    assert json.loads(output) == {
        "dataset": str(folder),
        "model": str(tiny),
        "classes": 12,
        "images": 9,
        "unreadable": 0,
        "top1": pytest.approx(3 / 9),
        "top5": pytest.approx(6 / 9),
    }
    assert "12 classes with 3 prompts each" in said


def test_the_output_is_three_lines(run: Run, files: Files, tiny: Path, tmp_path: Path) -> None:
    output, _ = run(written(tmp_path, files), "--model", tiny, "--dtype", "float64")
    assert output.splitlines()[1:] == ["top-1    33.33%", "top-5    66.67%", "images  9"]


@pytest.mark.parametrize(
    ("limit", "top1", "top5"), [(2, 1.0, 1.0), (4, 3 / 4, 1.0), (7, 3 / 7, 6 / 7), (99, 3 / 9, 6 / 9)]
)
def test_a_limit_takes_the_first_images(
    run: Run, files: Files, tiny: Path, tmp_path: Path, limit: int, top1: float, top5: float
) -> None:
    output, _ = run(written(tmp_path, files), "--model", tiny, "--json", "--limit", limit, "--batch-size", 3)
    answer = json.loads(output)
    assert answer["images"] == min(limit, 9)
    assert (answer["top1"], answer["top5"]) == (pytest.approx(top1), pytest.approx(top5))


def test_samples_are_read_one_batch_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, preprocess = miniclip.load(tiny, "cpu")
    drawn, sizes = [], []
    encode = model.encode_image

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append((len(pixels), len(drawn)))
        return encode(pixels)

    def samples() -> Iterator[tuple[bytes, int]]:
        while True:  # an endless data set
            drawn.append(1)
            yield encoded(noise_image(0)), 0

    monkeypatch.setattr(model, "encode_image", watched)
    data = evaluate.DataSet("endless", CLASSES, ["{}"], samples())
    assert evaluate.evaluate(model, preprocess, data, 4, 10)["images"] == 10
    assert sizes == [(4, 4), (4, 8), (2, 10)]


def test_two_classes_of_the_same_name_both_count(run: Run, reference: CLIPModel, tiny: Path, tmp_path: Path) -> None:
    names = ["cat", "missile", "dog", "missile"]
    best = ranking(reference, noise_image(1), names, ["{c}"])[0]
    names[best], names[1] = names[1], names[best]  # the best class is at index 1 …
    names[3] = names[1]  # … and again at index 3: both are equally similar, so index 1 comes first
    for label, expected in [(1, 1.0), (3, 0.0), (0, 0.0)]:
        files = {
            "classnames.txt": "\n".join(names).encode(),
            "zeroshot_classification_templates.txt": b"{c}",
            "test/nshards.txt": b"1",
            "test/0.tar": tar([("a.png", encoded(noise_image(1))), ("a.cls", b"%d" % label)]),
        }
        output, _ = run(written(tmp_path / str(label), files), "--model", tiny, "--json")
        answer = json.loads(output)
        assert (answer["classes"], answer["top1"], answer["top5"]) == (4, expected, None)


def test_subfolders_are_classes(run: Run, reference: CLIPModel, tiny: Path, tmp_path: Path) -> None:
    names = ["cup of coffee", "hat", "red car", "tree"]  # in the order of the folders
    right = 0
    for seed in range(8):
        folder = tmp_path / names[seed % 4].replace(" ", "_")
        folder.mkdir(exist_ok=True)
        noise_image(seed).save(folder / f"{seed}.PNG")
        right += ranking(reference, noise_image(seed), names, ["a photo of a {c}."])[0] == seed % 4
    assert 0 < right < 8
    (tmp_path / "hat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    output, _ = run(tmp_path, "--model", tiny)
    assert output.splitlines()[1:] == [f"top-1   {right / 8:7.2%}", "images  8"]


def test_without_arguments_it_reads_the_sample_images(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = miniclip.load
    monkeypatch.setattr(miniclip, "load", lambda name, *rest, **options: load(tiny, *rest, **options))
    output, said = run()
    assert output.startswith("demo on ")
    assert output.endswith("images  12\n")
    assert said.splitlines()[0].startswith("the demo model on examples/images")
    assert "12 classes with 1 prompts each" in said


def test_unreadable_images_are_left_out_and_counted(run: Run, files: Files, tiny: Path, tmp_path: Path) -> None:
    first = [("x.cls", b"0"), ("x.jpg", b"no image"), ("y.cls", b"0"), ("y.png", encoded(noise_image(0))[:80])]
    with tarfile.open(fileobj=io.BytesIO(files["test/0.tar"])) as archive:
        first += [(member.name, archive.extractfile(member).read()) for member in archive]
    folder = written(tmp_path, files | {"test/0.tar": tar(first)})
    output, _ = run(folder, "--model", tiny)
    assert output.splitlines()[1:] == [
        "top-1    33.33%",
        "top-5    66.67%",
        "images  9; 2 more could not be read and are left out",
    ]
    assert json.loads(run(folder, "--model", tiny, "--json")[0])["unreadable"] == 2


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_data_set_on_the_hub_is_read_shard_by_shard(run: Run, hub: FakeHub, files: Files, tiny: Path) -> None:
    hub.add(REPO, files)
    output, _ = run("cifar10", "--model", tiny, "--json", "--limit", 5)
    assert json.loads(output)["dataset"] == REPO
    assert not hub.asked("GET", "test/1.tar")  # reading starts with the first shard
    output, _ = run(REPO, "--model", tiny, "--json")
    assert (json.loads(output)["top1"], json.loads(output)["top5"]) == (pytest.approx(3 / 9), pytest.approx(6 / 9))
    assert {path.rpartition("/main/")[2] for path in hub.asked("GET")} == {*files}
    assert len(hub.asked("GET")) == len(files)  # no file twice
    assert "published" not in output
    hub.unplug()
    assert run("cifar10", "--model", tiny, "--json")[0] == output
    assert not hub.requests


def test_known_models_are_shown_with_the_published_accuracy(
    run: Run, hub: FakeHub, files: Files, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files)
    load = miniclip.load
    monkeypatch.setattr(miniclip, "load", lambda name, *rest, **options: load(tiny, *rest, **options))
    for name, figure in [("ViT-B/32", 89.8), ("ViT-B/16", 90.8), ("openai/clip-vit-base-patch32", 89.8)]:
        output, _ = run("cifar10", "--model", name)
        expected = f"top-1    33.33%   published for the whole test set: {figure} % (open_clip's results)"
        assert output.splitlines()[1] == expected
        answer = json.loads(run("cifar10", "--model", name, "--json")[0])
        assert answer["published_top1"] == pytest.approx(figure / 100)
    for name in ("ViT-L/14", "somebody/clip", "demo", tiny):
        assert "published" not in run("cifar10", "--model", name)[0]


def test_the_published_accuracy_is_for_named_models_and_the_hub_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figure(model: str, data: str) -> float | None:
        return evaluate.published(model, evaluate.DataSet(data, [], [], iter(())))

    table = {
        "ViT-B/32": [63.3, 89.8, 64.2, 97.1, 84.0],
        "ViT-B/16": [68.3, 90.8, 67.0, 98.3, 88.7],
    }
    names = ["imagenet1k", "vtab-cifar10", "vtab-cifar100", "stl10", "food101"]
    for model, figures in table.items():
        assert [figure(model, f"clip-benchmark/wds_{name}") for name in names] == figures
    assert figure("ViT-B/32", "clip-benchmark/wds_mnist") is None
    assert figure("ViT-B/32", "cifar10") is None  # a folder of that name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B" / "32").mkdir(parents=True)  # load takes the folder
    assert figure("ViT-B/32", REPO) is None


def test_a_missing_data_set_or_file_on_the_hub_is_named(
    fail: Callable[..., str], hub: FakeHub, files: Files, tiny: Path
) -> None:
    assert "the Hub has no data set clip-benchmark/wds_stl10" in fail("stl10", "--model", tiny)
    hub.add(REPO, {name: data for name, data in files.items() if name != "test/nshards.txt"})
    assert f"{REPO} has no test/nshards.txt" in fail("cifar10", "--model", tiny)
    hub.add("clip-benchmark/wds_food101", {name: data for name, data in files.items() if name != "test/1.tar"})
    assert "clip-benchmark/wds_food101 has no test/1.tar" in fail("food101", "--model", tiny)
    hub.refusals["wds_mnist"] = (503, "")
    assert "classnames.txt of clip-benchmark/wds_mnist is not in the cache and could not be downloaded" in fail(
        "clip-benchmark/wds_mnist", "--model", tiny
    )
    hub.unplug()
    assert "could not be downloaded" in fail("imagenet1k", "--model", tiny)


# -- malformed data sets ----------------------------------------------------------------------------------------------

PNG = ("a.png", encoded(noise_image(0)))
WRONG: dict[str, tuple[Files, str]] = {
    "class too high": ({"test/0.tar": tar([PNG, ("a.cls", b"12")])}, "a.cls says class 12, but classnames.txt has 12"),
    "class too low": ({"test/0.tar": tar([PNG, ("a.cls", b"-1")])}, "a.cls says class -1"),
    "no number": ({"test/0.tar": tar([PNG, ("a.cls", b"cat")])}, "a.cls should contain a number, not b'cat'"),
    "no class": ({"test/0.tar": tar([PNG, ("b.cls", b"1")])}, "a should be an image and its .cls, but is .png"),
    "no image": (
        {"test/0.tar": tar([("a.txt", b""), ("a.cls", b"1")])},
        "an image and its .cls, but is .txt and .cls",
    ),
    "no tar": ({"test/1.tar": b"<html>log in</html>" * 100}, "1.tar cannot be read as a tar"),
    "cut": ({"test/0.tar": tar([PNG, ("a.cls", b"1")])[:600]}, "0.tar cannot be read as a tar"),
    "shards": ({"test/nshards.txt": b"two"}, "should contain the number of shards, not 'two'"),
    "more shards": ({"test/nshards.txt": b"3"}, "has no test/2.tar"),
    "none": ({"test/nshards.txt": b"0"}, "has no images"),
    "damaged": (
        {"test/nshards.txt": b"1", "test/0.tar": tar([("a.png", b"?"), ("a.cls", b"1")])},
        "none of the 1 images",
    ),
    "template": ({"zeroshot_classification_templates.txt": b"a photo"}, "has no {} for the label"),
    "no templates": ({"zeroshot_classification_templates.txt": b"\n"}, "templates must hold at least one"),
    "letters": ({"classnames.txt": b"\xff"}, "classnames.txt cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_malformed_shards_are_reported_in_one_sentence(
    fail: Callable[..., str], files: Files, tiny: Path, tmp_path: Path, case: str
) -> None:
    changes, message = WRONG[case]
    assert message in fail(written(tmp_path, files | changes), "--model", tiny)


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"])
def test_a_missing_file_is_named(fail: Callable[..., str], files: Files, tiny: Path, tmp_path: Path, name: str) -> None:
    del files[name]
    assert fail(written(tmp_path, files), "--model", tiny).endswith(f"{tmp_path} has no {name}")


def test_a_folder_or_name_that_is_no_data_set_is_refused(
    fail: Callable[..., str], run: Run, tiny: Path, tmp_path: Path
) -> None:
    assert "has no subfolders with images" in fail(tmp_path, "--model", tiny)
    assert "is neither a folder, nor one of imagenet1k" in fail("cifar11", "--model", tiny)
    assert "is neither a folder" in fail(tmp_path / "nowhere", "--model", tiny)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--limit", 0)
    assert stopped.value.code == 2
