"""Tensors without data, and the bytes they would take: what a step allocates, counted without running it.

Inside `Ledger` a floating tensor has a shape, a dtype and a device but no data (torch's FakeTensor), while integer and
bool tensors are real: models ask grids, masks and lengths for their values. Every operation that a model, a loss, the
autograd engine or an optimizer runs goes through the ledger's dispatch, which books each new storage and strikes it
off when it dies. Nothing is computed, so a step of a 72B model costs what Python costs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READ_BACK = ("aten::linspace", "aten::scalar_tensor")
"""Floats that models read back while they are built (drop-path rates): they stay real, and are tiny."""

_CONDITIONS = ("aten::where", "aten::masked_fill", "aten::masked_fill_")

_VIEWS = {
    torch.ops.aten.detach.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default,
    torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.slice.Tensor,
    torch.ops.aten.unsqueeze.default, torch.ops.aten.expand.default, torch.ops.aten.select.int,
}  # fmt: skip
"""Most calls of a step, all on one tensor and with kernels that know of tensors without data."""

_FILLS = {torch.ops.aten.uniform_.default, torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}

_CPU = torch.device("cpu")

_LARGE = 2**20  # numbers in a real float tensor (pixels) from which on a selection of it has no data


@dataclass(frozen=True)
class Peak:
    """Most bytes alive at once within a place, and what they were: item -> bytes."""

    total: int
    items: dict[str, int]


class Ledger(TorchDispatchMode):
    """Books bytes while it is entered.

    device: whose kernels' own temporaries are counted: on CPUs an elementwise operation first converts operands of
    another dtype than the common one, on GPUs it converts them number by number. Tensors are on the CPU either way.
    item: what new storages are booked under; place: the stretch of the step whose peak is kept. live: item -> bytes
    alive now; total: their sum; peaks: place -> `Peak`, in the order in which places were reached.
    """

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu") -> None:
        super().__init__()
        self.device = device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # weak references to what it made, which forbid `Module.to` on it
        self._memo = self.fake.fake_tensor_converter.meta_converter.tensor_memo
        self.item, self.place = "weights", "build"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        self._books: dict[int, tuple[weakref.ref, str, int]] = {}
        self._made: dict[Any, _Made] = {}

    def move(self, tensors: Iterable[Tensor], item: str) -> None:
        """Book what is alive under another item."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            if key in self._books:
                storage, old, size = self._books[key]
                self.live[old] -= size
                self.live[item] += size
                self._books[key] = (storage, item, size)

    def book(self, tensor: Tensor) -> None:
        """Book the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._books or not size:
            return
        self._books[key] = (weakref.ref(storage, lambda _: self._strike(key)), self.item, size)
        self.live[self.item] += size
        self.total += size
        self._note_peak()

    def touch(self, extra: int) -> None:
        """Bytes that exist only for a moment inside an operation."""
        self.live[self.item] += extra
        self.total += extra
        self._note_peak()
        self.live[self.item] -= extra
        self.total -= extra

    def _note_peak(self) -> None:
        if self.place not in self.peaks or self.total > self.peaks[self.place].total:
            self.peaks[self.place] = Peak(self.total, dict(self.live))

    def _strike(self, key: int) -> None:
        _, item, size = self._books.pop(key)
        self.live[item] -= size
        self.total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most of all calls, asked for at every turn
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        has_fake = any(isinstance(leaf, FakeTensor) for leaf in inputs)
        picks = func is torch.ops.aten.index.Tensor and inputs[0].is_floating_point() and inputs[0].numel() > _LARGE
        if has_fake and all(isinstance(leaf, FakeTensor) for leaf in inputs):
            result = self._of_stand_ins(func, args, kwargs)
        elif has_fake:
            result = self._without_data(func, args, kwargs)
        elif picks or (not inputs and not _is_read_back(func, args)):
            result = self._without_data(func, args, kwargs, only_floats=True)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.book(leaf)
        if inside := self._inside(func, inputs):
            self.touch(inside)
        return result

    def _inside(self, func: Any, inputs: list[Tensor]) -> int:
        """Bytes that a kernel allocates beside its result."""
        if func is torch.ops.aten.logsumexp.default:  # exp(x - max) in a tensor of its own
            return inputs[0].numel() * inputs[0].element_size()
        if self.device != "cpu" or torch.Tag.pointwise not in func.tags or func._schema.name in _CONDITIONS:
            return 0
        dtypes = {value.dtype for value in inputs if value.dim()}
        if len(dtypes) < 2:
            return 0
        common = reduce(torch.promote_types, dtypes)
        return sum(_numbers(value) * common.itemsize for value in inputs if value.dtype != common)

    def _of_stand_ins(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """`_without_data` where every tensor is a FakeTensor, with a few shortcuts: torch's own way of finding out what
        comes out of an operation takes ten times as long as remembering it."""
        if func in _VIEWS and not kwargs:
            with in_kernel_invocation_manager(self.fake):
                result = func(*args)
            return FakeTensor(self.fake, result, _CPU)
        if func in _FILLS:
            return args[0]
        if func._schema.is_mutable:
            if func._schema.name.startswith("aten::_foreach_") and not func._schema.returns:
                return None  # in place: nothing new
            return self._without_data(func, args, kwargs)
        key = (func, *_described((args, kwargs)))
        made = self._made.get(key)
        if made is None:
            result = self._without_data(func, args, kwargs)
            self._made[key] = _made(result, args, kwargs)
            return result
        if made is _ALIKE:
            return self._without_data(func, args, kwargs)
        with in_kernel_invocation_manager(self.fake):
            tensors = [
                torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made.results
            ]
        tensors = [FakeTensor(self.fake, tensor, _CPU) for tensor in tensors]
        return tensors[0] if made.kind is Tensor else made.kind(tensors)

    def _without_data(self, func: Any, args: tuple, kwargs: dict, only_floats: bool = False) -> Any:
        """only_floats: run it for real if what comes out are integers or bools."""
        stand_in = args
        if func is torch.ops.aten.index.Tensor:
            stand_in = (args[0], self._as_places(args[1]), *args[2:])
        with self.fake:
            result = func(*stand_in, **kwargs)
        self._memo.clear()
        is_whole = isinstance(result, Tensor) and not result.is_floating_point()
        return func(*args, **kwargs) if only_floats and is_whole else result

    def _as_places(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Real bool masks -> stand-ins for the positions they select, whose number decides the shape of the result."""
        places: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
                places.append(index)
                continue
            count = int(index.sum())
            self.touch(8 * count * index.dim())
            with self.fake:
                places += [torch.empty(count, dtype=torch.int64) for _ in range(index.dim())]
        return places


