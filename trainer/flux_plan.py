"""python -m trainer plan flux2_klein_4b_lora: what fine-tuning a Flux model takes of a card's memory.

Counted: the transformer's weights as each way of training holds them (parameter counts of the published shapes, built
on the meta device), adapters with gradients, AdamW's moments and EMA, and the activations of a backward pass with every
block recomputed (gradient checkpointing), for sheets of 512, 768 and 1024 px with 512 text tokens and one reference, or
the most that the data have: three, six in a cache made with --mirrored. What fits is said of the most, since any batch
may draw it.
Activations are those of bfloat16 autocast: what a token keeps in a block, and the peak of a whole backward pass, were
counted on small random models (tests compare); to that the float32 inputs and outputs of norms are added, which
autocast makes on CUDA but not on a CPU.

Not counted: text encoder and autoencoder, which training with cached prompts loads only for pictures; what a framework
and its kernels take for themselves. A tenth of the card is left for these and for fragmentation. An estimate: measured
figures stand in docs/flux_training.md where there are any.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.flux_base import LoraSettings
from trainer.memory import GIB
from trainer.prepare.sheet_cache import INDEX
from triptych.errors import TriptychError
from triptych.flux.hub import read_json
from triptych.flux.lora import DEFAULT_TARGETS
from triptych.flux.parts import is_block_matrix

CARDS_GIB = (12, 16, 24, 48, 80, 141)
SHEETS_PX = (512, 768, 1024)
TEXT_TOKENS = 512
MOST_REFERENCES = 3  # of a sample, see prepare/sheet_cache.py; twice that with their mirror images
USABLE = 0.9
MODES = ("full", "lora", "lora, int8 base", "lora, nf4 base")
# Bytes of a number of a quantised matrix. nf4 has a float32 scale for each 64 numbers; int8 and fp8 have one a row.
_MATRIX_BYTES = {"lora, int8 base": 1.0, "lora, fp8 base": 1.0, "lora, nf4 base": 0.5 + 4 / 64}
_SCALED_ROWS = ("lora, int8 base", "lora, fp8 base")


@dataclass(frozen=True)
class Kept:
    """Bytes that a token keeps in a block, over the width, in bfloat16 autocast on a CPU; norms: LayerNorms in it."""

    lora: float
    full: float
    norms: int


# Counted on random models of 128 and 256 channels; adapters' own are added by their rank.
KEPT = {
    ("flux2", "transformer_blocks"): Kept(54.2, 64.1, 2),
    ("flux2", "single_transformer_blocks"): Kept(50.1, 62.1, 1),
    ("flux1", "transformer_blocks"): Kept(46.2, 56.1, 2),
    ("flux1", "single_transformer_blocks"): Kept(44.1, 50.1, 1),
}
# What the backward pass of a block holds beside what is kept, over that: measured peaks on the same models.
_BACKWARD = {"flux2": 0.57, "flux1": 0.92}
_NORM_BYTES = 6  # more on CUDA: the input as a float32 copy, the output in float32 rather than bfloat16

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "black-forest-labs/FLUX.2-klein-base-4B": ("flux2-klein", {"heads": 24, "double": 5, "single": 20, "text": 7680}),
    "black-forest-labs/FLUX.2-klein-base-9B": ("flux2-klein", {"heads": 32, "double": 8, "single": 24, "text": 12288}),
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux1-kontext", {"heads": 24, "double": 19, "single": 38, "text": 4096}),
    "black-forest-labs/FLUX.1-dev": ("flux1-dev", {"heads": 24, "double": 19, "single": 38, "text": 4096}),
}


@dataclass(frozen=True)
class FluxShape:
    """Numbers of a transformer: all, those in the blocks' matrices, their rows, the largest matrix, adapters' ones.

    blocks: kind -> how many. adapted: kind -> matrices with an adapter in one block.
    """

    family: str
    width: int
    numbers: int
    matrices: int
    rows: int
    largest: int
    adapters: int
    rank: int
    blocks: dict[str, int]
    adapted: dict[str, int]

    def frozen(self, mode: str) -> float:
        """Bytes of the weights that do not learn."""
        if mode == "full":
            return 0.0
        quantised = _MATRIX_BYTES.get(mode)
        if quantised is None:
            return 2.0 * self.numbers
        scales = 2.0 * self.rows if mode in _SCALED_ROWS else 0.0
        return quantised * self.matrices + scales + 2.0 * (self.numbers - self.matrices)

    def static(self, mode: str) -> dict[str, float]:
        """Bytes by kind, without activations. A quantised matrix is there in bfloat16 too while it is used."""
        trained = float(self.numbers if mode == "full" else self.adapters)
        copies = 2.0 * trained + (2.0 * self.largest if mode in _MATRIX_BYTES else 0.0)
        return {
            "weights": self.frozen(mode) + 4 * trained + copies, "gradients": 4 * trained, "optimizer": 8 * trained,
            "EMA": 4 * trained,
        }  # fmt: skip

    def kept(self, kind: str, mode: str, cuda: bool = True) -> float:
        """Bytes that one token keeps in a block of ``kind``."""
        entry = KEPT[self.family, kind]
        coefficient = (entry.full if mode == "full" else entry.lora) + (_NORM_BYTES * entry.norms if cuda else 0)
        own = 0 if mode == "full" else 2 * self.rank * self.adapted[kind]
        return self.width * coefficient + own

    def activations(self, mode: str, tokens: int, *, recompute: bool = True, cuda: bool = True) -> float:
        """Bytes that autograd keeps of one sample; one block at a time is there whole when blocks are recomputed."""
        kinds = [kind for kind, count in self.blocks.items() for _ in range(count)]
        # Embedded tokens, and the last norm's input and output.
        rest = tokens * self.width * (4.0 + (_NORM_BYTES if cuda else 0))
        if not recompute:
            return tokens * sum(self.kept(kind, mode, cuda) for kind in kinds) + rest
        return tokens * (2.0 * self.width * len(kinds) + max(self.kept(kind, mode, cuda) for kind in kinds)) + rest

    def sample(self, mode: str, tokens: int, *, recompute: bool = True, cuda: bool = True) -> float:
        """Bytes of one sample at the peak of its backward pass."""
        largest = max(self.kept(kind, mode, cuda) for kind in self.blocks)
        kept = self.activations(mode, tokens, recompute=recompute, cuda=cuda)
        return kept + _BACKWARD[self.family] * tokens * largest


def sheet_tokens(sheet_px: int, references: int = 1, text_tokens: int = TEXT_TOKENS) -> int:
    """Tokens of one sample: the sheet, references of half its side, words."""
    return (sheet_px // 16) ** 2 + references * (sheet_px // 32) ** 2 + text_tokens


def weightless(architecture: str, heads: int, double: int, single: int, text: int) -> Any:
    """A transformer of the published family on the meta device: shapes without memory."""
    from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

    common: dict[str, Any] = {
        "patch_size": 1, "num_layers": double, "num_single_layers": single, "attention_head_dim": 128,
        "num_attention_heads": heads, "joint_attention_dim": text,
    }  # fmt: skip
    with torch.device("meta"):
        if architecture == "flux2-klein":
            return Flux2Transformer2DModel(in_channels=128, guidance_embeds=False, **common)
        return FluxTransformer2DModel(in_channels=64, pooled_projection_dim=768, guidance_embeds=True, **common)


def shape_of(network: Any, lora: LoraSettings | None = None) -> FluxShape:
    """The shape of a transformer, with its adapters when it has some, else with those that ``lora`` would add."""
    family = "flux2" if "Flux2" in type(network).__name__ else "flux1"
    has = any("lora_" in name for name, _ in network.named_parameters())
    lora = lora or LoraSettings(rank=32)
    targets = re.compile(lora.targets or DEFAULT_TARGETS["flux2-klein" if family == "flux2" else "flux1-dev"])
    plain = [
        (name.replace(".base_layer", ""), module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and not hasattr(module, "base_layer")
    ]
    adapted = [(name, module) for name, module in plain if targets.fullmatch(name)]
    rank = lora.rank
    if has:
        layers = [p for name, p in network.named_parameters() if ".lora_A." in name]
        rank = int(layers[0].shape[0])
        names = {name.split(".lora_A.")[0] for name, _ in network.named_parameters() if ".lora_A." in name}
        adapted = [(name, module) for name, module in plain if name in names]
    matrices = [module for name, module in plain if is_block_matrix(module, name)]
    config = network.config
    return FluxShape(
        family=family,
        width=config.num_attention_heads * config.attention_head_dim,
        numbers=sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name),
        matrices=sum(m.weight.numel() for m in matrices),
        rows=sum(m.out_features for m in matrices),
        largest=max(m.weight.numel() for m in matrices),
        adapters=sum(rank * (m.in_features + m.out_features) for _, m in adapted),
        rank=rank,
        blocks={"transformer_blocks": config.num_layers, "single_transformer_blocks": config.num_single_layers},
        adapted={
            kind: sum(name.startswith(f"{kind}.0.") for name, _ in adapted)
            for kind in ("transformer_blocks", "single_transformer_blocks")
        },
    )


def held_bytes(network: nn.Module) -> int:
    """Bytes of the frozen weights as they lie in memory, quantised ones with their scales."""
    from triptych.pipelines.memory import _tensor_bytes

    return sum(_tensor_bytes(p) for p in network.parameters() if not p.requires_grad)


@dataclass(frozen=True)
class Fit:
    """One way of training on one card: the largest batch of one backward pass for each size of sheet, 0 for none."""

    mode: str
    card_gib: int
    batches: tuple[int, ...]


def fit(shape: FluxShape, mode: str, card_gib: int, references: int = MOST_REFERENCES) -> Fit:
    """What fits on a card where every sample may have so many references."""
    room = USABLE * card_gib * GIB - sum(shape.static(mode).values())
    batches = (int(room // shape.sample(mode, sheet_tokens(size, references))) for size in SHEETS_PX)
    return Fit(mode, card_gib, tuple(max(0, batch) for batch in batches))


def plan_shape(base: str, lora: LoraSettings) -> FluxShape:
    """The shape of a published model by its name, or of a folder by its config. Raises TriptychError for neither."""
    settings = lora if lora.rank else LoraSettings(rank=32)
    if base in PUBLISHED:
        return _published(base, settings)
    if not (Path(base) / "transformer" / "config.json").is_file():
        raise TriptychError(
            f"the shape of {base or 'a model without base'} is not known: name a folder, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    import diffusers

    from triptych.flux.parts import PIPELINES, architecture_of

    class_name = PIPELINES[architecture_of(Path(base))][1]["transformer"][1][0]
    with torch.device("meta"):
        network = getattr(diffusers, class_name).from_config(read_json(Path(base) / "transformer" / "config.json"))
    return shape_of(network, settings)


@cache
def _published(base: str, lora: LoraSettings) -> FluxShape:
    architecture, sizes = PUBLISHED[base]
    return shape_of(weightless(architecture, **sizes), lora)


def most_references(config: Any) -> int:
    """Of one sample, for a FluxViewsConfig: none for FLUX.1 dev, else by whether its caches, where there are some
    already, have mirror images."""
    if PUBLISHED.get(config.base, ("", {}))[0] == "flux1-dev":
        return 0
    indices = [path for folder in config.cache if (path := Path(folder) / INDEX).is_file()]
    mirrored = any(read_json(path).get("options", {}).get("mirrored") for path in indices)
    return 2 * MOST_REFERENCES if mirrored else MOST_REFERENCES


def plan_text(config: Any, cards_gib: Sequence[int] | None, batch: int) -> str:
    """The tables that the command prints for a FluxViewsConfig; batch: of one backward pass, as the recipe has it."""
    cards = tuple(cards_gib or CARDS_GIB)
    if any(card < 1 for card in cards):
        raise TriptychError(f"--gpu must be 1 or more GB, got {min(cards)}")
    shape = plan_shape(config.base, config.lora)
    own = "full" if not config.lora.rank else "lora"
    own += {"int8": ", int8 base", "fp8": ", int8 base", "nf4": ", nf4 base"}.get(config.quantisation, "")
    blocks = " + ".join(str(count) for count in shape.blocks.values())
    lines = [
        f"{config.base}: {shape.numbers / 1e6:,.0f} M numbers, {blocks} blocks of width {shape.width}; "
        f"{shape.adapters / 1e6:,.1f} M in adapters of rank {shape.rank}",
        f"this recipe: {own}, {batch} sheets to a backward pass",
        "",
        f"{'GiB without activations':<24}" + "".join(f"{kind:>12}" for kind in (*shape.static("full"), "sum")),
    ]
    for mode in MODES:
        parts = shape.static(mode)
        lines.append(f"{mode:<24}" + "".join(f"{v / GIB:>12.2f}" for v in (*parts.values(), sum(parts.values()))))
    most = most_references(config)
    lines += ["", f"{'GiB of one sample':<24}" + "".join(f"{f'sheet {size}':>12}" for size in SHEETS_PX)]
    for references in sorted({min(1, most), most}):
        for name, recompute in (("recomputed", True), ("all kept", False)):
            sizes = (shape.sample(own, sheet_tokens(size, references), recompute=recompute) / GIB for size in SHEETS_PX)
            label = f"{_counted(references)}, {name}"
            lines.append(f"{label:<24}" + "".join(f"{size:>12.2f}" for size in sizes))
    lines += ["", f"largest batch of one backward pass, blocks recomputed, {_counted(most)} to each sheet"]
    lines.append(f"{'card':<8}{'training':<18}" + "".join(f"{f'sheet {size}':>12}" for size in SHEETS_PX))
    for card in cards:
        for mode in MODES:
            found = fit(shape, mode, card, most)
            lines.append(f"{f'{card} GB':<8}{mode:<18}" + "".join(f"{count or 'none':>12}" for count in found.batches))
    return "\n".join(lines)


def _counted(references: int) -> str:
    return f"{references} reference{'' if references == 1 else 's'}"
