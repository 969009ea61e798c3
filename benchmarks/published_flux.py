"""The shape of FLUX.2 klein 4B with random weights on a GPU: seconds and memory of a sheet, and LoRA training steps.

    python -m benchmarks.published_flux [--shape klein-4b|tiny] [--no-training] [--compile]

Sheets: 2 x 2 of 512 px from one reference of 512 px and 512 text tokens, in 4 steps (one pass each, as the distilled
model) and 28 (two passes each, with guidance); the weights in bfloat16, and the blocks' matrices in int8 and fp8
(weights only, torchao). Text encoder and sampling, with both passes of the autoencoder in it, are timed apart; peak
memory is that of all networks resident. Training: bfloat16 weights, LoRA of rank 32 on the default targets, AdamW,
gradient checkpointing, batch 1, sheets of 512, 768 and 1024 px with a reference of half the side. Utilisation counts
the products and attention of forward pass and backward pass, not what checkpointing computes again, against what a
large bfloat16 matrix product reaches in the same run.

Without CUDA nothing is measured, and the output says so. --shape tiny runs the same code at a small size on any device,
which proves that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.sparse_ops import best_s, matmul_rate
from trainer.tasks.flux_views import velocity_of
from triptych.flux.card import sigmas
from triptych.flux.lora import DEFAULT_TARGETS
from triptych.flux.parts import quantise
from triptych.pipelines.memory import GIB, network_bytes

RANK = 32
WEIGHTS = ("bfloat16", "int8", "fp8")
NOT_MEASURED = (
    "seconds and peak memory of a 1024 px sheet, 4 and 28 steps, bfloat16, int8, fp8: not measured (no CUDA device)\n"
    "LoRA training step at 512, 768 and 1024 px, its peak memory and utilisation: not measured (no CUDA device)"
)


@dataclass(frozen=True)
class Shape:
    """transformer, vae, text: arguments of the networks' configs. panel_px: of a sheet's panel and of its reference.
    training_px: sides of sheets. text_tokens: of a prompt. steps: with the guidance that goes with them."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    panel_px: int
    training_px: tuple[int, ...]
    text_tokens: int
    steps: tuple[tuple[int, float], ...]


