"""The benchmark's own arithmetic. What it measures is in benchmarks/results/; no test knows how long anything took."""

from __future__ import annotations

import copy
import importlib
import json
import mmap
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip

BENCHMARKS = ROOT / "benchmarks"
CPUINFO = """processor\t: 0
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
flags\t\t: fpu {flags}
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, for the time of a test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(modules.measure, "SETTLE", 0)
    yield modules
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A folder in which the checkpoint of ViT-B/32 is a tiny one."""
    shutil.copytree(tiny, tmp_path / "ViT-B-32")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "ViT-B-32")
    return tmp_path


def quick(bench: SimpleNamespace, **changes: object) -> object:
    options = replace(bench.measure.QUICK, threads=torch.get_num_threads(), batches={"ViT-B/32": (1, 3)})
    return replace(options, **changes)


# -- the method -------------------------------------------------------------------------------------------------------


def test_a_missing_peer_ends_the_run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("openvino", "onnx"):
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(bench.peers, "version", version)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match=r"missing onnx, openvino: pip install"):
        bench.run.main()


def test_contenders_take_turns(bench: SimpleNamespace) -> None:
    calls: list[str] = []
    medians = bench.measure.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 6)
    assert medians.keys() == {"a", "b"}
    turns = [calls[i : i + 2] for i in range(4, len(calls), 2)]  # the first two calls of each do not count
    assert len(turns) == 6
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    assert ["a", "b"] in turns
    assert ["b", "a"] in turns


