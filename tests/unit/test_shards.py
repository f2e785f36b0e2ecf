"""Tensors in parts, in four processes: rows, norms, statistics and files are those of the whole tensor.

Five rows over four processes: two, two, one, none; the bias of one number lies in the first process alone.
"""

from __future__ import annotations

import pytest
import torch
from processes_setup import together
from safetensors.torch import load_file, save_file
from torch import nn

from vlmtune.adapt.plan import Plan, Policy
from vlmtune.models.vocabulary import NewTokens
from vlmtune.optim.clip import clip_gradients, gradient_norms
from vlmtune.optim.optimizer import build_adamw, load_optimizer_tensors, optimizer_tensors, stored_like
from vlmtune.optim.statistics import GradientStatistics
from vlmtune.shards import fold, in_parts_like, is_in_parts, is_sharded, own_rows, rows_of, shard
from vlmtune.tensor_file import fill_in, lay_out, pieces_of, read_tensors
from vlmtune.types import VlmtuneError

SIZE = 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(3, 5)
        self.adapter = nn.Linear(3, 5, bias=False)
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.block(x) + self.adapter(x))


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def batch() -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def taken_apart(group) -> Small:
    model = Small()
    shard(model, [model.block], group.mesh(torch.device("cpu")), [model.adapter.weight])
    return model


def with_gradients(group) -> Small:
    """Each process has two samples of eight; the adapter's gradient is added up by hand, as a step does it."""
    model = taken_apart(group)
    model(batch()[group.rank :: SIZE]).pow(2).sum().backward()
    group.add_up("adapter", [model.adapter.weight.grad])
    return model


def whole_with_gradients() -> Small:
    model = Small()
    model(batch()).pow(2).sum().backward()
    return model


def groups_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    parameters = named(model)
    return {"last": [parameters["last.weight"], parameters["last.bias"]],
            "rest": [parameters[name] for name in ("block.weight", "block.bias", "adapter.weight")]}  # fmt: skip


def test_every_row_lies_in_one_process(tmp_path):
    def work(group):
        model = taken_apart(group)
        assert is_sharded(model) and not is_in_parts(model.adapter.weight)
        block = model.block.weight
        again = in_parts_like(own_rows(block).clone(), block)
        assert torch.equal(again.full_tensor(), block.full_tensor())
        return {n: [rows_of(p).start, own_rows(p).tolist()] for n, p in named(model).items() if is_in_parts(p)}

    said = together(SIZE, tmp_path, work)
    for name, parameter in named(Small()).items():
        if name == "adapter.weight":
            continue
        rows = [row for part in said for row in part[name][1]]
        assert rows == parameter.tolist()
        starts = [part[name][0] for part in said]
        assert starts == [sum(len(part[name][1]) for part in said[:rank]) for rank in range(SIZE)]
    assert [len(part["block.weight"][1]) for part in said] == [2, 2, 1, 0]


def test_gradients_are_sums_and_their_norms_those_of_all_rows(tmp_path):
    def work(group):
        model = with_gradients(group)
        gradients = {n: (p.grad.full_tensor() if is_in_parts(p.grad) else p.grad).tolist()
                     for n, p in named(model).items()}  # fmt: skip
        norms = clip_gradients(groups_of(model), 0.5, {"last": 0.25}, lambda squares: group.add_up("norms", [squares]))
        clipped = gradient_norms(groups_of(model), lambda squares: group.add_up("norms", [squares]))
        return [gradients, *({n: float(v) for n, v in found.items()} for found in (norms, clipped))]

    whole = whole_with_gradients()
    expected = {name: parameter.grad.tolist() for name, parameter in named(whole).items()}
    before = {n: float(v) for n, v in clip_gradients(groups_of(whole), 0.5, {"last": 0.25}).items()}
    after = {n: float(v) for n, v in gradient_norms(groups_of(whole)).items()}
    assert before["rest"] > 0.5 and before["last"] > 0.25, "both limits matter"
    for gradients, norms, clipped in together(SIZE, tmp_path, work):
        for name, rows in expected.items():
            torch.testing.assert_close(torch.tensor(gradients[name]), torch.tensor(rows))
        assert norms == pytest.approx(before, rel=1e-5)
        assert clipped == pytest.approx(after, rel=1e-5)


