"""``views`` and ``demo``: pictures of one object -> mesh files."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TriptychError
from .arguments import FORMATS, VIEWS, UsageError
from .output import Export, free_number
from .report import Progress, heard_warnings, to_json, warn, write_summary

if TYPE_CHECKING:
    import numpy as np

    from ..bundles.bundle import Bundle
    from ..geometry.mesh import Mesh
    from ..images.views import ViewSet

TURNTABLE, VIEWER, INPUTS = "{stem}_turntable.png", "viewer{number}.html", "{stem}_views.png"
# Where in the whole the pipeline's own 0-1 lies; the rest is preparation, loading and writing.
_PIPELINE = (0.15, 0.9)
GENERATED = "generated"  # what the summary calls a view that nobody gave


@dataclass(frozen=True)
class Wanted:
    """What to write. stem: None takes it from the pictures."""

    folder: Path
    stem: str | None
    formats: tuple[str, ...]
    viewer: bool
    turntable: bool


@dataclass(frozen=True)
class Inputs:
    """The views to reconstruct from. pictures: sources by view. labels: what the summary calls each.

    name: the object's, for files. foreground: how to cut it out. sheet: a picture of the views to keep beside the mesh,
    (H, W, 3|4) float 0-1; None keeps nothing. summary: further entries of the summary. extra: further PNGs to write.
    prepared: the pictures as a view set of VIEW_SIZE, where there is one already: it knows which of them are drawn.
    """

    pictures: dict[str, Any]
    labels: dict[str, str]
    name: str
    foreground: str
    sheet: np.ndarray | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    extra: dict[Path, np.ndarray] = field(default_factory=dict)
    prepared: ViewSet | None = None


def views(args: argparse.Namespace) -> int:
    if not (args.pictures or args.sheet or any(getattr(args, name) for name in VIEWS)):
        raise UsageError("no pictures were given: name one to four files, or --sheet FILE (see views --help)")
    print(to_json(reconstruct(args, wanted_files(args), lambda device, clock: _read_views(args))))
    return 0


def demo(args: argparse.Namespace) -> int:
    wanted = Wanted(Path(args.out), None, ("obj", "glb"), viewer=True, turntable=True)
    files = {} if args.sheet else picture_files(args)
    if not files and not args.sheet:
        gather = lambda device, clock: _sample_inputs(args)  # noqa: E731
    elif len(files) == 1 and not args.no_generate and _can_generate():
        from .generate import ViewOptions, generated_inputs

        gather = lambda device, clock: generated_inputs("", files, ViewOptions.of(args), device, clock)  # noqa: E731
    else:
        gather = lambda device, clock: _read_views(args)  # noqa: E731
    print(_in_words(reconstruct(args, wanted, gather)))
    return 0


def _can_generate() -> bool:
    """Whether the embedded views model is here and can be run; says so when only a package is missing."""
    from importlib.util import find_spec

    from ..flux import card, hub

    if not (hub.EMBEDDED_FOLDER / card.CARD).is_file():
        return False
    missing = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if missing:
        warn(f"the other views are not generated, which needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return not missing


def wanted_files(args: argparse.Namespace) -> Wanted:
    folder, stem, suffix = _split_target(args.out)
    return Wanted(folder, stem, args.formats or (suffix,), args.viewer, args.turntable)


def _split_target(out: str) -> tuple[Path, str | None, str]:
    """-o -> folder, stem or None, format. A path with the suffix of a mesh is a file, one without any a folder."""
    path = Path(out)
    suffix = path.suffix.lower().lstrip(".")
    if path.is_dir() or out.endswith(("/", "\\")) or not suffix:
        return path, None, "obj"
    if suffix not in FORMATS:
        raise UsageError(f"-o {out} has no suffix of a mesh format: use one of {', '.join(FORMATS)}, or name a folder")
    return path.parent, path.stem, suffix


def picture_files(args: argparse.Namespace) -> dict[str, str]:
    """View name -> file, of pictures in order and pictures by name."""
    if len(args.pictures) > len(VIEWS):
        raise TriptychError(
            f"{len(args.pictures)} pictures were given, at most 4 can be used (front, left, back, right): "
            "leave some out"
        )
    found = dict(zip(VIEWS, args.pictures, strict=False))
    for name in VIEWS:
        file = getattr(args, name)
        if file is not None and name in found:
            raise UsageError(
                f"the {name} view is given twice, as picture {VIEWS.index(name) + 1} ({found[name]}) and as --{name} "
                f"({file}): pictures without a name are taken as front, left, back, right, so give it once"
            )
        if file is not None:
            found[name] = file
    return found


def _sample_inputs(args: argparse.Namespace) -> Inputs:
    from ..images.sheets import join_sheet
    from ..procedural import sample_views

    pictures = sample_views()
    sheet = join_sheet(pictures, "row", background=(1, 1, 1))
    return Inputs(dict(pictures), dict.fromkeys(VIEWS, "the sample object"), "sample", args.foreground, sheet)


def _read_views(args: argparse.Namespace) -> Inputs:
    files = picture_files(args)
    if args.sheet is not None:
        if files:
            raise UsageError(f"--sheet {args.sheet} holds all views: give the sheet or single pictures, not both")
        from ..images.sheets import split_sheet

        cells = split_sheet(args.sheet)
        return Inputs(dict(cells), dict.fromkeys(cells, args.sheet), object_name(args.sheet), args.foreground)
    name = object_name(files.get("front") or next(iter(files.values())))
    return Inputs(dict(files), files, name, args.foreground)


def object_name(file: str) -> str:
    """chair_front.png -> chair; front.png -> object, because an export named front would be taken for a view."""
    stem = Path(file).stem
    return re.sub(rf"(^|[ ._-]+)({'|'.join(VIEWS)}|views|sheet)$", "", stem, flags=re.IGNORECASE) or "object"


class Clock:
    """Seconds by stage, shown while they pass. begin: the share of the whole that is behind us, 0-1."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.begin = 0.0
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def show(self, stage: str, fraction: float) -> None:
        self.progress.show(stage, self.begin + (1 - self.begin) * fraction)

    @contextmanager
    def stage(self, name: str, begin: float, end: float) -> Iterator[None]:
        started = time.perf_counter()
        self.show(name, begin)
        yield
        self.show(name, end)
        self.seconds[name] = round(time.perf_counter() - started, 4)

    def pipeline(self, stage: str, fraction: float) -> None:
        low, high = _PIPELINE
        self.show(stage, low + (high - low) * fraction)

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.perf_counter() - self._started, 4)}


