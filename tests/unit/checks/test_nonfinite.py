"""The first module whose result is not finite, on small modules where it is known (SPEC F5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmtune.checks.nonfinite import Origin, first_nonfinite


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Root(nn.Module):
    """sqrt(|x|): finite at 0, its gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Flat(torch.autograd.Function):
    """0 / 0 in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Flat.apply(x)


@dataclass
class Result:
    first: Tensor
    rest: dict[str, list[Tensor]]


class Nested(nn.Module):
    """Its result is deep in a dataclass, a dictionary and a list; what it computes is log of x - 1."""

    def forward(self, x: Tensor) -> Result:
        return Result(x, {"logs": [x, (x - 1).log()]})


class Around(nn.Module):
    """Code of its own around two modules."""

    def __init__(self, first: nn.Module, own: Callable[[Tensor], Tensor], second: nn.Module):
        super().__init__()
        self.first, self.own, self.second = first, own, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.own(self.first(x)))


class Bypass(nn.Module):
    """Uses the weight of a module that it never calls."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).add_(1)


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def find(module: nn.Module, x: Tensor, loss: Callable[[object], Tensor] = lambda out: out.sum()) -> Origin | None:
    """Gradients that are there already stay, as of micro-batches before."""

    def run() -> Tensor:
        total = loss(module(x))
        total.backward()
        return total.detach()

    origin = first_nonfinite(module, run)
    hooks = [child._forward_hooks or child._forward_pre_hooks or child._backward_hooks for child in module.modules()]
    assert not any(hooks)
    return origin


def place(origin: Origin | None) -> tuple[str, str] | None:
    return None if origin is None else (origin.kind, origin.module)


def leaf(values: list[float] = (1.0, 2.0, 3.0, 4.0)) -> Tensor:
    return torch.tensor([list(values)], requires_grad=True)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_sound():
    assert find(nn.Sequential(linear(), nn.ReLU(), linear()), leaf()) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_came_so(bad):
    origin = find(nn.Sequential(nn.Identity(), linear()), leaf([1.0, bad, 0.0, 0.0]))
    assert origin.kind == "inputs" and "1 of 4 values" in origin.detail


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight(bad, name):
    module = nn.Sequential(linear(), nn.Sequential(nn.ReLU(), linear()))
    getattr(module[1][1], name).data[0] = bad
    origin = find(module, leaf())
    assert place(origin) == ("weights", "1.1") and origin.parameter == f"1.1.{name}"
    assert origin.broken == (f"1.1.{name}",) and origin.layer == "Linear"


def test_a_buffer():
    module = nn.Sequential(linear(), nn.BatchNorm1d(4)).eval()
    module[1].running_var[2] = float("nan")
    origin = find(module, leaf())
    assert place(origin) == ("weights", "1") and origin.parameter == "1.running_var"


def test_statistics_that_are_only_written_are_no_cause():
    """A BatchNorm that trains does not read them; an earlier forward may have spoilt them."""
    module = nn.Sequential(nn.BatchNorm1d(4), Root())
    module[0].running_mean[:] = float("nan")
    x = torch.zeros(2, 4, requires_grad=True)
    assert place(find(module, x)) == ("gradient", "1")


def test_a_weight_that_is_used_without_its_module():
    module = nn.Sequential(linear(), Bypass())
    module[1].inner.weight.data[0, 0] = float("nan")
    origin = find(module, leaf())
    assert place(origin) == ("weights", "1.inner") and origin.parameter == "1.inner.weight"


def test_a_weight_that_nothing_reads_is_no_cause():
    module = nn.Sequential(linear(), Doubled())
    module[1].unused = nn.Parameter(torch.tensor(float("nan")))
    assert find(module, leaf()) is None


def test_the_innermost_module_is_named():
    module = nn.Sequential(linear(), nn.Sequential(nn.Sequential(Nested())))
    origin = find(module, leaf(), lambda out: out.rest["logs"][1].sum())
    assert place(origin) == ("forward", "1.0.0") and "NaN" in origin.detail


@pytest.mark.parametrize("own", [lambda x: (x - 1e9).log(), lambda x: x / 0.0])
def test_code_between_two_modules_belongs_to_the_one_around_them(own):
    module = nn.Sequential(nn.Identity(), Around(nn.ReLU(), own, linear()))
    origin = find(module, leaf())
    assert place(origin) == ("forward", "1")
    assert "before it calls 1.second" in origin.detail


def test_code_behind_the_last_module():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) - 1e9).sqrt()

    assert place(find(nn.Sequential(Behind()), leaf())) == ("forward", "0")


def test_a_module_that_is_called_twice():
    shared = linear()
    shared.weight.data.mul_(1e25)
    module = Around(shared, lambda x: x, shared)
    origin = find(module, leaf())
    assert place(origin) == ("forward", "first") and origin.largest > 1e24


