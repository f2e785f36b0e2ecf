"""Pages from templates: one self-contained file each, everything in it escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from vlmtune.observe.charts import number_text


def render_html(template: str, **values: Any) -> str:
    """A template of this folder with `values` filled in, every one of them escaped."""
    return _templates().get_template(template).render(**values)


def write_html(path: Path, html: str) -> Path:
    """Write a page in one go: a reader never sees half of it, and a half surrogate in model output is no crash."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(html, encoding="utf-8", errors="replace")
    unfinished.replace(path)
    return path


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: number_text(value) if isinstance(value, int | float) else value
    return environment