def reconstruct(args: argparse.Namespace, wanted: Wanted, gather: Callable[[str, Clock], Inputs]) -> dict[str, Any]:
    """The whole job; its summary. gather(device, clock): where the views come from.

    The folder is tried first: nobody waits for a mesh that cannot be kept.
    """
    with heard_warnings() as heard, Export(wanted.folder, overwrite=args.overwrite) as export:
        from ..bundles.bundle import load_bundle
        from ..bundles.published import PublishedBundle

        device = _device(args.device)
        bundle = load_bundle(args.bundle)
        with Progress(args.quiet) as progress:
            clock = Clock(progress)
            inputs = gather(device, clock)
            make = _from_published if isinstance(bundle, PublishedBundle) else _from_posed_views
            made = make(args, bundle, inputs, device, clock)
            with clock.stage("write", _PIPELINE[1], 1.0):
                files = _write(export, wanted, made.mesh, inputs)
        for sentence in dict.fromkeys((*inputs.warnings, *made.warnings)):
            heard.append(sentence)
            warn(sentence)
        summary = {
            "files": [str(path) for path in files],
            "views": {view: str(inputs.labels[view]) for view in made.views},
            **inputs.summary,
            "vertices": len(made.mesh.vertices),
            "faces": len(made.mesh.faces),
            "bundle": bundle.name,
            **made.settings,
            "device": device,
            "timings_s": clock.total(),
            "warnings": heard,
        }
        if args.json is not None:
            write_summary(summary, args.json)
        return summary


@dataclass(frozen=True)
class _Made:
    """A mesh, the views that were used, the settings that it was made with, and sentences for the user."""

    mesh: Mesh
    views: tuple[str, ...]
    settings: dict[str, Any]
    warnings: tuple[str, ...]


def _from_posed_views(args: argparse.Namespace, bundle: Bundle, inputs: Inputs, device: str, clock: Clock) -> _Made:
    """With a bundle that was trained for the view rig."""
    from ..images.views import prepare_views
    from ..pipelines.reconstruct import VIEW_SIZE, Settings, mesh_from_views, networks

    if args.multi_view not in (None, "lifting"):
        raise UsageError(
            f"--multi-view {args.multi_view} is for published bundles: {bundle.name} was trained to look at several "
            "views at once, so leave it out"
        )
    with clock.stage("prepare", 0.0, 0.1):
        view_set = inputs.prepared or prepare_views(
            dict(inputs.pictures.items()), size=VIEW_SIZE, foreground=inputs.foreground
        )
    with clock.stage("load", 0.1, _PIPELINE[0]):
        networks(bundle)  # loads, and so checks, what the main job uses
    settings = Settings(
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        texture_size=args.texture_size,
        target_faces=args.faces,
        ensemble=args.ensemble,
        second_stage=False if args.first_stage_only else None,
    )
    made = mesh_from_views(view_set, bundle, settings, device=device, progress=clock.pipeline)
    clock.seconds.update(made.timings_s)
    names = ("seed", "steps", "guidance", "ensemble", "texture_size", "second_stage")
    used = {name: getattr(made.settings, name) for name in names}
    return _Made(made.mesh, tuple(view_set.names), used, (*view_set.warnings, *made.warnings))


