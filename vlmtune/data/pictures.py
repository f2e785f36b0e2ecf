"""The images of a sample through the model's own image processor: tensors, placeholder text, and where each one lies.

The same without decoding, from the sizes in file headers, for counting tokens before training (SPEC A6, G1). Only where
a rule of complexity is set on the image processor (`complexity`) does counting decode, because pixels decide then.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from vlmtune.data.complexity import complexity
from vlmtune.data.complexity_rule import MERGED, rule_of
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
REMEMBERED = 65_536  # images whose complexity is remembered
MERGE = 2  # squares of MERGE x MERGE tokens are averaged
NOT_PIXELS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


@dataclass(frozen=True)
class ProcessedImages:
    """pixels: the processor's tensors; expansions: the text each placeholder becomes; geometry: one per image; images:
    one per image, in place of pixels, where features are kept; merges: of each image the side of the squares of tokens
    that are averaged into one (1: none are), empty without a rule that does so."""

    pixels: dict[str, Tensor]
    expansions: list[str]
    geometry: list[ImageGeometry]
    images: list[ImageInput] = field(default_factory=list)
    merges: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    """What the rule of complexity made of one image. share: of its own pixels; tokens: image tokens it gets; without:
    those it would have had."""

    complexity: float
    share: float
    tokens: int
    without: int


def budget_sentence(measure: str, budgets: Sequence[Budget]) -> str:
    """What stands in the log of the images of the first samples."""
    fewer = sum(budget.tokens < budget.without for budget in budgets)
    tokens, without = sum(budget.tokens for budget in budgets), sum(budget.without for budget in budgets)
    saved = 1 - tokens / without if without else 0.0
    return (
        f"complexity ({measure}): {fewer} of the first {len(budgets)} images get fewer tokens than they would, "
        f"{saved:.0%} fewer in all ({tokens:,} of {without:,})"
    )


@dataclass(frozen=True)
class _Room:
    """How one image reaches the model. limit: of its pixels (None: what the processor is set to); merge: the side of
    the squares of its tokens that are averaged."""

    limit: int | None
    merge: int = 1


class Pictures:
    """Images for one model. max_pixels_per_sample: of all images of a sample together, after their resize. A rule of
    complexity is read off the image processor.

    VlmtuneError: a limit per sample where the processor makes every image the same size, and a rule of complexity that
    cannot have an effect on this model.
    """

    def __init__(self, processor, max_pixels_per_sample: int | None = None):
        self._processor = processor
        self.per_sample = max_pixels_per_sample
        self.rule = rule_of(processor.image_processor)
        self._limited: dict[int, object] = {}
        self._measured: OrderedDict[tuple, ProcessedImages] = OrderedDict()
        self._complexities: OrderedDict[str, float] = OrderedDict()
        self._known = {int(token) for token in processor.image_token_ids if token is not None}
        if max_pixels_per_sample is not None and self.pixel_range is None:
            raise VlmtuneError(
                "data.max_pixels_per_sample has no effect on this model: its processor makes every image the same "
                "size; remove it."
            )
        if self.rule is not None and self.pixel_range is None:
            self._require_squares()

    @property
    def merges(self) -> bool:
        """Whether tokens of simple images are averaged, because all images have the same size."""
        return self.rule is not None and self.pixel_range is None

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
        rooms = self._rooms(
            [image.size for image in padded], max_pixels, where, lambda n: complexity(images[n], self.rule.measure)
        )
        made = self._run_each(padded, rooms)
        geometry = [without_margin(g, size) for g, size in zip(made.geometry, sizes, strict=True)]
        return ProcessedImages(made.pixels, self._texts(made.expansions, rooms), geometry, merges=self._merges(rooms))

    def look_up(
        self, references: Sequence[ImageRef], max_pixels: int | None, where: str, store: FeatureStore
    ) -> ProcessedImages:
        """As `load`, image by image; those whose features are in the store are not decoded."""
        if not references:
            return ProcessedImages({}, [], [])
        _, _, rooms = self._sizes(references, max_pixels, where)
        widest = largest_aspect(self._processor.image_processor)
        images = []
        for reference, room in zip(references, rooms, strict=True):
            key = image_key(reference, room.limit, where)
            features = store.get(key)
            pixels = {}
            if features is None:
                image = padded_to_aspect(load_image(reference.source, where), widest)
                pixels = self._run([image], room.limit).pixels
            images.append(ImageInput(key, pixels, features))
        return replace(self.measure(references, max_pixels, where), images=images)

    def measure(self, references: Sequence[ImageRef], max_pixels: int | None, where: str) -> ProcessedImages:
        """What `load` would give, without tensors: from the headers of the images alone, unless a rule of complexity
        asks for their pixels."""
        sizes, padded, rooms = self._sizes(references, max_pixels, where)
        blank = [self._blank(size, room.limit) for size, room in zip(padded, rooms, strict=True)]
        geometry = [without_margin(b.geometry[0], size) for b, size in zip(blank, sizes, strict=True)]
        texts = self._texts([b.expansions[0] for b in blank], rooms)
        return ProcessedImages({}, texts, geometry, merges=self._merges(rooms))

    def budgets(self, references: Sequence[ImageRef], max_pixels: int | None, where: str) -> list[Budget]:
        """What the rule of complexity makes of each image of a sample; only where there is one."""
        plain = copy.copy(self)
        plain.rule = None
        now, before = (of.measure(references, max_pixels, where).expansions for of in (self, plain))
        values = [self._complexity(reference, where) for reference in references]
        return [
            Budget(value, self.rule.share(value), self._image_tokens(text), self._image_tokens(whole))
            for value, text, whole in zip(values, now, before, strict=True)
        ]

    def _sizes(
        self, references: Sequence[ImageRef], max_pixels: int | None, where: str
    ) -> tuple[list[Size], list[Size], list[_Room]]:
        """Of each image as its header says and with its margin; and how it reaches the model."""
        sizes = [image_size(reference.source, where) for reference in references]
        widest = largest_aspect(self._processor.image_processor)
        padded = [padded_size(size, widest) for size in sizes]
        return sizes, padded, self._rooms(padded, max_pixels, where, lambda n: self._complexity(references[n], where))

    def _complexity(self, reference: ImageRef, where: str) -> float:
        """Of an image that is not decoded yet, remembered by its bytes."""
        key = image_key(reference, self.rule.measure, where)
        if key not in self._complexities:
            self._complexities[key] = complexity(load_image(reference.source, where), self.rule.measure)
            if len(self._complexities) > REMEMBERED:
                self._complexities.popitem(last=False)
        self._complexities.move_to_end(key)
        return self._complexities[key]

    def _rooms(
        self, sizes: Sequence[Size], max_pixels: int | None, where: str, complexity_of: Callable[[int], float]
    ) -> list[_Room]:
        """How each image of a sample reaches the model. complexity_of: the complexity of image n."""
        limit = self._limit(sizes, max_pixels, where)
        if self.rule is None:
            return [_Room(limit)] * len(sizes)
        shares = [self.rule.share(complexity_of(n)) for n in range(len(sizes))]
        if self.pixel_range is None:
            return [_Room(limit, MERGE if share <= MERGED else 1) for share in shares]
        lowest, _ = self.pixel_range
        own = [min(most_pixels(self._processor.image_processor, size), limit or math.inf) for size in sizes]
        return [
            _Room(limit if share == 1 else int(max(min(lowest, pixels), share * pixels)))
            for pixels, share in zip(own, shares, strict=True)
        ]

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

    # ---- merged tokens, of images that all have one size -----------------------------------------------------------

    def _merges(self, rooms: Sequence[_Room]) -> list[int]:
        return [room.merge for room in rooms] if self.merges else []

    def _texts(self, expansions: Sequence[str], rooms: Sequence[_Room]) -> list[str]:
        """The placeholder text of each image, with as many image tokens as are left of it."""
        return [
            text if room.merge == 1 else text.replace(self._run_of_tokens(text), self._merged_run(text), 1)
            for text, room in zip(expansions, rooms, strict=True)
        ]

    def _image_token(self, text: str) -> str:
        """The token that stands for one patch: of those that frame images (InternVL), the one there is most of."""
        tokens = self._processor.tokenizer.convert_ids_to_tokens(sorted(self._known))
        return max(tokens, key=text.count)

    def _image_tokens(self, text: str) -> int:
        return text.count(self._image_token(text))

    def _run_of_tokens(self, text: str) -> str:
        return self._image_token(text) * self._image_tokens(text)

    def _merged_run(self, text: str) -> str:
        return self._image_token(text) * (self._image_tokens(text) // MERGE**2)

    def _require_squares(self) -> None:
        """Raise VlmtuneError where no image would be merged, and where tokens are no grid that can be."""
        least = self.rule.share(0.0)
        if least > MERGED:
            raise VlmtuneError(
                f"data.complexity.least {self.rule.least:g} has no effect on this model: its images all have one size, "
                f"so that simple ones have {MERGED:g} of their tokens or all; set it to {MERGED:g}."
            )
        text = self._blank((64, 64), None).expansions[0]
        count = self._image_tokens(text)
        side = math.isqrt(count)
        if getattr(self._processor.image_processor, "do_pan_and_scan", None):
            raise VlmtuneError(
                "data.complexity: this model's image processor cuts crops out of images (do_pan_and_scan), whose "
                "tokens cannot be merged; set it to false in the model folder, or leave data.complexity out."
            )
        if side * side != count or side % MERGE or self._run_of_tokens(text) not in text:
            raise VlmtuneError(
                f"data.complexity: the {count} image tokens of this model are no grid of an even number of rows and "
                "columns, so that squares of them cannot be merged; leave data.complexity out."
            )

    # ---- the processor ----------------------------------------------------------------------------------------------

    def _run_each(self, images: Sequence[Image.Image], rooms: Sequence[_Room]) -> ProcessedImages:
        """One call of the processor, or one for each image where their limits differ, put together as one would be."""
        limits = [room.limit for room in rooms]
        if len(set(limits)) == 1:
            return self._run(images, limits[0])
        made = [self._run([image], limit) for image, limit in zip(images, limits, strict=True)]
        across = int(made[0].pixels["pixel_values"].dim() == 5)  # the SmolVLM family: [1, tiles, 3, H, W]
        return ProcessedImages(
            {name: torch.cat([one.pixels[name] for one in made], dim=across) for name in made[0].pixels},
            [one.expansions[0] for one in made],
            [one.geometry[0] for one in made],
        )

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
