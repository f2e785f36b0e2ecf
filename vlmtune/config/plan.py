"""The plan section: what happens to which parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from vlmtune.config.learning_rate import LrSchedule, LrValue, require_effect
from vlmtune.config.values import LengthValue, Strict

RankKind = Literal["qk", "vo", "up", "down", "cross", "other"]


def _rank(value: Any) -> Any:
    """One sentence for whatever is no rank; pydantic would complain once for each form that it could have had."""

    def is_rank(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 1

    kinds = get_args(RankKind)
    if is_rank(value) or value is None:
        return value
    if isinstance(value, dict) and value and set(value) <= set(kinds) and all(map(is_rank, value.values())):
        return value
    raise ValueError(f"write a whole number from 1 up, or one for each kind: {{qk: 8, vo: 16}} with {', '.join(kinds)}")


RankValue = Annotated[int | dict[RankKind, int] | None, BeforeValidator(_rank)]


class Rule(Strict):
    """What happens to the parameters whose canonical name the pattern covers."""

    match: str
    train: Literal["frozen", "full", "lora", "ia3", "adapter", "cross_modal", "prefix", "peft", "new_rows"]
    lr: LrValue | None = Field(
        None, description="peak learning rate, or [[progress, lr], …]; 0 is frozen (default: optim.lr)"
    )
    weight_decay: float | None = Field(None, ge=0, description="(default: optim.weight_decay)")
    schedule: LrSchedule | None = Field(None, description="how the learning rate moves (default: optim.schedule)")
    warmup: LengthValue | None = Field(
        None, description="of the schedule, and of what starts to train later (default: optim.warmup)"
    )
    floor: float | None = Field(None, ge=0, le=1, description="where the schedule ends (default: optim.floor)")
    clip: float | None = Field(None, gt=0, description="own limit of the gradient norm (default: with the rest)")
    rank: RankValue = Field(
        None, description="LoRA rank, or one for each kind of module: {qk: 8, vo: 16, up: 32, down: 16} (default 16)"
    )
    alpha: float | None = Field(None, gt=0, description="LoRA alpha (default: 2 x rank)")
    dropout: float | None = Field(None, ge=0, lt=1, description="LoRA dropout (default 0)")
    lr_b: float | None = Field(None, gt=0, description="LoRA+: factor on the learning rate of B (default 1)")
    method: str | None = Field(None, description="train: peft: which of peft's methods, for example loha, oft, boft")
    options: dict[str, Any] = Field(
        default_factory=dict, description="further fields of the method's config: {use_dora: true}, {dim: 64}, …"
    )
    store: Literal["auto", "fp32", "bf16", "nf4", "int8"] = Field(
        "auto", description="number format of the base weights; auto: no longer than their products need"
    )
    compute: Literal["auto", "fp32"] = Field("auto", description="number format of its modules under bf16 and fp16")
    batchnorm: Literal["batch", "frozen", "sync"] = Field(
        "batch", description="statistics of trained BatchNorm: of micro-batches, the base's, or of the whole step"
    )
    init: Literal["keep", "xavier"] = Field("keep", description="full: keep the weights, or draw them anew")

    @model_validator(mode="after")
    def _options_have_effect(self) -> Rule:
        given = [name for name in ("rank", "alpha", "dropout", "lr_b") if getattr(self, name) is not None]
        if self.train != "lora" and given:
            raise ValueError(f"{', '.join(sorted(given))} only mean something with train: lora")
        if self.options and self.train in ("frozen", "full", "new_rows"):
            raise ValueError(f"options mean nothing with train: {self.train}")
        if (self.method is None) == (self.train == "peft"):
            raise ValueError("method belongs to train: peft, and train: peft needs one")
        moves = ("lr", "weight_decay", "schedule", "warmup", "floor", "clip")
        idle = [name for name in moves if getattr(self, name) is not None]
        if self.train == "frozen" and idle:
            raise ValueError(f"{', '.join(idle)} mean nothing on frozen parameters")
        if self.train == "frozen" and self.batchnorm != "batch":
            raise ValueError("batchnorm means nothing on frozen parameters: their statistics are frozen too")
        if self.schedule is not None:
            require_effect(self.schedule, self.warmup, self.floor, None)
        if self.compute == "fp32" and self.store not in ("auto", "fp32"):
            raise ValueError(f"compute: fp32 needs weights in float32; leave out store: {self.store}")
        if self.init != "keep" and self.train != "full":
            raise ValueError(f"init: {self.init} throws weights away, so they must all learn again: train: full")
        if self.store in ("nf4", "int8") and self.train in ("full", "new_rows"):
            raise ValueError(
                f"store: {self.store} with train: {self.train}: quantised weights have no gradient; say train: lora "
                "(or another adapter), or leave store out"
            )
        if self.store not in ("auto", "fp32") and self.train in ("full", "new_rows"):
            raise ValueError(
                f"store: {self.store} with train: {self.train} would lose small updates; what trains is kept in float32"
            )
        return self


class Quantise(Strict):
    """How rules with store: nf4 keep weights."""

    double: bool = Field(True, description="quantise the constants too: 0.127 instead of 0.5 bit per weight")
