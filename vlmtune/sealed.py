"""JSON files that vouch for themselves and for the files beside them: a format number and sha256 digests. Level 0."""

from __future__ import annotations

import hashlib
import json
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
        record = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise VlmtuneError(f"{path.parent} is not a {what}: {path.name} is missing.") from error
    except ValueError as error:
        raise VlmtuneError(f"{path} is damaged ({error}); {remedy}.") from error
    written_as = record.get("format") if isinstance(record, dict) else None
    if written_as != form:
        raise VlmtuneError(f"{path} has format {written_as!r}, not {form}; use the version that wrote it.")
    if record.pop("checksum", None) != _checksum(record):
        raise VlmtuneError(f"{path} is damaged (its checksum differs); {remedy}.")
    return record


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
