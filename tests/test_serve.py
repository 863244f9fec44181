"""``miniclip serve``: its answers equal the library's, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, make_image
from PIL import Image
from starlette import testclient as starlette

import miniclip
from miniclip import gallery, serve, web_app
from miniclip.gallery import Gallery
from miniclip.html_page import THUMBNAIL
from miniclip.web_app import make_app

HOST = {"host": "127.0.0.1:7860"}
NASTY = '<img src=x onerror="alert(1)">.png'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos = tmp_path_factory.mktemp("library") / "photos"
    for n in range(20):
        make_image(photos / f"{n:02}.png", n)
    make_image(photos / NASTY, 30)
    for name in ("cat", "pizza"):
        (photos / f"{name}.png").write_bytes((ROOT / "examples" / "images" / f"{name}.png").read_bytes())
    miniclip.embed_images(photos, photos.parent / "vectors", "demo", device="cpu")
    return photos.parent / "vectors"


@pytest.fixture(scope="module")
def library(folder: Path) -> Gallery:
    return Gallery(folder)


@pytest.fixture
def client(library: Gallery) -> Iterator[Any]:
    with starlette.TestClient(make_app(library), headers=HOST, base_url="http://127.0.0.1:7860") as client:
        yield client


def png(path: Path) -> bytes:
    return path.read_bytes()


def found(client: Any, **parameters: object) -> list[dict[str, Any]]:
    answer = client.get("/api/search", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_a_search_equals_that_of_the_library(client: Any, library: Gallery) -> None:
    expected = library.index.search(["a pizza", "food"], without=["a cat"], k=23)
    results = found(client, text=["a pizza", "food"], **{"not": "a cat"})
    assert [(row["row"], row["path"]) for row in results] == [(match.row, match.path) for match in expected]
    assert [row["score"] for row in results] == [round(match.score, 4) for match in expected]
    assert [row["row"] for row in found(client, text="a pizza", offset=5, count=4)] == [
        match.row for match in library.index.search("a pizza", k=9)[5:]
    ]


def test_an_image_and_a_row_are_queries(client: Any, library: Gallery) -> None:
    cat = ROOT / "examples" / "images" / "cat.png"
    answer = client.post("/api/search", content=png(cat), params={"count": 1})
    assert os.path.basename(answer.json()["results"][0]["path"]) == "cat.png"
    row = answer.json()["results"][0]["row"]
    first, second = found(client, row=row, count=2)
    assert first["row"] == row
    expected = library.index.nearest(library.index.vector(row), 2)[1]
    assert second["row"] == expected.row


def test_a_dropped_image_is_classified_as_the_library_does(client: Any) -> None:
    cat = ROOT / "examples" / "images" / "cat.png"
    answer = client.post("/api/classify", content=png(cat), params={"label": ["cat", "pizza", "guitar"]})
    classifier = miniclip.ZeroShotClassifier(*miniclip.load("demo", "cpu"), ["cat", "pizza", "guitar"])
    expected = classifier(miniclip.open_image(cat))
    shown = [(row["label"], pytest.approx(row["probability"], abs=1e-6)) for row in answer.json()["labels"]]
    assert expected == shown


def test_images_are_sent_as_jpegs_of_a_bounded_size(client: Any, library: Gallery) -> None:
    row = found(client, text="a cat", count=1)[0]["row"]
    for address, most in ((f"/thumbnail/{row}", 320), (f"/image/{row}", 2048)):
        answer = client.get(address)
        assert answer.headers["content-type"] == "image/jpeg"
        image = Image.open(io.BytesIO(answer.content))
        assert image.format == "JPEG"
        assert max(image.size) <= most


def test_a_file_that_is_gone_is_a_404(tmp_path: Path) -> None:
    make_image(tmp_path / "photos" / "a.png", 1)
    make_image(tmp_path / "photos" / "b.png", 2)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "v", "demo", device="cpu")
    library = Gallery(tmp_path / "v")
    (tmp_path / "photos" / "a.png").unlink()
    with starlette.TestClient(make_app(library), headers=HOST) as client:
        rows = {os.path.basename(row["path"]): row["row"] for row in found(client, text="x")}
        assert client.get(f"/thumbnail/{rows['a.png']}").status_code == 404
        assert client.get(f"/thumbnail/{rows['b.png']}").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[::1].evil"])
def test_other_hosts_are_refused(host: str, library: Gallery) -> None:
    with starlette.TestClient(make_app(library)) as client:
        answer = client.get("/api/search", params={"text": "a cat"}, headers={"host": host})
        assert answer.status_code == 421
        assert "results" not in answer.json()


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"])
def test_this_computer_is_answered(host: str, library: Gallery) -> None:
    with starlette.TestClient(make_app(library)) as client:
        assert client.get("/api/index", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ],
)
def test_other_sites_are_refused(headers: dict[str, str], client: Any) -> None:
    assert client.get("/api/search", params={"text": "a"}, headers=headers).status_code == 403
    assert "access-control-allow-origin" not in client.get("/api/index").headers


def test_every_answer_carries_the_policy(client: Any) -> None:
    for address in ("/", "/static/app.js", "/api/index", "/thumbnail/0", "/nothing", "/thumbnail/999999"):
        headers = client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "address",
    [
        *("/thumbnail/../manifest.json", "/image/-1", "/image/999999", "/thumbnail/a", "/static/../serve.py"),
        *(
            "/static/%2e%2e/serve.py",
            "/static//etc/passwd",
            "/image/%2Fetc%2Fpasswd",
            "/manifest.json",
            "/photos/00.png",
        ),
    ],
)
def test_only_rows_are_served(address: str, client: Any) -> None:
    answer = client.get(address)
    assert answer.status_code in (400, 404)
    assert b"root:" not in answer.content
    assert b"weights_sha256" not in answer.content


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "the query is empty"),
        ({"text": " "}, "the query is empty"),
        ({"row": "x"}, "row must be a number"),
        ({"row": "9999"}, "row 9,999 does not exist"),
        ({"text": "a", "count": "100000"}, "count must be a number from 1 to 200"),
        ({"text": "a", "offset": "-1"}, "offset must be a number"),
        ({"text": ["a"] * 20}, "at most 16 texts"),
        ({"text": "word " * 200}, "77"),
        ({"text": "a cat", "not": "a cat"}, "cancels itself out"),
    ],
)
def test_wrong_queries_get_one_sentence(parameters: dict[str, Any], said: str, client: Any) -> None:
    answer = client.get("/api/search", params=parameters)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_uploads_are_bounded(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.post("/api/search", content=b"this is not an image")
    assert (answer.status_code, "not an image" in answer.json()["error"]) == (400, True)
    monkeypatch.setattr(web_app, "MAX_UPLOAD", 1000)
    answer = client.post("/api/search", content=bytes(1001))
    assert (answer.status_code, "larger than" in answer.json()["error"]) == (400, True)
    answer = client.post("/api/classify", content=b"", params={"label": ["a", "b"]})
    assert "send an image" in answer.json()["error"]
    answer = client.post("/api/classify", content=b"x", params={"label": ["a"]})
    assert "2 to 200 labels" in answer.json()["error"]


def test_a_token_is_needed_where_one_is_set(library: Gallery) -> None:
    app = make_app(library, web_app.LOOPBACK, "secret")
    with starlette.TestClient(app, base_url="http://127.0.0.1:7860") as client:
        assert client.get("/api/index").status_code == 401
        assert client.get("/api/index", params={"token": "wrong"}).status_code == 401
        assert client.get("/api/index", headers={"authorization": "Bearer secret"}).status_code == 200
        client.cookies.clear()
        assert client.get("/", params={"token": "secret"}).status_code == 200
        assert client.get("/api/index").status_code == 200  # by the cookie
    with pytest.raises(miniclip.InputError, match="needs --token"):
        serve.serve(Path(), "0.0.0.0", 0, None, None, print)
    for wrong in ("", "a b", "a;b", "a\nb", "ä"):
        with pytest.raises(miniclip.InputError, match="token"):
            serve.serve(Path(), "0.0.0.0", 0, wrong, None, print)


def test_sixteen_clients_get_their_own_answers(client: Any) -> None:
    texts = [
        f"{colour} {thing}" for colour in ("red", "blue", "green", "a") for thing in ("cat", "pizza", "car", "house")
    ]
    alone = {text: found(client, text=text) for text in texts}
    together: dict[str, list[list[dict[str, Any]]]] = {text: [] for text in texts}

    def ask(text: str) -> None:
        for _ in range(3):
            together[text].append(found(client, text=text))

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {text: [results] * 3 for text, results in alone.items()}
    assert len({json.dumps(results) for results in alone.values()}) > 8  # the mutation: mixed answers would differ


def test_thumbnails_are_kept_up_to_a_limit(library: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    data = library.jpeg(0, THUMBNAIL)
    decoded = []
    decode = gallery.decode_image
    monkeypatch.setattr(gallery, "decode_image", lambda *arguments: decoded.append(1) or decode(*arguments))
    assert library.jpeg(0, THUMBNAIL) == data
    assert not decoded
    monkeypatch.setattr(gallery, "CACHE_BYTES", 3 * len(data))
    for row in range(20):
        library.jpeg(row, THUMBNAIL)
    assert library._cached <= 3 * len(data)
    assert library._cached == sum(map(len, library._thumbnails.values()))
    assert torch.is_tensor(library.index.vector(0))
