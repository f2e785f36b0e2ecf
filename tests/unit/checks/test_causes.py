"""Causes and their order (SPEC F5)."""

from __future__ import annotations

import pytest

from vlmtune.checks.causes import RISE, rank_causes, rising_norms
from vlmtune.checks.examine import IDS, IMAGES, PIXELS
from vlmtune.checks.nonfinite import Origin
from vlmtune.types import Finding

SOUND = [Finding("pass", PIXELS, "4 images"), Finding("pass", IDS, "0 to 9 of 10")]
BAD_PIXELS = Finding("fail", PIXELS, "image 1 of sample s3: 2 of 100 values NaN", "open that file and mend it")
BLACK = Finding("warn", IMAGES, "image 1 of sample s3 is black", "look at these files")
CALM = [{"total": 1.0, "language": 0.9, "projector": 0.3}] * 10
EXPLODING = [*CALM, {"total": 400.0, "language": 1.0, "projector": 400.0}]


def origin(kind: str, **more) -> Origin:
    return Origin(
        **{"kind": kind, "module": "language.layers.1.mlp.down_proj", "layer": "Linear", "detail": "d"} | more
    )


def names(*args, **more) -> list[str]:
    return [cause.what for cause in rank_causes(*args, **more)]


def test_nothing_found():
    (cause,) = rank_causes(None, SOUND)
    assert cause.what == "not reproduced" and cause.level == "warn" and cause.remedy


def test_bad_pixels_come_first():
    found = rank_causes(origin("inputs"), [BAD_PIXELS, BLACK], EXPLODING)
    assert [cause.what for cause in found] == ["the data: the images"]
    assert found[0].evidence == BAD_PIXELS.evidence and found[0].remedy == BAD_PIXELS.remedy


def test_an_input_that_examination_passes_is_still_a_cause():
    assert names(origin("inputs"), SOUND) == ["the data: an input of the model"]


def test_a_token_without_a_row():
    wrong = Finding("fail", IDS, "label 600 at token 3 of sample s1", "use the tokenizer that belongs to this model")
    assert names(origin("exception", module="embed"), [wrong]) == ["the data: a token that the model does not have"]
    assert names(origin("exception", module="embed"), SOUND) == ["the model cannot take this batch"]


def test_weights_before_everything_else():
    found = rank_causes(origin("weights", broken=("lm_head.weight",)), [BAD_PIXELS], CALM, [2.0])
    assert [cause.what for cause in found] == ["weights were not finite before this step", "the data: the images"]
    assert "lm_head.weight" in found[0].evidence


@pytest.mark.parametrize(
    "norms, losses, since",
    [([], [], "read like that"), (CALM, [2.0], "the last update"), ([{"total": float("nan")}], [2.0], "steps before")],
)
def test_since_when_weights_are_broken(norms, losses, since):
    found = rank_causes(origin("weights", broken=("a", "b", "c", "d")), SOUND, norms, losses)
    assert since in found[0].evidence and "a, b, c and 1 more" in found[0].evidence


def test_float16():
    hit = origin("forward", dtype="float16", largest=300.0, weight=12.0, wide=81234.0)
    (cause,) = rank_causes(hit, SOUND, CALM, precision="fp16")
    assert cause.what == "float16 overflow in language.layers.1.mlp.down_proj"
    assert "65504" in cause.evidence and "8.123e+04" in cause.evidence and "compute: fp32" in cause.remedy


def test_the_scale_is_blamed_only_where_1_helps():
    hit = origin("gradient", dtype="float16", largest=300.0)
    with_scale = names(hit, SOUND, precision="fp16", scale=65536.0, finite_without_scale=True)
    assert with_scale[0] == "the loss scale is too large for this batch"
    without = names(hit, SOUND, precision="fp16", scale=65536.0, finite_without_scale=False)
    assert without[0].startswith("float16 overflow")


def test_grown_weights_and_grown_activations():
    assert names(origin("forward", dtype="float32", weight=1e9, largest=3.0), SOUND, CALM)[0].startswith("weights of")
    assert names(origin("forward", dtype="float32", weight=1.0, largest=1e30), SOUND)[0].startswith("activations have")
    assert names(origin("gradient", dtype="float32", weight=1.0, largest=1e30), SOUND)[0].startswith("gradients have")


def test_weights_that_were_large_before_the_first_step_have_not_grown():
    hit = origin("forward", dtype="float16", weight=1e5, largest=300.0)
    assert names(hit, SOUND, precision="fp16", grown={"a.weight": 1e5})[0].startswith("float16 overflow")
    assert names(hit, SOUND, CALM, precision="fp16")[0].startswith("weights of")


def test_weights_that_have_grown_before_a_module_without_any():
    hit = origin("forward", dtype="float32", largest=3.0)
    found = rank_causes(hit, SOUND, CALM, grown={"a.weight": 2e3, "b.lora_B.weight": 1e30})
    assert found[0].what == "weights have grown" and "2 tensors" in found[0].evidence
    assert "1e+30 in b.lora_B.weight" in found[0].evidence
    assert not any("have grown" in cause.what for cause in rank_causes(hit, SOUND, CALM))


def test_exploding_norms():
    found = rank_causes(origin("forward", dtype="float32"), SOUND, EXPLODING, [2.0, 9.0], lr={"projector": 0.5})
    assert found[0].what == "training was diverging"
    assert "gradient norm of projector" in found[0].evidence and "at lr 0.5" in found[0].evidence
    assert "last loss 9" in found[0].evidence


def test_norms_that_rose():
    assert rising_norms(CALM) == {}
    assert rising_norms(EXPLODING) == {"total": (1.0, 400.0), "projector": (0.3, 400.0)}
    assert rising_norms([{"a": 1.0}, {"a": 1.0}, {"a": RISE}]) == {}, "more than, not as much as"
    assert rising_norms([{"a": 1.0}, {"a": 100.0}]) == {}, "two steps have no usual value"
    assert rising_norms([{"a": 0.0}, {"a": 0.0}, {"a": 1.0}]) == {}, "what began to train did not rise"
    assert rising_norms([{"a": 1.0}] * 2 + [{"a": float("inf")}]) == {"a": (1.0, float("inf"))}


def test_a_gradient_without_a_slope():
    found = rank_causes(origin("gradient", dtype="float32", operation="SqrtBackward0"), SOUND, CALM)
    assert found[0].what == "the gradient of Sqrt in language.layers.1.mlp.down_proj" and "root" in found[0].evidence


def test_the_loss_and_the_sum():
    assert names(origin("loss"), SOUND) == ["the loss itself"]
    assert names(origin("sum"), SOUND) == ["gradients are too large to add up"]


def test_unknown_says_what_was_ruled_out():
    (cause,) = rank_causes(origin("forward", dtype="float32", largest=1.0, weight=1.0), [*SOUND, BLACK], CALM)
    assert cause.what == "unknown, it begins in language.layers.1.mlp.down_proj"
    for ruled_out in (PIXELS, IDS, "weights are finite", "no norm of the 10 steps"):
        assert ruled_out in cause.evidence
    assert IMAGES not in cause.evidence, "an image is black: that is not ruled out"
