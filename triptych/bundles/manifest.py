"""``bundle.json``: what a folder of weights holds, and the checks that stand before any tensor is used.

A bundle is a folder with this manifest and safetensors files. Hash, size, tensor names, shapes and dtypes must agree
with the manifest, and names and shapes with the network that the config builds, or the bundle is refused with the
file's and the tensor's name. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..errors import TriptychError
from ..geometry.files import write_files
from .components import build_component

FORMAT = 1
MANIFEST = "bundle.json"
_LOW = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Component:
    """One network. config: constructor arguments. tensors: name -> [dtype, shape]. bytes, sha256: of ``file``."""

    class_name: str
    config: dict[str, Any]
    file: str
    sha256: str
    bytes: int
    dtype: str
    tensors: dict[str, list]


@dataclass(frozen=True)
class Manifest:
    """name, licence: of the bundle. up, front: axes of the networks' frame. view_rig: what views they expect.
    sampling: default steps, guidance and so on. provenance: how it was trained."""

    name: str
    licence: str
    components: dict[str, Component]
    up: str = "+Y"
    front: str = "+Z"
    view_rig: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


_Record = TypeVar("_Record", Component, Manifest)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream) -> str:
    digest = hashlib.sha256()
    for part in iter(lambda: stream.read(1 << 20), b""):
        digest.update(part)
    return digest.hexdigest()


def write_bundle(
    folder: Path,
    modules: Mapping[str, tuple[nn.Module, dict[str, Any]]],
    *,
    name: str,
    licence: str,
    dtype: str = "bfloat16",
    **facts: Any,
) -> Manifest:
    """Writes ``modules`` (component name -> network, constructor arguments) and the manifest: all of it or nothing.

    dtype: of matrices, kernels and tables; vectors stay float32. facts: further fields of Manifest.
    """
    components, files = {}, {}
    for key, (module, config) in modules.items():
        tensors = {
            k: v.detach().cpu().to(_LOW[dtype] if v.is_floating_point() and v.dim() > 1 else v.dtype).contiguous()
            for k, v in module.state_dict().items()
        }
        file = f"{key}.safetensors"
        files[file] = save(tensors, metadata={"format": "pt"})
        components[key] = Component(
            class_name=type(module).__name__,
            config=config,
            file=file,
            sha256=hashlib.sha256(files[file]).hexdigest(),
            bytes=len(files[file]),
            dtype=dtype,
            tensors={k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in sorted(tensors.items())},
        )
    manifest = Manifest(name=name, licence=licence, components=components, **facts)
    write_files(folder, files | {MANIFEST: (json.dumps(asdict(manifest), indent=1) + "\n").encode()})
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder. Raises TriptychError when it is missing, broken or of a later format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise TriptychError(f"{folder} is not a bundle: it has no {MANIFEST}")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise TriptychError(f"{path} has {path.stat().st_size:,} bytes, too many for a manifest: fetch it again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise TriptychError(f"{path} has format {data['format']}, {FORMAT} is the newest known: update Triptych")
        components = {key: _typed(Component(**value)) for key, value in data.pop("components").items()}
        return _typed(Manifest(components=components, **data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, TriptychError):
            raise
        raise TriptychError(f"{path} is damaged ({error}): fetch the bundle again") from error


def _typed(made: _Record) -> _Record:
    """``made``, each of whose fields is of the type that its annotation names; TypeError otherwise."""
    for field_ in fields(made):
        value, kind = getattr(made, field_.name), {"str": str, "int": int}.get(str(field_.type), dict)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{field_.name} is {str(value)[:80]!r}")
    if isinstance(made, Manifest) and made.format < 1:
        raise TypeError(f"format is {made.format}")
    if isinstance(made, Component):
        for name, entry in made.tensors.items():
            match entry:
                case [str(), [*sizes]] if all(type(size) is int and size >= 0 for size in sizes):
                    continue
            raise TypeError(f"tensor {name} is {str(entry)[:80]!r}")
    return made


def verify_file(folder: Path, component: Component) -> Path:
    """The component's file after its place, size, hash, and tensor names, shapes and dtypes were checked."""
    path = folder / component.file
    if Path(component.file).name != component.file:
        raise TriptychError(f"the bundle names the file {component.file!r} outside of its folder: it is refused")
    if not path.is_file():
        raise TriptychError(f"{path} is missing: fetch the bundle again")
    if path.stat().st_size != component.bytes:
        size = path.stat().st_size
        raise TriptychError(f"{path} has {size:,} bytes instead of {component.bytes:,}: fetch the bundle again")
    found = file_sha256(path)
    if found != component.sha256:
        wanted = component.sha256[:12]
        raise TriptychError(f"{path} was changed (sha256 {found[:12]}.. instead of {wanted}..): fetch the bundle again")
    try:
        with safe_open(str(path), framework="pt") as handle:
            names = set(handle.keys())
            _same_names(path, names, set(component.tensors), "the manifest")
            for name in sorted(names):
                part = handle.get_slice(name)
                have = [_DTYPES.get(part.get_dtype(), part.get_dtype()), list(part.get_shape())]
                if have != component.tensors[name]:
                    raise TriptychError(f"{path}: tensor {name} is {have}, the manifest says {component.tensors[name]}")
    except SafetensorError as error:
        raise TriptychError(f"{path} is not a whole safetensors file ({error}): fetch the bundle again") from error
    return path


_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32", "BOOL": "bool"}


def _same_names(path: Path, have: set[str], want: set[str], whose: str) -> None:
    for problem, names in (("lacks", want - have), ("has the unknown", have - want)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TriptychError(f"{path} {problem} tensor {sorted(names)[0]}{more} compared with {whose}")


def load_network(folder: Path, component: Component) -> nn.Module:
    """The verified network in eval mode, float32, without gradients."""
    path = verify_file(folder, component)
    network = build_component(component.class_name, component.config)
    wanted = network.state_dict()
    _same_names(path, set(component.tensors), set(wanted), f"{component.class_name} with this config")
    for name, (_, shape) in component.tensors.items():
        if list(wanted[name].shape) != shape:
            needed = list(wanted[name].shape)
            raise TriptychError(f"{path}: tensor {name} is {shape}, {component.class_name} needs {needed}")
    network.load_state_dict(load_file(str(path)), strict=True)
    return network.float().eval().requires_grad_(False)
