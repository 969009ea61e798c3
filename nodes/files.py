"""Mesh files in and out of ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .clean import size_of
from .core_fields import left_out
from .core_mesh import as_mesh
from .paths import checked_name, entry, fingerprint, inside, mesh_files, named_file
from .preview import described, ui_output
from .running import run
from .schema import MeshSocket, mesh_input, schema

if TYPE_CHECKING:
    from ..triptych.geometry.mesh import Mesh

FORMATS = ("obj", "glb", "ply", "stl")


class LoadMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        import folder_paths

        names = list(mesh_files(folder_paths.get_input_directory()))
        return schema(
            "LoadMesh",
            display_name="Load mesh",
            description="Reads a mesh file from ComfyUI's input folder, with its materials and textures.",
            search_aliases=["load 3d", "import obj", "import glb", "open mesh"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=names,
                    tooltip="OBJ, GLB, GLTF, PLY, STL or OFF in ComfyUI's input folder; an OBJ's MTL and pictures "
                    "belong beside it. API clients may add [output] or [temp] to a name.",
                ),
                io.Boolean.Input(
                    "normalize",
                    default=False,
                    tooltip="Centre the mesh and scale its longest side to 1.",
                ),
            ],
            outputs=[MeshSocket.Output("mesh", display_name="mesh", tooltip="The mesh in the file's own frame.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, normalize: bool = False) -> Any:
        if file is None:  # it comes from another node, whose value is not known yet
            return float("nan")
        from ..triptych.api.companions import companions

        path = named_file(file)
        # An OBJ's look depends on its MTL and pictures; one that is not there yet counts as soon as it is.
        return [(str(other), *fingerprint(other)) for other in (path, *companions(path))]

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        try:
            if file is not None:
                named_file(file)
        except TriptychError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, file: str, normalize: bool) -> io.NodeOutput:
        import warnings

        from ..triptych.geometry.files import MeshWarning, read_mesh

        path = named_file(file)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", MeshWarning)
            mesh = run(lambda reporter: read_mesh(path))
        mesh = mesh.normalized() if normalize else mesh
        notes = [str(warning.message) for warning in heard if issubclass(warning.category, MeshWarning)]
        return io.NodeOutput(mesh, ui={"text": ["\n".join([size_of(mesh), *notes])]})


class ExportMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ExportMesh",
            display_name="Export mesh",
            description="Writes a mesh to ComfyUI's output folder: OBJ with MTL and textures, GLB, PLY or STL.",
            search_aliases=["save mesh", "save obj", "save glb", "save 3d", "download"],
            is_output_node=True,
            inputs=[
                mesh_input("mesh", "The mesh to write."),
                io.String.Input(
                    "filename_prefix",
                    default="mesh/Triptych",
                    tooltip="Folder and beginning of the name inside output; a number follows. %date% parts such as "
                    "%year% are filled in.",
                ),
                io.Combo.Input(
                    "file_format",
                    options=list(FORMATS),
                    default="obj",
                    tooltip="obj: with MTL and pictures beside it. glb: one file with everything. ply: vertex colours. "
                    "stl: the bare form, for printing.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "model_file",
                    display_name="model file",
                    tooltip="The name inside output, as ComfyUI's own Preview 3D wants it.",
                ),
                io.String.Output("path", display_name="path", tooltip="The whole path of the mesh file."),
            ],
        )

    @classmethod
    def execute(cls, mesh: Any, filename_prefix: str, file_format: str) -> io.NodeOutput:
        import folder_paths

        source = as_mesh(mesh)
        output = Path(folder_paths.get_output_directory())
        target = free_name(output, filename_prefix, file_format)
        written = run(lambda reporter: export(source, target))
        files = [entry(path, output, "output") for path in written]
        model_file = "/".join(part for part in (files[-1]["subfolder"], files[-1]["filename"]) if part)
        shown = ui_output([files[-1] | described(source, file_format, target.stem)])
        shown |= {"files": files, "result": [model_file, None], "text": [notes(source, file_format)]}
        return io.NodeOutput(model_file, str(target), ui=shown)


def free_name(output: Path, prefix: str, file_format: str) -> Path:
    """The next file by ComfyUI's own rules of prefixes and counters, in a folder that is there.

    Raises TriptychError for a prefix that leads out of the output folder, also through links.
    """
    import folder_paths

    name = checked_name(prefix)
    inside(output, name)
    try:
        folder, stem, counter, _, _ = folder_paths.get_save_image_path(name, str(output))
    except OSError as error:
        raise TriptychError(
            f"the folder of {prefix!r} cannot be used ({error.strerror or error}): choose another prefix"
        ) from error
    inside(output, str(Path(folder).relative_to(output) / stem))
    return Path(folder) / f"{stem}_{counter:05}_.{file_format}"


def export(mesh: Mesh, target: Path) -> list[Path]:
    """Writes the file and its companions; all of them, the mesh file last."""
    from ..triptych.geometry.files import write_mesh

    return write_mesh(mesh, target)


def notes(mesh: Mesh, file_format: str) -> str:
    """Sizes, and what the format cannot hold."""
    lines = [size_of(mesh)]
    if file_format in ("ply", "stl") and any(m.base_color_texture is not None for m in mesh.materials):
        lines.append(f"{file_format.upper()} holds no textures: they are left out")
    if file_format == "stl" and mesh.colors is not None:
        lines.append("STL holds no vertex colours: they are left out")
    return "\n".join([*lines, *left_out(mesh)])
