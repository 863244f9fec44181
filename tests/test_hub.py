"""Downloading: the real huggingface_hub client against a small Hub that the test serves on loopback."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from transformers import CLIPModel

import miniclip
from miniclip import CheckpointError, CLIPConfig, DownloadError, UnknownModelError, hub
from miniclip.hub import KnownModel, Source
from miniclip.huggingface import config_from_dict

REPO = Path(miniclip.__file__).parents[1]
WEIGHTS = random.Random(0).randbytes(100_000)  # for what never reads them
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
NAME = "ViT-B/32"
FILE = "0_CLIPModel/model.safetensors"

# -- the Hub --------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class FakeHub(ThreadingHTTPServer):
    """What the client sees of huggingface.co: revisions, small files, and large ones redirected to another host."""

    daemon_threads = True

    def __init__(self, cache: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.trees: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> contents
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.blobs: dict[str, bytes] = {}  # sha256 -> what the other host sends for it
        self.requests: list[Request] = []
        self.dialled: list[str] = []  # every host that this process looked up
        self.cache = cache  # of this process's client
        # What can go wrong.
        self.refusals: dict[str, tuple[int, str]] = {}  # part of a path -> status and X-Error-Code
        self.cuts: Iterator[int] = iter(())  # after how many bytes the next bodies break off
        self.page: tuple[int, dict[str, str], bytes] | None = None  # a captive portal's answer to everything
        self.slow = False  # answers after three seconds
        self.closing = threading.Event()
        self.before_body: Callable[[], object] = lambda: None

    def add(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
        """A commit with these files, at the tip of ``refs`` ("main" unless given)."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.trees.setdefault(repo, {})[commit] = files
        for ref in refs or ("main",):
            self.refs.setdefault(repo, {})[ref] = commit
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for name, data in files.items() if is_large(name)}
        return commit

    def asked(self, method: str, part: str = "") -> list[str]:
        return [request.path for request in self.requests if request.method == method and part in request.path]

    def forget(self) -> None:
        self.requests.clear()

    def unplug(self) -> None:
        """Make this process's client work offline, and forget what it asked before."""
        constants.HF_HUB_OFFLINE = True  # the fixture puts it back
        self.forget()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(self.server)

    def do_GET(self) -> None:
        self.answer(self.server)

    def answer(self, server: FakeHub) -> None:
        raw = self.path.partition("?")[0]
        path = unquote(raw)
        server.requests.append(Request(self.command, path, self.headers["Range"]))
        if server.slow:
            server.closing.wait(3)
        if server.page:
            self.send(*server.page)
        elif refusal := next((answer for part, answer in server.refusals.items() if part in path), None):
            self.send(refusal[0], {"X-Error-Code": refusal[1]})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/revision/([^/]+)", raw):
            self.send_info(server, match[1], unquote(match[2]))
        elif match := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", raw):
            self.send_file(server, match[1], unquote(match[2]), unquote(match[3]))
        elif match := re.fullmatch("/cdn/([0-9a-f]{64})", raw):
            name = 'inline; filename="model.safetensors";'
            self.send_body(server, {"ETag": '"of the other host"', "Content-Disposition": name}, server.blobs[match[1]])
        else:
            self.send(404, {})

    def commit(self, server: FakeHub, repo: str, revision: str) -> str | None:
        """The commit of a revision; None if it was answered that there is none."""
        if repo not in server.trees:  # as the Hub answers whoever has no token, to hide private ones
            self.send(401, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = server.refs[repo].get(revision, revision)
        if commit not in server.trees[repo]:
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def send_info(self, server: FakeHub, repo: str, revision: str) -> None:
        if commit := self.commit(server, repo, revision):
            siblings = [{"rfilename": name} for name in server.trees[repo][commit]]
            info = {"id": repo, "sha": commit, "siblings": siblings}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def send_file(self, server: FakeHub, repo: str, revision: str, name: str) -> None:
        if not (commit := self.commit(server, repo, revision)):
            return
        headers = {"X-Repo-Commit": commit}
        if (data := server.trees[repo][commit].get(name)) is None:
            self.send(404, headers | {"X-Error-Code": "EntryNotFound"})
        elif is_large(name):
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
            self.send(302, headers | {"Location": f"http://localhost:{server.server_port}/cdn/{sha256}"})
        else:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.send_body(server, headers | {"ETag": f'"{git}"'}, data)

    def send_body(self, server: FakeHub, headers: dict[str, str], data: bytes) -> None:
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        headers["Accept-Ranges"] = "bytes"
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            server.before_body()
        self.send(206 if start else 200, headers, data[start:], next(server.cuts, None))

    def send(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on loopback, and this process's client pointed at it, with an empty cache of its own."""
    home = tmp_path / "home"
    server = FakeHub(home / "hub")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    client = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(server.cache),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,  # else the first request of a process asks for a list of its own
        "HF_HUB_DISABLE_PROGRESS_BARS": None,
        "HF_HUB_DISABLE_SYMLINKS": False,
    }
    for name, value in client.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    look_up = socket.getaddrinfo

    def loopback_only(host: str, *args: object, **options: object) -> object:
        server.dialled.append(host)
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(f"the test asked for {host}")
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", loopback_only)
    huggingface_hub.close_session()
    yield server
    server.closing.set()
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    assert {*server.dialled} <= {"127.0.0.1", "localhost"}
    assert not (tmp_path / "user").exists()


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second before it resumes."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


Know = Callable[..., None]


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Know:
    """Give a known model other sources."""

    def know(*sources: Source, config: CLIPConfig | None = None) -> None:
        monkeypatch.setitem(hub.KNOWN, NAME, KnownModel(config or hub.KNOWN[NAME].config, sources))

    return know


@pytest.fixture
def pinned(server: FakeHub, know: Know) -> Source:
    """The only source of a known model, with its checksum."""
    source = Source("first/source", server.add("first/source", {FILE: WEIGHTS}), FILE, WEIGHTS_SHA256)
    know(source)
    return source


def left_in(cache: Path) -> list[Path]:
    """The files and links of a cache, without its locks and notes."""
    found = [*cache.glob("models--*/blobs/*"), *cache.glob("models--*/snapshots/**/*"), *cache.glob("blobs/*/*")]
    return [path for path in found if path.is_symlink() or not path.is_dir()]


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))  # some file systems' clocks tick slowly


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    return text