@dataclass(frozen=True)
class _Made:
    """What an operation made of such inputs: a tensor, or a tuple or list of them. results: shape, stride, dtype."""

    kind: type
    results: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


_ALIKE = _Made(Tensor, ())
"""In place of a `_Made`: this operation has to be asked every time."""


def _made(result: Any, args: tuple, kwargs: dict) -> _Made:
    leaves = [result] if isinstance(result, Tensor) else result if isinstance(result, list | tuple) else []
    own = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    is_new = all(isinstance(leaf, FakeTensor) and id(leaf.untyped_storage()) not in own for leaf in leaves)
    if not leaves or not is_new:
        return _ALIKE
    kind = Tensor if isinstance(result, Tensor) else type(result)
    return _Made(kind, tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves))


def _described(values: Any) -> Iterator[Any]:
    """Of arguments of an operation what decides the shapes that it makes; hashable."""
    for value in values.items() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value.shape, value.stride(), value.dtype
        elif isinstance(value, list | tuple | dict):
            yield type(value), tuple(_described(value))
        else:
            yield type(value), value


def _is_read_back(func: Any, args: tuple) -> bool:
    """Whether a new float may be asked for its value: drop-path rates, and the one random number that decides whether
    an adapter is dropped."""
    name = func._schema.name
    return name in _READ_BACK or (name == "aten::rand" and list(args[0]) == [1])


def _numbers(tensor: Tensor) -> int:
    """Numbers in memory: an expanded tensor repeats its own."""
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
