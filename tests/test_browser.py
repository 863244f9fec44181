"""The page of ``miniclip serve`` in a real browser. Skipped without Chromium and its driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from browser import Page, chromium, served
from helpers import ROOT, make_image
from selenium.webdriver.common.keys import Keys

import miniclip
from miniclip import planning, store
from miniclip.gallery import Gallery
from miniclip.web_app import make_app

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "examples" / "images"
NASTY = '<img src=x onerror="window.ran = 1"><b>bold.png'
MANY = 300


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """The sample images, 300 made-up ones, one with a nasty name and one that is gone."""
    photos = tmp_path_factory.mktemp("library") / "photos"
    shutil.copytree(SAMPLES, photos)
    for n in range(MANY):
        make_image(photos / f"block{n:03}.png", n)
    make_image(photos / NASTY, MANY)
    make_image(photos / "gone.png", MANY + 1)
    miniclip.embed_images(photos, photos.parent / "vectors", "demo", device="cpu")
    (photos / "gone.png").unlink()
    return Gallery(photos.parent / "vectors")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def address(gallery: Gallery) -> Iterator[str]:
    with served(make_app(gallery)) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page. After each test: no error in the console, no broken rule of the policy, no request to another host."""
    page = Page(browser, address)
    yield page
    page.emulate("")
    complaints = page.complaints()
    if "gone" in request.keywords:  # the browser reports each image that the server does not have
        complaints = [each for each in complaints if "the server responded with a status of 404" not in each]
    assert complaints == []
    foreign = [each for each in page.requests() if not each.startswith((address, f"blob:{address}", "about:"))]
    assert foreign == []


def names(gallery: Gallery, *arguments: Any, k: int, **options: Any) -> list[str]:
    return [Path(match.path).name for match in gallery.index.search(*arguments, k=k, **options)]


