"""One optimizer step of a model without data, counted: the real VLM, objective, backward, clipping and optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.adapt.fused import use_fused
from vlmtune.adapt.ledger import Ledger, Peak
from vlmtune.adapt.plan import Plan, Policy, apply_plan, assign_rules
from vlmtune.adapt.prediction import FIRST_UPDATE, LATER_UPDATE, Prediction, StepSettings
from vlmtune.adapt.stored import StoredLinear, quantise_base_weights
from vlmtune.losses.consistency import Consistency
from vlmtune.losses.objective import Objective, StepWeights
from vlmtune.models.anatomy import HEADS, anatomy_of, canonical_parameters
from vlmtune.models.packing import use_packed_attention
from vlmtune.models.synthetic import build_without_data, depths, image_tokens
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.models.vocabulary import NewTokens
from vlmtune.optim.clip import clip_gradients
from vlmtune.optim.optimizer import build_adamw, usable_here
from vlmtune.optim.precision import autocast
from vlmtune.types import Batch, VlmtuneError

Rules = Sequence[tuple[str, Policy]]

CPU = torch.device("cpu")
SMALLEST_8BIT = 4096  # numbers in a tensor from which on bitsandbytes keeps its state in 8 bits
CPU_8BIT_BYTES = 5 * 4
"""For each number of one tensor, on CPUs: the kernel's gradient, both moments and the root twice, in float32."""
BLOCK_8BIT = 256  # numbers per float32 scale of such a state


REMEMBERED = 256
"""Counted steps of this process: stages and phases of a run, and plans that are tried, often are the same step."""
_counted: dict[str, Prediction] = {}


def count_step(
    config: Any,
    rules: Rules,
    batch: Batch,
    settings: StepSettings,
    new_tokens: NewTokens = NewTokens(),  # noqa: B008
) -> Prediction:
    """Run it and say what it took. config: of transformers; new_tokens: whose rows the config's vocabulary has."""
    key = _key(config, rules, batch, settings, new_tokens)
    if key not in _counted:
        if len(_counted) >= REMEMBERED:
            del _counted[next(iter(_counted))]
        _counted[key] = _count(config, rules, batch, settings, new_tokens)
    return _counted[key]


def _key(config: Any, rules: Rules, batch: Batch, settings: StepSettings, new_tokens: NewTokens) -> str:
    """Of all that decides what a step allocates: integers of a batch by their values, which models ask for."""
    digest = hashlib.sha256()
    for part in [batch] if batch.contrast is None else [batch, batch.contrast]:
        for name, value in {**part.inputs, "kinds": part.kinds}.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if not value.is_floating_point():
                digest.update(value.contiguous().numpy().tobytes())
    attention = [getattr(part, "_attn_implementation", None) for part in (config, config.get_text_config())]
    plan = [(pattern, replace(policy, lr=0.0)) for pattern, policy in rules]
    digest.update(repr((config.to_dict(), attention, plan, batch.tasks, settings, new_tokens)).encode())
    return digest.hexdigest()


