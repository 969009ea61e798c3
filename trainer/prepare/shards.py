"""Packed training data on disk: safetensors shards with a JSON record beside each.

A shard appears under its final name only when it is whole, records last; so a stopped preparation goes on where it was.
Temporary files carry the process's number: two processes that write the same shard cannot mix their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from triptych.errors import TriptychError

FORMAT = 1
SPLIT_SHARES = (("train", 0.95), ("validation", 0.025), ("test", 0.025))


def split_of(content_hash: str) -> str:
    """train, validation or test: a function of the content alone, so it never changes when data is added."""
    place = int(hashlib.sha256(content_hash.encode()).hexdigest()[:8], 16) / 2**32
    for name, share in SPLIT_SHARES:
        if place < share:
            return name
        place -= share
    return SPLIT_SHARES[-1][0]


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises TriptychError when the disk is full or the folder not writable."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1))


def _write(path: Path, save: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save(temporary)
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        said = getattr(error, "strerror", None) or error
        raise TriptychError(
            f"cannot write {path} ({said}): free some space or mend the folder, then run the same command again; "
            "what is finished is kept"
        ) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_shard(folder: Path, name: str, records: list[dict], samples: list[dict[str, np.ndarray]]) -> None:
    """``samples`` row by row as the records' ``rows`` say; a shard without samples has records only."""
    if samples:
        arrays = {key: np.ascontiguousarray(np.stack([s[key] for s in samples])) for key in samples[0]}
        _write(folder / f"{name}.safetensors", lambda temporary: save_file(arrays, str(temporary)))
    write_json(folder / f"{name}.json", records)


def read_records(folder: Path) -> list[dict]:
    """Records of all whole shards, each with ``shard`` added, in shard order.

    A shard that is damaged or lacks its arrays gives no records: its objects count as not yet built.
    """
    found = []
    for path in sorted(folder.glob("shard_*.json")):
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if any(record["rows"] for record in records) and not _is_whole(path.with_suffix(".safetensors")):
            continue
        found += [record | {"shard": path.stem} for record in records]
    return found


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a preparation that was killed."""
    for path in folder.glob("*.part"):
        with suppress(OSError):
            path.unlink()


def _is_whole(path: Path) -> bool:
    """A safetensors file begins with the length of its header, which says where the last array ends."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
            return path.stat().st_size == 8 + length + end
    except (OSError, ValueError, MemoryError, OverflowError):
        return False