def test_a_missing_browser_is_a_failure_where_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for required, outcome in (("1", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("MINICLIP_REQUIRE_BROWSER", required)
        with pytest.raises(outcome, match="needs chromium and chromedriver"), chromium():
            pass


def row_of(gallery: Gallery, match: miniclip.Match) -> dict[str, object]:
    """A result as the page holds it."""
    generation = gallery.about()["generation"]
    return {"row": match.row, "path": match.path, "generation": generation, "address": f"{generation}/{match.row}"}


# -- searching --------------------------------------------------------------------------------------------------------


@pytest.mark.gone
def test_typed_words_show_the_images_that_the_library_finds(page: Page, gallery: Gallery) -> None:
    assert page.search("a pizza")[0] == "pizza.png"
    assert page.names()[:20] == names(gallery, "a pizza", k=20)
    assert "pizza.png" in page.all("#grid li")[0].text
    page.wait(lambda: page.run("return document.querySelector('#grid img').naturalWidth") > 0)


@pytest.mark.gone
def test_the_not_field_turns_results_away(page: Page, gallery: Gallery) -> None:
    with_it = page.search("an animal")
    without = page.search("an animal", "an elephant")
    assert without[:20] == names(gallery, "an animal", without="an elephant", k=20)
    assert with_it[0] == "elephant.png"
    assert "elephant.png" not in without[:20]


@pytest.mark.gone
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_dropped_or_pasted_image_finds_itself(kind: str, page: Page) -> None:
    found = page.results_after(lambda: page.give(kind, SAMPLES / "sailboat.png"))
    assert found[0] == "sailboat.png"
    assert page["like"].is_displayed()
    page["text"].send_keys("a cat")
    assert page.results_after(lambda: page["text"].send_keys(Keys.ENTER))[:2] != found[:2]  # both count


@pytest.mark.gone
def test_a_chosen_file_finds_itself_and_can_be_removed(page: Page) -> None:
    assert page.results_after(lambda: page["file"].send_keys(str(SAMPLES / "house.png")))[0] == "house.png"
    page["text"].send_keys("a pizza")
    assert page.results_after(lambda: page["like-clear"].click())[0] == "pizza.png"
    assert not page["like"].is_displayed()


@pytest.mark.gone
def test_more_like_this_searches_from_the_image(page: Page, gallery: Gallery) -> None:
    page.search("a cat")
    page.all("#grid button")[0].click()
    found = page.results_after(page["more-like"].click)
    row = gallery.index.search("a cat", k=1)[0].row
    expected = gallery.index.nearest(gallery.index.vector(row), 20)
    assert found[:20] == [Path(match.path).name for match in expected]
    assert not page["large"].is_displayed()


@pytest.mark.gone
def test_scrolling_loads_the_rest_once(page: Page, gallery: Gallery) -> None:
    page.set_size(1280, 500)
    first = page.search("blocks")
    assert len(first) < MANY
    for _ in range(40):
        if len(page.names()) == len(gallery.index):
            break
        count = len(page.names())
        page.run("scrollTo(0, document.body.scrollHeight)")
        page.wait(lambda before=count: len(page.names()) > before)
    assert page.names() == names(gallery, "blocks", k=len(gallery.index))
    page.wait(lambda: page["status"].text == f"{len(gallery.index)} images, the best first")


def test_a_file_that_is_not_an_image_gets_a_sentence(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    page.give("drop", tmp_path / "notes.txt", "text/plain")
    page.wait(lambda: "not an image" in page["status"].text)
    assert page.names() == []


# -- the large view ---------------------------------------------------------------------------------------------------


@pytest.mark.gone
def test_the_large_view_shows_the_path_and_copies_it(page: Page, gallery: Gallery) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.search("a guitar")
    page.all("#grid button")[0].click()
    path = gallery.index.search("a guitar", k=1)[0].path
    assert page["large-path"].text == path
    page.wait(lambda: page.run("return document.getElementById('large-image').naturalWidth") > 0)
    page["copy"].click()
    page.wait(lambda: page["copy"].text == "Copied")
    assert page.run("return navigator.clipboard.readText()") == path


@pytest.mark.gone
def test_an_image_that_is_gone_is_called_gone(page: Page, gallery: Gallery) -> None:
    gone = next(match for match in gallery.index.search("blocks", k=400) if match.path.endswith("gone.png"))
    near = page.results_after(lambda: page.run("useRow(arguments[0])", row_of(gallery, gone)))
    assert near[0] == "gone.png"
    page.wait(lambda: "gone" in page.all("#grid .frame")[0].text)
    page.all("#grid button")[0].click()
    page.wait(lambda: page["large-gone"].is_displayed())
    assert "gone" in page["large-gone"].text
    assert not page["large-image"].is_displayed()


def test_the_first_and_the_last_image_end_the_row(browser: Any, tmp_path: Path) -> None:
    miniclip.embed_images(SAMPLES, tmp_path / "vectors", "demo", device="cpu")
    gallery = Gallery(tmp_path / "vectors")
    with served(make_app(gallery)) as address:
        page = Page(browser, address)
        page.search("a guitar")
        page.all("#grid button")[0].click()
        assert not page["previous"].is_enabled()
        paths = [page["large-path"].text]
        while page["next"].is_enabled():
            page["next"].click()
            paths.append(page["large-path"].text)
            page.wait(lambda: page["next"].is_enabled() or len(paths) == len(gallery.index))
        assert paths == [match.path for match in gallery.index.search("a guitar", k=len(gallery.index))]
        assert page["previous"].is_enabled()


@pytest.mark.gone
def test_closing_the_large_view_leaves_no_step_behind(page: Page) -> None:
    page.search("a guitar")
    page.search("a pizza")
    page.all("#grid button")[0].click()
    page["close"].click()
    page.wait(lambda: not page.run("return history.state.large"))
    assert page.results_after(page.driver.back)[0] == "guitar.png"  # one step back, not two
    assert page["text"].get_attribute("value") == "a guitar"


def test_a_folder_whose_files_are_all_gone_says_so(browser: Any, tmp_path: Path) -> None:
    make_image(tmp_path / "photos" / "only.png")
    miniclip.embed_images(tmp_path / "photos", tmp_path / "vectors", "demo", device="cpu")
    (tmp_path / "photos" / "only.png").unlink()
    make_image(tmp_path / "photos" / "other.png", 1)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "vectors", "demo", device="cpu")
    gallery = Gallery(tmp_path / "vectors")
    with served(make_app(gallery)) as address:
        page = Page(browser, address)
        assert page.search("a cat") == ["other.png"]
        (tmp_path / "photos" / "other.png").unlink()
        (tmp_path / "photos" / "unread.png").write_bytes(b"no image")
        miniclip.embed_images(tmp_path / "photos", tmp_path / "vectors", "demo", device="cpu")
        page["text"].clear()
        page["text"].send_keys("a dog", Keys.ENTER)
        page.wait(lambda: page["status"].text == "There is nothing to show: the files of all images are gone.")
        assert page.names() == []


@pytest.mark.gone
def test_a_name_with_html_in_it_is_text(page: Page, gallery: Gallery) -> None:
    nasty = next(match for match in gallery.index.search("blocks", k=400) if match.path.endswith(NASTY))
    page.results_after(lambda: page.run("useRow(arguments[0])", row_of(gallery, nasty)))
    assert NASTY in page.all("#grid button")[0].text
    assert NASTY in page["like-text"].text
    page.all("#grid button")[0].click()
    assert page["large-path"].text == nasty.path
    assert page.run("return window.ran") is None
    assert page.all("#grid b b, #large-path *, #like-text *, [onerror]") == []


# -- the keyboard -----------------------------------------------------------------------------------------------------


@pytest.mark.gone
def test_the_keyboard_is_enough(page: Page) -> None:
    page.run("document.activeElement.blur()")
    page.press("/")
    page.results_after(lambda: page.press("a cat", Keys.ENTER))
    assert page["text"].get_attribute("value") == "a cat"
    page.run("document.querySelector('#grid button').focus()")
    buttons = page.all("#grid button")
    page.press(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element == buttons[1]
    page.press(Keys.ARROW_DOWN)
    below = page.driver.switch_to.active_element
    assert below.location["x"] == buttons[1].location["x"]
    assert below.location["y"] > buttons[1].location["y"]
    page.press(Keys.ARROW_UP)
    page.press(Keys.ARROW_LEFT)
    page.press(Keys.ENTER)
    assert page["large"].is_displayed()
    first = page["large-path"].text
    page.press(Keys.ARROW_RIGHT)
    second = page["large-path"].text
    assert second.endswith(page.names()[1])
    page.press(Keys.ARROW_LEFT)
    assert page["large-path"].text == first
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page["large"].is_displayed())
    assert page.driver.switch_to.active_element == buttons[0]  # where the user was
    page.wait(lambda: not page.run("return history.state.large"))
    page.press(Keys.ESCAPE)
    assert page["text"].get_attribute("value") == ""
    assert page.driver.switch_to.active_element == page["text"]


def test_arrows_change_the_tab(page: Page) -> None:
    page["tab-search"].click()
    page.press(Keys.ARROW_RIGHT)
    assert page["classify"].is_displayed()
    assert not page["search"].is_displayed()
    page.press(Keys.ARROW_LEFT)
    assert page["search"].is_displayed()


# -- classifying ------------------------------------------------------------------------------------------------------


def test_a_dropped_image_is_classified_with_bars(page: Page) -> None:
    page["tab-classify"].click()
    page["labels"].send_keys("guitar, cat, pizza")
    page.give("drop", SAMPLES / "cat.png")
    page.wait(lambda: len(page.all("#answers li")) == 3)
    classifier = miniclip.ZeroShotClassifier(*miniclip.load("demo", "cpu"), ["guitar", "cat", "pizza"])
    expected = classifier(miniclip.open_image(SAMPLES / "cat.png"))
    assert [row.text.splitlines()[0] for row in page.all("#answers li")] == [label for label, _ in expected]
    assert expected[0][0] == "cat"
    bars = page.run("return [...document.querySelectorAll('#answers progress')].map((bar) => bar.value)")
    assert bars == [pytest.approx(value, abs=1e-4) for _, value in expected]
    page["labels"].clear()
    page["labels"].send_keys("house, umbrella", Keys.ENTER)
    page.wait(lambda: len(page.all("#answers li")) == 2)


# -- access and appearance --------------------------------------------------------------------------------------------

# The contrast of every text on the page, as WCAG 2 defines it: the colours are painted one over the other on a canvas.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const base = document.createElement("i");
base.style.background = "Canvas";
document.body.append(base);
const bottom = getComputedStyle(base).backgroundColor;
base.remove();
function paint(layers) {
  canvas.globalAlpha = 1;
  canvas.clearRect(0, 0, 1, 1);
  for (const [colour, alpha] of [[bottom, 1], ...layers]) {
    canvas.globalAlpha = alpha;
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
  }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(colour) {
  const [r, g, b] = colour.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(element, pseudo) {
  const chain = [];
  for (let each = element; each; each = each.parentElement) chain.unshift(getComputedStyle(each));
  let opacity = 1;
  const behind = chain.map((style) => [style.backgroundColor, opacity *= style.opacity]);
  const style = getComputedStyle(element, pseudo);
  const text = luminance(paint([...behind, [style.color, opacity * (pseudo ? style.opacity : 1)]]));
  const ground = luminance(paint(behind));
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}
const found = [];
for (const element of document.querySelectorAll("body *")) {
  if (!element.checkVisibility() || element.disabled) continue;
  const texts = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const words = texts.map((node) => node.data);
  if (words.length) found.push([words.join(" ").trim(), contrast(element)]);
  if (element.placeholder) {
    found.push([element.placeholder, contrast(element, "::placeholder")]);
    found.push([`typed into ${element.id}`, contrast(element)]);
  }
}
return found;
"""


def test_the_contrasts_are_those_of_the_definition(page: Page) -> None:
    page.run(
        """document.body.innerHTML = '<p>a</p><p>b</p><p>c</p>';
        const styles = ["color: #777; background: #fff", "color: #000; background: #fff",
                        "color: #000; opacity: .5; background: #fff"];
        document.querySelectorAll("p").forEach((each, n) => { each.style.cssText = styles[n]; });"""
    )
    page.run("document.body.style.background = '#fff'")
    # 127 of 255 is the grey that half of black leaves; #777 on white is the well-known grey that just misses 4.5.
    assert dict(page.run(CONTRASTS)) == {
        "a": pytest.approx(4.48, abs=0.01),
        "b": pytest.approx(21),
        "c": pytest.approx(1.05 / (0.05 + 0.2140), abs=0.06),
    }


@pytest.mark.gone
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(scheme: str, page: Page) -> None:
    page.emulate(scheme)

    def check(*expected: str) -> None:
        contrasts = page.run(CONTRASTS)
        assert {text for text, _ in contrasts} >= {*expected}
        assert [(text, value) for text, value in contrasts if value < 4.5] == []

    page.search("a cat")
    page.results_after(lambda: page.give("drop", SAMPLES / "cat.png"))
    check("Search", "typed into text", "What to look for", "cat.png")
    page.all("#grid button")[0].click()
    check("Copy path")
    page["close"].click()
    page.give("drop", ROOT / "pyproject.toml", "text/plain")
    check(page["status"].text)
    page["tab-classify"].click()
    page["labels"].send_keys("guitar, cat")
    page.give("drop", SAMPLES / "cat.png")
    page.wait(lambda: page.all("#answers li"))
    check("guitar", "cat", "typed into labels")
    rgb = page.run("return getComputedStyle(document.body).color")
    light_text = int("".join(c if c.isdigit() else " " for c in rgb).split()[0]) > 128
    assert light_text == (scheme == "dark")


@pytest.mark.gone
def test_every_control_has_a_name_and_every_image_an_alternative(page: Page) -> None:
    def check(selector: str, least: int) -> None:
        shown = [each for each in page.all(selector) if each.is_displayed()]
        assert len(shown) >= least
        for each in shown:
            assert each.accessible_name.strip(), each.get_attribute("outerHTML")

    page.results_after(lambda: page.give("drop", SAMPLES / "cat.png"))
    check("button, input, a", 10)
    check("img, ol, form, main, [role=tablist]", 10)
    page.all("#grid button")[0].click()
    check("dialog, dialog button, dialog img", 6)
    page["close"].click()
    page["tab-classify"].click()
    page["labels"].send_keys("guitar, cat")
    page.give("drop", SAMPLES / "cat.png")
    page.wait(lambda: page.all("#answers li"))
    check("button, input, progress, img, ol", 8)


@pytest.mark.gone
def test_a_phone_needs_no_sideways_scrolling(page: Page, tmp_path: Path) -> None:
    def check() -> None:
        width = page.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert width == [390, 390]
        outside = page.run(
            "return [...document.querySelectorAll('button, input, img')].filter((each) => each.checkVisibility())"
            ".filter((each) => each.getBoundingClientRect().right > 390.5 || each.getBoundingClientRect().left < -0.5)"
            ".map((each) => each.outerHTML)"
        )
        assert outside == []

    page.set_size(390, 844)
    page.open()
    check()
    page.results_after(lambda: page.give("drop", SAMPLES / "cat.png"))
    check()
    page.all("#grid button")[0].click()
    page.wait(lambda: page.run("return document.getElementById('large-image').naturalWidth") > 0)
    check()
    page["close"].click()
    page["tab-classify"].click()
    page["labels"].send_keys("a label that is rather long for a phone, cat")
    page.give("drop", SAMPLES / "cat.png")
    page.wait(lambda: page.all("#answers li"))
    check()


@pytest.mark.gone
def test_the_page_asks_its_own_server_alone(page: Page, address: str) -> None:
    page.search("a cat")
    page.wait(lambda: page.run("return document.querySelector('#grid img').complete"))
    asked = page.requests()
    assert any("/thumbnail/" in each for each in asked)  # the log does see requests
    assert {each for each in asked if not each.startswith(address)} <= {"about:blank", "data:,"}


# -- addresses, the way back, and what goes wrong ---------------------------------------------------------------------


@pytest.mark.gone
def test_an_address_holds_the_query(page: Page, address: str, gallery: Gallery) -> None:
    page.search("an animal & more", "a cat")
    found = page.driver.current_url.removeprefix(address)
    assert parse_qs(found.removeprefix("?")) == {"text": ["an animal & more"], "not": ["a cat"]}
    page.driver.get("about:blank")
    page.open(found)
    page.wait(page.names)
    assert page.names()[:20] == names(gallery, "an animal & more", without="a cat", k=20)
    assert page["without"].get_attribute("value") == "a cat"
    page.open("?labels=guitar,cat#classify")
    assert page["classify"].is_displayed()
    assert page["labels"].get_attribute("value") == "guitar,cat"


@pytest.mark.gone
def test_the_way_back_closes_the_large_view_and_shows_what_was_there(page: Page) -> None:
    first = page.search("a cat")
    page.all("#grid button")[0].click()
    page.driver.back()
    page.wait(lambda: not page["large"].is_displayed())
    assert page.names() == first
    page.results_after(lambda: page.give("drop", SAMPLES / "sailboat.png"))
    page.all("#grid button")[2].click()
    page.results_after(page["more-like"].click)
    page.driver.back()  # not to the large view: it was left for this search
    page.wait(lambda: page["like-text"].text == "sailboat.png")
    assert page.names()[0] == "sailboat.png"
    page.driver.back()
    page.wait(lambda: not page["like"].is_displayed())
    assert page.names() == first
    assert page["text"].get_attribute("value") == "a cat"


def test_a_server_that_has_ended_gets_a_sentence(browser: Any, gallery: Gallery) -> None:
    with served(make_app(gallery)) as address:
        page = Page(browser, address)
    page["text"].send_keys("a cat", Keys.ENTER)
    page.wait(lambda: "The server does not answer." in page["status"].text)
    assert "error" in page["status"].get_attribute("class")


def test_a_page_that_is_open_while_its_folder_is_pruned_searches_again(browser: Any, tmp_path: Path) -> None:
    for n in range(6):
        make_image(tmp_path / "photos" / f"{n}.png", n)
    miniclip.embed_images(tmp_path / "photos", tmp_path / "vectors", "demo", device="cpu")
    with served(make_app(Gallery(tmp_path / "vectors"))) as address:
        page = Page(browser, address)
        page.search("blocks")
        before = page.run("return state.view.results[0].generation")
        for n in (0, 1):
            (tmp_path / "photos" / f"{n}.png").unlink()
        miniclip.embed_images(tmp_path / "photos", tmp_path / "vectors", "demo", device="cpu")
        planning.prune(store.EmbeddingStore(tmp_path / "vectors"))
        page.all("#grid button")[0].click()  # its address has passed
        page.wait(lambda: sorted(page.names()) == [f"{n}.png" for n in range(2, 6)])
        assert page.run("return state.view.results[0].generation") != before
        page.driver.get("about:blank")


def test_the_token_is_taken_out_of_the_address(browser: Any, gallery: Gallery) -> None:
    with served(make_app(gallery, token="secret")) as address:
        page = Page(browser, f"{address}?token=secret&text=a+cat")
        page.wait(page.names)
        assert page.driver.current_url == f"{address}?text=a+cat"
        assert page.search("a pizza")[0] == "pizza.png"  # by the cookie
        page.driver.get("about:blank")
