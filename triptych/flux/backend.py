"""A Flux model that makes sheets of views, behind one small interface, whatever architecture it is.

`load_flux_views` finds a model, checks it, builds its diffusers pipeline, adds LoRAs, quantises, and decides where the
networks run. `FluxViews.sheet` is one call of the pipeline with everything explicit: the noise comes from a generator
on the CPU in float32, so a seed means the same picture on every device up to precision; the sigmas are the card's and
no scheduler formula touches them; equal prompts are encoded once.

It does not cover: prompts and templates (`prompts`), cutting a sheet into views (`panels`), and what a picture needs
before it is a reference (`pipelines.views`).
"""

from __future__ import annotations

import gc
import importlib.util
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import TriptychError
from ..models.proportions import Proportions, read_proportions
from ..pipelines.memory import GIB, StageMemory, _Meter, network_bytes
from ..sampling.flow_euler import Cancelled
from .card import LAYOUT, SAMPLER, ViewsCard, asked_like, default_card, how_to_ask, sigmas
from .hub import Cancel, ModelPlace, Progress, find_model, read_index
from .lora import LoraFile, apply_lora, merge_lora, read_lora
from .parts import OFFLOADS, QUANTISATIONS, architecture_of, decide_offload, load_pipeline, networks_of, place, quantise
from .preview import latent_colours, rough_picture

