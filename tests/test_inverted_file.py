"""The inverted file: what it finds beside an exact search in float64, what it refuses, and what a crash leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_image, run_cli, run_python
from PIL import Image, ImageEnhance, ImageOps
from test_search import make_index

import miniclip
from miniclip import cli, inverted_build, inverted_file, planning
from miniclip.check import check_folder
from miniclip.dead_rows import CHANGED, MISSING, Death, write_dead_rows
from miniclip.inverted_build import build_inverted_file, lowest_scores
from miniclip.inverted_file import FOLDER, read_record
from miniclip.live_index import LiveIndex
from miniclip.shard_files import Shard, ShardFiles
from miniclip.sources import ImageSource
from miniclip.store import EmbeddingStore

pytestmark = pytest.mark.slow  # they share the vectors of thousands of images

SHARD = 500
NOUNS = [
    *("elephant", "pizza", "guitar", "octopus", "umbrella", "cup", "boat", "sailboat", "cat"),
    *("dog", "house", "tree", "flower", "sun", "moon", "star", "heart", "car"),
    *("bus", "train", "bicycle", "rocket", "apple", "banana", "cherry", "bread", "cheese"),
    *("cake", "fish", "bird", "horse", "snake", "spider", "hand", "foot", "eye"),
    *("ear", "book", "pen", "key", "lock", "clock", "bell", "lamp", "chair"),
    *("bed", "door", "window", "shoe", "hat", "ring", "crown"),
]


def variant(image: Image.Image, randoms: np.random.Generator) -> Image.Image:
    """The image turned, cropped, in other colours, and often mirrored."""
    size = image.size
    red, green, blue = image.rotate(float(randoms.uniform(-40, 40)), fillcolor=(255, 255, 255)).split()
    image = Image.merge("RGB", [(red, green, blue)[n] for n in randoms.permutation(3)])
    left, top = (int(randoms.integers(0, max(1, side // 4))) for side in size)
    image = image.crop((left, top, size[0] - size[0] // 8, size[1] - size[1] // 8))
    image = ImageEnhance.Brightness(image).enhance(float(randoms.uniform(0.6, 1.4)))
    return ImageOps.mirror(image) if randoms.random() < 0.5 else image


@pytest.fixture(scope="session")
def encoded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of the demo model: (4000, 128) float16 of images, (100, 128) of other images, (52, 128) of words."""
    model, preprocess = miniclip.load("demo", "cpu")
    samples = Path(str(files("miniclip"))) / "data" / "samples"
    paths = sorted(path for path in samples.iterdir() if path.suffix in (".png", ".jpg"))
    originals = [miniclip.open_image(path).convert("RGB").resize((72, 72)) for path in paths]
    originals += [make_image(seed=seed, size=(72, 72)) for seed in range(40)]
    randoms = np.random.default_rng(0)
    images = [variant(originals[n % len(originals)], randoms) for n in range(4100)]
    with torch.inference_mode():
        parts = [model.encode_image(preprocess(images[n : n + 100])) for n in range(0, 4100, 100)]
        vectors = F.normalize(torch.cat(parts), dim=1)
        words = F.normalize(model.encode_text(miniclip.tokenize(NOUNS)), dim=1)
    return vectors[:4000].half(), vectors[4000:], words


