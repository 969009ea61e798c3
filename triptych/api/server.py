"""One ComfyUI server over HTTP: its own routes, with every failure as one sentence."""

from __future__ import annotations

import http.client
import ipaddress
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from ..errors import TriptychError

TRIES, PAUSE_S = 3, 0.5  # of requests that may be repeated without harm
CHUNK = 1 << 20

Graph = dict[str, dict[str, Any]]


class Unreachable(TriptychError):
    """The server does not answer, or not as a ComfyUI does."""


class Rejected(TriptychError):
    """The server refuses a graph; the sentence names the nodes."""


class Server:
    """url: http(s)://host:port, perhaps with a path; http:// may be left out. timeout_s: of one answer."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        whole = url if "://" in url else f"http://{url}"
        parts = urlsplit(whole)
        try:
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid or parts.query or parts.fragment:
            raise TriptychError(f"{url!r} is no server's address: write it as in http://127.0.0.1:8188")
        self.url, self.timeout_s = whole.rstrip("/"), timeout_s
        handlers = [urllib.request.ProxyHandler({})] if _is_here(parts.hostname or "") else []
        self._opener = urllib.request.build_opener(*handlers)

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def post(self, path: str, content: Any) -> Any:
        return self._json("POST", path, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def object_info(self, class_type: str) -> dict[str, Any] | None:
        """What the server knows of a node class; None when it has no such class."""
        found = self.get(f"/object_info/{quote(class_type, safe='')}")
        return found.get(class_type) if isinstance(found, dict) else None

    def load(self) -> int:
        """How many jobs run or wait."""
        running, pending = self._queue()
        return len(running) + len(pending)

    def place(self, prompt_id: str) -> int | None:
        """0: the job runs; n: it is the n-th that waits; None: it is not in the queue."""
        running, pending = self._queue()
        if prompt_id in running:
            return 0
        return pending.index(prompt_id) + 1 if prompt_id in pending else None

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The entry of a finished job: outputs and status."""
        found = self.get(f"/history/{prompt_id}")
        entry = found.get(prompt_id) if isinstance(found, dict) else None
        return entry if isinstance(entry, dict) else None

    def queue(self, graph: Graph, client_id: str, prompt_id: str) -> str:
        """Puts a graph into the queue; the job's id, which older servers choose themselves.

        Raises Rejected when the server finds fault with any of its nodes, also where it would run the others.
        """
        body = {"prompt": graph, "client_id": client_id, "prompt_id": prompt_id}
        try:
            answer = self._once("POST", "/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"})
        except _Refused as refused:
            if refused.status == 400 and isinstance(refused.content, dict):
                raise Rejected(rejection(refused.content, graph, self.url)) from None
            raise self._unexpected(refused, "/prompt") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt_id"), str):
            raise Unreachable(f"{self.url} did not answer as a ComfyUI does: check the address")
        if answer.get("node_errors"):
            self.cancel(answer["prompt_id"])
            raise Rejected(rejection(answer, graph, self.url))
        return answer["prompt_id"]

    def cancel(self, prompt_id: str) -> None:
        """Takes a job out of the queue, or stops it when it runs. Other jobs are not touched."""
        self.post("/queue", {"delete": [prompt_id]})
        if self.place(prompt_id) == 0:  # asked first: servers of before 2025 stop whatever runs
            self.post("/interrupt", {"prompt_id": prompt_id})

    def has_input(self, name: str, subfolder: str, size: int) -> bool:
        """Whether the input folder has a file of this name and size (bytes)."""
        query = urlencode({"filename": name, "subfolder": subfolder, "type": "input"})
        try:
            with self._open("HEAD", f"/view?{query}") as answer:
                return answer.headers.get("Content-Length") == str(size)
        except (_Refused, OSError, http.client.HTTPException):
            return False

    def upload(self, path: Path, name: str, subfolder: str) -> str:
        """A file into the server's input folder, over one of the same name; its name as nodes take it."""
        mark = secrets.token_hex(16)
        fields = {"type": "input", "subfolder": subfolder, "overwrite": "true"}
        head = "".join(
            f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head += (
            f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        made = self._json("POST", "/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
        if not isinstance(made, dict) or not isinstance(made.get("name"), str):
            raise Unreachable(f"{self.url} did not say where it put {path.name}: is it a ComfyUI?")
        folder = str(made.get("subfolder") or "").replace("\\", "/")
        return f"{folder}/{made['name']}" if folder else made["name"]

    def fetch(self, entry: Mapping[str, str], target: IO[bytes]) -> int:
        """One file into ``target``, from its beginning at each try; its size in bytes."""
        query = urlencode({key: entry[key] for key in ("filename", "subfolder", "type")})
        for left in reversed(range(TRIES)):
            target.seek(0)
            target.truncate()
            try:
                with self._open("GET", f"/view?{query}") as answer:
                    return _copy(answer, target)
            except _Refused as refused:
                if refused.status == 404:
                    raise TriptychError(
                        f"{self.url} has no longer the file {entry['filename']!r}: run the job again with another "
                        "setting or seed, so that the server makes it anew"
                    ) from None
                raise self._unexpected(refused, "/view") from None
            except (OSError, http.client.HTTPException) as error:
                if not left:
                    raise self._silent(error) from error
                time.sleep(PAUSE_S)
        raise AssertionError("the last try returns or raises")

    def _queue(self) -> tuple[list[str], list[str]]:
        answer = self.get("/queue")
        try:
            # [number, prompt id, ...] each; the pending ones come in no order.
            return tuple(  # type: ignore[return-value]
                [item[1] for item in sorted(answer[key], key=lambda item: item[0])]
                for key in ("queue_running", "queue_pending")
            )
        except (KeyError, TypeError, IndexError):
            raise Unreachable(f"{self.url} did not answer as a ComfyUI does: check the address") from None

    def _json(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
        """An answer, asked for again when the connection breaks: only for what may be done twice."""
        for left in reversed(range(TRIES)):
            try:
                return self._once(method, path, body, headers)
            except _Refused as refused:
                raise self._unexpected(refused, path) from None
            except Unreachable:
                if not left:
                    raise
                time.sleep(PAUSE_S)
        raise AssertionError("the last try returns or raises")

    def _once(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
        try:
            with self._open(method, path, body, headers) as answer:
                text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise Unreachable(f"{self.url}{path} did not answer as a ComfyUI does: check the address") from None

    def _open(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=dict(headers or {}))
        try:
            return self._opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(error.code, error.read(CHUNK)) from None

    def _silent(self, error: Exception) -> Unreachable:
        reason = getattr(error, "reason", None) or error
        text = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
        return Unreachable(f"{self.url} does not answer ({text}): is ComfyUI running there, and the port right?")

    def _unexpected(self, refused: _Refused, path: str) -> Unreachable | TriptychError:
        advice = {
            401: "it wants a password, which this client cannot give",
            403: "it refuses this client; look at its log",
            413: "the file is larger than it accepts; start it with a higher --max-upload-size",
        }.get(refused.status, "look at its log" if refused.status >= 500 else "is it a ComfyUI?")
        kind = Unreachable if refused.status in (502, 503, 504) else TriptychError
        return kind(f"{self.url}{path.partition('?')[0]} answered {refused.status}: {advice}")


class _Refused(Exception):
    """An answer that is no success; content: decoded where it is JSON."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        try:
            self.content = json.loads(body)
        except ValueError:
            self.content = None


def rejection(answer: Mapping[str, Any], graph: Graph, url: str) -> str:
    """The sentence of an answer of /prompt that carries errors: each node, and what is wrong with it."""
    parts = []
    for node, found in (answer.get("node_errors") or {}).items():
        errors = found.get("errors") or [] if isinstance(found, dict) else []
        told = "; ".join(dict.fromkeys(_told(error) for error in errors)) or "it is not valid"
        parts.append(f"{called(graph, node)}: {told}")
    if not parts:
        parts = [_told(answer.get("error") or {}) or "no reason given"]
    return f"{url} refuses the workflow: {'. '.join(parts)}"


def called(graph: Graph, node: str) -> str:
    """A node as a person finds it: title, id, class."""
    known = graph.get(node) or {}
    class_type = known.get("class_type") or "unknown class"
    title = (known.get("_meta") or {}).get("title")
    return f"{title} (node {node}, {class_type})" if title else f"node {node} ({class_type})"


def _told(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    message, details = (str(error.get(key) or "").strip().rstrip(".") for key in ("message", "details"))
    return f"{message} ({details})" if message and details else message or details


def _copy(answer: Any, target: IO[bytes]) -> int:
    expected = answer.headers.get("Content-Length")
    size = 0
    while block := answer.read(CHUNK):
        target.write(block)
        size += len(block)
    if expected is not None and size != int(expected):
        raise ConnectionError(f"the download ended after {size} of {expected} bytes")
    return size


def _is_here(host: str) -> bool:
    """Whether a host is this machine, which no proxy leads to."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
