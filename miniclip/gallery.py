"""An open index that answers the questions of a web page, from several threads at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image

from miniclip.errors import ImageError, InputError
from miniclip.html_page import THUMBNAIL, thumbnail
from miniclip.images import decode_image
from miniclip.search import Index, Match
from miniclip.zero_shot import ZeroShotClassifier

MAX_TEXTS = 16
MAX_LABELS = 200
MAX_PAGE = 200  # results of one answer
CACHE_BYTES = 64 * 2**20  # of thumbnails


class Query(NamedTuple):
    """What a client asks for."""

    texts: list[str]
    without: list[str]
    image: Image.Image | None
    row: int | None  # "more like this one"
    start: int  # how many matches to skip
    length: int  # how many to return


class Gallery:
    """An open index with its model. All methods may be called from several threads.

    The model answers one query at a time, because two at once would only share the same cores.
    """

    def __init__(self, folder: Path, model: str | None = None) -> None:
        self.index = Index.open(folder, model)
        self.index.load()
        self._turn = threading.Lock()
        self._thumbnails: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._cached = 0
        self._cache_lock = threading.Lock()
        self._classifiers: OrderedDict[tuple[str, ...], ZeroShotClassifier] = OrderedDict()

    def search(self, query: Query) -> list[Match]:
        """The matches of a query from ``start`` on."""
        with self._turn:
            if query.row is not None:
                vector = self.index.vector(query.row)
                if query.texts or query.without:
                    text = self.index.encode_query(query.texts, without=query.without)
                    vector = F.normalize(vector + text, dim=0)
            else:
                vector = self.index.encode_query(query.texts, query.image, without=query.without)
            return self.index.nearest(vector, query.start + query.length)[query.start :]

    def classify(self, image: Image.Image, labels: Sequence[str], template: str) -> list[tuple[str, float]]:
        """The labels with their probabilities, the most probable first."""
        with self._turn:
            key = (template, *labels)
            if key not in self._classifiers:
                self._classifiers[key] = ZeroShotClassifier(*self.index.load(), labels, [template])
                if len(self._classifiers) > 8:
                    self._classifiers.popitem(last=False)
            self._classifiers.move_to_end(key)
            return self._classifiers[key](image)

    def jpeg(self, row: int, size: int) -> bytes:
        """A JPEG of the image of a row, whose longer side is at most ``size``. Thumbnails are kept.

        Raises:
            InputError: if the row does not exist.
            ImageError: if the image is gone or damaged.
        """
        key = row, size
        with self._cache_lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        (source,) = self.index.sources([row])
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


def query_of(parameters: Any, image: Image.Image | None) -> Query:
    """A query from the parameters of an address: text, not, row, offset, count.

    Raises:
        InputError: if a number is none or out of range, or there are too many texts.
    """
    texts, without = ([text for text in parameters.getlist(name) if text.strip()] for name in ("text", "not"))
    if len(texts) + len(without) > MAX_TEXTS:
        raise InputError(f"a query has at most {MAX_TEXTS} texts, got {len(texts) + len(without)}")
    numbers = {}
    for name, default, least, most in (("row", None, 0, 2**53), ("offset", 0, 0, 10**6), ("count", 60, 1, MAX_PAGE)):
        text = parameters.get(name)
        if text is not None and not (
            text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most
        ):
            raise InputError(f"{name} must be a number from {least} to {most}, got {text!r:.40}")
        numbers[name] = default if text is None else int(text)
    return Query(texts, without, image, numbers["row"], numbers["offset"] or 0, numbers["count"] or 60)


def labels_of(given: Sequence[str]) -> list[str]:
    """The labels of a request.

    Raises:
        InputError: if there are fewer than two, or too many.
    """
    labels = list(dict.fromkeys(label.strip() for label in given if label.strip()))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise InputError(f"there must be 2 to {MAX_LABELS} labels, got {len(labels)}")
    return labels