def test_a_wrong_embedding_is_not_timed(bench: SimpleNamespace) -> None:
    right = torch.eye(3)
    bench.measure.check_agreement("a peer", 2 * right, right)
    wrong = right.clone()
    wrong[1, 2] = 0.1
    with pytest.raises(SystemExit, match=r"a peer has a cosine of 0\.995037"):
        bench.measure.check_agreement("a peer", wrong, right)
    calls: list[str] = []

    def encode(name: str, result: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: (calls.append(name), result)[1]

    contenders = {"reference": encode("reference", right), "a peer": encode("a peer", wrong)}
    with pytest.raises(SystemExit, match="a peer has a cosine"):
        bench.measure.take_turns(contenders, 5, "reference")
    assert len(calls) == 4  # no round took place


def test_a_not_a_number_is_not_timed(bench: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="cosine of nan"):
        bench.measure.check_agreement("a peer", torch.full((2, 3), torch.nan), torch.ones(2, 3))


@pytest.mark.slow
def test_threads_of_peers_sleep_after_a_call(bench: SimpleNamespace, place: Path) -> None:
    model = bench.peers.transformers_model(place / "ViT-B-32")
    path = bench.peers.onnx_file(model, "images", place / "images.onnx")
    pixels = torch.randn(16, 3, 32, 32)
    for make in (bench.peers.onnxruntime, bench.peers.openvino):
        encode = make(path, 2)
        busy = []
        for _ in range(5):
            encode(pixels)
            time.sleep(0.01)
            start = time.process_time()  # of this process, whatever else the machine does
            time.sleep(0.1)
            busy.append(time.process_time() - start)
        assert sorted(busy)[2] < 0.01, f"{make.__name__} computes {busy} s after its calls"


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_beside_three_peers(bench: SimpleNamespace, place: Path) -> None:
    rows = list(bench.images.images(quick(bench), place))
    assert [row.work for row in rows] == [
        "ViT-B/32 images, batch 1",
        "ViT-B/32 images, batch 3",
        "ViT-B/32 images, batch 1, bfloat16",
        "ViT-B/32 images, batch 3, bfloat16",
    ]
    for row in rows[:2]:
        assert [set(medians) for medians in row.turns] == [
            {"miniclip", "transformers", "ONNX Runtime"},
            {"miniclip", "OpenVINO"},  # alone, in a process of its own
        ]
    for row in rows[2:]:
        if bench.machine.processor().bfloat16:
            assert set(row.ratios) == {"transformers", "OpenVINO"}
        else:
            assert row.missing == "no bfloat16 instructions"


def test_a_processor_without_bfloat16_says_so(
    bench: SimpleNamespace, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bench.machine.processor(CPUINFO.format(family=6, model=1, name="Old", flags="avx2"))
    monkeypatch.setattr(bench.images, "processor", lambda: old)
    monkeypatch.setattr(bench.peers, "onnx_file", lambda model, kind, path: path)
    monkeypatch.setattr(bench.peers, "onnxruntime", lambda path, threads: bench.peers.images_of(reference))
    monkeypatch.setattr(bench.images, "beside_openvino", lambda *given: [{"miniclip": 1.0, "OpenVINO": 2.0}] * 2)
    reference = bench.peers.transformers_model(place / "ViT-B-32")
    rows = list(bench.images.images(quick(bench), place))
    assert [bool(row.turns) for row in rows] == [True, True, False, False]
    assert bench.report.cell(rows[3]) == "not measured: no bfloat16 instructions"


@pytest.mark.slow
def test_texts_beside_three_peers(bench: SimpleNamespace, place: Path) -> None:
    prompts, classifier, captions = bench.texts.texts(quick(bench), place)
    assert set(prompts.ratios) == {
        "transformers, padded to 77",
        "transformers, cut to the longest",
        "ONNX Runtime, padded to 77",
        "OpenVINO, padded to 77",
    }
    assert (prompts.work, captions.work) == ("8 zero-shot prompts", "8 captions of 5 to 40 tokens")
    assert set(classifier.ratios) == {"transformers, cut to the longest"}


@pytest.mark.slow
def test_a_start_in_processes_of_their_own(bench: SimpleNamespace, place: Path) -> None:
    seconds, memory = bench.start.start(quick(bench), place)
    assert set(seconds.ratios) == set(memory.ratios) == {"transformers"}
    assert 50e6 < memory.turns[0]["miniclip"] < 2e9


def test_rows_for_cuda_run_on_the_cpu(bench: SimpleNamespace, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip cannot be installed beside the tests' torch, and compiling takes a compiler."""
    monkeypatch.setattr(bench.peers, "open_clip_model", lambda name, model: copy.deepcopy(model))
    monkeypatch.setattr(bench.peers, "compiled", lambda tower: tower)
    monkeypatch.setattr(bench.gpu, "PROCESSES", (1, 2))
    monkeypatch.setattr(bench.gpu, "FULL", 3)
    options = quick(bench, cuda_batches=(1, 3), rounds=2)
    *rows, alone, together = bench.gpu.cuda(options, place, device="cpu")
    assert len(rows) == 2 * 2 * 2  # dtypes, towers, batches
    peers = {"transformers", "transformers, eager attention"}
    compiled = {"miniclip, compiled", "transformers, compiled"}
    for row in rows:
        other = {"open_clip" if "images" in row.work else "open_clip, padded to 77"}
        assert set(row.ratios) == peers | other | (compiled if row.work.endswith("batch 1, float16") else set())
        note = r"\S+ TFLOP/s, \d+% of a product of 8192 × 8192 matrices" if "batch 3" in row.work else ""
        assert re.fullmatch(note, row.note)
    assert alone.work == "embed folders of 224 × 224 JPEGs, 1 process, per image"
    assert together.work == "embed folders of 224 × 224 JPEGs, 2 processes, per image"
    for row, folders in ((alone, 1), (together, 2)):
        assert bench.report.cell(row).endswith(" ms")
        written = [miniclip.Index.open(place / f"small-{folders}-{number}") for number in range(folders)]
        assert [len(index) for index in written] == [options.cuda_images] * folders


def test_a_contender_with_other_vectors_ends_the_gpus_rows(
    bench: SimpleNamespace, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(name: str, model: miniclip.CLIP) -> miniclip.CLIP:
        model = copy.deepcopy(model)
        model.visual.proj.neg_()
        return model

    monkeypatch.setattr(bench.peers, "open_clip_model", other)
    monkeypatch.setattr(bench.peers, "compiled", lambda tower: tower)
    with pytest.raises(SystemExit, match=r"open_clip has a cosine of -1\.0"):
        list(bench.gpu.cuda(quick(bench, cuda_batches=(1,)), place, device="cpu"))


def test_a_folder_beside_a_loop(bench: SimpleNamespace, place: Path) -> None:
    (row,) = bench.embed.embed(quick(bench), place)
    assert set(row.ratios) == {"transformers, a loop"}
    assert row.note.startswith("40 images; the model alone takes ")
    assert row.note.endswith("% of the time")
    assert len(list((place / "images").iterdir())) == 40


def test_a_search_among_many(bench: SimpleNamespace, place: Path) -> None:
    seconds, memory = bench.embed.search(quick(bench, vectors=25_000), place)
    assert seconds.work == "search 25,000 vectors"
    assert set(seconds.ratios) == {"numpy, the same files", "numpy, float32 in memory"}
    assert memory.unit == "bytes"
    assert 0 < memory.turns[0]["miniclip"] < 300e6
    assert memory.turns[0]["numpy, float32 in memory"] == 25_000 * 48 * 4


# -- the processor and its file ---------------------------------------------------------------------------------------


def test_processors_of_one_name_have_different_files(bench: SimpleNamespace) -> None:
    texts = [
        CPUINFO.format(family=25, model=17, name="AMD EPYC 9554 64-Core Processor", flags="avx2 avx512f avx512_bf16"),
        CPUINFO.format(family=25, model=1, name="AMD EPYC", flags="avx2"),
        CPUINFO.format(family=26, model=2, name="AMD EPYC", flags="avx2 avx512f avx512_bf16"),
        CPUINFO.format(family=6, model=106, name="Intel(R) Xeon(R) Processor @ 2.80GHz", flags="avx2 avx512f"),
        CPUINFO.format(family=6, model=143, name="Intel(R) Xeon(R) Processor @ 2.80GHz", flags="avx512f amx_bf16"),
        "Features\t: fp asimd\n",
    ]
    found = [bench.machine.processor(text) for text in texts]
    assert [one.slug for one in found[:5]] == [
        "amd-epyc-9554-family-25-model-17-avx512-bf16",
        "amd-epyc-family-25-model-1-avx2",
        "amd-epyc-family-26-model-2-avx512-bf16",
        "intel-xeon-2.80ghz-family-6-model-106-avx512",
        "intel-xeon-2.80ghz-family-6-model-143-amx-bf16",
    ]
    assert [one.bfloat16 for one in found] == [True, False, True, False, True, False]
    assert found[5].slug


def result_of(bench: SimpleNamespace, **sections: float) -> object:
    processor = {"name": "A CPU", "title": "A CPU, avx2", "slug": "a-cpu-avx2", "threads": 2, "platform": "Linux"}
    result = bench.report.Result(processor, {"torch": "2"})
    for section, ratio in sections.items():
        result.sections[section] = {"date": "2026-11-25", "commit": "1234567", "rounds": 9, "minutes": 1.5}
        medians = {"miniclip": 0.5, "transformers": 0.5 * ratio}
        result.rows.append(bench.measure.Row(section, f"work of {section}", [medians]))
    return result


def test_a_section_run_alone_takes_its_place_in_the_file(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "cpu-a-cpu-avx2.json"
    new, order = result_of(bench, texts=3.0), ["images", "texts", "start"]
    assert bench.report.mergeable(path, new, ["texts"]) is None  # there is no file yet
    path.write_text(result_of(bench, images=1.0, texts=2.0, start=4.0).to_json())
    old = bench.report.mergeable(path, new, ["texts"])
    merged = bench.report.merge(old, new, order)
    assert [row.ratios["transformers"] for row in merged.rows] == [1.0, 3.0, 4.0]
    assert list(merged.sections) == order
    assert bench.report.mergeable(path, new, order) is None  # everything is measured anew
    new.versions["torch"] = "3"
    assert bench.report.mergeable(path, new, order) is None
    with pytest.raises(SystemExit, match="other versions: run all sections"):
        bench.report.mergeable(path, new, ["texts"])


def test_a_result_survives_its_file(bench: SimpleNamespace) -> None:
    result = result_of(bench, images=1.5)
    data = json.loads(result.to_json())
    assert data["date"] == "2026-11-25"
    assert data["rows"][0]["ratios"] == {"transformers": 1.5}
    assert bench.report.Result.from_json(result.to_json()) == result


@pytest.mark.slow
def test_the_command_line_writes_the_file_of_this_processor(bench: SimpleNamespace, tmp_path: Path) -> None:
    done = run_script("benchmarks/run.py", "--quick", "--out", tmp_path, "tokenizer")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == f"cpu-{bench.machine.processor().slug}.json"
    result = bench.report.Result.from_json(path.read_text())
    assert list(result.sections) == ["tokenizer"]
    assert set(result.rows[0].ratios) == {"transformers (Rust)", "openai/CLIP"}
    assert bench.report.table([result]) in done.stdout


def test_an_unknown_section_is_refused(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run.parse(["image"])
    assert "unknown section image: choose from images, texts," in capsys.readouterr().err


# -- the report -------------------------------------------------------------------------------------------------------


def test_a_peer_is_compared_with_the_miniclip_of_its_own_process(bench: SimpleNamespace) -> None:
    turns = [{"miniclip": 2.0, "transformers": 5.0}, {"miniclip": 4.0, "OpenVINO": 1.0}]
    row = bench.measure.Row("images", "work", turns)
    assert row.ratios == {"transformers": 2.5, "OpenVINO": 0.25}
    assert bench.report.cell(row) == "2.00 s; 2.50× transformers; 0.25× OpenVINO"
    assert bench.report.cell(row, ["OpenVINO"]) == "0.25× OpenVINO"


def test_another_processor_adds_a_column(bench: SimpleNamespace) -> None:
    first, second = result_of(bench, images=1.5, start=12.34), result_of(bench, texts=53.4, images=0.5)
    second.processor["title"] = "Another"
    assert bench.report.table([first, second]).splitlines() == [
        "| work | A CPU, avx2, 2 threads | Another, 2 threads |",
        "|---|---|---|",
        "| work of images | 500 ms; 1.50× transformers | 500 ms; 0.50× transformers |",
        "| work of start | 500 ms; 12.3× transformers | not measured |",
        "| work of texts | not measured | 500 ms; 53× transformers |",
    ]


def test_the_report_fills_pages_between_their_markers(bench: SimpleNamespace, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "cpu-a.json").write_text(result_of(bench, images=1.5).to_json())
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "speed.md"
    page.write_text(f"# Speed\n\n{bench.report.BEGIN}\nold\n{bench.report.END}\n\nMore.\n")
    for _ in range(2):  # a second report changes nothing
        assert bench.report.write_report(results, tmp_path) == [tmp_path / "docs" / "figures" / "speed.png", page]
        text = page.read_text()
        assert text.startswith(f"# Speed\n\n{bench.report.BEGIN}\n| work |")
        assert text.endswith(f"{bench.report.END}\n\nMore.\n")
        assert "| work of images | 500 ms; 1.50× transformers |" in text
        assert "](figures/speed.png)" in text
        assert "images on 2026-11-25 at 1234567" in text
        assert "old" not in text
    with Image.open(tmp_path / "docs" / "figures" / "speed.png") as chart:
        assert min(chart.size) > 200


@pytest.mark.parametrize("page", ["", "BEGIN", "END BEGIN", "BEGIN END END", "BEGIN END BEGIN"])
def test_a_page_without_one_pair_of_markers_is_refused(bench: SimpleNamespace, page: str) -> None:
    text = page.replace("BEGIN", bench.report.BEGIN).replace("END", bench.report.END)
    with pytest.raises(SystemExit, match=r"README\.md needs one"):
        bench.report.between_markers(text, "table", "README.md")


def test_the_published_results_are_those_of_the_files(bench: SimpleNamespace, tmp_path: Path) -> None:
    paths = sorted((BENCHMARKS / "results").glob("cpu-*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        result = bench.report.Result.from_json(path.read_text(encoding="utf-8"))
        assert path.name == f"cpu-{result.processor['slug']}.json"
        assert set(result.sections) == {row.section for row in result.rows}
        for row, stored in zip(result.rows, data["rows"], strict=True):
            assert row.ratios == stored["ratios"]  # the ratios are those of the medians
            assert row.turns or row.missing
    bench.report.draw(bench.report.read_results(BENCHMARKS / "results"), tmp_path / "chart.png")
    if not (ROOT / "docs" / "speed.md").exists():
        return
    for name, small, figure in (
        ("README.md", True, "docs/figures/speed.png"),
        ("docs/speed.md", False, "figures/speed.png"),
    ):
        page = (ROOT / name).read_text(encoding="utf-8")
        content = bench.report.markdown(BENCHMARKS / "results", small, figure)
        assert bench.report.between_markers(page, content, name) == page, f"{name}: python benchmarks/run.py --report"
    with Image.open(tmp_path / "chart.png") as chart, Image.open(ROOT / bench.report.CHART) as committed:
        assert chart.size == committed.size


def test_the_page_has_the_seconds_of_the_shell() -> None:
    (path,) = (BENCHMARKS / "results").glob("shell-*.json")
    seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for cache in ("warm", "cold"):
        assert f"{seconds[cache]['miniclip']:.2f} s beside {seconds[cache]['rclip']:.2f} s with a {cache}" in page


def test_commands_of_the_shell_take_turns(bench: SimpleNamespace, tmp_path: Path) -> None:
    calls: list[str] = []

    def command(name: str, lines: int = 10) -> Callable[[], str]:
        return lambda: calls.append(name) or "a path\n" * lines  # type: ignore[func-returns-value]

    both = {name: command(name) for name in ("miniclip", "rclip")}
    medians = bench.shell.take_turns(both, 3, lambda: calls.append("before"))
    assert medians.keys() == both.keys()
    assert calls[::2] == ["before"] * 6
    assert [set(calls[n : n + 4]) for n in (0, 4, 8)] == [{"before", "miniclip", "rclip"}] * 3
    with pytest.raises(SystemExit, match="miniclip printed 9 lines, expected 10"):
        bench.shell.take_turns({"miniclip": command("miniclip", 9)}, 1, lambda: None)
    (tmp_path / "kept").write_bytes(b"content")
    bench.shell.drop([tmp_path, tmp_path / "gone"])
    assert (tmp_path / "kept").read_bytes() == b"content"


def test_memory_stays_flat_and_a_leak_shows(bench: SimpleNamespace, tiny: Path) -> None:
    found = bench.memory.measure(str(tiny), 100, 20)
    assert {kind: len(memory) for kind, memory in found.items()} == {"encodes": 10, "loads": 10}
    kept: list[mmap.mmap] = []

    def leak(number: int) -> None:  # not from the heap, where earlier tests have left free memory
        kept.append(mmap.mmap(-1, 200_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(b"x" * 200_000)

    memory = bench.memory.grown(leak, 200)
    assert memory[-1] - memory[0] > 30  # 180 calls of 0.2 MB


@pytest.mark.slow
def test_the_memory_benchmark_writes_a_file(tiny: Path, tmp_path: Path) -> None:
    command = ["--model", tiny, "--encodes", 20, "--loads", 10, "--out", tmp_path / "memory.json"]
    done = run_script("benchmarks/memory.py", *command)
    assert done.returncode == 0, done.stderr
    assert "20 encodes:" in done.stdout
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["calls"] == {"encodes": 20, "loads": 10}
    assert len(found["anonymous_megabytes"]["loads"]) == 10


def test_nothing_speaks_of_goals() -> None:
    for path in [*BENCHMARKS.rglob("*.py"), *BENCHMARKS.glob("results/cpu-*.json")]:
        text = path.read_text(encoding="utf-8").replace('"', " ").replace("_", " ").split()
        assert not {"least", "aim", "below", "verdict"} & set(text), path.name


# -- against another commit -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_checkouts_take_turns(bench: SimpleNamespace, place: Path) -> None:
    folder, given = place / "ViT-B-32", place / "given.npy"
    np.save(given, torch.randn(2, 3, 32, 32).numpy())
    with bench.against.sides({"before": ROOT, "now": ROOT}, folder, "float32", 1) as both:
        times = bench.against.compare(both, given, 3, 0.9999)
        assert {name: len(seconds) for name, seconds in times.items()} == {"before": 3, "now": 3}
        changed = bench.inputs.miniclip.load(folder, "cpu")[0]
        with torch.no_grad():
            changed.visual.class_embedding.mul_(-1)
        bench.inputs.miniclip.save_pretrained(changed, place / "changed")
        with (
            bench.against.sides({"other": ROOT}, place / "changed", "float32", 1) as other,
            pytest.raises(SystemExit, match="the two embeddings have a cosine of"),
        ):
            bench.against.compare({"before": both["before"], **other}, given, 3, 0.9999)


def test_a_revision_is_extracted(bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    (repository / "miniclip").mkdir(parents=True)
    (repository / "miniclip" / "model.py").write_text("before")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    (repository / "miniclip" / "model.py").write_text("now")
    monkeypatch.setattr(bench.against, "ROOT", repository)
    place = bench.against.extract("HEAD", tmp_path / "before")
    assert (place / "miniclip" / "model.py").read_text() == "before"
    with pytest.raises(SystemExit, match="git cannot read no-such-commit"):
        bench.against.extract("no-such-commit", tmp_path / "other")
