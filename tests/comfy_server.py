"""A real ComfyUI for tests: started on a free port with folders of its own, driven over HTTP and websocket, stopped.

COMFYUI_DIR names the checkout (default: where comfy-cli puts it, ~/comfy/ComfyUI), COMFYUI_PYTHON the Python that has
its requirements (default: the venv beside or inside the checkout). Only the standard library is used here.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_S = float(os.environ.get("COMFYUI_START_S", 600))  # a busy machine needs minutes for what takes ten seconds
RUN_S = float(os.environ.get("COMFYUI_RUN_S", 600))


def find_comfy() -> tuple[Path, Path] | str:
    """The checkout and its Python, or the sentence that says how to get them."""
    folder = Path(os.environ.get("COMFYUI_DIR", "~/comfy/ComfyUI")).expanduser()
    names = [os.environ.get("COMFYUI_PYTHON"), folder / ".venv" / "bin" / "python", folder / "venv" / "bin" / "python",
             folder.parent / "venv" / "bin" / "python", folder.parent / ".venv" / "bin" / "python"]  # fmt: skip
    if not (folder / "main.py").is_file():
        return (
            f"no ComfyUI at {folder}: clone it there (or set COMFYUI_DIR), install its requirements.txt and this "
            "repository's into a venv, and set COMFYUI_PYTHON to that venv's Python"
        )
    pythons = [Path(name).expanduser() for name in names if name]
    for python in pythons:
        if python.is_file():
            return folder, python
    return f"no Python for the ComfyUI at {folder}: set COMFYUI_PYTHON to one that has its requirements.txt installed"


class ApiError(RuntimeError):
    """The server's answer to a request, or a failed run: status and the decoded body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {str(body)[:2000]}")
        self.status, self.body = status, body


@dataclass
class Result:
    """A finished prompt: outputs by node id, messages as (name, data), whether it succeeded."""

    prompt_id: str
    outputs: dict[str, Any]
    messages: list[tuple[str, dict[str, Any]]]
    succeeded: bool

    @property
    def cached(self) -> set[str]:
        return {node for name, data in self.messages if name == "execution_cached" for node in data["nodes"]}

    @property
    def error(self) -> dict[str, Any]:
        return next((data for name, data in self.messages if name == "execution_error"), {})


class Client:
    """One client of a running server."""

    def __init__(self, port: int) -> None:
        self.port, self.url, self.id = port, f"http://127.0.0.1:{port}", uuid.uuid4().hex

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
        """Status, body and headers, whatever the status; redirects are not followed."""
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        try:
            with _OPENER.open(request, timeout=60) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def get(self, path: str) -> Any:
        status, body, _ = self.request("GET", path)
        if status != 200:
            raise ApiError(status, body)
        return json.loads(body)

    def post(self, path: str, content: Any) -> Any:
        status, body, _ = self.request("POST", path, json.dumps(content).encode(), Content_Type="application/json")
        if status != 200:
            raise ApiError(status, json.loads(body) if body.startswith(b"{") else body)
        return json.loads(body) if body else None

    def upload(self, name: str, data: bytes, subfolder: str = "") -> str:
        """Puts a file into input, over an older one; its name as nodes take it."""
        mark = secrets.token_hex(16)
        fields = {"subfolder": subfolder, "type": "input", "overwrite": "true"}
        parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in
                 fields.items()]  # fmt: skip
        parts.append(
            f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode()
            + data
            + f"\r\n--{mark}--\r\n".encode()
        )
        status, body, _ = self.request(
            "POST", "/upload/image", b"".join(parts), Content_Type=f"multipart/form-data; boundary={mark}"
        )
        if status != 200:
            raise ApiError(status, body)
        made = json.loads(body)
        return f"{made['subfolder']}/{made['name']}" if made["subfolder"] else made["name"]

    def queue(self, prompt: dict[str, Any]) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": self.id})["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = RUN_S) -> Result:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                messages = [(name, data) for name, data in entry["status"]["messages"]]
                succeeded = entry["status"]["status_str"] == "success"
                return Result(prompt_id, entry["outputs"], messages, succeeded)
            time.sleep(0.2)
        raise TimeoutError(f"prompt {prompt_id} did not end within {timeout_s:g} s")

    def run(self, prompt: dict[str, Any]) -> Result:
        """Queues a prompt and waits; raises ApiError with the node's message when it fails."""
        result = self.wait(self.queue(prompt))
        if not result.succeeded:
            raise ApiError(0, result.error or result.messages)
        return result

    def fetch(self, entry: dict[str, str]) -> bytes:
        query = urllib.parse.urlencode({key: entry[key] for key in ("filename", "subfolder", "type")})
        status, body, _ = self.request("GET", f"/view?{query}")
        if status != 200:
            raise ApiError(status, body)
        return body

    def listen(self) -> Socket:
        return Socket(self.port, self.id)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


