"""UV unwrapping with xatlas: charts grown greedily over the surface, flattened, and packed into one square texture.

Vertices and faces keep their order: the layout comes back as corner UV (``uv`` and ``uv_faces``), so an OBJ written
from the mesh stays welded across the seams. The same mesh gives the same layout, bit for bit.

Options, chosen by measurement on noisy isosurfaces (two CPU cores): one chart iteration and the random packer take
1-2.5 s at 20,000-27,000 faces, about 6 s at 100,000; brute-force packing multiplies that for a few per cent of
utilisation. A lower chart cost makes no difference in time; the default of 2 keeps the stretch low.

xatlas picks its own scale and overshoots the resolution it is asked for (by 25 % on a thousand charts), which would
shrink the gutter between charts by as much: the padding is asked for with that reserve, and the report states the
gutter that came out. xatlas also keeps Python's lock from its start to its end, which would stop every other thread, a
server's answers and its cancel button among them: off the main thread, and where the caller may cancel, it runs in a
process of its own, which a cancel ends at once.

Not covered: keeping artists' seams, symmetric layouts, several texture pages.
"""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import TriptychError
from .mesh import Mesh

TEXTURE_SIZE_RANGE = (64, 8192)  # texels
MAX_UNWRAP_FACES = 1_000_000  # about a minute; beyond that decimate first
_APART_FACES = 2000  # fewer take less time than starting a process
_POLL_S = 0.05
_SIZE_RESERVE = 1.3  # xatlas's overshoot over the resolution it is asked for


@dataclass(frozen=True)
class UnwrapReport:
    """What the unwrap made: charts; share of the texture square covered by charts, 0-1; the smallest gutter between
    two charts in texels; faces without a place of their own, which are those without an area."""

    charts: int
    utilisation: float
    gutter_texels: float
    unplaced_faces: int


def check_texture_size(texture_size: int) -> int:
    """Raises TriptychError unless the side of the texture, in texels, lies in 64-8192."""
    low, high = TEXTURE_SIZE_RANGE
    if not low <= texture_size <= high or int(texture_size) != texture_size:
        raise TriptychError(f"the texture size is {texture_size}: choose a whole number from {low} to {high} texels")
    return int(texture_size)


def unwrap(mesh: Mesh, *, texture_size: int = 1024, padding: int = 3, cancel: Callable[[], bool] | None = None) -> Mesh:
    """``mesh`` with a fresh one-to-one UV layout in [0, 1]^2, in ``uv`` (T, 2) float32 and ``uv_faces`` (F, 3) int64.

    texture_size: side in texels, 64-8192, that the gutter is meant for. padding: gutter between charts in texels.
    Geometry, colours and materials are kept. Raises TriptychError for an empty mesh, non-finite vertices, indices
    out of range, more than a million faces, or when no face has an area. cancel() is asked while xatlas works; when it
    returns True, ``sampling.flow_euler.Cancelled`` is raised.
    """
    return unwrap_with_report(mesh, texture_size=texture_size, padding=padding, cancel=cancel)[0]


def unwrap_with_report(
    mesh: Mesh, *, texture_size: int = 1024, padding: int = 3, cancel: Callable[[], bool] | None = None
) -> tuple[Mesh, UnwrapReport]:
    """As ``unwrap``, with the numbers."""
    check_texture_size(texture_size)
    if not 0 <= padding <= 64:
        raise TriptychError(f"the UV padding is {padding}: choose 0 to 64 texels")
    _check_mesh(mesh)
    # Scaled to a unit box: xatlas compares areas and lengths with absolute epsilons.
    vertices = mesh.vertices.astype(np.float64)
    low, extent = vertices.min(axis=0), np.ptp(vertices, axis=0).max()
    unit_vertices = np.ascontiguousarray((vertices - low) / extent, dtype=np.float32)
    pack_padding = int(np.ceil(padding * _SIZE_RESERVE))
    needs_process = cancel is not None or threading.current_thread() is not threading.main_thread()
    given = (unit_vertices, mesh.faces.astype(np.uint32), texture_size, pack_padding)
    is_apart = needs_process and len(mesh.faces) >= _APART_FACES
    atlas = _generate_apart(*given, cancel) if is_apart else generate_atlas(*given)
    pages, charts, width, height = atlas["sizes"].tolist()
    if pages != 1 or width == 0 or height == 0:
        raise TriptychError(
            f"the UV unwrap made {pages} texture pages of {width} x {height} texels instead of"
            " one: the mesh has no face with an area, so clean it up first"
        )
    uv = _square(atlas["uv"], width, height)
    uv_faces = atlas["uv_faces"].astype(np.int64)
    unplaced = _unplaced(uv[uv_faces])
    uv_faces = _place_degenerate(mesh.faces, uv_faces, unplaced)
    side = max(width, height)
    report = UnwrapReport(
        charts=charts,
        utilisation=float(_signed_area(uv[uv_faces][~unplaced]).sum()),
        gutter_texels=float(pack_padding * texture_size / side),
        unplaced_faces=int(unplaced.sum()),
    )
    return mesh.replace(uv=uv, uv_faces=uv_faces), report


