"""One job on one server, from the queue to its end.

The websocket tells how far a job is, and the queue and the history tell where it is. Only the latter two decide: a
websocket that breaks, or that a proxy does not let through, costs the progress and nothing else.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import TriptychError
from .server import Graph, Rejected, Server, Unreachable, called
from .websocket import TEXT, WebSocket

LOOK_S = 15.0  # between looks at queue and history while the websocket lives
POLL_S = 1.0  # without a websocket
END_S = 0.1  # once the server has said that the job ends
LOST_S = 120.0  # how long a server may be silent before its job counts as lost
RETRY_S = (0.25, 1.0, 2.0, 5.0, 10.0)  # between attempts to open the websocket

# What a caller hears of: a node's title, and its share of work done in [0, 1] (None while it is not known).
Progress = Callable[[str, float | None], None]


class JobFailed(TriptychError):
    """The job ended without its results; the sentence names the node."""


class JobLost(TriptychError):
    """The server is gone, or does not know the job any more: it may be queued again."""


@dataclass(frozen=True)
class Finished:
    """outputs: node id -> what it shows, as in the history; cached: ids of the nodes that had nothing to do."""

    prompt_id: str
    outputs: dict[str, Any]
    cached: frozenset[str]


def run_job(server: Server, graph: Graph, progress: Progress | None = None, timeout_s: float | None = None) -> Finished:
    """Queues a graph and waits for its end. A time limit or an exception (KeyboardInterrupt too) cancels the job.

    Raises Rejected, JobFailed, JobLost, Unreachable; TriptychError when ``timeout_s`` is over.
    """
    job = _Job(server, graph, progress or (lambda node, share: None), timeout_s)
    try:
        job.queue()
        return job.wait()
    except (Rejected, JobFailed, JobLost):
        raise
    except BaseException:
        job.cancel()
        raise
    finally:
        job.close()


class _Job:
    def __init__(self, server: Server, graph: Graph, progress: Progress, timeout_s: float | None) -> None:
        self.server, self.graph, self.progress = server, graph, progress
        self.client_id, self.prompt_id = uuid.uuid4().hex, str(uuid.uuid4())
        self.timeout_s = timeout_s
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._socket: WebSocket | None = None
        self._failures, self._next_try = 0, 0.0
        self._ending = False

    def queue(self) -> None:
        self._connect()  # before the job, so that nothing of it is missed
        try:
            self.prompt_id = self.server.queue(self.graph, self.client_id, self.prompt_id)
        except Unreachable:
            if not self._known():  # else only the answer was lost
                raise

    def wait(self) -> Finished:
        silent_since: float | None = None
        next_look = 0.0
        while True:
            now = time.monotonic()
            if self.deadline is not None and now > self.deadline:
                raise TriptychError(
                    f"the job did not end within {self.timeout_s:g} s and was cancelled: allow more time (--timeout)"
                )
            if now >= next_look:
                try:
                    ended = self._look()
                    silent_since = None
                except Unreachable as error:
                    ended, silent_since = None, silent_since or now
                    if now - silent_since > LOST_S:
                        raise JobLost(f"{error}; it has been silent for {LOST_S:g} s while the job ran") from error
                if ended is not None:
                    return ended
                next_look = now + self._pause(silent_since is not None)
            if self._hear(max(next_look - time.monotonic(), 0.0)):
                next_look = 0.0

    def cancel(self) -> None:
        """As far as the server can be reached: the job is being given up anyway."""
        with suppress(TriptychError):
            self.server.cancel(self.prompt_id)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _pause(self, silent: bool) -> float:
        if self._ending:
            return END_S
        return LOOK_S if self._socket is not None and not silent else POLL_S

    def _known(self) -> bool:
        try:
            return self.server.place(self.prompt_id) is not None or self.server.history(self.prompt_id) is not None
        except TriptychError:
            return False

    def _look(self) -> Finished | None:
        """The end of the job, if it has come. First the queue, then the history: a job that leaves the one between
        the two questions is in the other."""
        place = self.server.place(self.prompt_id)
        if place is not None:
            if place:
                self.progress(f"waiting, {place - 1} before it" if place > 1 else "waiting", None)
            return None
        entry = self.server.history(self.prompt_id)
        if entry is None:
            raise JobLost(
                f"{self.server.url} does not know the job any more: it was restarted, or somebody took the job out"
            )
        return self._ended(entry)

    def _ended(self, entry: dict[str, Any]) -> Finished:
        status = entry.get("status") or {}
        messages = [item for item in status.get("messages") or [] if isinstance(item, list) and len(item) == 2]
        for name, data in messages:
            if name == "execution_error":
                reason = str(data.get("exception_message") or data.get("exception_type") or "no reason given").strip()
                raise JobFailed(f"{called(self.graph, str(data.get('node_id')))} failed: {reason}")
            if name == "execution_interrupted":
                raise JobFailed(f"the job was cancelled at {called(self.graph, str(data.get('node_id')))}")
        if status.get("status_str", "success") != "success":
            raise JobFailed(f"{self.server.url} says that the job ended with {status['status_str']!r}: look at its log")
        cached = {str(node) for name, data in messages if name == "execution_cached" for node in data.get("nodes", ())}
        outputs = entry.get("outputs")
        return Finished(self.prompt_id, outputs if isinstance(outputs, dict) else {}, frozenset(cached))

    def _hear(self, seconds: float) -> bool:
        """Listens for at most ``seconds``; whether a message says that the job has ended, or the connection broke."""
        if self.deadline is not None:
            seconds = max(min(seconds, self.deadline - time.monotonic()), 0.0)
        if self._socket is None:
            time.sleep(min(seconds, POLL_S))
            self._connect()
            return False
        try:
            message = self._socket.receive(seconds)
        except OSError:
            self.close()
            self._connect()
            return True
        return message is not None and message[0] == TEXT and self._told(message[1])

    def _told(self, text: bytes) -> bool:
        try:
            content = json.loads(text)
            kind, data = content["type"], content["data"]
            if data.get("prompt_id") != self.prompt_id:
                return False
        except (ValueError, KeyError, TypeError, AttributeError):  # a message of some other pack
            return False
        node = data.get("node")
        if kind == "progress" and data.get("max"):
            self.progress(self._title(node), min(data.get("value", 0) / data["max"], 1.0))
        elif kind == "executing" and node is not None:
            self.progress(self._title(node), None)
        # Some of these come a moment before the job moves to the history.
        ends = kind in ("execution_success", "execution_error", "execution_interrupted")
        self._ending |= ends or (kind == "executing" and node is None)
        return self._ending

    def _title(self, node: Any) -> str:
        known = self.graph.get(str(node)) or {}
        return (known.get("_meta") or {}).get("title") or known.get("class_type") or f"node {node}"

    def _connect(self) -> None:
        if time.monotonic() < self._next_try:
            return
        try:
            self._socket = WebSocket(f"{self.server.url}/ws?clientId={self.client_id}")
            self._failures = 0
        except OSError:
            self._next_try = time.monotonic() + RETRY_S[min(self._failures, len(RETRY_S) - 1)]
            self._failures += 1
