"""Pixel limits: bounds hold for every shape of image, where a family has a choice; others say that they have none."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from vlmtune.data.resolution import (
    MAX_ASPECT,
    ROOM,
    even_limit,
    largest_aspect,
    most_pixels,
    padded_to_aspect,
    pixel_range,
    set_pixel_limits,
)
from vlmtune.models.load import load_processor, save_processor
from vlmtune.types import VlmtuneError

sides = st.one_of(st.integers(1, 40), st.integers(1, 3000), st.sampled_from([1, 1000, 20_000]))


def loaded(folder):
    return load_processor(str(folder)).image_processor


def qwen_size(processor, width, height):
    """(size after the resize, size before it with the padding)."""
    image = padded_to_aspect(Image.new("RGB", (width, height)), largest_aspect(processor))
    _, down, across = processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    return (across * processor.patch_size, down * processor.patch_size), image.size


@settings(max_examples=15, deadline=None)
@given(width=sides, height=sides, low=st.integers(1, 30), factor=st.integers(1, 20))
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_sides_are_multiples_within_the_limits(family, tiny_folder, width, height, low, factor):
    processor = loaded(tiny_folder(family))
    unit = processor.patch_size * processor.merge_size
    least, most = low * unit**2, low * factor * unit**2
    set_pixel_limits(processor, least, most)
    (across, down), (wide, high) = qwen_size(processor, width, height)
    assert across % unit == 0 and down % unit == 0 and min(across, down) >= unit
    if factor >= ROOM:
        assert least <= across * down <= most
    else:  # rounding down at the ceiling loses at most half of each side, rounding up at the floor less than a unit
        assert min(least, most / 4) <= across * down <= max(most, least + 2 * math.sqrt(least * most) + unit**2)
    # some scale takes both sides to within one unit of what they became: the aspect is kept within one unit
    assert max((across - unit) / wide, (down - unit) / high) <= min((across + unit) / wide, (down + unit) / high)
    if max(width, height) <= min(MAX_ASPECT, most / unit**2) * min(width, height):
        assert (wide, high) == (width, height)


@pytest.mark.parametrize("size", [(1, 1000), (20_000, 20), (1, 1), (3000, 1)])
def test_extreme_shapes_pass_every_family(family, size, tiny_folder):
    processor = loaded(tiny_folder(family))
    image = padded_to_aspect(Image.new("RGB", size), largest_aspect(processor))
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.numel() < 3 * 2**24


def test_padding_is_white_on_the_far_side_and_only_as_much_as_needed():
    padded = padded_to_aspect(Image.new("RGB", (1000, 2), (9, 9, 9)), 100)
    assert padded.size == (1000, 10)
    assert padded.getpixel((999, 1)) == (9, 9, 9) and padded.getpixel((0, 2)) == (255, 255, 255)


def test_internvl_limits_are_counts_of_tiles(tiny_folder):
    processor = loaded(tiny_folder("internvl"))
    set_pixel_limits(processor, 2 * 56 * 56, 6 * 56 * 56 + 1)
    assert (processor.min_patches, processor.max_patches, processor.crop_to_patches) == (2, 6, True)
    tiles = len(processor(images=[Image.new("RGB", (600, 400))], return_tensors="pt")["pixel_values"])
    assert tiles == 6 + 1  # and the thumbnail
    set_pixel_limits(processor, None, 56 * 56)
    assert len(processor(images=[Image.new("RGB", (600, 400))], return_tensors="pt")["pixel_values"]) == 1


@pytest.mark.parametrize(("most", "tiles"), [(64 * 64, 1), (4 * 64 * 64, 4 + 1), (9 * 64 * 64 + 1, 9 + 1)])
def test_smolvlm_longer_side_is_a_multiple_of_the_tile(most, tiles, tiny_folder):
    processor = loaded(tiny_folder("smolvlm"))
    set_pixel_limits(processor, None, most)
    assert processor(images=[[Image.new("RGB", (500, 500))]], return_tensors="pt")["pixel_values"].shape[1] == tiles


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "smolvlm"])
def test_limits_are_saved_with_the_processor(family, tiny_folder, tmp_path):
    processor = load_processor(str(tiny_folder(family)))
    set_pixel_limits(processor.image_processor, None, 9 * 64 * 64)
    save_processor(processor, str(tiny_folder(family)), tmp_path)
    image = Image.new("RGB", (900, 700))
    here, there = (
        p.image_processor([image], return_tensors="pt") for p in (processor, AutoProcessor.from_pretrained(tmp_path))
    )
    assert here["pixel_values"].shape == there["pixel_values"].shape
    plain = load_processor(str(tiny_folder(family))).image_processor([image], return_tensors="pt")
    assert plain["pixel_values"].shape != here["pixel_values"].shape


@pytest.mark.parametrize(
    ("family", "limits", "complaint"),
    [
        ("llava", (None, 1000), "makes every image 56x56; remove"),
        ("gemma3", (1000, None), "makes every image 56x56; remove"),
        ("smolvlm", (1000, None), "min_pixels has no effect"),
        ("smolvlm", (None, 1000), "64x64 pixels, one tile"),
        ("internvl", (None, 1000), "56x56 pixels, one tile"),
        ("internvl", (10**6, None), "raise data.max_pixels"),
        ("qwen2_5_vl", (2000, 1000), "min_pixels 2000 is above data.max_pixels 1000"),
        ("qwen2_5_vl", (None, 100), "28x28 pixels, the cell"),
        ("qwen2_5_vl", (100, None), "28x28 pixels, the cell"),
        ("qwen2_5_vl", (10**6, None), "set both"),
    ],
)
def test_limits_a_family_cannot_keep_are_refused(family, limits, complaint, tiny_folder):
    with pytest.raises(VlmtuneError, match=complaint):
        set_pixel_limits(loaded(tiny_folder(family)), *limits)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=6), st.integers(6, 10**7))
def test_the_largest_images_give_way_first(pixels, total):
    limit = even_limit(pixels, total)
    if limit is None:
        assert sum(pixels) <= total
        return
    assert any(own > limit for own in pixels)
    assert sum(min(limit, own) for own in pixels) <= total < sum(min(limit + 1, own) for own in pixels)


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (1000, 10), (2, 3)])
def test_the_bound_of_pixels_holds(family, size, tiny_folder):
    processor = loaded(tiny_folder(family))
    if pixel_range(processor) is None:
        assert family in ("llava", "gemma3")
        return
    lowest, highest = pixel_range(processor)
    made = processor(images=[Image.new("RGB", size)], return_tensors="pt")
    bound = most_pixels(processor, size)
    assert lowest <= bound <= highest
    if "image_grid_thw" in made:
        _, down, across = made["image_grid_thw"][0].tolist()
        unit = processor.patch_size * processor.merge_size
        assert (down * processor.patch_size - unit) * (across * processor.patch_size - unit) <= bound
    else:  # tiles, and the whole image once more
        tiles = made["pixel_values"].flatten(0, -4)
        assert (len(tiles) - 1) * tiles[0, 0].numel() <= bound