def generate_atlas(vertices: np.ndarray, faces: np.ndarray, texture_size: int, padding: int) -> dict[str, np.ndarray]:
    """xatlas's layout: uv_faces (F, 3), uv (T, 2) in shares of the width and height, and sizes: pages, charts, width,
    height. vertices (V, 3) float32, faces (F, 3) uint32."""
    import xatlas  # here, so that reading a mesh never waits for it

    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices, np.ascontiguousarray(faces))
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_iterations = 1
    pack.bruteForce = False
    pack.bilinear = True  # a texel of reserve for bilinear sampling, besides the padding
    pack.resolution = texture_size
    pack.padding = padding
    atlas.generate(charts, pack)
    sizes = np.array([atlas.atlas_count, atlas.chart_count, atlas.width, atlas.height])
    _, uv_faces, uv = atlas[0]
    return {"uv_faces": uv_faces, "uv": uv, "sizes": sizes}


def _generate_apart(
    vertices: np.ndarray, faces: np.ndarray, texture_size: int, padding: int, cancel: Callable[[], bool] | None = None
) -> dict[str, np.ndarray]:
    """``generate_atlas`` in a process of its own, or here where none can be started. Raises Cancelled."""
    stream = io.BytesIO()
    np.savez(stream, vertices=vertices, faces=faces, numbers=np.array([texture_size, padding]))
    # The function's own text is enough there: the child imports neither the package nor torch.
    code = (
        "from __future__ import annotations\nimport io, sys\nimport numpy as np\n"
        + inspect.getsource(generate_atlas)
        + "given = np.load(io.BytesIO(sys.stdin.buffer.read()))\nout = io.BytesIO()\n"
        "np.savez(out, **generate_atlas(given['vertices'], given['faces'], *given['numbers'].tolist()))\n"
        "sys.stdout.buffer.write(out.getvalue())\n"
    )
    try:
        output = _run_until(code, stream.getvalue(), cancel)
    except (OSError, subprocess.CalledProcessError):
        return generate_atlas(vertices, faces, texture_size, padding)
    with np.load(io.BytesIO(output)) as made:
        return {name: made[name] for name in made.files}


def _run_until(code: str, given: bytes, cancel: Callable[[], bool] | None) -> bytes:
    """What a Python process makes of ``given``; it is ended when cancel() says so, and Cancelled raised."""
    from ..sampling.flow_euler import Cancelled  # brings torch, which meshes alone do not need

    command = [sys.executable, "-c", code]
    # From a file: communicate() with a timeout loses what did not fit into a pipe at first.
    with tempfile.TemporaryFile() as source:
        source.write(given)
        source.seek(0)
        with subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while True:
                try:
                    output, _ = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if cancel is not None and cancel():
                        process.kill()
                        raise Cancelled("stopped while unwrapping the mesh") from None
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, sys.executable)
    return output


def _check_mesh(mesh: Mesh) -> None:
    if len(mesh.faces) == 0:
        raise TriptychError("the mesh has no faces: nothing to unwrap")
    if len(mesh.faces) > MAX_UNWRAP_FACES:
        raise TriptychError(
            f"the mesh has {len(mesh.faces)} faces and UV unwrapping takes {MAX_UNWRAP_FACES}: decimate it first"
        )
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        raise TriptychError(f"a face names vertex {mesh.faces.max()} of {len(mesh.vertices)}: the mesh is broken")
    if not np.isfinite(mesh.vertices).all():
        raise TriptychError("the mesh has vertices that are not finite numbers: clean it up before unwrapping")
    if mesh.face_normals().any(axis=1).sum() == 0:
        raise TriptychError(f"none of the mesh's {len(mesh.faces)} faces has an area: nothing to unwrap")


def _square(uv: np.ndarray, width: int, height: int) -> np.ndarray:
    """xatlas scales each axis by its own side; one scale for both keeps texels square."""
    scale = np.array([width, height], np.float32) / max(width, height)
    return np.clip(np.nan_to_num(uv.astype(np.float32)) * scale, 0.0, 1.0)


def _signed_area(uv_F32: np.ndarray) -> np.ndarray:
    a, b = uv_F32[:, 1] - uv_F32[:, 0], uv_F32[:, 2] - uv_F32[:, 0]
    return np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).astype(np.float64) / 2


def _unplaced(uv_F32: np.ndarray) -> np.ndarray:
    """xatlas leaves the faces that it ignores at the origin."""
    return (uv_F32 == 0).all(axis=(1, 2))


def _place_degenerate(faces: np.ndarray, uv_faces: np.ndarray, unplaced: np.ndarray) -> np.ndarray:
    """A face without an area shrinks to one point of the layout, some place of one of its vertices: corners in
    different charts would draw a line across the texture."""
    if not unplaced.any():
        return uv_faces
    place_of_vertex = np.full(faces.max() + 1, -1, np.int64)
    place_of_vertex[faces[~unplaced].ravel()] = uv_faces[~unplaced].ravel()
    place = place_of_vertex[faces[unplaced]].max(axis=1, keepdims=True)
    result = uv_faces.copy()
    result[unplaced] = np.where(place >= 0, place, uv_faces[unplaced][:, :1])
    return result
