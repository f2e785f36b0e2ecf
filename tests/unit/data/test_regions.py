"""Where read-outs look: tokens of boxes, grids of patches of every family, masks on the canvas and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training_setup import encoder_of, png

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import convention_names, coordinates
from vlmtune.data.regions import canvas_mask, original_mask
from vlmtune.models.load import load_model, load_processor
from vlmtune.types import PER_PATCH, Boxes, ImageGeometry, ImageRef, Sample, Text, Turn, VlmtuneError

BOXES = ((4.0, 6.0, 40.0, 30.0), (0.0, 0.0, 64.0, 48.0), (10.0, 20.0, 11.0, 21.0))


def reader(folder, convention="norm1000") -> Encoder:
    return Encoder(load_processor(str(folder)), coordinates(convention), reads_regions=True)


def as_png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def sample_of(**options) -> Sample:
    """A region in the question, two lists in the reply."""
    user = (ImageRef(png(0)), Text("what is in "), Boxes(BOXES[:1], region=True), Text(" and where"))
    reply = (Text("here "), Boxes(BOXES[:2], **options), Text(" or "), Boxes(BOXES[2:]))
    return Sample("s", (Turn("user", user), Turn("assistant", reply)), origin="test")


def test_reading_regions_changes_no_token(family, tiny_folder):
    plain, reads = encoder_of(tiny_folder(family)).encode(sample_of()), reader(tiny_folder(family)).encode(sample_of())
    assert torch.equal(plain.ids, reads.ids) and torch.equal(plain.kinds, reads.kinds)
    assert torch.equal(plain.turn, reads.turn) and plain.regions == [] and len(reads.regions) == 4


def test_states_are_read_before_the_numbers_of_answers_and_behind_regions(family, tiny_folder):
    encoder = reader(tiny_folder(family))
    encoded = encoder.encode(sample_of())
    asked, *answers = encoded.regions
    decode = encoder.tokenizer.decode
    assert [region.is_answer for region in encoded.regions] == [False, True, True, True]
    assert "</region>" in decode(encoded.ids[: asked.at + 1]) and "</region>" not in decode(encoded.ids[: asked.at])
    geometry = encoded.geometry[0]
    for region, box in zip(answers, BOXES, strict=True):
        written = encoder.coordinates.render([box], geometry).removeprefix("<box>[[").removesuffix("]]</box>")
        text = "".join(decode(encoded.ids[region.at + 1 :]).split())
        before = "".join(decode(encoded.ids[: region.at + 1]).split())
        assert text.lstrip("[").startswith(written) and before.rstrip("[").endswith(("<box>", ",", "]"))
    assert len({region.list_of for region in answers}) == 2 and answers[0].list_of == answers[1].list_of
    for region, box in zip(answers, BOXES, strict=True):
        corners = [*geometry.to_canvas(*box[:2]), *geometry.to_canvas(*box[2:])]
        assert region.box.tolist() == pytest.approx([min(max(value, 0), 1) for value in corners])


def test_patches_are_one_grid_of_the_tokens_that_the_model_puts_pictures_into(family, tiny_folder):
    encoded = reader(tiny_folder(family)).encode(sample_of())
    patches = encoded.regions[0].patches
    image_token = load_model(str(tiny_folder(family))).config.image_token_id
    where = torch.nonzero(encoded.ids == image_token)[:, 0]
    assert torch.equal(patches.flatten(), where[-patches.numel() :])
    assert (patches.numel() < len(where)) == (family == "smolvlm"), "which cuts this image into tiles"
    if "image_grid_thw" in encoded.pixels:
        _, rows, columns = encoded.pixels["image_grid_thw"][0].tolist()
        merge = rows * columns // patches.numel()
        assert (patches.shape[0] ** 2 * merge, patches.shape[1] ** 2 * merge) == (rows**2, columns**2)
    else:
        canvas = encoded.geometry[0]
        assert patches.shape[0] * canvas.resized_width == patches.shape[1] * canvas.resized_height


@pytest.mark.parametrize("name", convention_names())
@given(st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=20)
def test_box_starts_cut_a_list_into_its_boxes(name, count, seed):
    convention, geometry = coordinates(name), ImageGeometry(640, 480, 672, 504)
    numbers = np.random.default_rng(seed).uniform(0, 240, (count, 4))
    boxes = [(x, y, x + w, y + h) for x, y, w, h in numbers.tolist()]
    text = convention.render(boxes, geometry)
    starts = convention.box_starts(text)
    assert len(starts) == count == len(convention.parse(text, geometry))
    alone = convention.render(boxes[-1:], geometry)
    assert text[starts[-1] :] == alone[convention.box_starts(alone)[0] :]


def test_replies_that_do_not_train_are_not_read(tiny_folder):
    turns = sample_of().turns
    untrained = Turn("assistant", turns[1].parts, train=False)
    sample = Sample("s", (turns[0], untrained, Turn("user", (Text("sure"),)), Turn("assistant", (Text("yes"),))))
    assert [region.is_answer for region in reader(tiny_folder("llava")).encode(sample).regions] == [False]


def test_left_padding_moves_tokens_and_patches(tiny_folder):
    encoder = reader(tiny_folder("llava"))
    long, short = encoder.encode(sample_of()), encoder.encode_prompt(sample_of())
    batch = collate([long, short], encoder.pad_token_id, side="left")
    row, region = batch.regions[-1]
    missing = len(long) - len(short)
    assert row == 1 and region.at == short.regions[0].at + missing
    ids = batch.inputs["input_ids"][1]
    assert torch.equal(ids[region.patches], short.ids[short.regions[0].patches])


# masks

GEOMETRIES = [
    ImageGeometry(64, 48, 96, 96),
    ImageGeometry(64, 48, 96, 96, placed=(0.0, 12.0, 96.0, 84.0)),  # padded above and below
    ImageGeometry(64, 48, 96, 96, placed=(-16.0, 0.0, 112.0, 96.0)),  # cropped left and right
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["stretched", "padded", "cropped"])
def test_a_mask_lies_on_the_canvas_where_its_box_lies_and_comes_back(geometry):
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[12:36, 16:48] = 1
    found = canvas_mask(as_png(mask), geometry, (48, 48), "test")
    (x1, y1), (x2, y2) = geometry.to_canvas(16, 12), geometry.to_canvas(48, 36)
    expected = torch.zeros(48, 48)
    expected[round(y1 * 48) : round(y2 * 48), round(x1 * 48) : round(x2 * 48)] = 1
    assert float((found - expected).abs().mean()) < 0.01 and float(found.max()) == 1.0
    back = np.asarray(original_mask(found > 0.5, geometry))
    assert set(np.unique(back)) <= {0, 255}
    assert np.mean((back > 0) != (mask > 0)) < 0.03  # a cell is 1.3 pixels wide


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_every_mode_of_one_channel_means_the_same(mode):
    mask = np.zeros((48, 64), dtype=np.uint16 if mode == "I;16" else np.uint8)
    mask[:24] = 1
    image = Image.fromarray(mask) if mode != "1" else Image.fromarray(mask.astype(bool))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found = canvas_mask(buffer.getvalue(), GEOMETRIES[0], (PER_PATCH, PER_PATCH), "test")
    assert found[:4].min() == 1 and found[4:].max() == 0


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (np.ones((30, 64), dtype=np.uint8), "s.jsonl:3: a mask of 64x30 pixels for an image of 64x48"),
        (np.zeros((48, 64), dtype=np.uint8), "covers nothing"),
        (np.ones((48, 64, 3), dtype=np.uint8), "one channel .* this one is RGB"),
    ],
)
def test_masks_that_cannot_be_are_refused(mask, complaint):
    with pytest.raises(VlmtuneError, match=complaint):
        canvas_mask(as_png(mask), GEOMETRIES[0], (8, 8), "s.jsonl:3")


def wide_reader(folder, **settings) -> Encoder:
    """Of InternVL, which cuts wide images into tiles."""
    processor = load_processor(str(folder))
    for name, value in {"crop_to_patches": True, "min_patches": 1, "max_patches": 4, **settings}.items():
        setattr(processor.image_processor, name, value)
    return Encoder(processor, coordinates("norm1000"), reads_regions=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["smolvlm", "internvl"])
def test_of_tiles_the_overview_is_read(family, tiny_folder):
    """What the model puts into these tokens changes with the last crop it is given, and with no other."""
    folder = tiny_folder(family)
    encoder = wide_reader(folder) if family == "internvl" else reader(folder)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8)).save(buffer, "PNG")
    user = Turn("user", (ImageRef(buffer.getvalue()), Boxes(((1.0, 2.0, 50.0, 40.0),), region=True)))
    encoded = encoder.encode(Sample("s", (user, Turn("assistant", (Text("yes"),)))))
    patches = encoded.regions[0].patches.flatten()
    model = load_model(str(folder))
    image_token = model.config.image_token_id
    where = torch.nonzero(encoded.ids == image_token)[:, 0]
    assert len(where) > len(patches)

    def embedded(pixels: dict) -> torch.Tensor:
        seen = []
        handle = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(input_ids=encoded.ids[None], attention_mask=torch.ones_like(encoded.ids)[None], **pixels)
        handle.remove()
        return seen[0][0]

    before = embedded(encoded.pixels)
    crops = encoded.pixels["pixel_values"]
    axis = 1 if crops.dim() == 5 else 0
    changed = {}
    for place in (0, crops.shape[axis] - 1):
        other = crops.clone()
        other.select(axis, place).add_(0.5)
        moved = (embedded({**encoded.pixels, "pixel_values": other}) - before).abs().amax(1) > 1e-6
        changed[place] = set(torch.nonzero(moved)[:, 0].tolist())
    last = crops.shape[axis] - 1
    assert changed[last] == set(patches.tolist()) and not changed[0] & changed[last]


def test_a_mask_of_an_image_in_tiles_without_an_overview_is_refused(tiny_folder):
    encoder = wide_reader(tiny_folder("internvl"), use_thumbnail=False)
    buffer = io.BytesIO()
    Image.new("RGB", (130, 60)).save(buffer, "PNG")
    mask = as_png(np.ones((60, 130), dtype=np.uint8))
    user = Turn("user", (ImageRef(buffer.getvalue()), Boxes(((1.0, 2.0, 50.0, 40.0),), region=True, masks=(mask,))))
    with pytest.raises(VlmtuneError, match="cut into tiles without an overview"):
        encoder.encode(Sample("s", (user, Turn("assistant", (Text("yes"),)))))
