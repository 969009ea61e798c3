"""Views by ComfyUI's own loaders and samplers: what has to go into them, and what to do with the sheet that comes out.

    Flux views: prepare -> conditioning, latent, sigmas -> ComfyUI's sampler -> VAE Decode -> Flux views: split

The model may be loaded in any way that ComfyUI knows: fp8, GGUF, with LoRAs and patches. How it wants to be asked (the
prompt's frame, the sheet's size and background, the sigmas) are settings here; those left at their defaults are the
published model's, or those of the card of Load tiny Flux for ComfyUI's sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..triptych.errors import TriptychError
from .flux import flattened, model_folder, model_names, state
from .flux_models import card_of, load_small_klein, proportions_of
from .pictures import images, over, picture
from .schema import ADVANCED, ViewsSocket, schema
from .view_inputs import NAMES, connected_sides, foreground_inputs, mask_inputs, missing_side_inputs, side_outputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..triptych.flux.card import ViewsCard
    from ..triptych.images.views import ViewSet
    from ..triptych.models.proportions import Proportions

PlanSocket = io.Custom("TRIPTYCH_FLUX_PLAN")
MODELS_OWN = "the model's"
# Colours that the sheet's background may have, as cutting it out knows them.
BACKDROPS = {"white": (1.0, 1.0, 1.0), "magenta": (1.0, 0.0, 1.0), "green": (0.0, 1.0, 0.0)}
# What the choice means for `ViewsCard.mirrored`.
MIRRORED = {MODELS_OWN: None, "yes": True, "no": False}
PATCH = 16  # pixels of the sheet per latent token
DEFAULT_SIZE = 512


@dataclass(frozen=True, eq=False)
class Plan:
    """What splitting needs to know: the card as used, the given views (None without), the size of a finished view in
    pixels, warnings so far, and what tells the widths of drawn sides (None leaves them as drawn)."""

    card: ViewsCard
    given: ViewSet | None
    size: int
    warnings: tuple[str, ...]
    proportions: Proportions | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in NAMES if self.given is None or name not in self.given.names)


class FluxPrepare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FluxPrepare",
            display_name="Flux views: prepare",
            description="Makes what ComfyUI's own sampler needs to draw the four sides of an object with a Flux model.",
            search_aliases=["flux", "klein", "kontext", "reference latent", "multiview", "text to 3d", "image to 3d"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the Flux model."),
                io.Vae.Input("vae", tooltip="The VAE of the Flux model; by it, FLUX.1 and FLUX.2 are told apart."),
                *missing_side_inputs(),
                *mask_inputs(),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the object is, such as: a red wooden chair. May be empty when a picture is "
                    "connected.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="What the object is not; used where the guidance of CFG Guider is above 1.",
                ),
                io.Int.Input(
                    "panel_size",
                    default=0,
                    min=0,
                    max=2048,
                    step=PATCH,
                    tooltip="Side of one view on the sheet in pixels; the sheet has twice that. 0 is the model's own.",
                ),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Sampling steps; 0 is the model's number."),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Moves the sigmas to the noisy side when above 1; 0 is the model's own. No other node has "
                    "to shift them.",
                ),
                io.Combo.Input(
                    "background",
                    options=[MODELS_OWN, *BACKDROPS],
                    default=MODELS_OWN,
                    tooltip="The colour behind the object, as the model or its LoRA was trained.",
                ),
                io.Int.Input(
                    "size",
                    default=DEFAULT_SIZE,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Side of a finished view in pixels; the texture is taken from these.",
                ),
                *foreground_inputs(" in the pictures"),
                io.String.Input(
                    "template",
                    default="",
                    multiline=True,
                    tooltip="What the model reads, with {text} for the prompt and {given} for the names of the given "
                    "views; empty is the model's own. A LoRA that was trained with another one says so in its header.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "mirrored",
                    options=list(MIRRORED),
                    default=MODELS_OWN,
                    optional=True,
                    tooltip="Whether the model wants the mirror image of every given view beside it, as a LoRA does "
                    "whose training sheets were made with --mirrored.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="For CFG Guider or Basic Guider."),
                io.Conditioning.Output("negative_out", display_name="negative", tooltip="For CFG Guider."),
                io.Latent.Output("latent", display_name="latent", tooltip="Empty, of the sheet's size."),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="For SamplerCustomAdvanced."),
                PlanSocket.Output("plan", display_name="plan", tooltip="For Flux views: split."),
                io.Image.Output(
                    "references", display_name="references", tooltip="The given views as the model sees them, a batch."
                ),
                io.String.Output("text", display_name="text", tooltip="What the model reads, and warnings."),
                io.Float.Output(
                    "guidance",
                    display_name="guidance",
                    tooltip="The model's own for these pictures and words: for the cfg of CFG Guider with FLUX.2, 1 "
                    "where it is in the conditioning already (FLUX.1).",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        prompt: str,
        negative: str,
        size: int,
        foreground: str,
        mask_shows: str,
        **rest: Any,
    ) -> io.NodeOutput:
        from ..triptych.flux.prompts import check_prompt, fill_template

        chosen = {name: rest[name] for name in _CHOICES}
        card = asked_card(card_of(vae), **chosen, mirrored=rest.get("mirrored", MODELS_OWN))
        sources = connected_sides(rest, mask_shows)
        given = prepared(sources, size, foreground)
        words, said = check_prompt(prompt, card, given is not None)
        text = fill_template(card, words, sources)
        references, notes = reference_pictures(given, card)
        warnings = (*(given.warnings if given is not None else ()), *said, *notes)
        plan = Plan(card, given, size, warnings, proportions_of(vae))
        steps, guidance = card.usual(given is not None)
        positive, unwanted = conditionings(clip, vae, text, negative, references, card)
        report = "\n".join([text, *plan.warnings])
        shown = blank(card) if references is None else references
        return io.NodeOutput(
            positive,
            unwanted,
            empty_latent(vae, card),
            sigma_tensor(card, rest["steps"] or steps),
            plan,
            shown,
            report,
            guidance if _is_klein(card) else 1.0,
            ui=ui.PreviewImage(shown, cls=cls).as_dict() | {"text": [report]},
        )


class FluxSplit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FluxSplit",
            display_name="Flux views: split",
            description="Cuts a drawn sheet into its four views, frees them of the background, and puts the given "
            "views back in their places.",
            search_aliases=["view sheet", "turnaround", "multiview", "remove background", "crop grid"],
            inputs=[
                io.Image.Input("sheet", tooltip="The decoded sheet: front and left above, back and right below."),
                PlanSocket.Input(
                    "plan",
                    optional=True,
                    tooltip="From Flux views: prepare. Without it, all four views are taken from the sheet.",
                ),
                io.Combo.Input(
                    "background",
                    options=[MODELS_OWN, *BACKDROPS],
                    default=MODELS_OWN,
                    tooltip="The colour behind the object; the model's is what the plan says, else white.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip="Side of a finished view in pixels; 0 is the plan's size, or 512 without a plan.",
                ),
            ],
            outputs=[
                ViewsSocket.Output("views", tooltip="For Reconstruct and Texture mesh."),
                io.Image.Output(
                    "sheet_out",
                    display_name="sheet",
                    tooltip="The finished views in one picture over white: front and left above, back and right below.",
                ),
                io.Mask.Output("sheet_mask", display_name="sheet mask", tooltip="White where an object is."),
                *side_outputs(),
                io.Mask.Output("masks", display_name="masks", tooltip="White where the object is, a batch."),
                io.String.Output("info", display_name="info", tooltip="What was drawn, and warnings."),
            ],
        )

    @classmethod
    def execute(cls, sheet: Tensor, background: str, size: int, plan: Plan | None = None) -> io.NodeOutput:
        from ..triptych.images.sheets import sheet_of

        colour = BACKDROPS.get(background) or (plan.card.background if plan else BACKDROPS["white"])
        views, warnings = put_together(sheet, plan, colour, size)
        joined, mask = flattened(sheet_of(views))
        missing = plan.missing if plan else NAMES
        drawn = ", ".join(name for name in missing if name in views.names) or "nothing"
        text = "\n".join([f"drawn: {drawn}", *warnings])
        sides = dict(zip(views.names, over(views.images, "white").split(1), strict=True))
        shown = ui.PreviewImage(joined, cls=cls).as_dict() | {"text": [text]}
        # A side that stayed empty has no picture: its socket carries nothing, which an optional input understands.
        return io.NodeOutput(views, joined, mask, *map(sides.get, NAMES), views.masks.clone(), text, ui=shown)


class FluxTinyNative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = model_names()
        return schema(
            "FluxTinyNative",
            display_name="Load tiny Flux for ComfyUI's sampler",
            description="Loads a small FLUX.2 klein in diffusers layout, such as the one that comes with the pack, as "
            "ComfyUI's own MODEL, CLIP and VAE.",
            search_aliases=["flux", "klein", "unet loader", "triptych-tiny", "offline"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=names,
                    default=names[0],
                    tooltip="triptych-tiny comes with the pack. Models of full size are loaded with ComfyUI's own "
                    "loaders instead.",
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For LoRA loaders and guiders."),
                io.Clip.Output("clip", display_name="clip", tooltip="For Flux views: prepare."),
                io.Vae.Output("vae", display_name="vae", tooltip="For Flux views: prepare, and VAE Decode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None) -> Any:
        return float("nan") if name is None else state(model_folder(name))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*load_small_klein(model_folder(name)))


_CHOICES = ("panel_size", "steps", "shift", "background", "template")


def asked_card(
    card: ViewsCard,
    *,
    panel_size: int,
    steps: int,
    shift: float,
    background: str,
    template: str,
    mirrored: str = MODELS_OWN,
) -> ViewsCard:
    """The card with the user's choices; 0, "" and MODELS_OWN keep its own. Raises TriptychError for a panel size that
    is no multiple of 16, and a template without {text}."""
    if panel_size % PATCH:  # a linked value is not rounded to the widget's step
        raise TriptychError(f"the panel size {panel_size} is no multiple of {PATCH}: round it")
    if template.strip() and "{text}" not in template:
        raise TriptychError(
            f"the template {template[:60]!r} has no place for the prompt: write {{text}} where it belongs"
        )
    chosen: dict[str, Any] = {
        "panel_size": panel_size,
        "steps": steps,
        "shift": shift,
        "background": BACKDROPS.get(background),
        "prompt_template": template.strip(),
    }
    kept = {name: value for name, value in chosen.items() if value}
    return replace(card, **kept, mirrored=card.mirrored if MIRRORED[mirrored] is None else MIRRORED[mirrored])


def prepared(sources: dict[str, np.ndarray], size: int, foreground: str) -> ViewSet | None:
    """The given pictures at one scale. Raises TriptychError when nothing is left to draw."""
    from ..triptych.images.views import prepare_views

    if len(sources) == len(NAMES):
        raise TriptychError("all four views are connected, so there is nothing to draw: use Prepare views instead")
    return prepare_views(dict(sources.items()), size=size, foreground=foreground) if sources else None


def reference_pictures(given: ViewSet | None, card: ViewsCard) -> tuple[Tensor | None, tuple[str, ...]]:
    """The given views on the card's background as the model gets them: IMAGE (V, S, S, 3), in steps of 1/255; and
    sentences about colours that the background has too."""
    import torch

    from ..triptych.pipelines.views import given_references

    pictures, notes = given_references(given, card)
    if not pictures:
        return None, notes
    # The other route hands 8-bit pictures to diffusers; so that both draw the same.
    return images((torch.stack(pictures).clamp(0, 1) * 255).round() / 255), notes


def conditionings(
    clip: Any, vae: Any, text: str, negative: str, references: Tensor | None, card: ViewsCard
) -> tuple[Any, Any]:
    """CONDITIONING of both texts, with the references in both, as Reference Latent attaches them.

    FLUX.2 numbers several references by itself. FLUX.1 knows one, so that several are joined side by side.
    """
    import torch
    from node_helpers import conditioning_set_values

    single = not _is_klein(card)
    extra: dict[str, Any] = {"guidance": card.usual(references is not None)[1]} if single else {}
    if references is not None:
        shown = [torch.cat(list(references), dim=1)[None]] if single else list(references.split(1))
        extra["reference_latents"] = [vae.encode(one) for one in shown]
        extra["reference_latents_method"] = "offset" if single else "index"
    made = []
    for words in (text, negative.strip()):
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(words))
        made.append(conditioning_set_values(encoded, extra))
    return made[0], made[1]


def _is_klein(card: ViewsCard) -> bool:
    return card.architecture == "flux2-klein"


def empty_latent(vae: Any, card: ViewsCard) -> dict[str, Any]:
    """LATENT of zeros for the sheet: FLUX.2 has 128 channels at 1/16 of the size, FLUX.1 16 at 1/8."""
    import torch
    from comfy.model_management import intermediate_device

    side = 2 * card.panel_size // (16 if vae.latent_channels == 128 else 8)
    return {"samples": torch.zeros(1, vae.latent_channels, side, side, device=intermediate_device())}


def sigma_tensor(card: ViewsCard, steps: int) -> Tensor:
    """SIGMAS (steps + 1) from 1 to 0."""
    import torch

    from ..triptych.flux.card import sigmas

    return torch.tensor([*sigmas(steps, card.shift), 0.0])


def blank(card: ViewsCard) -> Tensor:
    """The background alone, IMAGE (1, S, S, 3): what stands for references when there are none."""
    import torch

    return torch.tensor(card.background).expand(1, card.panel_size, card.panel_size, 3).clone()


def put_together(
    sheet: Tensor, plan: Plan | None, colour: tuple[float, float, float], size: int
) -> tuple[ViewSet, tuple[str, ...]]:
    """The view set of a drawn IMAGE and the plan's given views, and all warnings."""
    from ..triptych.flux.card import default_card
    from ..triptych.flux.panels import check_views, cut_sheet, grouped
    from ..triptych.pipelines.drawn_views import put_together as one_set

    given = plan.given if plan else None
    missing = plan.missing if plan else NAMES
    card = plan.card if plan else default_card("flux2-klein")
    panels = cut_sheet(picture(sheet, "the sheet")[..., :3].transpose(2, 0, 1), replace(card, background=colour))
    complaints = check_views(panels, missing)
    wanted = size or (plan.size if plan else DEFAULT_SIZE)
    views, notes = one_set(given, panels, missing, wanted, plan.proportions if plan else None)
    if complaints:
        complaints = [
            f"the drawn views are faulty: {'; '.join(grouped(complaints))}: try another seed or another prompt"
        ]
    warnings = tuple(dict.fromkeys([*(plan.warnings if plan else ()), *complaints, *notes]))
    return replace(views, warnings=warnings), warnings
