"""Coordinates: the round trip stays within half a bin, and no text a model can write raises."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlmtune.data import grounding
from vlmtune.data.grounding import convention_names, coordinates
from vlmtune.models import anatomy
from vlmtune.types import Box, ImageGeometry, Point, VlmtuneError

NAMES = ["norm1000", "pixels", "bins", "bins1000", "markup", "paligemma", "kosmos2"]
GEOMETRY = ImageGeometry(width=640, height=480, resized_width=1000, resized_height=500)
# 640 x 480 -> 448 x 336, then the centre 336 x 336: 56 columns of the resized image are lost on either side
CROPPED = ImageGeometry(640, 480, 336, 336, placed=(-56.0, 0.0, 392.0, 336.0))
# 640 x 480 in the middle of a square of 640 x 640, then resized to 320 x 320
PADDED = ImageGeometry(640, 480, 320, 320, placed=(0.0, 40.0, 320.0, 280.0))

side = st.integers(1, 5000)
fraction = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
every_convention = pytest.mark.parametrize("name", NAMES)


@st.composite
def geometries(draw) -> ImageGeometry:
    """Stretched, cropped and padded images."""
    width, height, resized_width, resized_height = (draw(side) for _ in range(4))
    if draw(st.booleans()):
        return ImageGeometry(width, height, resized_width, resized_height)
    left, top = draw(st.floats(-0.4, 0.4)) * resized_width, draw(st.floats(-0.4, 0.4)) * resized_height
    across, down = draw(st.floats(0.5, 2)) * resized_width, draw(st.floats(0.5, 2)) * resized_height
    return ImageGeometry(width, height, resized_width, resized_height, (left, top, left + across, top + down))


@st.composite
def scenes(draw) -> tuple[ImageGeometry, list[Box], list[Point]]:
    """A geometry, and one to four boxes and points that the model sees; edges, corners and zero sizes come up often."""
    geometry = draw(geometries())
    left, top, right, bottom = geometry.visible

    def point() -> Point:
        return left + draw(fraction) * (right - left), top + draw(fraction) * (bottom - top)

    def box() -> Box:
        (x1, x2), (y1, y2) = (sorted(pair) for pair in zip(point(), point(), strict=True))
        return x1, y1, x2, y2

    count = draw(st.integers(1, 4))
    return geometry, [box() for _ in range(count)], [point() for _ in range(count)]


def half_bin(name: str, geometry: ImageGeometry) -> Point:
    """In original pixels; the bins divide the canvas, of which the image may be a part."""
    steps = {"norm1000": 1000, "bins": 32, "bins1000": 1000, "markup": 1000, "paligemma": 1023, "kosmos2": 32}
    across = steps.get(name, geometry.resized_width)
    down = steps.get(name, geometry.resized_height)
    x0, y0 = geometry.to_original(0, 0)
    x1, y1 = geometry.to_original(1, 1)
    return (x1 - x0) / across / 2, (y1 - y0) / down / 2


def assert_close(before: tuple, after: tuple, bounds: Point) -> None:
    assert len(before) == len(after)
    for n, (value, again) in enumerate(zip(before, after, strict=True)):
        assert abs(value - again) <= bounds[n % 2] * (1 + 1e-9) + 1e-6  # rounding of pixels up to 5000


@every_convention
@settings(deadline=None)
@given(scene=scenes())
def test_round_trip_is_within_half_a_bin(name, scene):
    geometry, boxes, points = scene
    convention = coordinates(name)
    bounds = half_bin(name, geometry)
    back = convention.parse("It is here: " + convention.render(boxes, geometry) + " done", geometry)
    assert len(back) == len(boxes)
    for before, after in zip(boxes, back, strict=True):
        assert_close(before, after, bounds)
    for click in (False, True):
        text = "Look, " + convention.render_points(points, geometry, click) + "."
        again = convention.parse_points(text, geometry, click)
        assert len(again) == len(points)
        for before, after in zip(points, again, strict=True):
            assert_close(before, after, bounds)
        assert convention.parse_points(text, geometry, not click) == convention.parse(text, geometry) == []


@every_convention
def test_rendering_what_was_parsed_changes_nothing(name):
    convention = coordinates(name)
    for geometry in (GEOMETRY, CROPPED, PADDED):
        text = convention.render([(90, 0, 550, 480), (113.3, 77.7, 200.1, 300.9)], geometry)
        assert convention.render(convention.parse(text, geometry), geometry) == text
        text = convention.render_points([(90, 0), (200.1, 300.9)], geometry, click=True)
        assert convention.render_points(convention.parse_points(text, geometry, True), geometry, True) == text


BOX = (64, 48, 320, 480)
WORKED = {  # one box, two boxes of a region, a point, a click of two points
    "norm1000": (
        "<box>[[100,100,500,1000]]</box>",
        "<region>[[100,100,500,1000],[100,100,500,1000]]</region>",
        "<point>[[100,100]]</point>",
        "<click>[[100,100],[1000,500]]</click>",
    ),
    "pixels": (
        "<box>[[100,50,500,500]]</box>",
        "<region>[[100,50,500,500],[100,50,500,500]]</region>",
        "<point>[[100,50]]</point>",
        "<click>[[100,50],[1000,250]]</click>",
    ),
    "bins": (
        "<box><loc_03><loc_03><loc_16><loc_31></box>",
        "<region>" + "<loc_03><loc_03><loc_16><loc_31>" * 2 + "</region>",
        "<point><loc_03><loc_03></point>",
        "<click><loc_03><loc_03><loc_31><loc_16></click>",
    ),
    "bins1000": (
        "<box><loc_100><loc_100><loc_500><loc_999></box>",
        "<region>" + "<loc_100><loc_100><loc_500><loc_999>" * 2 + "</region>",
        "<point><loc_100><loc_100></point>",
        "<click><loc_100><loc_100><loc_999><loc_500></click>",
    ),
    "markup": (
        "<box><x>0.100</x><y>0.100</y><x>0.500</x><y>1.000</y></box>",
        "<region>" + "<x>0.100</x><y>0.100</y><x>0.500</x><y>1.000</y>" * 2 + "</region>",
        "<point><x>0.100</x><y>0.100</y></point>",
        "<click><x>0.100</x><y>0.100</y><x>1.000</x><y>0.500</y></click>",
    ),
    "paligemma": (  # y before x
        "<loc0102><loc0102><loc1023><loc0512>",
        "<loc0102><loc0102><loc1023><loc0512> ; <loc0102><loc0102><loc1023><loc0512>",
        "<point><loc0102><loc0102></point>",
        "<click><loc0102><loc0102><loc0512><loc1023></click>",
    ),
    "kosmos2": (  # row 3, column 3 and row 31, column 15
        "<object><patch_index_0099><patch_index_1007></object>",
        "<object><patch_index_0099><patch_index_1007></delimiter_of_multi_objects/>"
        "<patch_index_0099><patch_index_1007></object>",
        "<point><patch_index_0099></point>",
        "<click><patch_index_0099><patch_index_0543></click>",
    ),
}


@every_convention
def test_worked_examples(name):
    convention = coordinates(name)
    assert (
        convention.render([BOX], GEOMETRY),
        convention.render([BOX, BOX], GEOMETRY, region=True),
        convention.render_points([(64, 48)], GEOMETRY),
        convention.render_points([(64, 48), (640, 240)], GEOMETRY, click=True),
    ) == WORKED[name]


def test_the_tables_of_the_guide_and_of_the_module_are_true():
    """A row says: name, how the box (16, 12, 320, 480) in 640 x 480 looks, how a click at (16, 12) does."""
    guide = (Path(__file__).parents[3] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
    geometry = ImageGeometry(640, 480, 640, 480)
    for name in NAMES:
        convention = coordinates(name)
        box = convention.render([(16, 12, 320, 480)], geometry)
        click = convention.render_points([(16, 12)], geometry, click=True)
        assert f"| `{name}` | `{box}` | `{click}` |" in guide
        assert any(line.split()[:1] == [name] and box in line for line in grounding.__doc__.splitlines())


def test_worked_examples_of_parsing():
    assert coordinates("pixels").parse("a <box>[[100, 50, 500, 500]]</box>", GEOMETRY) == [BOX]
    bins = coordinates("bins").parse("<box><loc_00><loc_00> <loc_31><loc_31></box>", GEOMETRY)
    assert bins == [(10.0, 7.5, 630.0, 472.5)]
    detected = "<loc0000><loc0000><loc1023><loc1023> cat ; <loc1023><loc0000><loc1023><loc1023> dog"
    assert coordinates("paligemma").parse(detected, GEOMETRY) == [(0, 0, 640, 480), (0, 480, 640, 480)]


def test_kosmos_cells_are_those_of_its_own_processor():
    """The example of transformers' Kosmos-2 processor, and its rule for which cells a box covers."""
    from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index, patch_index_to_coordinate

    geometry = ImageGeometry(1, 1, 224, 224)
    convention = coordinates("kosmos2")
    text = "<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming himself"
    assert convention.parse(text, geometry) == [pytest.approx(patch_index_to_coordinate(44, 863, 32))]
    for box in [(0.1, 0.2, 0.5, 0.9), (0.25, 0.5, 0.75, 1.0), (0, 0, 1, 1), (0.01, 0.01, 0.02, 0.02)]:
        first, last = coordinate_to_patch_index(box, 32)
        assert convention.render([box], geometry) == (
            f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
        )


