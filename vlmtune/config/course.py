"""The sections about the course of a run: optimizer, batches, failures, checkpoints, evaluations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmtune.config.learning_rate import LrSchedule, require_effect
from vlmtune.config.values import Beta, LengthValue, MetricName, Name, RunLength, SomeLength, Strict
from vlmtune.evaluate.names import REGION_METRICS


class Optim(Strict):
    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw", description="8bit: state in 8 bits; paged: state that can move to the host (needs CUDA)"
    )
    lr: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="never applied to LoRA, norms and biases")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0, description="limit of the joint gradient norm; null: none")
    schedule: LrSchedule = Field("cosine", description="cosine, linear, constant, wsd, or a list of stretches")
    warmup: LengthValue | None = Field(None, description="length: steps, epochs, samples or % (default 3%)")
    floor: float | None = Field(None, ge=0, le=1, description="cosine, linear, wsd end at floor x lr (default 0.1)")
    decay: SomeLength | None = Field(None, description="wsd: length of the decay at the end (default 20%)")
    lr_batch: int | None = Field(None, ge=1, description="batch size that the learning rates are meant for")
    scaling: Literal["linear", "sqrt"] | None = Field(
        None, description="how learning rates follow train.batch_size / lr_batch"
    )

    @model_validator(mode="after")
    def _options_have_effect(self) -> Optim:
        require_effect(self.schedule, self.warmup, self.floor, self.decay)
        if (self.lr_batch is None) != (self.scaling is None):
            raise ValueError("lr_batch and scaling belong together: lr x batch_size / lr_batch, or its square root")
        return self


class Train(Strict):
    length: RunLength = Field("1 epochs", description="steps, epochs or samples")
    batch_size: int = Field(16, ge=1, description="samples per optimizer step, of all processes together")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples per forward (default: 8, or as many as micro_batch_tokens holds)"
    )
    micro_batch_tokens: int | None = Field(
        None, ge=8, description="tokens per forward at most, padding included where there is any"
    )
    packing: Literal["auto"] | bool = Field(
        "auto", description="samples of a forward in one row without padding; auto: where the model's family can"
    )
    fused: bool = Field(
        True, description="modules that compute the same in fewer passes over memory, where there are any"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where the hardware has it, else fp32"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads for the model")
    gradient_checkpointing: bool | Annotated[list[Literal["vision", "language"]], Field(min_length=1)] = Field(
        False, description="recompute activations in the backward; a list of parts: only of their blocks"
    )
    log_every: int = Field(10, ge=1)
    shard: Literal["auto", True, False] = Field(
        "auto",
        description="several processes hold a part of the model each (FSDP2); auto: where it is too large for one",
    )
    rank_timeout: float = Field(
        300.0, ge=1, description="of several processes: seconds that a silent one is waited for"
    )

    @model_validator(mode="after")
    def _divides(self) -> Train:
        if self.micro_batch_tokens is None and self.batch_size % self.samples_per_forward:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.samples_per_forward}"
            )
        return self

    @property
    def samples_per_forward(self) -> int:
        """At most."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return min(self.batch_size, 8) if self.micro_batch_tokens is None else self.batch_size


class Stability(Strict):
    """What a run does about numbers that are not finite, and about losses that jump."""

    nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop", description="a loss or gradient is not finite: stop, leave the batch out, or go back a checkpoint"
    )
    spikes: Literal["warn", "rewind"] = Field("warn", description="the loss jumps or climbs: say so, or go back")
    limit: int | None = Field(None, ge=1, description="batches left out and rewinds together, then stop (default 10)")
    lr_factor: float | None = Field(None, gt=0, le=1, description="rewind: on every learning rate (default 0.5)")
    statistics: SomeLength | None = Field(
        "100 steps", description="interval of statistics of every parameter's gradient; null: never"
    )

    @model_validator(mode="after")
    def _options_have_effect(self) -> Stability:
        if self.lr_factor is not None and "rewind" not in (self.nonfinite, self.spikes):
            raise ValueError("lr_factor means nothing without rewind")
        if self.limit is not None and self.nonfinite == "stop" and self.spikes == "warn":
            raise ValueError("limit means nothing where nothing is skipped and nothing goes back")
        return self


class Checkpoint(Strict):
    every: SomeLength = Field("500 steps", description="steps, epochs or samples")
    keep: int = Field(2, ge=1, description="newest checkpoints kept (latest is one of them), besides best")
    background: bool = Field(
        False, description="a thread writes while training goes on, from a copy in the memory of the host"
    )
    best: str = Field("loss", description='"loss", or a metric "group/task/metric"')
    best_is: Literal["lowest", "highest"] | None = Field(None, description="default: of a loss lowest, else highest")

    patience: int | None = Field(None, ge=1, description="stop after so many evaluations that are no better")
    delta: float | None = Field(None, gt=0, description="what counts as better for patience (default: anything)")

    @model_validator(mode="after")
    def _delta_has_effect(self) -> Checkpoint:
        if self.delta is not None and self.patience is None:
            raise ValueError("delta means nothing without patience")
        return self

    @model_validator(mode="after")
    def _best_has_a_direction(self) -> Checkpoint:
        is_loss = self.best == "loss" or self.best.startswith("loss/")
        if self.best_is is not None and is_loss != (self.best_is == "lowest"):
            raise ValueError(
                f"best_is {self.best_is} of {self.best} would keep the worst checkpoint; leave best_is out"
            )
        return self


class Evaluate(Strict):
    every: SomeLength | None = Field(None, description="steps, epochs or samples (default: only before and after)")
    generate: bool = Field(True, description="generate replies and score them, besides the loss")
    limit: int | None = Field(None, ge=1, description="samples per source during training (before and after: all)")
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    metrics: dict[Name, Annotated[list[MetricName], Field(min_length=1)]] = Field(
        default_factory=dict, description="task -> its metrics, instead of those it has by itself"
    )
    choices: dict[Name, list[str]] = Field(
        default_factory=dict, description="task -> answers that are ranked by probability (a row's meta.choices first)"
    )
    alpha: float = Field(0.7, ge=0, le=1, description="choices are ranked by log p / tokens^alpha")
    gallery: int = Field(24, ge=0, description="held-out samples shown with pictures on the run page")
    samples_every: SomeLength | None = Field(
        None, description="steps, epochs or samples between two replies to those (default: at every evaluation)"
    )
    retain: list[Name] = Field(
        default_factory=list, description="groups of data.eval that hold what the base could do (vlmtune validate)"
    )

    @model_validator(mode="after")
    def _samples_are_generated(self) -> Evaluate:
        idle = next(
            (name for name, on in (("generate: false", not self.generate), ("gallery: 0", not self.gallery)) if on),
            None,
        )
        if self.samples_every is not None and idle is not None:
            raise ValueError(f"samples_every means nothing with {idle}")
        return self

    @model_validator(mode="after")
    def _metrics_can_be_measured(self) -> Evaluate:
        for task, names in self.metrics.items():
            if len(set(names)) < len(names):
                raise ValueError(f"metrics.{task} names a metric twice")
            replies = [name for name in names if name not in REGION_METRICS]
            if replies and not self.generate:
                raise ValueError(
                    f"metrics.{task}: {replies[0]} is measured on generated replies; set generate: true, or take it out"
                )
        return self
