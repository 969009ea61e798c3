"""What the commands accept. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..errors import TriptychError

# tests/test_cli.py compares these with the library's own, which cost seconds to import.
VIEWS = ("front", "left", "back", "right")
FORMATS = ("obj", "glb", "gltf", "ply", "stl", "off")
RENDER_MODES = ("shaded", "albedo", "clay", "normal", "depth")
FOREGROUNDS = ("auto", "alpha", "plain", "matting")
OFFLOADS = ("auto", "none", "model", "sequential")
QUANTISATIONS = ("none", "int8", "nf4", "fp8")


class UsageError(TriptychError):
    """The command line itself is wrong: exit code 2."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of one command, ``command`` among them. Raises SystemExit as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m triptych",
        description="Views of an object in, a textured mesh out.",
        epilog="Each command explains itself: python -m triptych COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"triptych {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_views(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_convert(commands)
    _add_render(commands)
    _add_inspect(commands)
    _add_compare(commands)
    _add_parity(commands)
    _add_api(commands)
    return parser.parse_args(argv)


def _add_views(commands: argparse._SubParsersAction) -> None:
    views = commands.add_parser(
        "views",
        help="one to four pictures of an object -> a textured mesh",
        description="One to four pictures of one object, from its front, left, back and right (the object's own left "
        "and right), become a textured mesh. Prints a JSON summary.",
    )
    _add_pictures(views)
    _add_target(views)
    _add_settings(views)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="PATH",
        help="a mesh file, whose suffix is the default format, or a folder; what exists there is kept, and the new "
        "files get a number",
    )
    parser.add_argument("--formats", type=_formats, metavar="LIST", help=f"comma-separated, of {','.join(FORMATS)}")
    parser.add_argument("--viewer", action="store_true", help="also write viewer.html, a page that shows the mesh")
    parser.add_argument("--turntable", action="store_true", help="also write a picture of the mesh from eight sides")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="a sentence, a photo, or some of the views -> a textured mesh",
        description="A Flux model draws the views that are missing of front, left, back and right (the object's own "
        "left and right); then all four become a textured mesh, as with the command views. Prints a JSON summary; the "
        "views lie beside the mesh as NAME_views.png.",
    )
    generate.add_argument(
        "words",
        nargs="*",
        metavar="PROMPT|PICTURE",
        help='what the object is, such as "a red chair", and picture files, in the order front, left, back, right; at '
        "least one of them",
    )
    for name in VIEWS:
        generate.add_argument(f"--{name}", metavar="FILE", help=f"the {name} view, by name")
    _add_target(generate)
    _add_drawing(generate)
    _add_settings(generate)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """How the views are generated; cli/generate.py reads these as ViewOptions."""
    parser.add_argument(
        "--views-model",
        default="triptych-tiny",
        metavar="MODEL",
        help="what draws the views: a name, a folder, or a Hugging Face id (default: triptych-tiny, the embedded one)",
    )
    parser.add_argument("--lora", metavar="FILE", help="a LoRA for that model, a safetensors file")
    parser.add_argument("--lora-strength", type=float, default=1.0, metavar="X", help="default: 1")
    parser.add_argument(
        "--views-steps", type=_whole(1, 1000), metavar="N", help="sampling steps of the views (default: the model's)"
    )
    parser.add_argument(
        "--views-guidance",
        type=float,
        metavar="X",
        help="how closely the views follow the prompt (default: the model's)",
    )
    parser.add_argument(
        "--rerolls",
        type=_whole(0, 100),
        default=2,
        metavar="N",
        help="how often faulty views are drawn again at most, each time with the next seed (default: 2)",
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="auto",
        help="what of the views model waits in main memory while it is not needed (default: auto)",
    )
    parser.add_argument(
        "--quantisation",
        choices=QUANTISATIONS,
        default="none",
        help="smaller weights of the views model (default: none)",
    )
    parser.add_argument("--sheet-out", type=Path, metavar="PNG", help="also write the sheet of the four views here")
    parser.add_argument(
        "--views-out",
        type=Path,
        metavar="DIR",
        help="also write each view here: front.png, left.png, back.png, right.png",
    )


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="the main job with everything it can write; without pictures on a sample object",
        description="One to four pictures, in the order front, left, back, right -> OBJ, GLB, turntable and "
        "viewer.html. Without pictures: views of a small sample object.",
    )
    _add_pictures(demo)
    demo.add_argument("-o", "--out", default="out", metavar="DIR", help="output folder (default: out)")
    _add_settings(demo)
    demo.add_argument(
        "--no-generate", action="store_true", help="take a single picture alone, without views that a model adds"
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pictures", nargs="*", metavar="PICTURE", help="PNG, JPEG or WebP, in the order front, left, back, right"
    )
    for name in VIEWS:
        parser.add_argument(f"--{name}", metavar="FILE", help=f"the {name} view, by name")
    parser.add_argument(
        "--sheet", metavar="FILE", help="all views in one picture: 2 x 2 (front left / back right), or a row of 3 or 4"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="BUNDLE", help="a bundle's folder or name (default: the embedded one)")
    parser.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, help="of the noise (default: 0)")
    parser.add_argument("--steps", type=_whole(1, 1000), help="sampling steps (default: the bundle's)")
    parser.add_argument(
        "--ensemble",
        type=_whole(1, 8),
        default=4,
        metavar="N",
        help="poses of the object, 1-8, whose results are averaged: fewer are faster (default: 4)",
    )
    parser.add_argument("--guidance", type=float, help="guidance strength (default: the bundle's)")
    parser.add_argument("--first-stage-only", action="store_true", help="the first stage's surface, without the second")
    parser.add_argument(
        "--multi-view",
        choices=("stochastic", "multidiffusion", "concat", "lifting"),
        help="how a published bundle sees several pictures (default: one after the other, stochastic)",
    )
    parser.add_argument(
        "--texture-size",
        type=_whole(0, 8192),
        default=1024,
        metavar="TEXELS",
        help="side of the texture; 0 writes vertex colours instead (default: 1024)",
    )
    parser.add_argument(
        "--faces", type=_whole(0, 10**7), default=12_000, help="about how many triangles; 0 keeps all (default: 12000)"
    )
    parser.add_argument(
        "--foreground",
        choices=FOREGROUNDS,
        default="auto",
        help="how to cut the object out: by its alpha, from a plain background, by a matting model (default: auto)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON summary to FILE")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    formats = ", ".join(FORMATS).upper()
    convert = commands.add_parser(
        "convert",
        help="one mesh format to another, with cleaning",
        description=f"Reads and writes {formats}. The cleaning steps run in the order that they are listed in.",
    )
    convert.add_argument("source", type=Path, metavar="IN")
    convert.add_argument("target", type=Path, metavar="OUT")
    convert.add_argument(
        "--clean",
        action="store_true",
        help="merge equal vertices, drop degenerate and doubled faces, and parts below 1%% of the largest one's area",
    )
    convert.add_argument("--fill-holes", action="store_true", help="close open borders of up to 64 edges")
    convert.add_argument("--smooth", type=_whole(1, 1000), metavar="N", help="N rounds, without shrinking it")
    convert.add_argument("--faces", type=_whole(4, 10**8), metavar="N", help="reduce to about N triangles")
    convert.add_argument("--normalize", action="store_true", help="centre it, longest side 1")
    convert.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _add_render(commands: argparse._SubParsersAction) -> None:
    render = commands.add_parser("render", help="pictures of a mesh", description="A mesh from several sides, one PNG.")
    render.add_argument("source", type=Path, metavar="IN")
    render.add_argument("-o", "--out", type=Path, required=True, metavar="PNG")
    render.add_argument("--mode", choices=RENDER_MODES, default="shaded", help="default: shaded")
    sides = render.add_mutually_exclusive_group()
    sides.add_argument(
        "--azimuths", type=float, nargs="+", metavar="DEG", help="0 front, 90 the object's left, 180 back, 270 right"
    )
    sides.add_argument("--turntable", type=_whole(1, 360), metavar="N", help="N even azimuths (default: 8)")
    render.add_argument("--elevation", type=float, default=15.0, metavar="DEG", help="default: 15")
    render.add_argument("--size", type=_whole(16, 4096), default=256, help="pixels per picture and side (default: 256)")
    render.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what is in mesh files and bundles, as JSON",
        description="Counts, bounds, watertightness, materials and so on of mesh files; for the folder of a bundle, "
        "checks every file and lists the networks.",
    )
    inspect.add_argument("paths", type=Path, nargs="+", metavar="FILE")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare",
        help="how close two meshes are, as JSON",
        description="Chamfer distance (mean of both directions), F-scores, normal consistency, and volume IoU where "
        "both are watertight. B is the reference.",
    )
    compare.add_argument("a", type=Path, metavar="A")
    compare.add_argument("b", type=Path, metavar="B")
    compare.add_argument("--samples", type=_whole(100, 10**7), default=30_000, help="points a surface (default: 30000)")
    compare.add_argument(
        "--thresholds",
        type=_thresholds,
        default=(0.01, 0.02, 0.05),
        metavar="LIST",
        help="of the F-score, comma-separated, in the meshes' units (default: 0.01,0.02,0.05)",
    )
    compare.add_argument(
        "--align",
        choices=("none", "normalize"),
        default="none",
        help="normalize: centre both and scale their longest sides to 1 first (default: none)",
    )
    compare.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, help="of the samples (default: 0)")


