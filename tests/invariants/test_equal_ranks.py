"""1 = 2 = 4 processes: the same losses and the same weights after 10 steps, in float32.

Between them only the order of sums differs. AdamW divides a gradient by its own size, which makes 1e-10 of rounding in
a gradient that is zero by symmetry (a bias on attention keys) as large as any other update; with an epsilon of the size
of usual gradients an update is proportional to its gradient, and 1e-6 is a few roundings of float32 weights of order 1.
Weights move by more than a thousand times that (asserted).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes_setup import together
from safetensors.torch import load_file, save_file
from sizes_of_tests import by_default
from torch import nn
from training_setup import Setup, full_rules, lora_rules, make_trainer, part_modules, write_data

from vlmtune.adapt.plan import Policy
from vlmtune.data.share import Share
from vlmtune.losses.balance import GradNorm, InitialLosses, Uncertainty
from vlmtune.losses.objective import Objective
from vlmtune.models.tiny import FAMILIES
from vlmtune.observer import Observer
from vlmtune.processes import Group
from vlmtune.schedule import piecewise
from vlmtune.shards import is_in_parts

STEPS, LR, EPS, SAME = 10, 0.02, 1e-2, 1e-6


def lora(model: nn.Module) -> list[tuple[str, Policy]]:
    return [
        (name, policy if policy.train == "frozen" else replace(policy, lr=LR)) for name, policy in lora_rules(model)
    ]


def full(model: nn.Module) -> list[tuple[str, Policy]]:
    return full_rules(model, lr=LR)


def mixed(model: nn.Module) -> list[tuple[str, Policy]]:
    """The tower under LoRA, the projector in full, an adapter in the language model, the head in full."""
    wishes = {
        "vision": Policy("lora", lr=LR, rank=2, alpha=4.0),
        "projector": Policy("full", lr=LR),
        "language": Policy("adapter", lr=LR, options={"dim": 8}),
    }
    return [(part, wishes.get(part, Policy("frozen"))) for part, modules in part_modules(model).items() if modules]


class Losses(Observer):
    def __init__(self):
        self.seen: list[dict] = []

    def on_step(self, state, metrics):
        self.seen.append({name: metrics[name] for name in ("loss", "losses", "norms", "samples", "tokens")})


def trained(
    size: int, folder: Path, model_folder: Path, data: Path, rules, objective=None, shard=False, **how
) -> list[dict]:
    """What every step reported, the same in all of `size` processes; weights are left in `folder`. shard: each holds a
    part of the model."""

    def work(group: Group) -> list[dict]:
        seen = Losses()
        setup = make_trainer(
            model_folder, data, folder / "checkpoints", rules, STEPS, checkpoint_every=100, eps=EPS, observers=[seen],
            parts={"processes": group}, holders=group if shard else None, **how,
        )  # fmt: skip
        if objective is not None:
            setup.trainer.module.objective = objective(setup)
            for extra in setup.trainer.module.objective.optimizer_groups(LR):
                setup.trainer.optimizer.add_param_group(extra | {"peak_lr": extra["lr"]})
                setup.trainer.settings.rates["balance"] = next(iter(setup.trainer.settings.rates.values()))
        lengths = [len(setup.encoder.encode(setup.steps.sources[0][row])) for row in range(12)]
        setup.steps.share = Share(group.rank, group.size, [lengths.__getitem__])
        setup.trainer.fit()
        weights = setup.plan.parameters | {
            f"objective.{name}": value for name, value in setup.trainer.module.objective.state_dict().items()
        }
        whole = {name: value.full_tensor() if is_in_parts(value) else value for name, value in weights.items()}
        assert not shard or any(is_in_parts(value) for value in weights.values())
        save_file({name: value.detach().clone() for name, value in whole.items()}, folder / f"{group.rank}.safetensors")
        return seen.seen

    said = together(size, folder, work)
    assert isinstance(said[0], list), said[0]
    assert all(told == said[0] for told in said)
    for rank in range(1, size):  # to the bit
        first, other = (load_file(folder / f"{number}.safetensors") for number in (0, rank))
        assert all(torch.equal(first[name], other[name]) for name in first)
    return said[0]


@pytest.fixture
def compare(tmp_path, model_folder) -> Callable:
    data = write_data(tmp_path / "data", 12)

    def run(name: str, rules, objective=None, sizes=(2, 4), **how) -> None:
        one = trained(1, tmp_path / "1", model_folder(name), data, rules, objective, **how)
        weights = load_file(tmp_path / "1" / "0.safetensors")
        fresh = make_trainer(model_folder(name), data, tmp_path / "x", rules).plan.parameters
        moved = max(float((weights[n] - p.detach()).abs().max()) for n, p in fresh.items())
        assert weights.keys() >= fresh.keys() and moved > 1000 * SAME
        for size in sizes:
            several = trained(size, tmp_path / str(size), model_folder(name), data, rules, objective, **how)
            for step, other in zip(one, several, strict=True):
                assert other["samples"] == step["samples"] == 4 and other["tokens"] == step["tokens"]
                for key in ("losses", "norms"):
                    assert other[key] == pytest.approx(step[key], rel=1e-4, abs=1e-6)
                assert other["loss"] == pytest.approx(step["loss"], rel=1e-6)
            for tensor, value in load_file(tmp_path / str(size) / "0.safetensors").items():
                torch.testing.assert_close(value, weights[tensor], atol=SAME, rtol=SAME, msg=tensor)

    return run


@pytest.mark.parametrize("name", by_default(["llava"], FAMILIES))
def test_under_lora(name, compare):
    """With 4 processes one of them has nothing but a text in the step of the sample without an image."""
    compare(name, lora)


@pytest.mark.parametrize("name", by_default(["qwen2_5_vl"], FAMILIES))
def test_in_full(name, compare):
    compare(name, full)


@pytest.mark.parametrize("name", by_default(["smolvlm"], FAMILIES))
def test_mixed(name, compare):
    compare(name, mixed)


@pytest.mark.parametrize("rules", by_default([mixed], [full, mixed]))
@pytest.mark.parametrize("name", by_default(["qwen2_5_vl"], FAMILIES))
def test_each_holds_a_part_of_the_model(name, rules, compare):
    """FSDP2. In some steps a process has nothing but a text, or fewer micro-batches than another."""
    compare(name, rules, shard=True)


def test_unfreezing(compare):
    """The language model starts in the middle of the run, with a state of its own; 4 samples do not divide by 3."""
    compare("llava", lora, sizes=(3,), over={"language": piecewise([[0, 0], [0.5, 1.0]])})


def uncertainty(setup: Setup) -> Objective:
    return Objective(balance=Uncertainty(["caption", "vqa"]))


def gradnorm(setup: Setup) -> Objective:
    shared = [p for name, p in setup.plan.parameters.items() if name.startswith("projector")]
    return Objective(balance=GradNorm(InitialLosses(["caption", "vqa"], 2), shared))


@pytest.mark.parametrize("objective", by_default([gradnorm], [uncertainty, gradnorm]))
def test_balance_between_tasks(objective, compare):
    """With 4 processes each of them has one task in a step: what is learned of tasks is learned of all samples."""
    compare("llava", lora, objective, sizes=(4,))
