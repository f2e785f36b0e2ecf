"""The data section: sources, negatives, sampling, and how samples are made to fit."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from vlmtune.config.values import Name, ScheduleValue, Strict, checked, read_by
from vlmtune.data.complexity_rule import ComplexityRule
from vlmtune.data.prompts import system_prompt
from vlmtune.data.templates import TemplateWish
from vlmtune.errors import VlmtuneError
from vlmtune.schedule import piecewise
from vlmtune.sizes import parse_bytes

Task = Literal["caption", "vqa", "ocr", "grounding", "referring"]
INHERIT = "default"
SizeValue = Annotated[str, read_by(parse_bytes, "write a number and a unit, for example 20GB")]
SystemValue = Annotated[str, checked(lambda wish: None if wish == INHERIT else system_prompt(wish))]


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

    by: Literal["weights", "every_task", "grouped", "temperature", "active"] = Field(
        "weights",
        description="weights of sources, all tasks in every batch, one task per batch, by task loss, or by difficulty",
    )
    temperature: float | None = Field(
        None, ge=0, description="temperature: shares of tasks follow loss^(1/temperature) (default 1)"
    )
    every: int | None = Field(
        None, ge=1, description="temperature, active: steps between two looks at the losses (default 50)"
    )
    measure: Literal["loss", "accuracy", "forgetting"] | None = Field(
        None, description="active: what makes a sample difficult: loss, accuracy, or forgetting (default loss)"
    )
    floor: float | None = Field(None, gt=0, le=1, description="active: share of draws that is uniform (default 0.5)")

    @model_validator(mode="after")
    def _options_have_effect(self) -> Sampling:
        used = {"temperature": ("temperature", "every"), "active": ("every", "measure", "floor")}.get(self.by, ())
        given = [name for name in ("temperature", "every", "measure", "floor") if getattr(self, name) is not None]
        idle = [name for name in given if name not in used]
        if idle:
            raise ValueError(f"{', '.join(idle)} means nothing with by: {self.by}")
        return self


class Complexity(Strict):
    """Fewer pixels, or merged tokens, for simple images."""

    measure: Literal["edges", "entropy", "text", "detail", "largest", "none"] = Field(
        "largest", description="of complexity, on a small grey copy; none: take away the rule that the model came with"
    )
    least: float = Field(0.25, description="share of its own pixels that a simple image gets, above 0 and below 1")
    simple: float = Field(0.28, description="complexity up to which an image gets the least")
    complex: float = Field(0.6, description="complexity from which on an image gets all its pixels")

    @model_validator(mode="after")
    def _is_a_rule(self) -> Complexity:
        fields = type(self).model_fields  # compared with defaults: a config that was written out names all of them
        idle = [name for name in ("least", "simple", "complex") if getattr(self, name) != fields[name].default]
        if self.measure == "none" and idle:
            raise ValueError(f"{', '.join(idle)} means nothing with measure: none")
        try:
            _ = self.rule
        except VlmtuneError as error:
            raise ValueError(str(error).removeprefix("data.complexity: ").rstrip(".")) from error
        return self

    @property
    def rule(self) -> ComplexityRule | None:
        if self.measure == "none":
            return None
        return ComplexityRule(self.measure, self.least, self.simple, self.complex)


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
    complexity: Complexity | None = Field(
        None, description="fewer pixels or merged tokens for simple images (default: as the model came)"
    )
    coordinates: str = Field("auto", description="how boxes and points are written: auto, norm1000, pixels, …")
    new_tokens: list[str] = Field(default_factory=list, description="tokens to add, spelled as in the data")
    add_coordinate_tokens: bool = Field(False, description="add those tokens of `coordinates` that the model lacks")
    sampling: Sampling = Sampling()
    workers: int = Field(1, ge=0, description="processes that decode and encode ahead")
    vision_cache: SizeValue | None = Field(
        None, description="disk for features of a frozen vision tower, for example 20GB: it runs once per image"
    )

    @model_validator(mode="after")
    def _window_has_a_size(self) -> Data:
        if self.system == INHERIT:
            raise ValueError(f"system: {INHERIT} means data.system, and this is it; write a name, file:path or a text")
        if self.max_length is None and self.on_overlong != "error":
            raise ValueError(f"on_overlong: {self.on_overlong} needs a max_length")
        drawn = "rows" if self.sampling.by == "active" else "tasks"
        if self.sampling.by != "weights" and any(source.weight != 1.0 for source in self.train):
            raise ValueError(f"sampling by {self.sampling.by} draws from {drawn}; leave out the weights of sources")
        ratios = any(source.negatives is not None and source.negatives.ratio is not None for source in self.train)
        if self.sampling.by != "weights" and ratios:
            raise ValueError(f"sampling by {self.sampling.by} draws from {drawn}; leave out the ratio of negatives")
        return self
