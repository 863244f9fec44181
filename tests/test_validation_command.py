"""The command line: the tables, their JSON and Markdown, the exit status, and errors of one sentence."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import torch
from conftest import make_reference
from helpers import ROOT, run_python, run_script
from torch import nn

import miniclip
from validation.__main__ import DTYPES, main
from validation.report import BEGIN, END, Report, to_markdown, worst_table
from validation.stages import Row, limits_for

DRIFTING = Report(
    "a|b",
    "some weights",
    "cpu",
    "float32",
    "plain",
    (
        Row("token ids", 0.0, 0.0, 1.0, "exact", ok=True),
        Row("image block 1", float("nan"), float("nan"), float("nan"), "rel ≤ 5e-06", ok=False),
        Row("logits", 3e-4, 1e-5, 1.0, "abs ≤ 0.0002", ok=False),
    ),
)


def test_main_prints_the_table_and_exits_0(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for heading in ("stage", "max abs Δ", "relative", "cosine", "limit", "ok"):
        assert heading in out
    assert "patch embedding" in out
    assert "DRIFTS" not in out
    assert "within their limits" in out


def test_main_names_the_first_drift_and_exits_1(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniclip.layers.QuickGELU, "forward", lambda self, x: nn.functional.gelu(x))
    assert main(["--model", str(tiny), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "DRIFTS" in captured.out
    assert "first drifts at 'image block 1'" in captured.err


def test_later_models_do_not_hide_a_drift(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_reference()
    with torch.no_grad():
        broken.visual_projection.weight[3, 4] = float("nan")
    broken.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["--model", str(tmp_path), "nowhere", str(tiny), "--device", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    first, last = json.loads(captured.out, parse_constant=pytest.fail)["reports"]
    assert first["rows"][0]["max_abs"] is None
    assert first["rows"][0]["limit"] == "none, but visual.proj holds 1 NaN or infinity"
    assert all(row["ok"] for row in last["rows"])
    assert "first drifts at 'weights finite'" in captured.err
    assert "nowhere: transformers can only read" in captured.err


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_reference(text_config={"vocab_size": 1000, "eos_token_id": 2}).save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "need ids up to 49407, the model has 1000" in capsys.readouterr().err


def test_a_folder_that_transformers_cannot_load_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "clip.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    assert main(["--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "transformers cannot load it" in capsys.readouterr().err


def test_transformers_reads_a_folders_own_preprocessing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert main(["--model", str(tmp_path), "--device", "cpu"]) == 0
    monkeypatch.setattr("miniclip.huggingface.preprocess_from_dict", lambda config: miniclip.Preprocess(32))
    assert main(["--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "first drifts at 'pixels (openai)'" in capsys.readouterr().err


def test_main_prints_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny), "--device", "cpu", "--dtype", "float64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"]["torch"] == torch.__version__
    (report,) = result["reports"]
    assert report["dtype"] == "float64"
    assert all(row["ok"] for row in report["rows"])


def test_main_refuses_a_path_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
    assert main(["--model", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


# -- Markdown -------------------------------------------------------------------------------------------------------


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """The rows of every Markdown table, by the heading above it."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return {heading: rows[2:] for heading, rows in found.items()}  # without the head and the line below it


