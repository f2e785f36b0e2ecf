"""Images of a sample: counted from headers as they are encoded, limited together, padded where they are too long."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.pictures import Pictures
from vlmtune.data.resolution import set_pixel_limits
from vlmtune.models.load import load_processor
from vlmtune.types import Boxes, ImageRef, Kind, Sample, Text, Turn, VlmtuneError

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 700), st.sampled_from([1, 900]))
RESIZABLE = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")


def picture(width: int, height: int, orientation: int = 1) -> ImageRef:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "JPEG", exif=exif)
    return ImageRef(file.getvalue())


def processor_of(folder):
    return load_processor(str(folder))


@pytest.fixture(scope="module")
def encoders(tiny_folder):
    made: dict[str, Encoder] = {}

    def encoder(family: str) -> Encoder:
        if family not in made:
            made[family] = Encoder(processor_of(tiny_folder(family)), coordinates("norm1000"))
        return made[family]

    return encoder


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES, st.sampled_from([1, 3, 6, 8])), max_size=3),
    words=st.text(st.sampled_from("ab <|im_end|>\n好"), min_size=1, max_size=20),
    system=st.booleans(),
    shrink=st.sampled_from([None, 50_000]),
)
def test_the_count_is_the_length(encoders, family, sizes, words, system, shrink):
    encoder = encoders(family)
    pictures = [picture(*size) for size in sizes]
    places = (Boxes(((0, 0, 1, 1),)),) if sizes and family != "llava" else ()  # llava crops
    turns = (
        *((Turn("system", (Text("be brief"),)),) if system else ()),
        Turn("user", (*pictures, Text("what is it " + words))),
        Turn("assistant", (Text("a"), *places)),
    )
    sample = Sample("s", turns, max_pixels=shrink if family in RESIZABLE else None)
    assert encoder.count(sample) == len(encoder.encode(sample))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_a_sample_share_the_limit_and_the_largest_give_way(family, tiny_folder):
    processor = processor_of(tiny_folder(family))
    least, most = Pictures(processor).pixel_range
    images = [Image.new("RGB", (2000, 2000)), Image.new("RGB", (70, 70)), Image.new("RGB", (2000, 1000))]
    total = most + least
    made = Pictures(processor, total).process(images, None, "t")
    alone = Pictures(processor).process(images, None, "t")
    pixels = [g.resized_width * g.resized_height for g in made.geometry]
    assert sum(pixels) <= total < sum(g.resized_width * g.resized_height for g in alone.geometry)
    assert made.geometry[1] == alone.geometry[1]
    small = [Image.new("RGB", (70, 70))]
    assert Pictures(processor, total).process(small, None, "t").geometry == [alone.geometry[1]]
    with pytest.raises(VlmtuneError, match=r"row 3: 3 images of at least .*max_pixels_per_sample"):
        Pictures(processor, 3 * least - 1).process(images, None, "row 3")


@pytest.mark.parametrize("family", ["smolvlm", "internvl"])
def test_a_limit_per_sample_leaves_fewer_tiles(family, tiny_folder):
    processor = processor_of(tiny_folder(family))
    images = [Image.new("RGB", (900, 600)), Image.new("RGB", (600, 900))]
    most = Pictures(processor).pixel_range[1]

    def tiles(pictures: Pictures) -> int:
        return len(pictures.process(images, None, "t").pixels["pixel_values"].flatten(0, -4))

    assert tiles(Pictures(processor, most)) < tiles(Pictures(processor))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_limit_per_sample_without_effect_is_refused(family, tiny_folder):
    with pytest.raises(VlmtuneError, match="max_pixels_per_sample has no effect on this model"):
        Pictures(processor_of(tiny_folder(family)), 1000)


def test_a_padded_image_keeps_its_boxes(encoders):
    """20,000 x 20 pixels are more than 200 : 1, so white is added below; places are still those of the original."""
    encoder = encoders("qwen2_5_vl")
    file = io.BytesIO()
    Image.fromarray(np.zeros((20, 20_000, 3), np.uint8)).save(file, "PNG")
    part = Boxes(((10_000, 0, 20_000, 20),))
    sample = Sample("s", (Turn("user", (ImageRef(file.getvalue()), Text("find"))), Turn("assistant", (part,))))
    encoded = encoder.encode(sample)
    (geometry,) = encoded.geometry
    assert (geometry.width, geometry.height) == (20_000, 20)
    assert geometry.to_canvas(20_000, 20)[1] < 0.5 < geometry.to_canvas(20_000, 20)[0]
    text = encoder.tokenizer.decode(encoded.ids[encoded.kinds == Kind.BOX])
    (box,) = encoder.coordinates.parse(text, geometry)
    assert box == pytest.approx(part.boxes[0], abs=21)


def test_limits_of_the_processor_and_of_a_sample_work_together(tiny_folder):
    processor = processor_of(tiny_folder("qwen2_5_vl"))
    set_pixel_limits(processor.image_processor, 28 * 28, 28 * 28 * 16)
    image = Image.new("RGB", (500, 500))
    areas = [
        g.resized_width * g.resized_height
        for limit in (None, 28 * 28 * 4, 28 * 28)
        for g in Pictures(processor).process([image], limit, "t").geometry
    ]
    assert areas == [28 * 28 * 16, 28 * 28 * 4, 28 * 28]
