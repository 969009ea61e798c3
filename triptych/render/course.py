"""How far a long piece of work is, and whether it shall go on: one object that its parts hand on to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..sampling.flow_euler import Cancelled

Progress = Callable[[float], None]
Cancel = Callable[[], bool]


@dataclass(frozen=True)
class Course:
    """A stretch of the work, from ``begin`` to ``end`` of the whole (0-1), with its owner's callbacks."""

    progress: Progress | None = None
    cancel: Cancel | None = None
    begin: float = 0.0
    end: float = 1.0

    def at(self, share: float) -> None:
        """Tells the owner that ``share`` (0-1) of the stretch is done. Raises Cancelled when cancel() says so."""
        if self.cancel is not None and self.cancel():
            raise Cancelled("stopped on request")
        if self.progress is not None:
            self.progress(self.begin + (self.end - self.begin) * share)

    def part(self, begin: float, end: float) -> Course:
        """A stretch of this stretch, given in shares of it."""
        width = self.end - self.begin
        return replace(self, begin=self.begin + width * begin, end=self.begin + width * end)