def test_markdown_has_the_numbers_of_the_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(tiny), "--device", "cpu", "--dtype", "float32", "bfloat16"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main([*command, "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert f"Measured on {date.today()} on " in markdown
    for name, version in result["versions"].items():
        assert f"{name} {version}" in markdown
    tables = tables_of(markdown)
    worst = tables.pop("Results")
    assert len(worst) == len(result["reports"]) == len(tables) == 2
    for report, (title, rows), summary in zip(result["reports"], tables.items(), worst):
        assert title == f"{tiny} on cpu in {report['dtype']}"
        assert report["path"] in markdown
        assert len(rows) == len(report["rows"])
        for cells, row in zip(rows, report["rows"]):
            assert cells[0] == row["stage"]
            assert [float(cell) for cell in cells[1:3]] == [float(f"{row[key]:.1e}") for key in ("max_abs", "relative")]
            assert float(cells[3]) == pytest.approx(row["cosine"], abs=1e-9)
            assert cells[4:] == [row["limit"], "ok"]
        blocks = [row for row in report["rows"] if "block" in row["stage"] or "pooled" in row["stage"]]
        embeddings = [row for row in report["rows"] if row["stage"].startswith(("image emb", "text emb"))]
        assert summary[:3] == [str(tiny), "cpu", report["dtype"]]
        assert float(summary[3]) >= float(f"{max(row['relative'] for row in blocks):.1e}")
        assert float(summary[4]) == float(f"{max(row['max_abs'] for row in embeddings):.1e}")
        assert float(summary[5]) <= min(row["cosine"] for row in embeddings) + 1e-9
        assert float(summary[6]) == float(rows[-2][1])
        assert summary[7] == "ok"


def test_markdown_shows_a_drift() -> None:
    tables = tables_of(to_markdown([DRIFTING]))
    assert tables["Results"] == [
        [r"a\|b", "cpu", "float32", "nan", "nan", "nan", "3.0e-04", "**drifts at image block 1**"]
    ]
    assert tables[DRIFTING.title][1] == ["image block 1", "nan", "nan", "nan", "rel ≤ 5e-06", "**drifts**"]


def test_markdown_replaces_the_tables_of_a_page(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Größe\n\nIntroduction.\n\n{BEGIN}\nold tables\n{END}\n\nThe end.\n", encoding="utf-8")
    command = ["--model", str(tiny), "--device", "cpu", "--markdown", str(page)]
    assert main(command) == 0
    assert "within their limits" in capsys.readouterr().out
    written = page.read_text(encoding="utf-8")
    assert written.startswith(f"# Größe\n\nIntroduction.\n\n{BEGIN}\n\n## Results\n")
    assert written.endswith(f"|\n\n{END}\n\nThe end.\n")
    assert "old tables" not in written
    assert main(command) == 0
    assert page.read_text(encoding="utf-8") == written
    monkeypatch.setattr(miniclip.layers.QuickGELU, "forward", lambda self, x: nn.functional.gelu(x))
    assert main(command) == 1
    assert f"{page} keeps its old tables" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == written


@pytest.mark.parametrize("text", ["no marker", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}", None])
def test_a_page_without_its_marker_lines_is_refused_before_the_work(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("validation.__main__.weights_for", lambda *_: pytest.fail("the work began"))
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text, encoding="utf-8")
    assert main(["--model", "demo", "--markdown", str(page)]) == 1
    assert str(page) in capsys.readouterr().err


def test_the_page_in_docs_takes_the_tables_and_has_the_limits() -> None:
    text = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    rows = {
        "float32": limits_for(torch.float32),
        "float64": limits_for(torch.float64),
        "float16": limits_for(torch.float16),
        "bfloat16": limits_for(torch.bfloat16),
    }
    for name, limits in rows.items():
        numbers = limits.hidden, limits.embedding, limits.logits, limits.probabilities
        cosine = f" {limits.cosine} |" if limits.cosine else " |"
        assert f"| {name} | {' | '.join(f'{number:g}' for number in numbers)} |{cosine}\n" in text


def test_the_gpus_table_in_docs_is_that_of_its_file() -> None:
    """validate.py ran on a lent GPU. Its numbers keep within today's limits."""
    result = json.loads(
        (ROOT / "benchmarks" / "results" / "validation-cuda-nvidia-h200.json").read_text(encoding="utf-8")
    )
    reports = [Report(**report | {"rows": [Row(**row) for row in report["rows"]]}) for report in result["reports"]]
    text = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    assert "\n".join(worst_table(reports)) in text
    sentence = f"Measured on {result['date']} on an {result['device']} at {result['commit']}, with python "
    assert sentence + ", ".join(f"{name} {number}" for name, number in result["versions"].items())[7:] in text
    assert {(report.model, report.dtype) for report in reports} == {
        (model, dtype)
        for model in ("demo", "ViT-B/32", "ViT-B/16")
        for dtype in ("float32", "float64", "float16", "bfloat16")
    }
    for report in reports:
        limits = limits_for(DTYPES[report.dtype])
        assert report.device == "cuda"
        for row in report.rows:
            hidden = row.limit.startswith("rel")
            assert row.ok
            assert not hidden or row.relative <= limits.hidden
            assert not hidden or row.cosine >= limits.cosine
            assert " embedding (" not in row.stage or row.max_abs <= limits.embedding
            assert row.stage != "logits" or row.max_abs <= limits.logits


def test_json_and_markdown_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--json", "--markdown"])
    assert stopped.value.code == 2


# -- from the shell -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_and_the_module_print_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = "--model", tiny, "--device", "cpu"
    script, module = run_script("validate.py", *options), run_python("-m", "validation", *options)
    for done in (script, module):
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert script.stdout == module.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_cuda(tiny: Path, dtype: str) -> None:
    assert main(["--model", str(tiny), "--device", "cuda", "--dtype", dtype]) == 0
