"""A sentence, or pictures of some sides -> a view set, with a Flux model.

A Flux views model is a folder in diffusers layout. One that a graph names is looked for in models/triptych and
models/diffusers, then among those that come with the pack; a bundle may hold one in its folder ``flux``. The base that
a LoRA's card names may lie there too, under its name or as owner/name; else it is fetched.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..triptych.errors import TriptychError
from .bundles import EMBEDDED, FOLDER
from .paths import checked_name, fingerprint
from .pictures import over
from .running import Reporter, run
from .schema import ADVANCED, ViewsSocket, checked_repository, repository_id, repository_input, schema
from .view_inputs import NAMES, connected_sides, foreground_inputs, mask_inputs, missing_side_inputs, side_outputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..triptych.flux.backend import FluxViews as Model
    from ..triptych.pipelines.views import GeneratedViews, ViewSettings

FluxSocket = io.Custom("TRIPTYCH_FLUX")
CARD, INDEX = "views.json", "model_index.json"
NO_LORA = "none"
DTYPES = ("auto", "bfloat16", "float16", "float32")
OFFLOADS = ("auto", "none", "model", "sequential")
QUANTISATIONS = ("none", "int8", "nf4", "fp8")
WORK_BYTES = 2.5e9  # what sampling and decoding a sheet of 1024 pixels take besides the weights


@dataclass(frozen=True, eq=False)
class LoadedFlux:
    """views: the model, as the library loads it. device: where it computes. patcher: ComfyUI's ModelPatcher over its
    networks; None where hooks of their own move them, or quantised weights cannot be moved."""

    views: Model
    device: Any
    patcher: Any = None

    def load(self, memory_required: float) -> Any:
        """Has ComfyUI bring the networks to their device, or at least make room (bytes) for the work; the device."""
        from comfy import model_management

        if self.patcher is not None:
            model_management.load_models_gpu([self.patcher], memory_required=memory_required)
        else:
            model_management.free_memory(memory_required, self.device)
        return self.device


class LoadFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = model_names()
        return schema(
            "LoadFlux",
            display_name="Load Flux views model",
            description="Loads a Flux model that draws four sides of an object: the one that comes with the pack, one "
            "in the models folders, or one from Hugging Face, with a LoRA if wanted.",
            search_aliases=["flux", "klein", "kontext", "multiview model", "diffusers", "lora", "text to 3d"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=names,
                    default=names[0],
                    tooltip="triptych-tiny comes with the pack and runs on a processor. Others are folders in "
                    "diffusers layout in models/triptych or models/diffusers.",
                ),
                repository_input(),
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *lora_names()],
                    default=NO_LORA,
                    tooltip="A LoRA from models/loras that was trained for this model.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the LoRA is added; 1 is as it was trained.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Precision of the weights; auto takes what suits the model and the device.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOADS),
                    default="auto",
                    tooltip="none: ComfyUI keeps the whole model on the GPU while it is used. model: one network at a "
                    "time. sequential: one layer at a time, for little memory, slow. auto: by the memory there is.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "quantisation",
                    options=list(QUANTISATIONS),
                    default="none",
                    tooltip="Fewer bits per weight: int8 and fp8 take half the memory, nf4 a quarter. They need extra "
                    "packages, which are named when they are missing.",
                    **ADVANCED,
                ),
            ],
            outputs=[FluxSocket.Output("flux_model", display_name="model", tooltip="For Flux views.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, name: str | None = None, repository: str | None = None, lora: str | None = None, **_: Any
    ) -> Any:
        if name is None or lora is None:  # they come from another node, whose values are not known yet
            return float("nan")
        wanted = (repository or "").strip()
        added = None if lora == NO_LORA else fingerprint(lora_file(lora))
        return wanted or state(model_folder(name)), added

    @classmethod
    def validate_inputs(cls, repository: str | None = None) -> bool | str:
        return checked_repository(repository)

    @classmethod
    def execute(
        cls,
        name: str,
        lora: str,
        lora_strength: float,
        dtype: str,
        offload: str,
        quantisation: str,
        repository: str = "",
    ) -> io.NodeOutput:
        wanted = repository_id(repository)  # a linked value is not validated before
        added = {"lora": None if lora == NO_LORA else lora_file(lora), "lora_strength": lora_strength}
        loaded = opened(wanted or model_folder(name), dtype=dtype, offload=offload, quantisation=quantisation, **added)
        return io.NodeOutput(loaded, ui={"text": ["\n".join(loaded.views.warnings)]})


class FluxViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FluxViews",
            display_name="Flux views",
            description="Draws the front, left, back and right of an object from a sentence, from pictures of some of "
            "its sides, or from both.",
            search_aliases=["text to 3d", "text to multiview", "image to multiview", "turnaround", "generate views"],
            inputs=[
                FluxSocket.Input("model", tooltip="From Load Flux views model."),
                *missing_side_inputs(),
                *mask_inputs(),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the object is, such as: a red wooden chair. May be empty when a picture is "
                    "connected.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Of the noise that drawing begins with: another seed draws another object, or other sides.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000, tooltip="Sampling steps; 0 takes the model's own number."
                ),
                io.Float.Input(
                    "guidance",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the prompt and the pictures pull; -1 takes the model's own value.",
                ),
                io.Int.Input(
                    "rerolls",
                    default=2,
                    min=0,
                    max=20,
                    tooltip="How many times the next seed is tried when a side is empty, cut off, or not one object.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Side of a prepared view in pixels; the texture is taken from these.",
                ),
                *foreground_inputs(" in the pictures"),
            ],
            outputs=[
                ViewsSocket.Output("views", tooltip="For Reconstruct and Texture mesh."),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="The four views in one picture over white: front and left above, back and right below.",
                ),
                io.Mask.Output("sheet_mask", display_name="sheet mask", tooltip="White where an object is."),
                *side_outputs(),
                io.String.Output("info", display_name="info", tooltip="What was drawn, settings used, warnings."),
            ],
        )

    @classmethod
    def execute(
        cls, model: LoadedFlux, prompt: str, foreground: str, mask_shows: str, steps: int, guidance: float, **rest: Any
    ) -> io.NodeOutput:
        from ..triptych.pipelines.views import ViewSettings

        given = connected_sides(rest, mask_shows)
        wanted = ViewSettings(
            seed=rest["seed"],
            steps=steps or None,
            guidance=None if guidance < 0 else guidance,
            rerolls=rest["rerolls"],
            size=rest["size"],
            foreground=foreground,
        )
        made = generated(model, prompt, given, wanted)
        sheet, mask = flattened(made.sheet)
        text = info(model, prompt, made)
        told = {"generated": made.generated, "seed": made.seed, "rerolls": made.rerolls, "warnings": made.warnings}
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | {"text": [text], "triptych_views": [told]}
        sides = dict(zip(made.view_set.names, over(made.view_set.images, "white").split(1), strict=True))
        # A side that stayed empty has no picture: its socket carries nothing, which an optional input understands.
        return io.NodeOutput(made.view_set, sheet, mask, *map(sides.get, NAMES), text, ui=shown)


def opened(source: str | Path, *, dtype: str, **settings: Any) -> LoadedFlux:
    """A Flux views model, loaded, and known to ComfyUI's memory management where that may move it."""
    from comfy import model_management

    from ..triptych.flux.backend import load_flux_views

    device = model_management.get_torch_device()
    # How much stays on the device is decided by what is free: what ComfyUI can bring back later makes room first.
    model_management.free_memory(weight_bytes(source) + WORK_BYTES, device)
    kind = None if dtype == "auto" else dtype

    def work(reporter: Reporter) -> Model:
        told = {"progress": reporter.progress, "cancel": reporter.cancel}
        return load_flux_views(source, device=device, dtype=kind, models=model_roots(), **told, **settings)

    views = run(work)
    loaded = LoadedFlux(views, device, patcher_of(views, device))
    loaded.load(0)
    return loaded


