"""The context window: what is dropped, shrunk or cut, in which order, and what never happens."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.sentences import sentence_ends
from vlmtune.data.window import Window
from vlmtune.types import Boxes, ImageName, ImageRef, Sample, Text, Turn

PIXELS_PER_TOKEN = 10_000


def image(name, id=None):
    return ImageRef(Path(f"{name}.png"), id)


def measure(sample, pixels=100_000):
    """Words, plus 2 per turn, plus 1 per 10,000 pixels of images of 100,000 pixels."""
    total = 2 * len(sample.turns)
    for part in (part for turn in sample.turns for part in turn.parts):
        match part:
            case Text(text):
                total += len(text.split())
            case ImageRef():
                total += min(pixels, sample.max_pixels or pixels) // PIXELS_PER_TOKEN
            case Boxes(boxes):
                total += 4 * len(boxes)
    return total


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Sample(
        "x",
        tuple(Turn(roles[role], tuple(Text(p) if isinstance(p, str) else p for p in parts)) for role, *parts in turns),
    )


THREE = chat(
    ("s", "be brief"),
    ("u", image("one"), "what is it"),
    ("a", "a cat"),
    ("u", image("two"), "and this"),
    ("a", "a dog"),
    ("u", "which is larger"),
    ("a", "the dog"),
)


def test_what_fits_is_left_alone():
    assert Window(measure(THREE)).fit(THREE, measure, (1000, 160_000)) == Window(10**6).fit(THREE, measure)
    assert Window(measure(THREE)).fit(THREE, measure).sample is THREE


def test_oldest_rounds_go_first_with_their_images_and_the_system_turn_stays():
    fitted = Window(measure(THREE) - 1).fit(THREE, measure)
    assert fitted.sample.turns == (THREE.turns[0], *THREE.turns[3:])
    assert [change.action for change in fitted.changes] == ["turns"]
    assert fitted.changes[0].tokens == (measure(THREE), measure(fitted.sample))


def test_an_image_a_later_turn_has_a_box_in_moves_to_the_first_turn_left():
    sample = replace(
        THREE,
        turns=(*THREE.turns[:5], Turn("user", (Text("the first one"), Boxes(((1, 2, 3, 4),), True, 0))))
        + THREE.turns[6:],
    )
    kept = Window(measure(sample) - 1).fit(sample, measure).sample
    assert kept.images == sample.images
    assert kept.turns[1].parts == (sample.images[0], sample.images[1], Text("and this"))
    assert kept.turns[3].parts[1] == Boxes(((1, 2, 3, 4),), True, 0)


def test_boxes_keep_their_image_when_an_earlier_one_goes():
    sample = replace(THREE, turns=(*THREE.turns[:6], Turn("assistant", (Boxes(((1, 2, 3, 4),), image=1),))))
    kept = Window(measure(sample) - 1).fit(sample, measure).sample
    assert kept.images == [sample.images[1]] and kept.turns[-1].parts[0].image == 0


def test_an_image_named_later_by_its_id_stays():
    first, second = image("one", "img1"), image("two", "img11")
    sample = chat(("u", first, second, "look"), ("a", "yes"), ("u", "what of img1?"), ("a", "a cat"))
    assert Window(measure(sample) - 1).fit(sample, measure).sample.images == [first]


def test_an_image_that_is_called_by_name_later_stays():
    first = image("one", "img1")
    sample = chat(("u", first, "look"), ("a", "yes"), ("u", "what of ", ImageName("img1")), ("a", "a cat"))
    assert Window(measure(sample) - 1).fit(sample, measure).sample.images == [first]


def test_images_shrink_only_as_far_as_needed_and_allowed():
    sample = chat(("u", image("one"), "what"), ("a", "a cat"))
    for limit, pixels in ((measure(sample) - 1, 80_000), (measure(sample) - 8, 20_000)):
        fitted = Window(limit).fit(sample, measure, (1000, 160_000))
        assert fitted.sample.max_pixels == pixels and measure(fitted.sample) <= limit
        assert [change.action for change in fitted.changes] == ["images"]
    assert Window(measure(sample) - 8, 2).fit(sample, measure, (60_000, 160_000)).sample is None


def test_the_last_reply_is_cut_after_a_sentence_and_marked():
    sample = chat(("u", "tell"), ("a", "It is a cat. It sits there. It sleeps all day."))
    fitted = Window(measure(sample) - 2, reply_reserve=3).fit(sample, measure)
    assert fitted.sample.turns[-1] == Turn("assistant", (Text("It is a cat. It sits there."),), cut=True)
    assert [change.action for change in fitted.changes] == ["reply"]


def test_a_reply_without_room_or_sentence_is_not_cut_but_dropped():
    long = chat(("u", "one two three four five six"), ("a", "It is. A cat. Here"))
    assert Window(measure(long) - 1, reply_reserve=9).fit(long, measure).sample is None
    endless = chat(("u", "tell"), ("a", "one two three four five six"))
    fitted = Window(measure(endless) - 1, reply_reserve=1).fit(endless, measure)
    assert fitted.sample is None and fitted.changes[-1].action == "dropped"
    assert fitted.changes[-1].detail == "11 tokens where 10 are allowed"
    context = replace(long, turns=(long.turns[0], replace(long.turns[1], train=False)))
    assert Window(measure(long) - 1, reply_reserve=1).fit(context, measure).sample is None


words = st.lists(st.sampled_from(["a", "b.", "c", "one.", "。", "img1"]), min_size=1, max_size=12).map(" ".join)
user_parts = st.lists(
    st.one_of(words.map(Text), st.sampled_from([image("one", "img1"), image("two")])), min_size=1, max_size=3
)


@st.composite
def conversations(draw):
    turns = [Turn("system", (Text(draw(words)),))] if draw(st.booleans()) else []
    seen = 0
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(user_parts)
        seen += sum(isinstance(part, ImageRef) for part in parts)
        turns.append(Turn("user", tuple(parts)))
        reply = [Text(draw(words))]
        if seen and draw(st.booleans()):
            reply.append(Boxes(((0, 0, 1, 1),), image=draw(st.integers(0, seen - 1))))
        turns.append(Turn("assistant", tuple(reply)))
    return Sample("x", tuple(turns))


@given(conversations(), st.integers(1, 60), st.integers(1, 8))
def test_what_comes_out_fits_and_is_a_part_of_what_went_in(sample, limit, reserve):
    fitted = Window(limit, reserve).fit(sample, measure, (20_000, 160_000))
    assert (measure(sample) <= limit) == (not fitted.changes)
    if fitted.sample is None:
        assert fitted.changes[-1].action == "dropped"
        return
    result = fitted.sample
    assert measure(result) <= limit
    system = [turn for turn in sample.turns if turn.role == "system"]
    assert [turn for turn in result.turns if turn.role == "system"] == system
    rest = list(result.turns[len(system) :])
    tail = list(sample.turns[len(sample.turns) - len(rest) :])
    assert [turn.role for turn in rest] == [turn.role for turn in tail] and rest[0].role == "user"
    sources = [[ref.source for ref in one.images] for one in (result, sample)]
    for turn, original in zip(rest, tail, strict=True):
        texts = [[part.text for part in one.parts if isinstance(part, Text)] for one in (turn, original)]
        if turn.cut:
            assert turn is rest[-1] and original.parts[0].text.startswith(texts[0][0])
            assert len(texts[0][0]) in [*sentence_ends(original.parts[0].text + " x"), len(original.parts[0].text)]
        else:
            assert texts[0] == texts[1]
            boxes = [[part for part in one.parts if isinstance(part, Boxes)] for one in (turn, original)]
            for mine, theirs in zip(*boxes, strict=True):
                assert sources[0][mine.image] == sources[1][theirs.image] and mine.boxes == theirs.boxes


def test_a_reply_with_entities_is_cut_where_the_plain_one_is():
    text = "Dr. Fox sat. ```\na. b\n``` He saw a hen. It ran. " + "And so on " * 40
    plain = chat(("u", "what"), ("a", text))
    pieces = [Text("Dr"), Text(". Fox", entity=True), Text(text[7:17]), Text(text[17:30], entity=True), Text(text[30:])]
    *history, reply = plain.turns
    marked = replace(plain, turns=(*history, replace(reply, parts=tuple(pieces))))

    def characters(sample: Sample) -> int:
        return sum(len(part.text) for turn in sample.turns for part in turn.parts)

    for limit in range(10, characters(plain), 7):
        one, other = (Window(limit, 1).fit(sample, characters).sample for sample in (plain, marked))
        assert (one is None) == (other is None)
        if one is not None:
            assert "".join(part.text for part in one.turns[-1].parts) == "".join(p.text for p in other.turns[-1].parts)
