"""Known models: the table of sources, and downloads by the real huggingface_hub client from a Hub on loopback."""

# ruff: noqa: F811 (the parameters of the tests bear the names of imported fixtures)
from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import socket
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fake_hub import (
    FILE,
    LOGIN_PAGE,
    NAME,
    REFUSALS,
    WEIGHTS,
    WEIGHTS_SHA256,
    FakeHub,
    Handler,
    Know,
    flip_a_byte,
    know,  # noqa: F401 (a fixture)
    left_in,
    no_sleep,  # noqa: F401 (a fixture)
    one_sentence,
    pinned,  # noqa: F401 (a fixture)
    same,
    server,  # noqa: F401 (a fixture)
)
from huggingface_hub import constants

import miniclip
from miniclip import CLIPConfig, DownloadError, hub
from miniclip.checkpoint import open_checkpoint
from miniclip.hub import Source

# -- the table ------------------------------------------------------------------------------------------------------

# Read from the Hub: model, repository, revision, file, sha256 and megabytes ("-" where the Hub was not seen to say).
TABLE = f"""
ViT-B/32 sentence-transformers/clip-ViT-B-32 327ab6726d33c0e22f920c83f2ff9e4bd38ca37f {FILE} B 605
ViT-B/32 openai/clip-vit-base-patch32 b33cedfd0df4e43b8238760678fcc89e1a0d38b3 model.safetensors B 605
ViT-B/32 timm/vit_base_patch32_clip_224.openai a6f597a30f7b82c51704746581f9a4e41421e878 open_clip_model.safetensors - -
ViT-B/16 timm/vit_base_patch16_clip_224.openai 977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d open_clip_model.safetensors - -
ViT-L/14 openai/clip-vit-large-patch14 32bd64288804d66eefd0ccbe215aa642df71cc41 model.safetensors L 1711
ViT-L/14@336px timm/vit_large_patch14_clip_336.openai main open_clip_model.safetensors - -
"""
SHA256 = {
    "B": "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d",
    "L": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
}


def test_table_matches_the_values_read_from_the_hub() -> None:
    rows: dict[str, tuple[Source, ...]] = {}
    for name, repo, revision, file, sha256, size in map(str.split, TABLE.strip().splitlines()):
        source = Source(repo, revision, file, SHA256.get(sha256), None if size == "-" else int(size))
        rows[name] = (*rows.get(name, ()), source)
    assert {name: model.sources for name, model in hub.KNOWN.items()} == rows
    assert miniclip.available_models() == [*rows, "demo"]


def test_revisions_are_commits_and_checksums_are_sha256() -> None:
    for name, model in hub.KNOWN.items():
        for source in model.sources:
            if name != "ViT-L/14@336px":  # the commit is not known
                assert re.fullmatch("[0-9a-f]{40}", source.revision)
            assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
            assert hub.pickle_refusal(source.filename) is None


PARAMETERS = {
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}


def test_architectures_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        models = {name: miniclip.CLIP(model.config) for name, model in hub.KNOWN.items()}
    assert {name: sum(tensor.numel() for tensor in model.parameters()) for name, model in models.items()} == PARAMETERS


def test_every_source_repository_is_an_alias_of_its_model() -> None:
    for name, model in hub.KNOWN.items():
        for source in model.sources:
            assert hub.ALIASES[source.repo] == name


# -- known models --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def tiny_config(tiny: Path) -> CLIPConfig:
    return open_checkpoint(tiny).clip_config()


