"""Files of a published folder, from a local folder or from the Hugging Face Hub, each checked against its record.

Both kinds answer to the same three calls: `names`, `fetch` and `keep`. The record is a small JSON file that holds the
size and SHA-256 of every file that was once used: `triptych-files.json` in a local folder, `triptych.json` in the Hub's
cache folder of the repository (``models--owner--name``). There it also holds the commit that a revision named when it
was first asked for. From then on only that commit is used, and what was fetched opens without a network.

`huggingface_hub` finds, names and links the files, so other programs share them. Since its 2.x releases it discards a
download that ends early; large files therefore come through `_prefetch`, which leaves what has arrived beside the
final place and asks only for the rest the next time.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from ..errors import TriptychError
from ..geometry.files import write_files
from ..sampling.flow_euler import Cancelled
from .access import how_to_enter, refusal
from .manifest import file_sha256

LOCAL_RECORD, HUB_RECORD = "triptych-files.json", "triptych.json"
_RESUMED_BYTES = 8 << 20  # what is smaller is simply fetched again
_COMMIT = re.compile(r"[0-9a-f]{40}")

Progress = Callable[[str, float], None]
Cancel = Callable[[], bool]
Arrived = Callable[[int], None]


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 in hex of a file, each None while unknown."""

    bytes: int | None = None
    sha256: str | None = None

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file at path, or None. Reads all of it when the hash is known."""
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"has {size:,} bytes instead of {self.bytes:,}"
        if self.sha256 is not None and (found := file_sha256(path)) != self.sha256:
            return f"was changed (sha256 {found[:12]}.. instead of {self.sha256[:12]}..)"
        return None


class _Record:
    """A JSON object beside the files. A damaged one is an error: to forget the hashes silently would defeat them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        self.data: dict[str, Any] = {}
        if path.is_file():
            try:
                self.data = json.loads(path.read_text(encoding="utf-8"))
                self.files("")
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise TriptychError(f"{path} is damaged ({error}): delete it, and its hashes are taken anew") from error

    def files(self, commit: str) -> dict[str, FileFacts]:
        """What is known of the files of one commit ("" for a local folder)."""
        everything = {key: {n: FileFacts(**f) for n, f in files.items()} for key, files in self._commits().items()}
        return everything.get(commit, {})

    def pin(self, revision: str) -> str | None:
        return self.data.get("pins", {}).get(revision)

    def write(self, commit: str, files: dict[str, FileFacts], revision: str | None = None) -> None:
        """Keeps the facts, and the commit that a revision stands for. Warns once where that is not possible."""
        self.data["commits"] = self._commits() | {commit: {name: asdict(facts) for name, facts in files.items()}}
        if revision is not None:
            self.data["pins"] = self.data.get("pins", {}) | {revision: commit}
        try:
            write_files(self.path.parent, {self.path.name: (json.dumps(self.data, indent=1) + "\n").encode()})
        except TriptychError as error:
            if not self._warned:
                warnings.warn(f"later changes of these files will not be noticed: {error}", stacklevel=2)
            self._warned = True

    def _commits(self) -> dict[str, dict[str, dict[str, Any]]]:
        return self.data.get("commits", {})


