"""The configuration: small strict models, every complaint at once, the same objects as the Python API.

A file is YAML; `key=value` on the command line overrides one leaf (`optim.lr=1e-4`, `plan.2.rank=8`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vlmtune.data.prompts import system_prompt
from vlmtune.data.templates import TemplateWish
from vlmtune.errors import VlmtuneError
from vlmtune.losses.wishes import complete_weights, require_task_weights
from vlmtune.schedule import Length, piecewise

Task = Literal["caption", "vqa", "ocr", "grounding", "referring"]


def _checked(parse: Callable[[Any], Any]) -> AfterValidator:
    """Let `parse` complain while the config is read, with the key in front, instead of in the middle of a run."""

    def check(value: Any) -> Any:
        try:
            parse(value)
        except VlmtuneError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return value

    return AfterValidator(check)


def _parts_of_metrics(name: str) -> None:
    """Metrics are called group/task/metric."""
    if not name or "/" in name:
        raise VlmtuneError("a name is not empty and has no slash, because metrics are called group/task/metric")


ScheduleValue = Annotated[float | list[tuple[float, float]], _checked(piecewise)]
LengthValue = Annotated[str | float, _checked(Length.parse)]
INHERIT = "default"
SystemValue = Annotated[str, _checked(lambda wish: None if wish == INHERIT else system_prompt(wish))]
Name = Annotated[str, _checked(_parts_of_metrics)]
KindWeights = Annotated[
    dict[str, ScheduleValue],
    _checked(lambda weights: complete_weights({name: piecewise(w) for name, w in weights.items()})),
]
TaskWeights = Annotated[dict[Name, float], _checked(require_task_weights)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SomeLength = Annotated[str | float, _checked(Length.parse_positive)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


class Negatives(Strict):
    """Questions about what is not there, made of the samples of a source, each kind a task and a source of its own."""

    ratio: ScheduleValue | None = Field(
        None, description="negatives per sample, a schedule (default: 3 where replies are boxes, 1 for regions)"
    )
    hard: ScheduleValue = Field(1.0, description="part of negatives: another name of the same kind")
    random: ScheduleValue = Field(1.0, description="part of negatives: any other name")
    background: ScheduleValue | None = Field(
        None, description="part of negatives: empty places (default: 0 where replies are boxes, 1 for regions)"
    )
    verify: str = Field("Is {name} in {region}?", description="question whether a name is at a place (regions)")
    what: str = Field("What is in {region}?", description="question what is at an empty place (replies with boxes)")

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Negatives:
        parts = {name: piecewise(getattr(self, name) or 0.0).values for name in ("hard", "random", "background")}
        parts["ratio"] = piecewise(1.0 if self.ratio is None else self.ratio).values
        for name, values in parts.items():
            if min(values) < 0:
                raise ValueError(f"{name} is {min(values):g} at some time; parts and ratios are 0 or more")
        if max(parts["ratio"]) == 0:
            raise ValueError("ratio is 0 all the time; leave negatives out")
        for question, fields in ((self.verify, ("{name}", "{region}")), (self.what, ("{region}",))):
            wrong = [field for field in fields if question.count(field) != 1]
            if wrong:
                raise ValueError(f"the question {question!r} holds {wrong[0]} not exactly once")
        return self


class Source(Strict):
    """One stream of samples: conversations on disk or hub (`path`), or the scenes that ship with vlmtune (`scenes`)."""

    path: str | None = Field(
        None, description="file (.jsonl .json .csv .tsv .parquet .tar), folder of them, or hub:owner/name"
    )
    image_root: str | None = Field(
        None, description="folder that relative image paths start from (default: the file's)"
    )
    scenes: Literal["base", "new", "all"] | None = Field(None, description="endless generated scenes: concept group")
    task: Name | None = Field(None, description="task name: which scenes to draw, or the name for rows without one")
    weight: ScheduleValue = Field(1.0, description="share of the mixture; [[progress, weight], …] moves it")
    limit: int | None = Field(None, ge=1, description="use only the first N rows (of scenes: draw only N)")
    split: str = Field("train", description="of a folder or hub data set; of scenes: train or val (not for one file)")
    turns: int = Field(1, ge=1, description="questions about one scene, at most (training vqa, grounding, referring)")
    system: SystemValue | None = Field(
        INHERIT, description='system prompt: a name, file:path, a text, null, or "default" (data.system)'
    )
    start: int = Field(0, ge=0, description="index of the first scene (not for files)")
    negatives: Negatives | None = Field(None, description="questions about what is not there, beside the samples")

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        if (self.path is None) == (self.scenes is None):
            raise ValueError("give either path or scenes")
        if self.scenes is not None and self.task not in get_args(Task):
            raise ValueError(f"scenes need a task, one of {', '.join(get_args(Task))}")
        if self.scenes is not None and self.split not in ("train", "val"):
            raise ValueError(f"split of scenes is train or val, not {self.split!r}")
        if self.scenes is None and self.start:
            raise ValueError("start belongs to scenes; use limit, or a shorter file")
        if self.scenes is not None and self.image_root is not None:
            raise ValueError("image_root belongs to files; scenes draw their images")
        if self.turns > 1 and (self.scenes is None or self.split != "train" or self.task in ("caption", "ocr")):
            raise ValueError("turns belongs to training scenes of vqa, grounding or referring")
        if self.negatives is not None and self.scenes is not None and self.task not in ("grounding", "referring"):
            raise ValueError(f"negatives belong to scenes of grounding or referring, not {self.task}")
        return self


class Sampling(Strict):
    """Which task every sample of a batch has."""

    by: Literal["weights", "every_task", "grouped", "temperature"] = Field(
        "weights", description="weights of sources, all tasks in every batch, one task per batch, or by task loss"
    )
    temperature: float | None = Field(
        None, ge=0, description="temperature: shares of tasks follow loss^(1/temperature) (default 1)"
    )
    every: int | None = Field(None, ge=1, description="temperature: steps between two looks at the losses (default 50)")

    @model_validator(mode="after")
    def _options_have_effect(self) -> Sampling:
        idle = [name for name in ("temperature", "every") if getattr(self, name) is not None]
        if idle and self.by != "temperature":
            raise ValueError(f"{', '.join(idle)} means nothing with by: {self.by}")
        return self


class Data(Strict):
    train: list[Source] = Field(min_length=1)
    eval: dict[Name, Annotated[list[Source], Field(min_length=1)]] = Field(
        default_factory=dict, description="held-out groups by name"
    )
    max_length: int | None = Field(2048, ge=8, description="tokens per sample, images included")
    system: SystemValue | None = Field(
        None, description="system prompt of conversations without one: a name (vlmtune prompts), file:path, or a text"
    )
    template: TemplateWish = Field("auto", description="chat template: auto (the model's own) or one of ours, by name")
    on_overlong: Literal["error", "trim", "drop"] = Field(
        "error", description="samples above max_length: stop before training, trim (oldest turns first), or leave out"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="rows of files that cannot be used: stop at the first, or leave out and list (decodes all)"
    )
    reply_reserve: int = Field(64, ge=1, description="tokens a reply that is cut keeps at least (on_overlong: trim)")
    min_pixels: int | None = Field(None, ge=1, description="of one image after its resize (default: the processor's)")
    max_pixels: int | None = Field(None, ge=1, description="of one image after its resize (default: the processor's)")
    max_pixels_per_sample: int | None = Field(None, ge=1, description="of all images of a sample together")
    coordinates: str = Field("auto", description="how boxes and points are written: auto, norm1000, pixels, …")
    new_tokens: list[str] = Field(default_factory=list, description="tokens to add, spelled as in the data")
    add_coordinate_tokens: bool = Field(False, description="add those tokens of `coordinates` that the model lacks")
    sampling: Sampling = Sampling()
    workers: int = Field(1, ge=0, description="processes that decode and encode ahead")

    @model_validator(mode="after")
    def _window_has_a_size(self) -> Data:
        if self.system == INHERIT:
            raise ValueError(f"system: {INHERIT} means data.system, and this is it; write a name, file:path or a text")
        if self.max_length is None and self.on_overlong != "error":
            raise ValueError(f"on_overlong: {self.on_overlong} needs a max_length")
        if self.sampling.by != "weights" and any(source.weight != 1.0 for source in self.train):
            raise ValueError(f"sampling by {self.sampling.by} draws from tasks; leave out the weights of sources")
        ratios = any(source.negatives is not None and source.negatives.ratio is not None for source in self.train)
        if self.sampling.by != "weights" and ratios:
            raise ValueError(f"sampling by {self.sampling.by} draws from tasks; leave out the ratio of negatives")
        return self


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
    lr: float | None = Field(None, gt=0, description="learning rate (default: optim.lr)")
    weight_decay: float | None = Field(None, ge=0, description="(default: optim.weight_decay)")
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
    store: Literal["fp32", "bf16", "nf4", "int8"] = Field("fp32", description="number format of the base weights")
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
        if self.train == "frozen" and (self.lr is not None or self.weight_decay is not None):
            raise ValueError("lr and weight_decay mean nothing on frozen parameters")
        if self.init != "keep" and self.train != "full":
            raise ValueError(f"init: {self.init} throws weights away, so they must all learn again: train: full")
        if self.store in ("nf4", "int8") and self.train in ("full", "new_rows"):
            raise ValueError(
                f"store: {self.store} with train: {self.train}: quantised weights have no gradient; say train: lora "
                "(or another adapter), or leave store out"
            )
        if self.store != "fp32" and self.train in ("full", "new_rows"):
            raise ValueError(
                f"store: {self.store} with train: {self.train} would lose small updates; what trains is kept in float32"
            )
        return self


class Quantise(Strict):
    """How rules with store: nf4 keep weights."""

    double: bool = Field(True, description="quantise the constants too: 0.127 instead of 0.5 bit per weight")


class Optim(Strict):
    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw", description="8bit: state in 8 bits; paged: state that can move to the host (needs CUDA)"
    )
    lr: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="never applied to LoRA, norms and biases")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="global gradient norm")
    warmup: LengthValue = Field("3%", description="length: steps, epochs, samples or %")
    floor: float = Field(0.1, ge=0, le=1, description="the cosine ends at floor x lr")


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


class Loss(Strict):
    weights: KindWeights = Field(
        default_factory=dict, description="kind of token -> weight, a number or [[progress, weight], …]"
    )
    balance: Balance = Balance()
    box: BoxTerm | None = Field(None, description="loss of the boxes of replies")
    referring: ReferringTerm | None = Field(None, description="losses of regions that have a mask")
    exposure: ExposureTerm | None = Field(None, description="scheduled sampling inside replies")

    @model_validator(mode="after")
    def _box_is_read(self) -> Loss:
        by_tokens = self.box is not None and self.box.read == "tokens"
        if by_tokens and min(piecewise(self.weights.get("box", 1.0)).values) == 0:
            raise ValueError("box reads tokens that carry loss; keep weights.box above 0 all the time")
        return self


class Train(Strict):
    length: SomeLength = Field("1 epochs", description="steps, epochs or samples")
    batch_size: int = Field(16, ge=1, description="samples per optimizer step")
    micro_batch_size: int = Field(8, ge=1, description="samples per forward")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads for the model")
    gradient_checkpointing: bool = False
    log_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Train:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class Checkpoint(Strict):
    every: SomeLength = Field("500 steps", description="steps, epochs or samples")
    keep: int = Field(2, ge=1, description="newest checkpoints kept (latest is one of them), besides best")
    best: str = Field("loss", description='"loss", or a metric "group/task/metric"')
    best_is: Literal["lowest", "highest"] | None = Field(None, description="default: of a loss lowest, else highest")

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
    gallery: int = Field(24, ge=0, description="held-out samples shown with pictures on the run page")


class Config(Strict):
    model: str = Field(min_length=1, description='folder, hub name, "embedded", or "embedded_untrained"')
    data: Data
    plan: list[Rule] = Field(min_length=1, description="ordered rules over canonical parameter names; first match wins")
    loss: Loss = Loss()
    quantise: Quantise = Quantise()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    run: str = Field("runs/run", min_length=1, description="run folder")

    @model_validator(mode="after")
    def _quantise_has_effect(self) -> Config:
        if not self.quantise.double and not any(rule.store == "nf4" for rule in self.plan):
            raise ValueError("quantise.double means nothing without a rule that says store: nf4")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Config:
        if self.checkpoint.best != "loss" and not (self.data.eval and self.evaluate.every):
            raise ValueError(
                f"checkpoint.best {self.checkpoint.best} is never measured; set data.eval and evaluate.every"
            )
        return self


class _NoDuplicates(yaml.SafeLoader):
    """YAML's plain loader keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value} stands on line {seen[key.value]} and again on line {line}")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def differing_keys(tree: Any, other: Any, place: str = "") -> list[str]:
    """ "train.seed (0 -> 1)" for every leaf in which two dumped configs differ."""
    if isinstance(tree, dict) and isinstance(other, dict):
        pairs = [(str(key), tree.get(key), other.get(key)) for key in {**tree, **other}]
    elif isinstance(tree, list) and isinstance(other, list) and len(tree) == len(other):
        pairs = [(str(n), *pair) for n, pair in enumerate(zip(tree, other, strict=True))]
    else:
        return [] if tree == other else [f"{place} ({_short(tree)} -> {_short(other)})"]
    return [found for key, *pair in pairs for found in differing_keys(*pair, f"{place}.{key}".lstrip("."))]


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def recipe_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("vlmtune.recipes").iterdir() if p.name.endswith(".yaml")
    )


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a shipped recipe by name and apply `key=value` overrides.

    Raises VlmtuneError listing every complaint at once.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise VlmtuneError(f"config {name} does not exist; recipes that ship: {', '.join(recipe_names())}.")
        try:
            text, where = path.read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise VlmtuneError(f"config {name} cannot be read ({error}); it is a YAML file in UTF-8.") from error
    elif name in recipe_names():
        text, where = (resources.files("vlmtune.recipes") / f"{name}.yaml").read_text(), f"recipe {name}"
    else:
        near = difflib.get_close_matches(name, recipe_names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise VlmtuneError(f"{name!r} is neither a .yaml file nor a recipe ({', '.join(recipe_names())}).{hint}")
    try:
        tree = yaml.load(text, Loader=_NoDuplicates)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise VlmtuneError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise VlmtuneError(f"{where}: a config is a mapping with the keys {', '.join(Config.model_fields)}.")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where)


