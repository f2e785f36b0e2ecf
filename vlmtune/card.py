"""The model card of an exported folder: README.md with the front matter of the Hugging Face Hub (SPEC H3).

What it says comes from the files of the run folder; what they do not hold, it says is not known. Text from data is
escaped: it cannot become a heading, a link, HTML or a line of the front matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from vlmtune.config import Config, load_config
from vlmtune.observe.log import duration
from vlmtune.paths import write_text
from vlmtune.sealed import read_json

FILE = "README.md"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OWN_TOWER = "efficientnet_lite"  # known to transformers after `import vlmtune.models.efficientnet`
TASK = "image-text-to-text"  # the Hub's name for what a vision-language model does
_MARKUP = re.compile(r"([\\`*_{}\[\]#|~$<&])")  # what means something in the middle of a line
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""


def write_card(folder: Path, run: Path, name: str | None = None) -> Path:
    """Write README.md into an exported folder; returns its path. run: that it was made of; name: of a folder in the
    making, which is called something else.

    Raises VlmtuneError for files of the run folder that are damaged.
    """
    path = folder / FILE
    write_text(path, card(folder, run, name or folder.resolve().name))
    return path


def card(folder: Path, run: Path, name: str) -> str:
    """The text of the card."""
    config = load_config(str(run / "config.yaml"))
    proof = _read(folder / "vlmtune_export.json", {})
    environment, summary = _read(run / "environment.json", {}), _read(run / "summary.json", {})
    validated = _read(run / "validate.json", None)
    if validated is not None and validated["checkpoint"] != proof.get("checkpoint"):
        validated = None  # of another checkpoint
    scores = _scores(validated, summary)
    return _template().render(
        front=Markdown(_front_matter(name, config, proof, scores)),
        name=name,
        base=_base_name(config),
        proof=proof,
        is_adapter="loads_with" in proof,
        has_own_tower=_read(folder / "config.json", {}).get("vision_config", {}).get("model_type") == OWN_TOWER,
        checkpoint=proof.get("checkpoint"),
        summary=summary,
        trained_for=duration(summary["train_seconds"]) if summary else None,
        environment=environment,
        assignment=[row for row in _read(run / "assignment.json", []) if row["parameters"]],
        data=_read(run / "data.json", []),
        composition={row["source"]: row for row in _read(run / "composition.json", [])},
        validated=validated,
        issues=[f for f in validated["findings"] if f["level"] != "pass"] if validated else [],
        passed=sum(f["level"] == "pass" for f in validated["findings"]) if validated else 0,
        is_probed=bool(validated and validated["figures"].get("safety")),
        scores=scores,
        speed=validated["figures"].get("speed") if validated else None,
        quantised=validated["figures"].get("quantised", []) if validated else [],
        config=Markdown(fenced(_shareable(config), "yaml")),
    )


def escaped(value: Any) -> str:
    """A value inside one line of Markdown, and of one cell of a table."""
    if isinstance(value, Markdown):
        return value
    line = " ".join(str(value).split())
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), line)


def fenced(text: str, language: str = "") -> str:
    """A code block that no line of the text can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _front_matter(name: str, config: Config, proof: Mapping[str, Any], scores: Sequence[dict[str, Any]]) -> str:
    """YAML between lines of dashes, as huggingface_hub reads it."""
    base, library = _base_name(config), "peft" if proof.get("loads_with") == "peft" else "transformers"
    sources = [*config.data.train, *(source for group in config.data.eval.values() for source in group)]
    hub = sorted({source.path.removeprefix("hub:") for source in sources if (source.path or "").startswith("hub:")})
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": TASK}
    if HUB_NAME.fullmatch(config.model) and not Path(config.model).exists():
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if "loads_with" in proof else "finetune"
    if hub:
        front["datasets"] = hub
    front["tags"] = ["vlmtune", *(["lora"] if any(rule.train == "lora" for rule in config.plan) else [])]
    results = [_result(group, scores) for group in dict.fromkeys(row["group"] for row in scores)]
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()


def _result(group: str, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in scores if row["group"] == group and row["after"] is not None]
    return {
        "task": {"type": TASK},
        "dataset": {"name": f"held-out group {group}", "type": group},
        "metrics": [
            {"type": row["metric"], "name": f"{row['task']} {row['metric']}", "value": round(row["after"], 4)}
            for row in mine
        ],
    }


def _scores(validated: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the validation, with intervals; else what the run measured before and after."""
    if validated is not None:
        return [row | {"sure": True} for row in validated["figures"].get("comparisons", [])]
    return [
        {"group": place.partition("/")[0], "task": place.partition("/")[2], "metric": metric,
         "before": pair.get("before"), "after": pair.get("after"), "sure": False}
        for place, values in summary.get("metrics", {}).items()
        for metric, pair in values.items()
        if pair.get("after") is not None
    ]  # fmt: skip


def _base_name(config: Config) -> str:
    """A folder of this machine is named without the folders that it lies in."""
    return (
        config.model
        if HUB_NAME.fullmatch(config.model) and not Path(config.model).exists()
        else Path(config.model).name
    )


def _shareable(config: Config) -> str:
    """The config without the folders of this machine."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree["run"], tree["model"] = Path(config.run).name, _base_name(config)
    groups = [tree["data"]["train"], *tree["data"].get("eval", {}).values()]
    for source in (source for sources in groups for source in sources):
        if source.get("path") and not source["path"].startswith("hub:"):
            source["path"] = Path(source["path"]).name
        source.pop("image_root", None)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path, "start the run again, which writes it anew") if path.is_file() else otherwise


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=False, finalize=escaped,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: Markdown(f"{value:,}")
    environment.filters["score"] = lambda value: Markdown("" if value is None else f"{value:.3f}")
    environment.filters["change"] = lambda value: Markdown(f"{value:+.3f}")
    environment.filters["percent"] = lambda value: Markdown(f"{value:.1%}")
    environment.filters["mib"] = lambda value: Markdown(f"{value / 2**20:,.1f} MiB")
    return environment.get_template("card.md.jinja")
