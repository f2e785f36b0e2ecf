"""What is looked at in a micro-batch, on every family's own tensors (SPEC F5)."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from training_setup import encoder_of

from vlmtune.checks.examine import (
    IDS,
    IMAGES,
    KINDS,
    LABELS,
    LENGTHS,
    OTHER_INPUTS,
    PIXELS,
    examine_inputs,
    pictures_of,
)
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.types import Batch, Finding, ImageRef, Kind, Sample, Text, Turn

IMAGES_OF = {"two": 2, "none": 0, "one": 1, "three": 3}
"""Samples of the micro-batch, and how many images each has."""


def picture(colour: int | None, seed: int) -> bytes:
    """A PNG of 64 x 48: noise, or one grey."""
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = noise if colour is None else np.full_like(noise, colour)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def batch_of(encoder: Encoder, colours: dict[tuple[str, int], int] | None = None) -> Batch:
    """colours: of images (sample, number from 1) that show nothing."""
    samples = []
    for name, count in IMAGES_OF.items():
        images = [
            ImageRef(picture((colours or {}).get((name, number)), len(name) * 10 + number))
            for number in range(1, count + 1)
        ]
        user = Turn("user", (*images, Text("what is there")))
        samples.append(encoder.encode(Sample(name, (user, Turn("assistant", (Text("a red circle"),))))))
    return collate(samples, encoder.pad_token_id)


def look(batch: Batch, encoder: Encoder, **more) -> dict[str, Finding]:
    """what -> finding; the worst where there are several."""
    settings = encoder.processor.image_processor
    wishes = {
        "vocabulary_size": len(encoder.tokenizer), "image_token_ids": encoder.image_token_ids,
        "mean": settings.image_mean, "std": settings.image_std,
    } | more  # fmt: skip
    findings = examine_inputs(batch, **wishes)
    order = ("pass", "warn", "fail")
    return {f.what: f for f in sorted(findings, key=lambda f: order.index(f.level))}


@pytest.fixture(scope="module")
def encoder_for(tiny_folder):
    kept: dict[str, Encoder] = {}

    def of(family: str) -> Encoder:
        if family not in kept:
            kept[family] = encoder_of(tiny_folder(family))
        return kept[family]

    return of


def test_a_sound_batch_passes(encoder_for, family):
    encoder = encoder_for(family)
    findings = look(batch_of(encoder), encoder, longest=2048)
    assert {finding.level for finding in findings.values()} == {"pass"}
    assert findings.keys() == {PIXELS, IMAGES, IDS, LABELS, KINDS, LENGTHS}


def test_every_image_has_its_sample(encoder_for, family):
    batch = batch_of(encoder_for(family))
    found = pictures_of(batch, encoder_for(family).image_token_ids)
    tiles = {name: sum(p.sample == name for p in found) for name in IMAGES_OF}
    per_image = tiles["one"]  # some families cut an image into tiles
    assert per_image >= 1
    assert tiles == {name: count * per_image for name, count in IMAGES_OF.items()}
    assert [p.number for p in found if p.sample == "three"] == list(range(1, 3 * per_image + 1))


def test_the_image_that_is_not_finite_is_named(encoder_for, family):
    encoder = encoder_for(family)
    for place, picture in enumerate(pictures_of(batch_of(encoder), encoder.image_token_ids)):
        batch = batch_of(encoder)
        values = pictures_of(batch, encoder.image_token_ids)[place].values
        values.view(-1)[7] = float("nan")  # a view of the batch's own tensor
        found = look(batch, encoder)[PIXELS]
        assert found.level == "fail"
        assert found.evidence == f"{picture.name}: 1 of {values.numel():,} values NaN"


@pytest.mark.parametrize("shade, said", [(0, "black"), (255, "white"), (128, "of one colour")])
def test_images_that_show_nothing(encoder_for, family, shade, said):
    encoder = encoder_for(family)
    batch = batch_of(encoder, {("three", 1): shade})
    first = next(p for p in pictures_of(batch, encoder.image_token_ids) if p.sample == "three")
    found = look(batch, encoder)[IMAGES]
    assert found.level == "warn" and f"{first.name} is {said}" in found.evidence
    assert "of sample two" not in found.evidence and "of sample one" not in found.evidence


def test_without_a_processor_an_image_of_one_colour_is_told(encoder_for):
    encoder = encoder_for("llava")
    batch = batch_of(encoder, {("one", 1): 0})
    found = look(batch, encoder, mean=None, std=None)[IMAGES]
    assert found.evidence == "image 1 of sample one is of one colour"


def test_pixels_that_were_never_scaled(encoder_for, family):
    encoder = encoder_for(family)
    batch = batch_of(encoder)
    batch.inputs["pixel_values"] *= 255
    found = look(batch, encoder)[PIXELS]
    assert found.level == "fail" and "normalisation" in found.remedy


@pytest.mark.parametrize("value", [-1, 10**6])
def test_ids_without_a_row(encoder_for, value):
    encoder = encoder_for("qwen2_5_vl")
    batch = batch_of(encoder)
    row = 2
    place = int((batch.kinds[row] == Kind.RESPONSE).nonzero()[0])
    batch.inputs["input_ids"][row, place] = value
    found = look(batch, encoder)[IDS]
    assert found.level == "fail" and f"label {value} at token {place} of sample one" in found.evidence
    batch.inputs["input_ids"][0, 0] = value
    found = look(batch, encoder)[IDS]
    assert f"id {value} at token 0 of sample two, and 1 more" in found.evidence


def test_a_sample_without_a_token_to_learn(encoder_for):
    encoder = encoder_for("llava")
    batch = batch_of(encoder)
    batch.kinds[1][batch.kinds[1] == Kind.RESPONSE] = Kind.UNTRAINED
    found = look(batch, encoder)[LABELS]
    assert found.level == "warn" and found.evidence == "none in none"


def padding_elsewhere(batch: Batch) -> None:
    batch.kinds[0, 0] = Kind.PADDING


def loss_on_images(batch: Batch) -> None:
    batch.kinds[batch.kinds == Kind.IMAGE] = Kind.RESPONSE


def no_such_kind(batch: Batch) -> None:
    batch.kinds[3, 2] = 9


@pytest.mark.parametrize("break_it", [padding_elsewhere, loss_on_images, no_such_kind])
def test_kinds_that_contradict_the_ids(encoder_for, break_it):
    encoder = encoder_for("internvl")
    batch = batch_of(encoder)
    break_it(batch)
    assert look(batch, encoder)[KINDS].level == "fail"


def test_samples_longer_than_the_model_has_positions(encoder_for):
    encoder = encoder_for("llava")
    batch = batch_of(encoder)
    lengths = batch.inputs["attention_mask"].sum(dim=1)
    found = look(batch, encoder, longest=int(lengths.max()) - 1)[LENGTHS]
    assert found.level == "warn" and f"three has {int(lengths.max())}" in found.evidence


def test_other_inputs(encoder_for):
    encoder = encoder_for("llava")
    batch = batch_of(encoder)
    inputs = batch.inputs | {"image_sizes": torch.tensor([float("inf")])}
    found = look(dataclasses.replace(batch, inputs=inputs), encoder)[OTHER_INPUTS]
    assert found.level == "fail" and found.evidence == "image_sizes: 1 of 1 values infinite"


def test_text_alone(encoder_for, family):
    encoder = encoder_for(family)
    sample = Sample("t", (Turn("user", (Text("how many"),)), Turn("assistant", (Text("two"),))))
    batch = collate([encoder.encode(sample)], encoder.pad_token_id)
    assert pictures_of(batch, encoder.image_token_ids) == []
    assert {finding.level for finding in look(batch, encoder).values()} == {"pass"}
