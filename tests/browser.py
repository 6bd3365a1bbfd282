"""A headless browser, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 120  # until an answer, on a machine that does much else
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
    "--force-color-profile=srgb", "--force-device-scale-factor=1", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip


def program() -> str:
    """The browser's program; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    return found


class Browser:
    """A page of a browser; `events` are those of the page so far."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = zip(os.pipe(), reversed(os.pipe()))  # what the browser reads, and writes
        self._read, self._write = theirs[1], theirs[0]
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ours]  # none of them 3 or 4, which the browser's will be
        for end in ours:
            os.close(end)
        self._process = subprocess.Popen(
            [program(), *_FLAGS, f"--user-data-dir={folder}"],
            preexec_fn=lambda: [os.dup2(end, number) for number, end in zip((3, 4), given)],
            pass_fds=(3, 4, *given),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(folder)},
        )
        for end in given:
            os.close(end)
        self.events: list[dict] = []
        self._buffer, self._number, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters) -> dict:
        """The result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._answer()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _answer(self) -> dict:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready = select.select([self._read], [], [], max(0, end - time.monotonic()))[0]
            data = os.read(self._read, 2**20) if ready else b""
            assert data, f"the browser does not answer (exit status {self._process.poll()})"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Open a page in a window of this size, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in media.items()])
        self.call("Page.navigate", url=url)
        self.evaluate("new Promise((done) => document.readyState == 'complete' ? done() : addEventListener('load', done))")
        self.settle()

    def evaluate(self, expression: str):
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def settle(self) -> None:
        """Wait until all pictures are decoded and two frames are drawn."""
        self.evaluate("Promise.all([...document.images].filter((i) => i.src).map((i) => i.decode()))")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the page, which is scrolled to it."""
        found = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest', "
            "behavior: 'instant'}); const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        return tuple(found)

    def mouse(self, kind: str, x: float, y: float) -> None:
        buttons = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **{"buttons": 1, "button": "left", **buttons})

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("mousePressed", *start)
        self.mouse("mouseMoved", *end)
        self.mouse("mouseReleased", *end)
        self.settle()

    def touch(self, start: tuple[float, float], *path: tuple[float, float]) -> None:
        steps = [("touchStart", [start]), *(("touchMove", [place]) for place in path), ("touchEnd", [])]
        for kind, points in steps:
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])
        self.settle()

    def key(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        self.settle()

    def pixels(self, selector: str | None = None) -> np.ndarray:
        """What is drawn, uint8 (H, W, 3): of an element, or of the window."""
        clip = {}
        if selector:
            left, top, width, height = self.box(selector)
            scrolled = self.evaluate("[scrollX, scrollY]")
            clip = {"clip": {"x": left + scrolled[0], "y": top + scrolled[1], "width": width, "height": height, "scale": 1}}
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def of_kind(self, *methods: str) -> list[dict]:
        """The parameters of events of these kinds."""
        return [event["params"] for event in self.events if event.get("method") in methods]
