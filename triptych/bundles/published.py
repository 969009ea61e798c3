"""Published TRELLIS checkpoints as a bundle: ``pipeline.json`` with ``ckpts/*.json`` and ``ckpts/*.safetensors``.

Such a folder, local or on the Hugging Face Hub, answers as `Bundle` does, and fetches and loads only the networks that
are asked for. Nothing in it states hashes, so `hub` keeps them from the first use on. Names, shapes and kinds of all
tensors have to be those of the network that the config builds, before any is used; nothing is ever unpickled.

Published objects stand upright along +Z and face -Y. Licence: as stated by the publisher, not in these files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import TriptychError
from .bundle import Bundle
from .components import build_component
from .hub import Cancel, HubFolder, LocalFolder, Progress
from .manifest import _DTYPES, Component, Manifest, _same_names

PIPELINE = "pipeline.json"
PIPELINE_CLASS = "TrellisImageTo3DPipeline"
_MAX_JSON_BYTES = 1 << 20
_SUFFIXES = (".json", ".safetensors")  # of a network's files
_FLOATS = ("float32", "float16", "bfloat16")

# Component -> its class and its key in pipeline.json.
_LISTED = {
    "structure_flow": ("SparseStructureFlowModel", "sparse_structure_flow_model"),
    "structure_decoder": ("SparseStructureDecoder", "sparse_structure_decoder"),
    "slat_flow": ("SLatFlowModel", "slat_flow_model"),
    "slat_decoder_mesh": ("SLatMeshDecoder", "slat_decoder_mesh"),
    "slat_decoder_gs": ("SLatGaussianDecoder", "slat_decoder_gs"),
    "slat_decoder_rf": ("SLatRadianceFieldDecoder", "slat_decoder_rf"),
}
# The encoders lie beside the others, unnamed by the pipeline. Component -> its class and how its file name starts.
_UNLISTED = {
    "structure_encoder": ("SparseStructureEncoder", "ss_enc_"),
    "slat_encoder": ("SLatEncoder", "slat_enc_"),
}
_SAMPLERS = {"structure": "sparse_structure_sampler", "slat": "slat_sampler"}
_SAMPLER_CLASSES = ("FlowEulerSampler", "FlowEulerCfgSampler", "FlowEulerGuidanceIntervalSampler")


@dataclass(frozen=True)
class Normalization:
    """Per channel of a structured latent: the flow's latent times std plus mean is the decoders' latent."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PublishedBundle(Bundle):
    """A published folder. Beside what Bundle has:

    manifest.sampling: {"structure": ..., "slat": ...}, each the settings of `flow_euler_sample` (steps, guidance,
    guidance_interval, rescale_t, sigma_min). slat_normalization: None without a second stage. image_cond_model: the
    DINOv2 network by its torch.hub name, such as dinov2_vitl14_reg. manifest.components stays empty: what a network
    is stands in its own files; see `components` and `component`.
    """

    def __init__(self, source: LocalFolder | HubFolder) -> None:
        self.source = source
        self._networks = {}
        path = source.fetch(PIPELINE)
        self.folder = path.parent
        data = _read_json(path)
        try:
            if data["name"] != PIPELINE_CLASS:
                raise TriptychError(f"{path} is of a {data['name']!r}, only {PIPELINE_CLASS} is known: choose another")
            args = data["args"]
            models = args["models"]
            self._stems = {name: str(models[key]) for name, (_, key) in _LISTED.items() if key in models}
            sampling = {name: _sampler(args[key], path) for name, key in _SAMPLERS.items() if key in args}
            self.slat_normalization = _normalization(args["slat_normalization"]) if "slat_flow" in self._stems else None
            self.image_cond_model = str(args["image_cond_model"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, TriptychError):
                raise
            raise TriptychError(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again") from error
        self._stems |= self._unlisted()
        for stem in self._stems.values():
            parts = PurePosixPath(stem).parts
            if ".." in parts or stem.startswith("/") or "\\" in stem or ":" in stem:
                raise TriptychError(f"{path} names the file {stem!r} outside of its folder: it is refused")
        name = source.repository if isinstance(source, HubFolder) else source.root.resolve().name
        provenance = {"source": source.title} | ({"revision": source.revision} if source.revision else {})
        self.manifest = Manifest(
            name, "as stated by its publisher", {}, up="+Z", front="-Y", sampling=sampling, provenance=provenance
        )
        source.keep(PIPELINE)

    def _unlisted(self) -> dict[str, str]:
        names = [PurePosixPath(name) for name in self.source.names()]
        configs = [str(name.with_suffix("")) for name in names if name.suffix == ".json" and len(name.parts) == 2]
        stems = {}
        for component, (_, start) in _UNLISTED.items():
            found = [stem for stem in configs if PurePosixPath(stem).name.startswith(start)]
            if len(found) == 1:  # of several none is the one that belongs to the decoder for sure
                stems[component] = found[0]
        return stems

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self._stems)

    def component(self, component: str) -> Component:
        """Class, config, file, hash and tensors of one network; fetches its files."""
        self._require(component)
        path, class_name, config, tensors = self._checked(component)
        facts = self.source.keep(f"{self._stems[component]}.safetensors")
        kinds = sorted({dtype for dtype, _ in tensors.values()})
        return Component(
            class_name=class_name, config=config, file=f"{self._stems[component]}.safetensors",
            sha256=facts.sha256 or "", bytes=path.stat().st_size, dtype="+".join(kinds), tensors=tensors,
        )  # fmt: skip

    def fetch(self, components: Sequence[str], progress: Progress | None = None, cancel: Cancel | None = None) -> None:
        """Has the files of these networks here, from the Hub where they are not; see `HubFolder.fetch_all`."""
        for component in components:
            self._require(component)
        if isinstance(self.source, HubFolder):
            stems = [self._stems[component] for component in components]
            self.source.fetch_all([stem + suffix for stem in stems for suffix in _SUFFIXES], progress, cancel)

    def verify(self) -> None:
        """Checks every file that is here; fetches none."""
        for component, stem in self._stems.items():
            if all(self.source.is_here(stem + suffix) for suffix in _SUFFIXES):
                self._checked(component)

    def _load(self, component: str, dtype: torch.dtype) -> nn.Module:
        path, class_name, config, _ = self._checked(component)
        network = weightless(class_name, config)
        cast(Any, network).convert_to(dtype)
        wanted = network.state_dict()
        with safe_open(str(path), framework="pt") as handle:  # one tensor at a time: never two copies of a large file
            state = {name: handle.get_tensor(name).to(value.dtype) for name, value in wanted.items()}
        network.load_state_dict(state, strict=True, assign=True)
        left = [name for name, value in chain(network.named_parameters(), network.named_buffers()) if value.is_meta]
        assert not left, f"{class_name} has tensors that no checkpoint holds: {left}"
        return network.eval().requires_grad_(False)

    def _checked(self, component: str) -> tuple[Path, str, dict[str, Any], dict[str, list]]:
        """The weights' path, class, config and tensors (dtype and shape), all of which agree."""
        stem = self._stems[component]
        config_path = self.source.fetch(f"{stem}.json")
        class_name, config = _network_config(config_path)
        wanted = weightless(class_name, config).state_dict()
        needs = (_LISTED | _UNLISTED)[component][0]
        if class_name != needs:
            raise TriptychError(f"{config_path} is of a {class_name}, {component} has to be a {needs}: it is refused")
        path = self.source.fetch(f"{stem}.safetensors")
        tensors = _tensors(path)
        _same_names(path, set(tensors), set(wanted), f"{class_name} with this config")
        for name, (dtype, shape) in tensors.items():
            needed = list(wanted[name].shape)
            if shape != needed:
                raise TriptychError(f"{path}: tensor {name} is {shape}, {class_name} needs {needed}")
            if dtype not in _FLOATS:
                raise TriptychError(f"{path}: tensor {name} is {dtype}, {class_name} needs one of {', '.join(_FLOATS)}")
        self.source.keep(f"{stem}.json")
        self.source.keep(f"{stem}.safetensors")
        return path, class_name, config, tensors


class _Weightless(TorchFunctionMode):
    """Layers get their weights on the meta device, and no random values are drawn; computed tables stay real."""

    _DRAWS = frozenset({
        "normal_", "trunc_normal_", "uniform_",
        "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    })  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            return func(*args, **kwargs | {"device": "meta"})
        if getattr(func, "__name__", "") in self._DRAWS:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:  # torch would import its symbolic mathematics, seconds long, only to draw nothing
                return target
        return func(*args, **kwargs)


def weightless(class_name: str, config: dict[str, Any]) -> nn.Module:
    """The network without memory for its weights: what a checkpoint replaces is neither allocated nor drawn."""
    with _Weightless():
        return build_component(class_name, config)


def _network_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Class and constructor arguments. The "elastic" classes of training are the plain ones here."""
    match _read_json(path):
        case {"name": str(name), "args": dict(args)}:
            return name.removeprefix("Elastic"), args
    raise TriptychError(f"{path} is damaged (it has no name and args): fetch it again")


def _tensors(path: Path) -> dict[str, list]:
    """Tensor -> [dtype, shape], from the header. A file that is cut short has none."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (safe_open is no dict)
            return {n: [_DTYPES.get(p.get_dtype(), p.get_dtype()), list(p.get_shape())] for n, p in parts.items()}
    except SafetensorError as error:
        raise TriptychError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise TriptychError(f"{path} has {path.stat().st_size:,} bytes, too many for its kind: fetch it again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TriptychError(f"{path} is damaged ({error}): fetch it again") from error
    if not isinstance(data, dict):
        raise TriptychError(f"{path} is damaged (it holds no object): fetch it again")
    return data


def _sampler(entry: dict[str, Any], path: Path) -> dict[str, Any]:
    """A sampler's entry of pipeline.json as arguments of `flow_euler_sample`."""
    if entry["name"] not in _SAMPLER_CLASSES:
        raise TriptychError(f"{path} names the sampler {entry['name']!r}, known are {', '.join(_SAMPLER_CLASSES)}")
    params = entry["params"]
    low, high = params.get("cfg_interval", (0.0, 1.0))
    return {
        "steps": int(params["steps"]),
        "guidance": float(params.get("cfg_strength", 0.0)),
        "guidance_interval": (float(low), float(high)),
        "rescale_t": float(params.get("rescale_t", 1.0)),
        "sigma_min": float(entry["args"].get("sigma_min", 1e-5)),
    }


def _normalization(entry: dict[str, Any]) -> Normalization:
    mean, std = (tuple(float(value) for value in entry[key]) for key in ("mean", "std"))
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise ValueError(f"slat_normalization has {len(mean)} means and {len(std)} deviations, each above 0")
    return Normalization(mean, std)
