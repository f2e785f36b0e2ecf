"""A model of which every process holds a part (FSDP2): which parameters, and when it is worth it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from vlmtune.adapt.ledger import Peak
from vlmtune.adapt.plan import Plan, in_a_block
from vlmtune.adapt.prediction import FIRST_UPDATE, LATER_UPDATE, Prediction
from vlmtune.models.anatomy import anatomy_of, canonical_parameters, part_of
from vlmtune.models.quantise import is_quantised
from vlmtune.optim.optimizer import STATE_BYTES, OptimizerName
from vlmtune.shards import shard
from vlmtune.types import VlmtuneError

ROOM = 0.6
"""Share of a device's memory that weights, gradients and optimizer may take in every process before `auto` shards."""


def shard_model(model: nn.Module, plan: Plan, mesh: DeviceMesh, keep_trunk: bool = False) -> Plan:
    """Leave this process its rows of the base model's weights, in place; returns the plan with the parameters that the
    model has now.

    What adapters brought and new rows stay whole in every process: they are small, and their gradients are added up
    once a step. keep_trunk: so do tower and projector, which then need not run in all processes at once.
    Raises VlmtuneError for quantised weights, which cannot be taken apart.
    """
    named = canonical_parameters(model)
    if (quantised := next((name for name, p in named.items() if is_quantised(p)), None)) is not None:
        raise VlmtuneError(
            f"train.shard: {quantised} is quantised, and quantised weights cannot be taken apart; store it in bf16, or "
            "say shard: false."
        )
    whole = {parameter for name, parameter in named.items() if _stays_whole(name, parameter, plan, keep_trunk)}
    anatomy = anatomy_of(model)
    paths = [anatomy.language_layers] if keep_trunk else [anatomy.vision_layers, anatomy.language_layers]
    blocks = [block for path in paths for block in model.get_submodule(path).children()]
    for parameter in whole:  # the others are moved as they are taken apart, one at a time
        parameter.data = parameter.data.to(mesh.device_type)
    shard(model, blocks, mesh, whole)
    now = canonical_parameters(model)
    return replace(plan, parameters={name: now[name] for name in plan.parameters})


def _stays_whole(name: str, parameter: nn.Parameter, plan: Plan, keep_trunk: bool) -> bool:
    return (
        name not in plan.base  # adapters, new rows, read-outs
        or parameter.dim() == 0
        or (keep_trunk and part_of(name) in ("vision", "projector"))
    )