def _add_parity(commands: argparse._SubParsersAction) -> None:
    parity = commands.add_parser(
        "parity",
        help="compare the networks with reference files of the original implementation",
        description="Runs each reference file (weights, inputs and outputs in one safetensors file, settings in its "
        "metadata) and prints the largest error of each output beside what is allowed. Exit code 1: one is over; "
        "2: a file cannot be run.",
    )
    parity.add_argument("files", type=Path, nargs="+", metavar="FILE")


def _add_api(commands: argparse._SubParsersAction) -> None:
    api = commands.add_parser(
        "api",
        help="a workflow on one or several ComfyUI servers -> its files here",
        description="Queues a ComfyUI workflow, in API form or as the editor saves it, follows it and downloads what "
        "it makes. Ctrl-C cancels the job. Prints a JSON summary.",
    )
    api.add_argument("workflow", type=Path, metavar="WORKFLOW", help="a JSON file, or the name of one of workflows/")
    api.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a picture or mesh for the node with this title or id, as in front=chair.png; what an OBJ or glTF refers "
        "to travels with it; may be repeated",
    )
    api.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="a setting of the node with this title, id or class, as in Reconstruct.seed=7; may be repeated",
    )
    api.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NODE",
        help="leave a node out, such as the loader of a view that you do not have; may be repeated",
    )
    api.add_argument(
        "--server",
        action="append",
        metavar="URL",
        help="default: http://127.0.0.1:8188; may be repeated: the job goes to the one with the shortest queue",
    )
    api.add_argument("-o", "--out", type=Path, metavar="DIR", help="where the files go")
    api.add_argument("--overwrite", action="store_true", help="replace files of the same names")
    api.add_argument("--no-previews", action="store_true", help="leave out what the server keeps for show only")
    api.add_argument("--timeout", type=_seconds, metavar="S", help="cancel the job when it takes longer")
    api.add_argument("--print-api", action="store_true", help="print the API form instead of queueing it")
    api.add_argument("--quiet", action="store_true", help="no progress")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number in [low, high]."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return value

    return convert


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip().lower().lstrip(".") for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(FORMATS)}, got {text!r}")
    return names


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"must be positive numbers with commas between them, got {text!r}")
    return values
