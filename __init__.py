"""ComfyUI's door to Triptych. Importing it anywhere else does nothing: the nodes load when ComfyUI asks for them."""

from pathlib import Path

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

# The built web part, or, before it is built, the help pages and a script that says so; both lie at the same addresses.
WEB_DIRECTORY = "./web/dist" if (Path(__file__).parent / "web" / "dist" / "triptych.js").is_file() else "./web/public"


async def comfy_entrypoint():
    from .nodes import TriptychExtension

    return TriptychExtension()
