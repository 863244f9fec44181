"""A headless Chromium that looks at the page of ``miniclip serve``, and the server that it looks at."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 60  # seconds until a page that does not change counts as broken; a busy machine needs some of them

# Runs before the scripts of every page. It counts what must never happen.
_WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => {
  violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""

# An event with a file in it, as dropping or pasting one makes it.
_GIVE = """
const [kind, data, name, type] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
const options = { bubbles: true, cancelable: true };
const pasting = new ClipboardEvent("paste", { ...options, clipboardData: transfer });
if (kind === "paste") document.activeElement.dispatchEvent(pasting);
else for (const each of ["dragenter", "dragover", "drop"])
  document.body.dispatchEvent(new DragEvent(each, { ...options, dataTransfer: transfer }));
"""


def missing_browser() -> str | None:
    """Why no browser can be started, or None."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(lacking)}: apt-get install chromium chromium-driver" if lacking else None


@contextlib.contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """The address at which a thread serves an application."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser that knows no other host than 127.0.0.1. Skips or fails the test if there is none."""
    if reason := missing_browser():
        if os.environ.get("MINICLIP_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    # As root there is no sandbox, and in a container /dev/shm is small.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.add_argument("--lang=en")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in a browser, with the names that a reader of the tests expects."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.set_window_size(1280, 900)
        driver.get("about:blank")
        driver.get_log("browser"), driver.get_log("performance")  # what an earlier test left
        self.open()

    def open(self, query: str = "") -> None:
        self.driver.get(self.address + query)
        self.wait(lambda: "images" in self["about"].text)

    def __getitem__(self, identity: str) -> WebElement:
        return self.driver.find_element(By.ID, identity)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _: condition())

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def give(self, kind: str, image: Path, type: str = "image/png") -> None:
        """Drop or paste a file."""
        self.run(_GIVE, kind, base64.b64encode(image.read_bytes()).decode(), image.name, type)

    def names(self) -> list[str]:
        """The file names of the results, in order."""
        return self.run("return [...document.querySelectorAll('#grid button')].map((b) => b.title.split('/').pop())")

    def search(self, text: str, without: str = "") -> list[str]:
        """Type a query, press Enter, and wait for the results."""
        for name, value in (("text", text), ("without", without)):
            self[name].clear()
            self[name].send_keys(value)
        return self.results_after(lambda: self["text"].send_keys(Keys.ENTER))

    def results_after(self, action: Callable[[], object]) -> list[str]:
        """The results of the search that an action starts."""
        before = self.all("#grid li")
        self.run("document.getElementById('status').textContent = 'before'")
        action()
        self.wait(lambda: self["status"].text not in ("before", "Searching …", ""))
        assert not before or before[0] not in self.all("#grid li")
        return self.names()

    def emulate(self, scheme: str) -> None:
        """The colours that the user of the browser prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def set_size(self, width: int, height: int, scale: float = 1) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def complaints(self) -> list[str]:
        """What the browser has reported since the page was opened: errors, warnings, broken rules of the policy."""
        said = [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]
        return [each for each in said if not each.startswith(("INFO", "DEBUG"))] + self.run("return window.violations")

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
