"""Finding and opening a bundle: a path, ComfyUI's models/triptych, the embedded one, or a Hugging Face repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import TriptychError
from .manifest import MANIFEST, Component, Manifest, load_network, read_manifest, verify_file

if TYPE_CHECKING:
    from .hub import Cancel, HubFolder, Progress

EMBEDDED = "triptych-tiny"
_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


class Bundle:
    """An opened bundle. Networks are verified and loaded on first use, and kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._networks: dict[tuple[str, torch.dtype], nn.Module] = {}

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def components(self) -> tuple[str, ...]:
        """The names that `network` takes."""
        return tuple(self.manifest.components)

    def has(self, component: str) -> bool:
        return component in self.components

    def component(self, component: str) -> Component:
        """Class, config, file, hash and tensors of one network."""
        self._require(component)
        return self.manifest.components[component]

    def network(self, component: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network of that name, on the CPU, in eval mode, without gradients.

        dtype: of the matrices and kernels of its torso; the rest is float32, as published.
        Raises TriptychError when the bundle lacks it or its file fails a check.
        """
        self._require(component)
        if (component, dtype) not in self._networks:
            self._networks[component, dtype] = self._load(component, dtype)
        return self._networks[component, dtype]

    def release(self, *components: str) -> None:
        """Forgets these networks, or all that are loaded."""
        for key in list(self._networks):
            if not components or key[0] in components:
                del self._networks[key]

    def verify(self) -> None:
        """Checks every file without loading it."""
        for component in self.manifest.components.values():
            verify_file(self.folder, component)

    def _require(self, component: str) -> None:
        if not self.has(component):
            have = ", ".join(self.components)
            raise TriptychError(f"the bundle {self.name} has no {component!r}, only {have}: choose another bundle")

    def _load(self, component: str, dtype: torch.dtype) -> nn.Module:
        network = load_network(self.folder, self.manifest.components[component])
        if dtype != torch.float32:
            getattr(network, "convert_to", network.to)(dtype)
        return network


def load_bundle(
    name: str | Path | None = None,
    search: Sequence[Path] = (),
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Bundle:
    """Opens a bundle. name: a folder, a bundle's name, or a Hugging Face id ``owner/name``; None is the embedded one.

    A folder or repository of the published TRELLIS layout (``pipeline.json``) becomes a PublishedBundle; of such a
    repository ``owner/name@revision`` picks a branch, tag or commit.
    search: folders of bundles to look in before the embedded one (ComfyUI's models/triptych).
    progress("fetch", share) and cancel() are called while a repository of our own format is fetched; Cancelled is
    raised when cancel returns True. Of a published one PublishedBundle.fetch does so.
    Raises TriptychError with the places that were looked at.
    """
    from .hub import HubFolder, LocalFolder
    from .published import PIPELINE, PublishedBundle

    if name is None:
        return Bundle(_WEIGHTS / EMBEDDED)
    places = [Path(name), *(Path(folder) / name for folder in search), _WEIGHTS / name]
    for place in places:
        if (place / MANIFEST).is_file():
            return Bundle(place)
        if (place / PIPELINE).is_file():
            return PublishedBundle(LocalFolder(place))
    repository, _, revision = str(name).partition("@")  # a revision may have slashes: refs/pr/1
    is_id = isinstance(name, str) and repository.count("/") == 1 and not name.startswith((".", "/"))
    if is_id and not Path(name).exists():
        remote = HubFolder(repository, revision or None)
        return PublishedBundle(remote) if PIPELINE in remote.names() else Bundle(_fetch(remote, progress, cancel))
    looked = ", ".join(str(place) for place in places)
    raise TriptychError(
        f"no bundle {str(name)!r} found (looked at {looked}): give a folder with a {MANIFEST} or a {PIPELINE}"
    )


def _fetch(remote: HubFolder, progress: Progress | None, cancel: Cancel | None) -> Path:
    """The folder of a bundle of our own format, once all its weights are here. Loading verifies them."""
    folder = remote.fetch(MANIFEST).parent
    weights = [name for name in remote.names() if name.endswith(".safetensors") and "/" not in name]
    remote.fetch_all(weights, progress, cancel)
    return folder