Preview = Callable[[], Tensor]
OnStep = Callable[[int, int, Preview], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEPT_PROMPTS = 8
_MAX_SEED = 2**64 - 1


class FluxViews(ABC):
    """A loaded model. card: how to ask it. device, dtype, offload, quantisation: as they turned out.
    warnings: sentences from loading. proportions: what tells the depth of given views, of a small model that has it.
    colours: `preview.latent_colours`, by which previews are made without the
    decoder; None decodes them. pipeline: diffusers' own, None after `unload`."""

    def __init__(
        self,
        pipeline: Any,
        card: ViewsCard,
        *,
        device: torch.device | str = "cpu",
        offload: str = "none",
        quantisation: str = "none",
        warnings: tuple[str, ...] = (),
        colours: Tensor | None = None,
        proportions: Proportions | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.card = card
        self.device = torch.device(device)
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.offload, self.quantisation, self.warnings = offload, quantisation, warnings
        self.proportions = proportions
        self._colours = colours
        self._memory: dict[str, StageMemory] = {}
        self._texts: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def memory(self) -> tuple[StageMemory, ...]:
        """The most memory that loading took, and the text encoder and sampling of the latest sheet."""
        return tuple(self._memory.values())

    def sheet(
        self,
        prompt: str,
        references: Sequence[Tensor] = (),
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """One 2x2 sheet, (3, 2S, 2S) float32 sRGB 0-1 on the CPU, on the card's background colour.

        prompt: with the card's template filled. references: the given views in the order front, left, back, right,
        each (3, S, S) float sRGB 0-1 on the background; networks see them in 8 bit. S is the card's panel_size.
        steps, guidance: None takes the card's. on_step(step from 1, steps, preview) after every step may raise to
        cancel; preview() shows the sheet that the model expects at that point, (3, 2S, 2S) float 0-1. It costs a pass
        of the decoder; with an offload it is a blurred estimate from the latents instead (`preview.rough_picture`),
        because the decoder would take the transformer's place on the device after every step. Raises TriptychError
        for wrong input, when memory runs out and after `unload`.
        """
        if self.pipeline is None:
            raise TriptychError(f"the model {self.card.name} was unloaded: load it again")
        pictures = [self._picture(i, reference) for i, reference in enumerate(references)]
        usual = self.card.usual(bool(pictures))
        steps = usual[0] if steps is None else steps
        guidance = usual[1] if guidance is None else guidance
        if not 0 <= guidance <= 100:
            raise TriptychError(f"guidance is {guidance}, it has to be 0-100")
        if not 0 <= seed <= _MAX_SEED:
            raise TriptychError(f"the seed is {seed}, it has to be 0-{_MAX_SEED}")
        levels = sigmas(steps, self.card.shift)
        noise = self._noise(torch.Generator().manual_seed(seed))
        with self._lock, torch.no_grad():
            try:
                with self._stage("text encoder", "text_encoder", "text_encoder_2"):
                    texts = self._text(prompt), self._text(negative) if self.uses_negative(guidance) else None
                with self._stage("sampling", "transformer", "vae"):
                    made = self._sample(texts[0], texts[1], pictures, noise, levels, guidance, on_step)
            finally:
                self.pipeline.maybe_free_model_hooks()
        return made[0].float().clamp(0, 1).cpu()

    def notes(self, *, guidance: float | None = None, negative: str = "", references: int = 0) -> tuple[str, ...]:
        """What of such a call has no effect on this model, as sentences for the user."""
        guidance = self.card.usual(bool(references))[1] if guidance is None else guidance
        if negative and not self.uses_negative(guidance):
            return (f"{self.card.name} does not use a negative prompt with guidance {guidance:g}",)
        return ()

    def unload(self) -> None:
        """Lets go of all memory. The model cannot be used any more."""
        with self._lock:
            if self.pipeline is not None and self.offload != "none":
                self.pipeline.remove_all_hooks()
            self.pipeline = None
            self._texts.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @abstractmethod
    def uses_negative(self, guidance: float) -> bool:
        """Whether a second pass with the negative prompt is made."""

    @abstractmethod
    def _noise(self, generator: torch.Generator) -> Tensor:
        """Float32 noise of a sheet in the layout that the pipeline takes as its latents."""

    @abstractmethod
    def _encode(self, text: str) -> Any:
        """The text's embeddings, whatever the architecture needs of them."""

    @abstractmethod
    def _sample(
        self,
        text: Any,
        negative: Any,
        pictures: list[Image.Image],
        noise: Tensor,
        levels: list[float],
        guidance: float,
        on_step: OnStep | None,
    ) -> Tensor:
        """(1, 3, 2S, 2S), 0-1."""

    @abstractmethod
    def _grid(self, latents: Tensor) -> Tensor:
        """The pipeline's latents -> (1, C, h, w), as the autoencoder decodes them."""

    def _shown(self, latents: Tensor) -> Tensor:
        """The pipeline's latents -> (3, 2S, 2S) float32 0-1 on the CPU."""
        grid = self._grid(latents)
        if self._colours is not None:
            return rough_picture(grid, self._colours, 2 * self.card.panel_size)
        picture = self.pipeline.vae.decode(grid, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(picture, output_type="pt")[0].float().clamp(0, 1).cpu()

    def _text(self, text: str) -> Any:
        if text in self._texts:
            self._texts.move_to_end(text)
        else:
            self._texts[text] = self._encode(text)
            while len(self._texts) > _KEPT_PROMPTS:
                self._texts.popitem(last=False)
        return self._texts[text]

    def _callback(self, on_step: OnStep, noise: Tensor, levels: list[float]) -> Callable[..., dict]:
        """diffusers' callback for ours. The expected sheet follows from two states of a straight line:
        x0 = x - sigma dx / dsigma."""
        ends = [*levels, 0.0]
        before = noise

        def called(pipeline: Any, step: int, timestep: Any, values: dict) -> dict:
            nonlocal before
            after, start = values["latents"], before.to(values["latents"])
            before = after

            def preview() -> Tensor:
                slope = (after.float() - start.float()) / (ends[step + 1] - ends[step])
                with torch.no_grad():
                    expected = (after.float() - ends[step + 1] * slope).to(after.dtype)
                    return self._shown(expected)

            on_step(step + 1, len(levels), preview)
            return {}

        return called

    def _picture(self, index: int, reference: Tensor) -> Image.Image:
        size = self.card.panel_size
        if tuple(reference.shape) != (3, size, size):
            raise TriptychError(
                f"reference {index + 1} has the shape {tuple(reference.shape)}, {self.card.name} takes (3, {size}, "
                f"{size}): prepare the picture at {size} pixels"
            )
        if not reference.is_floating_point() or not torch.isfinite(reference).all():
            raise TriptychError(f"reference {index + 1} must hold finite numbers 0-1: prepare the picture first")
        pixels = (reference.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))

    @contextmanager
    def _stage(self, name: str, *parts: str) -> Iterator[None]:
        """Measures a stage's memory, and says what to do when it does not suffice."""
        meter = _Meter(self.device)
        try:
            with meter:
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise TriptychError(
                f"the {name} of {self.card.name} ran out of memory on {self.device} (offload {self.offload}, "
                f"quantisation {self.quantisation}): choose offload model or sequential, or quantisation int8 or nf4"
            ) from error
        weights = sum(network_bytes(part) for key, part in networks_of(self.pipeline).items() if key in parts)
        peak, measure = (meter.peak, meter.measure) if meter.peak else (weights, "weights")
        self._memory[name] = StageMemory(name, peak, weights, measure)


def load_flux_views(
    source: str | Path = "triptych-tiny",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    offload: str = "auto",
    quantisation: str = "none",
    lora: str | Path | None = None,
    lora_strength: float = 1.0,
    models: Sequence[Path] = (),
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> FluxViews:
    """A model ready to use.

    source: "triptych-tiny" (embedded), a folder in diffusers layout or of a LoRA with its card, or a Hugging Face
        repository ``owner/name`` with an optional ``@revision``. See `hub.find_model`.
    dtype: of the networks; None takes bfloat16 on a GPU and float32 on a CPU.
    offload: "none" keeps all networks on the device, "model" moves each there for its turn, "sequential" layer by layer
        (slow, least memory), "auto" picks by the GPU memory that is free.
    quantisation: "int8" or "fp8" (torchao) or "nf4" (bitsandbytes, CUDA only) of the blocks' matrices.
    lora: a further LoRA file, folder or repository, applied at lora_strength.
    models: folders of models, in which the base that a LoRA's card names is looked for before it is fetched.
    progress(stage, share of the whole 0-1, which never falls) and cancel() are called while files are fetched and
        networks are read, one by one; Cancelled is raised when cancel returns True.
    Raises TriptychError: see the sentences.
    """
    chosen = _checked_device(device)
    kind = _checked_choices(chosen, dtype, offload, quantisation)
    course = _Course(progress, cancel)
    found = course.find(source)
    base, card, loras = _base_of(found, models, course)
    said: list[str] = []
    if lora is not None:
        file = read_lora(_lora_file(lora, card, course))
        card, said = _asked_by(file, base, card, has_card=found.card is not None)
        loras.append((file, lora_strength))
    course.loaded(0.0)
    meter = _Meter(torch.device("cpu"))
    with meter:
        pipeline, notes = load_pipeline(
            base.folder, card.architecture, kind, quantisation, lambda share: course.loaded(0.7 * share)
        )
        course.loaded(0.7)
        add_loras(pipeline, loras)
        if quantisation in ("int8", "fp8"):
            quantise(pipeline, quantisation)
        course.loaded(0.9)
        used, more = decide_offload(pipeline, chosen, offload, card)
        colours = None if used == "none" else latent_colours(pipeline.vae)
        _place(pipeline, chosen, used, card)
    model = _class_of(card.architecture)(
        pipeline, card, device=chosen, offload=used, quantisation=quantisation, warnings=(*said, *notes, *more),
        colours=colours, proportions=proportions_of(found),
    )  # fmt: skip
    weights = sum(network_bytes(network) for network in networks_of(pipeline).values())
    model._memory["load"] = StageMemory("load", meter.peak or weights, weights, "resident" if meter.peak else "weights")
    course.loaded(1.0)
    return model


def proportions_of(place: ModelPlace) -> Proportions | None:
    """The network of a model's folder that tells depths; None where there is none."""
    return read_proportions(place.folder, () if place.card is None else place.card.files)


class _Course:
    """How far loading is, as one share that only rises, and whether it shall go on.

    How many models are fetched is known only when they were read (a LoRA names its base), so each takes half of what
    is left; reading the networks takes the rest, and all where nothing was fetched.
    """

    def __init__(self, progress: Progress | None, cancel: Cancel | None) -> None:
        self._progress, self._cancel = progress, cancel
        self._begin = self._reached = 0.0

    def find(self, source: str | Path, near: Path | None = None, models: Sequence[Path] = ()) -> ModelPlace:
        self._begin = self._reached
        self._tell("find", 0.0)
        return find_model(
            source,
            near=near,
            models=models,
            progress=lambda stage, share: self._tell(stage, share / 2),
            cancel=self._cancel,
        )

    def loaded(self, share: float) -> None:
        """After a share 0-1 of the reading, which begins with 0. Raises Cancelled."""
        if self._cancel is not None and self._cancel():
            raise Cancelled("stopped while the views model was loaded")
        if share == 0:
            self._begin = self._reached
        self._tell("load", share)

    def _tell(self, stage: str, share: float) -> None:
        self._reached = max(self._reached, self._begin + (1 - self._begin) * share)
        if self._progress is not None:
            self._progress(stage, self._reached)


def add_loras(pipeline: Any, loras: Sequence[tuple[LoraFile | Path, float]]) -> None:
    """LoRAs onto the pipeline's transformer, each at its strength.

    The last one stays apart from the weights, which keeps its precision; those before it, and all where PEFT is absent,
    are added to the weights. Raises TriptychError when one belongs to another model.
    """
    apart = 1 if importlib.util.find_spec("peft") else 0
    for i, (lora, strength) in enumerate(loras):
        if i < len(loras) - apart:
            merge_lora(pipeline.transformer, lora, strength)
        else:
            apply_lora(pipeline, lora, strength)


def _asked_by(file: LoraFile, base: ModelPlace, card: ViewsCard, *, has_card: bool) -> tuple[ViewsCard, list[str]]:
    """The card to ask a model by with a further LoRA, and what the user should know of how the two fit.

    has_card: whether the model itself says how it wants to be asked; a published one does not, and follows the LoRA.
    """
    notes, other = [], file.architecture not in (None, card.architecture)
    if other or (file.base is not None and _last_name(file.base) != _last_name(base.title)):
        kind = f" ({file.architecture})" if other else ""
        notes.append(
            f"the LoRA {file.label} was trained on {file.base or 'another model'}{kind}, the loaded model is "
            f"{base.title} ({card.architecture}): the shapes agree, but choose the LoRA's own base if views are bad"
        )
    if not has_card:
        # Another base is sampled in its own way: a distilled one takes few steps.
        wanted = LAYOUT if notes else LAYOUT + SAMPLER
        said = {name: value for name, value in file.asked.items() if name in wanted}
        return asked_like(card, said, file.label), notes
    own = how_to_ask(card)
    odd = [name for name in LAYOUT if name in file.asked and file.asked[name] != own[name]]
    if odd:
        told = ", ".join(f"{name} {_short(file.asked[name])} instead of {_short(own[name])}" for name in odd)
        notes.append(f"the LoRA {file.label} was trained with {told}; {card.name} is asked in its own way")
    return card, notes


def _last_name(source: str) -> str:
    """Of a repository or folder: owner/FLUX.2-klein@main -> flux.2-klein."""
    return source.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].split("@")[0].lower()


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else text[:40] + "...") if isinstance(value, str) else text


def _base_of(
    found: ModelPlace, models: Sequence[Path], course: _Course
) -> tuple[ModelPlace, ViewsCard, list[tuple[LoraFile | Path, float]]]:
    """The full model, the card to ask it by, and the LoRAs that belong to it."""
    card = found.card
    if card is not None and card.lora is not None:
        base = course.find(str(card.base), near=found.folder, models=models)
        if base.card is not None and base.card.lora is not None:
            raise TriptychError(f"the base {base.title} of {found.title} is itself a LoRA: name a full model as base")
        _same_architecture(base, card)
        return base, card, [(found.folder / card.lora, 1.0)]
    if card is None:
        distilled = bool(read_index(found.folder).get("is_distilled", False))
        card = default_card(architecture_of(found.folder), distilled=distilled)
    else:
        _same_architecture(found, card)
    return found, card, []


def _same_architecture(base: ModelPlace, card: ViewsCard) -> None:
    have = architecture_of(base.folder)
    if have != card.architecture and {have, card.architecture} != {"flux1-kontext", "flux1-dev"}:
        raise TriptychError(f"{card.name} is for {card.architecture}, but {base.title} is {have}: choose its own base")


def _lora_file(lora: str | Path, card: ViewsCard, course: _Course) -> Path:
    """The safetensors file of a LoRA that is named as a file, or as a folder or repository with a card."""
    path = Path(lora).expanduser()
    if path.is_file():
        return path
    inside = sorted(path.glob("*.safetensors")) if path.is_dir() and not (path / "views.json").is_file() else []
    if len(inside) == 1:
        return inside[0]
    if len(inside) > 1:
        raise TriptychError(f"{path} holds {len(inside)} safetensors files: name the LoRA file itself")
    if path.suffix == ".safetensors":
        raise TriptychError(f"there is no LoRA file {path}: check the path")
    found = course.find(lora)
    if found.card is None or found.card.lora is None:
        raise TriptychError(f"{found.title} is a full model, not a LoRA: load it as the model itself")
    if found.card.architecture != card.architecture:
        raise TriptychError(
            f"the LoRA {found.card.name} is for {found.card.architecture} ({found.card.base}), but {card.name} is "
            f"{card.architecture}: choose a LoRA made for it"
        )
    return found.folder / found.card.lora


def _place(pipeline: Any, device: torch.device, offload: str, card: ViewsCard) -> None:
    try:
        place(pipeline, device, offload)
    except torch.cuda.OutOfMemoryError as error:
        size = sum(network_bytes(network) for network in networks_of(pipeline).values()) / GIB
        raise TriptychError(
            f"the {size:.1f} GiB of {card.name} do not fit on {device}: choose offload model or sequential, or a "
            "quantisation"
        ) from error


def _class_of(architecture: str) -> type[FluxViews]:
    if architecture == "flux2-klein":
        from .klein import KleinViews

        return KleinViews
    from .flux1 import FluxDevViews, KontextViews

    return {"flux1-kontext": KontextViews, "flux1-dev": FluxDevViews}[architecture]


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise TriptychError(f"unknown device {str(device)!r}: choose cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TriptychError(f"device {chosen} was asked for, but torch finds no CUDA GPU here: choose device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise TriptychError(f"there is no {chosen}, only {torch.cuda.device_count()} CUDA GPUs: choose a lower number")
    return chosen


def _checked_choices(
    device: torch.device, dtype: torch.dtype | str | None, offload: str, quantisation: str
) -> torch.dtype:
    """The dtype, once all choices fit together."""
    if offload not in OFFLOADS:
        raise TriptychError(f"unknown offload {offload!r}: choose {', '.join(OFFLOADS)}")
    if quantisation not in QUANTISATIONS:
        raise TriptychError(f"unknown quantisation {quantisation!r}: choose {', '.join(QUANTISATIONS)}")
    if quantisation == "nf4" and device.type != "cuda":
        raise TriptychError("quantisation nf4 needs a CUDA GPU: choose int8, or device cuda")
    if offload == "sequential" and quantisation != "none":
        raise TriptychError(f"offload sequential does not go with quantisation {quantisation}: choose offload model")
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    kind = DTYPES.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise TriptychError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    return kind
