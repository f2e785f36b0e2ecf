"""What a matrix says, at matrices made by hand (SPEC A7)."""

from __future__ import annotations

import pytest

from vlmtune.checks.alignment import reading, shown

COUNT = 100


def right(share: float) -> list[bool]:
    return [n < round(share * COUNT) for n in range(COUNT)]


def row(vision: float, projector: float, generated: float, chosen: float) -> dict[str, list[bool]]:
    shares = {"vision": vision, "projector": projector, "generated": generated, "by probability": chosen}
    return {name: right(share) for name, share in shares.items()}


@pytest.mark.parametrize(
    "after, level, evidence, remedy",
    [
        (row(0.9, 0.88, 0.87, 0.88), "pass", "difference +0.03", ""),
        (
            row(0.9, 0.88, 0.5, 0.52),
            "warn",
            "vision knows, language does not say",
            "the language model and the projector",
        ),
        (row(0.9, 0.55, 0.5, 0.5), "warn", "behind the projector has only .55", "train the projector in full"),
        (row(0.9, 0.9, 0.3, 0.85), "warn", "most probable of the answers is right on .85", "form of the reply"),
        (row(0.9, 0.9, 0.3, 0.6), "warn", "right on .60", "form of the reply"),
        (row(0.25, 0.25, 0.25, 0.25), "warn", "neither is better than answering without looking (0.25)", "max_pixels"),
        (row(0.27, 0.25, 0.9, 0.9), "pass", "better than what a linear probe reads", ""),
        (row(0.6, 0.6, 0.95, 0.95), "pass", "difference -0.35", ""),
    ],
)
def test_readings(after, level, evidence, remedy):
    (found,) = reading("object", right(0.25), after, after, off=40)
    assert found.level == level and found.what == "object: language says what vision shows"
    assert evidence in found.evidence and remedy in found.remedy and bool(found.remedy) == (level == "warn")
    assert "40 of 100 replies" in found.evidence if "form of" in remedy else "replies" not in found.evidence


def test_form_is_not_all_where_probability_lags_too():
    (only_form,) = reading("object", right(0.2), None, row(0.9, 0.9, 0.3, 0.88))
    (both,) = reading("object", right(0.2), None, row(0.9, 0.9, 0.3, 0.6))
    assert "more samples" not in only_form.remedy and "more samples of this level" in both.remedy


def test_what_training_lost_is_said_and_what_it_gained_is_no_complaint():
    good, bad = row(0.9, 0.9, 0.9, 0.9), row(0.9, 0.9, 0.6, 0.9)
    assert [f.what for f in reading("scene", right(0.2), good, bad)][1] == "scene: training keeps what was there"
    assert len(reading("scene", right(0.2), bad, good)) == 1 and len(reading("scene", right(0.2), None, bad)) == 1


def test_few_samples_say_nothing():
    """A gap of .15 at 20 questions is within chance, at 100 it is not."""
    small = {name: answers[:: COUNT // 20] for name, answers in row(0.9, 0.9, 0.75, 0.75).items()}
    assert reading("object", right(0.2)[:: COUNT // 20], None, small)[0].level == "pass"
    assert reading("object", right(0.2), None, row(0.9, 0.9, 0.75, 0.75))[0].level == "warn"


def test_figures_are_short():
    assert (
        shown(right(0.73)) == ".73 [.64 .81]"
        and shown(right(1.0)) == "1.00 [.96 1.00]"
        and shown(right(0.0)) == ".00 [.00 .04]"
    )
