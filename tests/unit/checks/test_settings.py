"""Values of a config that are judged: each complaint for its reason, none about what is usual (SPEC H1)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from vlmtune.adapt.plan import Policy
from vlmtune.checks.settings import Course, generation_finding, settings_findings, usual_rate

USUAL = Course(
    steps=1000, warmup={"projector": 30}, clips=[1.0], epochs={"a.jsonl": 2.0}, held_out=["val"], checkpoint_every=200,
    evaluate_every=100, batch=16, all_rows=5000,
    precision="bf16", is_on_cpu=False, has_fast_bf16=True,
)  # fmt: skip
PROJECTOR = {"part": "projector", "rule": "projector", "method": "full", "parameters": 20_000_000,
             "trainable": 20_000_000, "lr": 5e-4, "weight_decay": 0.01}  # fmt: skip
LANGUAGE = {"part": "language", "rule": "language", "method": "lora r16 α32", "parameters": 7_000_000_000,
            "trainable": 40_000_000, "lr": 2e-4, "weight_decay": 0.0}  # fmt: skip
FROZEN = {"part": "vision", "rule": "vision", "method": "frozen", "parameters": 600_000_000, "trainable": 0, "lr": None,
          "weight_decay": None}  # fmt: skip
ROWS = [PROJECTOR, LANGUAGE, FROZEN]
POLICIES = {
    "projector": Policy("full", lr=5e-4, weight_decay=0.01),
    "language": Policy("lora", lr=2e-4, rank=16, alpha=32.0),
    "vision": Policy("frozen"),
}


def odd(rows=ROWS, policies=POLICIES, parameters=None, **changed) -> dict[str, str]:
    """What is not passed -> evidence and remedy."""
    found = settings_findings(rows, policies, parameters or {}, replace(USUAL, **changed))
    assert {finding.level for finding in found} <= {"pass", "warn"} and all(finding.evidence for finding in found)
    return {f.what: f"{f.evidence}; {f.remedy}" for f in found if f.level != "pass"}


def test_the_handbook_s_settings_are_usual():
    assert odd() == {}


def test_recipes_that_ship_have_usual_rates():
    """The rule of size and method covers 9 million parameters and 7 billion alike."""
    assert 1e-4 < usual_rate(7_000_000_000, True) < 3e-4 and usual_rate(7_000_000_000, False) == pytest.approx(2e-5)
    assert 2e-3 < usual_rate(6_000_000, True) < 2e-2


@pytest.mark.parametrize(
    ("row", "lr", "said"),
    [
        (LANGUAGE, 2e-2, "far above: language 0.02"), (PROJECTOR, 0.5, "far above: projector 0.5"),
        (LANGUAGE, 2e-8, "far below: language 2e-08"),
    ],
)  # fmt: skip
def test_a_slip_in_an_exponent(row, lr, said):
    found = odd([{**r, "lr": lr} if r is row else r for r in ROWS])
    assert list(found) == ["learning rates are usual"] and said in found["learning rates are usual"]


def test_full_training_takes_less_than_lora():
    rows = [{**LANGUAGE, "method": "full", "lr": 5e-4}]
    assert "far above" in odd(rows)["learning rates are usual"]
    assert odd([{**LANGUAGE, "lr": 5e-4}]) == {}


@pytest.mark.parametrize(
    ("changed", "what", "said"),
    [
        ({"warmup": {"projector": 400}}, "warmup is usual", "400 of 1000 steps, 40%"),
        ({"warmup": {"projector": 0}}, "warmup is usual", "none, and projector trains in full"),
        ({"clips": [None]}, "gradients are clipped", "no limit"),
        ({"clips": [1.0, 100.0]}, "gradients are clipped", "at 100"),
        ({"clips": [1e-6]}, "gradients are clipped", "at 1e-06"),
        ({"epochs": {"a.jsonl": 1.0, "b.jsonl": 40.0}}, "no source is read too often", "b.jsonl 40 times"),
        ({"evaluate_every": 1000}, "held-out data is looked at on the way", "every 1,000 steps, and the run has 1,000"),
        ({"batch": 64, "all_rows": 40}, "a batch holds no row twice", "64 samples of 40 rows"),
        ({"epochs": {"a.jsonl": 1.0, "b.jsonl": 0.0}}, "every source is read", "not one sample of b.jsonl"),
        ({"held_out": []}, "something is held out", "data.eval is empty"),
        ({"steps": 2000, "checkpoint_every": 5000}, "checkpoints are written on the way", "every 5,000 steps"),
        ({"precision": "fp16", "is_on_cpu": True}, "the number format suits the machine", "float16 on a CPU"),
        ({"precision": "bf16", "has_fast_bf16": False}, "the number format suits the machine", "emulated"),
    ],
)
def test_a_value_out_of_range(changed, what, said):
    found = odd(**changed)
    assert list(found) == [what] and said in found[what]


@pytest.mark.parametrize(
    "changed",
    [
        {"warmup": {}},
        {"evaluate_every": None},
        {"all_rows": None},
        {"steps": 900, "checkpoint_every": 5000},
        {"epochs": {}},
    ],
)
def test_what_is_no_fault(changed):
    assert odd(**changed) == {}


def test_weight_decay_that_pulls_everything_to_zero():
    assert "projector 0.9" in odd([{**PROJECTOR, "weight_decay": 0.9}])["weight decay is usual"]


@pytest.mark.parametrize(
    ("rank", "alpha", "is_odd"), [(16, 32.0, False), (16, 1024.0, True), ({"qk": 4, "vo": 64}, 8.0, True)]
)
def test_alpha_far_from_its_rank(rank, alpha, is_odd):
    found = odd(policies={"language": Policy("lora", lr=2e-4, rank=rank, alpha=alpha)})
    assert ("LoRA's alpha fits its rank" in found) == is_odd


def test_a_rank_as_large_as_the_matrix():
    def lora(rank: int, inner: int, outer: int) -> dict[str, nn.Parameter]:
        return {
            "language.layers.0.q.lora_A.default.weight": nn.Parameter(torch.zeros(rank, inner)),
            "language.layers.0.q.lora_B.default.weight": nn.Parameter(torch.zeros(outer, rank)),
        }

    assert odd(parameters=lora(16, 256, 64)) == {}
    said = odd(parameters=lora(64, 256, 64))["LoRA is smaller than what it adapts"]
    assert "1 modules, first language.layers.0.q (64 x 256, rank 64)" in said


@pytest.mark.parametrize(("replies", "is_odd"), [([5, 9, 64], False), ([5, 9, 65], True), ([65] + [5] * 20, False)])
def test_replies_longer_than_what_is_generated(replies, is_odd):
    found = generation_finding(replies, 64)
    assert (found.level == "warn") == is_odd and f"the longest of {len(replies)}" in found.evidence