@pytest.fixture(scope="session")
def built(encoded: tuple[torch.Tensor, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of these vectors with an inverted file of several files of lists. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("inverted") / "vectors"
    make_index(encoded[0], folder, "demo", SHARD)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inverted_build, "LEAST", 1000)
        patched.setattr(inverted_build, "_SAMPLE", 16)
        patched.setattr(inverted_build, "SEGMENT_BYTES", 3 * SHARD * 256)
        done = build_inverted_file(folder)
    assert done is not None
    assert (done.vectors, done.added) == (4000, 4000)
    assert done.probes < done.lists
    np.save(folder.parent / "words.npy", inverted_build._encode_words(miniclip.Index.open(folder)))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``built``. A folder of a thousand vectors gets an inverted file, and one file has three shards."""
    monkeypatch.setattr(inverted_build, "LEAST", 1000)
    monkeypatch.setattr(inverted_build, "_SAMPLE", 16)
    monkeypatch.setattr(inverted_build, "SEGMENT_BYTES", 3 * SHARD * 256)
    words = np.load(built.parent / "words.npy")
    monkeypatch.setattr(inverted_build, "_encode_words", lambda index: words)  # spares time: they are the same
    return Path(shutil.copytree(built, tmp_path / "vectors"))  # with the times of the files


def stored(folder: Path) -> np.ndarray:
    """All vectors of a folder, (rows, D) float64, as numpy reads them."""
    paths = sorted((folder / "img_emb").iterdir(), key=lambda path: int(path.stem.rpartition("_")[2]))
    return np.concatenate([np.load(path) for path in paths]).astype(np.float64)


def expected(folder: Path, query: torch.Tensor, k: int, dead: frozenset[int] = frozenset()) -> list[tuple[int, float]]:
    """The rows and scores of an exact search, by numpy."""
    scores = stored(folder) @ query.double().numpy()
    scores[[*dead]] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(k, len(scores) - len(dead))]
    return [(int(row), float(scores[row])) for row in best]


def found(index: miniclip.Index, query: torch.Tensor, k: int = 10, **options: bool) -> list[tuple[int, float]]:
    return [(match.row, match.score) for match in index.nearest(query, k, **options)]


def assert_exact(index: miniclip.Index, folder: Path, query: torch.Tensor, k: int = 10, **options: bool) -> None:
    answers, truth = found(index, query, k, **options), expected(folder, query, k)
    assert [row for row, _ in answers] == [row for row, _ in truth]
    assert np.allclose([score for _, score in answers], [score for _, score in truth], rtol=0, atol=1e-12)


def recall(index: miniclip.Index, queries: torch.Tensor, truth: np.ndarray) -> float:
    """The share of the true ten nearest images that are found; equally near ones count as well."""
    lowest = np.sort(queries.double().numpy() @ truth.T, axis=1)[:, -10]
    hits = [sum(s >= least - 1e-12 for _, s in found(index, query)) for query, least in zip(queries, lowest)]
    return sum(hits) / (10 * len(queries))


def use(index: miniclip.Index) -> inverted_file.InvertedFile:
    """The opened inverted file of an index, which has been searched."""
    assert index.notice is None
    assert index._inverted is not None
    return index._inverted


def add_shard(folder: Path, vectors: torch.Tensor) -> ShardFiles:
    store = EmbeddingStore(folder)
    shard = store.shard(store.planned()[-1].number + 1)
    shard.write_listing([ImageSource(f"{shard.number}-{n}", 0, 0) for n in range(len(vectors))])
    shard.write(Shard(vectors.numpy(), [*range(len(vectors))], {}, ["" for _ in vectors]))
    return shard


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_words_and_images_find_what_exact_search_finds(built: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    index, truth = miniclip.Index.open(built), stored(built)
    for kind, queries in (("words", encoded[2]), ("images", encoded[1])):
        assert recall(index, queries, truth) >= 0.97, kind
        inverted = use(index)
        probes, inverted.probes = inverted.probes, 1
        assert recall(index, queries, truth) < 0.9, kind  # the measure can tell a bad index
        inverted.probes = probes
    record = read_record(built)
    assert record is not None
    assert record.recall.keys() == {"words", "images"}
    assert min(record.recall.values()) >= 0.99


def test_the_measured_recall_is_against_exact_search(built: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    queries = encoded[1].numpy()
    lowest = np.sort(queries.astype(np.float64) @ stored(built).T, axis=1)[:, -10]
    assert np.abs(lowest_scores(miniclip.Index.open(built), queries, 10) - lowest).max() < 1e-6


def test_scores_and_order_are_those_of_exact_search(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    index = miniclip.Index.open(folder)
    for query in (*encoded[2][:20], *encoded[1][:20]):
        every = dict(found(index, query, len(index), exact=True))
        answers = found(index, query, 30)
        assert len(answers) == 30
        assert all(every[row] == score for row, score in answers)  # bit for bit
        assert answers == sorted(answers, key=lambda pair: (-pair[1], pair[0]))
    use(index)


def test_equal_vectors_are_found_in_listing_order(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    """More of them than are looked at first, in several files of lists, and in a shard that no list has."""
    again = encoded[0][7].repeat(SHARD, 1)
    add_shard(folder, again)
    add_shard(folder, again)
    build_inverted_file(folder)
    add_shard(folder, again)
    index = miniclip.Index.open(folder)
    rows = [7, *range(4000, 5500)]
    for k in (1, 10, 99, 100):
        assert [row for row, _ in found(index, encoded[0][7].float(), k)] == rows[:k]
    use(index)


def test_more_than_a_hundred_are_searched_exactly(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    index = miniclip.Index.open(folder)
    assert_exact(index, folder, encoded[2][0], 101)
    assert_exact(index, folder, encoded[2][0], 10, exact=True)
    assert index._inverted is None  # nothing has opened it
    found(index, encoded[2][0], 100)
    use(index).probes = use(index).lists
    assert_exact(index, folder, encoded[2][0], 100)  # with all lists, nothing is lost


def test_dead_rows_are_left_out_and_the_living_are_still_found(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    query = encoded[2][3]
    nearest = [row for row, _ in expected(folder, query, 300)]
    write_dead_rows(folder, {divmod(row, SHARD): Death(MISSING if row % 2 else CHANGED) for row in nearest})
    index = miniclip.Index.open(folder)
    answers = found(index, query, 40)
    assert len(answers) == 40
    assert not {row for row, _ in answers} & {*nearest}
    truth = expected(folder, query, 40, frozenset(nearest))
    assert len({*answers} & {*found(index, query, 40, exact=True)}) >= 36
    assert abs(answers[0][1] - truth[0][1]) < 1e-12
    shown = found(index, query, 40, missing=True)
    assert {row for row, _ in shown} <= {row for row in range(4000) if row % 2 or row not in nearest}
    assert sum(row in nearest for row, _ in shown) >= 36
    use(index)


def test_the_last_living_rows_are_found_wherever_they_are(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    query = encoded[2][3]
    order = [row for row, _ in expected(folder, query, 4000)]
    write_dead_rows(folder, {divmod(row, SHARD): Death(CHANGED) for row in order[:-5]})
    index = miniclip.Index.open(folder)
    assert [row for row, _ in found(index, query, 10)] == order[-5:]
    use(index)
    write_dead_rows(folder, {divmod(row, SHARD): Death(CHANGED) for row in order})
    assert found(miniclip.Index.open(folder), query, 10) == []


# -- how it grows -----------------------------------------------------------------------------------------------------


def test_new_shards_are_compared_one_by_one_until_they_are_added(
    folder: Path, encoded: tuple[torch.Tensor, ...]
) -> None:
    queries = F.normalize(torch.randn(SHARD, 128, generator=torch.Generator().manual_seed(5)), dim=1)
    record = read_record(folder)
    assert record is not None
    add_shard(folder, queries.half())
    index = miniclip.Index.open(folder)
    for number in (0, 17, 499):
        (row, score), *rest = found(index, queries[number])
        assert (row, len(rest)) == (4000 + number, 9)
        assert score == found(index, queries[number], exact=True)[0][1]
    use(index)
    done = build_inverted_file(folder)
    assert done is not None
    assert (done.added, done.vectors) == (500, 4500)
    grown = read_record(folder)
    assert grown is not None
    assert (grown.centroids, grown.segments[:2]) == (record.centroids, record.segments[:2])
    assert [segment.rows for segment in grown.segments] == [1500, 1500, 1500]  # the last file had room for it
    assert {path.name for path in (folder / FOLDER).iterdir()} == grown.names
    index = miniclip.Index.open(folder)
    for number in (0, 17, 499):
        assert found(index, queries[number])[0][0] == 4000 + number
    assert index._later == {}
    use(index)


def test_shards_that_complete_out_of_order_are_found_under_their_rows(
    folder: Path, encoded: tuple[torch.Tensor, ...]
) -> None:
    """As on a cluster: shard 9 is indexed before shard 8 is complete."""
    randoms = torch.Generator().manual_seed(5)
    vectors = F.normalize(torch.randn(2 * SHARD, 128, generator=randoms), dim=1).half()
    failures = add_shard(folder, vectors[:SHARD]).failures_path
    failures.rename(folder / "later")
    add_shard(folder, vectors[SHARD:])
    build_inverted_file(folder)
    (folder / "later").rename(failures)
    for _ in range(2):
        index = miniclip.Index.open(folder)
        for number in (3, 499, 500, 999):
            assert found(index, vectors[number].float())[0][0] == 4000 + number
        use(index)
        build_inverted_file(folder)  # now with shard 8, behind shard 9


def test_a_folder_that_has_become_small_loses_its_inverted_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inverted_build, "LEAST", 5000)
    said: list[str] = []
    assert build_inverted_file(folder, say=said.append) is None
    assert said == ["removing an inverted file, because 4,000 vectors need none"]
    assert not [*(folder / FOLDER).iterdir()]
    assert miniclip.Index.open(folder).notice is None
    said.clear()
    assert build_inverted_file(folder, say=said.append) is None
    assert said == []


def test_a_copy_with_other_times_is_whole(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    """miniclip check says how searches get fast again, and reports no damage."""
    assert check_folder(folder).notices == []
    for path in (folder / "img_emb").iterdir():
        os.utime(path, (10**9, 10**9))
    checked = check_folder(folder)
    assert checked.damaged == []
    assert len(checked.notices) == 1
    assert f"run miniclip index {folder}" in checked.notices[0]
    build_inverted_file(folder)
    assert check_folder(folder).notices == []


def test_a_folder_four_times_as_large_gets_new_centroids(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    record = read_record(folder)
    assert record is not None
    said: list[str] = []
    done = build_inverted_file(folder, say=said.append)
    assert done is not None
    assert (done.added, said) == (0, [])  # nothing to do
    vectors = F.normalize(torch.randn(12_000, 128, generator=torch.Generator().manual_seed(5)), dim=1).half()
    add_shard(folder, vectors[:11_999])
    build_inverted_file(folder, say=said.append)
    grown = read_record(folder)
    assert grown is not None
    assert grown.centroids == record.centroids
    add_shard(folder, vectors[11_999:])
    said.clear()
    build_inverted_file(folder, say=said.append)
    assert said[0] == "the folder has grown from 4,000 to 16,000 vectors: training the centroids anew"
    anew = read_record(folder)
    assert anew is not None
    assert (anew.centroids != record.centroids, anew.trained_on) == (True, 16_000)


def test_a_small_folder_gets_none(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(built, tmp_path / "small", ignore=shutil.ignore_patterns(FOLDER))
    assert build_inverted_file(tmp_path / "small") is None
    assert cli.main(["index", str(tmp_path / "small")]) == 0
    assert "fewer than 5,000 vectors, so exact search is fast enough" in capsys.readouterr().out
    assert not (tmp_path / "small" / FOLDER).exists()


# -- what it refuses --------------------------------------------------------------------------------------------------


def assert_refused(folder: Path, query: torch.Tensor, reason: str) -> None:
    index = miniclip.Index.open(folder)
    assert_exact(index, folder, query)
    assert index.notice is not None
    assert reason in index.notice
    assert index.notice.endswith(f", so the search is exact: run miniclip index {folder} again")
    assert_exact(index, folder, query)


def test_an_inverted_file_of_other_vectors_is_refused(
    folder: Path, encoded: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    """The same vectors in another order: the numbers of shards and rows are equal."""
    shuffled = encoded[0][torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    make_index(shuffled, tmp_path / "other", "demo", SHARD)  # type: ignore[arg-type]
    build_inverted_file(tmp_path / "other")
    shutil.rmtree(folder / FOLDER)
    shutil.copytree(tmp_path / "other" / FOLDER, folder / FOLDER)
    assert_refused(folder, encoded[2][0], "does not belong to the vectors of shard 0")
    for number in range(8):  # the times are equal, too
        name = f"img_emb/img_emb_{number}.npy"
        shutil.copystat(tmp_path / "other" / name, folder / name)
    assert miniclip.Index.open(folder).notice is None
    assert_refused(folder, encoded[2][0], "holds other vectors than the folder")
    said: list[str] = []
    os.utime(folder / "img_emb" / "img_emb_5.npy")
    build_inverted_file(folder, say=said.append)
    assert said[0] == "the inverted file does not belong to the vectors of shard 5: building it anew"
    index = miniclip.Index.open(folder)
    found(index, encoded[2][0])
    use(index)


def test_copied_vectors_are_known_by_their_checksums(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    before = read_record(folder)
    for path in (folder / "img_emb").iterdir():
        os.utime(path)
    assert_refused(folder, encoded[2][0], "does not belong")
    said: list[str] = []
    done = build_inverted_file(folder, say=said.append)
    assert done is not None
    assert (done.added, said) == (0, [])
    after = read_record(folder)
    assert before is not None
    assert after is not None
    assert after.names == before.names
    index = miniclip.Index.open(folder)
    found(index, encoded[2][0])
    use(index)


def test_a_served_folder_uses_a_new_inverted_file_at_once(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    shutil.rmtree(folder / "inverted_file")
    live = LiveIndex(folder)
    before = live.view()
    assert before.index._record is None
    build_inverted_file(folder)
    after = live.view()
    found(after.index, encoded[1][0])
    use(after.index)
    assert after.generation == before.generation  # the rows are the same: pages that are open stay good
    assert live.view() is after


def test_a_pruned_folder_needs_another(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    write_dead_rows(folder, {(2, 5): Death(CHANGED)})
    planning.prune(EmbeddingStore(folder))
    assert_refused(folder, encoded[2][0], "does not belong to the vectors of shard 2")
    build_inverted_file(folder)
    index = miniclip.Index.open(folder)
    assert len(found(index, encoded[2][0])) == 10
    use(index)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_table(path: Path) -> None:
    data = bytearray(path.read_bytes())
    sizes = np.frombuffer(data, np.int64, 250, offset=32)  # of the lists; their sum stays, so FAISS notices nothing
    sizes[:] = sizes[::-1].copy()
    path.write_bytes(data)


def another_place(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8:] = (2**40).to_bytes(8, "little")  # the place of a vector
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("lists", another_table),
        *((kind, damage) for kind in ("lists", "centroids", "inverted_file") for damage in (cut, empty, Path.unlink)),
    ],
)
def test_a_damaged_file_is_named_and_built_anew(
    folder: Path, encoded: tuple[torch.Tensor, ...], kind: str, damage: Callable[[Path], object]
) -> None:
    path = next(iter(sorted((folder / FOLDER).glob(f"{kind}*"))))
    damage(path)
    if kind == "inverted_file" and damage is Path.unlink:
        assert miniclip.Index.open(folder).notice is None  # there is none
    else:
        assert_refused(folder, encoded[2][0], f"{path} is damaged")
    assert build_inverted_file(folder) is not None
    index = miniclip.Index.open(folder)
    found(index, encoded[2][0])
    use(index)
    record = read_record(folder)
    assert record is not None
    assert {path.name for path in (folder / FOLDER).iterdir()} == record.names


def test_a_place_that_does_not_exist_is_refused(folder: Path, encoded: tuple[torch.Tensor, ...]) -> None:
    record = read_record(folder)
    assert record is not None
    path = folder / FOLDER / record.segments[0].name
    another_place(path)
    index = miniclip.Index.open(folder)
    found(index, encoded[2][0])
    use(index).probes = use(index).lists
    notices = set()
    for query in encoded[1]:
        if index.notice is None:
            assert len(found(index, query, 100)) == 100
        notices.add(index.notice)
    assert len(notices) == 2
    assert any(notice and "has place 1,099,511,627,776 of 1,500" in notice for notice in notices)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"probes": 0},
        {"probes": "many"},
        {"centroids": "../../centroids.npy"},
        {"segments": [{"name": "x"}]},
        {"segments": {}, "recall": []},
        {"segments": [{"name": "x", "size": 1, "head": "", "shards": [[0]]}]},
    ],
)
def test_a_record_of_another_form_is_refused(
    folder: Path, encoded: tuple[torch.Tensor, ...], change: dict[str, object]
) -> None:
    path = folder / FOLDER / "inverted_file.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_refused(folder, encoded[2][0], f"{path} is damaged")


# -- crashes, packages, the command line ------------------------------------------------------------------------------

DYING = """
import os, signal, sys
from pathlib import Path
from miniclip import cli, inverted_build
last, place = int(sys.argv[1]), sys.argv[2]
inverted_build.LEAST, inverted_build._WORDS = 1000, 200
calls = 0
def dying(action):
    def counted(*arguments, **keywords):
        global calls
        calls += 1
        if calls > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*arguments, **keywords)
    return counted