KLEIN_4B = Shape(
    transformer={"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24},
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    text={
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    panel_px=512,
    training_px=(512, 768, 1024),
    text_tokens=512,
    steps=((4, 1.0), (28, 4.0)),
)
TINY = Shape(
    transformer={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    vae={"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    text={
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 28,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
    panel_px=64,
    training_px=(64, 96),
    text_tokens=8,
    steps=((1, 1.0), (2, 4.0)),
)
SHAPES = {"klein-4b": KLEIN_4B, "tiny": TINY}


@contextmanager
def built_on(device: str) -> Iterator[None]:
    """Networks made inside are bfloat16 on the device at once, so that the host never holds them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def transformer_of(shape: Shape, device: str) -> Any:
    from diffusers import Flux2Transformer2DModel

    with built_on(device):
        return Flux2Transformer2DModel(
            in_channels=128,
            attention_head_dim=128,
            joint_attention_dim=3 * shape.text["hidden_size"],
            guidance_embeds=False,
            **shape.transformer,
        ).eval()


def pipeline_of(shape: Shape, device: str) -> Any:
    """diffusers' pipeline without a tokenizer, and with the text encoder that it does not need for embeddings."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with built_on(device):
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **shape.vae
        ).eval()
        encoder = Qwen3ForCausalLM(Qwen3Config(head_dim=128, tie_word_embeddings=True, use_cache=False, **shape.text))
    vae.bn.reset_running_stats()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=None,
        transformer=transformer_of(shape, device),
        is_distilled=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet_times(shape: Shape, device: str, weights: str, compiled: bool, repeats: int) -> None:
    """Prints seconds and peak memory of sheets with one kind of weights."""
    pipeline = pipeline_of(shape, device)
    if weights != "bfloat16":
        quantise(pipeline, weights)
    if compiled:
        pipeline.transformer.compile_repeated_blocks()
    resident = network_bytes(pipeline.transformer) + network_bytes(pipeline.text_encoder) + network_bytes(pipeline.vae)
    tokens = torch.randint(0, shape.text["vocab_size"], (1, shape.text_tokens), device=device)
    picture = Image.new("RGB", (shape.panel_px, shape.panel_px), (200, 90, 30))
    words = torch.randn(1, shape.text_tokens, 3 * shape.text["hidden_size"], device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        text_s, text_memory = measured(
            lambda: pipeline.text_encoder(tokens, output_hidden_states=True, logits_to_keep=1), device, repeats
        )
        print(f"{weights}: weights {resident / GIB:.2f} GiB; text encoder {text_s:.3f} s, peak {text_memory}")
        for steps, guidance in shape.steps:

            def sheet(steps: int = steps, guidance: float = guidance) -> None:
                pipeline(
                    image=picture,
                    prompt_embeds=words,
                    negative_prompt_embeds=words,
                    height=2 * shape.panel_px,
                    width=2 * shape.panel_px,
                    num_inference_steps=steps,
                    sigmas=sigmas(steps, 1.0),
                    guidance_scale=guidance,
                    output_type="pt",
                )

            seconds, memory = measured(sheet, device, repeats)
            passes = steps * (2 if guidance > 1 else 1)
            print(
                f"  sheet of {2 * shape.panel_px} px, {steps} steps ({passes} passes): {seconds:.3f} s, peak {memory}"
            )


def training_times(shape: Shape, device: str, peak_rate: float, repeats: int) -> None:
    """Prints a LoRA training step's seconds, peak memory and utilisation at each size that fits."""
    model = with_lora(transformer_of(shape, device))
    model.enable_gradient_checkpointing()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device == "cuda")
    count = sum(p.numel() for p in parameters)
    print(f"LoRA of rank {RANK}: {count / 1e6:.2f} M of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M")
    for side in shape.training_px:
        sample = training_sample(shape, side, device)

        def step(sample: SimpleNamespace = sample) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, sample).backward()
            optimizer.step()

        try:
            seconds, memory = measured(step, device, repeats)
        except torch.cuda.OutOfMemoryError:
            print(f"  training at {side} px: does not fit into the memory of this device")
            return
        flops = training_flops(shape, side)
        print(
            f"  training at {side} px: {seconds:.3f} s a step, peak {memory}, {flops / 1e12:.3f} TFLOP, "
            f"{flops / seconds / peak_rate:.1%} of a matrix product's rate"
        )


def with_lora(model: Any) -> Any:
    from peft import LoraConfig

    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=True, target_modules=DEFAULT_TARGETS["flux2-klein"])
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def training_sample(shape: Shape, side: int, device: str) -> SimpleNamespace:
    """Latents of a sheet and its reference, 16 px a token, and embeddings of the text."""
    grid, small = side // 16, side // 32
    kind = {"device": device, "dtype": torch.bfloat16}
    return SimpleNamespace(
        target=torch.randn(1, 128, grid, grid, **kind),  # type: ignore[call-overload]
        noise=torch.randn(1, 128, grid, grid, **kind),  # type: ignore[call-overload]
        level=torch.full((1,), 0.5, device=device),
        words=torch.randn(1, shape.text_tokens, 3 * shape.text["hidden_size"], **kind),  # type: ignore[call-overload]
        references=torch.randn(1, 1, 128, small, small, **kind),  # type: ignore[call-overload]
    )


def loss_of(model: Any, sample: SimpleNamespace) -> Tensor:
    noisy = torch.lerp(sample.target, sample.noise, sample.level.to(sample.target).view(-1, 1, 1, 1))
    with torch.autocast(sample.target.device.type, torch.bfloat16):
        velocity = velocity_of(model, noisy, sample.level, sample.words, sample.references)
    return (velocity.float() - (sample.noise - sample.target).float()).square().mean()


def training_flops(shape: Shape, side: int) -> int:
    """Floating-point operations of products and attention in one step without recomputation, counted on no device."""
    from torch.utils.flop_counter import FlopCounterMode

    model = with_lora(transformer_of(shape, "meta")).train()
    sample = training_sample(shape, side, "meta")
    sample.words.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        noisy = torch.lerp(sample.target, sample.noise, sample.level.to(sample.target).view(-1, 1, 1, 1))
        velocity_of(model, noisy, sample.level, sample.words, sample.references).float().mean().backward()
    return counter.get_total_flops()


def measured(work: Callable[[], object], device: str, repeats: int) -> tuple[float, str]:
    """The shortest of a few times in seconds, and the peak of allocated GPU memory in words."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = best_s(work, repeats, device)
    if device != "cuda":
        return seconds, "memory not measured"
    return seconds, f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="klein-4b")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks for sampling")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{args.shape}, random weights, {SHAPES[args.shape].text_tokens} text tokens; {describe()}")
    if args.shape == "tiny":
        print("a small size: its numbers say nothing about the published shape")
    elif device == "cpu":
        print(NOT_MEASURED)
        return
    shape, repeats = SHAPES[args.shape], 3 if device == "cuda" else 1
    started = time.perf_counter()
    for weights in WEIGHTS:
        sheet_times(shape, device, weights, args.compile, repeats)
    if not args.no_training:
        training_times(shape, device, matmul_rate(torch.bfloat16, device, repeats), repeats)
    print(f"all of it took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
