"""Where the first value that is not finite came from (SPEC F5).

A micro-batch is run again, forward and backward, while every module and every step of the backward is watched:

- forward: modules are looked at as they are entered and left, so the first output that is not finite belongs to the
  innermost module that made it. One that arrives at a module's door was made by the code of the module around it.
- backward: autograd numbers its steps in the order of the forward, and so does the trace the modules; each step belongs
  to the innermost module that was running when it was recorded. The first step that turns finite gradients into others
  is the one. No tensor is replaced and no tensor hook is set, so operations in place, shared inputs, custom functions,
  weights that are used without calling their module, and recomputed activations are all seen as they are.

Nothing here changes the model; what a forward changes (running statistics, random state) is put back by the caller.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmtune.models.anatomy import anatomy_of, canonical_name
from vlmtune.models.vlm import Supervised
from vlmtune.types import Batch, VlmtuneError

CAUGHT = (RuntimeError, IndexError, ValueError)
"""What a forward raises for ids, labels and shapes that do not fit. Everything else is an error of the program."""

HEAD_ROWS = 1024  # of logits at once


@dataclass(frozen=True)
class Origin:
    """The first module whose result is not finite.

    kind: "inputs" it came in with the batch, module is the first that read it; "weights" they were not finite before;
    "forward" the module made it of finite values; "gradient" the same in the backward; "loss" no module, but what is
    computed of their results; "sum" every micro-batch was finite, their sum or its norm is not; "exception" a module
    could not run at all.
    module: canonical name; layer: its class; detail: what was seen, in words; dtype: of the values that are not finite;
    largest: magnitude of the largest finite value that went in (backward: of the gradient); share: of what came out
    that is not finite, in [0, 1]; weight: magnitude of the module's largest weight; wide: largest result of the same
    module in float32; operation: of autograd; parameter: whose gradient or value it is; samples: ids of those that are
    hit, where that can be told; broken: weights and buffers that were not finite before the run.
    """

    kind: Literal["inputs", "weights", "forward", "gradient", "loss", "sum", "exception"]
    module: str
    layer: str
    detail: str
    dtype: str = ""
    largest: float | None = None
    share: float | None = None
    weight: float | None = None
    wide: float | None = None
    operation: str = ""
    parameter: str = ""
    samples: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    def sentence(self) -> str:
        """One clause for people, without a full stop."""
        of = f"{self.module} ({self.layer})" if self.layer else self.module
        match self.kind:
            case "inputs":
                return f"{self.detail}; first read by {of}"
            case "weights":
                return f"weight {self.parameter} is not finite before anything is computed"
            case "exception":
                return f"module {of} cannot run: {self.detail}"
            case "forward":
                return f"forward: first not finite in {of}, {self.detail}"
            case "gradient":
                return f"backward: first not finite in {of}, {self.detail}"
            case _:
                return self.detail


class Names:
    """Of modules and their tensors: canonical inside `model` (None: there is none), paths in `module` elsewhere."""

    def __init__(self, module: nn.Module, model: nn.Module | None):
        self.paths = {id(child): path for path, child in module.named_modules()}
        self.inside: set[int] = set()
        self.anatomy = None
        if model is not None:
            self.anatomy = anatomy_of(model)
            self.paths |= {id(child): path for path, child in model.named_modules()}
            self.inside = {id(child) for child in model.modules()}

    def module(self, module: nn.Module) -> str:
        """Its class where it has no path of its own: it is all there is."""
        return self._canonical(module, self.paths.get(id(module), "")) or type(module).__name__

    def tensor(self, module: nn.Module, name: str) -> str:
        """Of a parameter or buffer of `module`."""
        path = self.paths[id(module)]
        return self._canonical(module, f"{path}.{name}" if path else name)

    def _canonical(self, module: nn.Module, path: str) -> str:
        if id(module) not in self.inside:
            return path
        try:
            return canonical_name(self.anatomy, path)
        except VlmtuneError:  # what holds several parts is in none of them
            return path


def first_nonfinite(
    module: nn.Module, forward_backward: Callable[[], Tensor], model: nn.Module | None = None
) -> Origin | None:
    """Run `forward_backward`, which calls `module`, goes backward and returns the loss; say what went wrong first.

    None: loss and all gradients are finite. model: the vision-language model in `module`, whose parts have canonical
    names. Gradients are left in `.grad`, hooks are not.
    """
    trace = _Trace(module, Names(module, model))
    loss: Tensor | None = None
    failure: Exception | None = None
    with trace:
        try:
            loss = forward_backward()
        except CAUGHT as error:
            failure = error
    return trace.verdict(loss, failure)


# ---- looking at tensors ------------------------------------------------------------------------------------------


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of real numbers in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_in(part, str(key))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part, name)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name), part.name)


def is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_readable(tensor)).all())


def _is_mask(tensor: Tensor) -> bool:
    """Whether it is added to scores: 0 where something is seen, -inf (or the lowest number) where not."""
    if tensor.dim() < 2:
        return False
    values = _readable(tensor)
    return bool(((values == 0) | (values <= torch.finfo(values.dtype).min)).all())


def _readable(tensor: Tensor) -> Tensor:
    """Numbers of 8 bits have no arithmetic of their own."""
    return tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()


def _bad(values: Any, masks: bool = False) -> tuple[str, Tensor] | None:
    """The first tensor that is not finite. masks: what is added to scores may be infinite, and is left out."""
    for name, tensor in tensors_in(values):
        if tensor.numel() and not is_finite(tensor) and not (masks and _is_mask(tensor)):
            return name, tensor
    return None


def largest_finite(values: Any) -> float | None:
    """Magnitude of the largest finite value in all these tensors; None without any."""
    found = [
        float(finite.abs().max())
        for _, tensor in tensors_in(values)
        if (finite := (v := _readable(tensor))[torch.isfinite(v)]).numel()
    ]
    return max(found, default=None)


def _share(tensor: Tensor) -> float:
    return float((~torch.isfinite(_readable(tensor))).float().mean())


def broken_values(tensor: Tensor) -> str:
    """For people: "3 of 100 values NaN"."""
    values = _readable(tensor)
    kinds = [word for word, test in (("NaN", torch.isnan), ("infinite", torch.isinf)) if bool(test(values).any())]
    wrong = int((~torch.isfinite(values)).sum())
    return f"{wrong:,} of {tensor.numel():,} values {' or '.join(kinds)}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---- the trace ---------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """A module that is running. came_bad: what went in is not finite."""

    module: nn.Module
    args: tuple
    kwargs: dict
    came_bad: bool


class _Trace:
    """Watches one forward and backward; a context manager that leaves no hook behind."""

    def __init__(self, module: nn.Module, names: Names):
        self.module, self.names = module, names
        self.broken: dict[int, list[str]] = {}  # id of a module -> its own tensors that are not finite
        self.owner: dict[int, tuple[nn.Module, str]] = {}  # id of a parameter -> module, name of the tensor
        for child in module.modules():
            for name, tensor in child.named_parameters(recurse=False):
                self.owner.setdefault(id(tensor), (child, name))
            for name, tensor in _read_before_written(child):
                if not is_finite(tensor):
                    self.broken.setdefault(id(child), []).append(self.names.tensor(child, name))
        self.calls: list[_Call] = []
        self.called: set[int] = set()
        self.guests: dict[int, list[nn.Module]] = {}  # id of a module -> modules that were handed to it
        self.from_outside: tuple[str, Tensor] | None = None
        self.batch: Batch | None = None
        self.forward: Origin | None = None
        self.backward: Origin | None = None
        self.forward_at = self.backward_at = 0  # place in the order of the forward
        self.boundaries: list[tuple[int, nn.Module | None]] = []  # from this number on, this module is running
        self.nodes: list[Any] = []
        self.known_nodes: set[int] = set()
        self.handles: list[Any] = []
        self.is_paused = False

    def __enter__(self) -> _Trace:
        for child in self.module.modules():
            self.handles.append(child.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(child.register_forward_hook(self._leave, with_kwargs=True))
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.nodes, self.known_nodes = [], [], set()

    # ---- forward

    def _is_ignored(self) -> bool:
        """Blocks that recompute their activations run again inside the backward; that forward was seen already."""
        return self.is_paused or torch._C._current_graph_task_id() != -1

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_ignored():
            return
        is_outermost = not self.calls
        caller = None if is_outermost else self.calls[-1]
        found = None if self.forward else _bad((args, kwargs), masks=True)
        self.calls.append(_Call(module, args, kwargs, found is not None))
        self.called.add(id(module))
        self.guests.setdefault(id(module), []).extend(_guests(args, kwargs))
        if is_outermost:
            self.from_outside = found
            self.batch = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Batch)), self.batch)
        elif found is not None and self.from_outside is None:
            self._blame(caller, found[1], f"in its own code, before it calls {self.names.module(module)}")
        elif found is not None and caller.came_bad and not _is_passed_on(found[1], self.from_outside[1]):
            self._blame_inputs(caller)
        self.boundaries.append((_sequence_number(), module))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._is_ignored():
            return
        while self.calls[-1].module is not module:  # it caught an exception of a module it called
            self.calls.pop()
        call = self.calls.pop()
        found = None if self.forward else _bad(output)
        if found is not None:
            if call.came_bad and self.from_outside is not None:
                self._blame_inputs(call)
            else:
                self._blame(call, found[1], "in its result")
        self.boundaries.append((_sequence_number(), self.calls[-1].module if self.calls else None))
        if not self.calls:
            self._watch_backward([tensor for _, tensor in tensors_in(output)])

    def _blame_inputs(self, call: _Call) -> None:
        key, given = self.from_outside
        self.forward_at = self._now()
        self.forward = Origin(
            "inputs", self.names.module(call.module), type(call.module).__name__,
            f"input {key or 'of the model'}: {broken_values(given)}", _dtype(given),
            largest_finite(given), _share(given), broken=self._all_broken(),
        )  # fmt: skip

    def _blame(self, call: _Call, tensor: Tensor, where: str) -> None:
        """A module turned finite values into `tensor`: because of its weights, or by itself."""
        self.forward_at = self._now()
        inputs = (call.args, call.kwargs)
        guests = _guests(*inputs)
        # peft's wrappers have the name of what they wrap, and hand it their weights
        name = self.names.module(call.module)
        wrappers = [other.module for other in self.calls if self.names.module(other.module) == name]
        bypassed = [
            child
            for holder in (call.module, *wrappers, *guests)
            for child in holder.modules()
            if child in (call.module, *wrappers) or id(child) not in self.called
        ]
        module = next((child for child in bypassed if id(child) in self.broken), None)
        kind, parameter = ("forward", "") if module is None else ("weights", self.broken[id(module)][0])
        if module is None:
            module = next((guest for guest in guests if self._makes(guest, *inputs)), call.module)
        seen = f"{where}: {broken_values(tensor)}, {_dtype(tensor)}{list(tensor.shape)}"
        own = dict(module.named_parameters(recurse=False))
        self.forward = Origin(
            kind, self.names.module(module), type(module).__name__, seen, _dtype(tensor), largest_finite(inputs),
            _share(tensor), largest_finite(own), self._in_float32(module, call, tensor), parameter=parameter,
            samples=self._rows(tensor), broken=self._all_broken(),
        )  # fmt: skip

    @torch.no_grad()
    def _makes(self, head: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether the language head, whose weight the loss uses without calling it, is what is not finite."""
        states = next((v for v in (*args, *kwargs.values()) if isinstance(v, Supervised)), None)
        if states is None or id(head) in self.called or not isinstance(getattr(head, "weight", None), Tensor):
            return False
        with self._paused():
            return not all(is_finite(head(rows)) for rows in states.hidden.split(HEAD_ROWS))

    @torch.no_grad()
    def _in_float32(self, module: nn.Module, call: _Call, tensor: Tensor) -> float | None:
        """Largest result that a linear module has in float32, where it left the range of float16."""
        is_linear = type(module) is nn.Linear or isinstance(module, nn.modules.conv._ConvNd)
        if tensor.dtype != torch.float16 or not is_linear or module is not call.module or len(call.args) != 1:
            return None
        given = call.args[0]
        weight = module.weight.detach().float()
        bias = None if module.bias is None else module.bias.detach().float()
        with torch.autocast(given.device.type, enabled=False):
            if type(module) is nn.Linear:
                result = nn.functional.linear(given.detach().float(), weight, bias)
            else:
                result = module._conv_forward(given.detach().float(), weight, bias)
        return largest_finite(result)

    # ---- backward

    def _watch_backward(self, outputs: Sequence[Tensor]) -> None:
        """A hook on every step of autograd that these tensors came from."""
        left = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
        while left:
            node = left.pop()
            if id(node) in self.known_nodes:
                continue
            self.known_nodes.add(id(node))
            self.nodes.append(node)  # held, so that its id stays its own
            self.handles.append(node.register_hook(self._step_of(node)))
            left += [parent for parent, _ in node.next_functions if parent is not None]

    def _step_of(self, node: Any) -> Callable[[tuple, tuple], None]:
        def seen(grad_inputs: tuple, grad_outputs: tuple) -> None:
            if self.backward is not None:
                return
            arrived, made = _bad(grad_outputs), _bad(grad_inputs)
            if arrived is not None:
                # whatever sent it was looked at before, and was finite
                self._blame_step(node, arrived[1], grad_outputs, "in the sum of the gradients of its result")
            elif made is not None:
                self._blame_step(node, made[1], grad_outputs, f"in {node.name()}")

        return seen

    def _blame_step(self, node: Any, tensor: Tensor, grad_outputs: tuple, where: str) -> None:
        module, parameter = self._owner(node)
        self.backward_at = min(node._sequence_nr(), self._now())
        self.backward = Origin(
            "gradient", "the loss" if module is None else self.names.module(module),
            "" if module is None else type(module).__name__,
            f"{where}: {broken_values(tensor)}, {_dtype(tensor)}{list(tensor.shape)}", _dtype(tensor),
            largest_finite(grad_outputs), _share(tensor),
            None if module is None else largest_finite(dict(module.named_parameters(recurse=False))),
            operation=node.name(), parameter=parameter, samples=self._rows(tensor), broken=self._all_broken(),
        )  # fmt: skip

    def _owner(self, node: Any) -> tuple[nn.Module | None, str]:
        """The module a step belongs to, and the parameter whose gradient it makes ("" where it makes none)."""
        if hasattr(node, "variable"):  # it only adds to a parameter's gradient
            return self._owner_of_parameter(node.variable)
        place = bisect_right([number for number, _ in self.boundaries], node._sequence_nr()) - 1
        module = self.boundaries[place][1] if place >= 0 else None
        fed = [
            self._owner_of_parameter(p) for parent, _ in node.next_functions if (p := _parameter(parent)) is not None
        ]
        name = fed[0][1] if fed else ""
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            # a function of ours, which may use the weight of a module that is never called (the language head); where
            # that weight is frozen, no step leads to it
            used = [*(owner for owner, _ in fed if owner is not None), *self.guests.get(id(module), [])]
            module = next((owner for owner in used if id(owner) not in self.called), module)
        return module, name

    def _owner_of_parameter(self, parameter: Tensor) -> tuple[nn.Module | None, str]:
        module, name = self.owner.get(id(parameter), (None, ""))
        return module, "" if module is None else self.names.tensor(module, name)

    # ---- words

    def verdict(self, loss: Tensor | None, failure: Exception | None) -> Origin | None:
        """What the trace says, once the run is over."""
        if failure is not None and self.forward is None and self.calls and self.calls[-1].came_bad:
            self._blame_inputs(self.calls[-1])  # it refuses what came with the batch
        if failure is not None and self.forward is None:
            running = self.calls[-1].module if self.calls else self.module
            return Origin(
                "exception", self.names.module(running), type(running).__name__, " ".join(str(failure).split())[:300],
                broken=self._all_broken(),
            )  # fmt: skip
        if failure is not None:
            return self.forward
        wrong = [
            self._owner_of_parameter(p)[1]
            for p in self.module.parameters()
            if p.grad is not None and not is_finite(p.grad)
        ]
        if not is_finite(loss):
            return self.forward or Origin(
                "loss", "the loss", "", f"the loss is {float(loss)}, but what every module returned is finite",
                _dtype(loss), broken=self._all_broken(),
            )  # fmt: skip
        if not wrong:
            return None
        if self.forward is not None and (self.backward is None or self.backward_at >= self.forward_at):
            return self.forward
        return self.backward or Origin(
            "sum", "the sum of the micro-batches", "",
            f"the gradient of {wrong[0]} left its range while micro-batches were added up", parameter=wrong[0],
            broken=self._all_broken(),
        )  # fmt: skip

    def _all_broken(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for names in self.broken.values() for name in names))

    def _rows(self, tensor: Tensor) -> tuple[str, ...]:
        """Ids of the samples whose rows are not finite, where the tensor has one row per sample."""
        if self.batch is None or tensor.shape[:2] != self.batch.inputs["input_ids"].shape:
            return ()
        hit = (~torch.isfinite(_readable(tensor))).flatten(1).any(1).tolist()
        return tuple(name for name, is_hit in zip(self.batch.sample_ids, hit, strict=True) if is_hit)

    def _now(self) -> int:
        return self.boundaries[-1][0] if self.boundaries else 0

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