def test_paligemma_tokens_are_those_of_its_own_processor():
    from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

    assert coordinates("paligemma").tokens() == [token for token in EXTRA_TOKENS if token.startswith("<loc")]


@pytest.mark.parametrize(
    ("name", "text", "boxes", "points"),
    [
        ("norm1000", "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,100),(500,1000)<|box_end|>", 1, 0),
        ("pixels", '```json\n[\n\t{"bbox_2d": [100, 50, 500, 500], "label": "a cat"}\n]\n```', 1, 0),
        ("norm1000", '[{"bbox_2d": [100, 100, 500, 1000]}, {"bbox_2d": [100, 100, 500, 1000]}]', 2, 0),
        ("norm1000", '<ref>a cat</ref><box>[[100, 100, 500, 1000]]</box> {"bbox_2d": [100, 100, 500, 1000]}', 2, 0),
        ("pixels", '[{"point_2d": [100, 50], "label": "an ear"}, {"point_2d": ["x", 50]}]', 0, 1),
        ("pixels", '<points x1="100" y1="50" x2="100" y2="50.0" alt="the ears">the ears</points>', 0, 2),
        ("pixels", '<point x="100" y="50" alt="an ear">an ear</point>', 0, 1),
        ("norm1000", "<|box_start|>(100,100),(500)<|box_end|>", 0, 0),
        ("norm1000", '{"bbox_2d": [100, 100, 500]} {"bbox_2d": "100"} {"point_2d": [1]}', 0, 0),
        ("markup", '{"bbox_2d": [100, 100, 500, 1000]}', 0, 0),
    ],
)
def test_what_the_qwen_families_publish_is_read(name, text, boxes, points):
    convention = coordinates(name)
    assert convention.parse(text, GEOMETRY) == [BOX] * boxes
    assert convention.parse_points(text, GEOMETRY) == [(64, 48)] * points
    assert convention.parse_points(text, GEOMETRY, click=True) == []