def _count(config: Any, rules: Rules, batch: Batch, settings: StepSettings, new_tokens: NewTokens) -> Prediction:
    is_read_twice = batch.contrast is not None
    objective = Objective(consistency=Consistency("contrast", lambda progress: 1.0) if is_read_twice else None)
    weights = objective.weights([batch])
    ledger = Ledger(settings.device)
    with ledger:
        model = build_without_data(config)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        plan = _planned(model, rules, settings, new_tokens)
        if settings.fused:
            use_fused(model, check=False)
        if settings.packing:
            use_packed_attention(model)
        if settings.gradient_checkpointing:
            checkpoint_activations(model, settings.gradient_checkpointing)
        set_training_mode(model)
        stored = _book_weights(ledger, model, plan)
        ledger.item, ledger.place = "batch", "forward"
        ledger.peaks.clear()
        inputs = [torch.empty(value.shape, dtype=value.dtype) for value in batch.inputs.values()]
        watch = _Watch(ledger, model, plan)
        saved = _forward_backward(ledger, watch, VLM(model), objective, batch, weights, settings)
        idle = [rule for rule, parameters in plan.groups().items() if all(p.grad is None for p in parameters)]
        if idle:  # text alone reaches neither vision nor projector
            raise VlmtuneError(f"the batch gives no gradient to {', '.join(idle)}.")
        ledger.item, ledger.place = "update", "clip"
        clip_gradients(plan.groups(), 1.0)
        state, host = _update(ledger, plan, settings)
        del inputs
    for part, blocks in zip(("vision", "language"), depths(config), strict=True):
        if blocks == 3 and (second := ledger.peaks.get(f"backward/{part}/second")):
            ledger.peaks[f"backward/{part}/last but one"] = second
    return Prediction(
        peaks=ledger.peaks,
        state=state,
        host=host,
        gradients=sum(p.numel() * p.element_size() for p in plan.parameters.values()),
        saved=saved,
        stored=stored,
        parameters=numbers,
        trained=sum(p.numel() for p in plan.parameters.values()),
        tokens=batch.inputs["input_ids"].numel(),
        image_tokens=image_tokens(config, batch),
        settings=settings,
    )


def _planned(model: nn.Module, rules: Rules, settings: StepSettings, new_tokens: NewTokens) -> Plan:
    """Apply the plan, then put stand-ins where it wants quantised weights: they would have to be read, not made.

    Read-outs (`heads`) are left out: they are a few thousand numbers.
    """
    rules = [rule for rule in rules if rule[0].split(".")[0] != HEADS]
    parameters = canonical_parameters(model)
    assignment = assign_rules(model, rules)
    store = {id(parameter): assignment[name][1].store for name, parameter in parameters.items()}
    plan = apply_plan(model, rules, "config.json", 0, new_tokens)
    compute = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    quantise_base_weights(model, store, settings.double, compute)
    return plan