def test_known_model_is_downloaded_with_a_progress_bar_then_found_without_a_request(
    server: FakeHub, tiny: Path, tiny_config: CLIPConfig, know: Know, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (tiny / "model.safetensors").read_bytes()
    commit = server.add("first/source", {FILE: weights, "config.json": b"not read"})
    know(Source("first/source", commit, FILE, hashlib.sha256(weights).hexdigest()), config=tiny_config)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert hub.cached_model(NAME) is None

    model, preprocess = miniclip.load(NAME, "cpu")
    assert same(model, miniclip.load(tiny, "cpu")[0])
    assert preprocess.size == 32
    assert "model.safetensors: 100%" in terminal.getvalue()
    assert [request.path for request in server.requests if request.method == "GET"] == [
        f"/cdn/{hashlib.sha256(weights).hexdigest()}"
    ]
    assert hub.cached_model(NAME) == server.cache / "models--first--source" / "snapshots" / commit / FILE

    server.forget()
    assert same(miniclip.load(NAME, "cpu")[0], model)
    assert server.requests == []


def test_checksum_is_computed_once(server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: counted.append(args) or digest(*args))
    path = hub.fetch_known(NAME)
    assert len(counted) == 1
    assert hub.fetch_known(NAME) == hub.cached_model(NAME) == path
    assert len(counted) == 1
    os.utime(path, ns=(0, 0))  # the same bytes, but another modification time
    assert hub.fetch_known(NAME) == path
    assert len(counted) == 2


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_next_source_is_tried_after_a_refusal(
    server: FakeHub, pinned: Source, know: Know, status: int, code: str
) -> None:
    commit = server.add("second/source", {"model.safetensors": WEIGHTS})
    know(pinned, Source("second/source", commit, "model.safetensors"))
    server.refusals["/first/source"] = (status, code)
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
    assert len(server.asked("HEAD", "/first/source")) == 1
    server.forget()
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
    assert server.requests == []


def test_error_names_all_sources_when_all_refuse(server: FakeHub, pinned: Source, know: Know) -> None:
    know(pinned, Source("second/source", "0" * 40, FILE), Source("third/source", "0" * 40, FILE))
    server.refusals |= {"first/source": (404, "EntryNotFound"), "second/source": (503, "")}
    with pytest.raises(DownloadError) as caught:
        hub.fetch_known(NAME)
    text = one_sentence(caught.value)
    assert f"no source of {NAME} provides its weights: first/source (HTTP 404), second/source (HTTP 503)" in text
    assert (
        "third/source (HTTP 401; a private or gated repository needs a valid token in HF_TOKEN); try again later"
        in text
    )
    assert left_in(server.cache) == []


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_file_with_wrong_checksum_is_refused_and_removed(
    server: FakeHub, know: Know, monkeypatch: pytest.MonkeyPatch, is_pinned: bool, links: bool
) -> None:
    """The pinned checksum, or else the one that the Hub reports; with links in the cache or without (as on Windows)."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    commit = server.add("first/source", {FILE: WEIGHTS})
    know(Source("first/source", commit, FILE, WEIGHTS_SHA256 if is_pinned else None))
    server.blobs[WEIGHTS_SHA256] = b"?" + WEIGHTS[1:]
    with pytest.raises(DownloadError, match=f"wrong checksum .100000 bytes, .* {WEIGHTS_SHA256}") as caught:
        hub.fetch_known(NAME)
    assert "first/source" in one_sentence(caught.value)
    assert left_in(server.cache) == []
    server.blobs[WEIGHTS_SHA256] = WEIGHTS
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS


def test_pinned_checksum_wins_over_the_hubs(server: FakeHub, know: Know) -> None:
    other = b"?" + WEIGHTS[1:]
    know(Source("first/source", server.add("first/source", {FILE: other}), FILE, WEIGHTS_SHA256))
    with pytest.raises(DownloadError, match="wrong checksum"):
        hub.fetch_known(NAME)
    assert left_in(server.cache) == []


def test_damaged_cached_file_is_downloaded_again(server: FakeHub, pinned: Source) -> None:
    path = hub.fetch_known(NAME)
    flip_a_byte(path)
    with pytest.warns(UserWarning, match="no longer has its checksum"):
        again = hub.fetch_known(NAME)
    assert again.read_bytes() == WEIGHTS
    assert len(server.asked("GET", "/cdn/")) == 2


def test_damaged_cached_file_is_not_used_offline(server: FakeHub, pinned: Source) -> None:
    flip_a_byte(hub.fetch_known(NAME))
    server.unplug()
    with pytest.warns(UserWarning, match="no longer has its checksum"), pytest.raises(DownloadError, match="is not in"):
        hub.fetch_known(NAME)
    assert left_in(server.cache) == []


def test_file_behind_a_dangling_link_is_downloaded_again(server: FakeHub, pinned: Source) -> None:
    hub.fetch_known(NAME).resolve().unlink()
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS


def test_download_root_is_the_cache(
    server: FakeHub, tmp_path: Path, tiny: Path, tiny_config: CLIPConfig, know: Know
) -> None:
    weights = (tiny / "model.safetensors").read_bytes()
    files = {"model.safetensors": weights, "config.json": (tiny / "config.json").read_bytes()}
    commit = server.add("owner/name", files)
    know(Source("owner/name", commit, "model.safetensors"), config=tiny_config)
    root = tmp_path / "elsewhere"
    miniclip.load(NAME, "cpu", download_root=root / "known")
    miniclip.load("owner/name", "cpu", download_root=str(root / "repository"))
    assert not server.cache.exists()
    server.unplug()
    miniclip.load(NAME, "cpu", download_root=root / "known")
    miniclip.load("owner/name", "cpu", download_root=str(root / "repository"))
    with pytest.raises(DownloadError, match=re.escape(f"not in the cache ({root})")):
        miniclip.load(NAME, "cpu", download_root=root)


def test_two_threads_download_one_file_into_one_cache(server: FakeHub, pinned: Source) -> None:
    both_asked = threading.Event()

    def before_body() -> None:  # no bytes are sent until the other thread waits for them too
        if len(server.asked("HEAD")) >= 4:
            both_asked.set()
        both_asked.wait(10)

    server.before_body = before_body
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: hub.fetch_known(NAME), range(2))
    assert first == second
    assert first.read_bytes() == WEIGHTS
    assert len(left_in(server.cache)) == 2  # one blob, one link
    assert len(server.asked("HEAD")) == 4


# -- a bad network --------------------------------------------------------------------------------------------------


def test_interrupted_download_is_resumed(
    server: FakeHub, pinned: Source, no_sleep: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.cuts = iter([61_500])
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
    assert [request.range for request in server.requests if request.method == "GET"] == [None, "bytes=61000-"]


def test_download_that_keeps_failing_leaves_nothing(server: FakeHub, pinned: Source, no_sleep: None) -> None:
    server.cuts = itertools.chain([61_500], itertools.repeat(0))
    with pytest.raises(DownloadError, match="could not be downloaded from") as caught:
        hub.fetch_known(NAME)
    assert "pass the path" in one_sentence(caught.value)
    assert left_in(server.cache) == []


def test_file_of_the_wrong_length_is_refused(server: FakeHub, pinned: Source) -> None:
    server.blobs[WEIGHTS_SHA256] = WEIGHTS + b"?"
    with pytest.raises(DownloadError, match="could not be downloaded"):
        hub.fetch_known(NAME)
    assert left_in(server.cache) == []


def test_full_disk_is_reported(server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        hub.fetch_known(NAME)


@pytest.mark.parametrize("name", [NAME, "owner/name"])
def test_offline_error_says_what_to_do_and_makes_no_request(server: FakeHub, pinned: Source, name: str) -> None:
    server.unplug()
    with pytest.raises(DownloadError) as caught:
        miniclip.load(name, "cpu")
    text = one_sentence(caught.value)
    assert text.startswith(
        f"{name} is not in the cache ({server.cache}) and could not be downloaded from {server.url} "
    )
    assert "(HF_HUB_OFFLINE is set); try again online, or pass the path of a folder" in text
    assert server.requests == server.dialled == []


@pytest.mark.parametrize("name", [NAME, "owner/name"])
def test_refused_connection_is_tried_once(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(DownloadError, match="refused") as caught:
        miniclip.load(name, "cpu")
    assert "try again online, or pass the path" in one_sentence(caught.value)
    assert server.dialled == ["127.0.0.1"]


@pytest.mark.parametrize("name", [NAME, "owner/name"])
def test_server_that_does_not_answer_in_time_is_asked_once(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.2)
    server.slow = True
    with pytest.raises(DownloadError, match=r"(?i)time.?out|timed out") as caught:
        miniclip.load(name, "cpu")
    assert "try again online, or pass the path" in one_sentence(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", [NAME, "owner/name"])
@pytest.mark.parametrize(
    "page",
    [
        (200, {"Content-Type": "text/html"}, LOGIN_PAGE),
        (200, {"Content-Type": "text/html", "ETag": '"0"'}, LOGIN_PAGE),
        (302, {"Location": "/login"}, b""),  # an endless redirect
        (511, {}, LOGIN_PAGE),
        (200, {"Content-Type": "application/json"}, b"[]"),
        (200, {"Content-Type": "application/json"}, b"{}"),
    ],
)
def test_login_page_is_not_taken_for_the_hub(
    server: FakeHub, pinned: Source, name: str, page: tuple[int, dict[str, str], bytes]
) -> None:
    server.page = page
    said = "perhaps the login page|HTTP 511|TooManyRedirects" if name == NAME else "is not in the cache"
    with pytest.raises(DownloadError, match=said) as caught:
        miniclip.load(name, "cpu")
    assert name in one_sentence(caught.value)
    assert left_in(server.cache) == []


def test_malformed_endpoint_is_a_download_error(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "nonsense/{repo_id}/resolve/{revision}/{filename}")
    for name in (NAME, "owner/name"):
        with pytest.raises(DownloadError, match="nonsense"):
            miniclip.load(name, "cpu")


# -- xet, the Hub's storage for large files --------------------------------------------------------------------------


@pytest.mark.parametrize("is_pinned", [True, False])
def test_shared_blob_is_checked_by_its_sha256(server: FakeHub, know: Know, is_pinned: bool) -> None:
    """The client moves files from xet to <cache>/blobs, named by a hash that is not sha256, and leaves a link."""
    commit = server.add("first/source", {FILE: WEIGHTS})
    know(Source("first/source", commit, FILE, WEIGHTS_SHA256 if is_pinned else None))
    path = hub.fetch_known(NAME)
    blob = server.cache / "models--first--source" / "blobs" / WEIGHTS_SHA256
    shared = server.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))

    server.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub.fetch_known(NAME) == path
    assert server.requests == []

    flip_a_byte(shared)
    with pytest.warns(UserWarning, match="no longer has its checksum"):
        assert hub.cached_model(NAME) is None
    assert left_in(server.cache) == []  # nor a dangling link
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("sent", [WEIGHTS, b"?" + WEIGHTS[1:], None])
def test_files_from_xet_are_checked_like_others(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch, sent: bytes | None
) -> None:
    """The client's own code for xet, with another transfer: correct, wrong, and interrupted."""
    send = Handler.send

    def with_xet(self: Handler, status: int, headers: dict[str, str], *rest: object) -> None:
        xet = {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": f"{server.url}/refresh"}
        send(self, status, headers | (xet if status == 302 else {}), *rest)

    def xet_get(*, incomplete_path: Path, **options: object) -> None:
        if sent is None:
            raise RuntimeError("CAS service error\n" + 100 * "and so on ")
        Path(incomplete_path).write_bytes(sent)

    monkeypatch.setattr(Handler, "send", with_xet)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.file_download.is_xet_available", lambda: True)
    monkeypatch.setattr("huggingface_hub.file_download.xet_get", xet_get)
    if sent == WEIGHTS:
        assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
        server.forget()
        assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
        assert server.requests == []
    else:
        with pytest.raises(DownloadError, match="wrong checksum" if sent else "CAS service error") as caught:
            hub.fetch_known(NAME)
        one_sentence(caught.value)
        left = [path for path in left_in(server.cache) if path.suffix not in (".lock", ".refs")]
        assert left == []