@every_convention
def test_no_places_render_as_nothing(name):
    assert coordinates(name).render([], GEOMETRY) == coordinates(name).render_points([], GEOMETRY) == ""


def test_which_tokens_are_needed():
    assert all(coordinates(name).tokens() == [] for name in ("norm1000", "pixels", "markup"))
    tokens = coordinates("bins").tokens()
    assert tokens[:5] == ["<box>", "</box>", "<region>", "</region>", "<loc_00>"]  # the embedded model's vocabulary
    assert tokens[-1] == "<loc_31>"
    counts = {"bins": 36, "bins1000": 1008, "paligemma": 1024, "kosmos2": 1031}
    for name, count in counts.items():
        tokens = coordinates(name).tokens()
        assert len(tokens) == len(set(tokens)) == count


@every_convention
def test_what_is_rendered_in_bins_consists_of_the_listed_tokens(name):
    convention = coordinates(name)
    rest = convention.render([(0, 0, 640, 480), (13.3, 77.7, 200.1, 300.9)], GEOMETRY)
    for token in convention.tokens():
        rest = rest.replace(token, "")
    if convention.tokens():
        assert rest.strip(" ;") == ""  # PaliGemma's separator is text


def test_the_names_of_models_and_data_agree():
    assert get_args(anatomy.Coordinates) == convention_names() == tuple(NAMES)
    assert all(coordinates(row.coordinates) for row in anatomy.ANATOMIES.values())


