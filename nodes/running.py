"""A long library call with ComfyUI's progress bar, preview pictures and cancel button.

The work runs in a thread of its own, and the calling thread only listens. So a cancel is answered within a fraction
of a second even while the library is inside one network evaluation or one UV unwrap, which nothing can stop midway.
Such a remnant ends alone, at its next question whether to stop, and its result is dropped; a later call waits for
it, so two never compete for the machine. ComfyUI's own functions are called from the calling thread only.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

POLL_S = 0.1
BAR_STEPS = 1000
PREVIEW_SIZE = 256  # pixels: ComfyUI scales pictures to this
_BUSY = threading.Lock()


class Reporter:
    """What the work may call, from its own thread: the library's progress and cancel callbacks, and a picture."""

    def __init__(self, updates: SimpleQueue[tuple[str, Any]], stop: threading.Event) -> None:
        self._updates, self._stop = updates, stop

    def progress(self, stage: str, fraction: float) -> None:
        self._updates.put(("progress", fraction))

    def picture(self, image: Image) -> None:
        self._updates.put(("picture", image))

    def cancel(self) -> bool:
        return self._stop.is_set()


def run(work: Callable[[Reporter], T]) -> T:
    """``work(reporter)``'s result or exception; ComfyUI's interrupt exception as soon as the user cancels."""
    from comfy.model_management import throw_exception_if_processing_interrupted as check
    from comfy.utils import ProgressBar

    updates: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    bar, stop = ProgressBar(BAR_STEPS), threading.Event()
    while not _BUSY.acquire(timeout=POLL_S):
        check()
    body = _body(work, Reporter(updates, stop), updates)
    threading.Thread(target=contextvars.copy_context().run, args=(body,), name="triptych", daemon=True).start()
    value = 0
    try:
        while True:
            try:
                kind, content = updates.get(timeout=POLL_S)
            except Empty:
                check()
                continue
            if kind == "result":
                return content
            if kind == "error":
                raise content
            if kind == "progress":
                value = round(content * BAR_STEPS)
            preview = ("JPEG", content, PREVIEW_SIZE) if kind == "picture" else None
            bar.update_absolute(value, BAR_STEPS, preview)  # raises when interrupted
            check()
    finally:
        stop.set()


def _body(
    work: Callable[[Reporter], T], reporter: Reporter, updates: SimpleQueue[tuple[str, Any]]
) -> Callable[[], None]:
    import torch

    inference = torch.is_inference_mode_enabled()  # a mode of the thread that ComfyUI calls nodes in

    def body() -> None:
        try:
            with torch.inference_mode(inference):
                updates.put(("result", work(reporter)))
        except BaseException as error:  # carried to the caller, which raises it
            updates.put(("error", error))
        finally:
            _BUSY.release()

    return body
