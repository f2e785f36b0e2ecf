"""The loss section: weights of tokens, balance of tasks, further terms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmtune.config.values import Name, Positive, ScheduleValue, Strict, checked
from vlmtune.losses.wishes import complete_weights, require_task_weights
from vlmtune.schedule import piecewise

KindWeights = Annotated[
    dict[str, ScheduleValue],
    checked(lambda weights: complete_weights({name: piecewise(w) for name, w in weights.items()})),
]
TaskWeights = Annotated[dict[Name, float], checked(require_task_weights)]


class Balance(Strict):
    by: Literal["tokens", "fixed", "inverse", "uncertainty", "gradnorm"] = Field(
        "tokens", description="how the losses of several tasks become one number"
    )
    weights: TaskWeights | None = Field(None, description="fixed: task -> weight of its mean loss")
    initial: dict[Name, Positive] | None = Field(
        None, description="inverse, gradnorm: task -> the loss it begins with (default: measured)"
    )
    initial_steps: int | None = Field(None, ge=1, description="inverse, gradnorm: steps to measure it in (default 10)")
    alpha: float | None = Field(None, ge=0, description="gradnorm: how strongly slow tasks are pulled up (default 1.5)")
    lr: float | None = Field(None, gt=0, description="uncertainty, gradnorm: of what they learn (default 0.025)")

    @model_validator(mode="after")
    def _options_have_effect(self) -> Balance:
        effective = {
            "tokens": (), "fixed": ("weights",), "inverse": ("initial", "initial_steps"), "uncertainty": ("lr",),
            "gradnorm": ("initial", "initial_steps", "alpha", "lr"),
        }[self.by]  # fmt: skip
        names = ("weights", "initial", "initial_steps", "alpha", "lr")
        idle = [name for name in names if getattr(self, name) is not None and name not in effective]
        if idle:
            raise ValueError(f"{', '.join(idle)} means nothing with by: {self.by}")
        if self.by == "fixed" and self.weights is None:
            raise ValueError("by: fixed needs weights: a number for every task")
        if self.initial is not None and self.initial_steps is not None:
            raise ValueError("initial_steps measures what initial gives; keep one")
        return self


class BoxTerm(Strict):
    """A loss of boxes beside the cross-entropy of their tokens."""

    l1: float = Field(1.0, ge=0, description="weight of the absolute differences, summed over four numbers")
    giou: float = Field(1.0, ge=0, description="weight of 1 - generalised IoU")
    read: Literal["tokens", "head"] = Field(
        "tokens", description="from the probabilities of coordinate tokens, or by a new head from the state before them"
    )

    @model_validator(mode="after")
    def _has_weight(self) -> BoxTerm:
        if self.l1 == self.giou == 0:
            raise ValueError("l1 and giou are both 0, so nothing would be added; leave loss.box out")
        return self


class ReferringTerm(Strict):
    """Losses of every region that has a mask, read by new heads."""

    mask: float = Field(1.0, ge=0, description="weight of the binary cross-entropy of the mask")
    box: float = Field(0.5, ge=0, description="weight of L1 + 1 - generalised IoU of the box")
    consistency: float = Field(0.1, ge=0, description="weight of the squared difference of mask and box")

    @model_validator(mode="after")
    def _has_weight(self) -> ReferringTerm:
        if self.mask == self.box == self.consistency == 0:
            raise ValueError("mask, box and consistency are all 0, so nothing would be added; leave referring out")
        return self


class ExposureTerm(Strict):
    """Scheduled sampling: replies are read partly as the model predicts them."""

    rate: float = Field(0.25, gt=0, le=1, description="probability per token where teacher forcing has ended")
    decay: Literal["linear", "exponential", "inverse_sigmoid"] = Field(
        "linear", description="how teacher forcing falls with progress"
    )
    start: float = Field(0.0, ge=0, lt=1, description="progress before which nothing is exchanged")
    k: float | None = Field(None, gt=0, description="exponential: left at the end (0.01); inverse_sigmoid: >= 1 (10)")

    @model_validator(mode="after")
    def _k_fits(self) -> ExposureTerm:
        if self.k is not None and self.decay == "linear":
            raise ValueError("k means nothing with decay: linear")
        if self.k is not None and self.decay == "exponential" and self.k >= 1:
            raise ValueError(f"k {self.k:g} of an exponential decay is what is left at the end, below 1")
        if self.k is not None and self.decay == "inverse_sigmoid" and self.k < 1:
            raise ValueError(f"k {self.k:g} of an inverse_sigmoid decay is 1 or more")
        return self


class ConsistencyTerm(Strict):
    """Replies should be likelier with their image than with another one."""

    weight: ScheduleValue = Field(0.2, description="weight of the mean over samples; [[progress, weight], …] moves it")
    by: Literal["margin", "contrast"] = Field(
        "margin", description="hinge on the difference of mean log-probabilities, or its logistic loss"
    )
    margin: float | None = Field(None, gt=0, description="margin: nats per token (default 0.5)")
    other: Literal["another", "blank"] = Field("another", description="pictures of another sample of the step, or grey")
    tasks: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="tasks whose replies have to depend on the image (default: all)"
    )

    @model_validator(mode="after")
    def _has_effect(self) -> ConsistencyTerm:
        weights = piecewise(self.weight).values
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError("weight is below 0 at some time, or 0 all the time; leave consistency out")
        if self.margin is not None and self.by != "margin":
            raise ValueError(f"margin means nothing with by: {self.by}")
        return self


class Loss(Strict):
    weights: KindWeights = Field(
        default_factory=dict, description="kind of token -> weight, a number or [[progress, weight], …]"
    )
    balance: Balance = Balance()
    box: BoxTerm | None = Field(None, description="loss of the boxes of replies")
    referring: ReferringTerm | None = Field(None, description="losses of regions that have a mask")
    exposure: ExposureTerm | None = Field(None, description="scheduled sampling inside replies")
    consistency: ConsistencyTerm | None = Field(None, description="replies that depend on the image")

    @model_validator(mode="after")
    def _box_is_read(self) -> Loss:
        by_tokens = self.box is not None and self.box.read == "tokens"
        if by_tokens and min(piecewise(self.weights.get("box", 1.0)).values) == 0:
            raise ValueError("box reads tokens that carry loss; keep weights.box above 0 all the time")
        return self
