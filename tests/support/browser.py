"""Headless Chromium, controlled by its own protocol: no driver is needed."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0"),
)
SECONDS = 60


class Tab:
    """A page in a browser.

    Attributes:
      requests: Addresses that the page requested.
      errors: Errors on its console.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        mine = next(self._ids)
        self._socket.send(json.dumps({"id": mine, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("id") == mine:
                assert "error" not in message, message
                return message["result"]
            self._record(message)

    def _record(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))

    def go(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Evaluate an expression, and await a promise."""
        found = self.send(
            "Runtime.evaluate",
            **{"expression": script, "returnByValue": True, "awaitPromise": True},
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """Evaluate an expression until it is true; return its value."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise AssertionError(
            f"never: {script}; page: {self.run(TEXT)!r}; {self.errors}"
        )

    def screenshot(self, path: Path) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


TEXT = "document.body.innerText"


@contextlib.contextmanager
def open_tab(profile: Path):
    """Start Chromium with its own profile, and yield its empty page."""
    from websockets.sync.client import connect

    flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([str(CHROMIUM), *flags], stdout=quiet, stderr=quiet) as tree:
        try:
            with connect(address_of_page(profile), max_size=None) as socket:
                yield Tab(socket)
        finally:
            tree.kill()


def address_of_page(profile: Path) -> str:
    """Wait until Chromium writes its port, and return the address of its page."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            port = int((profile / "DevToolsActivePort").read_text().split()[0])
            where = f"http://127.0.0.1:{port}/json/list"
            with urllib.request.urlopen(where, timeout=SECONDS) as answer:
                pages = json.load(answer)
            page = next(page for page in pages if page["type"] == "page")
            return page["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise AssertionError("Chromium did not start")