def patcher_of(views: Model, device: Any) -> Any:
    """ComfyUI's ModelPatcher over the networks of a model that lies on its device as a whole; else None."""
    if views.offload != "none" or views.quantisation != "none":
        return None
    import torch
    from comfy.model_management import unet_offload_device
    from comfy.model_patcher import ModelPatcher

    from ..triptych.flux.parts import networks_of

    networks = torch.nn.ModuleDict(networks_of(views.pipeline))
    return ModelPatcher(networks, load_device=device, offload_device=unet_offload_device())


def weight_bytes(source: str | Path) -> float:
    """The size of a folder's weights; for a repository, whose size is not known before, more than any device has."""
    if isinstance(source, str):
        return 1e15
    return sum(path.stat().st_size for path in source.rglob("*.safetensors"))


def generated(loaded: LoadedFlux, prompt: str, given: dict[str, np.ndarray], wanted: ViewSettings) -> GeneratedViews:
    """``views_from_prompt`` on ComfyUI's device, with a picture of the sheet after every step."""
    from ..triptych.pipelines.views import views_from_prompt

    device = loaded.load(WORK_BYTES)

    def work(reporter: Reporter) -> GeneratedViews:
        return views_from_prompt(
            prompt,
            given,
            loaded.views,
            wanted,
            device=device,
            progress=reporter.progress,
            preview=lambda sheet: reporter.picture(as_picture(sheet)),
            cancel=reporter.cancel,
        )

    return run(work)


