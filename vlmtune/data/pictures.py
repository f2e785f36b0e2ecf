"""The images of a sample through the model's own image processor: tensors, placeholder text, and where each one lies.

The same without decoding, from the sizes in file headers, for counting tokens before training (SPEC A6, G1).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image
from torch import Tensor

from vlmtune.data.feature_store import FeatureStore, image_key
from vlmtune.data.geometry import image_geometry, without_margin
from vlmtune.data.images import image_size, load_image
from vlmtune.data.resolution import (
    even_limit,
    largest_aspect,
    most_pixels,
    padded_size,
    padded_to_aspect,
    pixel_range,
    set_pixel_limits,
)
from vlmtune.types import ImageGeometry, ImageInput, ImageRef, VlmtuneError

Size = tuple[int, int]
MEASURED = 2048  # sizes of images whose placeholder text is remembered
NOT_PIXELS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


@dataclass(frozen=True)
class ProcessedImages:
    """pixels: the processor's tensors; expansions: the text each placeholder becomes; geometry: one per image; images:
    one per image, in place of pixels, where features are kept."""

    pixels: dict[str, Tensor]
    expansions: list[str]
    geometry: list[ImageGeometry]
    images: list[ImageInput] = field(default_factory=list)


class Pictures:
    """Images for one model. max_pixels_per_sample: of all images of a sample together, after their resize.

    VlmtuneError: a limit per sample where the processor makes every image the same size.
    """

    def __init__(self, processor, max_pixels_per_sample: int | None = None):
        self._processor = processor
        self.per_sample = max_pixels_per_sample
        self._limited: dict[int, object] = {}
        self._measured: OrderedDict[tuple, ProcessedImages] = OrderedDict()
        if max_pixels_per_sample is not None and self.pixel_range is None:
            raise VlmtuneError(
                "data.max_pixels_per_sample has no effect on this model: its processor makes every image the same "
                "size; remove it."
            )

    @property
    def pixel_range(self) -> tuple[int, int] | None:
        """The fewest and the most pixels one image may get; None: all get the same."""
        return pixel_range(self._processor.image_processor)

    def load(self, references: Sequence[ImageRef], max_pixels: int | None, where: str) -> ProcessedImages:
        """The images of a sample, decoded. max_pixels: of each; where: what a complaint should name."""
        images = [load_image(reference.source, where) for reference in references]
        return self.process(images, max_pixels, where)

    def process(self, images: Sequence[Image.Image], max_pixels: int | None, where: str) -> ProcessedImages:
        """Images that are decoded already."""
        if not images:
            return ProcessedImages({}, [], [])
        sizes = [image.size for image in images]
        widest = largest_aspect(self._processor.image_processor)
        padded = [padded_to_aspect(image, widest) for image in images]
        processed = self._run(padded, self._limit([image.size for image in padded], max_pixels, where))
        geometry = [without_margin(g, size) for g, size in zip(processed.geometry, sizes, strict=True)]
        return ProcessedImages(processed.pixels, processed.expansions, geometry)

    def look_up(
        self, references: Sequence[ImageRef], max_pixels: int | None, where: str, store: FeatureStore
    ) -> ProcessedImages:
        """As `load`, image by image; those whose features are in the store are not decoded."""
        if not references:
            return ProcessedImages({}, [], [])
        _, _, limit = self._sizes(references, max_pixels, where)
        widest = largest_aspect(self._processor.image_processor)
        images = []
        for reference in references:
            key = image_key(reference, limit, where)
            features = store.get(key)
            pixels = {}
            if features is None:
                pixels = self._run([padded_to_aspect(load_image(reference.source, where), widest)], limit).pixels
            images.append(ImageInput(key, pixels, features))
        return replace(self.measure(references, max_pixels, where), images=images)

    def measure(self, references: Sequence[ImageRef], max_pixels: int | None, where: str) -> ProcessedImages:
        """What `load` would give, without tensors, from the headers of the images alone."""
        sizes, padded, limit = self._sizes(references, max_pixels, where)
        blank = [self._blank(size, limit) for size in padded]
        geometry = [without_margin(b.geometry[0], size) for b, size in zip(blank, sizes, strict=True)]
        return ProcessedImages({}, [b.expansions[0] for b in blank], geometry)

    def _sizes(
        self, references: Sequence[ImageRef], max_pixels: int | None, where: str
    ) -> tuple[list[Size], list[Size], int | None]:
        """Of each image as its header says and with its margin; and the limit of pixels of each."""
        sizes = [image_size(reference.source, where) for reference in references]
        widest = largest_aspect(self._processor.image_processor)
        padded = [padded_size(size, widest) for size in sizes]
        return sizes, padded, self._limit(padded, max_pixels, where)

    def _limit(self, sizes: Sequence[Size], max_pixels: int | None, where: str) -> int | None:
        """The limit of each image of a sample: its own, and what the limit of the whole sample leaves to each."""
        if self.per_sample is None or not sizes:
            return max_pixels
        lowest, _ = self.pixel_range
        pixels = [most_pixels(self._processor.image_processor, size) for size in sizes]
        share = even_limit([min(own, max_pixels or own) for own in pixels], self.per_sample)
        if share is None:
            return max_pixels
        if share < lowest:
            raise VlmtuneError(
                f"{where}: {len(sizes)} images of at least {lowest:,} pixels have more than "
                f"data.max_pixels_per_sample {self.per_sample:,} together; raise it, or remove images."
            )
        return share

    def _run(self, images: Sequence[Image.Image], limit: int | None) -> ProcessedImages:
        processor = self._processor if limit is None else self._with_limit(limit)
        out = processor(
            text=[processor.image_token * len(images)],
            images=[list(images)],
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )
        pixels = {name: value for name, value in out.items() if isinstance(value, Tensor) and name not in NOT_PIXELS}
        canvases = _canvases(pixels, len(images), processor.image_processor)
        return ProcessedImages(
            pixels,
            [entry["replacement"] for entry in out["text_replacement_offsets"][0]],
            [
                image_geometry(processor.image_processor, image.size, canvas)
                for image, canvas in zip(images, canvases, strict=True)
            ],
        )

    def _with_limit(self, limit: int):
        if limit not in self._limited:
            if len(self._limited) >= MEASURED:
                self._limited.clear()
            limited = copy.copy(self._processor)
            limited.image_processor = copy.deepcopy(self._processor.image_processor)
            set_pixel_limits(limited.image_processor, None, limit)
            self._limited[limit] = limited
        return self._limited[limit]

    def _blank(self, size: Size, limit: int | None) -> ProcessedImages:
        """What one blank image of this size becomes, remembered: data sets have few sizes."""
        key = (size, limit)
        if key not in self._measured:
            blank = self._run([Image.new("RGB", size)], limit)
            self._measured[key] = ProcessedImages({}, blank.expansions, blank.geometry)
            if len(self._measured) > MEASURED:
                self._measured.popitem(last=False)
        self._measured.move_to_end(key)
        return self._measured[key]


def _canvases(pixels: dict[str, Tensor], count: int, image_processor) -> list[Size]:
    """(width, height) in pixels of each image as the model sees it; of one tile, where the processor cuts tiles."""
    if "image_grid_thw" in pixels:
        patch = image_processor.patch_size
        return [(int(w) * patch, int(h) * patch) for _, h, w in pixels["image_grid_thw"].tolist()]
    if "image_sizes" in pixels and not hasattr(image_processor, "image_grid_pinpoints"):  # Pixtral's; there: originals
        return [(int(w), int(h)) for h, w in pixels["image_sizes"].tolist()]
    height, width = pixels["pixel_values"].shape[-2:]
    return [(int(width), int(height))] * count
