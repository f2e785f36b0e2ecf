"""Features of images on disk: what a frozen vision tower made of each, so that it runs once per image and not once per
epoch.

A store belongs to one state of all that features depend on (its `owner`: weights of the tower, settings of the image
processor, number format); the key of an image is a digest of its bytes. Whatever changes gives another name, so nothing
stale can be read. Shards are safetensors files, written whole and then renamed, and read through memory maps; several
processes may read and write one store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmtune.types import ImageRef, VlmtuneError

FIRST_SHARD, LARGEST_SHARD = 8 * 2**20, 256 * 2**20
SHARDS = 256
"""Features wait in memory until they are this share of what is there: small stores are soon read from, and large ones
have no more than a thousand files or so."""


def digest_of(*parts: object) -> str:
    """Hex of everything a store or an image is named after."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def image_key(reference: ImageRef, settings: object, where: str) -> str:
    """Of an image as the model sees it. settings: what its size depends on besides the file.

    Raises VlmtuneError (naming `where`) for a file that cannot be read.
    """
    source = reference.source
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise VlmtuneError(
            f"{where}: image {source} cannot be read ({error.strerror}).", code="image_missing"
        ) from error
    return digest_of(hashlib.sha256(content).hexdigest(), settings)


class FeatureStore:
    """Key of an image -> its features. folder: of this owner alone; limit: bytes on disk, beyond which nothing is kept.

    Other processes' shards are seen when a key is looked for that is not known yet.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.problem = ""  # why nothing more is kept
        self.size = 0  # bytes on disk, as last seen
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._waiting_bytes = 0
        self._places: dict[str, tuple[str, list[str]]] = {}  # key -> file, names of its tensors there
        self._open: dict[str, safe_open] = {}
        self._stamp = 0
        self._look()

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or self._find(key) is not None

    def __len__(self) -> int:
        self._look()
        return len(self._places.keys() | self._waiting.keys())

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The features of an image; None for one that is not there."""
        if key in self._waiting:
            return dict(self._waiting[key])
        place = self._find(key)
        if place is None:
            return None
        shard, names = place
        return {name.split("/", 1)[1]: self._open[shard].get_tensor(name) for name in names}

    def put(self, key: str, features: Mapping[str, Tensor]) -> None:
        """Keep the features of an image; written with others, at the latest by `flush`."""
        if self.problem or key in self:
            return
        kept = {name: value.detach().cpu().contiguous() for name, value in features.items()}
        size = sum(value.nbytes for value in kept.values())
        if self.size + self._waiting_bytes + size > self.limit:
            self.problem = "it is full; raise data.vision_cache"
            return
        self._waiting[key] = kept
        self._waiting_bytes += size
        if self._waiting_bytes >= min(max(FIRST_SHARD, self.size // SHARDS), LARGEST_SHARD):
            self.flush()

    def flush(self) -> None:
        """Write what waits. Where the disk does not take it, `problem` says why, nothing half-written stays, and
        nothing more is kept: features can be made again."""
        if not self._waiting:
            return
        tensors = {f"{key}/{name}": value for key, kept in self._waiting.items() for name, value in kept.items()}
        self._waiting, self._waiting_bytes = {}, 0
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        draft = shard.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft)
            os.replace(draft, shard)
        except (OSError, SafetensorError) as error:
            self.problem = f"{self.folder} cannot be written ({error})"
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        self._look()

    def _find(self, key: str) -> tuple[str, list[str]] | None:
        if key not in self._places:
            self._look()
        return self._places.get(key)

    def _look(self) -> None:
        """Read the names in shards that are new; only a look at the folder's time stamp where nothing changed."""
        try:
            stamp = self.folder.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return
        if stamp == self._stamp:
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._open:
                self._add(path)
        self._stamp = stamp

    def _add(self, path: Path) -> None:
        try:
            shard = self._open[path.name] = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise VlmtuneError(f"data.vision_cache: {path} is damaged ({error}); delete it.") from error
        self.size += path.stat().st_size
        for name in shard.keys():  # noqa: SIM118  it is no dict
            key = name.split("/", 1)[0]
            _, names = self._places.setdefault(key, (path.name, []))
            if self._places[key][0] == path.name:  # two processes may have written one image
                names.append(name)