def parse_config(tree: dict, where: str = "config") -> Config:
    """Validate a tree. Raises VlmtuneError naming every wrong key and value."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise VlmtuneError(f"{where}: " + "; ".join(_complaint(e) for e in error.errors()) + ".") from error


def _complaint(error: Any) -> str:
    place = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        return f"unknown key {place}" + (f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})")
    if error["type"] == "missing":
        return f"{place} is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place or 'config'}: {message[0].lower() + message[1:]}" + (
        f" (got {error['input']!r})" if isinstance(error["input"], (str, int, float)) else ""
    )


def _fields_at(location: tuple) -> list[str]:
    """Field names of the model at a place in the tree."""
    places: dict[tuple, type[BaseModel]] = {
        (): Config, ("data",): Data, ("plan",): Rule, ("optim",): Optim, ("train",): Train,
        ("quantise",): Quantise, ("checkpoint",): Checkpoint, ("evaluate",): Evaluate,
        ("data", "train"): Source, ("data", "eval"): Source,
        ("data", "sampling"): Sampling, ("loss",): Loss, ("loss", "balance"): Balance,
        ("data", "train", "negatives"): Negatives,
        ("loss", "box"): BoxTerm, ("loss", "referring"): ReferringTerm, ("loss", "exposure"): ExposureTerm,
    }  # fmt: skip
    names = tuple(step for step in location if isinstance(step, str))
    model = places.get(names) or places.get(names[:2]) or Config
    return list(model.model_fields)


def _apply_override(tree: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise VlmtuneError(f"override {override!r}: write key=value, for example optim.lr=1e-4.")
    *parents, leaf = key.split(".")
    node = tree
    for step in parents:
        if isinstance(node, list):
            node = _list_item(node, step, override)
        else:
            node = node.setdefault(step, {})
        if not isinstance(node, (dict, list)):
            raise VlmtuneError(f"override {override!r}: {step} is a value, not a section.")
    if isinstance(node, list):
        _list_item(node, leaf, override)
        node[int(leaf)] = _parse_value(value)
    else:
        node[leaf] = _parse_value(value)


def _parse_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text  # "*" alone is an alias in YAML and a pattern here
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _list_item(node: list, step: str, override: str) -> Any:
    if not step.isdigit() or int(step) >= len(node):
        raise VlmtuneError(f"override {override!r}: {step!r} is not an index below {len(node)}.")
    return node[int(step)]


def dump_config(config: Config) -> str:
    """YAML with every value resolved; `load_config` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
