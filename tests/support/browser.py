"""A headless Chromium, driven by chromedriver's own protocol: JSON over HTTP, and no package for it."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One session; errors of the protocol are raised with what the browser said."""

    def __init__(self, address: str, binary: str) -> None:
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1400,1000",
        ]
        # Nothing that a page asks for from elsewhere is answered.
        arguments += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": binary, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._address = address
        session = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"

    def open(self, path: Path) -> None:
        self._post(f"{self._session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a function body of JavaScript returns."""
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def messages(self) -> list[str]:
        """Return what the console said since the last call: warnings and errors."""
        found = self._post(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] in ("WARNING", "SEVERE")]

    def scroll(self, x: int, y: int, by: int) -> None:
        """Turn the wheel over a point of the window."""
        turn = {"type": "scroll", "x": x, "y": y, "deltaX": 0, "deltaY": by, "duration": 0, "origin": "viewport"}
        self._post(f"{self._session}/actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [turn]}]})

    def screenshot(self, path: Path) -> None:
        with urllib.request.urlopen(f"{self._address}{self._session}/screenshot", timeout=60) as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def close(self) -> None:
        request = urllib.request.Request(f"{self._address}{self._session}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()

    def _post(self, path: str, values: Any) -> Any:
        request = urllib.request.Request(f"{self._address}{path}", json.dumps(values).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error


@contextmanager
def browser() -> Iterator[Browser]:
    """Open a browser; skip the test where the machine has none."""
    driver = shutil.which("chromedriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if driver is None or binary is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address)
        opened = Browser(address, binary)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        process.terminate()
        process.wait()


def _wait(address: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{address}/status", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError("chromedriver does not answer")
