"""How much the likelihood of replies depends on each linear module: empirical Fisher traces (SPEC F2).

The trace of a module's empirical Fisher matrix is the mean over samples of the squared norm of the gradient of one
sample's log-likelihood with respect to the module's weight (and bias). No weight gradient is kept: with inputs X
float[T, in] and output gradients G float[T, out] of one sample, the weight's gradient is G^T X, and

    ||G^T X||^2 = sum over s, t of (X X^T)[s, t] (G G^T)[s, t],      the bias's: ||sum over t of G[t]||^2

(the per-sample norms of Goodfellow 2015, arXiv:1510.01799, for sequences: Li et al. 2022, arXiv:2110.05679). Weights
are never asked for gradients, so quantised ones can be measured as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmtune.adapt.methods import is_linear
from vlmtune.models.anatomy import anatomy_of, canonical_name, canonical_parameters, unreachable_parameters
from vlmtune.models.vlm import VLM, evaluating
from vlmtune.types import Batch, VlmtuneError

BLOCK = 2**22
"""Numbers of a product that are held at once: 16 MB in float32."""

_PACKS = "support_avx512bf16_for_cpu"
"""Flag of bitsandbytes' Linear4bit: repack the weight in the first forward without gradients (STACK.md section 3)."""


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Canonical name ("language.layers.3.self_attn.q_proj") -> every linear module that learning can reach.

    Quantised ones are linear modules too, and so is a head that is tied to the embedding (an adapter may stand at it
    alone). Left out are adapters' own, the output of torch's own attention (read past its forward), and what no loss
    can reach.
    """
    anatomy = anatomy_of(model)
    known = {*canonical_parameters(model), "lm_head.weight"} - unreachable_parameters(model)
    found = {}
    for path, module in model.named_modules():
        if is_linear(module):
            name = canonical_name(anatomy, f"{path}.weight")
            if name in known and ".lora_" not in name:
                found[name.removesuffix(".weight")] = module
    return found


def fisher_traces(
    model: nn.Module,
    batches: Iterable[Batch],
    modules: Mapping[str, nn.Module],
    likelihood: Literal["sum", "mean"] = "sum",
) -> dict[str, float]:
    """Name of module -> trace of its empirical Fisher matrix: mean over `batches` of the squared gradient norm.

    batches: one sample each, on the model's device; modules: linear modules of `model` by any name; likelihood: of one
    sample is the "sum" of log p over its supervised tokens, the log-likelihood of its replies, so that long replies
    count for more, or the "mean", as if every reply had one token. A module that runs several times in a forward
    counts once, with the gradient that its runs add up to; a weight that two modules share counts for each by itself.
    The model runs in eval mode, in its own number format, or the autocast around the call; the products are
    float32 at least, sums float64. Model, gradients and random numbers are afterwards as they were before.

    Raises VlmtuneError for a batch of several samples or without a supervised token, a module that is not linear or
    that no sample reaches, 4-bit weights that lost their gradient by packing, and gradients that are not finite.
    """
    _require_measurable(modules)
    measure = _Measurement(modules)
    samples = 0
    with _undisturbed(model), measure.attached():
        vlm = VLM(model)
        for batch in batches:
            if len(batch.sample_ids) != 1:
                raise VlmtuneError(
                    f"fisher_traces: a batch holds {len(batch.sample_ids)} samples (first: {batch.sample_ids[0]}); "
                    "give batches of one sample, because squares of gradients do not add up over samples."
                )
            states = vlm(batch)
            if not len(states.targets):
                raise VlmtuneError(
                    f"fisher_traces: sample {batch.sample_ids[0]} has no supervised token; leave it out."
                )
            logits = vlm.head(states.hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            measure.backward(
                F.cross_entropy(logits.to(wide), states.targets, reduction=likelihood), batch.sample_ids[0]
            )
            samples += 1
    if not samples:
        raise VlmtuneError("fisher_traces: there is no sample to measure on; give at least one.")
    unreached = [name for name, recorder in measure.recorders.items() if not recorder.reached]
    if unreached:
        raise VlmtuneError(
            f"fisher_traces: no gradient came to {unreached[0]} in any of {samples} samples"
            + (f", nor to {len(unreached) - 1} other modules" if unreached[1:] else "")
            + "; it does not run on these samples (a vision tower without images?) or its output is not used: measure "
            "on other samples, or leave it out."
        )
    return {name: float(recorder.total) / samples for name, recorder in measure.recorders.items()}


def squared_gradient_norm(inputs: Tensor, gradients: Tensor) -> Tensor:
    """||gradients^T inputs||^2, float64[]; the cheaper of the Gram form and the product itself, block by block.

    inputs: float[T, in]; gradients: float[T, out]. Products are float32, or float64 for float64 tensors.
    """
    wide = torch.promote_types(torch.promote_types(inputs.dtype, gradients.dtype), torch.float32)
    with torch.autocast(inputs.device.type, enabled=False):
        x, g = inputs.to(wide), gradients.to(wide)
        tokens, width_in, width_out = len(x), x.shape[1], g.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        if tokens * (width_in + width_out) < width_in * width_out:
            for start in range(0, tokens, rows := max(1, BLOCK // tokens)):
                part = slice(start, start + rows)
                total += ((x[part] @ x.T) * (g[part] @ g.T)).sum(dtype=torch.float64)
            return total.clamp_(min=0.0)  # terms of both signs may leave a rounding error where the norm is 0
        for start in range(0, width_out, columns := max(1, BLOCK // width_in)):
            total += (g[:, start : start + columns].T @ x).square().sum(dtype=torch.float64)
        return total


class _Recorder:
    """The uses of one module in one forward, and its squared norms over all samples (`total`, float64[])."""

    def __init__(self, name: str, module: nn.Module):
        self.name, self.has_bias = name, module.bias is not None
        self.total = torch.zeros((), dtype=torch.float64, device=module.weight.device)
        self.reached = False
        self._uses = 0
        self._arrived: list[tuple[Tensor, Tensor]] = []  # flattened input and output gradient of a use

    def use(self, inputs: Tensor) -> Callable[[Tensor], None]:
        """A run of the module on `inputs` float[…, in]; returns what to call with its output's gradient."""
        self._uses += 1
        inputs, version = inputs.detach(), inputs._version

        def arrived(gradient: Tensor) -> None:
            if inputs._version != version:
                raise VlmtuneError(
                    f"fisher_traces: the input of {self.name} was changed in place after it was read, so its gradient "
                    "cannot be known; measure with this module left out."
                )
            self._arrived.append((inputs.flatten(0, -2), gradient.flatten(0, -2)))
            if len(self._arrived) == self._uses:
                self.finish()

        return arrived

    def finish(self) -> None:
        """Add the norm of the gradient that all uses of this sample add up to."""
        if self._arrived:
            inputs, gradients = (torch.cat(parts) for parts in zip(*self._arrived, strict=True))
            self.total += squared_gradient_norm(inputs, gradients)
            if self.has_bias:
                self.total += gradients.sum(0, dtype=torch.float64).square().sum()
            self.reached = True
        self._uses, self._arrived = 0, []


