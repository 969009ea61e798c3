"""Memory of the process, as the system sees it."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Returns freed memory to the system. The C library of Linux keeps it after large jobs in threads of their own, so
    that a server seems to grow from job to job (14 jobs: 2,249 MiB, and 852 after this)."""
    with suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
