"""training/train.py: it learns, resumes bit for bit, never overwrites a run, and reports wrong data in one sentence."""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import augment
import optimise
import pairs
import pytest
import run_folder
import torch
import torch.nn.functional as F
import train
from conftest import make_reference
from helpers import ROOT, run_python, run_script
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from scripts import refusal, run_here
from transformers import CLIPModel

import miniclip
from miniclip.huggingface import config_from_dict, config_to_dict

COLOURS = ("red", "green", "blue", "yellow", "black", "purple", "orange", "gray")
SHAPES = ("circle", "square")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen coloured shapes in two sizes on a transparent ground, with five captions each, as in Flickr30k."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for size, box in enumerate([(4, 4, 28, 28), (8, 8, 24, 24)]):
        for colour in COLOURS:
            for shape in SHAPES:
                image = Image.new("RGBA", (32, 32))
                draw = ImageDraw.Draw(image)
                (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
                image.save(folder / f"{colour}_{shape}_{size}.png")
                name = f"{colour} {shape}"
                captions = [name, f"a {name}", f"a photo of a {name}.", f"the {name}", f"{shape}, {colour}"]
                rows += [(f"{colour}_{shape}_{size}.png", caption) for caption in captions]
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder


@pytest.fixture(scope="module")
def config(tiny: Path) -> Path:
    return tiny / "config.json"


def flags(**options: str) -> list[str]:
    pairs = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
    return [*pairs, "--workers", "0", "--quiet"]


def run(*arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    return run_script("training/train.py", *arguments, *flags(**options))


def refuse(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: str) -> str:
    return refusal(monkeypatch, train, *arguments, *flags(**options))


def small(config: Path, **changes: str) -> dict[str, str]:
    """The options of a run of six steps, with ``changes``."""
    return {"config": str(config), "steps": "6", "batch_size": "8", "warmup": "2", "every": "2", **changes}


def data_options(data: Path = Path(), **changes: object) -> argparse.Namespace:
    """The options that pairs.py reads, without augmentation of captions, with ``changes``."""
    defaults = {"data": data, "seed": 0, "augment": "drawings", "unknown_words": 0.0, "prompts": 0.0, "steps": 1}
    defaults |= {"two_captions": False, "first_caption": 0.0, "neighbours": 1, "later": "", "batch_size": 8}
    return argparse.Namespace(**defaults | changes)


@pytest.mark.slow
def test_a_run_learns_and_saves_a_model_that_both_libraries_read(shapes: Path, config: Path, tmp_path: Path) -> None:
    settings = small(config, steps="120", batch_size="16", learning_rate="2e-3", warmup="10", every="20")
    done = run(shapes, tmp_path / "run", "--half", **settings, patch_dropout="0.25", validation="0.1")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "learning_curve.csv",
        "learning_curve.png",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "state.safetensors",
        "tokenizer_config.json",
        "vocab.json",
    }
    with (tmp_path / "run" / "learning_curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [row["step"] for row in curve] == ["20", "40", "60", "80", "100", "120"]
    assert float(curve[-1]["training_loss"]) < 0.7 * float(curve[0]["training_loss"])
    assert float(curve[-1]["validation_loss"]) < float(curve[0]["validation_loss"])
    with Image.open(tmp_path / "run" / "learning_curve.png") as drawn:
        assert drawn.width > 600
    model, preprocess = miniclip.load(tmp_path / "run", "cpu")
    assert load_file(tmp_path / "run" / "model.safetensors")["logit_scale"].dtype == torch.float16
    labels = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in SHAPES]
    classifier = miniclip.ZeroShotClassifier(model, preprocess, labels, ["{}"])
    assert classifier(miniclip.open_image(shapes / "red_square_0.png"))[0][0].startswith("a red")
    assert classifier(miniclip.open_image(shapes / "blue_circle_0.png"))[0][0].startswith("a blue")
    theirs = CLIPModel.from_pretrained(tmp_path / "run", dtype=torch.float32)
    tokens, pixels = miniclip.tokenize(labels), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=tokens).logits_per_image
    torch.testing.assert_close(model(pixels, tokens)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(shapes: Path, config: Path, tmp_path: Path) -> None:
    assert run(shapes, tmp_path / "whole", "--two-captions", **small(config, neighbours="2")).returncode == 0
    # Stop in the third of six steps, with the signal that Ctrl-C sends.
    program = (
        "import signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'training')!r})\n"
        "import optimise, train\n"
        "done = optimise.loss_of\n"
        "calls = []\n"
        "def loss_of(*arguments):\n"
        "    if arguments[-1] is not None:\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "    return done(*arguments)\n"
        "optimise.loss_of = loss_of\n"
        "train.main()\n"
    )
    stopped = run_python(
        "-c", program, shapes, tmp_path / "part", "--two-captions", *flags(**small(config, neighbours="2"))
    )
    assert stopped.returncode == 1
    assert "stopped after 3 of 6 steps; --resume continues the run" in stopped.stderr
    assert not (tmp_path / "part" / "model.safetensors").exists()
    resumed = run(shapes, tmp_path / "part", "--resume", "--two-captions", **small(config, neighbours="2"))
    assert resumed.returncode == 0, resumed.stderr
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    again = run(
        shapes, tmp_path / "part", "--resume", "--two-captions", **small(config, neighbours="2")
    )  # no step is left, so nothing changes
    assert again.returncode == 0
    assert all(torch.equal(whole[n], t) for n, t in load_file(tmp_path / "part" / "model.safetensors").items())


@pytest.mark.slow
def test_a_killed_run_leaves_a_complete_state(shapes: Path, config: Path, tmp_path: Path) -> None:
    arguments = [str(shapes), str(tmp_path / "run"), *flags(**small(config, steps="100000", every="1"))]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while not (tmp_path / "run" / "state.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert any(name.startswith("exp_avg/") for name in state)


@pytest.mark.slow
def test_resuming_with_other_settings_or_data_is_refused(
    shapes: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(shapes, tmp_path / "run", **small(config)).returncode == 0
    before = (tmp_path / "run" / "state.safetensors").read_bytes()
    cases = [
        ((), {}, "holds a run already: pass --resume"),
        (("--resume",), {"learning_rate": "5e-4"}, "had --learning-rate 0.001, not 0.0005"),
        (("--resume",), {"steps": "9"}, "had --steps 6, not 9"),
    ]
    for extra, changes, message in cases:
        assert message in refuse(monkeypatch, shapes, tmp_path / "run", *extra, **small(config, **changes))
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    with (other / "captions.csv").open("a") as file:
        file.write("red_circle_0.png,a disc\n")
    assert "its data has changed" in refuse(monkeypatch, other, tmp_path / "run", "--resume", **small(config))
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == before
    (tmp_path / "run" / "state.safetensors").write_bytes(before[:1000])
    assert "is not the state of a run" in refuse(monkeypatch, shapes, tmp_path / "run", "--resume", **small(config))


def test_a_full_disk_leaves_the_previous_state(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(data=shapes, out=tmp_path, resume=False, seed=0)
    model = miniclip.CLIP(train.DEMO)
    optimiser = optimise.optimiser_for(model, argparse.Namespace(weight_decay=0.2, learning_rate=1e-3))
    folder = run_folder.RunFolder(options)
    folder.save(1, model, optimiser)
    before = folder.state_path.read_bytes()

    def full(*arguments: object, **settings: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", full)
    with pytest.raises(SystemExit, match=r"cannot be written at step 2 .*No space left.*the previous state is kept"):
        folder.save(2, model, optimiser)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    assert folder.state_path.read_bytes() == before


def test_wrong_data_is_reported_in_one_sentence(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "none": None,
        "empty": "image,caption\n",
        "columns": "picture,caption\na.png,x\n",
        "absent": "image,caption\na.png,x\nb.png,y\n",
        "same": "image,caption\nc.png,x\nd.png,x\n",
        "commas": "image,caption\nc.png,a man, a plan\nd.png,x\n",
        "few": "image,caption\nc.png,x\nd.png,y\n",
    }.items():
        (tmp_path / name).mkdir()
        for image in "cd":
            Image.new("RGB", (9, 9)).save(tmp_path / name / f"{image}.png")
        if text is not None:
            (tmp_path / name / "captions.csv").write_text(text)
    messages = {
        "nowhere": "is not a folder",
        "none": "has no captions.csv",
        "empty": "lists no images",
        "columns": "has no column 'image'",
        "absent": "lists 2 images that do not exist, the first is a.png",
        "same": "two with different captions",
        "commas": "has a comma too many in line 2",
        "few": "of 2 images --validation 0.5 leaves too few",
    }
    for name, message in messages.items():
        assert message in refuse(monkeypatch, tmp_path / name, tmp_path / "run", **small(config, validation="0.5"))
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_program_stops_with_one_line_and_status_1(config: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "run", **small(config))
    assert done.returncode == 1
    assert done.stderr == f"train.py: {tmp_path / 'nowhere'} is not a folder\n"


@pytest.mark.parametrize(
    "flag",
    [
        *(
            "--steps=0",
            "--every=0",
            "--batch-size=1",
            "--patch-dropout=1",
            "--validation=1",
            "--outlines=2",
            "--prompts=2",
        ),
        "--unknown-words=2",
        *("--clip=0", "--learning-rate=-1", "--weight-decay=-1", "--workers=-1", "--warmup=-1", "--seed=9" + 20 * "9"),
    ],
)
def test_an_option_out_of_range_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "data", "out", flag])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2


def test_an_unusable_device_configuration_or_folder_is_refused(
    shapes: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--device gpu cannot be used" in refuse(monkeypatch, shapes, tmp_path / "run", **small(config, device="gpu"))
    few = json.loads(config.read_text())
    few["text_config"] |= {"vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999}
    (tmp_path / "config.json").write_text(json.dumps(few))
    said = refuse(monkeypatch, shapes, tmp_path / "run", **small(tmp_path / "config.json"))
    assert "has room for 1000 tokens, the vocabulary has 49408" in said
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes(b"precious")
    assert "holds a model already" in refuse(monkeypatch, shapes, tmp_path / "old", **small(config))
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == b"precious"


def test_every_batch_holds_all_concepts_if_they_are_few() -> None:
    captions = {f"{n}.jpg": ["a cat" if n % 3 else "a dog"] for n in range(30)}
    batches = pairs.Batches(captions, data_options(batch_size=8), 0, 40).epoch(0)
    assert len(batches) == 20
    assert all(len(batch) == 2 for batch in batches)
    assert {index for batch in batches for index in batch} == set(range(30))
    assert all(len({captions[f"{index}.jpg"][0] for index in batch}) == 2 for batch in batches)


def test_images_are_normalised_with_the_model_s_mean_and_deviation() -> None:
    preprocess = miniclip.Preprocess(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1))
    assert torch.equal(augment.normalise(torch.ones(2, 3, 4, 4), preprocess)[0, :, 0, 0], torch.tensor([2.0, 1.0, 0.5]))


@pytest.mark.slow
def test_losses_in_mixed_precision_stay_near_those_in_float32(
    shapes: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, which this CPU may only emulate."""
    curves = []
    for name, dtype in (("full", None), ("mixed", torch.bfloat16)):
        monkeypatch.setattr(train, "_Stop", lambda: argparse.Namespace(asked=False))  # Ctrl-C stays pytest's
        monkeypatch.setattr(optimise, "mixed_precision", lambda device, dtype=dtype: dtype)
        arguments = ["train.py", shapes, tmp_path / name, "--config", config, "--steps", "20", "--batch-size", "16"]
        arguments += ["--warmup", "2", "--every", "5", "--workers", "0", "--quiet"]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        train.main()
        with (tmp_path / name / "learning_curve.csv").open() as file:
            curves.append(torch.tensor([float(row["training_loss"]) for row in csv.DictReader(file)]))
    assert not torch.equal(*curves)
    torch.testing.assert_close(*curves, rtol=0.05, atol=0)


@pytest.mark.slow
def test_a_damaged_image_is_named_once_and_left_out(shapes: Path, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(shapes, folder)
    (folder / "red_circle_0.png").write_bytes(b"not an image")
    done = run(folder, tmp_path / "run", **small(config, batch_size="16", validation="0"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("red_circle_0.png: is not an image") == 1


@pytest.mark.slow
def test_fine_tuning_starts_from_the_given_weights(shapes: Path, tiny: Path, tmp_path: Path) -> None:
    settings = {"steps": "1", "batch_size": "8", "warmup": "1", "learning_rate": "1e-9", "weight_decay": "0"}
    done = run(shapes, tmp_path / "run", init=str(tiny), augment="photos", **settings)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "run"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in after)


def test_a_caption_that_is_true_of_another_image_is_no_wrong_answer_for_it() -> None:
    cat, dog, car = frozenset({"cat", "animal"}), frozenset({"dog", "animal"}), frozenset({"car", "vehicle"})
    pair = (torch.zeros(4, 2, 2, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int32))
    captions = (["animal", "cat"], cat), (["dog", "animal"], dog), (["vehicle", "car"], car)
    batch = pairs.collate([pairs.Pair(*pair, *rest) for rest in captions])
    assert batch is not None
    assert batch.also_true[0].tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert batch.also_true[1].tolist() == [[False, True, False], [False] * 3, [False] * 3]
    # The loss is that of the pairs that remain, written out in float64.
    torch.manual_seed(0)
    model = miniclip.CLIP(config_from_dict(make_reference().config.to_dict()))
    optimise.initialise(model, torch.arange(model.vocab_size))
    images = torch.randn(3, 3, 32, 32)
    texts = [["an animal", "a dog", "a vehicle"], ["a cat", "an animal", "a car"]]
    tokens = torch.stack([miniclip.tokenize(group, model.context_length) for group in texts])
    batch = batch._replace(tokens=tokens)
    with torch.no_grad():
        logits = [model(images, group)[0].double() for group in tokens]
        found = optimise.loss_of(model, images, batch, 16, None)
        unmasked = batch._replace(also_true=torch.zeros(2, 3, 3, dtype=torch.bool))
        plain = optimise.loss_of(model, images, unmasked, 16, None)
    rows = [[[0, 1, 2], [1, 2], [0, 1, 2]], [[0, 2], [0, 1, 2], [0, 1, 2]]]  # the texts that image i is compared with
    columns = [[[0, 2], [0, 1, 2], [0, 1, 2]], [[0, 1, 2], [1, 2], [0, 1, 2]]]  # the images of text j
    losses = []
    for table, row, column in zip(logits, rows, columns):
        losses += [table[i, row[i]].logsumexp(0) - table[i, i] for i in range(3)]
        losses += [table[column[j], j].logsumexp(0) - table[j, j] for j in range(3)]
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert (plain.double() - expected).abs() > 1e-2


def test_prompts_put_a_share_of_the_captions_into_sentences(shapes: Path) -> None:
    model = miniclip.CLIP(config_from_dict(make_reference().config.to_dict()))
    captions = {name: texts[:1] for name, texts in pairs.read_captions(shapes).items()}
    plain = {tuple(miniclip.tokenize(texts[0], model.context_length)[0].tolist()) for texts in captions.values()}
    for share, least, most in ((0.0, 0, 0), (0.5, 100, 220), (1.0, 290, 320)):  # of 320; one template is the bare name
        dataset = pairs.Pairs(captions, data_options(shapes, prompts=share), model)
        drawn = [dataset[step, index] for step in range(10) for index in range(len(captions))]
        assert least <= sum(tuple(pair.tokens[0].tolist()) not in plain for pair in drawn) <= most
    known = set(pairs.known_words(captions, model, prompted=True).tolist())
    assert all(set(pair.tokens[0].tolist()) <= known | {0} for pair in drawn)
    assert not all(set(p.tokens[0].tolist()) <= set(pairs.known_words(captions, model, False).tolist()) for p in drawn)


def test_the_drawings_kept_in_memory_are_limited(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = miniclip.CLIP(config_from_dict(make_reference().config.to_dict()))
    captions = pairs.read_captions(shapes)
    monkeypatch.setattr(pairs, "DECODED_BYTES", 5 * 4 * 32**2)  # five images
    dataset = pairs.Pairs(captions, data_options(shapes), model)
    first, again = ([dataset[step, index] for index in range(len(captions))] for step in (0, 0))
    assert len(dataset.decoded) == 5
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, again))


@pytest.mark.parametrize("batch_size", [4, 7, 16])
def test_a_batch_never_holds_a_concept_twice(shapes: Path, batch_size: int) -> None:
    captions = pairs.read_captions(shapes)
    concepts = [texts[0] for texts in captions.values()]
    options = data_options(batch_size=batch_size, neighbours=3)
    batches = pairs.Batches(captions, options, 0, 9)
    seen = [index for batch in batches.epoch(0) for index in batch]
    assert len(seen) == len(set(seen))  # every image at most once in an epoch
    assert len(seen) > len(concepts) - 2 * batch_size
    for batch in batches:
        assert len(batch) == batch_size
        assert len({concepts[index] for _, index in batch}) == batch_size
    assert batches.epoch(0) != batches.epoch(1)
    later = list(pairs.Batches(captions, options, 5, 9))
    assert later == list(batches)[5:]  # a resumed run sees the same batches
    options.seed = 1
    assert list(pairs.Batches(captions, options, 0, 9)) != list(batches)


def test_neighbours_come_into_a_batch_together() -> None:
    captions = {f"{n}.png": [f"thing {n}"] for n in range(100)}
    together = {}
    for neighbours in (1, 5):
        batches = pairs.Batches(captions, data_options(batch_size=20, neighbours=neighbours), 0, 9)
        assert {len(batch) for epoch in range(4) for batch in batches.epoch(epoch)} == {20}
        pairs_of = [{index + 1 for index in batch} & set(batch) for epoch in range(4) for batch in batches.epoch(epoch)]
        together[neighbours] = sum(map(len, pairs_of)) / (4 * 99)
    assert together[1] < 0.35
    assert together[5] > 0.7
    pairs_of_5 = {frozenset(batch) for epoch in range(20) for batch in batches.epoch(epoch)}
    apart = [any({n, n + 1} <= batch for batch in pairs_of_5) for n in range(4, 99, 5)]
    assert all(apart)  # the borders of the groups move from epoch to epoch
    beginning = [{index + 1 for index in batch} & set(batch) for batch in batches.epoch(0, beginning=True)]
    assert sum(map(len, beginning)) / 99 < 0.35  # none are put together


def test_the_beginning_of_a_run_leaves_out_what_comes_later(
    shapes: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = {f"{'line/' * (n % 2)}{n}.png": [f"thing {n}"] for n in range(64)}
    steps = list(pairs.Batches(captions, data_options(batch_size=8, later="line/*", steps=40, neighbours=2), 0, 40))
    odd = [sum(index % 2 for _, index in batch) for batch in steps]
    assert odd[:4] == [0] * 4  # a tenth of the run
    assert sum(odd[4:36]) == 4 * 32  # four epochs of all images
    resumed = pairs.Batches(captions, data_options(batch_size=8, later="line/*", steps=40, neighbours=2), 3, 40)
    assert list(resumed) == steps[3:]
    short = list(pairs.Batches(captions, data_options(batch_size=2, later="line/*", steps=8), 0, 8))
    assert any(index % 2 for batch in short for _, index in batch)  # a run may be shorter than an epoch
    said = refuse(monkeypatch, shapes, tmp_path / "run", **small(config, later="*"))
    assert "--later '*' leaves 0 of 31 training images, too few" in said
    assert "matches none of the 31" in refuse(monkeypatch, shapes, tmp_path / "run", **small(config, later="lines/*"))


def test_two_captions_are_the_first_one_and_another_one(shapes: Path) -> None:
    model = miniclip.CLIP(config_from_dict(make_reference().config.to_dict()))
    captions = {name: [*texts, "a thing", "a form"] for name, texts in pairs.read_captions(shapes).items()}
    dataset = pairs.Pairs(captions, data_options(shapes, two_captions=True), model)
    drawn = [dataset[step, 0].captions for step in range(50)]
    first, *others = captions[dataset.names[0]]
    assert {texts[0] for texts in drawn} == {first}
    assert {texts[1] for texts in drawn} == set(others) - {first}
    pair = dataset[0, 0]
    assert torch.equal(pair.tokens, miniclip.tokenize(pair.captions, model.context_length))
    single = {name: texts[:1] for name, texts in captions.items()}
    alone = pairs.Pairs(single, data_options(shapes, two_captions=True), model)
    assert alone[0, 0].captions == [first, first]  # an image may have one caption only


def test_the_first_caption_is_drawn_as_often_as_asked(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = miniclip.CLIP(config_from_dict(make_reference().config.to_dict()))
    captions = {name: [*texts, "a thing", "a form"] for name, texts in pairs.read_captions(shapes).items()}
    first, *others = next(iter(captions.values()))

    def counts(share: float) -> tuple[int, int]:
        dataset = pairs.Pairs(captions, data_options(shapes, first_caption=share), model)
        drawn = [dataset[step, 0].captions for step in range(300)]
        assert {len(texts) for texts in drawn} == {1}
        assert {texts[0] for texts in drawn} <= {first, *others}
        return sum(texts == [first] for texts in drawn), len(others) + 1

    assert counts(1)[0] == 300
    for share in (0.0, 0.7):
        drawn, kinds = counts(share)
        expected = 300 * (share + (1 - share) / kinds)
        assert abs(drawn - expected) < 4 * (300 * 0.25) ** 0.5  # four standard deviations of a fair coin, the widest
    for arguments, said in (
        (("--two-captions", "--first-caption", 0.5), "leave --first-caption out"),
        (("--first-caption", 2), "are shares from 0 to 1"),
    ):
        with pytest.raises(SystemExit):
            run_here(monkeypatch, train, shapes, "run", *arguments)
        assert said in capsys.readouterr().err


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    options = argparse.Namespace(learning_rate=2.0, warmup=10, steps=110)
    rates = [optimise.learning_rate(step, options) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[109] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_gains_and_biases_do_not_decay() -> None:
    model = miniclip.CLIP(train.DEMO)
    optimiser = optimise.optimiser_for(model, argparse.Namespace(weight_decay=0.2, learning_rate=1e-3))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        gain_or_bias = name.endswith("bias") or ".ln_" in name or name.startswith("ln_") or parameter.ndim < 2
        assert decay[id(parameter)] == (0.0 if gain_or_bias else 0.2), name
    assert len(decay) == len(list(model.parameters()))


def test_words_that_occur_in_no_caption_start_small() -> None:
    model = miniclip.CLIP(train.DEMO)
    torch.manual_seed(0)
    optimise.initialise(model, torch.tensor([320, 49406, 49407]))
    rows = model.token_embedding.weight.std(dim=1)
    assert rows[320] > 10 * rows[321]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_unknown_words_are_inserted_between_the_words_of_a_caption() -> None:
    tokens = miniclip.tokenize("a cat on a mat")[0]
    words = tokens[:7].tolist()
    counts = set()
    for seed in range(50):
        row = pairs.with_unknown_words(tokens, range(40_000, 40_010), random.Random(seed))
        ids = row[: int(row.argmax()) + 1].tolist()
        assert [i for i in ids if not 40_000 <= i < 40_010] == words
        assert (ids[0], ids[-1]) == (49406, 49407)
        assert row.shape == tokens.shape
        assert not row[len(ids) :].any()
        counts.add(len(ids) - len(words))
    assert counts == {1, 2, 3}
    full = miniclip.tokenize("cat " * 75)[0]
    assert torch.equal(pairs.with_unknown_words(full, [40_000], random.Random(0)), full)


@pytest.mark.slow
def test_unknown_words_reach_the_model_but_learn_nothing(shapes: Path, config: Path, tmp_path: Path) -> None:
    for share in ("0", "1"):
        done = run(shapes, tmp_path / share, **small(config, unknown_words=share))
        assert done.returncode == 0, done.stderr
    none, all_ = (load_file(tmp_path / share / "state.safetensors") for share in "01")
    assert not torch.equal(none["model/positional_embedding"], all_["model/positional_embedding"])
    texts = {line for lines in pairs.read_captions(shapes).values() for line in lines}
    known = miniclip.tokenize(sorted(texts)).long().unique()
    rows = all_["model/token_embedding.weight"]
    strange = torch.ones(len(rows), dtype=torch.bool).index_fill(0, known, False)
    assert 0.0005 < rows[strange].std() < 0.0011
    assert rows[strange].abs().max() < 0.006  # a single step of the optimiser would move a number further
    assert torch.equal(all_["exp_avg/token_embedding.weight"][strange], torch.zeros_like(rows[strange]))
    assert all_["exp_avg/token_embedding.weight"][known].any()


def test_the_tower_on_all_patches_gives_the_model_s_embedding() -> None:
    model = miniclip.CLIP(config_from_dict(make_reference().config.to_dict()))
    optimise.initialise(model, torch.arange(9))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    whole = optimise.encode_some_patches(model.visual, images, 16, generator)  # the patches in another order
    torch.testing.assert_close(whole, model.encode_image(images), rtol=0, atol=1e-5)
    some = optimise.encode_some_patches(model.visual, images, 8, generator)
    assert F.cosine_similarity(some, whole).max() < 0.9999


def test_augmentation_keeps_the_drawing_and_follows_the_seed(shapes: Path) -> None:
    names = sorted(path.name for path in shapes.glob("*_0.png"))
    images = torch.stack([pairs.open_square(shapes / name, 32, None) for name in names])
    on_white = augment.on_white(images)
    expected = torch.stack(
        [miniclip.Preprocess(32, (0, 0, 0), (1, 1, 1))(miniclip.open_image(shapes / name)) for name in names]
    )
    torch.testing.assert_close(on_white, expected, rtol=0, atol=1.01 / 255)
    before = images.clone()
    one, same, other = (augment.disguise(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(images, before)
    assert one.shape == on_white.shape
    assert one.min() >= 0
    assert one.max() <= 1 + 1e-6
    # The drawing differs from every ground.
    many = torch.cat([augment.disguise(images, torch.Generator().manual_seed(seed)) for seed in range(30)])
    assert many.std(dim=(2, 3)).amax(dim=1).min() > 0.02


def test_a_random_crop_is_a_square_of_the_image(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / "photo.jpg")
    crops = [pairs.open_square(tmp_path / "photo.jpg", 32, random.Random(seed)) for seed in range(8)]
    assert all(crop.shape == (4, 32, 32) and crop[3].min() == 255 for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) > 1


@pytest.mark.parametrize(("config", "text_layers"), [("demo", 3), ("ViT-B/16", 12)])
def test_one_option_chooses_the_architecture(config: str, text_layers: int) -> None:
    chosen = train.architecture(config)
    assert chosen.text.layers == text_layers
    assert (chosen.vision.patch_size, chosen.vision.image_size) == ((8, 64) if config == "demo" else (16, 224))
    with pytest.raises(SystemExit, match="neither 'demo', nor one of ViT-B/32"):
        train.architecture("nothing")


def test_the_demo_configuration_is_small_and_has_clips_vocabulary() -> None:
    parameters = sum(parameter.numel() for parameter in miniclip.CLIP(train.DEMO).parameters())
    assert 2 * parameters < 20e6
    assert (train.DEMO.text.vocab_size, train.DEMO.text.context_length) == (49408, 77)
    json.dumps(config_to_dict(train.DEMO))
