"""What the user reads while a command runs and when it ends."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


@contextmanager
def heard_warnings(already: list[str] | None = None) -> Iterator[list[str]]:
    """The sentences of this package's warnings, on stderr as they come, once each; other packages' are dropped."""
    from ..geometry.limits import MeshWarning

    heard: list[str] = [] if already is None else already

    def hear(message, category, filename, lineno, file=None, line=None) -> None:
        ours = issubclass(category, MeshWarning) or Path(filename).is_relative_to(_PACKAGE)
        if ours and issubclass(category, UserWarning) and str(message) not in heard:
            heard.append(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = hear
        yield heard


class Progress:
    """A bar on stderr where that is a terminal; tqdm keeps it off the result on stdout."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=100,
            file=sys.stderr,
            disable=True if quiet else None,  # None: only where there is no terminal
            leave=False,
            bar_format="{desc:<10} {percentage:3.0f}% |{bar:30}| {elapsed}",
        )

    def __enter__(self) -> Progress:
        return self

    def show(self, stage: str, fraction: float) -> None:
        """stage: what is going on; fraction: of the whole, 0-1."""
        self._bar.set_description_str(stage, refresh=False)
        self._bar.update(max(0.0, 100 * fraction - self._bar.n))
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def to_json(summary: Any) -> str:
    """ASCII, so that any terminal and any file encoding carries it; NaN and infinity are errors of ours."""
    text = json.dumps(summary, indent=1, default=str, allow_nan=False)
    # Vectors on one line; a string never holds a line break.
    return re.sub(r"\[\n\s+([-+.,\deE\s]+?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def write_summary(summary: Any, path: Path) -> None:
    """Raises TriptychError when the folder cannot be written."""
    from ..geometry.files import write_files

    write_files(path.parent, {path.name: (to_json(summary) + "\n").encode()})
