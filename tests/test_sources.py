"""Listing images: folders, tars, lists of paths, and what may be wrong with each."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding import make_photos
from helpers import make_image

import miniclip
from miniclip import sources
from miniclip.sources import list_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def test_a_damaged_tar_is_reported(tmp_path: Path) -> None:
    """Either all images of a tar are listed, or an error says that some are missing."""
    make_image(tmp_path / "a.png", 1)
    data = (tmp_path / "a.png").read_bytes()

    def archive(**pax: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for n in range(4):
                info = tarfile.TarInfo(f"{n}.png")
                info.size = len(data)
                if n == 1:
                    info.pax_headers = pax
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    whole = archive()
    cut = [whole[:size] for size in range(512, len(whole), 128)]
    zeros = next(n for n in range(0, len(whole), 512) if not whole[n:].strip(b"\0"))
    headers = [n for n in range(0, zeros, 512) if whole[n : n + 1].isdigit() and b"ustar" in whole[n : n + 512]]
    assert len(headers) == 4
    damaged = [whole[:n] + b"\xff" * 300 + whole[n + 300 :] for n in headers]
    odd = [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"size": "9" * 23}]
    for content in [*cut, *damaged, *(archive(**pax) for pax in odd)]:
        (tmp_path / "cut.tar").write_bytes(content)
        images = sources.list_images([tmp_path / "cut.tar"]).images
        reported = any("the tar cannot be read to its end" in (image.error or "") for image in images)
        assert reported or len(content) > zeros
        assert len(images) > reported or content[:512] != whole[:512] or len(content) < 1024
    (tmp_path / "cut.tar").write_bytes(whole)
    assert [image.error for image in sources.list_images([tmp_path / "cut.tar"]).images] == [None] * 4


def test_links_in_a_tar_are_resolved(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    make_image(folder / "a" / "one.png", 1)
    os.link(folder / "a" / "one.png", folder / "a" / "two.png")
    (folder / "three.png").symlink_to("a/one.png")
    (folder / "four.png").symlink_to("nowhere.png")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.add(folder / "a", "./a")
        tar.add(folder, ".", filter=lambda info: None if info.name.startswith("./a") else info)
    (tmp_path / "twice.txt").write_text(f"{tmp_path}/links.tar\n" * 2)
    done = miniclip.embed_images(tmp_path / "twice.txt", tmp_path / "out", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (3, 1)
    assert "four.png" in (tmp_path / "out" / "failures.jsonl").read_text()
    vectors = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    assert np.abs(vectors - vectors[0]).max() < 1e-3


@pytest.mark.slow
def test_late_times_deep_folders_and_dotdot_paths_work(tiny: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    make_image(photos / "future.png", 1)
    os.utime(photos / "future.png", (2**34, 2**34))  # the year 2514
    deep = photos
    for n in range(1100):
        deep = deep / "d"
        if n % 100 == 0:
            os.makedirs(deep, exist_ok=True)
    os.makedirs(deep)
    try:
        make_image(deep / "deep.png", 2)
        make_image(tmp_path / "real" / "folder" / "x.png", 3)
        make_image(tmp_path / "real" / "y.png", 4)
        make_image(tmp_path / "y.png", 5)
        (tmp_path / "link").symlink_to(tmp_path / "real" / "folder")
        (photos / "list").write_text(f"{tmp_path}/link/../y.png\n")
        for _ in range(2):
            done = miniclip.embed_images(photos, tmp_path / "out", str(tiny), device="cpu")
            assert (done.failed, done.total) == (0, 2)
        (image,) = sources.list_images([photos / "list"]).images
        assert os.path.samefile(image.path, tmp_path / "real" / "y.png")
    finally:
        subprocess.run(["rm", "-r", photos / "d"], check=True)  # too deep for Python, and so for pytest


@pytest.fixture
def tar(photos: Path, tmp_path: Path) -> Path:
    """A tar as img2dataset writes it: four samples of an image, a caption and a JSON file. Image 2 is broken."""
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for n in range(4):
            sample = {
                f"{n:05}.jpg": (photos / "a" / "00.jpg").read_bytes() if n != 2 else b"broken",
                f"{n:05}.txt": f"caption {n}".encode(),
                f"{n:05}.json": b"{}",
            }
            for name, content in sample.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_a_tar_gives_images_keys_and_captions(tar: Path, tiny: Path, tmp_path: Path) -> None:
    done = miniclip.embed_images(tar, tmp_path / "out", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (3, 1)
    table = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["key"] == ["00000", "00001", "00003"]
    assert table["caption"] == ["caption 0", "caption 1", "caption 3"]
    assert table["image_path"][0] == f"{tar}/00000.jpg"


def test_a_list_names_images_and_tars(photos: Path, tar: Path, tiny: Path, tmp_path: Path) -> None:
    """As a Windows editor saves it, with a path twice, a tar among the images, and a name that ends in a space."""
    make_image(tmp_path / "spaced.png", 5)
    spaced = (tmp_path / "spaced.png").rename(tmp_path / "spaced.png ")
    lines = ["", f"{photos}/a/00.jpg", "  ", f"{photos}/a/00.jpg", f"{photos}/missing.jpg", str(tar), str(spaced)]
    (tmp_path / "list.txt").write_bytes("\r\n".join(["\ufeff" + lines[1], *lines]).encode())
    done = miniclip.embed_images(tmp_path / "list.txt", tmp_path / "out", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (5, 2)
    table = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["caption"] == ["caption 0", "caption 1", "caption 3", None, None]
    assert table["image_path"][3:] == [f"{photos}/a/00.jpg", str(spaced)]
    vectors = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy").astype(float)
    miniclip.embed_images(tar, tmp_path / "from_tar", str(tiny), device="cpu")
    same = np.load(tmp_path / "from_tar" / "img_emb" / "img_emb_0.npy")
    assert np.abs(vectors[[0, 1, 2, 3]] - same[[0, 1, 2, 0]]).max() < 1e-3


def test_a_cut_tar_fails_in_part(tar: Path, tiny: Path, tmp_path: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:2500])
    assert miniclip.embed_images(tar, tmp_path / "out", str(tiny), device="cpu").failed >= 1


def test_sources_without_images_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes((photos / "b" / "01.png").read_bytes())
    with pytest.raises(miniclip.InputError, match=r"^\S+photos\.zip is not a folder, not a \.tar, and not a text file"):
        miniclip.embed_images(tmp_path / "photos.zip", tmp_path / "never", str(tiny))
    (tmp_path / "empty").mkdir()
    for source, reason in (("nowhere", "cannot be read"), ("nowhere.tar", "cannot be read"), ("empty", "no images")):
        with pytest.raises(miniclip.InputError, match=reason):
            miniclip.embed_images(tmp_path / source, tmp_path / "never", str(tiny))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("begin", [b"\0\0\0\x18ftypmp42", b"x" * 70_000, b"a.png\n" + b"y" * 70_000])
def test_a_large_file_that_is_no_list_of_paths_is_not_read_whole(begin: bytes, tmp_path: Path) -> None:
    with (tmp_path / "film.mp4").open("wb") as film:
        film.write(begin)
        film.truncate(2**31)
    tracemalloc.start()
    with pytest.raises(miniclip.InputError, match=r"film\.mp4 is not a folder, not a \.tar, and not a text file"):
        list_images([tmp_path / "film.mp4"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6


def test_a_film_among_several_sources_is_skipped_and_counted(tmp_path: Path) -> None:
    """As the shell makes them of photos/*."""
    make_image(tmp_path / "1.png")
    (tmp_path / "film.MP4").write_bytes(b"\0\0\0\x18ftypmp42")
    listing = list_images([tmp_path / "1.png", tmp_path / "film.MP4"])
    assert [image.path for image in listing.images] == [str(tmp_path / "1.png")]
    assert listing.skipped == {".mp4": 1}


def test_file_names_need_not_be_text(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    make_image(folder / "ok.png", 1)
    os.rename(folder / "ok.png", os.fsencode(folder) + b"/caf\xe9 \xff.png")
    make_image(folder / "naïve \n 猫.png", 2)
    done = miniclip.embed_images(folder, tmp_path / "out", str(tiny), device="cpu")
    assert (done.embedded, done.failed) == (2, 0)
    paths = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").column("image_path").to_pylist()
    assert paths == [f"{folder}/caf\\xe9 \\xff.png", f"{folder}/naïve \n 猫.png"]
    done = miniclip.embed_images(folder, tmp_path / "out", str(tiny), device="cpu")
    assert done.shards == 0

    with tarfile.open(tmp_path / "latin.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name in ("caf\xe9.png", "caf\xe9.txt"):
            archive.add(folder / "naïve \n 猫.png", name)
    for embedded in (1, 0):  # the second run finds nothing new
        done = miniclip.embed_images(tmp_path / "latin.tar", tmp_path / "from_tar", str(tiny), device="cpu")
        assert done.embedded == embedded
    table = pq.read_table(tmp_path / "from_tar" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["key"] == ["caf\\xe9"]
    assert table["caption"][0]


# -- bounds -----------------------------------------------------------------------------------------------------------


def sparse_tar(path: Path, name: str, size: int) -> None:
    """A tar of 10 KB with a member that GNU tar stored as a hole of ``size`` bytes."""
    hole = path.with_name(name)
    with hole.open("wb") as file:
        file.truncate(size)
    subprocess.run(["tar", "--sparse", "-cf", path, "-C", path.parent, name], check=True)
    hole.unlink()
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("size", [2**30, 2**32])
@pytest.mark.parametrize("name", ["a.txt", "a.png"])
def test_a_sparse_member_is_not_read(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "sparse.tar"
    sparse_tar(path, name, size)
    with tarfile.open(path, "a") as tar:
        make_image(tmp_path / "b.png", 1)
        tar.add(tmp_path / "b.png", "b.png")
    tracemalloc.start()
    images = sources.list_images([path]).images
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    errors = {image.member: image.error for image in images}
    said = f"its caption has {size:,} bytes, and at most 65,536 are read"
    assert errors == {name: said if name == "a.txt" else "is not stored as a plain file in the tar", "b.png": None}


def test_a_long_caption_is_one_failure_and_its_image_is_embedded(tiny: Path, tmp_path: Path) -> None:
    make_image(tmp_path / "a.png", 1)
    for number, length in enumerate((65_536, 65_537)):
        (tmp_path / f"{number}.txt").write_text("x" * length)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            tar.add(tmp_path / "a.png", f"{number}.png")
            tar.add(tmp_path / f"{number}.txt", f"{number}.txt")
    done = miniclip.embed_images(tmp_path / "a.tar", tmp_path / "out", tiny, device="cpu")
    assert (done.embedded, done.failed) == (2, 1)
    captions = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").column("caption").to_pylist()
    assert captions == ["x" * 65_536, None]
    assert "its caption has 65,537 bytes" in (tmp_path / "out" / "failures.jsonl").read_text()


def test_a_header_as_long_as_a_library_is_not_read(tmp_path: Path) -> None:
    """A pax header that declares a gigabyte, in a file that has it as a hole."""
    header = tarfile.TarInfo("h")
    header.type, header.size = tarfile.XHDTYPE, 2**30
    path = tmp_path / "long.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(2**30 + 4096)
    tracemalloc.start()
    (image,) = sources.list_images([path]).images
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    assert image.error is not None
    assert "it has a header of 1,073,741,824 bytes, and at most 1,048,576 are read" in image.error


def test_a_large_member_is_not_read_into_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 2**30 + 1
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(2**30 + 4096)
    (image,) = sources.list_images([path]).images
    assert image.error == "has 1,073,741,825 bytes, and at most 1,073,741,824 are read from a tar"


@pytest.mark.parametrize(
    ("kind", "pack"),
    [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)],
)
def test_a_compressed_tar_is_named(tar: Path, kind: str, pack: Callable[[bytes], bytes]) -> None:
    tar.write_bytes(pack(tar.read_bytes()))
    (image,) = sources.list_images([tar]).images
    assert image.error == f"is compressed ({kind}): unpack it to a plain .tar"
