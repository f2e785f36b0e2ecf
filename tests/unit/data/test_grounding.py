"""Coordinates: the round trip stays within half a bin, and no text a model can write raises."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlmtune.data.grounding import coordinates
from vlmtune.types import Box, ImageGeometry, VlmtuneError

NAMES = ["norm1000", "pixels", "bins"]
GEOMETRY = ImageGeometry(width=640, height=480, resized_width=1000, resized_height=500)

side = st.integers(1, 5000)


@st.composite
def scenes(draw) -> tuple[ImageGeometry, list[Box]]:
    """A geometry and one to four boxes in it; edges, corners and zero-size boxes come up often."""
    geometry = ImageGeometry(draw(side), draw(side), draw(side), draw(side))
    fraction = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))

    def box() -> Box:
        x1, x2 = sorted((draw(fraction) * geometry.width, draw(fraction) * geometry.width))
        y1, y2 = sorted((draw(fraction) * geometry.height, draw(fraction) * geometry.height))
        return x1, y1, x2, y2

    return geometry, [box() for _ in range(draw(st.integers(1, 4)))]


def half_bin(name: str, geometry: ImageGeometry) -> tuple[float, float]:
    across, down = {
        "norm1000": (1000, 1000),
        "pixels": (geometry.resized_width, geometry.resized_height),
        "bins": (32, 32),
    }[name]
    return geometry.width / across / 2, geometry.height / down / 2


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(scene=scenes())
def test_round_trip_is_within_half_a_bin(name, scene):
    geometry, boxes = scene
    convention = coordinates(name)
    back = convention.parse("It is here: " + convention.render(boxes, geometry) + " done", geometry)
    assert len(back) == len(boxes)
    for before, after in zip(boxes, back, strict=True):
        for value, again, bound in zip(before, after, half_bin(name, geometry) * 2, strict=True):
            assert abs(value - again) <= bound * (1 + 1e-9) + 1e-9  # float rounding only


@pytest.mark.parametrize("name", NAMES)
def test_rendering_what_was_parsed_changes_nothing(name):
    convention = coordinates(name)
    text = convention.render([(0, 0, 640, 480), (13.3, 77.7, 200.1, 300.9)], GEOMETRY)
    assert convention.render(convention.parse(text, GEOMETRY), GEOMETRY) == text


def test_worked_examples():
    box = (64, 48, 320, 480)
    assert coordinates("norm1000").render([box], GEOMETRY) == "<box>[[100,100,500,1000]]</box>"
    assert coordinates("pixels").render([box], GEOMETRY) == "<box>[[100,50,500,500]]</box>"
    assert coordinates("bins").render([box], GEOMETRY) == "<box><loc_03><loc_03><loc_16><loc_31></box>"
    assert coordinates("norm1000").render([box, box], GEOMETRY, region=True) == (
        "<region>[[100,100,500,1000],[100,100,500,1000]]</region>"
    )
    assert coordinates("bins").render([box, box], GEOMETRY).count("<loc_") == 8
    assert coordinates("pixels").parse("a <box>[[100, 50, 500, 500]]</box>", GEOMETRY) == [box]
    assert coordinates("bins").parse("<box><loc_00><loc_00> <loc_31><loc_31></box>", GEOMETRY) == [
        (10.0, 7.5, 630.0, 472.5)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_boxes_render_as_nothing(name):
    assert coordinates(name).render([], GEOMETRY) == ""


def test_only_bins_need_new_tokens():
    assert coordinates("norm1000").tokens() == coordinates("pixels").tokens() == []
    tokens = coordinates("bins").tokens()
    assert tokens[:5] == ["<box>", "</box>", "<region>", "</region>", "<loc_00>"]
    assert tokens[-1] == "<loc_31>"
    assert len(tokens) == len(set(tokens)) == 36


PIECES = ["<box>", "</box>", "<region>", "</region>", "[", "]", "[[", "]]", ",", " ", "-", ".", "<loc_", "<loc_31>"]
PIECES += ["<loc_32>", "<loc_0>", "0", "7", "1000", "9" * 5000, "nan", "inf", "1e9", "٣", "\n", "\x00", "é"]
PIECES += ["[[1,2,3,4]]", "[1,2,3,4]"]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)  # wall time says more about the neighbours on this machine; parsing is linear in the text
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
@example(text="<box>" * 20000)
@example(text="<box>" + "[" * 20000 + "</box>")
@example(text="<box>[[1,2,3,4]" + ",[1,2,3,4]" * 5000 + "</box>")
@example(text="<box>" + " " * 20000 + "</box>")
def test_any_text_parses_to_boxes_inside_the_image(name, text):
    for x1, y1, x2, y2 in coordinates(name).parse(text, GEOMETRY):
        assert 0 <= x1 <= x2 <= GEOMETRY.width
        assert 0 <= y1 <= y2 <= GEOMETRY.height


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "[[1,2,3,4]]",
        "<box></box>",
        "<box>[[1,2,3,4]]",
        "<box>[1,2,3,4]</box>",
        "<box>[[1,2,3]]</box>",
        "<box>[[1,2,3,4,5]]</box>",
        "<box>[[1,2,3,4],[5,6]]</box>",
        "<box>[[1,2,3,4],]</box>",
        "<box>[[30,2,3,40]]</box>",
        "<box>[[3,20,30,4]]</box>",
        "<box>[[1001,2,1003,4]]</box>",
        "<box>[[-9,2,-3,4]]</box>",
        "<box>[[" + "9" * 5000 + ",1,1,1]]</box>",
        "<region>[[1,2,3,4]]</region>",
        "</box>[[1,2,3,4]]<box>",
    ],
)
def test_malformed_is_no_box(text):
    assert coordinates("norm1000").parse(text, GEOMETRY) == []


@pytest.mark.parametrize(
    "inside", ["", "<loc_01>" * 3, "<loc_01>" * 5, "<loc_32>" * 4, "<loc_09><loc_01><loc_03><loc_04>", "[[1,2,3,4]]"]
)
def test_malformed_bins_are_no_box(inside):
    assert coordinates("bins").parse(f"<box>{inside}</box>", GEOMETRY) == []


def test_nested_tags_give_the_innermost_once():
    parse = coordinates("norm1000").parse
    expected = parse("<box>[[100,100,500,500]]</box>", GEOMETRY)
    assert len(expected) == 1
    assert parse("<box><box>[[100,100,500,500]]</box></box>", GEOMETRY) == expected
    assert parse("<box>[[1,2,<box>[[100,100,500,500]]</box>3,4]]</box>", GEOMETRY) == expected
    assert parse("<box>oops</box> <box>[[100,100,500,500]]</box>", GEOMETRY) == expected
    assert parse("<box>[[9,9,1,1],[100,100,500,500]]</box>", GEOMETRY) == expected


def test_a_box_that_sticks_out_is_clipped_both_ways():
    convention = coordinates("norm1000")
    assert convention.render([(-5, 0, 700, 480)], GEOMETRY) == "<box>[[0,0,1000,1000]]</box>"
    assert convention.parse("<box>[[-3,0,1004,1000]]</box>", GEOMETRY) == [(0, 0, 640, 480)]


@pytest.mark.parametrize("box", [(9, 0, 1, 5), (0, 9, 5, 1), (float("nan"), 0, 1, 1), (0, 0, float("inf"), 1)])
def test_an_impossible_box_in_the_data_is_refused(box):
    with pytest.raises(VlmtuneError, match="correct it in the data"):
        coordinates("norm1000").render([box], GEOMETRY)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(VlmtuneError, match="did you mean 'norm1000'"):
        coordinates("norm100")
    with pytest.raises(VlmtuneError, match="norm1000, pixels, bins"):
        coordinates("zzz")