def test_statistics_are_those_of_all_rows(tmp_path):
    def measured(model: nn.Module, gather=None) -> dict[str, list[float]]:
        statistics = GradientStatistics(named(model), gather)
        begun = statistics.begin()
        with torch.no_grad():
            for parameter in named(model).values():
                own_rows(parameter).sub_(own_rows(parameter.grad), alpha=0.1)
        return {name: list(vars(row).values()) for name, row in statistics.end(begun).items()}

    expected = measured(whole_with_gradients())
    for rows in together(
        SIZE, tmp_path, lambda group: measured(with_gradients(group), lambda own: group.gather("s", own))
    ):
        assert rows.keys() == expected.keys()
        for name, row in expected.items():
            assert rows[name] == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_a_file_of_rows_is_the_file_of_one(tmp_path):
    """Written by four, read by anybody, and by four again; other formats and numbers without dimensions too."""
    further = {
        "step": torch.tensor(3.0),
        "mask": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    path = tmp_path / "rows.safetensors"

    def work(group):
        tensors = named(taken_apart(group)) | further
        if group.is_first:
            lay_out(path, tensors)
        group.wait_for_all("room")
        fill_in(path, pieces_of(tensors, whole=group.is_first))
        group.wait_for_all("rows")
        read = read_tensors(path, tensors)
        return all(torch.equal(read[name], own_rows(value)) for name, value in tensors.items())

    assert together(SIZE, tmp_path / "store", work) == [True] * SIZE
    expected = {name: value.detach() for name, value in named(Small()).items()} | further
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


def test_a_file_of_one_is_read_by_rows(tmp_path):
    path = tmp_path / "one.safetensors"
    save_file({name: value.detach() for name, value in named(Small()).items()}, path)
    save_file({"block.weight": torch.zeros(6, 3)}, tmp_path / "other.safetensors")

    def work(group):
        tensors = named(taken_apart(group))
        with pytest.raises(ValueError, match=r"block.weight has shape \(6, 3\), not \(5, 3\)"):
            read_tensors(tmp_path / "other.safetensors", tensors)
        return all(torch.equal(value, own_rows(tensors[name])) for name, value in read_tensors(path, tensors).items())

    assert together(SIZE, tmp_path / "store", work) == [True] * SIZE


def test_the_optimizer_goes_on_from_its_rows(tmp_path):
    """AdamW on rows is AdamW on the whole, and its state returns to where it was."""

    def optimizer_of(model: nn.Module):
        plan = Plan(named(model), dict.fromkeys(named(model), "*"), {"*": Policy("full", lr=0.1)}, [], [], frozenset(),
                    NewTokens(), {})  # fmt: skip
        return build_adamw(plan.optimizer_groups(), (0.9, 0.999), 1e-8)

    def work(group):
        model, path = with_gradients(group), tmp_path / "state.safetensors"
        optimizer = optimizer_of(model)
        optimizer.step()
        state = optimizer_tensors(optimizer)
        if group.is_first:
            lay_out(path, state)
        group.wait_for_all("room")
        fill_in(path, pieces_of(state, whole=group.is_first))
        group.wait_for_all("rows")
        other = optimizer_of(model)
        load_optimizer_tensors(other, read_tensors(path, stored_like(other)))
        again = optimizer_tensors(other)
        assert all(torch.equal(own_rows(again[name]), own_rows(value)) for name, value in state.items())
        other.step()
        with pytest.raises(VlmtuneError, match="fits no trained parameter"):
            load_optimizer_tensors(other, {"x/step": torch.tensor(1.0)})
        return {n: (p.full_tensor() if is_in_parts(p) else p).tolist() for n, p in named(model).items()}

    whole = whole_with_gradients()
    optimizer = optimizer_of(whole)
    optimizer.step()
    optimizer.step()
    for said in together(SIZE, tmp_path / "store", work):
        for name, parameter in named(whole).items():
            torch.testing.assert_close(torch.tensor(said[name]), parameter.detach())


def test_a_forward_alone_is_given_back(tmp_path):
    def work(group):
        model = taken_apart(group)
        with torch.no_grad():
            model(batch())
        gathered = is_in_parts(model.last.weight)
        fold(model)
        return [gathered, is_in_parts(model.last.weight)]

    assert together(2, tmp_path, work) == [[False, True]] * 2