class _Measurement:
    """Forward hooks that hand inputs and output gradients of the modules to their recorders."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.recorders = {name: _Recorder(name, module) for name, module in modules.items()}
        self._in_backward = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.modules.items():
                handle = module.register_forward_hook(self._hook(self.recorders[name]), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def backward(self, loss: Tensor, sample: str) -> None:
        """One sample: every recorder takes up its norm. A sample that reaches no module adds nothing."""
        if loss.requires_grad:
            self._in_backward = True
            loss.backward()
            self._in_backward = False
        for recorder in self.recorders.values():
            recorder.finish()
        totals = torch.stack([recorder.total.cpu() for recorder in self.recorders.values()])
        if not (math.isfinite(float(loss.detach())) and bool(totals.isfinite().all())):
            raise VlmtuneError(
                f"fisher_traces: loss or gradients of sample {sample} are not finite; look at it with vlmtune inspect, "
                "or measure in float32."
            )

    def _hook(self, recorder: _Recorder):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            if self._in_backward:
                raise VlmtuneError(
                    f"fisher_traces: {recorder.name} runs again in the backward, which would count it twice; switch "
                    "gradient checkpointing off."
                )
            inputs = args[0] if args else kwargs["input"]
            if output.requires_grad:
                output.register_hook(recorder.use(inputs))
                return output
            if inputs.requires_grad:
                raise VlmtuneError(
                    f"fisher_traces: {recorder.name} passes no gradient on to what comes before it; measure with "
                    "weights in another format."
                )
            # nothing before this module is measured: gradients begin to flow here. The copy may be changed in place
            start = output.detach().requires_grad_()
            start.register_hook(recorder.use(inputs))
            return start.clone()

        return hook


def _require_measurable(modules: Mapping[str, nn.Module]) -> None:
    if not modules:
        raise VlmtuneError("fisher_traces: there is no module to measure; name at least one.")
    for name, module in modules.items():
        if not is_linear(module):
            raise VlmtuneError(f"fisher_traces: {name} is a {type(module).__name__}; only linear modules are measured.")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no parameter that asks for a gradient, random numbers aside; all as before afterwards."""
    packing = [module for module in model.modules() if hasattr(module, _PACKS)]
    for module in packing:
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise VlmtuneError(
                "fisher_traces: 4-bit weights of this model were packed by a forward without gradients and pass none "
                f"on any more; load it anew and set {_PACKS} = False on its Linear4bit modules."
            )
    packs = [getattr(module, _PACKS) for module in packing]
    asks = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter, _ in asks if parameter.device.type == "cuda"}
    try:
        for parameter, _ in asks:
            parameter.requires_grad_(False)
        for module in packing:
            setattr(module, _PACKS, False)
        with evaluating(model), torch.random.fork_rng(devices=sorted(devices, key=str)), torch.enable_grad():
            yield
    finally:
        for module, flag in zip(packing, packs, strict=True):
            setattr(module, _PACKS, flag)
        for parameter, flag in asks:
            parameter.requires_grad_(flag)
