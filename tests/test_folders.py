"""What a walk through folders of photos takes, and what it leaves out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from helpers import make_image

import miniclip
from miniclip.folders import Rules, Walk, describe_suffixes
from miniclip.sources import SUFFIXES, list_images

PHOTOS = ["a.png", "2019/b.png", "2019/june/c.png", "my thumbs up/d.png", "dots.in.name/e.f.png"]
OTHERS = [
    *("._a.png", "2019/._b.png", ".trash/x.png", "2019/.thumbnails/x.png", "@eaDir/a.png/x.png", "2019/@EADIR/x.png"),
    *(
        "#recycle/x.png",
        "$RECYCLE.BIN/x.png",
        "System Volume Information/x.png",
        "Thumbs/x.png",
        "catalog.lrdata/x.png",
    ),
    *("My.photoslibrary/resources/derivatives/x.png", "My.photoslibrary/x.png", "Old.photoslibrary/Thumbnails/x.png"),
    *("Lightroom.lrlibrary/1f2e/previews/x.png", "Lightroom.lrlibrary/x.png"),
]
ORIGINALS = [
    *("My.photoslibrary/originals/0/x.png", "Old.photoslibrary/Masters/2011/05/x.png"),
    *("Lightroom.lrlibrary/1f2e/originals/2020/x.png",),
]


def make(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def walked(folder: Path, *exclude: str, **rules: bool) -> list[str]:
    return sorted(os.path.relpath(path, folder) for path in Walk(str(folder), Rules.of(exclude, **rules)))


def test_what_other_programs_keep_beside_photos_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, PHOTOS + OTHERS + ORIGINALS)
    assert walked(tmp_path) == sorted(PHOTOS + ORIGINALS)
    assert walked(tmp_path, default_excludes=False) == sorted(PHOTOS + OTHERS + ORIGINALS)
    walk = Walk(str(tmp_path), Rules())
    assert len(list(walk)) == len(PHOTOS + ORIGINALS)
    assert walk.excluded > 0


def test_a_source_that_a_rule_would_leave_out_is_entered_all_the_same(tmp_path: Path) -> None:
    make(
        tmp_path,
        [".hidden/a.png", ".hidden/.deeper/b.png", "My.photoslibrary/originals/c.png", "My.photoslibrary/d.png"],
    )
    assert walked(tmp_path / ".hidden") == ["a.png"]
    assert walked(tmp_path / "My.photoslibrary") == ["originals/c.png"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("b.png", {"2019/b.png"}),
        ("*.PNG", {*PHOTOS}),
        ("2019", {"2019/b.png", "2019/june/c.png"}),
        ("june/", {"2019/june/c.png"}),
        ("2019/june", {"2019/june/c.png"}),
        ("june/c.png", set()),  # a path begins at the source
        ("*/c.png", {"2019/june/c.png"}),
        ("/a.png", {"a.png"}),
        ("a.png/", set()),  # only folders
        ("[ab].png", {"a.png", "2019/b.png"}),
    ],
)
def test_a_pattern_excludes_names_or_paths(pattern: str, left: set[str], tmp_path: Path) -> None:
    make(tmp_path, PHOTOS)
    assert walked(tmp_path, pattern) == sorted({*PHOTOS} - left)


def test_links_to_folders_are_followed_on_request_and_never_in_circles(tmp_path: Path) -> None:
    make(tmp_path / "photos", ["a.png", "sub/b.png"])
    make(tmp_path / "other", ["c.png"])
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "0-linked-first").symlink_to(tmp_path / "photos" / "sub")
    (tmp_path / "photos" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "itself").symlink_to("itself")
    walk = Walk(str(tmp_path / "photos"), Rules())
    assert sorted(Path(path).name for path in walk) == ["a.png", "b.png", "itself"]
    assert walk.links == 3
    assert walked(tmp_path / "photos", follow_links=True) == ["a.png", "itself", "other/c.png", "sub/b.png"]


def test_an_unreadable_folder_is_named_and_does_not_end_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, PHOTOS)
    scandir = os.scandir

    def failing(path: str) -> object:
        if path.endswith("june"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    walk = Walk(str(tmp_path), Rules())
    assert len(list(walk)) == len(PHOTOS) - 1
    assert walk.unreadable == {str(tmp_path / "2019" / "june"): "Permission denied"}


def test_several_sources_are_one_list_without_repeats(tmp_path: Path) -> None:
    for n, name in enumerate(["a/1.png", "b/2.png", "3.png"]):
        make_image(tmp_path / name, n)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a/1.png\n{tmp_path}/b/2.png\n")
    sources = [tmp_path / "b", tmp_path / "list.txt", tmp_path / "3.png", tmp_path / "b" / "2.png"]
    listing = list_images(sources)
    assert [os.path.relpath(image.path, tmp_path) for image in listing.images] == ["3.png", "a/1.png", "b/2.png"]
    assert {image.source for image in listing.images} <= {*map(str, sources)}
    with pytest.raises(miniclip.InputError, match=r"nowhere.*cannot be read"):
        list_images([tmp_path / "a", tmp_path / "nowhere"])


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path, ["a.mov", "b.mov", "c.txt", "README", ".hidden/x.png"])
    (tmp_path / "link").symlink_to(tmp_path.parent)
    with pytest.raises(miniclip.InputError) as caught:
        list_images([tmp_path])
    assert str(caught.value).endswith(
        "contains no images, only 2 .mov, 1 .txt, 1 without a suffix; 1 excluded; 1 not followed because they are links"
    )


def test_skipped_suffixes_are_counted() -> None:
    assert describe_suffixes(Counter({".mov": 3, ".txt": 1200}), shown=5) == "1,200 .txt, 3 .mov"
    assert describe_suffixes(Counter(abc=3, de=2, f=1), shown=1) == "3 abc, 3 with other suffixes"


@pytest.mark.parametrize(
    "suffix", ["hif", "heics", "heifs", "avifs", "mpo", "apng", "dib", "j2k", "jpx", "jpg", "JPEG", "tif"]
)
def test_the_suffixes_that_pillow_or_its_plugin_reads_are_images(suffix: str) -> None:
    assert f".{suffix.lower()}" in SUFFIXES
