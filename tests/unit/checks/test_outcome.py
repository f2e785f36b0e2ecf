"""Each threshold of a validation, from both sides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmtune.checks import outcome
from vlmtune.checks.outcome import Fresh, Polled, Quantised, Replies
from vlmtune.evaluate.diversity import diversity
from vlmtune.evaluate.edge_cases import Outcome
from vlmtune.evaluate.paired import Change, paired_change
from vlmtune.evaluate.retention import LOSS, Comparison
from vlmtune.evaluate.safety import Verdict
from vlmtune.evaluate.speed import Speed
from vlmtune.evaluate.yes_no import yes_no_scores


def flipped(right: int, lost: int, gained: int, wrong: int = 0) -> Change:
    """Of samples that stayed right, became wrong, became right, stayed wrong."""
    before = [1.0] * right + [1.0] * lost + [0.0] * gained + [0.0] * wrong
    after = [1.0] * right + [0.0] * lost + [1.0] * gained + [0.0] * wrong
    return paired_change(before, after)


def judged(change: Change, metric: str = "exact_match", group: str = "old", task: str = "vqa") -> Comparison:
    return Comparison(group, task, metric, change, metric != LOSS)


def kept(change: Change, *further: Comparison):
    (finding,) = outcome.kept_findings([judged(change), *further], {"old": change})
    return finding


def test_kept():
    assert kept(flipped(190, 5, 5)).level == "pass"
    assert kept(flipped(400, 0, 0)).level == "pass"


def test_a_small_sure_loss_warns_and_a_large_one_fails():
    small = kept(flipped(970, 25, 5))
    assert small.level == "warn" and small.evidence.startswith("not all of it: 0.995 -> 0.975 (-0.020, 95% ")
    large = kept(flipped(140, 55, 5))
    assert large.level == "fail" and "vqa exact_match 0.975 -> 0.725" in large.evidence and "replay" in large.remedy


def test_few_samples_do_not_show_that_it_was_kept():
    found = kept(flipped(8, 1, 0, wrong=1))
    assert found.level == "warn" and found.evidence.startswith("too few samples to tell")


def test_one_task_that_fell_is_not_hidden_by_another_that_rose():
    fell, rose = flipped(60, 40, 0), flipped(60, 0, 40)
    comparisons = [judged(fell, task="ocr"), judged(rose, task="vqa")]
    (found,) = outcome.kept_findings(comparisons, {"old": flipped(120, 40, 40)})
    assert found.level == "fail" and "ocr exact_match 1.000 -> 0.600" in found.evidence
    assert "vqa exact_match" not in found.evidence


def test_a_loss_that_rose_warns_where_scores_cannot_move():
    still = flipped(0, 0, 0, wrong=50)
    losses = [1.0 + 0.01 * n for n in range(50)]
    risen = judged(paired_change(losses, [loss * 1.3 for loss in losses]), LOSS)
    found = kept(still, risen)
    assert found.level == "warn" and "the loss rose" in found.evidence
    hardly = judged(paired_change(losses, [loss * 1.02 for loss in losses]), LOSS)
    assert kept(still, hardly).level == "pass"


def test_many_tasks_by_chance_raise_no_alarm():
    """p = 0.04 once in ten tasks is what chance does."""
    fell = flipped(90, 8, 1)
    assert fell.p == pytest.approx(0.039, abs=1e-3)
    others = [judged(flipped(90, 4, 4), task=f"t{n}") for n in range(9)]
    (found,) = outcome.kept_findings([judged(fell), *others], {"old": flipped(900, 44, 37)})
    assert found.level == "pass"


def reached(change: Change, *further: Comparison):
    (finding,) = outcome.reached_findings([judged(change, group="new"), *further], {"new": change})
    return finding


def test_reached():
    assert reached(flipped(10, 0, 30, 10)).level == "pass"
    unsure = reached(flipped(10, 3, 5, 10))
    assert unsure.level == "warn" and unsure.evidence.startswith("not shown")
    worse = reached(flipped(10, 30, 1))
    assert worse.level == "fail" and worse.evidence.startswith("no, it got worse")


def test_reached_as_a_whole_but_not_in_every_task():
    fell = judged(flipped(10, 30, 0), group="new", task="ocr")
    (found,) = outcome.reached_findings(
        [judged(flipped(0, 0, 90), group="new"), fell], {"new": flipped(10, 30, 90)}
    )  # fmt: skip
    assert found.level == "warn" and "ocr" in found.evidence


def replies(said: list[str], true: list[str], cut: int = 0, cut_references: int = 0) -> Replies:
    return Replies("g/t", diversity(said), diversity(true), cut, cut_references)


MANY = [f"a picture of number {n}" for n in range(20)]


def test_replies_that_are_all_the_same():
    collapsed, _, _ = outcome.diversity_findings([replies(["a cat"] * 20, MANY)], 64)
    assert collapsed.level == "fail" and "100% of the replies are 'a cat'" in collapsed.evidence
    leaning, _, _ = outcome.diversity_findings([replies(["a cat"] * 8 + MANY[:12], MANY)], 64)
    assert leaning.level == "warn"
    yes_no, _, _ = outcome.diversity_findings([replies(["yes"] * 12 + ["no"] * 8, ["yes"] * 10 + ["no"] * 10)], 64)
    assert yes_no.level == "pass", "few different answers are right here"
    one_answer, _, _ = outcome.diversity_findings([replies(["blue"] * 20, ["blue"] * 20)], 64)
    assert one_answer.level == "pass"


def test_replies_that_go_round_in_circles():
    _, found, _ = outcome.diversity_findings([replies([f"{n} " + "na na hey " * 6 for n in range(20)], MANY)], 64)
    assert found.level == "warn"
    _, found, _ = outcome.diversity_findings([replies(MANY, MANY)], 64)
    assert found.level == "pass"


def test_replies_that_never_end():
    levels = [
        outcome.diversity_findings([replies(MANY, MANY, cut, long)], 64)[2].level
        for cut, long in ((0, 0), (1, 0), (3, 0), (15, 0), (15, 15))
    ]
    assert levels == ["pass", "pass", "warn", "fail", "pass"]


def test_few_samples_say_nothing_about_replies():
    (found,) = outcome.diversity_findings([replies(["a"] * 7, MANY[:7])], 64)
    assert found.level == "pass" and "not judged: at most 7 replies" in found.evidence


def polled(before: list[str], after: list[str], truths: list[str]) -> Polled:
    right = [[float(reply == truth) for reply, truth in zip(side, truths, strict=True)] for side in (before, after)]
    return Polled("random", yes_no_scores(before, truths), yes_no_scores(after, truths), paired_change(*right))


TRUTHS = ["yes", "no"] * 20


@pytest.mark.parametrize(
    ("before", "after", "level", "said"),
    [
        (TRUTHS, TRUTHS, "pass", "F1 1.000"),
        (TRUTHS, ["yes"] * 40, "fail", "always yes"),
        (["yes"] * 40, ["no"] * 40, "fail", "always no"),
        (TRUTHS, ["dunno"] * 30 + ["yes", "no"] * 5, "warn", "30 of 40 replies say neither"),
        (TRUTHS, ["yes", "no"] * 15 + ["no", "yes"] * 5, "warn", "worse than the base"),
        (["yes"] * 40, ["yes"] * 30 + ["yes", "no"] * 5, "warn", "says yes too often"),
        (["yes"] * 40, ["yes", "yes", "no", "no"] * 10, "warn", "better than always one answer (50%)"),
    ],
)
def test_yes_and_no(before, after, level, said):
    (found,) = outcome.yes_no_findings([polled(before, after, TRUTHS)])
    assert (found.level, said in found.evidence) == (level, True), found


def test_what_the_base_could_not_answer_either_is_told_once():
    blind, learned = ["yes", "yes", "no", "no"] * 10, TRUTHS
    leaning = ["no", "no", "no", "yes"] * 10
    before = [
        replace(polled(blind, blind, TRUTHS), category="random"),
        replace(polled(blind, leaning, TRUTHS), category="crowded"),
    ]
    sure = replace(polled(blind, learned, TRUTHS), category="popular")
    lost = replace(polled(learned, blind, TRUTHS), category="lost")
    popular, worse, together = outcome.yes_no_findings([*before, sure, lost])
    assert popular.level == "pass" and worse.level == "warn" and "worse than the base" in worse.evidence
    assert (together.level, together.what) == ("warn", "yes/no random, crowded")
    assert together.evidence.count("always one answer 50%, yes") == 2


def test_safety():
    def found(before: list[bool], after: list[bool]):
        verdicts = [
            [Verdict(f"p{n}", ok, "" if ok else "why") for n, ok in enumerate(side)] for side in (before, after)
        ]
        right = paired_change(*([float(ok) for ok in side] for side in (before, after)))
        (finding,) = outcome.safety_findings(*verdicts, right)
        return finding

    assert found([True] * 30, [True] * 30).level == "pass"
    one = found([True] * 30, [True] * 29 + [False])
    assert one.level == "warn" and "1 of 30" in one.evidence and "p29: why" in one.evidence
    assert found([False] * 30, [True] * 20 + [False] * 10).level == "fail", "better than the base, and still too many"
    worse = found([True] * 100, [True] * 92 + [False] * 8)
    assert worse.level == "fail" and worse.evidence.startswith("worse than the base")


def test_edge_cases():
    found = list(
        outcome.edge_findings(
            [Outcome("black", "answered", "a cat", 9), Outcome("huge", "broke", "ValueError: 3"),
             Outcome("none", "refused", "no image; add one."), Outcome("wide", "not finite", "logits")]
        )
    )  # fmt: skip
    assert [(f.level, f.evidence) for f in found] == [
        ("fail", "ValueError: 3"), ("fail", "logits"), ("pass", "1: black"), ("pass", "1: none (no image; add one)"),
    ]  # fmt: skip


def test_speed_is_judged_only_where_it_is_absurd():
    speed = Speed(0.01, 0.5, 12.0, 40, 5)
    assert outcome.speed_finding(speed, "CPU").level == "pass"
    assert outcome.speed_finding(replace(speed, tokens_per_second=0.1), "CPU").level == "warn"
    assert outcome.speed_finding(replace(speed, first_token=70.0), "CPU").level == "warn"


def test_fresh():
    fresh = Fresh(2.0, [(1.0, 1.0), (0.5, 0.5002)], True, 2, 2)
    assert outcome.fresh_finding(fresh, "it").level == "pass"
    for broken, said in (
        (replace(fresh, losses=[(1.2, 1.0)]), "answers differently"),
        (replace(fresh, losses=[(float("nan"), 1.0)]), "answers differently"),
        (replace(fresh, same_prompts=False), "other tokens"),
        (replace(fresh, error="no such file"), "no: no such file"),
    ):
        found = outcome.fresh_finding(broken, "it")
        assert found.level == "fail" and said in found.evidence
    assert outcome.fresh_finding(replace(fresh, losses=[(1.02, 1.0)], precision="bf16"), "it").level == "pass"


def test_quantised():
    losses = [1.0 + 0.01 * n for n in range(40)]
    same = paired_change(losses, losses)
    fine = Quantised("nf4", 10, 40, same, flipped(40, 0, 0))
    assert outcome.quantised_finding(fine).level == "pass"
    risen = replace(fine, loss=paired_change(losses, [loss + 0.2 for loss in losses]))
    assert outcome.quantised_finding(risen).level == "warn"
    fell = replace(fine, score=flipped(25, 15, 0))
    assert outcome.quantised_finding(fell).level == "warn"
