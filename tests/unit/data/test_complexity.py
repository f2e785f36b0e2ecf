"""Measures of complexity, the rule that makes a share of them, and what the images of a sample become by it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from vlmtune.build import build_encoder
from vlmtune.config import Data
from vlmtune.data.batch import batches_of, collate, tensors_of
from vlmtune.data.complexity import complexity, thumbnail
from vlmtune.data.complexity_rule import ATTRIBUTE, ComplexityRule, rule_of, set_rule
from vlmtune.data.encode import Encoder
from vlmtune.data.feature_store import FeatureStore
from vlmtune.data.grounding import coordinates
from vlmtune.data.pictures import Budget, Pictures, budget_sentence
from vlmtune.data.resolution import set_pixel_limits
from vlmtune.models.load import load_model, load_processor, save_processor
from vlmtune.models.tiny import FAMILIES
from vlmtune.prepare import _complexity_finding
from vlmtune.types import ImageRef, Kind, Sample, Text, Turn, VlmtuneError

MEASURES = ("edges", "entropy", "text", "detail", "largest")
RESIZABLE = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
ONE_SIZE = ("llava", "gemma3")
RULE = ComplexityRule("edges", 0.25, 0.02, 0.3)
FLAT = Image.new("RGB", (400, 300), "orange")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(image: Image.Image) -> ImageRef:
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageRef(file.getvalue())


def asked(*images: Image.Image) -> Sample:
    turns = (Turn("user", (*map(reference, images), Text("what"))), Turn("assistant", (Text("this"),)))
    return Sample("s", turns)


def processor_of(folder, rule: ComplexityRule | None = RULE):
    processor = load_processor(str(folder))
    set_rule(processor.image_processor, rule)
    return processor


@pytest.fixture(scope="module")
def encoders(tiny_folder):
    """Of every family, with the rule."""
    return {name: Encoder(processor_of(tiny_folder(name)), coordinates("norm1000")) for name in FAMILIES}


# ---- measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_one_colour_is_nothing_and_noise_is_much(measure):
    assert complexity(FLAT, measure) == 0.0
    assert complexity(noise(200, 200), measure) > 0.2
    assert complexity(Image.new("RGB", (1, 1)), measure) == 0.0


@pytest.mark.parametrize("measure", ["edges", "text", "detail"])
def test_the_blurrier_the_simpler(measure):
    values = [complexity(noise(120, 120).filter(ImageFilter.GaussianBlur(r)), measure) for r in (0, 0.7, 1.5, 4)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_writing_is_text_and_large_shapes_are_not():
    page, shapes = Image.new("RGB", (200, 100), "white"), Image.new("RGB", (200, 100), "white")
    for row in range(5, 95, 12):
        ImageDraw.Draw(page).text((5, row), "the quick brown fox jumps over", fill="black")
    ImageDraw.Draw(shapes).ellipse((20, 10, 100, 90), fill="black")
    assert complexity(page, "text") > 0.05 > 5 * complexity(shapes, "text")


def test_the_largest_is_that_of_the_four():
    image = noise(90, 70).filter(ImageFilter.GaussianBlur(1))
    assert complexity(image, "largest") == max(complexity(image, measure) for measure in MEASURES[:4])


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    colours=st.integers(1, 256),
    seed=st.integers(0, 99),
    measure=st.sampled_from(MEASURES),
)
def test_a_measure_is_a_share_and_always_the_same(width, height, colours, seed, measure):
    image = noise(width, height, seed).quantize(colours).convert("RGB")
    value = complexity(image, measure)
    assert 0.0 <= value <= 1.0 and complexity(image.copy(), measure) == value


def test_the_grey_copy_is_small_and_never_enlarged():
    assert thumbnail(noise(100, 30)).shape == (30, 100)
    assert max(thumbnail(noise(257, 40)).shape) == 129
    assert max(thumbnail(noise(5000, 20)).shape) <= 256


# ---- the rule -------------------------------------------------------------------------------------------------------


@given(value=st.floats(0, 1), more=st.floats(0, 1), least=st.floats(0.01, 0.99))
def test_a_share_lies_between_the_least_and_one_and_grows(value, more, least):
    rule = ComplexityRule("edges", least, 0.2, 0.6)
    share = rule.share(value)
    assert least <= share <= 1 and (share * 8).is_integer()
    assert rule.share(min(1.0, value + more)) >= share
    assert rule.share(0.6) == 1 and rule.share(0.2) == min(np.ceil(least * 8) / 8, 1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"measure": "beauty"}, "no measure 'beauty'; it is one of edges, entropy, text, detail, largest"),
        ({"least": 0.0}, "least 0 is no share between 0 and 1"),
        ({"least": 1.0}, "least 1 is no share between 0 and 1"),
        ({"simple": 0.5}, "simple 0.5 and complex 0.3 are not in order"),
        ({"complex": 1.5}, "simple 0.02 and complex 1.5 are not in order"),
    ],
)
def test_a_rule_that_is_none_is_refused(values, sentence):
    with pytest.raises(VlmtuneError, match=sentence):
        ComplexityRule(**{**asdict(RULE), **values})
    with pytest.raises(ValueError, match="Input should be" if "measure" in values else sentence):
        Data.model_validate({"train": [{"path": "a.jsonl"}], "complexity": {**asdict(RULE), **values}})


def test_a_damaged_rule_of_a_model_folder_is_named(tiny_folder):
    processor = load_processor(str(tiny_folder("llava")))
    setattr(processor.image_processor, ATTRIBUTE, {"measure": "edges", "few": 1})
    with pytest.raises(VlmtuneError, match="vlmtune_complexity.*is not of this version of vlmtune"):
        Pictures(processor)


# ---- what images become ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_simple_image_gets_fewer_tokens_and_a_complex_one_what_it_would(family, encoders, tiny_folder):
    encoder = encoders[family]
    plain = Encoder(processor_of(tiny_folder(family), None), coordinates("norm1000"))
    crowded, flat = noise(400, 300), FLAT
    with_rule, without = encoder.encode(asked(crowded)), plain.encode(asked(crowded))
    assert with_rule.ids.equal(without.ids)
    assert all(value.equal(without.pixels[name]) for name, value in with_rule.pixels.items())
    simple, other = encoder.encode(asked(flat)), plain.encode(asked(flat))
    assert len(simple) < len(other)
    budget, full = encoder.budgets(asked(flat, crowded))
    assert budget == Budget(0.0, 0.25, budget.tokens, full.tokens) and budget.without == full.without == full.tokens
    assert len(other) - len(simple) >= full.tokens - budget.tokens > 0
    if family in ONE_SIZE:
        assert budget.tokens * 4 == full.tokens and simple.merges == [2]
        assert all(value.equal(other.pixels[name]) for name, value in simple.pixels.items()), "the tower sees it all"
    else:
        area = simple.geometry[0].resized_width * simple.geometry[0].resized_height
        assert area <= other.geometry[0].resized_width * other.geometry[0].resized_height and not simple.merges


SIDES = st.one_of(st.integers(1, 60), st.integers(1, 700), st.sampled_from([1, 900]))


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES, st.sampled_from([0, 1, 3, 40])), max_size=3),
    shrink=st.sampled_from([None, 50_000]),
)
def test_the_count_is_the_length_and_pixels_are_those_of_each_image_alone(encoders, family, sizes, shrink):
    encoder = encoders[family]
    images = [noise(w, h).filter(ImageFilter.GaussianBlur(blur)) for w, h, blur in sizes]
    sample = asked(*images)
    if family in RESIZABLE:
        sample = Sample("s", sample.turns, max_pixels=shrink)
    encoded = encoder.encode(sample)
    assert encoder.count(sample) == len(encoded)
    if not images:
        return
    alone = [encoder.pictures.load([ref], sample.max_pixels, "t") for ref in sample.images]
    across = int(encoded.pixels["pixel_values"].dim() == 5)
    for name, value in encoded.pixels.items():
        parts = [one.pixels[name] for one in alone]
        assert value.shape[across] == sum(part.shape[across] for part in parts)
        assert all(part.equal(cut) for part, cut in zip(parts, value.split([p.shape[across] for p in parts], across)))  # noqa: B905
    assert encoded.geometry == [one.geometry[0] for one in alone]
    assert encoded.merges == [merge for one in alone for merge in one.merges]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_shares_stay_within_other_limits(family, tiny_folder):
    """Of a sample, of all images of a sample, and the least of the family."""
    processor = processor_of(tiny_folder(family))
    pictures = Pictures(processor)
    least, most = pictures.pixel_range

    def area(geometry) -> int:
        return geometry.resized_width * geometry.resized_height

    if family == "qwen2_5_vl":
        together = Pictures(processor, most + 4 * least)
        made = together.process([noise(900, 900), FLAT.resize((900, 900)), noise(900, 900)], None, "t")
        assert sum(map(area, made.geometry)) <= most + 4 * least
        assert area(made.geometry[1]) <= area(made.geometry[0]) / 2
        assert area(pictures.process([FLAT], 20 * 28 * 28, "t").geometry[0]) <= 5 * 28 * 28
        tiny = pictures.process([Image.new("RGB", (30, 30))], None, "t")
        assert area(tiny.geometry[0]) == least, "a quarter of it would be below what the family takes"
    assert pictures.process([FLAT], least, "t").geometry  # nothing is below one tile


def test_an_image_is_decoded_once_for_counting(encoders, monkeypatch):
    seen = []
    real = Image.Image.reduce
    monkeypatch.setattr(Image.Image, "reduce", lambda *a, **k: seen.append(1) or real(*a, **k))
    sample = asked(noise(300, 301, seed=77))
    assert encoders["llava"].count(sample) == encoders["llava"].count(sample) and len(seen) == 1


def test_kept_features_come_with_their_merges(encoders, tmp_path):
    """In place of pixels, where `data.vision_cache` looks them up."""
    sample = asked(FLAT, noise(64, 64))
    encoder = encoders["llava"]
    looked_up = encoder.looking_up(FeatureStore(tmp_path, 2**20)).encode(sample)
    whole = encoder.encode(sample)
    assert looked_up.merges == whole.merges == [2, 1] and looked_up.ids.equal(whole.ids)
    assert [tuple(image.pixels["pixel_values"].shape) for image in looked_up.images] == [(1, 3, 56, 56)] * 2


def test_a_batch_keeps_its_merges(encoders):
    encoder = encoders["llava"]
    encoded = [encoder.encode(asked(image)) for image in (FLAT, noise(64, 64))]
    batch = collate(encoded, encoder.pad_token_id)
    assert batch.merges == [2, 1] and batch.to(batch.kinds.device).merges == [2, 1]
    tensors, described = tensors_of([batch])
    assert batches_of(tensors, json.loads(json.dumps(described)))[0].merges == [2, 1]
    assert collate(encoded[1:], encoder.pad_token_id).merges == [], "nothing to do is the usual path"


# ---- the model folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl", "llava", "gemma3"])
def test_the_rule_is_saved_with_the_processor(family, tiny_folder, tmp_path):
    """Ours reads it again; plain transformers loads the folder and gives images what it always did."""
    from transformers import AutoProcessor

    folder = tiny_folder(family)
    before = Encoder(load_processor(str(folder)), coordinates("norm1000"))
    processor = processor_of(folder)
    encoder = Encoder(processor, coordinates("norm1000"))
    assert encoder.identity != before.identity, "cached lengths are not those of another rule"
    save_processor(processor, str(folder), tmp_path / "saved")
    again = load_processor(str(tmp_path / "saved"))
    assert rule_of(again.image_processor) == RULE
    assert Encoder(again, coordinates("norm1000")).identity == encoder.identity
    theirs = AutoProcessor.from_pretrained(tmp_path / "saved")
    text = [theirs.image_token]
    ids, own = (p(text=text, images=[[FLAT]], return_tensors="pt")["input_ids"] for p in (theirs, before.processor))
    assert ids.equal(own)


def test_a_config_overrides_the_rule_of_the_folder(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    processor = processor_of(tiny_folder("llava"))

    def rule(wish: dict | None) -> ComplexityRule | None:
        data = Data.model_validate({"train": [{"path": "a.jsonl"}], "complexity": wish})
        return build_encoder(processor, model, data).pictures.rule

    assert build_encoder(processor, model).pictures.rule == RULE
    assert rule(None) == RULE
    assert rule({"measure": "text", "simple": 0.0, "complex": 0.1}) == ComplexityRule("text", 0.25, 0.0, 0.1)
    assert rule({"measure": "none"}) is None and not hasattr(processor.image_processor, ATTRIBUTE)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_least_that_never_merges_is_refused(tiny_folder):
    with pytest.raises(VlmtuneError, match=r"complexity.least 0.3 has no effect on this model.*set it to 0.25"):
        Pictures(processor_of(tiny_folder("llava"), ComplexityRule("edges", 0.3, 0.1, 0.3)))


@pytest.mark.parametrize(("side", "extra"), [(42, 0), (56, 1)])
def test_tokens_that_are_no_even_grid_are_refused(side, extra, tiny_folder):
    """3 x 3 patches; and a class token among them."""
    processor = processor_of(tiny_folder("llava"))
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.num_additional_image_tokens += extra
    with pytest.raises(VlmtuneError, match="image tokens of this model are no grid of an even number of rows"):
        Pictures(processor)


def test_crops_of_an_image_are_refused(tiny_folder):
    processor = processor_of(tiny_folder("gemma3"))
    processor.image_processor.do_pan_and_scan = True
    with pytest.raises(VlmtuneError, match=r"cuts crops out of images \(do_pan_and_scan\)"):
        Pictures(processor)


def test_read_outs_and_merged_tokens_are_refused_together(tiny_folder):
    with pytest.raises(VlmtuneError, match="merges image tokens of this model, but loss.boxes and loss.referring"):
        Encoder(processor_of(tiny_folder("llava")), coordinates("norm1000"), reads_regions=True)
    Encoder(processor_of(tiny_folder("qwen2_5_vl")), coordinates("norm1000"), reads_regions=True)


def test_places_follow_the_smaller_image(tiny_folder):
    """Qwen2.5-VL writes boxes in pixels of the resized image: those that this image got."""
    from vlmtune.types import Boxes

    processor = processor_of(tiny_folder("qwen2_5_vl"))
    set_pixel_limits(processor.image_processor, 28 * 28, 28 * 28 * 64)
    encoder = Encoder(processor, coordinates("pixels"))
    box = Boxes(((100.0, 75.0, 300.0, 225.0),))
    found = []
    for image in (FLAT, noise(400, 300)):
        encoded = encoder.encode(Sample("s", (Turn("user", (reference(image),)), Turn("assistant", (box,)))))
        text = encoder.tokenizer.decode(encoded.ids[encoded.kinds == Kind.BOX])
        found.append((text, encoder.coordinates.parse(text, encoded.geometry[0])[0]))
    (small, near), (large, exact) = found
    assert small != large and near == pytest.approx(box.boxes[0], abs=2) and exact == pytest.approx(box.boxes[0], abs=1)


def test_the_line_of_a_run():
    budgets = [Budget(0.0, 0.25, 9, 36), Budget(0.5, 1.0, 36, 36)]
    assert budget_sentence("edges", budgets) == (
        "complexity (edges): 1 of the first 2 images get fewer tokens than they would, 38% fewer in all (45 of 72)"
    )
    assert "0 of the first 0 images" in budget_sentence("edges", [])


class FirstRows(list):
    """An order of (source, row) pairs."""

    def decide(self, step: int) -> int:
        return len(self)


def test_a_rule_that_changes_nothing_is_remarked_on(encoders):
    def finding(*images: Image.Image, is_the_models: bool = False):
        rows = FirstRows((0, n) for n in range(len(images)))
        return _complexity_finding(
            SimpleNamespace(order=rows, sources=[[asked(image) for image in images]], encoder=encoders["llava"]),
            is_the_models,
        )

    assert finding(FLAT, noise(64, 64)).level == finding().level == "pass"
    nothing = finding(noise(64, 64), noise(64, 64, seed=1))
    assert nothing.level == "warn" and "0 of the first 2 images" in nothing.evidence
    assert "raise data.complexity.simple (a quarter of these images are below 0." in nothing.remedy
    assert "leave data.complexity out" in nothing.remedy
    theirs = finding(noise(64, 64), is_the_models=True)
    assert "came with the model" in theirs.evidence and "measure to none" in theirs.remedy
