"""The parts of a Flux pipeline (networks, tokenizers), built from a diffusers folder with every check before use.

Only the classes that an architecture consists of are built, whatever model_index.json says. A part whose file is cut
off, or lacks a tensor, or has one of another shape, is refused: the libraries would fill some of these with random
numbers and a warning. Quantised matrices are those of the transformer blocks; embedders, norms and output layers stay.
"""

from __future__ import annotations

import importlib.util
import re
import warnings as python_warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import TriptychError
from ..pipelines.memory import GIB, network_bytes
from .card import ViewsCard
from .hub import read_index, read_json

OFFLOADS = ("auto", "none", "model", "sequential")
QUANTISATIONS = ("none", "int8", "nf4", "fp8")
_INSTALL = "pip install diffusers transformers accelerate peft"

# Architecture -> pipeline class in diffusers, and its parts: library and the classes that may stand in the index.
_KLEIN = {
    "transformer": ("diffusers", ("Flux2Transformer2DModel",)),
    "vae": ("diffusers", ("AutoencoderKLFlux2",)),
    "text_encoder": ("transformers", ("Qwen3ForCausalLM",)),
    "tokenizer": ("transformers", ("Qwen2TokenizerFast", "Qwen2Tokenizer")),
}
_FLUX1 = {
    "transformer": ("diffusers", ("FluxTransformer2DModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "text_encoder_2": ("transformers", ("T5EncoderModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "tokenizer_2": ("transformers", ("T5TokenizerFast", "T5Tokenizer")),
}
PIPELINES: dict[str, tuple[str, dict[str, tuple[str, tuple[str, ...]]]]] = {
    "flux2-klein": ("Flux2KleinPipeline", _KLEIN),
    "flux1-kontext": ("FluxKontextPipeline", _FLUX1),
    "flux1-dev": ("FluxPipeline", _FLUX1),
}
_UNUSED_PARTS = ("image_encoder", "feature_extractor")  # of FLUX.1's IP adapters
_BLOCK = re.compile(r"(^|\.)(transformer_blocks|single_transformer_blocks|layers|block)\.\d+\.")


def require_libraries(pipeline_class: str) -> None:
    """Raises TriptychError when diffusers or transformers is absent, or diffusers too old for the pipeline."""
    for package in ("diffusers", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise TriptychError(f"Flux models need the package {package}, which is not installed: {_INSTALL}")
    import diffusers

    if not hasattr(diffusers, pipeline_class):
        raise TriptychError(
            f"diffusers {diffusers.__version__} has no {pipeline_class}: {_INSTALL} --upgrade (0.37 or later)"
        )


def architecture_of(folder: Path) -> str:
    """By the pipeline class in model_index.json. Raises TriptychError for a class that is not known here."""
    name = read_index(folder).get("_class_name")
    for architecture, (pipeline, _) in PIPELINES.items():
        if name == pipeline:
            return architecture
    known = ", ".join(pipeline for pipeline, _ in PIPELINES.values())
    raise TriptychError(f"{folder} is a {name!r}, which is no known Flux views model: choose one of {known}")


def load_pipeline(
    folder: Path,
    architecture: str,
    dtype: torch.dtype,
    quantisation: str = "none",
    on_part: Callable[[float], None] | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The pipeline with all networks on the CPU, in eval mode, without gradients; and warnings.

    dtype: of the networks. quantisation: only "nf4" acts here, its matrices are packed while they are read.
    on_part(share of the parts that are read, 0-1) is called before each part; what it raises ends the loading.
    Its scheduler takes the sigmas it is given as they are.
    """
    pipeline_class, wanted = PIPELINES[architecture]
    require_libraries(pipeline_class)
    import diffusers

    index = read_index(folder)
    _check_parts(folder, index, wanted)
    notes: list[str] = []
    parts: dict[str, Any] = {name: None for name in _UNUSED_PARTS} if architecture != "flux2-klein" else {}
    with _quiet():
        for i, name in enumerate(wanted):
            if on_part is not None:
                on_part(i / len(wanted))
            library, class_name = index[name]
            parts[name] = _load_part(folder / name, library, class_name, dtype, quantisation, notes)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    facts = {"is_distilled": bool(index.get("is_distilled", False))} if architecture == "flux2-klein" else {}
    pipeline = getattr(diffusers, pipeline_class)(scheduler=scheduler, **parts, **facts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, tuple(notes)


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by the names of their parts."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def quantise(pipeline: Any, quantisation: str) -> int:
    """The matrices of the transformer's and text encoders' blocks as int8 or fp8, in place; returns how many.

    A LoRA on them keeps its precision. Raises TriptychError when torchao is absent.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise TriptychError(
            f"quantisation {quantisation} needs the package torchao (0.10 or later): pip install torchao"
        ) from error

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[quantisation]()
    count = 0
    for name, network in networks_of(pipeline).items():
        if name == "vae":
            continue
        chosen = [key for key, module in network.named_modules() if is_block_matrix(module, key)]
        quantize_(network, config, filter_fn=is_block_matrix)
        count += len(chosen)
    return count


def is_block_matrix(module: nn.Module, name: str) -> bool:
    """Whether a module is a matrix of a transformer block, and not one that a LoRA added."""
    return isinstance(module, nn.Linear) and bool(_BLOCK.search(name)) and "lora_" not in name


def decide_offload(pipeline: Any, device: torch.device, offload: str, card: ViewsCard) -> tuple[str, tuple[str, ...]]:
    """The offload to use ("auto" decided), and warnings."""
    if device.type == "cpu":
        notes = () if offload in ("auto", "none") else (f"offload {offload!r} does nothing on a CPU",)
        return "none", notes
    if offload == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        offload = choose_offload(
            {name: network_bytes(network) for name, network in networks_of(pipeline).items()}, free, card.panel_size
        )
    return offload, ()


def place(pipeline: Any, device: torch.device, offload: str) -> None:
    """Puts the networks where they run, or hooks on them that do so in their turn (offload "model", "sequential")."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    elif device.type != "cpu":
        pipeline.to(device)


def choose_offload(part_bytes: dict[str, int], free_bytes: int, panel_size: int) -> str:
    """none, model or sequential, by the GPU memory that is free.

    Beside weights a sheet of 1024 px is given 3 GiB for activations and the decoder, smaller and larger ones in
    proportion to their pixels, and half a GiB is left in any case: an estimate, not a measurement.
    """
    working = int(GIB * (0.5 + 3 * (2 * panel_size / 1024) ** 2))
    if sum(part_bytes.values()) + working <= free_bytes:
        return "none"
    return "model" if max(part_bytes.values()) + working <= free_bytes else "sequential"


def _check_parts(folder: Path, index: dict[str, Any], wanted: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    for name, (library, classes) in wanted.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != library or entry[1] not in classes:
            raise TriptychError(f"{folder}: the {name} is {entry}, it has to be a {classes[0]} of {library}")
        if not (folder / name).is_dir():
            raise TriptychError(f"{folder / name} is missing: fetch the model again")
        if "tokenizer" not in name:
            _check_weights(folder / name)


def _check_weights(folder: Path) -> None:
    """That config and weights are there, and no safetensors file is cut off or damaged in its header."""
    if not (folder / "config.json").is_file():
        raise TriptychError(f"{folder / 'config.json'} is missing: fetch the model again")
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        shards = read_json(index).get("weight_map", {})
        missing = sorted({str(file) for file in shards.values()} - {file.name for file in files})
        if missing:
            raise TriptychError(f"{folder / missing[0]} is missing: fetch the model again")
    if not files:
        raise TriptychError(f"{folder} has no safetensors file: fetch the model again (other formats are not read)")
    for file in sorted(files):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except SafetensorError as error:
            raise TriptychError(f"{file} is not a whole safetensors file ({error}): fetch it again") from error


def _load_part(
    folder: Path, library: str, class_name: str, dtype: torch.dtype, quantisation: str, notes: list[str]
) -> Any:
    import diffusers
    import transformers

    part_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    try:
        if "tokenizer" in folder.name:
            return part_class.from_pretrained(str(folder), local_files_only=True)
        options: dict[str, Any] = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
        if quantisation == "nf4" and folder.name != "vae":
            options["quantization_config"] = _nf4(library, dtype, kept_matrices(part_class, folder))
        network, info = part_class.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise TriptychError(f"{folder} could not be loaded ({_one_line(error)}): fetch the model again") from error
    _check_loaded(folder, info, notes)
    if class_name == "Qwen3ForCausalLM":
        network.register_forward_pre_hook(_last_logits, with_kwargs=True)
    return network.eval().requires_grad_(False)


def _last_logits(network: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pipelines read hidden states alone; 512 tokens' logits over a vocabulary of 152,000 would be made beside them."""
    return args, {"logits_to_keep": 1} | options


def _check_loaded(folder: Path, info: dict[str, Any], notes: list[str]) -> None:
    for key, problem in (("mismatched_keys", "has another shape than its config says in"), ("missing_keys", "lacks")):
        found = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get(key) or ())
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise TriptychError(f"{folder} {problem} the tensor {found[0]}{more}: fetch the model again")
    unknown = sorted(map(str, info.get("unexpected_keys") or ()))
    if unknown:
        notes.append(f"{folder} has {len(unknown)} tensors that its network does not use, such as {unknown[0]}")


def kept_matrices(part_class: Any, folder: Path) -> list[str]:
    """Names of the Linear layers of a folder's network that are no block's matrix: embedders, modulation, output."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        if hasattr(part_class, "load_config"):
            network = part_class.from_config(part_class.load_config(str(folder), local_files_only=True))
        else:
            network = part_class(part_class.config_class.from_pretrained(str(folder), local_files_only=True))
    return [
        name for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not is_block_matrix(module, name)
    ]  # fmt: skip


def _nf4(library: str, dtype: torch.dtype, kept: list[str]) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TriptychError("quantisation nf4 needs the package bitsandbytes: pip install bitsandbytes, or take int8")
    import diffusers
    import transformers

    config = {"diffusers": diffusers, "transformers": transformers}[library].BitsAndBytesConfig
    return config(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' bars and notes; their settings are as before afterwards."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels, bars = [log.get_verbosity() for log in logs], [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
