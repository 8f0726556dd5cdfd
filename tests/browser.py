"""A headless Chromium that opens a page, through the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page of the browser.

    Attributes:
        requests: URLs that were requested.
        complaints: what the page wrote to the console, uncaught exceptions, and what the browser logged, such as refused content.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._session, self._last = commands, answers, b"", "", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path | str, *, scripts: bool = True, width: int = 1200, dark: bool = False) -> None:
        """Open a file or a URL and wait until it is loaded."""
        self.requests, self.complaints = [], []
        self._call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while self._event()["method"] != "Page.loadEventFired":
            pass

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, or of the promise that it is."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def picture(self, path: Path, height: int) -> None:
        """Write a PNG of the page, from its top to `height`."""
        width = self.run("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        path.write_bytes(
            base64.b64decode(self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])
        )

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._event()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def _event(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            received = os.read(self._answers, 1 << 16)
            if not received:
                raise AssertionError("Chromium ended")
            self._rest += received
        message, self._rest = self._rest.split(b"\0", 1)
        event: dict[str, Any] = {"method": "", **json.loads(message)}
        found = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(found))
        return event


def _high(end: int) -> int:
    """Return the same end of a pipe under a number that is not 3 or 4, at which Chromium expects its pipes."""
    high = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(end)
    return high


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """Yield a tab of a browser with an empty profile, and end the browser."""
    assert CHROMIUM is not None
    read_commands, commands, answers, write_answers = map(_high, (*os.pipe(), *os.pipe()))

    def wire() -> None:
        os.dup2(read_commands, 3)
        os.dup2(write_answers, 4)

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--disable-dev-shm-usage",
             "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(
        [CHROMIUM, *flags], pass_fds=(3, 4), preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Tab(commands, answers)
    finally:
        os.close(commands)  # Chromium ends with its pipe
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
