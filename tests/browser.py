"""A headless Chromium for the tests, spoken to through its DevTools pipe (JSON ended by a zero byte)."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome") if os.name == "posix" else ()
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SOFTWARE_GL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")


class Browser:
    """One page of 640 x 640 pixels. Use as a context manager; every wait ends after ``seconds``."""

    def __init__(self, profile, *options, seconds=90):
        self.seconds = seconds
        self.buffer, self.sequence, self.session = b"", 0, None
        command_read, self.commands = os.pipe()
        self.answers, answer_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--window-size=640,640"]
        # Chromium expects the pipe at descriptors 3 and 4: a shell is the plain way to put it there.
        redirect = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", CHROMIUM, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe",
             *options],
            pass_fds=(command_read, answer_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(command_read)
        os.close(answer_write)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        screen = {"width": 640, "height": 640, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **screen)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method, **parameters):
        """One DevTools command and its result."""
        self.sequence += 1
        message = {"id": self.sequence, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.sequence:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], self.seconds)[0], "the browser did not answer in time"
            chunk = os.read(self.answers, 1 << 20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        first, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(first)

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, link="", until="document.documentElement.dataset.ready === 'yes'"):
        # A fresh document also when only the part after "#" changes.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path.as_uri() + link)
        deadline = time.monotonic() + self.seconds
        while not self.evaluate(f"document.readyState === 'complete' && !!({until})"):
            assert time.monotonic() < deadline, self.evaluate("document.body.innerText")
            time.sleep(0.02)

    def press(self, key):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def drag(self, start, end):
        mouse = {"button": "left", "buttons": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], clickCount=1, **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=end[0], y=end[1], **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], clickCount=1, button="left")

    def screenshot(self):
        """(640, 640, 3) int, once what was asked for is drawn."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
