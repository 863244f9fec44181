"""The web application of ``miniclip serve``: its addresses, and which requests it refuses."""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from miniclip.errors import ImageError, InputError, MiniclipError
from miniclip.gallery import MAX_ROW, Gallery, labels_of, number_of, query_of
from miniclip.html_page import THUMBNAIL
from miniclip.images import decode_image
from miniclip.live_index import StaleRowError

T = TypeVar("T")

WEB = Path(__file__).parent / "data" / "web"
PAGES = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
MAX_UPLOAD = 64 * 2**20  # bytes of an image that is sent
MAX_DECODED = 2  # images of clients in memory at a time: one of 180 million pixels takes half a gigabyte
MAX_SHRUNK = 4  # images of the index that are decoded at a time
LARGE = 2048  # pixels of the longer side in the large view
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Addresses:
    """What the server answers at each address."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        # Requests wait here without a thread, so that those for small things still find one.
        self._decoded, self._shrunk = asyncio.Semaphore(MAX_DECODED), asyncio.Semaphore(MAX_SHRUNK)

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in PAGES:
            return _error(404, "there is no such page")
        return Response((WEB / name).read_bytes(), media_type=PAGES[name])

    async def about(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.gallery.about))

    async def search(self, request: Request) -> Response:
        query = query_of(request.query_params)
        generation, matches = await self._with_image(
            request, lambda image: self.gallery.search(query._replace(image=image))
        )
        rows = [{"row": match.row, "path": match.path, "score": round(match.score, 4)} for match in matches]
        return JSONResponse({"generation": generation, "results": rows})

    async def classify(self, request: Request) -> Response:
        labels = labels_of(request.query_params.getlist("label"))
        template = request.query_params.get("template", "a photo of a {}.")

        def classify(image: Image.Image | None) -> list[tuple[str, float]]:
            if image is None:
                raise InputError("send an image as the body of the request")
            return self.gallery.classify(image, labels, template)

        answer = await self._with_image(request, classify)
        return JSONResponse({"labels": [{"label": label, "probability": value} for label, value in answer]})

    async def image(self, request: Request) -> Response:
        size = THUMBNAIL if request.url.path.startswith("/thumbnail/") else LARGE
        row = number_of(request.path_params["row"], "the row", 0, MAX_ROW)
        async with self._shrunk:
            data = await run_in_threadpool(self.gallery.jpeg, request.path_params["generation"], row, size)
        return Response(data, media_type="image/jpeg")

    async def _with_image(self, request: Request, answer: Callable[[Image.Image | None], T]) -> T:
        """What ``answer`` says to the image in the body of a request, or to None if there is none."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_UPLOAD:
                raise InputError(f"the image is larger than {MAX_UPLOAD // 2**20} MB")
        if not body:
            return await run_in_threadpool(answer, None)
        async with self._decoded:  # also while the model is busy with another client's: a decoded image is large
            return await run_in_threadpool(lambda: answer(decode_image(io.BytesIO(body), "the image")))


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return _error(400, "the request ended early")
    if isinstance(error, StaleRowError):
        return _error(410, str(error))
    if isinstance(error, HTTPException):  # an unknown address, or another method
        return _error(error.status_code, error.detail)
    of_image = isinstance(error, ImageError | InputError) and not request.url.path.startswith("/api/")
    return _error(404 if of_image else 400, str(error))


def _error(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status)


def make_app(gallery: Gallery, hosts: frozenset[str] | None = LOOPBACK, token: str | None = None) -> Guard:
    """The web application, for uvicorn or another ASGI server.

    Args:
        gallery: the index to serve.
        hosts: the names in the Host header that are answered, in lower case. None answers all: only with a token,
            which a page of another site that reaches this server through a name of its own does not know.
        token: if given, what a client must know: ``?token=…`` in the first address, which sets a cookie, or the header
            ``Authorization: Bearer …``.
    """
    addresses = Addresses(gallery)
    routes = [
        Route("/", addresses.page),
        Route("/static/{name}", addresses.page),
        Route("/api/index", addresses.about),
        Route("/api/search", addresses.search, methods=["GET", "POST"]),
        Route("/api/classify", addresses.classify, methods=["POST"]),
        Route("/thumbnail/{generation}/{row}", addresses.image),
        Route("/image/{generation}/{row}", addresses.image),
    ]
    handlers: Any = {MiniclipError: _failed, ClientDisconnect: _failed, HTTPException: _failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts, token)


class Guard:
    """Refuses requests that are for another host, from another site, or without the token."""

    def __init__(self, app: Any, hosts: frozenset[str] | None, token: str | None) -> None:
        if hosts is None and token is None:
            raise InputError("a server that answers for all hosts needs a token")
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        extra = dict(_HEADERS)
        if problem := self.problem(scope, headers):
            await _refuse(send, *problem, extra)
            return
        if self.token is not None:
            extra["Set-Cookie"] = f"miniclip={self.token}; HttpOnly; SameSite=Strict; Path=/"

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                added = [(name.lower().encode(), value.encode()) for name, value in extra.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in given)]
            await send(message)

        await self.app(scope, receive, with_headers)

    def problem(self, scope: dict[str, Any], headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the sentence of a refusal, or None."""
        host = _without_port(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return 421, f"this server does not answer for {host[:80]!r}"
        origin = headers.get("origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") or (
            origin is not None and origin.partition("://")[2] != headers.get("host")
        ):
            return 403, "requests from other sites are refused"
        if self.token is not None and not self._knows_token(scope, headers):
            return 401, "this server needs its token: open the address that it printed"
        return None

    def _knows_token(self, scope: dict[str, Any], headers: dict[str, str]) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        given.append(headers.get("authorization", "").removeprefix("Bearer "))
        cookies = (part.strip() for part in headers.get("cookie", "").split(";"))
        given += [part.removeprefix("miniclip=") for part in cookies if part.startswith("miniclip=")]
        return any(hmac.compare_digest(each.encode(), str(self.token).encode()) for each in given)


def _without_port(host: str) -> str:
    """The name in a Host header: "[::1]:7860" is "::1". A header of another form gives an empty name."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::\d+)?", host)
    return (match[1] or match[2] or "").lower() if match else ""


async def _refuse(send: Any, status: int, sentence: str, headers: dict[str, str]) -> None:
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": json.dumps({"error": sentence}).encode()})