def same(model: miniclip.CLIP, other: miniclip.CLIP) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# -- the table ------------------------------------------------------------------------------------------------------

# As it was read from the Hub: repository, commit, file, sha256 and megabytes where they were seen.
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


def test_the_table_is_what_was_read_from_the_hub() -> None:
    rows: dict[str, tuple[Source, ...]] = {}
    for name, repo, revision, file, sha256, size in map(str.split, TABLE.strip().splitlines()):
        source = Source(repo, revision, file, SHA256.get(sha256), None if size == "-" else int(size))
        rows[name] = (*rows.get(name, ()), source)
    assert {name: model.sources for name, model in hub.KNOWN.items()} == rows
    assert miniclip.available_models() == [*rows, "demo"]


def test_revisions_are_commits_and_checksums_are_sha256() -> None:
    for name, model in hub.KNOWN.items():
        for source in model.sources:
            if name != "ViT-L/14@336px":  # whose commit is not known
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


def test_every_source_typed_as_a_repository_is_the_model_it_serves() -> None:
    for name, model in hub.KNOWN.items():
        for source in model.sources:
            assert hub.ALIASES[source.repo] == name


# -- a known model --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def tiny_config(tiny: Path) -> CLIPConfig:
    return config_from_dict(json.loads((tiny / "config.json").read_text()))


