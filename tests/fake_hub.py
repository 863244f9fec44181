"""A small Hub on loopback for the real huggingface_hub client, with fixtures and helpers for the tests that use it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import miniclip
from miniclip import CLIPConfig, hub
from miniclip.hub import KnownModel, Source

NAME = "ViT-B/32"  # the known model whose sources the tests replace
FILE = "0_CLIPModel/model.safetensors"
WEIGHTS = random.Random(0).randbytes(100_000)  # for tests that stop before a model is built
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
SMALL = {"config.json": b"{}", "model.safetensors": WEIGHTS}  # a repository for such tests
LOGIN_PAGE = b"<html>Welcome to the hotel</html>"
REFUSALS = [  # HTTP status and X-Error-Code
    *((404, code) for code in ("EntryNotFound", "RevisionNotFound", "RepoNotFound")),
    *((401, "RepoNotFound"), (403, "GatedRepo"), (410, ""), (429, ""), (500, ""), (503, "")),
]


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class FakeHub(ThreadingHTTPServer):
    """Answers as huggingface.co does: revisions, small files, and large files redirected to another host."""

    daemon_threads = True

    def __init__(self, cache: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.trees: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> contents
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.blobs: dict[str, bytes] = {}  # sha256 -> the bytes that the other host sends for it
        self.requests: list[Request] = []
        self.dialled: list[str] = []  # every host that this process looked up
        self.cache = cache  # the cache of this process's client
        # Faults that a test can switch on.
        self.refusals: dict[str, tuple[int, str]] = {}  # part of a path -> status and X-Error-Code
        self.cuts: Iterator[int] = iter(())  # the next bodies end after these numbers of bytes
        self.page: tuple[int, dict[str, str], bytes] | None = None  # the answer to every request, as a login page
        self.slow = False  # every answer takes three seconds
        self.closing = threading.Event()
        self.before_body: Callable[[], object] = lambda: None

    def add(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit with these files and point ``refs`` to it ("main" unless given); returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.trees.setdefault(repo, {})[commit] = files
        for ref in refs or ("main",):
            self.refs.setdefault(repo, {})[ref] = commit
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for name, data in files.items() if is_large(name)}
        return commit

    def asked(self, method: str, part: str = "") -> list[str]:
        """The paths of all requests with this method whose path holds ``part``."""
        return [request.path for request in self.requests if request.method == method and part in request.path]

    def forget(self) -> None:
        self.requests.clear()

    def unplug(self) -> None:
        """Make this process's client work offline, and forget its earlier requests."""
        constants.HF_HUB_OFFLINE = True  # the fixture restores the value
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
        """The commit of a revision, or None after answering that there is no such revision."""
        if repo not in server.trees:  # the Hub answers like this without a token, to hide private repositories
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
    """A Hub on loopback. This process's client uses it, with an empty cache of its own."""
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
        "HF_HUB_DISABLE_TELEMETRY": True,  # otherwise a process's first request fetches a list
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
    """The client resumes a download at once, instead of after a second."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


Know = Callable[..., None]


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Know:
    """A function that gives the known model other sources."""

    def know(*sources: Source, config: CLIPConfig | None = None) -> None:
        monkeypatch.setitem(hub.KNOWN, NAME, KnownModel(config or hub.KNOWN[NAME].config, sources))

    return know


@pytest.fixture
def pinned(server: FakeHub, know: Know) -> Source:
    """The only source of the known model, with its checksum."""
    source = Source("first/source", server.add("first/source", {FILE: WEIGHTS}), FILE, WEIGHTS_SHA256)
    know(source)
    return source


def left_in(cache: Path) -> list[Path]:
    """The files and links in a cache, without its locks and refs."""
    found = [*cache.glob("models--*/blobs/*"), *cache.glob("models--*/snapshots/**/*"), *cache.glob("blobs/*/*")]
    return [path for path in found if path.is_symlink() or not path.is_dir()]


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))  # the clock of some file systems is coarse


def one_sentence(error: BaseException) -> str:
    """The message of an error, checked to be one line of moderate length."""
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    return text


def same(model: miniclip.CLIP, other: miniclip.CLIP) -> bool:
    """Whether two models have equal parameters."""
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
