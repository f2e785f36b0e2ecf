"""The token view shows the image as the model sees it, with every place where the model is told it is."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.window import Fitted
from vlmtune.models.load import load_processor
from vlmtune.types import Boxes, ImageRef, Points, Sample, Text, Turn
from vlmtune.view import token_view

BOX = (40, 20, 60, 40)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_boxes_and_points_are_drawn_where_they_are(family, tiny_folder):
    """llava crops, Qwen only resizes: the white rectangle of the picture fills the box that is drawn."""
    picture = Image.new("RGB", (120, 60))
    ImageDraw.Draw(picture).rectangle((40, 20, 59, 39), fill="white")
    file = io.BytesIO()
    picture.save(file, "PNG")
    turns = (
        Turn("user", (ImageRef(file.getvalue()), Text("Press what is at "), Boxes((BOX,), region=True))),
        Turn("assistant", (Points(((50, 30),), click=True),)),
    )
    encoder = Encoder(load_processor(str(tiny_folder(family))), coordinates("norm1000"))
    sample = Sample("s", turns)
    view = token_view(encoder, Fitted(sample))
    geometry = encoder.encode(sample).geometry[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(view.images[0].split(",")[1]))).convert("L"))
    assert shown.shape == (geometry.resized_height, geometry.resized_width)
    (box, point) = view.boxes[0]
    rows, columns = np.nonzero(shown > 127)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == pytest.approx(box, abs=1)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert point == pytest.approx((x - 2, y - 2, x + 2, y + 2))
