"""The decision tree: which plan to train on so much memory, and why (SPEC C7).

Candidates are enumerated from full training down to QLoRA with the lowest rank. One whose weights, gradients and
optimizer state alone exceed the limit is out by arithmetic; the others are predicted (`adapt.memory`) in the order
that the goal asks for, until one fits. Then the micro-batch grows as far as the memory goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from vlmtune.adapt.memory import predict
from vlmtune.adapt.plan import Policy
from vlmtune.adapt.prediction import Prediction, StepSettings, combined
from vlmtune.adapt.sharding import Parts
from vlmtune.models.anatomy import anatomy_of, canonical_name, canonical_parameters, part_of, rank_kind
from vlmtune.models.quantise import QUANTISED
from vlmtune.models.synthetic import BatchShape, build_without_data
from vlmtune.optim.optimizer import OptimizerName
from vlmtune.rules import assign
from vlmtune.types import VlmtuneError

Goal = Literal["quality", "speed", "memory"]
GIB = 2**30
BY_KIND: Mapping[str, int] = {"qk": 16, "vo": 32, "up": 64, "down": 32}
"""The upper ends of the ranges for ranks by kind of module (SPEC C2)."""
RANKS = (64, BY_KIND, 16, 8)
BATCH = 16  # samples of an optimizer step
LARGEST_MICRO_BATCH = 16
_BYTES = {"fp32": 4.0, "bf16": 2.0, "nf4": 0.5 + 0.127 / 8, "int8": 1.0}


@dataclass(frozen=True)
class Candidate:
    """A plan to consider. rank: of LoRA, None where nothing is adapted; why: what speaks for it, one sentence."""

    name: str
    rules: tuple[tuple[str, Policy], ...]
    optimizer: OptimizerName
    rank: int | Mapping[str, int] | None
    store: str
    why: str


@dataclass(frozen=True)
class Option:
    """A candidate and what is known of its memory. least: bytes below which it cannot go; prediction: of the step with
    `checkpointing` and `micro_batch`, None where `least` settled it or another was chosen first; holders: how many
    processes hold the model together (1: each has all of it); parts: what of it they would divide."""

    candidate: Candidate
    least: int
    parts: Parts
    holders: int = 1
    prediction: Prediction | None = None
    checkpointing: bool = True
    micro_batch: int = 1

    @property
    def needs(self) -> int:
        return self.least if self.prediction is None else self.prediction.total

    @property
    def name(self) -> str:
        return self.candidate.name + (f", in {self.holders} parts" if self.holders > 1 else "")

    def sent(self, processes: int) -> int:
        """Bytes that each of so many processes sends in a step."""
        if self.holders == 1:
            return self.parts.sent_when_whole(processes)
        return self.parts.sent(processes, _micro_batches(self.micro_batch, processes))


@dataclass(frozen=True)
class Decision:
    """chosen: the plan; options: everything considered, in order; reasons: one sentence each; config: keys of a config
    file, ready to paste; limit: bytes for a step, the reserve taken off."""

    chosen: Option
    options: tuple[Option, ...]
    reasons: tuple[str, ...]
    config: dict[str, Any]
    limit: int
    processes: int = 1


def decide(
    config: Any,
    memory: int,
    goal: Goal,
    shape: BatchShape,
    device: Literal["cpu", "cuda"] = "cuda",
    precision: Literal["bf16", "fp32"] = "bf16",
    reserve: int = 0,
    processes: int = 1,
) -> Decision:
    """The best plan for `goal` whose step fits into `memory` less `reserve` bytes. shape: its `samples` are ignored;
    processes: train together, on a device each; they may hold the model together.

    Raises VlmtuneError when even the smallest does not fit: it says what that takes and how much is missing.
    """
    limit = memory - reserve
    search = _Search(config, replace(shape, samples=1), device, precision, processes)
    everything = _in_order(search.candidates(), goal)
    options = [option for candidate in everything for option in search.options(candidate)]
    chosen = None
    for number, option in enumerate(options):
        if chosen is None and option.least <= limit:
            options[number] = option = search.tried(option, goal, limit)
            chosen = option if option.needs <= limit else None
    if chosen is None:
        raise VlmtuneError(_nothing_fits(search, options, memory, reserve, shape))
    grown = search.grown(chosen, limit)
    options[options.index(chosen)] = grown
    return Decision(grown, tuple(options), _reasons(grown, options, goal, limit, shape, processes),
                    _config_of(grown, precision, processes), limit, processes)  # fmt: skip


def _micro_batches(samples: int, processes: int) -> int:
    """Of each process in a step."""
    return max(1, BATCH // (samples * processes))


@dataclass(frozen=True)
class _Matrix:
    """Of a linear module: features in and out, and its kind (`models.anatomy.RANK_KINDS`)."""

    inputs: int
    outputs: int
    kind: str


def _rank(rank: int | Mapping[str, int], matrix: _Matrix) -> int:
    return rank if isinstance(rank, int) else rank[matrix.kind]


class _Search:
    """Predictions of one model on one kind of batch, each made once."""

    def __init__(self, config: Any, shape: BatchShape, device: str, precision: str, processes: int):
        self.config, self.shape, self.device, self.precision = config, shape, device, precision
        self.processes = processes
        with torch.device("meta"):
            model = build_without_data(config)
        anatomy = anatomy_of(model)
        self.parameters = {name: p.numel() for name, p in canonical_parameters(model).items()}
        self.linear = {
            canonical_name(anatomy, f"{path}.weight"): _Matrix(module.in_features, module.out_features, rank_kind(path))
            for path, module in model.named_modules()
            if type(module) is nn.Linear
        }
        self.parts = list(dict.fromkeys(part_of(name) for name in self.parameters))

    def candidates(self) -> list[Candidate]:
        """From what learns most to what takes least."""
        found = []
        eight = "adamw8bit"
        for parts, name, why in (
            (("vision", "projector", "language", "embed", "lm_head"), "full", "every weight can follow the data"),
            (("projector", "language", "embed", "lm_head"), "full language, frozen tower",
             "the language model learns in full and the tower keeps what it sees"),
        ):  # fmt: skip
            for optimizer, note in (("adamw", ""), (eight, ", 8-bit AdamW")):
                found.append(Candidate(name + note, self._rules(parts, None, "fp32"), optimizer, None, "fp32", why))
        for store, label in (("bf16", "LoRA"), ("nf4", "QLoRA")):
            optimizer = "adamw" if store == "bf16" or self.device == "cpu" else "paged_adamw"
            why = "the base stays as it is and what learns is small" if store == "bf16" else (
                "4 bits a weight leave room for the rest, at the price of dequantising in every product"
            )  # fmt: skip
            adapted = [matrix for name, matrix in self.linear.items() if part_of(name) == "language"]
            for rank in RANKS:
                if any(_rank(rank, matrix) > min(matrix.inputs, matrix.outputs) for matrix in adapted):
                    continue  # a rank above a matrix's own adds nothing, and plans refuse it
                text = f"r{rank}" if isinstance(rank, int) else "by kind " + "/".join(map(str, rank.values()))
                rules = self._rules(("projector",), rank, store)
                found.append(Candidate(f"{label} {text}, full projector, frozen tower", rules, optimizer, rank, store,
                                       why))  # fmt: skip
        return found

    def _rules(self, full: Sequence[str], rank: Any, store: str) -> tuple[tuple[str, Policy], ...]:
        rules = []
        for part in self.parts:
            if part == "language" and rank is not None:
                policy = Policy("lora", lr=2e-4, rank=rank, store=store)
            elif part in full:
                lr = {"vision": 1e-5, "projector": 5e-4 if rank is not None else 2e-5}.get(part, 1e-5)
                policy = Policy("full", lr=lr, weight_decay=0.01)
            else:
                policy = Policy("frozen", store="bf16")
            rules.append((part, policy))
        return tuple(rules)

    def parts_of(self, candidate: Candidate) -> Parts:
        """What of a plan several processes would divide."""
        tensors = []
        for name, (_, policy) in assign(candidate.rules, self.parameters).items():
            count, matrix = self.parameters[name], self.linear.get(name)
            is_full = policy.train == "full"
            wide = 4.0 if is_full or (matrix is None and policy.store != "bf16") else _BYTES[policy.store]
            tensors.append((name, int(count * wide), count if is_full else 0, False))
            if policy.train == "lora" and matrix is not None:
                added = _rank(policy.rank, matrix) * (matrix.inputs + matrix.outputs)
                tensors.append((f"{name}.lora", 4 * added, added, True))
        return Parts.counted(tensors)

    def options(self, candidate: Candidate) -> list[Option]:
        """Whole in every process; in parts too, where that is possible: weights that are not quantised, plain AdamW."""
        parts, optimizer = self.parts_of(candidate), candidate.optimizer
        found = [Option(candidate, parts.least(optimizer), parts)]
        if self.processes > 1 and candidate.store not in QUANTISED and optimizer == "adamw":
            found.append(Option(candidate, parts.least(optimizer, self.processes), parts, self.processes))
        return found

    def predicted(self, option: Option, checkpointing: bool, samples: int) -> Option:
        settings = StepSettings(
            precision=self.precision, gradient_checkpointing=checkpointing, optimizer=option.candidate.optimizer,
            micro_batches=_micro_batches(samples, self.processes), device=self.device,
        )  # fmt: skip
        found = predict(self.config, option.candidate.rules, replace(self.shape, samples=samples), settings)
        if option.holders > 1:
            found = option.parts.held(found, option.holders)
        return replace(option, prediction=found, checkpointing=checkpointing, micro_batch=samples)

    def tried(self, option: Option, goal: Goal, limit: int) -> Option:
        """With a micro-batch of one; checkpointing only where it is needed, or where memory is the goal."""
        small = self.predicted(option, True, 1)
        if small.needs > limit or goal == "memory":
            return small
        quick = self.predicted(option, False, 1)
        return quick if quick.needs <= limit else small

    def grown(self, option: Option, limit: int) -> Option:
        """The largest micro-batch, a power of two, that fits. Bytes are linear in it, or less (chunks of logits)."""
        two = self.predicted(option, option.checkpointing, 2).prediction
        for samples in (2**n for n in range(LARGEST_MICRO_BATCH.bit_length() - 1, 0, -1)):
            found = combined([(2 - samples, option.prediction), (samples - 1, two)])
            if found.total <= limit:
                return replace(option, prediction=replace(found, settings=two.settings), micro_batch=samples)
        return option


def _in_order(candidates: list[Candidate], goal: Goal) -> list[Candidate]:
    """The order in which the goal prefers them: quality takes what learns most, memory what takes least, speed what
    computes least per step: no quantised products, few trained weights."""
    if goal == "quality":
        return candidates
    if goal == "memory":
        return candidates[::-1]
    adapted = [c for c in candidates if c.rank is not None]
    cheap = [c for c in adapted if c.store == "bf16"][::-1] + [c for c in adapted if c.store != "bf16"][::-1]
    wanted = sorted(cheap, key=lambda c: (c.store != "bf16", c.rank != 16))
    return [*wanted, *[c for c in candidates if c.rank is None]]


def _nothing_fits(search: _Search, options: list[Option], memory: int, reserve: int, shape: BatchShape) -> str:
    smallest = min(options, key=lambda option: option.least)
    if smallest.prediction is None:
        smallest = search.predicted(smallest, True, 1)
    needs = smallest.needs + reserve
    return (
        f"nothing fits into {_gib(memory)} GiB: the smallest plan ({smallest.name}, micro-batch 1, "
        f"gradient checkpointing) takes {_gib(needs)} GiB with {_gib(reserve)} GiB in reserve, so "
        f"{_gib(needs - memory)} GiB are missing; take a smaller model, a larger device, or fewer than {shape.tokens} "
        "tokens a sample."
    )


def _reasons(
    chosen: Option, options: Sequence[Option], goal: Goal, limit: int, shape: BatchShape, processes: int
) -> tuple[str, ...]:
    candidate, prediction = chosen.candidate, chosen.prediction
    passed = [option for option in options[: options.index(chosen)]]
    reasons = [f"method: {candidate.name}, because {candidate.why}; goal {goal}."]
    for option in passed:
        how = (
            "with checkpointing and a micro-batch of 1"
            if option.prediction
            else "in weights, gradients and state alone" + (", gathered ones included" if option.holders > 1 else "")
        )
        reasons.append(f"not {option.name}: it takes {_gib(option.needs)} GiB {how}, and {_gib(limit)} GiB are there.")
    if processes > 1:
        sent = f"each sends {_gib(chosen.sent(processes))} GiB a step"
        reasons.append(
            f"processes: {processes} hold the model together, because one device is too small for it; {sent}."
            if chosen.holders > 1
            else f"processes: each of {processes} has the whole model, because it fits; {sent}."
        )
    if candidate.rank is not None:
        kinds = "every linear module of the language model" if isinstance(candidate.rank, int) else ", ".join(
            f"{kind} {rank}" for kind, rank in candidate.rank.items()
        )  # fmt: skip
        rank = f"rank {candidate.rank} on {kinds}" if isinstance(candidate.rank, int) else f"ranks {kinds}"
        reasons.append(
            f"ranks: {rank}; alpha 2 x rank; the projector learns in full: it is small and meets new data first."
        )
    reasons.append(
        "gradient checkpointing: on, " + ("it is what makes a step fit, at about a third more time." if goal != "memory"
                                          else "the goal is memory, and it keeps one state per block.")
        if chosen.checkpointing else "gradient checkpointing: off, a step fits without it and is faster."
    )  # fmt: skip
    reasons.append(
        f"batch: {BATCH} samples a step in micro-batches of {chosen.micro_batch}, the largest power of two that fits "
        f"with {shape.tokens} tokens and {shape.images} image(s) each ({_gib(prediction.total)} of {_gib(limit)} GiB)."
    )
    reasons.append(f"optimizer: {candidate.optimizer}, {_OPTIMIZER_WHY[candidate.optimizer]}")
    rates = ", ".join(f"{match} {policy.lr:g}" for match, policy in candidate.rules if policy.lr)
    reasons.append(f"learning rates: {rates}; adapters take about ten times what full weights take.")
    return tuple(reasons)


_OPTIMIZER_WHY = {
    "adamw": "8 bytes a trained number are affordable here.",
    "adamw8bit": "2 bytes a trained number instead of 8 are what makes it fit.",
    "paged_adamw": "its state moves to the host when a long batch needs the room.",
    "paged_adamw8bit": "its state is small and moves to the host when a long batch needs the room.",
}


def _config_of(chosen: Option, precision: str, processes: int) -> dict[str, Any]:
    """The keys of a config file that carry the decision."""
    rules = []
    for match, policy in chosen.candidate.rules:
        rule: dict[str, Any] = {"match": match, "train": policy.train}
        if policy.lr:
            rule["lr"] = policy.lr
        if policy.train == "lora":
            rule["rank"] = policy.rank if isinstance(policy.rank, int) else dict(policy.rank)
        if policy.store != "fp32":
            rule["store"] = policy.store
        rules.append(rule)
    config: dict[str, Any] = {
        "plan": rules,
        "optim": {"name": chosen.candidate.optimizer},
        "train": {
            "batch_size": BATCH,
            "micro_batch_size": chosen.micro_batch,
            "gradient_checkpointing": chosen.checkpointing,
            "precision": precision,
        },
    }
    if processes > 1:  # what was decided here by predictions, `auto` would decide by weights alone
        config["train"]["shard"] = chosen.holders > 1
    if chosen.candidate.store == "nf4":
        config["quantise"] = {"double": True}
    return config


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