class LocalFolder:
    """A folder on this machine. Its files are what they were when they were first used, or they are refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.title = str(root)
        self.revision: str | None = None
        self._record = _Record(root / LOCAL_RECORD)
        self._facts = self._record.files("")

    def names(self) -> list[str]:
        """The JSON and safetensors files, as paths relative to the folder with forward slashes."""
        found = [path for pattern in ("*.json", "ckpts/*") for path in self.root.glob(pattern) if path.is_file()]
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.name != LOCAL_RECORD)

    def is_here(self, name: str) -> bool:
        return (self.root / name).is_file()

    def fetch(self, name: str) -> Path:
        """The file, unchanged since it was recorded. Raises TriptychError otherwise."""
        path = self.root / name
        if not path.is_file():
            raise TriptychError(f"{path} is missing: fetch the folder again")
        problem = self._facts.get(name, FileFacts()).problem(path)
        if problem:
            raise TriptychError(
                f"{path} {problem} since it was first used: fetch it again, or delete {self._record.path} if you "
                "changed it yourself"
            )
        return path

    def keep(self, name: str) -> FileFacts:
        """Records the file, if it is not yet, as what it has to be from now on: call it after it proved to be whole."""
        if name not in self._facts:
            path = self.root / name
            self._facts[name] = FileFacts(path.stat().st_size, file_sha256(path))
            self._record.write("", self._facts)
        return self._facts[name]


class HubFolder:
    """A model repository ``owner/name`` on the Hub at one commit.

    revision: branch, tag or commit, by default ``main``. endpoint, cache_dir: as huggingface_hub takes them.
    Raises TriptychError when the repository cannot be found or asked, and is not here yet either.
    """

    def __init__(
        self,
        repository: str,
        revision: str | None = None,
        *,
        endpoint: str | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        try:
            from huggingface_hub.constants import HF_HUB_CACHE
        except ImportError as error:
            raise TriptychError(f"huggingface_hub is missing to fetch {repository}: install it") from error
        self.repository, self._endpoint = repository, endpoint
        self._cache = Path(cache_dir or HF_HUB_CACHE)
        self._folder = self._cache / f"models--{repository.replace('/', '--')}"
        self._record = _Record(self._folder / HUB_RECORD)
        asked = revision or "main"
        known = self._record.pin(asked) or asked
        self._facts = self._record.files(known)
        if not self._facts:
            known, self._facts = self._resolve(asked)
            self._record.write(known, self._facts, asked)
        self.revision = known
        self.title = f"{repository} at {known[:12]}"

    def _resolve(self, revision: str) -> tuple[str, dict[str, FileFacts]]:
        """The commit of a revision, and size and (of LFS files) SHA-256 of each of its files."""
        from huggingface_hub import HfApi, errors

        try:
            info = HfApi(endpoint=self._endpoint).model_info(self.repository, revision=revision, files_metadata=True)
        except (OSError, ValueError, errors.HTTPError) as error:
            if status := refusal(error, self.repository):
                raise TriptychError(
                    f"there is no local bundle {self.repository!r}, and the Hub shows none by that name (it answers "
                    f"{status}): check the name, and if it is gated {how_to_enter(self.repository)}"
                ) from error
            raise TriptychError(
                f"no local bundle {self.repository!r}, and none could be fetched by that name ({_first_line(error)}): "
                "give a local folder, or try again with a network"
            ) from error
        if not info.sha or not _COMMIT.fullmatch(info.sha):
            raise TriptychError(f"the Hub names no commit for {self.repository} at {revision}: name one yourself")
        facts = {f.rfilename: FileFacts(f.size, f.lfs.sha256 if f.lfs else None) for f in info.siblings or []}
        return info.sha, facts

    def names(self) -> list[str]:
        """All files of the commit, here or not."""
        return sorted(self._facts)

    def is_here(self, name: str) -> bool:
        return (self._folder / "snapshots" / str(self.revision) / name).is_file()

    def fetch_all(self, names: Sequence[str], progress: Progress | None = None, cancel: Cancel | None = None) -> None:
        """`fetch` of each. progress("fetch", share of their bytes) and cancel() are called as they arrive; Cancelled is
        raised when cancel returns True, and what has arrived of a large file is kept for the next time."""
        sizes = [self._facts[name].bytes or 0 if name in self._facts else 0 for name in names]
        total, before = max(1, sum(sizes)), 0

        def arrived(count: int) -> None:
            if cancel is not None and cancel():
                raise Cancelled(f"stopped while {self.title} was fetched")
            if progress is not None:
                progress("fetch", min(1.0, (before + count) / total))

        for name, size in zip(names, sizes, strict=True):
            arrived(0)
            self.fetch(name, arrived)
            before += size
        arrived(0)

    def fetch(self, name: str, arrived: Arrived | None = None) -> Path:
        """The file from the cache or the Hub. A damaged or truncated one is fetched again, once.

        arrived(bytes of the file that are here) is called while a large one is fetched; what it raises ends that.
        """
        if name not in self._facts:
            raise TriptychError(f"{self.title} has no file {name}: choose another repository or revision")
        facts, problem = self._facts[name], None
        for _ in range(2):
            path = self._download(name, arrived)
            problem = facts.problem(path)
            if problem is None:
                return path
            warnings.warn(f"{path} {problem}: it is fetched again", stacklevel=2)
            for place in {path.resolve(), path}:
                place.unlink(missing_ok=True)
        raise TriptychError(f"{name} of {self.title} {problem}, also when fetched again: report it to its publisher")

    def keep(self, name: str) -> FileFacts:
        """As LocalFolder.keep; the Hub has already stated the hashes of large files."""
        facts = self._facts[name]
        if facts.sha256 is None:
            path = self._download(name)
            self._facts[name] = facts = FileFacts(path.stat().st_size, file_sha256(path))
            self._record.write(str(self.revision), self._facts)
        return facts

    def _download(self, name: str, arrived: Arrived | None = None) -> Path:
        from huggingface_hub import errors, hf_hub_download

        size = self._facts[name].bytes
        try:
            if not self.is_here(name) and size is not None and size >= _RESUMED_BYTES:
                self._prefetch(name, arrived)
            return Path(
                hf_hub_download(
                    self.repository, name, revision=self.revision, cache_dir=self._cache, endpoint=self._endpoint
                )
            )
        except (OSError, ValueError, errors.HTTPError) as error:
            if status := refusal(error, self.repository):
                raise TriptychError(
                    f"{name} of {self.title} could not be fetched (the Hub answers {status}): it is gated, so "
                    f"{how_to_enter(self.repository)}"
                ) from error
            raise TriptychError(
                f"{name} of {self.title} could not be fetched ({_first_line(error)}): try again, it goes on where it "
                "stopped"
            ) from error

    def _prefetch(self, name: str, arrived: Arrived | None) -> None:
        """Puts the blob where hf_hub_download looks for it, from as far as an earlier attempt came."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        url = hf_hub_url(self.repository, name, revision=self.revision, endpoint=self._endpoint)
        remote = get_hf_file_metadata(url)
        size = remote.size or self._facts[name].bytes
        if not remote.etag or Path(remote.etag).name != remote.etag:
            return
        blob = self._folder / "blobs" / remote.etag
        part = blob.with_name(f"{blob.name}.triptych-part")
        part.parent.mkdir(parents=True, exist_ok=True)
        headers = build_hf_headers()
        if urlparse(remote.location).netloc != urlparse(url).netloc:  # a signed address elsewhere: no token for it
            headers.pop("authorization", None)
        with WeakFileLock(self._folder / "blobs" / f"{part.name}.lock"):
            if blob.exists():  # another process was faster
                return
            with part.open("ab") as stream:
                done = stream.tell()
                if size is not None and done > size:
                    stream.truncate(done := 0)
                watched: Any = stream if arrived is None else _Watched(stream, arrived)
                http_get(remote.location, watched, resume_size=done, headers=headers, expected_size=size)
            part.replace(blob)


class _Watched:
    """A file that says after each write how long it is; what the listener raises ends the download."""

    def __init__(self, stream: BinaryIO, arrived: Arrived) -> None:
        self._stream, self._arrived = stream, arrived

    def write(self, data: bytes) -> int:
        written = self._stream.write(data)
        self._arrived(self._stream.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
