"""Packed training data on disk: safetensors shards with a JSON record beside each.

A shard appears under its final name only when it is whole, records last; so a stopped preparation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

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


def write_json(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_shard(folder: Path, name: str, records: list[dict], samples: list[dict[str, np.ndarray]]) -> None:
    """``samples`` row by row as the records' ``rows`` say; a shard without samples has records only."""
    if samples:
        path = folder / f"{name}.safetensors"
        temporary = path.with_name(path.name + ".part")
        save_file({key: np.ascontiguousarray(np.stack([s[key] for s in samples])) for key in samples[0]}, str(temporary))
        temporary.replace(path)
    write_json(folder / f"{name}.json", records)


def read_records(folder: Path) -> list[dict]:
    """Records of all whole shards, each with ``shard`` added, in shard order."""
    found = []
    for path in sorted(folder.glob("shard_*.json")):
        found += [record | {"shard": path.stem} for record in json.loads(path.read_text(encoding="utf-8"))]
    return found
