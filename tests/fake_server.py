"""A ComfyUI server for client tests: its routes over http.server, its websocket, and the ways in which it can fail."""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import struct
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class FakeServer:
    """Each queued job runs ``work(self, prompt_id, graph)`` in a thread; it returns outputs or raises Broken.

    pages: a folder whose files are served too, for a browser."""

    def __init__(
        self,
        work: Callable[[FakeServer, str, dict], dict] | None = None,
        port: int = 0,
        pages: Path | None = None,
    ) -> None:
        self.work = work or (lambda server, prompt_id, graph: {})
        self.pages = pages
        self.running: dict[str, dict] = {}
        self.pending: dict[str, dict] = {}
        self.done: dict[str, dict] = {}
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.info: dict[str, dict] = {}
        self.answer: tuple[int, Any] | None = None  # to /prompt, instead of queueing
        self.also: dict = {}  # node_errors of a job that is queued all the same
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[dict] = []
        self.stopped: set[str] = set()
        self.websockets = True
        self.connections = 0
        self._sockets: list[Any] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.drop()

    def send(self, kind: str, **data: Any) -> None:
        """A message to everyone who listens."""
        self.send_raw(0x81, json.dumps({"type": kind, "data": data}).encode())

    def send_raw(self, first: int, content: bytes) -> None:
        head = (
            bytes([first, len(content)])
            if len(content) < 126
            else bytes([first, 126]) + struct.pack(">H", len(content))
        )
        for connection in self._sockets:
            with suppress(OSError):
                connection.sendall(head + content)

    def drop(self) -> None:
        """Ends every websocket without a word."""
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(2)
        self._sockets = []

    def forget(self) -> None:
        """What a restart does."""
        self.running, self.pending, self.done = {}, {}, {}
        self.drop()

    def start(self, body: dict) -> str:
        prompt_id = body.get("prompt_id") or str(uuid.uuid4())
        self.bodies.append(body)
        self.running[prompt_id] = body["prompt"]
        threading.Thread(target=self._run, args=(prompt_id, body["prompt"]), daemon=True).start()
        return prompt_id

    def _run(self, prompt_id: str, graph: dict) -> None:
        status: dict[str, Any] = {"status_str": "success", "completed": True, "messages": []}
        outputs: dict = {}
        try:
            outputs = self.work(self, prompt_id, graph)
        except Broken as broken:
            status = {"status_str": "error", "completed": False, "messages": [[broken.kind, broken.data]]}
            outputs = broken.outputs
        if self.running.pop(prompt_id, None) is not None:
            self.done[prompt_id] = {"prompt": [1, prompt_id, graph, {}, []], "outputs": outputs, "status": status}
            self.send("executing", node=None, prompt_id=prompt_id)


class Broken(Exception):
    """outputs: of the nodes that ran before."""

    def __init__(self, kind: str, *, outputs: dict | None = None, **data: Any) -> None:
        self.kind, self.outputs, self.data = kind, outputs or {}, data


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            self.path = self.path.removeprefix("/api")
            fake.requests.append(("GET", self.path))
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
            if url.path == "/ws":
                self._websocket()
            elif url.path == "/queue":
                items = [[[n, key, graph] for n, (key, graph) in enumerate(part.items())] for part in
                         (fake.running, fake.pending)]  # fmt: skip
                self._json({"queue_running": items[0], "queue_pending": items[1]})
            elif url.path == "/history":
                self._json(fake.done)
            elif url.path.startswith("/history/"):
                key = url.path.rpartition("/")[2]
                self._json({key: fake.done[key]} if key in fake.done else {})
            elif url.path.startswith("/object_info/"):
                name = url.path.rpartition("/")[2]
                self._json({name: fake.info[name]} if name in fake.info else {})
            elif url.path == "/view":
                content = fake.files.get((query["type"], query["subfolder"], query["filename"]))
                self._bytes(404 if content is None else 200, content or b"")
            elif fake.pages is not None and (fake.pages / url.path[1:]).is_file():
                kind = mimetypes.guess_type(url.path)[0] or "application/octet-stream"
                self._bytes(200, (fake.pages / url.path[1:]).read_bytes(), kind)
            else:
                self._bytes(404, b"no such page")

        def do_HEAD(self) -> None:
            query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
            content = fake.uploads.get(f"{query['subfolder']}/{query['filename']}")
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_POST(self) -> None:
            self.path = self.path.removeprefix("/api")
            fake.requests.append(("POST", self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/upload/image":
                fields = _fields(self.headers["Content-Type"], body)
                name, content = fields["image"]
                place = fields["subfolder"][1].decode()
                fake.uploads[f"{place}/{name}"] = content
                self._json({"name": name, "subfolder": place, "type": "input"})
                return
            content = json.loads(body)
            if self.path == "/prompt" and fake.answer is not None:
                self._json(fake.answer[1], fake.answer[0])
            elif self.path == "/prompt":
                self._json({"prompt_id": fake.start(content), "number": 1, "node_errors": fake.also})
            elif self.path == "/queue":
                for key in content["delete"]:
                    fake.pending.pop(key, None)
                self._bytes(200, b"")
            elif self.path == "/interrupt":
                fake.stopped.add(content["prompt_id"])
                self._bytes(200, b"")

        def _websocket(self) -> None:
            if not fake.websockets:
                self._bytes(403, b"")
                return
            accept = base64.b64encode(hashlib.sha1((self.headers["Sec-WebSocket-Key"] + MAGIC).encode()).digest())
            self.wfile.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            self.wfile.flush()
            fake.connections += 1
            fake._sockets.append(self.connection)
            with suppress(OSError):
                while self.connection.recv(4096):
                    pass
            self.close_connection = True

        def _json(self, content: Any, status: int = 200) -> None:
            self._bytes(status, json.dumps(content).encode())

        def _bytes(self, status: int, content: bytes, kind: str = "application/octet-stream") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def _fields(kind: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Multipart: field -> (file name, content)."""
    mark = kind.partition("boundary=")[2].encode()
    found = {}
    for part in body.split(b"--" + mark)[1:-1]:
        head, _, content = part.strip(b"\r\n").partition(b"\r\n\r\n") if part.count(b"\r\n\r\n") else (part, b"", b"")
        words = head.decode().split('"')
        found[words[1]] = (words[3] if len(words) > 3 else "", content)
    return found
