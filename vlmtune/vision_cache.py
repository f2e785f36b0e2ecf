"""Features of a frozen vision tower, kept on disk between epochs and runs: `data.vision_cache`, `vlmtune cache`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vlmtune import __version__
from vlmtune.build import cache_folder
from vlmtune.config import Config
from vlmtune.data.encode import Encoder
from vlmtune.data.feature_store import FeatureStore, digest_of
from vlmtune.data.loader import Steps, start_worker
from vlmtune.data.sources import SampleSource
from vlmtune.models.features import stage_digest
from vlmtune.models.trunk import CachedVision
from vlmtune.observe.log import CountingBar
from vlmtune.optim.precision import Precision, autocast
from vlmtune.paths import alone_in
from vlmtune.prepare import Prepared, prepare
from vlmtune.sizes import bytes_text, parse_bytes
from vlmtune.types import ImageInput, VlmtuneError

AT_ONCE = 8  # samples that `vlmtune cache` encodes together


def open_store(config: Config, model: nn.Module, encoder: Encoder, precision: Precision) -> FeatureStore:
    """Of everything that the tower's features depend on besides the image. Reads the tower's weights once."""
    image_processor = encoder.processor.image_processor
    owner = digest_of(
        stage_digest(model, "vision"), type(image_processor).__name__, image_processor.to_json_string(), precision,
        next(model.parameters()).dtype, model.device.type,
        torch.__version__, metadata.version("transformers"), __version__,
    )  # fmt: skip
    return FeatureStore(cache_folder() / "features" / owner[:32], parse_bytes(config.data.vision_cache))


@dataclass(frozen=True)
class VisionCache:
    """What a run with `data.vision_cache` trains with. steps: as the run's, with features where there are any."""

    store: FeatureStore
    vision: CachedVision
    steps: Steps

    @classmethod
    def of(cls, config: Config, made: Prepared) -> VisionCache:
        store = open_store(config, made.model, made.encoder, made.settings.precision)
        return cls(store, CachedVision(made.model, store.put), looking_up(made.steps, store))

    def described(self) -> str:
        return (
            f"vision cache: features of {len(self.store):,} images ({bytes_text(self.store.size)} of "
            f"{bytes_text(self.store.limit)}) in {self.store.folder}"
        )

    def close(self) -> str:
        """Write what waits; one line for the end of a run."""
        self.store.flush()
        total = self.vision.kept + self.vision.made
        problem = f"; {self.store.problem}" if self.store.problem else ""
        return f"vision cache: {self.vision.kept:,} of {total:,} images came with their features{problem}"


def looking_up(steps: Steps, store: FeatureStore) -> Steps:
    """The same steps; images come as `ImageInput`, with the features that are in the store."""
    found = copy.copy(steps)
    found.encoder = steps.encoder.looking_up(store)
    return found


# ---- vlmtune cache ---------------------------------------------------------------------------------------------------


class _Images(Dataset):
    """`images[n]`: of a few samples, with the features that are known; a VlmtuneError in place of them."""

    def __init__(self, sources: Sequence[SampleSource], encoder: Encoder):
        self.encoder = encoder
        self.rows = [(source, row) for source in sources for row in range(source.size)]

    def __len__(self) -> int:
        return -(-len(self.rows) // AT_ONCE)

    def __getitem__(self, number: int) -> list[ImageInput] | VlmtuneError:
        try:
            chosen = self.rows[number * AT_ONCE : (number + 1) * AT_ONCE]
            return [image for source, row in chosen for image in self.encoder.encode(source[row]).images]
        except VlmtuneError as error:
            return error


def fill_cache(config: Config, console: Console, device: torch.device) -> None:
    """Run the tower over every image of the training data that has no features yet; what is there stays.

    Raises VlmtuneError for a config without `data.vision_cache`, one whose tower trains, and rows that cannot be used.
    """
    if config.data.vision_cache is None:
        raise VlmtuneError(
            "vlmtune cache: data.vision_cache is not set; add how much disk it may use, for example 20GB."
        )
    made = prepare(config, device, console, check=False)
    sources = [source for source in made.sources if source.size is not None]
    endless = [source.name for source in made.sources if source.size is None]
    if endless:
        console.print(f"left out, because they have no end: {', '.join(endless)}", highlight=False, markup=False)
    cache = VisionCache.of(config, made)
    console.print(cache.described(), highlight=False, markup=False)
    made.model.eval()
    rows = sum(source.size for source in sources)
    with alone_in(cache.store.folder):
        done = _fill(cache, sources, made.settings.precision, config.data.workers, device, console)
    looked_at = cache.vision.made + cache.vision.kept
    if cache.store.problem:
        raise VlmtuneError(
            f"data.vision_cache: {cache.store.problem} ({cache.described()}; {rows - done:,} of {rows:,} rows are "
            "left)."
        )
    if not looked_at:
        raise VlmtuneError(f"vlmtune cache: none of {rows:,} rows has an image; leave data.vision_cache out.")
    console.print(
        f"{cache.vision.made:,} images were new, {cache.vision.kept:,} were there; {cache.described()}",
        highlight=False, markup=False,
    )  # fmt: skip


def _fill(
    cache: VisionCache,
    sources: Sequence[SampleSource],
    precision: Precision,
    workers: int,
    device: torch.device,
    console: Console,
) -> int:
    """Returns how many rows were looked at. What was made is kept, however it ends."""
    images = _Images(sources, cache.steps.encoder)
    done = 0
    try:
        with CountingBar(console, "caching") as bar:
            for found in _loaded(images, workers):
                with autocast(precision, device):
                    cache.vision.complete([image.to(device) for image in found])
                if cache.store.problem:
                    break
                done = min(done + AT_ONCE, len(images.rows))
                bar("images of", done, len(images.rows))
    finally:
        cache.store.flush()
    return done


def _loaded(images: _Images, workers: int) -> Iterator[list[ImageInput]]:
    loader = DataLoader(
        images, batch_size=None, num_workers=workers, worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None, generator=torch.Generator(),
    )  # fmt: skip
    for found in loader:
        if isinstance(found, VlmtuneError):
            raise found
        yield found