for name in ("replace", "unlink"):
    setattr(Path, name, dying(getattr(Path, name)))
sys.exit(cli.main(["index", place]))
"""


def test_a_killed_run_leaves_the_old_inverted_file_or_none(
    folder: Path, encoded: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    """SIGKILL before each rename and each removal, of a first run and of one that adds a shard."""
    grown = Path(shutil.copytree(folder, tmp_path / "grown"))
    add_shard(grown, encoded[1].half())
    shutil.rmtree(folder / FOLDER)
    for before in (folder, grown):
        record = read_record(before)
        statuses = []
        for last in range(30):
            place = Path(shutil.copytree(before, tmp_path / f"{before.name} {last}"))
            done = run_python("-c", DYING, last, place)
            statuses.append(done.returncode)
            if done.returncode != -signal.SIGKILL:
                break
            now = read_record(place)
            index = miniclip.Index.open(place)
            assert len(found(index, encoded[2][0])) == 10
            assert index.notice is None
            assert (index._inverted is None) == (now is None)
            if now == record and last % 3 == 0:
                assert build_inverted_file(place) is not None
                whole = read_record(place)
                assert whole is not None
                assert {path.name for path in (place / FOLDER).iterdir()} == whole.names
        assert statuses[-1] == 0, done.stderr
        assert len(statuses) > 4


def test_without_the_package_searches_are_exact(
    folder: Path,
    encoded: tuple[torch.Tensor, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    advice = 'the package faiss is missing: pip install -c constraints.txt -e ".[faiss]"'
    assert cli.main(["index", str(folder)]) == 1
    assert capsys.readouterr().err == f"miniclip: {advice}\n"
    index = miniclip.Index.open(folder)
    assert_exact(index, folder, encoded[2][0])
    assert index.notice == f"{advice} (searches are exact without it)"
    shutil.rmtree(folder / FOLDER)
    index = miniclip.Index.open(folder)
    assert_exact(index, folder, encoded[2][0])
    assert index.notice is None


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / FOLDER)
    assert cli.main(["index", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: training 250 centroids on 4,000 vectors")
    assert lines[-1].startswith(f"{folder}: 4,000 vectors added, 4,000 in 250 lists; a search probes ")
    assert "% for words, " in lines[-1]

    def search(*options: str) -> tuple[list[dict[str, object]], str]:
        assert cli.main(["search", str(folder), "an elephant", "--json", *options]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    probed, exact = search(), search("--exact")
    assert probed[1] == exact[1] == ""
    assert len(probed[0]) == 10
    assert sum(match in exact[0] for match in probed[0]) >= 8
    least = exact[0][4]["score"]
    assert len(search("--min-score", str(least), "--exact")[0]) == 5
    assert 4 <= len(search("--min-score", str(least))[0]) <= 5
    (folder / FOLDER / "inverted_file.json").write_text("{")
    again = search()
    assert again[0] == exact[0]
    assert again[1].startswith("miniclip: ")
    assert again[1].count("\n") == 1
    assert "so the search is exact" in again[1]
    assert search("--exact") == exact


@pytest.mark.parametrize("order", ["import faiss, torch", "import torch, faiss"])
def test_torch_and_faiss_share_a_process(built: Path, order: str) -> None:
    """Both bring a library for threads. Turn by turn, with several threads each, both compute what one thread does."""
    code = (
        f"{order}\n"
        "import sys, numpy as np, miniclip\n"
        "faiss.omp_set_num_threads(4); torch.set_num_threads(4)\n"
        "index = miniclip.Index.open(sys.argv[1])\n"
        "queries = torch.cat([torch.from_numpy(part[:9]) for part in index.vectors()]).float()\n"
        "run = lambda: [[(m.row, m.score) for m in index.nearest(q)] for q in queries]\n"
        "a = torch.randn(700, 700, generator=torch.Generator().manual_seed(0))\n"
        "flat = faiss.IndexFlatIP(128); flat.add(np.concatenate([*index.vectors()]).astype(np.float32))\n"
        "results = []\n"
        "for turn in range(6):\n"
        "    results.append((run(), (a @ a).sum().item(), flat.search(queries.numpy(), 10)[1].tolist()))\n"
        "assert index.notice is None and index._inverted is not None\n"
        "assert all(result == results[0] for result in results)\n"
        "faiss.omp_set_num_threads(1); torch.set_num_threads(1)\n"
        "assert run() == results[0][0]\n"
        "assert np.isclose((a @ a).sum().item(), results[0][1], rtol=1e-3)\n"
        "print('the same')\n"
    )
    done = run_python("-c", code, built)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


def test_a_search_without_an_inverted_file_does_not_import_faiss(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "plain", ignore=shutil.ignore_patterns(FOLDER))
    code = "import sys, torch, miniclip; i = miniclip.Index.open(sys.argv[1])\n"
    code += "i.nearest(i.vector(0)); print('faiss' in sys.modules)"
    assert run_python("-c", code, tmp_path / "plain").stdout == "False\n"
    assert run_python("-c", code, built).stdout == "True\n"
    assert run_cli("index", tmp_path / "nowhere").returncode == 1
    assert not (tmp_path / "nowhere").exists()
