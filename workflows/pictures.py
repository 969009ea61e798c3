"""Draws NAME.jpg beside each workflow, which the editor's template dialog shows:

    python workflows/pictures.py

Everything in them is made here: pictures of the sample object, and what the embedded bundle reconstructs from them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from triptych.bundles.bundle import load_bundle  # noqa: E402
from triptych.geometry.mesh import Mesh  # noqa: E402
from triptych.images.views import prepare_views  # noqa: E402
from triptych.pipelines.reconstruct import Settings, mesh_from_views  # noqa: E402
from triptych.procedural import sample_object, sample_views  # noqa: E402
from triptych.render.views import orbit_camera, render_mesh  # noqa: E402