def as_picture(sheet: Tensor) -> Any:
    """(3, h, w) float 0-1 -> a PIL picture."""
    from PIL import Image

    levels = sheet.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def flattened(sheet: np.ndarray) -> tuple[Tensor, Tensor]:
    """(H, W, 4) straight alpha -> IMAGE over white, MASK."""
    import torch

    rgba = torch.from_numpy(sheet).permute(2, 0, 1)[None]
    return over(rgba, "white"), rgba[:, 3].clone()


def info(loaded: LoadedFlux, prompt: str, made: GeneratedViews) -> str:
    """What was drawn and how, in three lines, then the warnings."""
    drawn = ", ".join(made.generated) or "nothing"
    words = " ".join(prompt.split())
    about = f" for {words[:80]!r}" if words else ""
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made.timings_s.items())
    tried = f", {made.rerolls + 1} sheets drawn" if made.rerolls else ""
    return "\n".join(
        [f"{loaded.views.card.name} drew {drawn}{about}", f"seed {made.seed}{tried}", times, *made.warnings]
    )


def model_names() -> list[str]:
    """The models in the folders of the graph's machine, the embedded ones first."""
    found: dict[str, None] = {}
    for folder in (EMBEDDED, *model_roots()):
        if folder.is_dir():
            found |= {entry.name: None for entry in sorted(folder.iterdir()) if _model_in(entry) is not None}
    return list(found) or ["triptych-tiny"]


def model_folder(name: str) -> Path:
    """The folder of a model that ``model_names`` lists; models folders come first, as a user may replace ours."""
    places = [folder / checked_name(name) for folder in (*model_roots(), EMBEDDED)]
    for place in places:
        found = _model_in(place)
        if found is not None:
            return found
    looked = ", ".join(str(place.parent) for place in places)
    raise TriptychError(f"no Flux model {name!r} found (looked in {looked}): put its folder there, or choose another")


def state(folder: Path) -> tuple[Any, ...]:
    """Changes when a file of the model does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), *fingerprint(path)) for path in files)


def lora_names() -> list[str]:
    """Names of the safetensors below models/loras, as ComfyUI writes them; linked folders count."""
    names: dict[str, None] = {}
    for root in _folders("loras"):
        for folder, _, files in os.walk(root, followlinks=True):
            found = (os.path.relpath(os.path.join(folder, file), root) for file in files)
            names |= {name: None for name in sorted(found) if name.lower().endswith(".safetensors")}
    return list(names)


def lora_file(name: str) -> Path:
    """The file of a LoRA that ``lora_names`` lists. Raises TriptychError when it is not there."""
    for root in _folders("loras"):
        path = root / checked_name(name)
        if path.is_file():
            return path
    raise TriptychError(f"there is no LoRA {name!r} in models/loras: put it there, or choose another")


def model_roots() -> list[Path]:
    """ComfyUI's folders that may hold models in diffusers layout."""
    return [*_folders(FOLDER), *_folders("diffusers")]


def _folders(key: str) -> list[Path]:
    import folder_paths

    return [Path(folder) for folder in folder_paths.get_folder_paths(key)]


def _model_in(folder: Path) -> Path | None:
    """The folder itself or its ``flux``, whichever is a Flux views model."""
    return next((place for place in (folder, folder / "flux") if _is_model(place)), None)


def _is_model(folder: Path) -> bool:
    """Whether a folder has a card, or is a diffusers folder of a Flux pipeline."""
    if (folder / CARD).is_file():
        return True
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and str(index.get("_class_name", "")).startswith("Flux")
