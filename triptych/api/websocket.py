"""The reading half of a websocket (RFC 6455) on the standard library: what it takes to hear a server's messages.

No extensions and no sending besides pongs. A message may be waited for with a time limit, and what had come until
then is kept for the next call.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import socket
import ssl
import struct
import time
from urllib.parse import urlsplit

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9
MAX_MESSAGE = 64 << 20  # bytes; preview pictures are some kilobytes
MAX_HEADERS = 64 << 10
_ACCEPT = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class WebSocket:
    """An open connection. Everything that ends it raises OSError (ConnectionError among them).

    url: ws://, wss://, http:// or https://; timeout_s: for connecting and the handshake.
    """

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        parts = urlsplit(url)
        secure = parts.scheme in ("wss", "https")
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        self._buffer = bytearray()
        self._message, self._kind = bytearray(), 0
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        try:
            if secure:
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            self._handshake(parts.netloc.rpartition("@")[2], f"{parts.path or '/'}?{parts.query}", timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def receive(self, timeout_s: float) -> tuple[int, bytes] | None:
        """The next message as (TEXT or BINARY, bytes); None when none is complete within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while True:
            frame = self._frame()
            if frame is None:
                if not self._fill(deadline):
                    return None
                continue
            operation, final, data = frame
            if operation == CLOSE:
                raise ConnectionError("the server closed the websocket")
            if operation == PING:
                self._pong(data)
            elif operation in (0, TEXT, BINARY):
                if operation:
                    self._kind, self._message = operation, bytearray()
                self._message += data
                if len(self._message) > MAX_MESSAGE:
                    raise ConnectionError(f"a websocket message is larger than {MAX_MESSAGE >> 20} MiB")
                if final:
                    return self._kind, bytes(self._message)

    def close(self) -> None:
        self._socket.close()

    def _handshake(self, host: str, target: str, timeout_s: float) -> None:
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self._socket.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        deadline = time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEADERS or not self._fill(deadline):
                raise ConnectionError("the server did not answer the websocket handshake")
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        expected = base64.b64encode(hashlib.sha1((key + _ACCEPT).encode()).digest()).decode()
        if " 101 " not in lines[0] + " " or headers.get("sec-websocket-accept") != expected:
            raise ConnectionError(f"the server refused the websocket ({lines[0][:80]})")

    def _fill(self, deadline: float) -> bool:
        """More bytes into the buffer; False when the time is over."""
        left = deadline - time.monotonic()
        self._socket.settimeout(max(left, 0.001))
        try:
            data = self._socket.recv(65536)
        except (TimeoutError, socket.timeout, ssl.SSLWantReadError):  # noqa: UP041 (two classes in Python 3.10's ssl)
            return False
        if not data:
            raise ConnectionError("the websocket ended")
        self._buffer += data
        return True

    def _frame(self) -> tuple[int, bool, bytes] | None:
        """(operation, whether it is the message's last, content) of a complete frame in the buffer."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        if buffer[0] & 0x70 or buffer[1] & 0x80:
            raise ConnectionError("the server sent a websocket frame that a client must refuse")
        length, start = buffer[1] & 0x7F, 2
        if length >= 126:
            form = ">H" if length == 126 else ">Q"
            start += struct.calcsize(form)
            if len(buffer) < start:
                return None
            length = struct.unpack_from(form, buffer, 2)[0]
        if length > MAX_MESSAGE:
            raise ConnectionError(f"a websocket message is larger than {MAX_MESSAGE >> 20} MiB")
        if len(buffer) < start + length:
            return None
        first, data = buffer[0], bytes(buffer[start : start + length])
        del buffer[: start + length]
        return first & 0x0F, bool(first & 0x80), data

    def _pong(self, data: bytes) -> None:
        mask = secrets.token_bytes(4)
        masked = bytes(value ^ mask[i % 4] for i, value in enumerate(data[:125]))
        self._socket.settimeout(10.0)
        self._socket.sendall(bytes([0x8A, 0x80 | len(masked)]) + mask + masked)
