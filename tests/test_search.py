"""Search in a folder of embeddings: exact, stable, and with clear errors; and near_duplicates.py on top of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from embedding import make_photos
from helpers import ROOT, make_image, run_cli, run_python, run_script
from PIL import Image, ImageDraw, ImageFont

import miniclip
from miniclip.manifest import Settings, run_settings
from miniclip.planning import plan
from miniclip.shard_files import Shard
from miniclip.sources import ImageSource, Listing
from miniclip.store import EmbeddingStore


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def out(photos: Path, tiny: Path, tmp_path: Path) -> Path:
    miniclip.embed_images(photos, tmp_path / "out", str(tiny), batch_size=4, shard_size=7, device="cpu")
    return tmp_path / "out"


def test_search_is_exact(out: Path, photos: Path, tiny: Path) -> None:
    index = miniclip.Index.open(out)
    assert (len(index), index.dimension) == (23, 48)
    vectors = np.concatenate([np.load(out / "img_emb" / f"img_emb_{n}.npy") for n in range(4)]).astype(np.float64)
    paths = [
        path
        for n in range(4)
        for path in pq.read_table(out / "metadata" / f"metadata_{n}.parquet").column("image_path").to_pylist()
    ]
    model, preprocess = miniclip.load(tiny, "cpu", dtype=torch.float64)
    photo = miniclip.open_image(photos / "a" / "03.JPG")
    text = F.normalize(model.encode_text(miniclip.tokenize("a dog in the snow"))[0], dim=0)
    image = F.normalize(model.encode_image(preprocess([photo]))[0], dim=0)
    for given, query in (
        ({"text": "a dog in the snow"}, text),
        ({"image": photo}, image),
        ({"text": "a dog in the snow", "image": photo}, F.normalize(text + image, dim=0)),
    ):
        scores = vectors @ query.numpy()
        for k in (1, 5, 23, 100):
            found = index.search(**given, k=k)  # type: ignore[arg-type]
            best = np.argsort(-scores, kind="stable")[:k]
            assert [match.path for match in found] == [paths[row] for row in best]
            assert np.abs(np.array([match.score for match in found]) - scores[best]).max() < 1e-5
    assert index.search(image=photo, k=1)[0].path == str(photos / "a" / "03.JPG")


def test_wrong_queries_and_folders_are_refused(out: Path, tmp_path: Path) -> None:
    index = miniclip.Index.open(out)
    with pytest.raises(miniclip.InputError, match="the query is empty"):
        index.search()
    with pytest.raises(miniclip.InputError, match="k must be at least 1, got 0"):
        index.search("cat", k=0)
    for wrong in ({"k": 2.0}, {"text": ["a cat", 3]}, {"image": "photo.png"}):
        with pytest.raises(TypeError):
            index.search(**{"text": "cat", **wrong})  # type: ignore[arg-type]
    with pytest.raises(miniclip.TextTooLongError):
        index.search("cat " * 100)
    for number in (torch.nan, torch.inf, 1e38):
        with pytest.raises(miniclip.InputError, match="must be a unit vector, but its length is"):
            index.nearest(torch.full((48,), number))
    with pytest.raises(miniclip.InputError, match="row -1 does not exist: rows are 0 to 22"):
        index.paths([-1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text((out / "manifest.json").read_text())
    with pytest.raises(miniclip.ConfigError, match="contains no vectors"):
        miniclip.Index.open(tmp_path / "empty")
    with pytest.raises(miniclip.InputError, match="vector of 48"):
        index.nearest(torch.zeros(5))
    with pytest.raises(miniclip.ConfigError, match=r"has no manifest\.json"):
        miniclip.Index.open(tmp_path)
    (out / "img_emb" / "img_emb_1.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(miniclip.ConfigError, match=r"img_emb_1\.npy is damaged"):
        miniclip.Index.open(out)


def test_the_model_may_move_but_not_change(photos: Path, tiny: Path, tmp_path: Path) -> None:
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    shutil.copytree(tiny, here)
    miniclip.embed_images(photos, out, str(here), device="cpu")
    here.rename(there)
    assert miniclip.embed_images(photos, out, str(there), device="cpu").shards == 0
    with pytest.raises(miniclip.UnknownModelError, match="if the model of these vectors has moved, say where it is"):
        miniclip.Index.open(out).search("a cat")
    moved = miniclip.Index.open(out, there).search("a cat")
    config = json.loads((there / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(miniclip.CheckpointError, match=r"made with config\.vision\.activation 'quick_gelu'"):
        miniclip.Index.open(out, there).search("a cat")
    done = run_cli("search", out, "a cat", "--json", "--model", tiny)
    assert [match["path"] for match in json.loads(done.stdout)] == [match.path for match in moved]


def test_equal_images_stay_in_listing_order(tiny: Path, tmp_path: Path) -> None:
    for n in range(40):
        make_image(tmp_path / "photos" / f"{n:02}.png", n % 4)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "out", str(tiny), batch_size=4, shard_size=12, device="cpu")
    index = miniclip.Index.open(tmp_path / "out")
    found = index.search(image=miniclip.open_image(tmp_path / "photos" / "02.png"), k=7)
    assert [Path(match.path).stem for match in found] == [f"{n:02}" for n in range(2, 30, 4)]


def make_index(vectors: torch.Tensor, folder: Path, tiny: Path, shard_size: int) -> miniclip.Index:
    """An index of these vectors (N, 48). The paths of the images are their numbers."""
    store = EmbeddingStore(folder)
    model, preprocess = miniclip.load(tiny, "cpu")
    store.open_run(run_settings(Settings(tiny, batch_size=1, shard_size=shard_size), model, preprocess))
    plan(store, Listing([ImageSource(f"{n:06}", 0, 0) for n in range(len(vectors))]), shard_size)
    for files, part in zip(store.pending(), vectors.split(shard_size)):
        files.write(Shard(part.numpy(), [*range(len(part))], {}, ["" for _ in part]))
    return miniclip.Index.open(folder)


@pytest.mark.parametrize("rows", [23, 4097, 9999])
def test_equal_vectors_get_equal_scores_in_every_position(rows: int, tiny: Path, tmp_path: Path) -> None:
    randoms = torch.Generator().manual_seed(0)
    vector = F.normalize(torch.randn(1, 48, generator=randoms), dim=1).half()
    index = make_index(vector.repeat(rows, 1), tmp_path, tiny, 5000)
    found = index.nearest(F.normalize(torch.randn(48, generator=randoms), dim=0), k=15)
    assert [int(match.path) for match in found] == list(range(15))
    assert len({match.score for match in found}) == 1


@pytest.mark.slow
def test_many_shards_need_no_open_files(tiny: Path, tmp_path: Path) -> None:
    randoms = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(300, 48, generator=randoms), dim=1).half()
    make_index(vectors, tmp_path, tiny, 2)
    code = "import os, resource, sys, torch, miniclip, pyarrow.parquet\n"
    code += "few = len(os.listdir('/proc/self/fd')) + 12; resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))\n"
    code += "index = miniclip.Index.open(sys.argv[1])\n"
    code += "print(len(index), index.nearest(torch.from_numpy(next(index.vectors())[0]), 1)[0].path)"
    done = run_python("-c", code, tmp_path)
    assert done.stdout == "300 000000\n", done.stderr


def test_groups_are_connected_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scipy, in several blocks, from no pair to all of them."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    import near_duplicates

    monkeypatch.setattr(near_duplicates, "ROWS", 50)
    randoms = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(170, 6, generator=randoms), dim=1).half()
    for threshold in (0.999, 0.95, 0.9, 0.8, -1):
        pieces = near_duplicates.blocks([vectors[:120].numpy(), vectors[120:].numpy()])
        found = near_duplicates.groups(170, near_duplicates.near_pairs(pieces, threshold))
        near = coo_matrix((vectors.float() @ vectors.float().T >= threshold).numpy())
        _, labels = connected_components(near, directed=False)
        expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
        assert sorted(found) == sorted(group for group in expected if len(group) > 1)
    for name in ("near_duplicates", "common"):
        sys.modules.pop(name)


@pytest.mark.slow
def test_near_duplicates_are_grouped(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for n in range(6):
        make_image(folder / f"{n}.png", n, (200, 150))
    with Image.open(folder / "4.png") as opened:
        opened.resize((100, 75)).save(folder / "4_small.png")
        opened.save(folder / "4_again.jpg", quality=95)
    (folder / "1_copy.png").write_bytes((folder / "1.png").read_bytes())
    miniclip.embed_images(folder, tmp_path / "out", str(tiny), shard_size=4, device="cpu")
    done = run_script("examples/near_duplicates.py", tmp_path / "out", "--at-least", "0.99")
    assert done.returncode == 0, done.stderr
    expected = ["group 1", *(f"  {folder}/{name}" for name in ("4.png", "4_again.jpg", "4_small.png"))]
    expected += ["group 2", *(f"  {folder}/{name}" for name in ("1.png", "1_copy.png"))]
    lines = [re.sub(r"  (\d\.\d{4})  ", "  ", line) for line in done.stdout.splitlines()]
    assert lines == [*expected, "9 images, 2 groups: 3 near-duplicates"]
    cosines = [float(number) for number in re.findall(r"(\d\.\d{4})  ", done.stdout)]
    assert len(cosines) == 5
    assert all(0.98 <= cosine <= 1.001 for cosine in cosines)
    done = run_script("examples/near_duplicates.py", tmp_path / "out", "--at-least", "2")
    assert done.returncode == 2
    assert "--at-least must be from -1 to 1, got 2.0" in done.stderr


@pytest.mark.slow
def test_similar_letters_are_no_near_duplicates_but_smaller_copies_are(tmp_path: Path) -> None:
    """ "V" and "v" have a cosine of 0.982 in the demo model. Files are named by code, for disks that ignore case."""
    folder, font = tmp_path / "letters", ImageFont.load_default(160)
    folder.mkdir()
    for letter in "bdqpVZvz":
        drawing = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(drawing).text((112, 112), letter, "black", font, anchor="mm")
        drawing.save(folder / f"{ord(letter)}.png")
        if letter in "bd":
            drawing.resize((112, 112)).save(folder / f"{ord(letter)}_small.jpg", quality=70)
    miniclip.embed_images(folder, tmp_path / "out", "demo", device="cpu")
    by_default, lower = (
        re.findall(r"/(\w+)\.", run_script("examples/near_duplicates.py", tmp_path / "out", *options).stdout)
        for options in ([], ["--at-least", "0.97"])
    )
    assert by_default == ["100", "100_small", "98", "98_small"]  # in the order of the names
    assert {"86", "118"} <= set(lower)


def test_a_vector_to_start_from_is_added_to_the_texts(tiny: Path, tmp_path: Path) -> None:
    for n in range(4):
        make_image(tmp_path / "photos" / f"{n}.png", n)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "out", str(tiny), device="cpu")
    index = miniclip.Index.open(tmp_path / "out")
    start = index.vector(2)
    model, _ = index.load()
    text = F.normalize(model.encode_text(miniclip.tokenize("a cat", model.context_length))[0], dim=0)
    expected = F.normalize(F.normalize(start.float(), dim=0) + text, dim=0)
    assert torch.allclose(index.encode_query("a cat", start=5 * start.float()), expected, atol=1e-5)
    assert index.nearest(index.encode_query(start=start), 1)[0].row == 2
    for wrong in (start[:-1], start[None]):
        with pytest.raises(miniclip.InputError, match=rf"must be a vector of {index.dimension} numbers, got shape"):
            index.encode_query(start=wrong)


def test_an_index_opened_again_has_the_new_images_and_the_loaded_model(tiny: Path, tmp_path: Path) -> None:
    for n in range(4):
        make_image(tmp_path / "photos" / f"{n}.png", n)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "out", str(tiny), device="cpu")
    index = miniclip.Index.open(tmp_path / "out")
    loaded = index.load()
    make_image(tmp_path / "photos" / "new.png", 9)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "out", device="cpu")
    again = index.reopen()
    assert (len(index), len(again)) == (4, 5)
    assert again.load() is loaded
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fast_decode": false', '"fast_decode": true'))
    assert index.reopen().load() is not loaded  # vectors of other settings may be those of another model
    os.truncate(manifest, 2**31)
    with pytest.raises(miniclip.ConfigError, match=r"manifest\.json cannot be read \(it has 2147483648 bytes"):
        index.reopen()
