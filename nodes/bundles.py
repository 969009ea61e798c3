"""Weight bundles in the graph; ComfyUI moves their networks between memories."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .paths import checked_name, fingerprint
from .running import Reporter, run
from .schema import BundleSocket, checked_repository, repository_id, repository_input, schema

if TYPE_CHECKING:
    from ..triptych.bundles.bundle import Bundle

FOLDER = "triptych"  # the key in folder_paths, and the folder's name under models
MANIFESTS = ("bundle.json", "pipeline.json")
EMBEDDED = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """bundle: opened, its files checked. patcher: ComfyUI's ModelPatcher over all of its networks, which are loaded;
    None of a published bundle, whose pipeline loads one network at a time and drops it after its stage: to ComfyUI
    there is nothing to move, only room to make. largest: bytes of the largest of these networks."""

    bundle: Bundle
    patcher: Any = None
    largest: float = 0.0

    def load(self, memory_required: float) -> Any:
        """Has ComfyUI bring the networks to its device, or make room for the largest stage, after freeing memory
        (bytes) for the work; the device."""
        from comfy import model_management

        if self.patcher is None:
            device = model_management.get_torch_device()
            model_management.free_memory(memory_required + self.largest, device)
            return device
        model_management.load_models_gpu([self.patcher], memory_required=memory_required)
        return self.patcher.load_device


class LoadBundle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = bundle_names()
        return schema(
            "LoadBundle",
            display_name="Load Triptych bundle",
            description="Loads a bundle of networks: the one that comes with the pack, or one in models/triptych, or "
            "one from Hugging Face.",
            search_aliases=["load model", "checkpoint", "weights", "image to 3d", "triptych-tiny"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=names,
                    default=names[0],
                    tooltip="A bundle that comes with the pack, or a folder in models/triptych with a bundle.json, or "
                    "with the pipeline.json of published TRELLIS checkpoints. "
                    "triptych-tiny needs no download and runs on a processor.",
                ),
                repository_input(),
            ],
            outputs=[BundleSocket.Output("bundle", tooltip="For Reconstruct.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, repository: str | None = None) -> Any:
        wanted = (repository or "").strip()
        return wanted or (float("nan") if name is None else state(folder_of(name)))

    @classmethod
    def validate_inputs(cls, repository: str | None = None) -> bool | str:
        return checked_repository(repository)

    @classmethod
    def execute(cls, name: str, repository: str = "") -> io.NodeOutput:
        wanted = repository_id(repository)  # a linked value is not validated before
        return io.NodeOutput(opened(wanted or folder_of(name)))


def opened(source: str | Path) -> LoadedBundle:
    """A bundle with its networks here, verified, and, unless its stages load them one by one, loaded and known to
    ComfyUI's memory management."""
    import torch
    from comfy import model_management
    from comfy.model_patcher import ModelPatcher

    from ..triptych.bundles.published import PublishedBundle
    from ..triptych.pipelines.published import COMPONENTS

    bundle = run(lambda reporter: _checked(source, reporter))
    if isinstance(bundle, PublishedBundle):
        return LoadedBundle(bundle, largest=max(bundle.component(part).bytes for part in COMPONENTS))
    networks = torch.nn.ModuleDict({part: bundle.network(part) for part in bundle.manifest.components})
    device, offload = model_management.get_torch_device(), model_management.unet_offload_device()
    return LoadedBundle(bundle, ModelPatcher(networks, load_device=device, offload_device=offload))


def _checked(source: str | Path, reporter: Reporter) -> Bundle:
    """The bundle; what Reconstruct needs of a repository is fetched now, with a progress bar, and not in its midst."""
    from ..triptych.bundles.bundle import load_bundle
    from ..triptych.bundles.published import PublishedBundle
    from ..triptych.pipelines.published import COMPONENTS

    bundle = load_bundle(source, progress=reporter.progress, cancel=reporter.cancel)
    if isinstance(bundle, PublishedBundle):
        bundle.fetch(COMPONENTS, reporter.progress, reporter.cancel)
    else:
        for part in bundle.components:
            bundle.network(part)
    return bundle


def register_folder() -> None:
    """Makes models/triptych (and what extra_model_paths.yaml names so) known to ComfyUI."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def bundle_names() -> list[str]:
    """The embedded bundles, then those in the models folders."""
    found: dict[str, None] = {}
    for folder in (EMBEDDED, *_model_folders()):
        if folder.is_dir():
            found |= {entry.name: None for entry in sorted(folder.iterdir()) if _is_bundle(entry)}
    return list(found) or ["triptych-tiny"]


def folder_of(name: str) -> Path:
    """The folder of a bundle that ``bundle_names`` lists; models folders come first, as a user may replace ours."""
    places = [folder / checked_name(name) for folder in (*_model_folders(), EMBEDDED)]
    for place in places:
        if _is_bundle(place):
            return place
    looked = ", ".join(str(place.parent) for place in places)
    raise TriptychError(f"no bundle {name!r} found (looked in {looked}): put its folder there, or choose another")


def state(folder: Path) -> tuple[Any, ...]:
    """Changes when a file of the bundle does, also in a folder below, as ckpts."""
    from ..triptych.bundles.hub import LOCAL_RECORD

    # The record of hashes is written when the bundle is first used, and says nothing new about it.
    found = (path for pattern in ("*.json", "*.safetensors") for path in folder.rglob(pattern))
    files = sorted(path for path in found if path.is_file() and path.name != LOCAL_RECORD)
    return tuple((path.relative_to(folder).as_posix(), *fingerprint(path)) for path in files)


def _model_folders() -> list[Path]:
    import folder_paths

    return [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]


def _is_bundle(folder: Path) -> bool:
    return any((folder / manifest).is_file() for manifest in MANIFESTS)
