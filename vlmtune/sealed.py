"""JSON files that any reader takes, and that vouch for themselves and for the files beside them: a format number and
sha256 digests. Level 0."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError


def seal(record: dict[str, Any]) -> str:
    """The text of a file that `read_sealed` accepts. record: JSON values, with its number of "format"."""
    return json.dumps(record | {"checksum": _checksum(record)}, indent=1)


def read_sealed(path: Path, form: int, what: str, remedy: str) -> dict[str, Any]:
    """The record, without its checksum. form: the format that is read; what: the folder should be; remedy: for damage.

    Raises VlmtuneError naming the file where it is absent, not whole, changed by a bit, or of another format.
    """
    try:
        record = read_json(path, remedy)
    except FileNotFoundError as error:
        raise VlmtuneError(f"{path.parent} is not a {what}: {path.name} is missing; {remedy}.") from error
    written_as = record.get("format") if isinstance(record, dict) else None
    if written_as != form:
        raise VlmtuneError(f"{path} has format {written_as!r}, not {form}; use the version that wrote it.")
    if record.pop("checksum", None) != _checksum(record):
        raise VlmtuneError(f"{path} is damaged (its checksum differs); {remedy}.")
    return record


def finite(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: they become null, what was not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path, remedy: str) -> Any:
    """What a file of a run folder holds. Raises VlmtuneError naming the file and the remedy where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VlmtuneError(f"{path} is damaged ({error}); {remedy}.") from error


def stage_folders(chain: Path) -> list[Path]:
    """Of a chain of stages, in order. Raises VlmtuneError for a damaged stages.json."""
    file = chain / "stages.json"
    remedy = "start the chain again, which writes it anew"
    described = read_json(file, remedy)
    try:
        return [chain / stage["folder"] for stage in described]
    except (TypeError, KeyError) as error:
        raise VlmtuneError(f"{file} is damaged (it lists no stages); {remedy}.") from error


def digests(folder: Path) -> dict[str, str]:
    """Path in the folder -> sha256, of every file in it."""
    return {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def require_whole(folder: Path, files: dict[str, str], remedy: str) -> None:
    """Raise VlmtuneError naming the first of these files that is missing or whose digest differs."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise VlmtuneError(f"{path} is missing; {remedy}.")
        if digest(path) != expected:
            raise VlmtuneError(f"{path} is damaged (its checksum differs); {remedy}.")


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
