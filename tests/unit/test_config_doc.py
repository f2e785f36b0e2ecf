"""docs/guide/config.md documents every field of the config with its real default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vlmtune import config

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "config.md"
MODELS = [
    model
    for model in vars(config).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and model not in (BaseModel, config.Strict)
]
REQUIRED = "**required**"
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]


def sections(page: str) -> dict[str, list[tuple[str, str, str]]]:
    """Heading of each `## ` section -> its table's rows: (field, default, meaning)."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
            assert heading not in found, f"two sections {heading}"
            found[heading] = []
        elif heading and line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 3, line
            if cells[0] != "field" and set(cells[0]) != {"-"}:
                found[heading].append((cells[0].strip("`"), cells[1], cells[2]))
    return found


def default_of(field) -> object:
    """The default as a YAML file would hold it; a section's own defaults are {}."""
    if field.default_factory is not None:
        return field.default_factory()
    if isinstance(field.default, BaseModel):
        assert field.default == type(field.default)(), "a section's default must be the defaults of its fields"
        return {}
    return list(field.default) if isinstance(field.default, tuple) else field.default


def choices_of(annotation) -> set:
    """Every value of a Literal inside the annotation."""
    if get_origin(annotation) is Literal:
        return {str(choice).lower() if isinstance(choice, bool) else choice for choice in get_args(annotation)}
    return set().union(*(choices_of(inner) for inner in get_args(annotation)))


DOCUMENTED = sections(PAGE.read_text(encoding="utf-8"))


def test_every_model_has_a_section_and_no_section_is_left_over():
    assert set(DOCUMENTED) == {model.__name__ for model in MODELS}
    assert len(MODELS) == 20


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_documented_once_in_order(model):
    assert [name for name, _, _ in DOCUMENTED[model.__name__]] == list(model.model_fields)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_default_and_choices_are_the_documented_ones(model, name):
    field = model.model_fields[name]
    shown, meaning = next((d, m) for n, d, m in DOCUMENTED[model.__name__] if n == name)
    if field.is_required():
        assert field.default is PydanticUndefined and shown == REQUIRED
    else:
        assert re.fullmatch(r"`[^`]+`", shown), f"write the default of {name} as one piece of code, not {shown}"
        said, true = yaml.safe_load(shown.strip("`")), default_of(field)
        assert said == true and type(said) is type(true)
    assert meaning.endswith((".", ")")), f"{name} has no sentence"
    for choice in choices_of(field.annotation):
        assert f"`{choice}`" in meaning, f"the meaning of {name} does not name {choice}"
