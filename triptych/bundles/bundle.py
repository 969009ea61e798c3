"""Finding and opening a bundle: a path, ComfyUI's models/triptych, the embedded one, or a Hugging Face repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import TriptychError
from .manifest import MANIFEST, Manifest, load_network, read_manifest, verify_file

EMBEDDED = "triptych-tiny"
_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


class Bundle:
    """An opened bundle. Networks are verified and loaded on first use, and kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._networks: dict[str, nn.Module] = {}

    @property
    def name(self) -> str:
        return self.manifest.name

    def has(self, component: str) -> bool:
        return component in self.manifest.components

    def network(self, component: str) -> nn.Module:
        """The network of that name. Raises TriptychError when the bundle lacks it or its file fails a check."""
        if not self.has(component):
            have = ", ".join(self.manifest.components)
            raise TriptychError(f"the bundle {self.name} has no {component!r}, only {have}: choose another bundle")
        if component not in self._networks:
            self._networks[component] = load_network(self.folder, self.manifest.components[component])
        return self._networks[component]

    def release(self) -> None:
        """Forgets the loaded networks."""
        self._networks.clear()

    def verify(self) -> None:
        """Checks every file without loading it."""
        for component in self.manifest.components.values():
            verify_file(self.folder, component)


def load_bundle(name: str | Path | None = None, search: Sequence[Path] = ()) -> Bundle:
    """Opens a bundle. name: a folder, a bundle's name, or a Hugging Face id ``owner/name``; None is the embedded one.

    search: folders of bundles to look in before the embedded one (ComfyUI's models/triptych).
    Raises TriptychError with the places that were looked at.
    """
    if name is None:
        return Bundle(_WEIGHTS / EMBEDDED)
    places = [Path(name), *(Path(folder) / name for folder in search), _WEIGHTS / name]
    for place in places:
        if (place / MANIFEST).is_file():
            return Bundle(place)
    if isinstance(name, str) and name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/")):
        return Bundle(_download(name))
    looked = ", ".join(str(place) for place in places)
    raise TriptychError(f"no bundle {str(name)!r} found (looked at {looked}): give a folder with a {MANIFEST}")


def _download(repository: str) -> Path:
    """Fetches a bundle from the Hugging Face Hub; resumes, and reuses what is there. Loading verifies it."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise TriptychError(f"{repository} is no local bundle, and huggingface_hub is missing to fetch it") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=[MANIFEST, "*.safetensors", "*.md"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise TriptychError(
            f"no local bundle {repository!r}, and none could be fetched by that name ({error}): give a local folder"
        ) from error
