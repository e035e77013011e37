"""A headless Chromium driven over its debugging pipe: enough of the protocol to open a page and move the mouse."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """An open page; a context manager that ends the browser."""

    def __init__(self, browser: str, url: str, profile: Path) -> None:
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        # The browser talks on descriptors 3 and 4; ours must not be among them.
        ours = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (reads, writes)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # A shell may know descriptors of one digit only, so that Python moves them.
        start = f"import os; os.dup2({ours[0]}, 3); os.dup2({ours[1]}, 4); os.execv({browser!r}, {[browser, *flags]!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], pass_fds=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for one in (reads, writes, *ours):
            os.close(one)
        self._buffer, self._sent, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url=url)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        # A new target shows an empty page at first, which is complete too.
        loaded = f"location.href == {json.dumps(url)} && document.readyState == 'complete'"
        deadline = time.monotonic() + 60
        while not self.evaluate(loaded):
            if time.monotonic() > deadline:
                raise TimeoutError(f"The browser has not loaded {url} in a minute.")
            time.sleep(0.02)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                received = os.read(self._from, 65536)
                if not received:
                    raise RuntimeError("The browser has closed its end of the pipe.")
                self._buffer += received
            first, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(first)
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