def test_infinite_masks_are_no_fault():
    class Attention(nn.Module):
        def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
            return (scores + mask).softmax(-1)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.attention, self.then = linear(), Attention(), Root()
            self.register_buffer("mask", torch.full((4, 4), -float("inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.then(self.attention(self.scores(x), mask=self.mask) - 0.25)

    module = Masked()
    module.scores.weight.data.zero_()
    module.scores.bias.data.zero_()
    # the last row attends to all four alike: it is 0.25, where the root has no slope
    assert place(find(module, torch.zeros(4, 4))) == ("gradient", "then")


@pytest.mark.parametrize("module", [Root(), nn.Sequential(Doubled(), Root())])
def test_a_root_of_zero_in_the_backward(module):
    module = nn.Sequential(nn.Linear(4, 4, bias=False), module, nn.Identity())
    origin = find(module, torch.zeros(1, 4))
    name = "1" if isinstance(module[1], Root) else "1.1"
    assert place(origin) == ("gradient", name)
    assert origin.layer == "Root" and "Backward" in origin.operation


def test_a_function_of_ours_in_the_backward():
    origin = find(nn.Sequential(linear(), Custom(), linear()), leaf())
    assert place(origin) == ("gradient", "1") and origin.operation == "FlatBackward"


def test_a_frozen_part_has_no_backward_and_is_still_named_in_the_forward():
    frozen = nn.Sequential(linear(), Nested()).requires_grad_(False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.head = frozen, linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tower(x).rest["logs"][1])

    assert place(find(Model(), torch.full((1, 4), -5.0))) == ("forward", "tower.1")


def test_operations_in_place():
    module = nn.Sequential(linear(), InPlace(), nn.Sigmoid(), Root(), Doubled(), nn.ReLU(inplace=True))
    assert find(module, leaf()) is None
    module[0].weight.data.zero_()
    module[0].bias.data.zero_()
    module[2] = Around(nn.Identity(), lambda x: x - 1, nn.Identity())  # 2 * 0 + 1 - 1
    assert place(find(module, leaf())) == ("gradient", "3")


def test_recomputed_activations():
    module = nn.Sequential(linear(), Recomputed(nn.Sequential(linear(), Doubled(), Root())), linear())
    module[1].inner[0].weight.data.zero_()
    module[1].inner[0].bias.data.zero_()
    assert place(find(module, leaf())) == ("gradient", "1.inner.2")
    module.zero_grad()
    module[1].inner[0].bias.data.fill_(1.0)
    assert find(module, leaf()) is None
    module[1].inner[0].weight.data.fill_(float("inf"))
    assert place(find(module, leaf())) == ("weights", "1.inner.0")


def test_a_residual_is_not_blamed_for_the_branch():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.norm = Root(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.branch(x)

    module = nn.Sequential(linear(), Residual(), nn.Identity())
    module[0].weight.data.zero_()
    module[0].bias.data.zero_()
    assert place(find(module, leaf())) == ("gradient", "1.branch")


def test_what_a_where_hides_in_the_forward_and_not_in_the_backward():
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, torch.zeros_like(x))

    module = nn.Sequential(linear(), Nested(), Hidden())
    module[0].weight.data.zero_()
    module[0].bias.data.copy_(torch.tensor([3.0, 3.0, 3.0, 1.0]))  # log of 0 in the last

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[2](self.parts[1](self.parts[0](x)).rest["logs"][1])

    origin = find(Model(), leaf())
    assert place(origin) == ("forward", "parts.1")


def test_values_that_are_not_finite_and_do_no_harm():
    class Dropped(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, (x.detach() - 1e9).log()

    module = nn.Sequential(linear(), Dropped())
    assert find(module, leaf(), lambda out: out[0].sum()) is None


def test_a_loss_that_no_module_makes():
    origin = find(nn.Sequential(linear()), leaf(), lambda out: (out.sum() - 1e9).log())
    assert origin.kind == "loss" and "nan" in origin.detail


def test_an_exception_names_the_module_that_was_running():
    module = nn.Sequential(linear(), nn.Sequential(nn.ReLU(), nn.Linear(5, 1)))
    origin = find(module, leaf())
    assert place(origin) == ("exception", "1.1") and "cannot be multiplied" in origin.detail


def test_an_error_of_the_program_is_not_swallowed():
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.no_such_thing

    with pytest.raises(AttributeError):
        find(nn.Sequential(Wrong()), leaf())


def test_gradients_that_overflow_when_they_are_added():
    module = linear()
    module.weight.data.fill_(1e-9)
    module.weight.grad = torch.full((4, 4), 3e38)  # of the micro-batches before
    origin = find(module, torch.full((1, 4), 1e38))
    assert place(origin) == ("sum", "the sum of the micro-batches") and origin.parameter == "weight"


def test_float16_says_what_float32_would_give():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    module[0].weight.data.fill_(1e4)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            total = module(torch.full((1, 4), 10.0)).float().sum()
        total.backward()
        return total.detach()

    origin = first_nonfinite(module, run)
    assert place(origin) == ("forward", "0") and origin.dtype == "float16"
    assert origin.wide == pytest.approx(4e5, rel=1e-2)  # bits of float16 in the weights
    assert origin.largest == pytest.approx(10.0) and origin.weight == pytest.approx(1e4)
    assert origin.share == 1.0


def test_sequence_numbers_are_those_of_the_forward():
    """What the backward is attributed by: steps of autograd are numbered as they are recorded."""
    x = torch.ones(2, requires_grad=True)
    first, second = x * 2, None
    second = first + 1
    third = Flat.apply(second)
    numbers = [t.grad_fn._sequence_nr() for t in (first, second, third)]
    assert numbers == sorted(set(numbers))