class Socket:
    """The events of one client: a websocket, as much of RFC 6455 as a server's messages need."""

    def __init__(self, port: int, client_id: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=RUN_S)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        if b"101" not in self._stream.readline():
            raise ConnectionError("the server refused the websocket")
        while self._stream.readline().strip():
            pass

    def events(self) -> Iterator[tuple[str, Any]]:
        """("progress" and so on, data) for messages, ("picture", bytes) for preview pictures, without end."""
        whole = b""
        kind = 0
        while True:
            first, second = self._stream.read(2)
            length = second & 0x7F
            if length == 126:
                length = struct.unpack(">H", self._stream.read(2))[0]
            elif length == 127:
                length = struct.unpack(">Q", self._stream.read(8))[0]
            data = self._stream.read(length)
            operation = first & 0x0F
            if operation == 9:
                self._pong(data)
            elif operation == 8:
                return
            elif operation in (0, 1, 2):
                kind, whole = operation or kind, whole + data
                if first & 0x80:
                    yield _decoded(kind, whole)
                    whole = b""

    def until(self, wanted: Callable[[str, Any], bool]) -> list[tuple[str, Any]]:
        """All events up to and with the first that is wanted."""
        seen = []
        for event in self.events():
            seen.append(event)
            if wanted(*event):
                return seen
        raise ConnectionError("the server closed the websocket")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def _pong(self, data: bytes) -> None:
        mask = secrets.token_bytes(4)
        masked = bytes(value ^ mask[i % 4] for i, value in enumerate(data))
        self._socket.sendall(bytes([0x8A, 0x80 | len(data)]) + mask + masked)


def _decoded(kind: int, whole: bytes) -> tuple[str, Any]:
    if kind == 1:
        message = json.loads(whole)
        return message["type"], message["data"]
    # 4 bytes of event (1: preview), 4 of picture type; 4: preview with metadata, 4 of its length, then JSON.
    event = struct.unpack(">I", whole[:4])[0]
    start = 8 if event != 4 else 8 + struct.unpack(">I", whole[4:8])[0]
    return "picture", whole[start:]


class ComfyServer:
    """A ComfyUI process with base folders under ``base``, and this repository as a custom node called "triptych"."""

    def __init__(self, base: Path, *arguments: str, comfy: Path | None = None) -> None:
        found = find_comfy()
        if isinstance(found, str):
            raise FileNotFoundError(found)
        self.folder, self.python = comfy or found[0], found[1]
        self.base, self.arguments = base, arguments
        self.port = _free_port()
        self.log_file = base / "comfy.log"
        self._process: subprocess.Popen | None = None

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def __enter__(self) -> ComfyServer:
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / "triptych"
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        command = [
            str(self.python), str(self.folder / "main.py"), "--cpu", "--port", str(self.port), "--base-directory",
            str(self.base), "--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}", "--disable-auto-launch",
            "--disable-api-nodes", *self.arguments,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=False
            )
        self._await_start()
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def client(self) -> Client:
        return Client(self.port)

    def resident_bytes(self) -> int:
        """Memory of the process now (Linux)."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """Processor time of the process so far (Linux)."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _await_start(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self._process.returncode}:\n{self.log[-3000:]}")
            try:
                self.client().get("/system_stats")
                return
            except (OSError, ApiError):
                time.sleep(0.5)
        self.__exit__()
        raise TimeoutError(f"ComfyUI did not start within {START_S:g} s:\n{self.log[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server_with_flux(base: Path) -> ComfyServer:
    """With the embedded Flux model, or, where it is not there, a random one of its kind under its name."""
    if not (ROOT / "weights" / "triptych-tiny" / "flux" / "views.json").is_file():
        from flux_tiny import copied, klein_folder, write_klein_card

        write_klein_card(copied(klein_folder("mini"), base / "models" / "triptych" / "triptych-tiny" / "flux"))
    return ComfyServer(base)
