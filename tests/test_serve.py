"""``miniclip serve``: its answers equal the library's, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from helpers import ROOT, make_image
from PIL import Image
from starlette import testclient as starlette

import miniclip
from miniclip import gallery, html_page, planning, serve, store, web_app
from miniclip.cli import main
from miniclip.gallery import Gallery
from miniclip.html_page import THUMBNAIL
from miniclip.live_index import LiveIndex, View
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


def generation(client: Any) -> str:
    return client.get("/api/index").json()["generation"]


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
    first, second = found(client, row=row, generation=answer.json()["generation"], count=2)
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
    row = f"{generation(client)}/{found(client, text='a cat', count=1)[0]['row']}"
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
        start = f"/thumbnail/{generation(client)}"
        assert client.get(f"{start}/{rows['a.png']}").status_code == 404
        assert client.get(f"{start}/{rows['b.png']}").status_code == 200


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
    for address in (
        "/",
        "/static/app.js",
        "/api/index",
        "/thumbnail/0",
        "/nothing",
        "/thumbnail/x/0",
        "/thumbnail/x/y",
    ):
        headers = client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "address",
    [
        *("/thumbnail/../manifest.json", "/image/0", "/thumbnail/a", "/static/../serve.py"),
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
        ({"row": "9" * 5000}, "row must be a number"),
        ({"row": "1"}, "a row needs the generation"),
        ({"text": "a", "count": "100000"}, "count must be a number from 1 to 200"),
        ({"text": "a", "offset": "-1"}, "offset must be a number"),
        ({"text": ["a"] * 20}, "at most 16 texts"),
        ({"text": "word " * 200}, "the context holds 77: use fewer words"),
        ({"text": "a cat", "not": "a cat"}, "cancels itself out"),
    ],
)
def test_wrong_queries_get_one_sentence(parameters: dict[str, Any], said: str, client: Any) -> None:
    answer = client.get("/api/search", params=parameters)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_label_that_is_too_long_gets_one_sentence(client: Any, library: Gallery) -> None:
    body = png(Path(library.index.paths(range(1))[0]))
    answer = client.post("/api/classify", params={"label": ["a cat", "word " * 100]}, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"].endswith("the context holds 77: use fewer words")


def test_unknown_addresses_and_other_methods_get_one_sentence(client: Any) -> None:
    for answer, status in ((client.get("/nowhere"), 404), (client.put("/api/search"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"] in ("Not Found", "Method Not Allowed")


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
    now = library.about()["generation"]
    data = library.jpeg(now, 0, THUMBNAIL)
    decoded = []
    decode = gallery.decode_image
    monkeypatch.setattr(gallery, "decode_image", lambda *arguments: decoded.append(1) or decode(*arguments))
    assert library.jpeg(now, 0, THUMBNAIL) == data
    assert not decoded
    monkeypatch.setattr(gallery, "CACHE_BYTES", 3 * len(data))
    for row in range(20):
        library.jpeg(now, row, THUMBNAIL)
    assert library._cached <= 3 * len(data)
    assert library._cached == sum(map(len, library._thumbnails.values()))
    assert torch.is_tensor(library.index.vector(0))


# -- rows, numbers and hosts ------------------------------------------------------------------------------------------


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def stored(library: Gallery) -> torch.Tensor:
    """The vectors of all rows, scaled to length 1."""
    rows = torch.cat([torch.from_numpy(part) for part in library.index.vectors()]).double()
    return rows / rows.norm(dim=1, keepdim=True)


def test_more_like_this_but_without_something(client: Any, library: Gallery) -> None:
    """The query is the row's vector, plus those of the texts, minus those of the not-field, summed here by hand."""
    model, _ = miniclip.load("demo", "cpu")
    text, without = (unit(model.encode_text(miniclip.tokenize(each))[0].double()) for each in ("a pizza", "a cat"))
    rows = stored(library)
    start = rows[7]
    for parameters, total in (
        ({"not": "a cat"}, start - without),
        ({"text": "a pizza"}, start + text),
        ({"text": "a pizza", "not": "a cat"}, start + text - without),
    ):
        results = found(client, row=7, generation=generation(client), **parameters)
        scores = rows @ unit(total)
        assert [row["score"] for row in results] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=2e-3)
        assert results[0]["row"] == scores.argmax()


def test_an_image_and_a_row_are_added(client: Any, library: Gallery) -> None:
    cat = ROOT / "examples" / "images" / "cat.png"
    answer = client.post("/api/search", content=png(cat), params={"row": 3, "generation": generation(client)})
    rows = stored(library)
    its_row = next(row["row"] for row in answer.json()["results"] if row["path"].endswith("/cat.png"))
    expected = sorted((rows @ unit(rows[3] + rows[its_row])).tolist(), reverse=True)
    assert [row["score"] for row in answer.json()["results"]] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("row", ["9" * 5000, "-1", "1.5", "²", "999999", "9" * 19])
