"""Padding is told by position, never by id, and a batch gives each row what it would get alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.load import load_model, load_processor
from vlmtune.types import Encoded, ImageRef, Kind, Sample, Text, Turn

EOS = 2


def encoded(name: str, ids: list[int], kinds: list[int] | None = None, **extras: list[int]) -> Encoded:
    length = len(ids)
    return Encoded(
        id=name,
        task=f"task-{name}",
        ids=torch.tensor(ids),
        kinds=torch.tensor(kinds or [int(Kind.RESPONSE)] * length, dtype=torch.int8),
        turn=torch.zeros(length, dtype=torch.int16),
        pixels={},
        token_extras={key: torch.tensor(value) for key, value in extras.items()},
        geometry=[],
    )


def test_padding_is_told_by_position_when_pad_is_eos():
    """The reply's own end-of-turn token keeps its attention and its loss."""
    batch = collate([encoded("a", [5, 6, EOS, 7, EOS]), encoded("b", [5, EOS])], pad_token_id=EOS)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, EOS, 7, EOS], [5, EOS, EOS, EOS, EOS]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    response, padding = int(Kind.RESPONSE), int(Kind.PADDING)
    assert batch.kinds.tolist() == [[response] * 5, [response] * 2 + [padding] * 3]
    assert batch.sample_ids == ["a", "b"]
    assert batch.tasks == ["task-a", "task-b"]


def test_left_padding_for_generation():
    rows = [encoded("a", [5, 6, 7], types=[0, 1, 1]), encoded("b", [8], types=[1])]
    batch = collate(rows, pad_token_id=0, side="left")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.inputs["types"].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert batch.kinds[1].tolist() == [Kind.PADDING, Kind.PADDING, Kind.RESPONSE]


def test_extras_are_padded_with_zero_on_the_right():
    batch = collate([encoded("a", [5, 6], types=[1, 1]), encoded("b", [8], types=[1])], pad_token_id=9)
    assert batch.inputs["types"].tolist() == [[1, 1], [1, 0]]


def test_samples_of_one_length_get_no_padding():
    batch = collate([encoded("a", [5, 6]), encoded("b", [8, 9])], pad_token_id=0)
    assert batch.inputs["attention_mask"].all()
    assert (batch.kinds != Kind.PADDING).all()


def picture(width: int, height: int, seed: int = 0) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(buffer.getvalue())


def sample(name: str, images: list[ImageRef], reply: str) -> Sample:
    return Sample(name, (Turn("user", (*images, Text("What is there?"))), Turn("assistant", (Text(reply),))))


ROWS = [
    sample("square", [picture(64, 64)], "red"),
    sample("text only", [], "no picture at all, and a longer reply"),
    sample("wide", [picture(128, 40, 1)], "a blue circle"),
    sample("two", [picture(30, 90, 2), picture(64, 64, 3)], "yes"),
]


@pytest.fixture
def loaded(family: str, tiny_folder: Callable[[str], Path]):
    folder = str(tiny_folder(family))
    model = load_model(folder).eval()
    if family == "gemma3":  # its projection starts at zero: images would not matter
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model, Encoder(load_processor(folder), coordinates(anatomy_of(model).coordinates))


@torch.inference_mode()
def logits_of(model, rows: list[Encoded], pad: int, side: str = "right") -> list[torch.Tensor]:
    """Logits of the real tokens of each row."""
    batch = collate(rows, pad, side)
    logits = model(**batch.inputs, use_cache=False).logits
    return [row[mask.bool()] for row, mask in zip(logits, batch.inputs["attention_mask"], strict=True)]


def test_a_batch_gives_the_logits_of_its_rows_alone(loaded):
    """Unequal images, unequal crops (SmolVLM), several images, no image: 1e-5 is float32 noise of a padded matmul."""
    model, encoder = loaded
    rows = [encoder.encode(row) for row in ROWS]
    assert len({len(row) for row in rows}) > 2  # so that there is padding
    alone = [logits_of(model, [row], encoder.pad_token_id)[0] for row in rows]
    for order in ([0, 1, 2, 3], [1, 0], [3, 1, 2]):
        together = logits_of(model, [rows[i] for i in order], encoder.pad_token_id)
        for i, logits in zip(order, together, strict=True):
            assert logits.shape == alone[i].shape
            assert (logits - alone[i]).abs().max() < 1e-5, ROWS[i].id
    swapped = [encoder.encode(sample("other picture", [picture(64, 64, 9)], "red"))]
    assert (logits_of(model, swapped, encoder.pad_token_id)[0] - alone[0]).abs().max() > 1e-5  # pixels do matter


@pytest.mark.parametrize("family", ["smolvlm"])
def test_smolvlm_rows_are_filled_up_with_empty_crops(loaded):
    _, encoder = loaded
    rows = [encoder.encode(row) for row in ROWS]
    crops = [row.pixels["pixel_values"].shape[1] if row.pixels else 0 for row in rows]
    assert len(set(crops)) >= 3
    assert crops[1] == 0
    batch = collate(rows, encoder.pad_token_id)
    assert batch.inputs["pixel_values"].shape[:2] == (4, max(crops))
    for row, count, pixels in zip(rows, crops, batch.inputs["pixel_values"], strict=True):
        assert not pixels[count:].any()
        assert not batch.inputs["pixel_attention_mask"][rows.index(row), count:].any()
        if count:
            assert torch.equal(pixels[:count], row.pixels["pixel_values"][0])


def test_text_only_batches_have_no_pixels(loaded):
    model, encoder = loaded
    rows = [encoder.encode(ROWS[1]), encoder.encode(sample("x", [], "a"))]
    batch = collate(rows, encoder.pad_token_id)
    assert not [name for name in batch.inputs if "pixel" in name or "grid" in name]
    alone = logits_of(model, rows[:1], encoder.pad_token_id)[0]
    assert (logits_of(model, rows, encoder.pad_token_id)[0] - alone).abs().max() < 1e-5
