"""Objects that kill their worker process, or never end: what a worker is asked to build in tests/test_prepare.py.

Apart from the tests, so that a worker process loads nothing heavy to get at it.
"""

import os
import time

import numpy as np


def build(source):
    """A one-voxel sample; the object's name says what happens instead. Its path is a folder to leave marks in."""
    if source.name == "kills":
        os._exit(9)
    if source.name == "kills once" and not (source.path / "killed").exists():
        (source.path / "killed").touch()
        os._exit(9)
    if source.name == "hangs":
        time.sleep(600)
    record = {"status": "ok", "gate": None, "reason": None, "flags": [], "file_bytes": 1, "pid": os.getpid()}
    return record, [{"sdf": np.full((1, 1, 1), len(source.key), np.int8)}]
