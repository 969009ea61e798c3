"""Files that appear together or not at all, under names that no other file has."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import TriptychError


class Export:
    """A folder that receives files.

    with Export(folder, overwrite=False) as export:   # the folder is made, and proven to be writable
        write(export.place("a.obj"))                  # any writer; the file is in a hidden folder for now
        files = export.commit()                       # moved to their names

    Whatever is raised before the end of the block, an interruption included, removes what is new: placed files,
    committed files, and folders that were made for them. A file that was replaced keeps its new, complete content.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self._made: list[Path] = []
        self._new: list[Path] = []
        self._staging: Path | None = None

    def __enter__(self) -> Export:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                self._made.append(path)
            os.rmdir(self._make_staging())
        except OSError as error:
            self._clear(keep_new=False)
            raise self._refusal(error) from error
        return self

    def place(self, name: str) -> Path:
        """Where to write the file that will be ``name``."""
        if self._staging is None:
            try:
                self._staging = Path(self._make_staging())
            except OSError as error:
                raise self._refusal(error) from error
        return self._staging / name

    def commit(self) -> list[Path]:
        """Moves what was placed to its names. Raises TriptychError when one exists already, unless ``overwrite``."""
        if self._staging is None:
            return []
        # A mesh comes after what it refers to.
        staged = sorted(self._staging.iterdir(), key=lambda path: (path.suffix not in (".png", ".mtl"), path.name))
        targets = [self.folder / path.name for path in staged]
        taken = [str(target) for target in targets if target.exists()]
        if taken and not self.overwrite:
            exist = "exists" if len(taken) == 1 else "exist"
            raise TriptychError(f"{', '.join(taken)} {exist} already: choose another name, or add --overwrite")
        for path, target in zip(staged, targets, strict=True):
            if not target.exists():
                self._new.append(target)
            os.replace(path, target)
        self._staging.rmdir()
        self._staging = None
        return targets

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear(keep_new=error is None)
        # The writers' own sentences name the hidden folder.
        cause = error if isinstance(error, OSError) else error.__cause__ if isinstance(error, TriptychError) else None
        if isinstance(cause, OSError) and self._staging is not None:
            raise self._refusal(cause) from error

    def _make_staging(self) -> str:
        return tempfile.mkdtemp(prefix=".triptych-", suffix=".part", dir=self.folder)

    def _clear(self, keep_new: bool) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        if keep_new:
            return
        for path in self._new:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for path in reversed(self._made):
            with suppress(OSError):  # somebody else may have put a file there meanwhile
                path.rmdir()

    def _refusal(self, error: OSError) -> TriptychError:
        blocker = next((path for path in (self.folder, *self.folder.parents) if path.is_file()), None)
        if blocker is not None:
            return TriptychError(f"{blocker} is a file where a folder is needed: choose another output folder")
        reason = error.strerror or error
        return TriptychError(
            f"cannot write into {self.folder} ({reason}): choose another output folder or free some space"
        )


def free_number(folder: Path, stem: str, others: Iterable[str] = ()) -> str:
    """``""``, else ``_00002`` and so on: the first number with which none of an export's files exists.

    others: names beside those of the mesh, with ``{stem}`` and ``{number}`` in them.
    """
    from ..geometry.files import free_stem

    patterns = tuple(others)
    for count in itertools.count(1):
        number = "" if count == 1 else f"_{count:05d}"
        names = [pattern.format(stem=stem + number, number=number) for pattern in patterns]
        if free_stem(folder, stem + number) == stem + number and not any((folder / name).exists() for name in names):
            return number
    raise AssertionError("itertools.count ends never")
