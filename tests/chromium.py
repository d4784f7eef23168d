"""A page in a headless Chromium, driven over DevTools through a pipe: no port, no driver."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-default-apps --hide-scrollbars --remote-debugging-pipe"
).split()
TIMEOUT_S = 60.0


class Page:
    """One tab, and all that it did which a self-contained page does not do."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._bytes = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")

    def open(self, place: Path | str) -> None:
        """Loads a file or an address and waits until nothing is left to load."""
        self._loaded = False
        self.send("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while not self._loaded:
            self._read()

    def view(self, width: int, height: int, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression; raises AssertionError if it throws."""
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, code: str, timeout_s: float = 10.0) -> None:
        """Waits for an expression to become truthy; raises AssertionError if it does not."""
        end = time.monotonic() + timeout_s
        while not self.run(f"Boolean({code})"):
            assert time.monotonic() < end, f"not within {timeout_s:g} s: {code}"
            time.sleep(0.02)

    def type(self, selector: str, text: str) -> None:
        """Puts the text into a field, over what is there, as a keyboard would."""
        self.run(f"{{ const f = document.querySelector({selector!r}); f.focus(); f.select(); }}")
        if text:
            self.send("Input.insertText", text=text)
        else:
            self.run("document.execCommand('delete')")
        self.run("document.activeElement.dispatchEvent(new Event('change', {bubbles: true})); 0")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def send(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writer, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; an event is kept if it is one to be asserted on."""
        until = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._bytes:
            if not select.select([self._reader], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {TIMEOUT_S:g} s")
            found = os.read(self._reader, 1 << 16)
            if not found:
                raise RuntimeError("Chromium ended")
            self._bytes += found
        line, self._bytes = self._bytes.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.errors.append(str(params))
            case "Page.javascriptDialogOpening":
                self.errors.append(f"dialog: {params}")
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A page in a browser of its own, with `profile` as its (empty) folder; skips without one."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium found; Debian and Ubuntu: apt-get install -y chromium")
    to_us, from_them = os.pipe()
    to_them, from_us = os.pipe()
    # Chromium reads descriptor 3 and writes 4; ours must not be these before they are moved there.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_them, from_them)]
    os.close(to_them)
    os.close(from_them)
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", browser]
        + [*FLAGS, f"--user-data-dir={profile}"],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in theirs:
        os.close(end)
    try:
        yield Page(to_us, from_us)
    finally:
        os.close(from_us)  # its end of the pipe closed, Chromium ends by itself
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_us)
