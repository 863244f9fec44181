"""The screenshots of docs/: ``python tests/screenshots.py [FOLDER ...] [--out FOLDER]``.

They show the page of ``miniclip serve`` over an index that the demo model makes of the sample images, and of other
folders of images if some are given. It needs Chromium and its driver, as tests/test_browser.py does.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from browser import Page, chromium, served
from helpers import ROOT
from PIL import Image

import miniclip
from miniclip.gallery import Gallery
from miniclip.web_app import make_app

SAMPLES = ROOT / "examples" / "images"
MOST = 150_000  # bytes of one screenshot


def save(page: Page, path: Path) -> None:
    """Write what the browser shows, once its images are there, in at most 256 colours."""
    page.wait(lambda: page.run("return [...document.images].every((each) => each.hidden || each.complete)"))
    page.run("document.activeElement.blur()")
    image = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}  {image.width} × {image.height}  {size:,} bytes{'' if size <= MOST else f': more than {MOST:,}'}")


def take(page: Page, out: Path) -> None:
    """The screenshots, one after another."""
    page.set_size(1200, 760)
    for scheme in ("light", "dark"):
        page.emulate(scheme)
        page.search("an animal")
        save(page, out / f"serve_{scheme}.png")
    page.emulate("light")
    page.search("a boat")
    page.all("#grid button")[0].click()
    save(page, out / "serve_large.png")
    page.driver.back()
    page["tab-classify"].click()
    page["labels"].send_keys("animal, elephant, plant, food")
    page.give("drop", SAMPLES / "elephant.png")
    page.wait(lambda: page.all("#answers li"))
    save(page, out / "serve_classify.png")
    page.set_size(390, 760)
    page.open()
    page.results_after(lambda: page.give("drop", SAMPLES / "cat.png"))
    save(page, out / "serve_phone.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="other images to show")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="default: docs/figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors"
        photos = Path(tempfile.gettempdir()) / "photos"  # the large view shows it, so it has a plain name
        shutil.copytree(SAMPLES, photos)
        miniclip.embed_images([photos, *options.folders], vectors, "demo", device="cpu")
        with served(make_app(Gallery(vectors))) as address, chromium() as driver:
            take(Page(driver, address), options.out)
        shutil.rmtree(photos)


if __name__ == "__main__":
    main()
