"""A chain of runs in one file: what a stage says stands over what the top level says (SPEC E4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from vlmtune.config.values import Strict, checked
from vlmtune.config.whole import Config
from vlmtune.errors import VlmtuneError

EXPORTED = "exported"  # folder, in that of a stage, of the model that the next one starts from


def _folder_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise VlmtuneError("the name of a stage is part of a folder's name: letters, digits, - and _")


class Stage(Strict):
    """One run of a chain: the sections in which it differs from the top level."""

    name: Annotated[str, checked(_folder_name)] = Field(description="letters, digits, - and _; unique in the chain")
    data: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    plan: list[dict[str, Any]] | None = Field(None, description="instead of the top level's")
    loss: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    quantise: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    optim: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    train: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    stability: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    checkpoint: dict[str, Any] | None = Field(None, description="over the top level's, key by key")
    evaluate: dict[str, Any] | None = Field(None, description="over the top level's, key by key")

    @model_validator(mode="after")
    def _sections_say_something(self) -> Stage:
        empty = [name for name in sorted(self.model_fields_set) if getattr(self, name) is None]
        if empty:
            raise ValueError(f"{empty[0]} is null; leave it out, or write the keys in which this stage differs")
        return self

    def says(self, path: Sequence[str]) -> bool:
        """Whether it replaces what the top level has at `path` ("train", "length"), so that nothing of that is left."""
        node: Any = self.model_dump(exclude_none=True)
        for step in path:
            if not isinstance(node, dict):
                return True
            if step not in node:
                return False
            node = node[step]
        return not isinstance(node, dict)

    def over(self, top: dict[str, Any]) -> dict[str, Any]:
        """The tree of this stage: mappings merge key by key, lists and values replace."""
        own = {key: value for key, value in self.model_dump().items() if key != "name" and value is not None}
        return merged(top, own)


@dataclass(frozen=True)
class Chain:
    """Runs that start from each other's results. stages: name -> config, in order; each is an ordinary run in a folder
    `<number>_<name>` of `run`, and all but the first start from the exported model of the one before."""

    run: str
    stages: dict[str, Config]


def merged(top: Any, own: Any) -> Any:
    """`own` over `top`: mappings key by key, everything else replaced."""
    if isinstance(top, dict) and isinstance(own, dict):
        return {key: merged(top[key], own[key]) if key in top and key in own else own.get(key, top.get(key))
                for key in {**top, **own}}  # fmt: skip
    return own


def stage_folder(run: str, number: int, name: str) -> str:
    """number: from 1."""
    return f"{run}/{number}_{name}"


def dump_chain(chain: Chain) -> str:
    """YAML with every value of every stage resolved; reading it gives the same chain."""
    stages = []
    for name, config in chain.stages.items():
        resolved = config.model_dump(mode="json", exclude={"run", "model"})
        stages.append({"name": name, **resolved})
    tree = {"model": next(iter(chain.stages.values())).model, "run": chain.run, "stages": stages}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