def test_a_row_that_is_not_there_is_a_404(row: str, client: Any) -> None:
    for kind in ("thumbnail", "image"):
        answer = client.get(f"/{kind}/{generation(client)}/{row}")
        assert answer.status_code == 404
        assert "row" in answer.json()["error"]


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_out_of_range_is_one_sentence(port: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["serve", str(folder), "--port", port]) == 1
    assert capsys.readouterr().err == f"miniclip: --port must be a number from 0 to 65535, got {port}\n"


def test_a_port_that_is_taken_is_one_sentence(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"miniclip: port {port} of 127.0.0.1 cannot be used (")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("LOCALHOST", "LocalHost:1"),
        ("MyPC", "mypc"),
        ("MyPC", "MYPC:7860"),
        ("0.0.0.0", "192.0.2.7:7860"),
        ("0.0.0.0", "mypc.lan"),
        ("::", "[2001:db8::1]:7860"),
        ("", "mypc"),
    ],
)
def test_a_host_is_answered_for_its_own_names(
    host: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``serve`` as it is called, up to the server itself."""
    apps = []
    monkeypatch.setattr(uvicorn, "Config", lambda app, **_: apps.append(app))
    monkeypatch.setattr(uvicorn, "Server", lambda _: types.SimpleNamespace(run=lambda sockets: None))
    monkeypatch.setattr(serve, "_listen", lambda host, port: types.SimpleNamespace(getsockname=lambda: (host, port)))
    serve.serve(folder, host, 7860, "secret", None, lambda _: None)
    with starlette.TestClient(apps[0], headers={"host": name}) as client:
        assert client.get("/api/index", params={"token": "secret"}).status_code == 200
        client.cookies.clear()
        assert client.get("/api/index").status_code == 401  # whoever does not know the token learns nothing
        other = client.get("/api/index", params={"token": "secret"}, headers={"host": "evil.example"})
        assert other.status_code == (200 if host in ("0.0.0.0", "::", "") else 421)


def test_all_hosts_are_answered_with_a_token_alone(library: Gallery) -> None:
    with pytest.raises(miniclip.InputError, match="needs a token"):
        make_app(library, None, None)


def test_uploads_are_decoded_two_at_a_time(client: Any, library: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in memory at a time, until they are answered: the model answers them one after another."""
    data, counts, lock = png(ROOT / "examples" / "images" / "cat.png"), {"now": 0, "most": 0}, threading.Lock()
    decode, search = web_app.decode_image, library.search

    def decode_slowly(*arguments: Any) -> Any:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        time.sleep(0.05)  # long enough for the other clients to arrive
        return decode(*arguments)

    def search_and_count(query: Any) -> Any:
        try:
            return search(query)
        finally:
            with lock:
                counts["now"] -= 1

    monkeypatch.setattr(web_app, "decode_image", decode_slowly)
    monkeypatch.setattr(library, "search", search_and_count)
    answers: list[int] = []
    ask = [
        threading.Thread(target=lambda: answers.append(client.post("/api/search", content=data).status_code))
        for _ in range(16)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert answers == [200] * 16
    assert counts["most"] == web_app.MAX_DECODED == 2


# -- a folder that changes while it is served -------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """The folder of some images that is served, and a client."""
    for n in range(6):
        make_image(tmp_path / "photos" / f"{n}.png", n)
    embed(tmp_path)
    app = make_app(Gallery(tmp_path / "vectors"))
    with starlette.TestClient(app, headers=HOST, base_url="http://127.0.0.1:7860") as client:
        yield tmp_path, client


def embed(folder: Path) -> None:
    miniclip.embed_images(folder / "photos", folder / "vectors", "demo", device="cpu")


def shown(client: Any) -> set[str]:
    return {Path(row["path"]).name for row in found(client, text="a cat")}


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_a_served_index_follows_its_folder(changing: tuple[Path, Any]) -> None:
    folder, client = changing
    assert shown(client) == {f"{n}.png" for n in range(6)}
    first = generation(client)
    thumbnail = client.get(f"/thumbnail/{first}/3").content
    make_image(folder / "photos" / "new.png", 10)
    embed(folder)
    assert shown(client) == {*(f"{n}.png" for n in range(6)), "new.png"}
    # Rows were added at the end, so those that a client holds are still good.
    assert generation(client) != first
    assert client.get(f"/thumbnail/{first}/3").content == thumbnail
    assert client.get("/api/search", params={"row": 3, "generation": first}).json()["results"][0]["row"] == 3

    for n in (0, 1):
        (folder / "photos" / f"{n}.png").unlink()
    embed(folder)
    assert shown(client) == {*(f"{n}.png" for n in range(2, 6)), "new.png"}
    assert client.get("/api/index").json()["images"] == 5
    assert client.get(f"/thumbnail/{first}/3").content == thumbnail

    second = generation(client)
    planning.prune(store.EmbeddingStore(folder / "vectors"))
    assert shown(client) == {*(f"{n}.png" for n in range(2, 6)), "new.png"}
    for stale in (first, second, "", "0-", "x", "1-0", "999999999999-0", "²-1"):
        answer = client.get("/api/search", params={"row": 3, "generation": stale or "-"})
        assert (answer.status_code, "has changed" in answer.json()["error"]) == (410, True)
        if stale:
            answer = client.get(f"/thumbnail/{stale}/3")
            assert (answer.status_code, "has changed" in answer.json()["error"]) == (410, True)
    # Row 3 is another image now. Neither the index nor the thumbnails that were kept may answer for the old one.
    rows = {row["row"]: Path(row["path"]).name for row in found(client, text="a cat")}
    assert rows[3] != "3.png"
    for row, name in rows.items():
        for kind, size in (("thumbnail", 320), ("image", 2048)):
            data = client.get(f"/{kind}/{generation(client)}/{row}").content
            assert pixels(data) == pixels(html_page.thumbnail(miniclip.open_image(folder / "photos" / name), size))


def test_a_generation_outlives_the_server(changing: tuple[Path, Any]) -> None:
    folder, client = changing
    with starlette.TestClient(make_app(Gallery(folder / "vectors")), headers=HOST) as other:
        assert generation(other) == generation(client)


def test_a_folder_is_not_opened_again_without_a_reason(
    changing: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, client = changing
    opened = []
    reopen = miniclip.Index.reopen
    monkeypatch.setattr(miniclip.Index, "reopen", lambda self: opened.append(1) or reopen(self))
    for _ in range(3):
        found(client, text="a cat")
        client.get(f"/thumbnail/{generation(client)}/1")
    (folder / "vectors" / "failures" / ".failures_7.jsonl.x.tmp").write_text("")  # what a run is writing
    found(client, text="a cat")
    assert not opened
    make_image(folder / "photos" / "new.png", 10)
    embed(folder)
    found(client, text="a cat")
    found(client, text="a cat")
    assert len(opened) == 1


def test_a_shard_that_is_computed_again_is_seen(changing: tuple[Path, Any]) -> None:
    """The names are the same, and so is the number of rows."""
    folder, client = changing
    make_image(folder / "photos" / "new.png", 10)
    embed(folder)
    before = generation(client)
    (folder / "vectors" / "failures" / "failures_1.jsonl").unlink()
    embed(folder)
    assert client.get(f"/thumbnail/{before}/6").status_code == 410
    assert len(shown(client)) == 7


def test_a_question_is_asked_again_if_the_folder_changes_meanwhile(changing: tuple[Path, Any]) -> None:
    folder, _ = changing
    live = LiveIndex(folder / "vectors")
    views = []

    def question(view: View) -> list[str]:
        views.append(view)
        if len(views) == 1:
            (folder / "photos" / "0.png").unlink()
            embed(folder)
            planning.prune(store.EmbeddingStore(folder / "vectors"))
        return view.index.paths(range(len(view.index)))  # reads files that a prune has removed

    assert [Path(path).name for path in live.answer(question)] == [f"{n}.png" for n in range(1, 6)]
    assert len(views) == 2
    with pytest.raises(miniclip.InputError):  # and not if it has not
        live.answer(lambda view: views.append(view) or view.index.paths([99]))
    assert len(views) == 3


def test_a_folder_that_loses_its_vectors_is_one_sentence(changing: tuple[Path, Any]) -> None:
    folder, client = changing
    old = folder / "vectors"
    old.rename(folder / "elsewhere")
    answer = client.get("/api/search", params={"text": "a cat"})
    assert (answer.status_code, "has no manifest.json" in answer.json()["error"]) == (400, True)
    (folder / "elsewhere").rename(old)
    assert len(shown(client)) == 6


@pytest.mark.slow
def test_searches_while_runs_change_the_folder_are_never_wrong(changing: tuple[Path, Any]) -> None:
    """Images come and go and are pruned while clients search and look: an image is the right one, or a 410 or 404."""
    folder, client = changing
    expected = {
        f"{n}.png": pixels(html_page.thumbnail(miniclip.open_image(folder / "photos" / f"{n}.png"))) for n in range(6)
    }
    wrong: list[object] = []
    looked = threading.Event()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            answer = client.get("/api/search", params={"text": "a cat"})
            if answer.status_code != 200:
                wrong.append(answer.text)
                continue
            for row in answer.json()["results"]:
                image = client.get(f"/thumbnail/{answer.json()['generation']}/{row['row']}")
                name = Path(row["path"]).name
                if image.status_code == 200 and name in expected and pixels(image.content) != expected[name]:
                    wrong.append(name)
                elif image.status_code not in (200, 404, 410):
                    wrong.append(image.text)
            looked.set()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(6):
        looked.clear()
        make_image(folder / "photos" / f"passing{n}.png", 20 + n)
        embed(folder)
        (folder / "photos" / f"passing{n}.png").unlink()
        embed(folder)
        planning.prune(store.EmbeddingStore(folder / "vectors"))
        looked.wait(60)
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []
