"""Damage to a folder of vectors: what opening it notices, what ``miniclip check`` finds, and what a run notices."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding import contents
from helpers import make_image

import miniclip
from miniclip import ConfigError, Index, StorageError, embed_images
from miniclip.check import check_folder
from miniclip.cli import main
from miniclip.shard_files import FileSum

IMAGES = 10


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four, four and two images; one file of the last is no image. Do not change it: copy it."""
    place = tmp_path_factory.mktemp("whole")
    for number in range(IMAGES - 1):
        make_image(place / "photos" / f"{number}.png", number)
    (place / "photos" / "9.png").write_bytes(b"no image")
    embed(place / "photos", place / "out", tiny)
    return place


def embed(photos: Path, out: Path, tiny: Path) -> miniclip.Summary:
    return embed_images(photos, out, tiny, device="cpu", shard_size=4, batch_size=2)


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole / "out", tmp_path / "out")
    return tmp_path


def search(place: Path) -> list[miniclip.Match]:
    index = Index.open(place / "out")
    return index.nearest(index.vector(0), IMAGES)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def exchange(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


FILES = "img_emb/img_emb_{}.npy", "metadata/metadata_{}.parquet", "listing/listing_{}.parquet"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "exchange", "shorter", "longer", "empty", "gone"])
def test_check_names_every_damaged_file_and_how_to_make_it_again(
    whole: Path, place: Path, tiny: Path, file: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "out"
    before = contents(out)
    path, other = out / file.format(0), out / file.format(1)
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    elif damage == "exchange":
        exchange(path, other)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"shorter": path.read_bytes()[:-2], "longer": path.read_bytes() + b"..", "empty": b""}[damage])
    assert main(["check", str(out)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (3 if damage == "exchange" else 2)
    assert printed[-1].startswith(f"{out}: 3 shards, ")
    assert printed[-1].endswith(" damaged")
    for line, number in zip(printed[:-1], range(2)):
        assert line.startswith(f"{out / file.format(number)} is damaged (")
        if "listing" in file:
            assert line.endswith("): embed into another folder")
        else:
            failures = out / f"failures/failures_{number}.jsonl"
            assert line.endswith(f"): remove {failures} and embed again")
            failures.unlink()
    if "listing" not in file:  # what the message says makes the folder whole
        embed(whole / "photos", out, tiny)
        assert contents(out) == before
        assert main(["check", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}: 3 shards, 9 vectors: every file is whole\n"


@pytest.mark.parametrize("file", FILES[:2])
def test_a_search_notices_files_that_were_exchanged(place: Path, file: str) -> None:
    exchange(place / "out" / file.format(0), place / "out" / file.format(1))
    with pytest.raises(ConfigError, match=r"_[01]\.(npy|parquet) is damaged \(its .* has changed\): remove "):
        search(place)


@pytest.mark.parametrize("at", [3, 60, -1])
def test_a_search_notices_a_flipped_bit_in_a_small_file(place: Path, at: int) -> None:
    flip(place / "out" / FILES[0].format(1), at)
    with pytest.raises(ConfigError, match=r"img_emb_1\.npy is damaged \(its beginning has changed\)"):
        search(place)


def rewritten(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other vectors with checksums that fit them, as a program would write that computes something wrong."""
    np.save(path, change(np.load(path)))
    failures = path.parents[1] / "failures" / f"failures_{path.stem.removeprefix('img_emb_')}.jsonl"
    first, *rest = failures.read_text().splitlines(keepends=True)
    record = json.loads(first)
    record["files"]["img_emb"] = FileSum.of(path.read_bytes())._asdict()
    failures.write_text("".join([json.dumps(record) + "\n", *rest]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_left_out_and_reported(
    place: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "out"
    index = Index.open(out)
    query, right = index.vector(6), [match.row for match in search(place)]
    right = [match.row for match in index.nearest(query, IMAGES)]

    def spoil(vectors: np.ndarray) -> np.ndarray:
        vectors[1, 3] = vectors[2, 5] = value
        return vectors

    rewritten(out / FILES[0].format(0), spoil)
    for k in (1, 3, 7, 9):
        index = Index.open(out)
        found = index.nearest(query, k)
        assert [match.row for match in found] == [row for row in right if row not in (1, 2)][:k]
        assert all(np.isfinite(match.score) for match in found)
        assert index.notice == f"2 vectors are not finite and cannot be found: run miniclip check {out}"
    assert main(["search", str(out), "a cat"]) == 0
    assert "2 vectors are not finite" in capsys.readouterr().err
    assert main(["check", str(out)]) == 1
    assert "img_emb_0.npy is damaged (2 vectors are not finite): remove" in capsys.readouterr().out


def test_a_folder_of_vectors_that_are_not_finite_finds_nothing(place: Path) -> None:
    for number in range(3):
        rewritten(place / "out" / FILES[0].format(number), lambda vectors: vectors * np.float16(np.nan))
    index = Index.open(place / "out")
    assert index.nearest(torch.ones(index.dimension) * index.dimension**-0.5, 3) == []


def test_a_shard_of_another_width_is_named(place: Path) -> None:
    rewritten(place / "out" / FILES[0].format(0), lambda vectors: np.concatenate([vectors, vectors], axis=1))
    with pytest.raises(ConfigError, match=r"img_emb_0\.npy is damaged \(vectors of 96 numbers instead of 48\)"):
        search(place)


@pytest.mark.parametrize(
    "line",
    [
        *("", "null", "5", "[1]", "{}", '{"files": 5}', '{"files": {}}', '{"files": {"listing": {}}}', "[" * 100_000),
        '{"files": {"listing": {"size": "1", "start": "", "whole": ""}}}',
        '{"files": {"listing": {"size": 1, "start": "", "whole": ""}, "../x": {"size": 1, "start": "", "whole": ""}}}',
    ],
)
def test_a_failures_file_without_checksums_is_named(place: Path, line: str) -> None:
    path = place / "out" / "failures" / "failures_1.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"failures_1\.jsonl is damaged \(.*\): remove .* and embed again"):
        search(place)


@pytest.mark.parametrize(
    "line",
    [
        *("null", "5", "[1]", "{}", "[" * 100_000, '{"path": "a", "error": "b", "row": 1e9}'),
        '{"path": "a", "error": "b", "row": -1}',
        '{"path": "a", "error": "b", "row": 4}',
        '{"path": "a", "error": "b", "row": true}',
        '{"path": "a", "error": 5, "row": 1}',
        '{"path": "a", "error": "b", "row": 1, "retry": 1}',
    ],
)
def test_a_wrong_line_of_failures_is_named(place: Path, line: str) -> None:
    path = place / "out" / "failures" / "failures_1.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"failures_1\.jsonl is damaged \(.*\): remove .* and embed again"):
        search(place)


def test_a_file_that_becomes_shorter_while_it_is_open_is_named(tiny: Path, tmp_path: Path) -> None:
    """To read behind the new end would be SIGBUS."""
    for number in range(3):
        make_image(tmp_path / "photos" / f"{number}.png", number)
    embed_images(tmp_path / "photos", tmp_path / "out", tiny, device="cpu")
    path = tmp_path / "out" / FILES[0].format(0)
    index = Index.open(tmp_path / "out")
    query = index.vector(0)
    os.truncate(path, 0)
    for attempt in (
        lambda: index.nearest(query, 1),
        lambda: index.vector(2),
        lambda: [*index.table.gather(torch.tensor([1]))],
    ):
        with pytest.raises(
            ConfigError, match=r"img_emb_0\.npy has become shorter while it was open: 0 instead of 416 "
        ):
            attempt()


def test_a_file_that_is_replaced_or_removed_while_it_is_open_stays_readable(place: Path) -> None:
    index = Index.open(place / "out")
    expected = index.nearest(index.vector(0), IMAGES)
    for number in range(3):
        path = place / "out" / FILES[0].format(number)
        path.with_suffix(".new").write_bytes(b"short")
        path.with_suffix(".new").replace(path)
    assert index.nearest(index.vector(0), IMAGES) == expected
    shutil.rmtree(place / "out" / "img_emb")
    assert index.nearest(index.vector(0), IMAGES) == expected


@pytest.mark.parametrize("removed", ["", "manifest.json", "failures/failures_0.jsonl", *FILES[:2]])
def test_a_run_notices_what_is_removed_meanwhile(whole: Path, tiny: Path, tmp_path: Path, removed: str) -> None:
    out = tmp_path / "out"
    path = out / removed.format(0)

    def remove(progress: miniclip.embed.Progress) -> None:
        if progress.done >= 6 and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises((StorageError, ConfigError)) as stopped:
        embed_images(whole / "photos", out, tiny, device="cpu", shard_size=4, batch_size=2, progress=remove)
    assert str(path) in str(stopped.value)
    assert isinstance(stopped.value, StorageError) == (not removed or "failures" in removed or "manifest" in removed)


def test_check_tells_of_shards_that_are_not_complete(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out" / "failures" / "failures_2.jsonl").unlink()
    assert main(["check", str(place / "out")]) == 0
    assert "1 shard planned and not embedded: run the same embed command again" in capsys.readouterr().out
    assert check_folder(place / "out").pending == 1
    (place / "out" / "dead.parquet").write_bytes(b"no table")
    assert main(["check", str(place / "out")]) == 1
    assert "dead.parquet" in capsys.readouterr().out
    assert main(["check", str(place)]) == 1
    assert "is it a folder that miniclip embed made?" in capsys.readouterr().err
    seen: list[tuple[int, int]] = []
    check_folder(place / "out", lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


# -- a vector to search with ------------------------------------------------------------------------------------------


def test_arrays_and_lists_are_vectors_too(place: Path) -> None:
    index = Index.open(place / "out")
    vector = index.vector(3)
    expected = index.nearest(vector, 4)
    for same in (vector.numpy(), vector.double().numpy(), vector.tolist(), tuple(vector.tolist()), vector.half()):
        assert [match.row for match in index.nearest(same, 4)] == [match.row for match in expected]
        assert torch.allclose(index.encode_query(start=same), index.encode_query(start=vector), atol=1e-3)
    trained = vector.clone().requires_grad_(True)
    assert index.nearest(trained, 4) == expected


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (None, "got NoneType"),
        ("a cat", "got str"),
        (b"a cat", "got bytes"),
        ({1: 2}, "got dict"),
        (torch.ones(48, dtype=torch.complex64), "got torch.complex64, torch.strided, cpu"),
        (torch.ones(48).to_sparse(), "got torch.float32, torch.sparse_coo, cpu"),
        (torch.ones(48, device="meta"), "got torch.float32, torch.strided, meta"),
        (np.array(["a"] * 48), "got ndarray of something else"),
        (np.ones(48, np.complex64), "got torch.complex64, torch.strided, cpu"),
        ([[1.0], [1.0, 2.0]], "got list of something else"),
    ],
)
def test_what_is_no_vector_is_a_type_error(place: Path, wrong: object, said: str) -> None:
    index = Index.open(place / "out")
    with pytest.raises(TypeError, match="the query must be a vector of 48 numbers") as refused:
        index.nearest(wrong, 2)  # type: ignore[arg-type]
    assert str(refused.value).endswith(said)
    if wrong is not None:
        with pytest.raises(TypeError, match="start must be a vector of 48 numbers"):
            index.encode_query(start=wrong)  # type: ignore[arg-type]
