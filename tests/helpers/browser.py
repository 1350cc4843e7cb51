"""A headless Chromium with a recording as its microphone, and all that its pages asked for and complained of."""

import base64
import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"),
    *("--use-fake-device-for-media-stream", "--lang=en"),
)
# A violation of the page's policy does not always reach the log.
_WATCH_POLICY = """
window.violations = [];
addEventListener("securitypolicyviolation", ({violatedDirective, blockedURI, sourceFile}) =>
  window.violations.push(`${violatedDirective}: ${blockedURI} (${sourceFile})`));
"""


class MissingError(Exception):
    """Say which program or package of the browser's tests is not there."""


def programs() -> tuple[str, str]:
    """Return the paths of a Chromium and of its driver: those of $CHROMIUM and $CHROMEDRIVER, or those on the path.

    Raises:
      MissingError: one of them is not there.
    """
    named = [("CHROMIUM", ("chromium", "google-chrome", "chromium-browser")), ("CHROMEDRIVER", ("chromedriver",))]
    found = []
    for variable, names in named:
        asked = os.environ.get(variable)
        path = next(filter(None, map(shutil.which, (asked,) if asked else names)), None)
        if path is None:
            raise MissingError(
                f"{asked or names[0]} was not found; install it, as in apt-get install chromium chromium-driver, or "
                f"name it by the variable {variable}"
            )
        found.append(path)
    return found[0], found[1]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Addresses that a page asked for, the messages of its websockets, and the types of all messages in their order."""

    addresses: tuple[str, ...]
    sent: tuple[dict[str, Any], ...]
    received: tuple[dict[str, Any], ...]
    kinds: tuple[str, ...]

    def foreign(self, host: str) -> list[str]:
        """Return the addresses that are not the host's."""
        inner = ("blob", "data", "chrome")
        parts = [(address, urlsplit(address)) for address in self.addresses]
        return [address for address, part in parts if part.netloc != host and part.scheme not in inner]


def traffic(events: list[dict[str, Any]]) -> Traffic:
    """Read a browser's events of the network."""
    addresses, sent, received, kinds = [], [], [], []
    for event in events:
        method, params = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            addresses.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            addresses.append(params["url"])
        elif method in ("Network.webSocketFrameSent", "Network.webSocketFrameReceived"):
            frame = params["response"]
            if frame["opcode"] == 2:
                message = msgpack.unpackb(base64.b64decode(frame["payloadData"]))
                (sent if method.endswith("Sent") else received).append(message)
                kinds.append(message["type"])
    return Traffic(tuple(addresses), tuple(sent), tuple(received), tuple(kinds))


class Browser:
    """A page in a browser.

    Args:
      driver: selenium's.
      downloads: folder of saved files.
    """

    def __init__(self, driver: Any, downloads: Path):
        self.driver, self.downloads = driver, downloads
        self._events: list[dict[str, Any]] = []

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def before_pages(self, script: str) -> None:
        """Run a script in every page before its own scripts."""
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})

    def get(self, url: str) -> None:
        """Open a page and wait until it knows what is served."""
        self.driver.get(url)
        self.wait(lambda: not self.text("served").startswith("Asking"))

    def element(self, id: str) -> Any:
        """Return an element by its id."""
        return self.driver.find_element("id", id)

    def click(self, id: str) -> None:
        """Click on an element, which must be ready for it."""
        self.wait(lambda: self.element(id).is_enabled())
        self.element(id).click()

    def text(self, id: str) -> str:
        """Return the text of an element as a person sees it; empty for one that is hidden."""
        return self.element(id).text

    def state(self, panel: str) -> str:
        """Return the state of a panel, such as "idle"."""
        return self.element(panel).get_attribute("data-state")

    def words(self) -> list[str]:
        """Return the finished words of the transcript."""
        return self.run("return [...document.querySelectorAll('#finished .word')].map(word => word.textContent)")

    def wait(self, holds: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Wait until something holds, and return it.

        Raises:
          AssertionError: it does not in time.
        """
        end = time.monotonic() + seconds
        while not (found := holds()):
            if time.monotonic() > end:
                shown = {panel: (self.state(panel), self.text(f"{panel}-state")) for panel in ("listen", "speak")}
                raise AssertionError(f"not so after {seconds} s; the panels show {shown}; {self.complaints()}")
            time.sleep(0.02)
        return found

    def saved(self, name: str) -> bytes:
        """Return a file that the page has saved."""
        path = self.downloads / name
        self.wait(lambda: path.exists() and path.stat().st_size)
        return path.read_bytes()

    def complaints(self) -> list[str]:
        """Return the errors and warnings of the console, and the violations of the page's policy."""
        lines = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        return lines + self.run("return window.violations.splice(0)")

    def traffic(self) -> Traffic:
        """Return what pages have sent and received so far."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        self._events += [message for message in messages if message["method"].startswith("Network.")]
        return traffic(self._events)

    def resize(self, width: int, height: int, *, mobile: bool = False, scale: float = 1.0) -> None:
        """Set the size of the page, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, **features: str) -> None:
        """Set what the user prefers, such as color_scheme="dark"."""
        named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})


@contextlib.contextmanager
def browser(downloads: Path, microphone: Path, *, allowed: bool = True) -> Iterator[Browser]:
    """Open a browser whose microphone gives a 16-bit wav file once, if its user allows pages to use it.

    Raises:
      MissingError: there is no Chromium, no driver, or no selenium.
    """
    chromium, chromedriver = programs()
    try:
        from selenium import webdriver
    except ImportError:
        raise MissingError("selenium was not found; install it: pip install 'dsm-jax[page]'") from None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    answer = "--use-fake-ui-for-media-stream" + ("" if allowed else "=deny")
    for flag in (*_FLAGS, answer, f"--use-file-for-fake-audio-capture={microphone}%noloop"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        downloading = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloading)
        opened = Browser(driver, downloads)
        opened.before_pages(_WATCH_POLICY)
        yield opened
    finally:
        driver.quit()