def _from_published(args: argparse.Namespace, bundle: Bundle, inputs: Inputs, device: str, clock: Clock) -> _Made:
    """With a published TRELLIS bundle: pictures without cameras; the result has vertex colours."""
    from ..images.published import published_pictures
    from ..pipelines.memory import memory_table
    from ..pipelines.published import PublishedSettings, Sampling, mesh_from_pictures

    with clock.stage("prepare", 0.0, 0.1):
        prepared, notes = published_pictures(list(inputs.pictures.values()), foreground=inputs.foreground)
    sampling = Sampling(steps=args.steps, guidance=args.guidance)
    settings = PublishedSettings(
        seed=args.seed,
        structure=sampling,
        slat=sampling,
        multi_view=args.multi_view or PublishedSettings().multi_view,
        target_faces=args.faces,
    )
    made = mesh_from_pictures(prepared, bundle, settings, device=device, progress=clock.pipeline)
    clock.seconds.update(made.timings_s)
    if not args.quiet:
        print(memory_table(made.memory), file=sys.stderr)
    used: dict[str, Any] = {"seed": made.settings.seed, "steps": made.settings.structure.steps}
    used |= {"guidance": made.settings.structure.guidance, "multi_view": made.settings.multi_view}
    return _Made(made.mesh, tuple(inputs.pictures), used, (*notes, *made.warnings))


def _device(choice: str) -> str:
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise TriptychError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return "cpu" if choice == "cpu" or not torch.cuda.is_available() else "cuda"


def _write(export: Export, wanted: Wanted, mesh: Mesh, inputs: Inputs) -> list[Path]:
    """Everything that is wanted, under one number that is free for all of it."""
    from ..geometry.files import write_mesh
    from ..images.files import write_png
    from ..render.sheets import turntable_sheet
    from ..viewer.export import write_viewer

    stem = wanted.stem or inputs.name
    extras = {TURNTABLE: wanted.turntable, VIEWER: wanted.viewer, INPUTS: inputs.sheet is not None}
    others = [pattern for pattern, is_wanted in extras.items() if is_wanted]
    number = "" if export.overwrite else free_number(wanted.folder, stem, others)
    names = {pattern: pattern.format(stem=stem + number, number=number) for pattern in others}
    for suffix in wanted.formats:
        write_mesh(mesh, export.place(f"{stem}{number}.{suffix}"))
    if wanted.turntable:
        turntable_sheet(mesh, export.place(names[TURNTABLE]))
    if wanted.viewer:
        write_viewer(mesh, export.place(names[VIEWER]), title=stem + number)
    if inputs.sheet is not None:
        write_png(inputs.sheet, export.place(names[INPUTS]))
    with ExitStack() as stack:  # all are written before any appears
        folders = {path.parent for path in inputs.extra}
        exports = {folder: stack.enter_context(Export(folder, overwrite=export.overwrite)) for folder in folders}
        for path, picture in inputs.extra.items():
            write_png(picture, exports[path.parent].place(path.name))
        files = export.commit()
        return files + [path for other in exports.values() for path in other.commit()]


_MEANINGS = (
    ("_views.png", "the pictures that went in"),
    ("_turntable.png", "the mesh from eight sides"),
    (".html", "the mesh to turn around: open it in a browser"),
    (".obj", "the mesh, with its .mtl and texture beside it"),
    (".glb", "the same in one file"),
)


def _in_words(summary: dict[str, Any]) -> str:
    """The demo's last lines."""
    files: list[str] = summary["files"]
    shown = [(file, meaning) for suffix, meaning in _MEANINGS for file in files if file.endswith(suffix)]
    width = max(len(file) for file, _ in shown)
    names = list(summary["views"])
    drawn = [name for name in names if summary["views"][name] == GENERATED]
    known = [name for name in names if name not in drawn]
    source = f"{len(known)} view{'s' * (len(known) > 1)} ({', '.join(known)})"
    if drawn:
        source += f" and {len(drawn)} generated ({', '.join(drawn)} by {summary['views_model']})"
    seconds = dict(summary["timings_s"])
    total = seconds.pop("total")
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    return "\n".join([
        f"{summary['faces']:,} triangles from {source} by "
        f"{summary['bundle']}, seed {summary['seed']}, {summary['steps']} steps:",
        *(f"  {file:<{width}}  {meaning}" for file, meaning in shown),
        f"{total:.1f} s: {stages}.",
    ])  # fmt: skip
