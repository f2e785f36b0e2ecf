"""Whether the model may compute the same with less work: exchanged modules (`train.fused`) and rows without padding
(`train.packing`), each kept only where it gives the states that the model gives by itself."""

from __future__ import annotations

from typing import Literal

import torch

from vlmtune.adapt.fused import use_fused, use_stock
from vlmtune.adapt.plan import Plan
from vlmtune.models.packing import packing_refusal, use_packed_attention, use_padding
from vlmtune.models.vlm import VLM, evaluating
from vlmtune.optim.precision import SAME_LOSS, Precision, autocast
from vlmtune.types import Batch, Finding, VlmtuneError

NEED_PADDING = {"cross_modal"}
"""Methods whose modules look at rows of a batch."""

FUSED = "modules with fewer passes give the model's own states"
PACKED = "without padding the model has its own states"


def start_fast(
    model: torch.nn.Module,
    plan: Plan,
    fused: bool,
    packing: bool | Literal["auto"],
    batch: Batch,
    precision: Precision,
    check: bool = True,
) -> list[Finding]:
    """Have the model compute the same with less work, as far as it is wanted and gives the same states on this batch.

    check: compare states; False: nothing is run. Raises VlmtuneError where packing is wanted and cannot be.
    """
    refusal = _packing_refusal(model, plan)
    findings = []
    if packing and refusal is not None:
        findings.append(_padding_stays(packing, Finding("pass", "padding stays", refusal)))
    packs = bool(packing) and refusal is None
    own = _States(model, batch, precision) if check and (fused or packs) else None
    count = use_fused(model) if fused else 0
    if packs:
        use_packed_attention(model)
    if own is None:
        return findings
    padding = 1 - float(batch.inputs["attention_mask"].float().mean())
    share, modules = f"{padding:.0%} of this batch is padding", f"{count} modules"
    gap = own.gap() if count or packs else 0.0
    if gap <= SAME_LOSS[precision]:
        evidence = f"largest difference {gap:.1e} of the largest state"
        if count:
            findings.append(Finding("pass", FUSED, f"{modules}, {evidence}"))
        if packs:
            findings.append(Finding("pass", PACKED, f"{evidence}; {share}"))
        return findings
    # something differs: each on its own
    use_stock(model)
    if packs:
        packed = own.gap()
        finding = _compared(PACKED, packed, share, precision, "padding stays; please report it")
        if finding.level == "warn":
            use_padding(model)
            finding = _padding_stays(packing, finding)
        findings.append(finding)
    if count:
        use_fused(model)
        finding = _compared(FUSED, own.gap(), modules, precision, "the model's own are used; please report it")
        if finding.level == "warn":
            use_stock(model)
        findings.append(finding)
    return findings


class _States:
    """What the model computes by itself on a batch where there is loss, to compare with."""

    def __init__(self, model: torch.nn.Module, batch: Batch, precision: Precision):
        self.model, self.batch, self.precision = model, batch.to(model.device), precision
        self.vlm = VLM(model)
        self.own = self._now()

    def gap(self) -> float:
        """The largest difference to what the model computes now, in units of the largest state; NaN for states that
        are not finite."""
        return float((self._now() - self.own).abs().max() / self.own.abs().max())

    def _now(self) -> torch.Tensor:
        with evaluating(self.model), torch.no_grad(), autocast(self.precision, self.model.device):
            return self.vlm(self.batch, every_state=False).hidden.float()


def _compared(what: str, gap: float, of: str, precision: Precision, remedy: str) -> Finding:
    evidence = f"largest difference {gap:.1e} of the largest state; {of}"
    if gap <= SAME_LOSS[precision]:
        return Finding("pass", what, evidence)
    return Finding("warn", what, f"no: {evidence}", remedy)


def _packing_refusal(model: torch.nn.Module, plan: Plan) -> str | None:
    methods = sorted({policy.train for policy in plan.policies.values()} & NEED_PADDING)
    return f"train: {methods[0]} reads padded rows" if methods else packing_refusal(model)


def _padding_stays(wish: bool | Literal["auto"], finding: Finding) -> Finding:
    if wish == "auto":
        return finding
    raise VlmtuneError(f"train.packing: {finding.evidence}; set it to auto or false.")
