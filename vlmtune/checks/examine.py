"""What is wrong with a micro-batch itself: images, token ids, labels, kinds (SPEC F5)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmtune.checks.nonfinite import broken_values, is_finite, largest_finite
from vlmtune.types import Batch, Finding, Kind, supervised_mask

PIXELS = "pixels are finite and between black and white"
IMAGES = "images show something"
IDS = "token ids are rows of the embedding"
LABELS = "every sample has tokens with loss"
KINDS = "kinds of tokens fit ids and padding"
LENGTHS = "lengths fit the model"
OTHER_INPUTS = "further inputs are finite"

EXTREME = 12.0  # standard deviations: with no processor are black and white so far from the mean
OVERSHOOT = 1.5  # resizing rings at edges, by less than this
FLAT = 1e-6  # what is left between the pixels of one colour
SHADE = 5e-3  # about one step of 255


@dataclass(frozen=True)
class Picture:
    """One image (or tile, or the patches of one) of a micro-batch. number: its place among those of its sample, from 1;
    grid: int64[3] frames, rows and columns of patches, where that is how the model takes images."""

    sample: str
    number: int
    values: Tensor
    grid: Tensor | None = None

    @property
    def name(self) -> str:
        return f"image {self.number} of sample {self.sample}"


def pictures_of(batch: Batch, image_token_ids: Collection[int]) -> list[Picture]:
    """The images of a micro-batch, each with the sample whose placeholders it fills.

    Placeholders go by size: the number of patches where images are lists of patches, else every tile has as many, or a
    share of them where squares of tokens are merged. Where a row of tiles belongs to a sample (the SmolVLM family),
    tiles that are all zero are padding. The sample is "?" if placeholders and images do not fit together.
    """
    values = batch.inputs.get("pixel_values")
    if values is None:
        return []
    if values.dim() == 5:
        names = batch.sample_ids if len(values) == len(batch.sample_ids) else ["?"] * len(values)
        shown = [[tile for tile in tiles if bool((tile != 0).any())] for tiles in values]
        return [
            Picture(name, number, tile)
            for name, tiles in zip(names, shown, strict=True)
            for number, tile in enumerate(tiles, start=1)
        ]
    grids = batch.inputs.get("image_grid_thw")
    sizes = [1] * len(values) if grids is None else [int(size) for size in grids.prod(dim=1)]
    if batch.merges:
        most = max(batch.merges) ** 2
        sizes = [most // merge**2 for merge in batch.merges]
    parts = list(values) if grids is None else list(values.split(sizes))
    owners = _owners(_places(batch, image_token_ids).sum(dim=1).tolist(), sizes)
    found: list[Picture] = []
    for index, (part, row) in enumerate(zip(parts, owners, strict=True)):
        name = "?" if row is None else batch.sample_ids[row]
        number = 1 + owners[:index].count(row)
        found.append(Picture(name, number, part, None if grids is None else grids[index]))
    return found


def _owners(tokens: list[int], sizes: list[int]) -> list[int | None]:
    """The row of each image. tokens: placeholders of each row; sizes: of images, each has its share of them."""
    rows = [row for row, count in enumerate(tokens) for _ in range(count)]
    total, before = sum(sizes), 0
    owners: list[int | None] = []
    for size in sizes:
        # in units of 1 / total placeholders, so that nothing is rounded
        first, last = before * len(rows), (before + size) * len(rows) - total
        one_row = bool(rows) and first % total == 0 and last % total == 0 and last >= first
        owners.append(rows[first // total] if one_row and rows[first // total] == rows[last // total] else None)
        before += size
    return owners


def _places(batch: Batch, image_token_ids: Collection[int]) -> Tensor:
    """bool[B, T]: image placeholders."""
    ids = batch.inputs["input_ids"]
    return torch.isin(ids, torch.tensor(sorted(image_token_ids), dtype=ids.dtype, device=ids.device))


def examine_inputs(
    batch: Batch,
    vocabulary_size: int,
    image_token_ids: Collection[int] = frozenset(),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    longest: int | None = None,
) -> list[Finding]:
    """A finding for everything that was looked at in one micro-batch; "pass" says that it is ruled out.

    vocabulary_size: rows of the embedding; image_token_ids: placeholders; mean, std: of the image processor, by
    channel, so that black and white can be told (None: only that an image has one colour); longest: tokens that the
    model has positions for (None: not looked at).
    """
    findings = [
        *_pixels(batch, image_token_ids, mean, std),
        _ids(batch, vocabulary_size),
        _labels(batch),
        _kinds(batch, image_token_ids),
    ]
    if longest is not None:
        findings.append(_lengths(batch, longest))
    others = [(name, value) for name, value in batch.inputs.items() if name != "pixel_values"]
    for row, region in batch.regions:
        targets = [("box", region.box), ("mask", region.mask)]
        others += [(f"{what} of sample {batch.sample_ids[row]}", t) for what, t in targets if t is not None]
    for name, value in others:
        if value.is_floating_point() and not is_finite(value):
            evidence = f"{name}: {broken_values(value)}"
            findings.append(Finding("fail", OTHER_INPUTS, evidence, "look at the images and boxes of this sample"))
    return findings


def _pixels(
    batch: Batch, image_token_ids: Collection[int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Iterator[Finding]:
    pictures = pictures_of(batch, image_token_ids)
    broken = [picture for picture in pictures if not is_finite(picture.values)]
    whole = [picture for picture in pictures if is_finite(picture.values)]
    limit = _limit(mean, std)
    far = [picture for picture in whole if largest_finite(picture.values) > limit]
    flat = {picture.name: colour for picture in whole if (colour := _one_colour(picture, mean, std))}
    if broken:
        seen = "; ".join(f"{picture.name}: {broken_values(picture.values)}" for picture in broken)
        remedy = "open that file and mend it, or leave its row out"
        if not whole and len(pictures) > 1:
            remedy = "check rescale and normalisation in the image processor's settings: no picture came through"
        yield Finding("fail", PIXELS, seen, remedy)
    if far:
        worst = max(far, key=lambda picture: largest_finite(picture.values))
        evidence = f"{worst.name} reaches {largest_finite(worst.values):.4g}, black and white end at {limit:.3g}"
        yield Finding("fail", PIXELS, evidence, "check rescale and normalisation in the image processor's settings")
    if flat:
        evidence = ", ".join(f"{name} is {colour}" for name, colour in flat.items())
        yield Finding("warn", IMAGES, evidence, "look at these files")
    if not (broken or far):
        yield Finding("pass", PIXELS, f"{len(pictures)} images or tiles")
    if not flat:
        yield Finding("pass", IMAGES, f"{len(whole)} images or tiles, none of one colour")


def _limit(mean: Sequence[float] | None, std: Sequence[float] | None) -> float:
    """Largest magnitude of a normalised pixel between black and white."""
    if mean is None or std is None or 0 in std:
        return EXTREME
    return OVERSHOOT * max(max(m / s, (1 - m) / s) for m, s in zip(mean, std, strict=True))


def _one_colour(picture: Picture, mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    """ "black", "white", "of one colour", or "" for a picture that shows something."""
    values = picture.values.float().cpu()
    # patches are float[n, channels x frames x P x P]
    channels = values.flatten(1) if picture.grid is None else values.unflatten(1, (3, -1)).transpose(0, 1).flatten(1)
    if bool((channels.amax(dim=1) - channels.amin(dim=1) > FLAT).any()):
        return ""
    if mean is None or std is None:
        return "of one colour"
    shade = channels[:, 0] * torch.tensor(std) + torch.tensor(mean)
    return "black" if bool((shade < SHADE).all()) else "white" if bool((shade > 1 - SHADE).all()) else "of one colour"


def _ids(batch: Batch, vocabulary_size: int) -> Finding:
    ids = batch.inputs["input_ids"]
    wrong = (ids < 0) | (ids >= vocabulary_size)
    if not bool(wrong.any()):
        return Finding("pass", IDS, f"{int(ids.min())} to {int(ids.max())} of {vocabulary_size}")
    row, place = (int(index) for index in wrong.nonzero()[0])
    role = "label" if bool(supervised_mask(batch.kinds)[row, place]) else "id"
    more = f", and {int(wrong.sum()) - 1} more" if int(wrong.sum()) > 1 else ""
    return Finding(
        "fail", IDS,
        f"{role} {int(ids[row, place])} at token {place} of sample {batch.sample_ids[row]}{more}; the embedding has "
        f"{vocabulary_size} rows",
        "use the tokenizer that belongs to this model, or name added tokens in data.new_tokens",
    )  # fmt: skip


def _labels(batch: Batch) -> Finding:
    counts = supervised_mask(batch.kinds[:, 1:]).sum(dim=1).tolist()
    without = [name for name, count in zip(batch.sample_ids, counts, strict=True) if count == 0]
    if without:
        return Finding("warn", LABELS, f"none in {', '.join(without)}", "look at them with `vlmtune inspect`")
    return Finding("pass", LABELS, f"{min(counts)} to {max(counts)} in a sample")


def _kinds(batch: Batch, image_token_ids: Collection[int]) -> Finding:
    kinds = batch.kinds.long()
    complaints = {
        "padding is not where the attention mask says": (kinds == Kind.PADDING)
        != (batch.inputs["attention_mask"] == 0),
        "loss on image placeholders": _places(batch, image_token_ids) & supervised_mask(kinds),
        "a number that is no kind": (kinds < min(Kind)) | (kinds > max(Kind)),
    }
    for name, wrong in complaints.items():
        if bool(wrong.any()):
            row = int(wrong.any(dim=1).nonzero()[0])
            evidence = f"{name}: {int(wrong.sum())} tokens, first in sample {batch.sample_ids[row]}"
            return Finding("fail", KINDS, evidence, "the encoder is at fault: report it with this batch")
    return Finding("pass", KINDS, f"{int((kinds != Kind.PADDING).sum())} tokens")


def _lengths(batch: Batch, longest: int) -> Finding:
    lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
    over = [f"{name} has {n}" for name, n in zip(batch.sample_ids, lengths, strict=True) if n > longest]
    evidence = f"{min(lengths)} to {max(lengths)} tokens, the model has positions for {longest}"
    if over:
        return Finding("warn", LENGTHS, f"{evidence}; {', '.join(over)}", f"set data.max_length to {longest} at most")
    return Finding("pass", LENGTHS, evidence)