def test_a_known_model_is_downloaded_with_a_progress_bar_then_found_without_a_request(
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


def test_the_checksum_is_computed_once(server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: counted.append(args) or digest(*args))
    path = hub.fetch_known(NAME)
    assert len(counted) == 1
    assert hub.fetch_known(NAME) == hub.cached_model(NAME) == path
    assert len(counted) == 1
    os.utime(path, ns=(0, 0))  # looks like another file, is the same
    assert hub.fetch_known(NAME) == path
    assert len(counted) == 2


REFUSALS = [
    *((404, code) for code in ("EntryNotFound", "RevisionNotFound", "RepoNotFound")),
    *((401, "RepoNotFound"), (403, "GatedRepo"), (410, ""), (429, ""), (500, ""), (503, "")),
]


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_source_that_refuses_is_followed_by_the_next(
    server: FakeHub, pinned: Source, know: Know, status: int, code: str
) -> None:
    commit = server.add("second/source", {"model.safetensors": WEIGHTS})
    know(pinned, Source("second/source", commit, "model.safetensors"))
    server.refusals["/first/source"] = (status, code)
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
    assert len(server.asked("HEAD", "/first/source")) == 1  # and not again and again
    server.forget()
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
    assert server.requests == []


def test_when_all_sources_refuse_all_are_named(server: FakeHub, pinned: Source, know: Know) -> None:
    know(pinned, Source("second/source", "0" * 40, FILE), Source("third/source", "0" * 40, FILE))
    server.refusals |= {"first/source": (404, "EntryNotFound"), "second/source": (503, "")}
    with pytest.raises(DownloadError) as caught:
        hub.fetch_known(NAME)
    text = one_sentence(caught.value)
    assert f"none of the sources of {NAME} gave it: first/source (HTTP 404), second/source (HTTP 503)" in text
    assert "third/source (HTTP 401; a private or gated one needs a valid token in HF_TOKEN); try again later" in text
    assert left_in(server.cache) == []


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    server: FakeHub, know: Know, monkeypatch: pytest.MonkeyPatch, is_pinned: bool, links: bool
) -> None:
    """The pinned one; without it, the one the Hub reports; also where the cache has no links (as on Windows)."""
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


def test_a_pin_is_believed_rather_than_the_hub(server: FakeHub, know: Know) -> None:
    other = b"?" + WEIGHTS[1:]
    know(Source("first/source", server.add("first/source", {FILE: other}), FILE, WEIGHTS_SHA256))
    with pytest.raises(DownloadError, match="wrong checksum"):
        hub.fetch_known(NAME)
    assert left_in(server.cache) == []


def test_a_file_damaged_in_the_cache_is_fetched_again(server: FakeHub, pinned: Source) -> None:
    path = hub.fetch_known(NAME)
    flip_a_byte(path)
    with pytest.warns(UserWarning, match="no longer has its checksum"):
        again = hub.fetch_known(NAME)
    assert again.read_bytes() == WEIGHTS
    assert len(server.asked("GET", "/cdn/")) == 2


def test_a_file_damaged_in_the_cache_is_not_used_offline(server: FakeHub, pinned: Source) -> None:
    flip_a_byte(hub.fetch_known(NAME))
    server.unplug()
    with pytest.warns(UserWarning, match="no longer has its checksum"), pytest.raises(DownloadError, match="is not in"):
        hub.fetch_known(NAME)
    assert left_in(server.cache) == []


def test_a_link_whose_blob_is_gone_is_fetched_again(server: FakeHub, pinned: Source) -> None:
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


def test_two_threads_fetch_one_file_into_one_cache(server: FakeHub, pinned: Source) -> None:
    both_asked = threading.Event()

    def before_body() -> None:  # no bytes before the other one has come to the same point
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


# -- a bad line -----------------------------------------------------------------------------------------------------


