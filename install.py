"""Run by ComfyUI-Manager and comfy-cli after requirements.txt: builds the pack's web part.

A failure is one sentence, and the nodes work without the web part: instead of the viewer they then show how to build it
and links to the models.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from triptych.webbuild import main

if __name__ == "__main__":
    main([])