PIECES = [
    *("<box>", "</box>", "<region>", "</region>", "<point>", "</point>", "<click>", "</click>"),
    *("<object>", "</object>", "</delimiter_of_multi_objects/>", "<x>", "</x>", "<y>", "</y>"),
    *("[", "]", "[[", "]]", "[[1,2,3,4]]", "[1,2,3,4]", "[[1,2]]", ",", " ", "-", ".", "\n", "\x00", "\x1c"),
    *("0", "7", "1000", "9" * 5000, "nan", "inf", "1e9", "é", "٣", "<loc_", "<loc_31>", "<loc_32>", "<loc_0>"),
    *("<loc_999>", "<loc0000>", "<loc1023>", "<loc1024>", " ; ", "<x>0.1</x><y>0.2</y>", "<x>9</x><y>-1</y>"),
    *("<patch_index_0000>", "<patch_index_1023>", "<patch_index_1024>", "<|box_start|>", "(1,2)", "<|box_end|>"),
    *('"bbox_2d"', '"point_2d"', ":", "<points", ' x1="1"', ' y1="2"', ">"),
]


@every_convention
@pytest.mark.parametrize("geometry", [GEOMETRY, CROPPED, PADDED], ids=["stretched", "cropped", "padded"])
@settings(deadline=None)  # wall time says more about the neighbours on this machine
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
@example(text='<points x1="1" y1="2" alt="')
def test_any_text_parses_to_places_inside_the_image(name, geometry, text):
    convention = coordinates(name)
    for x1, y1, x2, y2 in convention.parse(text, geometry):
        assert 0 <= x1 <= x2 <= geometry.width
        assert 0 <= y1 <= y2 <= geometry.height
    for click in (False, True):
        for x, y in convention.parse_points(text, geometry, click):
            assert 0 <= x <= geometry.width
            assert 0 <= y <= geometry.height
    assert isinstance(convention.without_places(text), str)


HOSTILE = {  # what makes a backtracking expression slow: long beginnings of something that never comes
    "openings": lambda n: "<box>" * n,
    "points": lambda n: "<point><click>" * n,
    "brackets": lambda n: "<box>" + "[" * n + "</box>",
    "an unfinished list": lambda n: "<box>[[1,2,3,4]" + ",[1,2,3,4]" * n + "</box>",
    "white space": lambda n: "<box>[[1" + " " * n + "</box>",
    "bins": lambda n: "<box>" + "<loc_01> " * n + "x</box>",
    "bare tokens": lambda n: "<loc0001> " * n + "<loc",
    "patches": lambda n: "<object>" + "<patch_index_0001>" * n + "</delimiter_of_multi_objects/>" * n + "</object>",
    "markup": lambda n: "<box>" + "<x>0.1</x> <y>0.2</y> " * n + "<x></box>",
    "json": lambda n: '"bbox_2d"' + " " * n + '"bbox_2d": [' * n,
    "xml": lambda n: "<points" + ' x1="1" y1="2"' * n + " x",
    "qwen": lambda n: "<|box_start|>(1,2)" + " " * n + "<|box_start|>" * n,
}


