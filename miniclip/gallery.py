"""An open index that answers the questions of a web page, from several threads at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from miniclip.errors import ImageError, InputError, TextTooLongError
from miniclip.html_page import THUMBNAIL, thumbnail
from miniclip.images import decode_image
from miniclip.live_index import LiveIndex, View
from miniclip.search import Index, Match
from miniclip.sources import ImageSource
from miniclip.zero_shot import ZeroShotClassifier

MAX_TEXTS = 16
MAX_LABELS = 200
MAX_PAGE = 200  # results of one answer
MAX_ROW = 2**53  # the largest number that JavaScript counts to
CACHE_BYTES = 64 * 2**20  # of thumbnails


class Query(NamedTuple):
    """What a client asks for."""

    texts: list[str]
    without: list[str]
    image: Image.Image | None
    row: int | None  # "more like this one"
    generation: str  # of the row
    start: int  # how many matches to skip
    length: int  # how many to return


class Gallery:
    """An open index with its model. All methods may be called from several threads.

    The model answers one query at a time, because two at once would only share the same cores.
    """

    def __init__(self, folder: Path, model: str | None = None) -> None:
        self._live = LiveIndex(folder, model)
        self._turn = threading.Lock()
        self._thumbnails: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._cached = 0
        self._cache_lock = threading.Lock()
        self._classifiers: OrderedDict[tuple[object, ...], ZeroShotClassifier] = OrderedDict()

    @property
    def index(self) -> Index:
        """The index as its folder is now."""
        return self._live.view().index

    def about(self) -> dict[str, object]:
        """How many images a search may show, and which model made their vectors."""
        view = self._live.view()
        living = len(view.index) - int(view.index.dead.sum())
        return {"images": living, "model": str(view.index.manifest["model"]), "generation": view.generation}

    def search(self, query: Query) -> tuple[str, list[Match]]:
        """The generation of the rows, and the matches of a query from ``start`` on.

        Raises:
            StaleRowError: if the query's row is of a generation that has passed.
            MiniclipError: as ``Index.search`` does.
        """

        def ask(view: View) -> tuple[str, list[Match]]:
            start = None
            if query.row is not None:
                view.check(query.generation)
                start = view.index.vector(query.row)
            with _too_long_for_a_page():
                vector = view.index.encode_query(query.texts, query.image, without=query.without, start=start)
            return view.generation, view.index.nearest(vector, query.start + query.length)[query.start :]

        with self._turn:
            return self._live.answer(ask)

    def classify(self, image: Image.Image, labels: Sequence[str], template: str) -> list[tuple[str, float]]:
        """The labels with their probabilities, the most probable first."""
        with self._turn:
            model, preprocess = self.index.load()
            key = (id(model), template, *labels)
            if key not in self._classifiers:
                with _too_long_for_a_page():
                    self._classifiers[key] = ZeroShotClassifier(model, preprocess, labels, [template])
                if len(self._classifiers) > 8:
                    self._classifiers.popitem(last=False)
            self._classifiers.move_to_end(key)
            return self._classifiers[key](image)

    def jpeg(self, generation: str, row: int, size: int) -> bytes:
        """A JPEG of the image of a row, whose longer side is at most ``size``. Thumbnails are kept.

        Raises:
            StaleRowError: if the generation of the row has passed.
            InputError: if the row does not exist.
            ImageError: if the image is gone or damaged.
        """

        def find(view: View) -> tuple[tuple[int, int, int], bytes | ImageSource]:
            view.check(generation)
            key = view.epoch, row, size
            with self._cache_lock:
                if key in self._thumbnails:
                    self._thumbnails.move_to_end(key)
                    return key, self._thumbnails[key]
            return key, view.index.sources([row])[0]

        key, source = self._live.answer(find)
        if isinstance(source, bytes):
            return source
        try:
            with source.open() as file:
                data = thumbnail(decode_image(file, source.name, size), size)
        except OSError as error:
            raise ImageError(source.name, error.strerror or "cannot be read") from None
        if size == THUMBNAIL:
            with self._cache_lock:
                self._cached += 0 if key in self._thumbnails else len(data)
                self._thumbnails[key] = data
                while self._cached > CACHE_BYTES:
                    self._cached -= len(self._thumbnails.popitem(last=False)[1])
        return data


def query_of(parameters: Any) -> Query:
    """A query from the parameters of an address: text, not, row, generation, offset, count. It has no image yet.

    Raises:
        InputError: if a number is none or out of range, there are too many texts, or a row is without its generation.
    """
    texts, without = ([text for text in parameters.getlist(name) if text.strip()] for name in ("text", "not"))
    if len(texts) + len(without) > MAX_TEXTS:
        raise InputError(f"a query has at most {MAX_TEXTS} texts, got {len(texts) + len(without)}")
    row = None if (text := parameters.get("row")) is None else number_of(text, "row", 0, MAX_ROW)
    start = number_of(parameters.get("offset", "0"), "offset", 0, 10**6)
    length = number_of(parameters.get("count", "60"), "count", 1, MAX_PAGE)
    if row is not None and not parameters.get("generation"):
        raise InputError("a row needs the generation that was sent with it")
    return Query(texts, without, None, row, parameters.get("generation", ""), start, length)


def number_of(text: str, name: str, least: int, most: int) -> int:
    """A number that a client sent.

    Raises:
        InputError: if it is not a number, or out of range.
    """
    # Python refuses to read thousands of digits, so their number is checked first.
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
        raise InputError(f"{name} must be a number from {least} to {most}, got {text!r:.40}")
    return int(text)


def labels_of(given: Sequence[str]) -> list[str]:
    """The labels of a request.

    Raises:
        InputError: if there are fewer than two, or too many.
    """
    labels = list(dict.fromkeys(label.strip() for label in given if label.strip()))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise InputError(f"there must be 2 to {MAX_LABELS} labels, got {len(labels)}")
    return labels


@contextlib.contextmanager
def _too_long_for_a_page() -> Iterator[None]:
    try:
        yield
    except TextTooLongError as error:  # its advice, to pass truncate=True, does not apply here
        raise InputError(f"{str(error).rpartition('; ')[0]}: use fewer words") from None
