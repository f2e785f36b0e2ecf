"""The whole config."""

from __future__ import annotations

from pydantic import Field, model_validator

from vlmtune.config.course import Checkpoint, Evaluate, Optim, Stability, Train
from vlmtune.config.data import Data
from vlmtune.config.loss import Loss
from vlmtune.config.plan import Quantise, Rule
from vlmtune.config.values import Strict
from vlmtune.schedule import learning_rates


class Config(Strict):
    model: str = Field(min_length=1, description='folder, hub name, "embedded", or "embedded_untrained"')
    data: Data
    plan: list[Rule] = Field(min_length=1, description="ordered rules over canonical parameter names; first match wins")
    loss: Loss = Loss()
    quantise: Quantise = Quantise()
    optim: Optim = Optim()
    train: Train = Train()
    stability: Stability = Stability()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    run: str = Field("runs/run", min_length=1, description="run folder")

    @model_validator(mode="after")
    def _quantise_has_effect(self) -> Config:
        if not self.quantise.double and not any(rule.store == "nf4" for rule in self.plan):
            raise ValueError("quantise.double means nothing without a rule that says store: nf4")
        return self

    @model_validator(mode="after")
    def _a_sample_fits_into_a_forward(self) -> Config:
        tokens, longest = self.train.micro_batch_tokens, self.data.max_length
        if tokens is not None and longest is not None and longest > tokens:
            raise ValueError(
                f"train.micro_batch_tokens is {tokens}, but one sample may have {longest} (data.max_length); raise it, "
                "or lower data.max_length"
            )
        return self

    @model_validator(mode="after")
    def _stretches_peak_at_lr(self) -> Config:
        for place, schedule, lr in [
            ("optim", self.optim.schedule, self.optim.lr),
            *((f"plan.{n}", rule.schedule, rule.lr or self.optim.lr) for n, rule in enumerate(self.plan)),
        ]:
            if isinstance(schedule, list):
                peak = max(rate for part in schedule for rate in (part.to, part.start or 0.0))
                highest = max(learning_rates(lr).values)
                if peak != highest:
                    raise ValueError(
                        f"{place}.schedule rises to {peak:g}, but the learning rate is {highest:g}; make them equal"
                    )
        return self

    @model_validator(mode="after")
    def _retained_is_held_out(self) -> Config:
        for group in self.evaluate.retain:
            if group not in self.data.eval:
                known = ", ".join(self.data.eval) or "none"
                raise ValueError(f"evaluate.retain: {group} is no group of data.eval ({known})")
        return self

    @model_validator(mode="after")
    def _can_stop_early(self) -> Config:
        if self.checkpoint.patience is not None and not (self.data.eval and self.evaluate.every):
            raise ValueError("checkpoint.patience counts evaluations; set data.eval and evaluate.every")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Config:
        if self.checkpoint.best != "loss" and not (self.data.eval and self.evaluate.every):
            raise ValueError(
                f"checkpoint.best {self.checkpoint.best} is never measured; set data.eval and evaluate.every"
            )
        return self