@dataclass(frozen=True)
class Parts:
    """What of a model is divided among processes, in bytes as stored: whole: every process has it; divided: of which it
    has its share; root: of that, what lies in no block; again: blocks that are gathered for a backward too; block: the
    largest block. trained_whole, trained_divided, trained_root, trained_block: how many of their numbers train."""

    whole: int
    divided: int
    root: int
    again: int
    block: int
    trained_whole: int
    trained_divided: int
    trained_root: int
    trained_block: int

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, keep_trunk: bool = False) -> Parts:
        """model: before it is taken apart."""
        return cls.counted(
            (
                name,
                parameter.numel() * parameter.element_size(),
                parameter.numel() if name in plan.parameters else 0,
                _stays_whole(name, parameter, plan, keep_trunk),
            )
            for name, parameter in canonical_parameters(model).items()
        )

    @classmethod
    def counted(cls, tensors: Iterable[tuple[str, int, int, bool]]) -> Parts:
        """tensors: canonical name, bytes, how many of its numbers train, and whether it stays whole."""
        sizes: Counter[str] = Counter()
        blocks: Counter[str] = Counter()
        of_blocks: Counter[str] = Counter()
        learns: set[str] = set()
        for name, held, trained, is_whole in tensors:
            kind = "whole" if is_whole else "divided"
            block = ".".join(name.split(".")[:3]) if in_a_block(name) else "root"
            sizes[kind] += held
            sizes[f"trained_{kind}"] += trained
            if trained:
                learns.add(part_of(name) if block == "root" else block)
            if not is_whole:
                blocks[block] += held
                of_blocks[block] += trained
        root, trained_root = blocks.pop("root", 0), of_blocks.pop("root", 0)
        order = sorted(blocks, key=lambda block: (block.startswith("language"), int(block.split(".")[2])))
        first = next((n for n, block in enumerate(order) if _has_backward(block, learns)), len(order))
        again = sum(blocks[block] for block in order[max(0, first - 1) :])  # FSDP2 prefetches the one before
        return cls(
            sizes["whole"], sizes["divided"], root, again, max(blocks.values(), default=0),
            sizes["trained_whole"], sizes["trained_divided"], trained_root, max(of_blocks.values(), default=0),
        )  # fmt: skip

    def held(self, prediction: Prediction, size: int) -> Prediction:
        """The prediction of a whole model's step, for one of `size` processes: it holds its share of weights, gradients
        and optimizer state, and during forward and backward all of what `gathered` counts; in the backward also the
        gradients of that, and a copy of those that are on their way to their owners."""
        weights = self.whole + self.divided // size
        share = self.trained_share(size)
        peaks = {}
        for place, peak in prediction.peaks.items():
            items = {
                name: int(bytes_ * share) if name in ("gradients", "optimizer", "update") else bytes_
                for name, bytes_ in peak.items.items()
                if not name.startswith("weights")
            }
            items["weights"] = weights
            if not place.startswith((FIRST_UPDATE, LATER_UPDATE)):
                items["weights gathered"] = self.gathered
            if place.startswith("backward"):
                on_their_way = max(self.trained_root, self.trained_block)
                items["gradients gathered"] = 4 * (self.trained_root + self.trained_block + on_their_way)
            peaks[place] = Peak(sum(items.values()), items)
        return replace(
            prediction, peaks=peaks, state=int(prediction.state * share), gradients=int(prediction.gradients * share)
        )

    def least(self, optimizer: OptimizerName, holders: int = 1) -> int:
        """Bytes below which none of `holders` processes can go: weights, those gathered where there are several,
        gradients in float32 and the optimizer's state; no activation."""
        weights = self.whole + self.divided // holders + (self.gathered if holders > 1 else 0)
        kept = (self.trained_whole + self.trained_divided) * self.trained_share(holders)
        return int(weights + (4 + STATE_BYTES[optimizer]) * kept)

    @property
    def gathered(self) -> int:
        """Bytes of whole weights during a step: what lies in no block, the block at work, and the next."""
        return min(self.divided, self.root + 2 * self.block)

    def trained_share(self, size: int) -> float:
        """Of all numbers that train, those whose gradient and state one of `size` processes keeps."""
        trained = self.trained_whole + self.trained_divided
        return (self.trained_whole + self.trained_divided / size) / trained if trained else 0.0

    def sent(self, size: int, micro_batches: int, over_gloo: bool = False) -> int:
        """Bytes that each of `size` processes sends in a step, in rings: everything is gathered for the forward, blocks
        with a backward once more; gradients of what is divided are summed to their owners after every micro-batch,
        those of what is whole to all, once.

        over_gloo: which sums to all in any case, and so sends twice as much (benchmarks/processes/two_hosts.md).
        """
        gathered = self.divided + self.again
        to_owners = 4 * self.trained_divided * (2 if over_gloo else 1)
        return int((size - 1) / size * (micro_batches * (gathered + to_owners) + 2 * 4 * self.trained_whole))

    def sent_when_whole(self, size: int) -> int:
        """The same where every process has the whole model: all gradients are summed to all, once."""
        return int((size - 1) / size * 2 * 4 * (self.trained_whole + self.trained_divided))


def _has_backward(block: str, learns: set[str]) -> bool:
    """Whether something learns in a block or before it. learns: blocks, and parts outside of blocks."""
    part, _, number = block.split(".")
    before = {"vision"} if part == "vision" else {"vision", "projector", "embed"}
    for place in learns:
        if place in before or (part == "language" and place.startswith("vision.layers.")):
            return True
        if place.startswith(f"{part}.layers.") and int(place.split(".")[2]) <= int(number):
            return True
    return False


def is_worth_sharding(model: nn.Module, plan: Plan, optimizer: OptimizerName, there: int) -> bool:
    """there: bytes that each process can have. Adapters on quantised weights never are: they cannot be taken apart."""
    if any(is_quantised(parameter) for parameter in model.parameters()):
        return False
    return Parts.of(model, plan).least(optimizer) > ROOM * there
