"""A sample without loss and with a small picture, for micro-batches in which the vision tower would not run: of a model
that several processes hold together, every process runs every part at the same time."""

from __future__ import annotations

import io

from PIL import Image

from vlmtune.data.encode import Encoder
from vlmtune.types import Encoded, ImageRef, Sample, Text, Turn

SIZE = (56, 56)  # pixels; processors enlarge it where they must


def encode_filler(encoder: Encoder, task: str) -> Encoded:
    """A question without a reply. task: one of the run's, so that it is counted where others are."""
    picture = io.BytesIO()
    Image.new("RGB", SIZE).save(picture, "PNG")
    turn = Turn("user", (ImageRef(picture.getvalue()), Text("-")))
    return encoder.without_limit().encode_prompt(Sample("filler", (turn,), task, "filler"))