def _book_weights(ledger: Ledger, model: nn.Module, plan: Plan) -> dict[str, int]:
    """Give everything that is stored for good an item; returns item -> bytes."""
    trained = {id(parameter) for parameter in plan.parameters.values()}
    ledger.move(model.buffers(), "buffers")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, StoredLinear) and name in ("weight", "constants"):
                item = f"weights {module.store}" if name == "weight" else "quantisation constants"
            elif id(parameter) in trained:
                item = "weights trained"
            else:
                item = f"weights {_SHORT.get(parameter.dtype, str(parameter.dtype))}"
            ledger.move([parameter], item)
    return {item: size for item, size in ledger.live.items() if size and item not in ("weights", "temporary")}


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Watch:
    """Tells the ledger where the step is: which part runs forward, which block runs backward, what is a gradient."""

    def __init__(self, ledger: Ledger, model: nn.Module, plan: Plan):
        self.ledger, self.backward = ledger, False
        self._parts: list[str] = []
        anatomy = anatomy_of(model)
        parts = {anatomy.vision: "vision", anatomy.language: "language"}
        for path, part in parts.items():
            self._follow(model.get_submodule(path), part)
            blocks = getattr(anatomy, f"{part}_layers")
            layers = list(model.get_submodule(blocks))
            for number, layer in enumerate(layers):
                layer.register_forward_hook(self._mark(f"backward/{part}/{_position(number, len(layers))}"))
        modules = dict(model.named_modules())
        for path in anatomy.projector:
            if path in modules:
                self._follow(modules[path], "projector")
        model.get_submodule(anatomy.language).register_forward_pre_hook(self._mark_inputs, with_kwargs=True)
        for parameter in plan.parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move([p.grad], "gradients"))

    def _follow(self, module: nn.Module, part: str) -> None:
        def enter(*_: Any) -> None:
            if not self.backward:
                self._parts.append(part)
                self._forward_in(part)

        def leave(*_: Any) -> None:
            if not self.backward:
                self._parts.pop()
                self._forward_in(self._parts[-1] if self._parts else "language")

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _forward_in(self, part: str) -> None:
        self.ledger.item, self.ledger.place = f"activations {part}", f"forward/{part}"

    def _mark(self, place: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            self._when_derived(state, place)

        return hook

    def _mark_inputs(self, module: nn.Module, args: Any, kwargs: dict) -> None:
        if (embedded := kwargs.get("inputs_embeds")) is not None:
            self._when_derived(embedded, "backward/inputs")

    def _when_derived(self, tensor: Tensor, place: str) -> None:
        """Note the place as soon as the backward has the derivative by this tensor."""
        if tensor.requires_grad and not self.backward:
            tensor.register_hook(lambda _: setattr(self.ledger, "place", place))


def _position(number: int, count: int) -> str:
    """Peaks of these blocks are linear in the number of blocks; between second and last but one they lie on a line."""
    names = {count - 2: "last but one", 1: "second", count - 1: "last", 0: "first"}
    return names.get(number, "between")


def _forward_backward(
    ledger: Ledger,
    watch: _Watch,
    vlm: VLM,
    objective: Objective,
    batch: Batch,
    weights: StepWeights,
    settings: StepSettings,
) -> dict[str, int]:
    """One micro-batch as `Trainer.train_step` runs it; returns what the forward kept, by part."""
    ledger.item, ledger.place = "activations language", "forward/language"
    with autocast(settings.precision, CPU):
        states = vlm(batch, weights.kinds, every_state=False)
        contrast = None
        if batch.contrast is not None:
            contrast = vlm(batch.contrast, weights.kinds, every_state=False)
        ledger.item, ledger.place = "loss", "loss"
        losses = objective(states, vlm.head, batch, weights, contrast=contrast)
    saved = {item.removeprefix("activations "): size for item, size in ledger.live.items()
             if size and (item.startswith("activations") or item == "loss")}  # fmt: skip
    ledger.item, ledger.place, watch.backward = "backward", "backward/loss", True
    losses.total.backward()
    return saved


def _update(ledger: Ledger, plan: Plan, settings: StepSettings) -> tuple[int, int]:
    """Run the update; returns bytes of the optimizer's state on the device and, paged, on the host."""
    name, _ = usable_here(settings.optimizer, torch.device(settings.device))
    if name == "adamw":
        # a group at a time, as one optimizer does it: each group's temporaries are linear in the number of blocks
        optimizers = [build_adamw([group], (0.9, 0.999), 1e-8) for group in plan.optimizer_groups()]
        for number, optimizer in enumerate(optimizers):
            ledger.place = f"{FIRST_UPDATE}/{number}"
            before = ledger.live["optimizer"]
            optimizer.step()
            ledger.move(_state_of(optimizer), "optimizer")
            items = ledger.peaks[ledger.place].items
            made = min(ledger.live["optimizer"] - before, items["update"])  # at the peak it still went by that name
            items["optimizer"], items["update"] = before + made, items["update"] - made
        for number, optimizer in enumerate(optimizers):
            ledger.place = f"{LATER_UPDATE}/{number}"
            optimizer.step()
        return ledger.live["optimizer"], 0
    numbers = [parameter.numel() for parameter in plan.parameters.values()]
    state = sum(_bnb_state(count, "8bit" in name) for count in numbers)
    ledger.place = FIRST_UPDATE
    inside = CPU_8BIT_BYTES * max(numbers) if settings.device == "cpu" else 0
    ledger.touch(inside)
    ledger.peaks[LATER_UPDATE] = ledger.peaks[FIRST_UPDATE]
    if name.startswith("paged"):
        return 0, state
    for place in (FIRST_UPDATE, LATER_UPDATE):
        items = ledger.peaks[place].items | {"optimizer": state}
        ledger.peaks[place] = Peak(sum(items.values()), items)
    return state, 0


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _bnb_state(numbers: int, in_8_bits: bool) -> int:
    """Bytes of the two moments of one tensor, as bitsandbytes keeps them: updated in place, nothing beside them."""
    if in_8_bits and numbers >= SMALLEST_8BIT:
        return 2 * (numbers + 4 * -(-numbers // BLOCK_8BIT))
    return 8 * numbers