@every_convention
@pytest.mark.parametrize("attack", HOSTILE)
def test_reading_takes_time_linear_in_the_text(name, attack):
    """Eight times the text: eight times the time where it is linear, sixty-four times where it is quadratic."""
    convention = coordinates(name)

    def seconds(n: int) -> float:
        text = HOSTILE[attack](n)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            convention.parse(text, GEOMETRY)
            convention.parse_points(text, GEOMETRY)
            convention.without_places(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(16000) < max(30 * seconds(2000), 0.05)


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
        "<point>[[1,2,3,4]]</point>",
        "<point>[[1001,2]]</point>",
        "<click>[[-1,2]]</click>",
        "<click>[1,2]</click>",
    ],
)
def test_malformed_is_no_place(text):
    convention = coordinates("norm1000")
    assert convention.parse(text, GEOMETRY) == []
    assert convention.parse_points(text, GEOMETRY) == convention.parse_points(text, GEOMETRY, click=True) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("bins", f"<box>{inside}</box>") for inside in ("", "<loc_01>" * 3, "<loc_01>" * 5, "<loc_32>" * 4)),
        ("bins", "<box><loc_09><loc_01><loc_03><loc_04></box>"),
        ("bins", "<box>[[1,2,3,4]]</box>"),
        ("bins", "<box><loc_001><loc_001><loc_003><loc_004></box>"),
        ("bins1000", "<box><loc_01><loc_01><loc_03><loc_04></box>"),
        ("markup", "<box><x>0.1</x><y>0.1</y></box>"),
        ("markup", "<box><y>0.1</y><x>0.1</x><y>0.1</y><x>0.1</x></box>"),
        ("markup", "<box><x>1.1</x><y>0.1</y><x>1.2</x><y>0.2</y></box>"),
        ("markup", "<box><x>a</x><y>0.1</y><x>0.2</x><y>0.2</y></box>"),
        ("paligemma", "<loc0001>" * 3),
        ("paligemma", "<loc0001>" * 5),
        ("paligemma", "<loc1024>" * 4),
        ("paligemma", "<loc0001><loc0001> cat <loc0003><loc0003>"),
        ("paligemma", "<loc0005><loc0001><loc0001><loc0009>"),
        ("paligemma", "<point><loc0001><loc0001><loc0003><loc0003></point>"),
        ("kosmos2", "<object><patch_index_0001></object>"),
        ("kosmos2", "<object><patch_index_0001><patch_index_1024></object>"),
        ("kosmos2", "<object><patch_index_0009><patch_index_0033></object>"),
        ("kosmos2", "<object></delimiter_of_multi_objects/></object>"),
        ("kosmos2", "<box><patch_index_0001><patch_index_0099></box>"),
    ],
)
def test_malformed_tokens_are_no_box(name, text):
    assert coordinates(name).parse(text, GEOMETRY) == []


def test_nested_tags_give_the_innermost_once():
    parse = coordinates("norm1000").parse
    expected = parse("<box>[[100,100,500,500]]</box>", GEOMETRY)
    assert len(expected) == 1
    assert parse("<box><box>[[100,100,500,500]]</box></box>", GEOMETRY) == expected
    assert parse("<box>[[1,2,<box>[[100,100,500,500]]</box>3,4]]</box>", GEOMETRY) == expected
    assert parse("<box>oops</box> <box>[[100,100,500,500]]</box>", GEOMETRY) == expected
    assert parse("<box>[[9,9,1,1],[100,100,500,500]]</box>", GEOMETRY) == expected


@every_convention
def test_places_are_taken_out_of_a_text(name):
    convention = coordinates(name)
    places = convention.render([BOX], GEOMETRY), convention.render_points([(1, 2)], GEOMETRY, click=True)
    text = convention.without_places(f"a cat {places[0]} and{places[1]} a dog")
    assert " ".join(text.split()) == "a cat and a dog"