def test_a_cut_download_is_resumed(
    server: FakeHub, pinned: Source, no_sleep: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.cuts = iter([61_500])
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS
    assert [request.range for request in server.requests if request.method == "GET"] == [None, "bytes=61000-"]


def test_a_download_that_stays_cut_leaves_nothing(server: FakeHub, pinned: Source, no_sleep: None) -> None:
    server.cuts = itertools.chain([61_500], itertools.repeat(0))
    with pytest.raises(DownloadError, match="could not be downloaded from") as caught:
        hub.fetch_known(NAME)
    assert "pass the path" in one_sentence(caught.value)
    assert left_in(server.cache) == []


def test_a_file_of_another_length_is_refused(server: FakeHub, pinned: Source) -> None:
    server.blobs[WEIGHTS_SHA256] = WEIGHTS + b"?"
    with pytest.raises(DownloadError, match="could not be downloaded"):
        hub.fetch_known(NAME)
    assert left_in(server.cache) == []


def test_a_full_disk_says_so(server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        hub.fetch_known(NAME)


@pytest.mark.parametrize("name", [NAME, "owner/name"])
def test_offline_with_an_empty_cache_says_what_to_do_and_asks_nobody(
    server: FakeHub, pinned: Source, name: str
) -> None:
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
def test_a_refused_connection_is_tried_once(
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
def test_a_server_that_does_not_answer_in_time_is_asked_once(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.2)
    server.slow = True
    with pytest.raises(DownloadError, match=r"(?i)time.?out|timed out") as caught:
        miniclip.load(name, "cpu")
    assert "try again online, or pass the path" in one_sentence(caught.value)
    assert len(server.requests) == 1


LOGIN = b"<html>Welcome to the hotel</html>"


@pytest.mark.parametrize("name", [NAME, "owner/name"])
@pytest.mark.parametrize(
    "page",
    [
        (200, {"Content-Type": "text/html"}, LOGIN),
        (200, {"Content-Type": "text/html", "ETag": '"0"'}, LOGIN),
        (302, {"Location": "/login"}, b""),  # and so on for ever
        (511, {}, LOGIN),
        (200, {"Content-Type": "application/json"}, b"[]"),
        (200, {"Content-Type": "application/json"}, b"{}"),
    ],
)
def test_a_login_page_is_not_taken_for_the_hub(
    server: FakeHub, pinned: Source, name: str, page: tuple[int, dict[str, str], bytes]
) -> None:
    server.page = page
    said = "perhaps the login page|HTTP 511|TooManyRedirects" if name == NAME else "is not in the cache"
    with pytest.raises(DownloadError, match=said) as caught:
        miniclip.load(name, "cpu")
    assert name in one_sentence(caught.value)
    assert left_in(server.cache) == []


def test_an_endpoint_that_is_no_url_is_a_download_error(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "nonsense/{repo_id}/resolve/{revision}/{filename}")
    for name in (NAME, "owner/name"):
        with pytest.raises(DownloadError, match="nonsense"):
            miniclip.load(name, "cpu")


# -- xet, by which the Hub stores large files -----------------------------------------------------------------------


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_blob_that_repositories_share_is_known_by_its_own_checksum(
    server: FakeHub, know: Know, is_pinned: bool
) -> None:
    """The client moves what came by xet to <cache>/blobs, named by another hash than sha256, and leaves a link."""
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
    assert left_in(server.cache) == []  # neither a link to nothing
    assert hub.fetch_known(NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("sent", [WEIGHTS, b"?" + WEIGHTS[1:], None])
def test_files_come_by_xet(
    server: FakeHub, pinned: Source, monkeypatch: pytest.MonkeyPatch, sent: bytes | None
) -> None:
    """With the client's own xet, but for the transfer: right, wrong, and broken off."""
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


# -- a repository ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny: Path) -> dict[str, bytes]:
    """A repository as Hugging Face's own tools write it, with what miniclip does not need."""
    settings = {"image_processor_type": "CLIPImageProcessor", "crop_size": 32, "size": {"shortest_edge": 40}}
    return {
        "README.md": b"# A model",
        "config.json": (tiny / "config.json").read_bytes(),
        "model.safetensors": (tiny / "model.safetensors").read_bytes(),
        "preprocessor_config.json": json.dumps(settings).encode(),
        "pytorch_model.bin": b"\x80\x04.",
    }


@pytest.fixture
def sharded(reference: CLIPModel, tmp_path: Path) -> dict[str, bytes]:
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="5MB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert len([name for name in files if is_large(name)]) > 1
    return files


# For what stops before reading them.
SMALL = {"config.json": b"{}", "model.safetensors": WEIGHTS}


def test_a_hugging_face_repository(server: FakeHub, tiny: Path, folder: dict[str, bytes]) -> None:
    commit = server.add("owner/name", folder)
    model, preprocess = miniclip.load("owner/name", "cpu")
    assert same(model, miniclip.load(tiny, "cpu")[0])
    assert preprocess.shortest_edge == 40
    # every file by the one commit, and only what is needed
    needed = ("config.json", "model.safetensors", "preprocessor_config.json")
    asked = {path for path in server.asked("HEAD") if "/resolve/" in path}
    assert asked == {f"/owner/name/resolve/{commit}/{name}" for name in needed}
    server.forget()
    miniclip.load("owner/name", "cpu")
    assert [request.path for request in server.requests] == ["/api/models/owner/name/revision/main"]


def test_the_settings_that_new_versions_of_transformers_write_come_too(
    server: FakeHub, folder: dict[str, bytes]
) -> None:
    settings = json.loads(folder.pop("preprocessor_config.json"))
    server.add("owner/name", folder | {"processor_config.json": json.dumps({"image_processor": settings}).encode()})
    assert miniclip.load("owner/name", "cpu")[1].shortest_edge == 40


def test_a_sharded_repository(server: FakeHub, tiny: Path, sharded: dict[str, bytes]) -> None:
    server.add("owner/name", sharded)
    model = miniclip.load("owner/name", "cpu")[0]
    assert same(model, miniclip.load(tiny, "cpu")[0])
    server.unplug()
    assert same(model, miniclip.load("owner/name", "cpu")[0])
    # without one of its shards, that is no cached repository
    next(path for path in hub.fetch_repository("owner/name").iterdir() if is_large(path.name)).unlink()
    with pytest.raises(DownloadError, match="owner/name is not in the cache"):
        miniclip.load("owner/name", "cpu")
    assert server.requests == []


def test_an_open_clip_repository(server: FakeHub, tiny: Path) -> None:
    expected = miniclip.load(tiny, "cpu")[0]
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16, "mlp_ratio": 2.5}
    text = {"width": 48, "layers": 2, "heads": 3, "mlp_ratio": 2.0}
    model_cfg = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    files = {
        "open_clip_config.json": json.dumps(config).encode(),
        "open_clip_model.safetensors": safetensors.torch.save(expected.state_dict()),
        # as in timm's repositories: the image tower alone, under names that are no CLIP's, and timm's configuration
        "model.safetensors": safetensors.torch.save({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}),
        "config.json": json.dumps({"architecture": "vit_tiny"}).encode(),
    }
    server.add("owner/name", files)
    model, preprocess = miniclip.load("owner/name", "cpu")
    assert same(model, expected)
    assert preprocess.mean == (0.1, 0.2, 0.3)
    assert len(server.asked("GET", "/cdn/")) == 1


def test_a_revision_is_a_branch_a_tag_or_a_commit(server: FakeHub, folder: dict[str, bytes]) -> None:
    settings = json.loads(folder["preprocessor_config.json"])
    old = server.add("owner/name", folder, "v1", "refs/pr/15")
    settings["size"]["shortest_edge"] = 48
    new = server.add("owner/name", folder | {"preprocessor_config.json": json.dumps(settings).encode()}, "main")

    def edges() -> list[int | None]:
        names = ["owner/name", "owner/name@v1", "owner/name@refs/pr/15", f"owner/name@{old}", f"owner/name@{new}"]
        return [miniclip.load(name, "cpu")[1].shortest_edge for name in names]

    assert edges() == [48, 40, 40, 40, 48]
    assert len(server.asked("GET", "/cdn/")) == 1  # the weights are the same
    server.unplug()
    assert edges() == [48, 40, 40, 40, 48]
    assert server.requests == []
    with pytest.raises(DownloadError, match="owner/name is not in the cache"):
        miniclip.load("owner/name@v2", "cpu")


def test_a_branch_that_moves_is_followed_once_all_of_its_files_are_there(server: FakeHub) -> None:
    old = server.add("owner/name", SMALL)
    assert hub.fetch_repository("owner/name").name == old
    newer = b"?" + WEIGHTS[1:]
    new = server.add("owner/name", SMALL | {"model.safetensors": newer})
    server.refusals["/cdn/"] = (500, "")
    with pytest.raises(DownloadError, match=r"owner/name: model\.safetensors cannot be had \(HTTP 500"):
        hub.fetch_repository("owner/name")
    server.refusals["/api/"] = (500, "")  # and then nothing answers any more: what was complete is still there
    assert hub.fetch_repository("owner/name").name == old
    server.refusals.clear()
    assert hub.fetch_repository("owner/name").name == new
    server.unplug()
    assert (hub.fetch_repository("owner/name") / "model.safetensors").read_bytes() == newer


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_cached_repository_is_used_when_the_hub_refuses(server: FakeHub, status: int, code: str) -> None:
    server.add("owner/name", SMALL)
    path = hub.fetch_repository("owner/name")
    server.refusals["/api/"] = (status, code)
    assert hub.fetch_repository("owner/name") == path


def test_a_cached_repository_is_used_behind_a_login_page(server: FakeHub) -> None:
    server.add("owner/name", SMALL)
    path = hub.fetch_repository("owner/name")
    server.page = (200, {"Content-Type": "text/html"}, LOGIN)
    assert hub.fetch_repository("owner/name") == path


def test_a_repository_damaged_in_the_cache_is_fetched_again(server: FakeHub) -> None:
    server.add("owner/name", SMALL)
    weights = hub.fetch_repository("owner/name") / "model.safetensors"
    flip_a_byte(weights)
    with pytest.warns(UserWarning, match="no longer has its checksum"):
        hub.fetch_repository("owner/name")
    assert weights.read_bytes() == WEIGHTS
    flip_a_byte(weights)
    server.unplug()
    with pytest.warns(UserWarning, match="no longer"), pytest.raises(DownloadError, match="owner/name is not in the"):
        hub.fetch_repository("owner/name")
    assert [path.name for path in left_in(server.cache) if path.is_symlink()] == ["config.json"]


def test_a_shard_with_the_wrong_checksum_is_refused(server: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors"}}).encode()
    server.add("owner/name", {"model.safetensors.index.json": index, "one.safetensors": WEIGHTS})
    server.blobs[WEIGHTS_SHA256] = b"?" + WEIGHTS[1:]
    with pytest.raises(DownloadError, match=r"one\.safetensors of owner/name arrived with the wrong checksum"):
        miniclip.load("owner/name", "cpu")
    assert WEIGHTS_SHA256 not in [path.name for path in left_in(server.cache)]


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["config.json", "open_clip_pytorch_model.bin", "README.md"]])
def test_a_repository_of_pickles_is_refused_before_it_is_downloaded(server: FakeHub, files: list[str]) -> None:
    server.add("owner/name", dict.fromkeys(files, b"\x80\x04."))
    with pytest.raises(CheckpointError, match=r"owner/name: has no safetensors; .* is a pickle") as caught:
        miniclip.load("owner/name", "cpu")
    assert "Convert it once: safetensors.torch.save_file" in str(caught.value)
    assert [request.path for request in server.requests] == ["/api/models/owner/name/revision/main"]


def test_a_repository_without_weights_is_refused(server: FakeHub) -> None:
    server.add("owner/name", {"README.md": b"# A data set"})
    with pytest.raises(CheckpointError, match=r"owner/name: holds no weights; expected one of model\.safetensors"):
        miniclip.load("owner/name", "cpu")


@pytest.mark.parametrize(("status", "code"), [(400, ""), (401, "RepoNotFound"), (403, "GatedRepo"), (404, "")])
def test_an_unknown_repository_lists_what_is_known(server: FakeHub, status: int, code: str) -> None:
    server.refusals["/api/models/nobody/nothing"] = (status, code)
    with pytest.raises(UnknownModelError) as caught:
        miniclip.load("nobody/nothing", "cpu")
    text = one_sentence(caught.value)
    assert "'nobody/nothing'" in text
    assert all(name in text for name in miniclip.available_models())
    assert f"HTTP {status}" in text
    assert ("HF_TOKEN" in text) == (status in (401, 403))
    assert left_in(server.cache) == []


def test_an_unknown_revision_is_named(server: FakeHub) -> None:
    server.add("owner/name", SMALL)
    with pytest.raises(UnknownModelError, match=r"'owner/name' is neither .* at revision 'v2' \(HTTP 404\)"):
        miniclip.load("owner/name@v2", "cpu")


def test_a_name_no_repository_can_have_is_unknown(server: FakeHub) -> None:
    with pytest.raises(UnknownModelError, match="'owner/na--me' is neither"):
        miniclip.load("owner/na--me", "cpu")
    server.unplug()
    with pytest.raises(UnknownModelError, match="'owner/na--me' is neither"):
        miniclip.load("owner/na--me", "cpu")
    assert server.requests == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_hub_in_trouble_is_no_unknown_model(server: FakeHub, status: int) -> None:
    server.refusals["/api/"] = (status, "")
    with pytest.raises(DownloadError, match=rf"^owner/name is not in .* \(HTTP {status}\); try again") as caught:
        miniclip.load("owner/name", "cpu")
    one_sentence(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_wants_a_token(server: FakeHub, status: int) -> None:
    """Its list of files is public, they are not."""
    server.add("owner/name", SMALL)
    server.refusals["/resolve/"] = (status, "GatedRepo")
    with pytest.raises(DownloadError) as caught:
        miniclip.load("owner/name", "cpu")
    assert one_sentence(caught.value) == (
        f"owner/name: config.json cannot be had (HTTP {status}; a private or gated one needs a valid token in HF_TOKEN)"
    )


@pytest.mark.parametrize("shard", ["../x.safetensors", "..", "/tmp/x.safetensors", "a/../../x.safetensors", "x.bin"])
def test_an_index_that_leaves_its_folder_is_refused(server: FakeHub, shard: str) -> None:
    index = json.dumps({"weight_map": {"visual.proj": shard}}).encode()
    server.add("owner/name", {"model.safetensors.index.json": index, shard: WEIGHTS})
    with pytest.raises(CheckpointError, match=r"leaves the folder|is a pickle"):
        miniclip.load("owner/name", "cpu")
    assert {Path(path).name for path in server.asked("HEAD")} == {"model.safetensors.index.json"}


@pytest.mark.parametrize("index", [b"[]", b"{}", b"not json", b'{"weight_map": ["one.safetensors"]}'])
def test_an_index_that_is_none_is_refused(server: FakeHub, index: bytes) -> None:
    server.add("owner/name", {"model.safetensors.index.json": index})
    with pytest.raises((CheckpointError, miniclip.ConfigError), match=r"model\.safetensors\.index\.json"):
        miniclip.load("owner/name", "cpu")


def test_a_shard_the_repository_lacks_is_named(server: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "gone.safetensors"}}).encode()
    server.add("owner/name", {"model.safetensors.index.json": index, "one.safetensors": WEIGHTS})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors'? is missing"):
        miniclip.load("owner/name", "cpu")


@pytest.mark.parametrize("alias", hub.ALIASES)
def test_repositories_typed_by_habit_are_the_pinned_sources(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, alias: str
) -> None:
    assert hub.ALIASES[alias] in hub.KNOWN
    server.add(alias, {"pytorch_model.bin": b"\x80\x04."})  # what main has to offer
    commit = server.add("pinned/source", {"model.safetensors": WEIGHTS})
    known = KnownModel(hub.KNOWN[NAME].config, (Source("pinned/source", commit, "model.safetensors", WEIGHTS_SHA256),))
    monkeypatch.setitem(hub.KNOWN, hub.ALIASES[alias], known)
    with pytest.raises(CheckpointError, match="models--pinned--source"):  # these bytes are no safetensors
        miniclip.load(alias, "cpu")
    assert {request.path for request in server.requests} == {
        f"/pinned/source/resolve/{commit}/model.safetensors",
        f"/cdn/{WEIGHTS_SHA256}",
    }


# -- as a user does -------------------------------------------------------------------------------------------------


def test_environment_variables_are_all_it_takes(server: FakeHub, tmp_path: Path, folder: dict[str, bytes]) -> None:
    server.add("owner/name", folder)
    program = "import miniclip; print(miniclip.load('owner/name', 'cpu')[0].text_projection.sum().item())"

    def run(**variables: str) -> str:
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPO, env=inherited | own | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    assert "/owner/name/resolve/" in server.asked("HEAD")[0]
    assert list((tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots").rglob("model.safetensors"))
    server.forget()
    assert run(HF_HUB_OFFLINE="1") == first
    assert server.requests == []
