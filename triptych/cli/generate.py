"""``generate``: a sentence, a photo, or some of the views -> all four views -> mesh files."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TriptychError
from .arguments import VIEWS, UsageError
from .reconstruct import GENERATED, Clock, Inputs, object_name, picture_files, reconstruct, wanted_files
from .report import to_json

PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".tga",
)  # fmt: skip
_SHARE = 0.6  # of the whole: what drawing the views takes
_NAME_LENGTH = 40


@dataclass(frozen=True)
class ViewOptions:
    """How the views are generated: the arguments of `_add_drawing`, where the command has them. foreground: how the
    given pictures are cut out. sheet_out, views_out: where further copies go."""

    model: str = "triptych-tiny"
    lora: str | None = None
    lora_strength: float = 1.0
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    rerolls: int = 2
    offload: str = "auto"
    quantisation: str = "none"
    foreground: str = "auto"
    sheet_out: Path | None = None
    views_out: Path | None = None

    @staticmethod
    def of(args: argparse.Namespace) -> ViewOptions:
        """The options of a command; a command without those of `_add_drawing` (demo) takes the defaults."""
        options = ViewOptions(seed=args.seed, foreground=args.foreground)
        if not hasattr(args, "views_model"):
            return options
        return ViewOptions(
            args.views_model, args.lora, args.lora_strength, args.seed, args.views_steps, args.views_guidance,
            args.rerolls, args.offload, args.quantisation, args.foreground, args.sheet_out, args.views_out,
        )  # fmt: skip


def generate(args: argparse.Namespace) -> int:
    if not (args.words or any(getattr(args, name) for name in VIEWS)):
        raise UsageError(
            'there is nothing to go by: write what the object is, as in generate "a red chair" -o chair.obj, or name a '
            "photo"
        )
    prompt, args.pictures = sort_words(args.words)
    files, options = picture_files(args), ViewOptions.of(args)
    _check_outputs(options, args.overwrite)
    summary = reconstruct(
        args, wanted_files(args), lambda device, clock: generated_inputs(prompt, files, options, device, clock)
    )
    print(to_json(summary))
    return 0


def sort_words(words: list[str]) -> tuple[str, list[str]]:
    """Command-line words -> the prompt and the picture files. What is a file is a picture; the rest is text.

    Raises TriptychError for what has the name of a picture and does not exist, and for a folder.
    """
    texts, files = [], []
    for word in words:
        if _is(os.path.isfile, word):
            files.append(word)
        elif Path(word[-20:]).suffix.lower() in PICTURE_SUFFIXES:
            raise TriptychError(f"{word} does not exist: check the path, or write what the object is in words")
        elif word.endswith(("/", os.sep)) and _is(os.path.isdir, word):
            raise TriptychError(f"{word} is a folder: name one to four pictures in it")
        else:
            texts.append(word)
    return " ".join(texts), files


def _is(test: Any, word: str) -> bool:
    """os.path's answer; a sentence may be too long or too strange for the name of a file."""
    try:
        return bool(test(word))
    except (OSError, ValueError):
        return False


def _check_outputs(options: ViewOptions, overwrite: bool) -> None:
    """Before minutes of work: the further copies have free names."""
    if options.sheet_out is not None and options.sheet_out.suffix.lower() != ".png":
        raise UsageError(f"--sheet-out {options.sheet_out} must be a .png file")
    taken = [str(path) for path in _further(options) if path.exists()]
    if taken and not overwrite:
        exist = "exists" if len(taken) == 1 else "exist"
        raise TriptychError(f"{', '.join(taken)} {exist} already: choose another name, or add --overwrite")


def _further(options: ViewOptions) -> list[Path]:
    single = [] if options.views_out is None else [options.views_out / f"{name}.png" for name in VIEWS]
    return single + ([] if options.sheet_out is None else [options.sheet_out])


def generated_inputs(prompt: str, files: dict[str, str], options: ViewOptions, device: str, clock: Clock) -> Inputs:
    """Draws the views that ``files`` (view name -> picture) lack. Takes its share of the clock's progress."""
    from ..pipelines.reconstruct import VIEW_SIZE
    from ..pipelines.views import ViewSettings, views_from_prompt

    def load() -> Any:
        from ..flux.backend import load_flux_views

        return load_flux_views(
            options.model,
            device=device,
            offload=options.offload,
            quantisation=options.quantisation,
            lora=options.lora,
            lora_strength=options.lora_strength,
            progress=lambda stage, share: clock.show("load", _SHARE * (0.05 + 0.1 * share)),
        )

    settings = ViewSettings(
        options.seed, options.steps, options.guidance, options.rerolls, VIEW_SIZE, options.foreground
    )
    made = views_from_prompt(
        prompt,
        dict(files.items()),
        load,
        settings,
        device=device,
        progress=lambda stage, fraction: clock.show("views" if stage == "generate" else stage, _SHARE * fraction),
    )
    clock.begin = _SHARE
    clock.seconds.update({f"views_{stage}": seconds for stage, seconds in made.timings_s.items()})
    extra: dict[Path, Any] = {}
    if options.sheet_out is not None:
        extra[options.sheet_out] = made.sheet
    if options.views_out is not None:
        extra |= {options.views_out / f"{name}.png": view for name, view in made.views.items()}
    summary = {
        "prompt": prompt,
        "views_prompt": made.prompt,
        "views_model": options.model if made.generated else None,
        "views_seed": made.seed,
        "rerolls": made.rerolls,
    }
    name = object_name(files.get("front") or next(iter(files.values()))) if files else prompt_name(prompt)
    labels = {view: files.get(view, GENERATED) for view in made.views}
    prepared = replace(made.view_set, warnings=())  # they are among the inputs' own
    return Inputs(dict(made.views), labels, name, "alpha", made.sheet, summary, made.warnings, extra, prepared)


def prompt_name(prompt: str) -> str:
    """A red wooden chair! -> red_wooden_chair; object when there is nothing to name a file by."""
    words = [word for word in re.findall(r"\w+", prompt.lower()) if word not in ("a", "an", "the")]
    name = ""
    for word in words:
        if name and len(name) + 1 + len(word) > _NAME_LENGTH:
            break
        name = f"{name}_{word}"[:_NAME_LENGTH] if name else word[:_NAME_LENGTH]
    return name.strip("_") or "object"
