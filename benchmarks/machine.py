"""Where and on what a benchmark ran, in one line."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe() -> str:
    """Processor count, torch version, threads, and the commit (with + when the tree differs from it)."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "no commit"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, commit {commit}"
    )
