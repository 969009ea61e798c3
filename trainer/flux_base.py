"""Published Flux networks as training sees them: the frozen or learning transformer, its frozen parts, its exports.

Three ways of training one transformer:

| | weights held | what learns, in float32 |
|---|---|---|
| LoRA | bfloat16 | two thin matrices beside each matrix of attention and MLPs |
| LoRA, quantised base | int8 or fp8 (torchao), nf4 (bitsandbytes, CUDA only) | the same |
| full | float32 | everything |

Adapters are put on first and the matrices under them are quantised afterwards: torchao's tensors pass gradients on to
what comes before them and have none themselves.

Latents lie in one layout for both families, (B, 4 C, H / 2, W / 2) with each 2 x 2 patch as channels, normalised as
the family's pipeline does it: FLUX.2 by the statistics of its autoencoder, FLUX.1 by one shift and one factor.

Not covered: FLUX.2-dev and FLUX.3; training on several references in FLUX.1 other than side by side, as one picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.tasks.flux_vae import patchified
from triptych.errors import TriptychError
from triptych.flux.card import ViewsCard, default_card, how_to_ask
from triptych.flux.hub import find_model, read_index
from triptych.flux.lora import DEFAULT_TARGETS, check_targets, save_lora
from triptych.flux.parts import PIPELINES, _load_part, _quiet, architecture_of, is_block_matrix, require_libraries

Encode = Callable[[Tensor], Tensor]
KLEIN = "flux2-klein"
ADAPTER = "triptych"  # the name that PEFT writes into those of its tensors
QUANTISERS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
LORA_FILE = "lora.safetensors"
_PARTS = {  # part -> its file that has to be there; the class where no model_index.json names one
    KLEIN: {
        "vae": ("config.json", "AutoencoderKLFlux2"),
        "text_encoder": ("config.json", "Qwen3ForCausalLM"),
        "tokenizer": ("tokenizer_config.json", "Qwen2Tokenizer"),
    },
    "flux1": {
        "vae": ("config.json", "AutoencoderKL"),
        "text_encoder": ("config.json", "CLIPTextModel"),
        "text_encoder_2": ("config.json", "T5EncoderModel"),
        "tokenizer": ("tokenizer_config.json", "CLIPTokenizer"),
        "tokenizer_2": ("tokenizer_config.json", "T5Tokenizer"),
    },
}


@dataclass(frozen=True)
class LoraSettings:
    """rank: 0 for no LoRA. alpha: 0 takes the rank; files are written with alpha / rank multiplied in. targets: a
    regular expression of whole module names, "" for attention and MLPs of all blocks. dropout: of adapters' inputs."""

    rank: int = 0
    alpha: float = 0.0
    targets: str = ""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0 or not 0 <= self.dropout < 1:
            raise TriptychError(
                f"lora: rank {self.rank} and alpha {self.alpha} must be 0 or more, dropout {self.dropout} in [0, 1)"
            )

    @property
    def scale_alpha(self) -> float:
        return self.alpha or float(self.rank)


@dataclass(frozen=True)
class FluxBase:
    """A model to fine-tune. folder: in diffusers' layout, here. source: as the user named it."""

    folder: Path
    architecture: str
    licence: str
    source: str


def find_base(source: str) -> FluxBase:
    """The model that ``source`` (folder or repository) names. Raises TriptychError for what cannot be trained on."""
    found = find_model(source)
    if found.card is not None and found.card.lora is not None:
        raise TriptychError(f"{found.title} is a LoRA: name its base {found.card.base}, or merge it first")
    if read_index(found.folder).get("is_distilled"):
        raise TriptychError(
            f"{found.title} is distilled to few steps and turns grey when it is trained: name its base model, such as "
            "black-forest-labs/FLUX.2-klein-base-4B"
        )
    architecture = architecture_of(found.folder)
    card = found.card or default_card(architecture)
    return FluxBase(found.folder, architecture, card.licence, source)


# ---- the transformer


