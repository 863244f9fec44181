"""The result of a search as one HTML page, with thumbnails inside: it opens from disk and can be sent to somebody."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from string import Template

from PIL import Image

from miniclip.errors import ImageError
from miniclip.images import decode_image
from miniclip.search import Index, Match

THUMBNAIL = 320  # pixels of the longer side
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; margin: 0; padding: 0; }
li { list-style: none; }
img, .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .5rem; }
img, .gone { background: color-mix(in srgb, currentcolor 7%, transparent); }
.gone { display: grid; place-content: center; padding: 1rem; box-sizing: border-box; text-align: center; }
p { margin: .35rem 0 0; overflow-wrap: anywhere; font-size: .85rem; }
b { font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>$title</h1>
<ol>
$items
</ol>
</body>
</html>
""")


def page(index: Index, matches: Sequence[Match], title: str) -> str:
    """The page of some matches, best first. An image that is gone or damaged is shown as that."""
    sources = index.sources([match.row for match in matches])
    items = []
    for match, source in zip(matches, sources):
        name = html.escape(match.path)
        try:
            with source.open() as file:
                data = base64.b64encode(thumbnail(decode_image(file, source.name, THUMBNAIL))).decode()
            shown = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
        except (ImageError, OSError, ValueError) as error:
            reason = error.reason if isinstance(error, ImageError) else getattr(error, "strerror", None) or str(error)
            shown = f'<div class="gone">{html.escape(reason)}</div>'
        items.append(f"<li>{shown}<p><b>{match.score:.3f}</b> {name}</p></li>")
    return _PAGE.substitute(title=html.escape(title), items="\n".join(items))


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> bytes:
    """A JPEG of the image whose longer side is at most ``size`` pixels."""
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()