def _read_before_written(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own weights and buffers, but not statistics that it only writes while it trains."""
    yield from ((n, p) for n, p in module.named_parameters(recurse=False) if p.is_floating_point())
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and not _is_mask(buffer):
            yield name, buffer


def _is_passed_on(tensor: Tensor, given: Tensor) -> bool:
    """Whether `tensor` is `given` in another shape or format, and not computed of it."""
    one, other = (_readable(t) for t in (tensor, given))
    if int((~torch.isfinite(one)).sum()) != int((~torch.isfinite(other)).sum()):
        return False
    largest = [largest_finite(one), largest_finite(other)]
    return None in largest or math.isclose(*largest, rel_tol=1e-2)  # a cast keeps eight bits at least


def _guests(args: tuple, kwargs: dict) -> list[nn.Module]:
    """Modules that a module is called with."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]


def _sequence_number() -> int:
    """The number that autograd gives to the step it records now; later steps have higher ones."""
    with torch.enable_grad():
        return torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()


def _parameter(node: Any) -> Tensor | None:
    """The parameter that a step's gradient goes to, through casts and transpositions; None: it goes elsewhere."""
    for _ in range(4):
        if node is None:
            return None
        if hasattr(node, "variable"):
            return node.variable
        following = [parent for parent, _ in node.next_functions if parent is not None]
        if len(following) != 1 or not node.name().startswith(("ToCopyBackward", "TBackward", "ViewBackward")):
            return None
        node = following[0]
    return None
