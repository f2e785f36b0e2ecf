"""The decision tree: order, arithmetic, the two statements of SPEC C9, and settings that a config takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from transformers import AutoConfig

from vlmtune.adapt.decision import GIB, Decision, decide
from vlmtune.adapt.memory import predict
from vlmtune.adapt.plan import Policy
from vlmtune.adapt.prediction import StepSettings
from vlmtune.config import parse_config
from vlmtune.models.shapes import resolve_shape
from vlmtune.models.synthetic import BatchShape
from vlmtune.types import VlmtuneError

SHAPE = BatchShape(1, 64, 1, 56, 56, 16)
DATA = {"train": [{"scenes": "base", "task": "caption", "limit": 8}]}


@pytest.fixture(scope="module")
def config(tiny_folder):
    return AutoConfig.from_pretrained(tiny_folder("llava"))


@pytest.fixture(scope="module")
def seven_billion() -> Decision:
    """Qwen2.5-VL-7B on a card of 16 GB, 1.4 GiB of it in reserve."""
    _, config = resolve_shape("qwen2.5-vl-7b")
    return decide(config, 16 * GIB, "quality", BatchShape(1, 1024, 1, 616, 616, 256), reserve=int(1.4 * GIB))


def test_qlora_r64_of_7b_fits_on_24_gb():
    _, config = resolve_shape("qwen2.5-vl-7b")
    half = Policy("frozen", store="bf16")
    rules = [
        ("vision", half), ("projector", Policy("full", lr=5e-4)), ("embed", half), ("lm_head", half),
        ("language", Policy("lora", lr=2e-4, rank=64, store="nf4")),
    ]  # fmt: skip
    settings = StepSettings(gradient_checkpointing=True, optimizer="paged_adamw", device="cuda")
    prediction = predict(config, rules, BatchShape(1, 1024, 1, 616, 616, 256), settings)
    language = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)  # matrices of the language model
    assert prediction.stored["weights nf4"] == language // 2
    assert 8 * prediction.stored["quantisation constants"] / language == pytest.approx(0.127, abs=0.001)
    assert prediction.total < 12 * GIB  # of 24: batches may be several times as large


def test_a_mixed_plan_of_7b_fits_on_16_gb(seven_billion):
    chosen = seven_billion.chosen
    assert chosen.prediction.total <= seven_billion.limit
    methods = {match: (policy.train, policy.store) for match, policy in chosen.candidate.rules}
    assert methods["projector"] == ("full", "fp32") and methods["vision"] == ("frozen", "bf16")
    assert methods["language"] == ("lora", "nf4")
    assert chosen.candidate.rank == 64  # the best that fits comes first
    bf16 = next(o for o in seven_billion.options if o.candidate.name.startswith("LoRA r64"))
    assert bf16.prediction is None and bf16.least > seven_billion.limit


def test_every_choice_has_a_reason(seven_billion):
    text = "\n".join(seven_billion.reasons)
    words = (
        "method: QLoRA r64", "not full:", "not LoRA r8", "ranks: rank 64", "gradient checkpointing: on", "batch: 16",
        "optimizer: paged_adamw", "learning rates: ",
    )  # fmt: skip
    for word in words:
        assert word in text
    assert seven_billion.config["quantise"] == {"double": True}


@pytest.mark.slow
def test_arithmetic_is_below_every_prediction(config):
    """What is out by arithmetic would be out by prediction too."""
    decision = decide(config, GIB, "quality", SHAPE, "cpu")
    for option in decision.options[::4]:  # full, LoRA r64 or what this model has of it, QLoRA
        small = StepSettings(gradient_checkpointing=True, optimizer=option.candidate.optimizer)
        needed = predict(config, option.candidate.rules, SHAPE, small).total
        assert option.least < needed
        if option.candidate.rank is None and option.candidate.optimizer == "adamw":
            assert option.least > 0.2 * (needed - 27 * 2**20)


@pytest.mark.parametrize("goal", ["quality", "speed", "memory"])
def test_goals_choose_differently_and_configs_take_it(config, goal):
    decision = decide(config, GIB, goal, SHAPE, "cpu")
    name = {"quality": "full", "speed": "LoRA r16", "memory": "QLoRA r8"}[goal]
    assert decision.chosen.candidate.name.startswith(name)
    assert decision.chosen.checkpointing == (goal == "memory")
    wish = parse_config({"model": "embedded", "data": DATA, **decision.config})
    assert wish.optim.name == decision.chosen.candidate.optimizer
    assert wish.train.micro_batch_size == decision.chosen.micro_batch == 16
    assert [rule.match for rule in wish.plan] == [match for match, _ in decision.chosen.candidate.rules]


def test_the_micro_batch_is_the_largest_that_fits(config):
    whole = decide(config, GIB, "quality", SHAPE, "cpu").chosen
    limit = whole.needs - 1
    smaller = decide(config, limit, "quality", SHAPE, "cpu").chosen
    assert smaller.needs <= limit and smaller.micro_batch == 8
    settings = StepSettings(
        gradient_checkpointing=smaller.checkpointing, optimizer=smaller.candidate.optimizer, micro_batches=2
    )
    again = predict(config, smaller.candidate.rules, replace(SHAPE, samples=8), settings)
    assert smaller.needs == pytest.approx(again.total, rel=0.01)


def test_when_nothing_fits_the_smallest_is_named(config):
    with pytest.raises(VlmtuneError, match=r"nothing fits into 0\.0 GiB: the smallest plan \(QLoRA r8.*are missing"):
        decide(config, 2**20, "quality", SHAPE, "cpu")


def test_several_devices_hold_together_what_one_cannot(config):
    """Full fine-tuning on devices that hold no whole model with its gradients and state."""
    large = copy.deepcopy(config)
    large.text_config.intermediate_size, large.text_config.num_hidden_layers = 16_384, 8
    alone = decide(large, GIB, "quality", SHAPE, "cpu")
    assert alone.chosen.candidate.name == "full" and alone.chosen.holders == 1
    full = alone.chosen.parts
    limit = alone.chosen.least - 1
    assert decide(large, limit, "quality", SHAPE, "cpu").chosen.candidate.name != "full"
    several = decide(large, limit, "quality", SHAPE, "cpu", processes=4)
    chosen = several.chosen
    assert chosen.name == "full, in 4 parts" and chosen.needs <= limit
    assert several.config["train"]["shard"] is True
    assert "processes: 4 hold the model together" in "\n".join(several.reasons)
    kept = chosen.prediction.peak[1].items
    assert kept["optimizer"] == pytest.approx(8 * full.trained_divided / 4, rel=0.01)
    assert chosen.least < chosen.needs
    whole = next(option for option in several.options if option.name == "full")
    assert whole.sent(4) == 3 * 2 * 4 * full.trained_divided // 4
    quantised = [option for option in several.options if option.candidate.store == "nf4"]
    assert quantised and all(option.holders == 1 for option in quantised)