def training_transformer(base: FluxBase, lora: LoraSettings, quantisation: str, checkpointing: bool) -> nn.Module:
    """The base's transformer on the CPU, ready to learn: adapters alone (lora.rank above 0), or all of it.

    Random numbers (of the adapters) come from torch's global generator. Raises TriptychError for targets that fit
    nothing or would not load in ComfyUI, a quantisation without LoRA, and packages that are not there.
    """
    if quantisation != "none" and not lora.rank:
        raise TriptychError(
            f"quantisation {quantisation} holds a frozen base: set lora.rank above 0, or quantisation none"
        )
    if quantisation == "nf4" and not torch.cuda.is_available():
        raise TriptychError("quantisation nf4 needs a CUDA GPU: choose int8, or train on a machine with one")
    pipeline_class, parts = PIPELINES[base.architecture]
    require_libraries(pipeline_class)
    dtype = torch.bfloat16 if lora.rank else torch.float32
    library, classes = parts["transformer"]
    with _quiet():
        model = _load_part(base.folder / "transformer", library, classes[0], dtype, quantisation, [])
    if lora.rank:
        add_adapters(model, base.architecture, lora)
        quantise_base(model, quantisation)
    else:
        model.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def add_adapters(model: Any, architecture: str, lora: LoraSettings) -> None:
    """PEFT's LoRA layers in float32 on a frozen transformer; everything else stops requiring gradients."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise TriptychError("training a LoRA needs the package peft: pip install peft") from error

    targets = lora.targets or DEFAULT_TARGETS[architecture]
    facts: dict[str, Any] = {"lora_alpha": lora.scale_alpha}  # PEFT says int and takes any number
    settings = LoraConfig(r=lora.rank, lora_dropout=lora.dropout, target_modules=targets, **facts)
    model.requires_grad_(False)
    try:
        model.add_adapter(settings, adapter_name=ADAPTER)
    except ValueError as error:
        raise TriptychError(f"lora targets {targets!r} do not fit the transformer ({error}): choose others") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    check_targets(architecture, adapted)


def quantise_base(model: nn.Module, quantisation: str) -> None:
    """The matrices of the blocks, under their adapters, in 8 bits; "none" and "nf4" (loaded as such) change nothing."""
    if quantisation not in QUANTISERS:
        return
    try:
        from torchao import quantization
    except ImportError as error:
        raise TriptychError(f"quantisation {quantisation} needs the package torchao: pip install torchao") from error

    config = getattr(quantization, QUANTISERS[quantisation])()
    quantization.quantize_(model, config, filter_fn=is_block_matrix)


# ---- velocities


@dataclass(frozen=True)
class Words:
    """What FLUX.1 reads of prompts: embeds (B, L, D) of T5, pooled (B, E) of CLIP. FLUX.2 takes embeds alone."""

    embeds: Tensor
    pooled: Tensor

    def __getitem__(self, rows: slice) -> Words:
        return Words(self.embeds[rows], self.pooled[rows])

    def to(self, dtype: torch.dtype) -> Words:
        return Words(self.embeds.to(dtype), self.pooled.to(dtype))


@dataclass(frozen=True)
class ThinWords:
    """What FLUX.2 reads of prompts, with only some of the padding: embeds (B, L, D) at the places (L,) of the whole
    text; log_counts (B, L) of how many tokens each stands for."""

    embeds: Tensor
    places: Tensor
    log_counts: Tensor

    def __getitem__(self, rows: slice) -> ThinWords:
        return ThinWords(self.embeds[rows], self.places, self.log_counts[rows])

    def to(self, dtype: torch.dtype) -> ThinWords:
        return ThinWords(self.embeds.to(dtype), self.places, self.log_counts.to(dtype))


def grouped_velocity(
    model: Any,
    noisy: Tensor,
    level: Tensor,
    words: Any,
    references: Tensor,
    groups: Sequence[tuple[int, int]],
    guidance: float = 1.0,
) -> Tensor:
    """Velocities (B, C, H, W) of noisy latents; rows come in ``groups`` of (references each, rows), in order.

    level (B,) 0-1, words (B, L, D), Words or ThinWords, references (M, C, P, P) in the order of the rows. guidance:
    what a network with that input is told.
    """
    parts, row, used = [], 0, 0
    for count, rows in groups:
        own = references[used : used + count * rows].unflatten(0, (rows, count)) if count else None
        at = slice(row, row + rows)
        parts.append(velocity_of(model, noisy[at], level[at], words[at], own, guidance))
        row, used = row + rows, used + count * rows
    return torch.cat(parts)


def velocity_of(
    model: Any, noisy: Tensor, level: Tensor, words: Any, references: Tensor | None, guidance: float = 1.0
) -> Tensor:
    """(B, C, H, W) for noisy (B, C, H, W), level (B,), words as above, references (B, V, C, P, P) or None."""
    family = _flux1_tokens if isinstance(words, Words) else _klein_tokens
    if noisy.device.type == "meta" or not torch.is_autocast_enabled(noisy.device.type):  # words come in bfloat16
        words = words.to(model.x_embedder.weight.dtype)
    embeds = words if isinstance(words, Tensor) else words.embeds
    tokens, image_ids, text_ids, further = family(model, noisy, words, references, guidance)
    output = model(
        hidden_states=tokens.to(embeds.dtype),
        encoder_hidden_states=embeds,
        timestep=level.to(embeds.dtype),
        img_ids=image_ids.to(noisy.device),
        txt_ids=text_ids.to(noisy.device),
        return_dict=False,
        **further,
    )[0]
    height, width = noisy.shape[2:]
    return output[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def _klein_tokens(
    model: Any, noisy: Tensor, words: Tensor | ThinWords, references: Tensor | None, guidance: float
) -> Any:
    """The i-th reference has the time index 10 + 10 i, words their number in the last axis."""
    tokens, ids = [as_tokens(noisy)], [token_ids(noisy.shape[2], noisy.shape[3], 0)]
    for i, reference in enumerate(references.unbind(1) if references is not None else ()):
        tokens.append(as_tokens(reference))
        ids.append(token_ids(reference.shape[2], reference.shape[3], 10 + 10 * i))
    image = torch.cat(tokens, dim=1)
    further: dict[str, Any] = {"guidance": None}
    if isinstance(words, ThinWords):
        places, counts = words.places, words.log_counts.to(words.embeds.dtype)
        mask = torch.cat([counts, counts.new_zeros(image.shape[:2])], dim=1)[:, None, None]
        further["joint_attention_kwargs"] = {"attention_mask": mask}
    else:
        places = torch.arange(words.shape[1])
    text_ids = torch.zeros(len(places), 4)
    text_ids[:, 3] = places
    return image, torch.cat(ids), text_ids, further


def _flux1_tokens(model: Any, noisy: Tensor, words: Words, references: Tensor | None, guidance: float) -> Any:
    """References stand side by side in one picture with time index 1; words have no place."""
    tokens, ids = [as_tokens(noisy)], [token_ids(noisy.shape[2], noisy.shape[3], 0)[:, :3]]
    if references is not None:
        row = torch.cat(references.unbind(1), dim=-1)
        tokens.append(as_tokens(row))
        ids.append(token_ids(row.shape[2], row.shape[3], 1)[:, :3])
    told = torch.full((len(noisy),), guidance, device=noisy.device) if model.config.guidance_embeds else None
    further = {"guidance": told, "pooled_projections": words.pooled}
    return torch.cat(tokens, dim=1), torch.cat(ids), torch.zeros(words.embeds.shape[1], 3), further


def as_tokens(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return latents.flatten(2).transpose(1, 2)


def token_ids(height: int, width: int, time: int) -> Tensor:
    """(H W, 4) float32 places of latent tokens: time, row, column, 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zero = torch.zeros_like(rows)
    return torch.stack([zero + time, rows, columns, zero], dim=-1).reshape(-1, 4).float()