# ---- what lies outside ------------------------------------------------------------------------------------------


@every_convention
def test_data_outside_its_image_is_refused_and_a_pixel_is_forgiven(name):
    convention = coordinates(name)
    whole = convention.render([(0, 0, 640, 480)], GEOMETRY)
    assert convention.render([(-1, -1, 641, 481)], GEOMETRY) == whole  # counted inclusively, or rounded
    for box in [(-1.5, 0, 600, 480), (0, -2, 600, 480), (0, 0, 642, 480), (0, 0, 640, 481.5), (700, 0, 800, 9)]:
        with pytest.raises(VlmtuneError, match=r"sticks out of its image of 640x480 pixels; correct it in the data"):
            convention.render([box], GEOMETRY)
    assert convention.render_points([(641, 481)], GEOMETRY) == convention.render_points([(640, 480)], GEOMETRY)
    for point in [(642, 0), (0, -1.5)]:
        with pytest.raises(VlmtuneError, match="lies outside its image of 640x480 pixels; correct it in the data"):
            convention.render_points([point], GEOMETRY)


@every_convention
def test_what_a_crop_hides(name):
    """The model sees x from 80 to 560 of 640: a box is cut to that, and one of which nothing is left is refused."""
    convention = coordinates(name)
    assert CROPPED.visible == (80.0, 0.0, 560.0, 480.0)
    text = convention.render([(0, 100, 320, 480)], CROPPED)
    assert text == convention.render([(80, 100, 320, 480)], CROPPED)
    assert_close((80, 100, 320, 480), convention.parse(text, CROPPED)[0], half_bin(name, CROPPED))
    for box in [(0, 0, 79, 480), (0, 0, 80, 480), (560, 0, 640, 480), (561, 5, 561, 9)]:
        with pytest.raises(VlmtuneError, match=r"sees of its image of 640x480 .* x 80\.0 to 560\.0 .*do_center_crop"):
            convention.render([box], CROPPED)
    with pytest.raises(VlmtuneError, match=r"Point \(70, 5\) lies outside what the model sees"):
        convention.render_points([(70, 5)], CROPPED)


def test_padding_counts():
    """The canvas is a square: a number refers to the whole of it, margins included."""
    convention = coordinates("norm1000")
    assert PADDED.visible == (0.0, 0.0, 640.0, 480.0)
    assert convention.render([(0, 0, 640, 480)], PADDED) == "<box>[[0,125,1000,875]]</box>"
    assert convention.parse("<box>[[0,0,500,500]]</box>", PADDED) == [(0, 0, 320, 240)]  # reaches into the margin
    assert convention.parse("<box>[[0,0,500,100]]</box>", PADDED) == []  # nothing but margin
    assert convention.parse_points("<click>[[500,100]]</click>", PADDED, click=True) == []


def test_a_generated_box_that_sticks_out_is_clipped():
    convention = coordinates("norm1000")
    assert convention.parse("<box>[[-3,0,1004,1000]]</box>", GEOMETRY) == [(0, 0, 640, 480)]


@pytest.mark.parametrize("box", [(9, 0, 1, 5), (0, 9, 5, 1), (float("nan"), 0, 1, 1), (0, 0, float("inf"), 1)])
def test_an_impossible_box_in_the_data_is_refused(box):
    with pytest.raises(VlmtuneError, match="correct it in the data"):
        coordinates("norm1000").render([box], GEOMETRY)


@pytest.mark.parametrize("point", [(float("nan"), 0), (0, float("inf"))])
def test_an_impossible_point_in_the_data_is_refused(point):
    with pytest.raises(VlmtuneError, match="is not finite; correct it in the data"):
        coordinates("norm1000").render_points([point], GEOMETRY)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(VlmtuneError, match="did you mean 'norm1000'"):
        coordinates("norm100")
    with pytest.raises(VlmtuneError, match="norm1000, pixels, bins"):
        coordinates("zzz")