# ---- the frozen parts


class FrozenParts:
    """Autoencoder, text encoders and tokenizers of a folder, which training leaves as they are; each is loaded, in
    bfloat16, when it is first needed. Raises TriptychError at once when one is missing."""

    def __init__(self, folder: Path, device: torch.device, architecture: str = KLEIN) -> None:
        self.folder, self.device, self.architecture = folder, device, architecture
        self._names = _PARTS[KLEIN if architecture == KLEIN else "flux1"]
        self._loaded: dict[str, Any] = {}
        for name, (file, _) in self._names.items():
            if not (folder / name / file).is_file():
                raise TriptychError(
                    f"{folder} has no {name}/{file}: name a folder in diffusers' layout, or train the small parts"
                )

    def part(self, name: str) -> Any:
        if name not in self._loaded:
            index = read_index(self.folder) if (self.folder / "model_index.json").is_file() else {}
            library, known = PIPELINES[self.architecture][1][name]
            class_name = index.get(name, [library, self._names[name][1]])[1]
            if class_name not in (*known, self._names[name][1]):
                raise TriptychError(f"{self.folder}: the {name} is a {class_name}, it has to be a {known[0]}")
            with _quiet():
                part = _load_part(self.folder / name, library, class_name, torch.bfloat16, "none", [])
            self._loaded[name] = part if "tokenizer" in name else part.to(self.device)
        return self._loaded[name]

    @property
    def loaded(self) -> tuple[str, ...]:
        """The parts that are in memory."""
        return tuple(self._loaded)

    def release(self, keep: Sequence[str] = ()) -> None:
        """Lets go of all parts but those to keep; they load again when they are needed."""
        self._loaded = {name: part for name, part in self._loaded.items() if name in keep}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def vae(self) -> Any:
        return self.part("vae")

    @property
    def _is_klein(self) -> bool:
        return self.architecture == KLEIN

    def pipeline(self, transformer: Any) -> Any:
        """The pipeline that users run, with this transformer."""
        return self._pipeline(transformer, {name: self.part(name) for name in self._names})

    def save(self, transformer: nn.Module, folder: Path) -> None:
        """The whole model in bfloat16 and diffusers' layout, without the places that its parts were read from."""
        self.pipeline(transformer.to(torch.bfloat16)).save_pretrained(folder)
        for file in folder.rglob("*.json"):
            said = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(said, dict) and said.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _pipeline(self, transformer: Any, parts: dict[str, Any]) -> Any:
        import diffusers

        pipeline_class = getattr(diffusers, PIPELINES[self.architecture][0])
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
        facts = {"is_distilled": False} if self._is_klein else {}
        return pipeline_class(scheduler=scheduler, transformer=transformer, **parts, **facts)

    @torch.no_grad()
    def embed(self, prompts: list[str], tokens: int) -> Any:
        """What pipelines give the transformer for these prompts: (B, tokens, D), or Words of FLUX.1."""
        parts = {name: None if name == "vae" else self.part(name) for name in self._names}
        pipeline = self._pipeline(None, parts)
        if self._is_klein:
            return pipeline.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=tokens)[0]
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=tokens
        )
        return Words(embeds, pooled)

    @torch.no_grad()
    def embed_thinly(self, prompts: list[str], tokens: int, padding: int, seed: int) -> ThinWords:
        """FLUX.2's text of ``tokens`` tokens without most of its padding.

        Padding behind a short prompt is most of what the transformer reads, differs by its place alone, and acts
        through attention alone. So ``padding`` of its tokens, drawn from even parts of all places behind the longest
        prompt, stand for the rest: each counts in the softmax as the number of tokens in its part. What the text
        encoder makes of them is what it makes of them in the whole text, where no token sees padding.
        """
        import numpy as np

        from trainer.tasks.flux_text import FLUX_TEXT_LAYERS

        tokenizer, encoder = self.part("tokenizer"), self.part("text_encoder")
        rows = []
        for prompt in prompts:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            rows.append(tokenizer(text, truncation=True, max_length=tokens)["input_ids"])
        longest = max(map(len, rows))
        padding = min(padding, tokens - longest)
        edges = np.linspace(longest, tokens, padding + 1).round().astype(int)
        behind = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
        ids = torch.full((len(rows), longest + padding), int(tokenizer.pad_token_id))
        real = torch.zeros(ids.shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            real[number, : len(row)] = 1
        places = torch.from_numpy(np.concatenate([np.arange(longest), behind]))
        states = encoder(
            input_ids=ids.to(self.device), attention_mask=real.to(self.device),
            position_ids=places.to(self.device).expand(len(rows), -1), output_hidden_states=True, use_cache=False,
        ).hidden_states  # fmt: skip
        embeds = torch.cat([states[layer] for layer in FLUX_TEXT_LAYERS], dim=-1)
        counts = torch.from_numpy(np.concatenate([np.ones(longest), np.diff(edges)])).log()
        return ThinWords(embeds, places, counts.to(embeds).expand(len(rows), -1))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised, patchified latents (B, 4 C, H, W) -> pictures (B, 3, 16 H, 16 W) float32 0-1."""
        vae = self.vae
        shift, scale = latent_statistics(vae)
        b, c, h, w = latents.shape
        whole = latents.float()
        if self._is_klein:
            whole = whole * scale + shift
        whole = whole.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        if not self._is_klein:
            whole = whole * scale + shift
        pixels = vae.decode(whole.to(vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) 0-1 -> normalised, patchified latents (B, 4 C, H / 16, W / 16) float32."""
        shift, scale = latent_statistics(self.vae)
        pixels = (pixels * 2 - 1).to(self.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        if self._is_klein:
            return (patchified(latents).float() - shift) / scale
        return patchified((latents.float() - shift) / scale)


def encoder_of(folder: Path, device: torch.device, architecture: str) -> Encode:
    """Pictures (B, 3, H, W) 0-1 -> normalised, patchified latents, bfloat16 on the CPU as caches hold them."""
    parts = FrozenParts(folder, device, architecture)
    return lambda pixels: parts.encode(pixels).to("cpu", torch.bfloat16).contiguous()


def encoded_references(encode: Encode, samples: Sequence[Tensor], joined: bool) -> Tensor:
    """Latents (M, 4 C, P, P) of the references (V, 3, S, S) of several samples, one after the other.

    joined: as FLUX.1 sees them, those of one sample as one picture, side by side.
    """
    if not joined:
        return encode(torch.cat(list(samples)))
    rows = [encode(torch.cat(list(views), dim=-1)[None])[0] for views in samples]
    return torch.cat([torch.stack(row.chunk(len(views), -1)) for row, views in zip(rows, samples, strict=True)])


def latent_statistics(vae: Any) -> tuple[Any, Any]:
    """What is taken off latents, and what they are then divided by: of patchified ones in FLUX.2, plain in FLUX.1."""
    if hasattr(vae, "bn"):
        mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        return mean, (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    return vae.config.shift_factor, 1 / vae.config.scaling_factor


@contextmanager
def for_a_while(parts: FrozenParts, borrowed: bool) -> Iterator[None]:
    """When ``borrowed``, the parts that the block loads are let go of afterwards."""
    before = parts.loaded
    try:
        yield
    finally:
        if borrowed:
            parts.release(keep=before)


# ---- exports


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by PEFT's names."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def write_lora(model: nn.Module, folder: Path, base: FluxBase, lora: LoraSettings, card: ViewsCard) -> ViewsCard:
    """lora.safetensors with alpha multiplied in; the card that names it and its base."""
    place = base_place(base, folder)
    save_lora(
        folder / LORA_FILE, adapter_state(model), lora.rank, lora.scale_alpha, place, base.architecture,
        asked=how_to_ask(card), provenance=card.provenance, dtype=torch.bfloat16,
    )  # fmt: skip
    return replace(card, base=place, lora=LORA_FILE)


def base_place(base: FluxBase, folder: Path) -> str:
    """How a card in ``folder`` names the base: a repository as it is, a folder by its way from there."""
    if not Path(base.source).expanduser().exists():
        return base.source
    try:
        return Path(os.path.relpath(base.folder, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(base.folder)


def write_whole(model: nn.Module, folder: Path, parts: FrozenParts) -> None:
    """The whole model in diffusers' layout, bfloat16, and its transformer as one file for ComfyUI."""
    from triptych.flux.native import export_native

    parts.save(model, folder)
    export_native(folder, folder / "comfyui" / f"{folder.name}.safetensors")
