"""Can this be written? Asked before the work whose result would be lost. Level 0."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vlmtune.errors import VlmtuneError


def require_new_file(path: Path, what: str) -> Path:
    """`path`, if a file can be written there (one that exists is replaced). Raises VlmtuneError. what: for people."""
    if path.is_dir():
        raise VlmtuneError(f"{what} {path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise VlmtuneError(f"{what} {path}: the folder {path.parent} does not exist; make it first.")
    if not _takes_files(path.parent) or (path.exists() and not os.access(path, os.W_OK)):
        raise VlmtuneError(f"{what} {path} cannot be written; name another place.")
    return path


def require_folder(path: Path, what: str, remedy: str) -> Path:
    """`path`, if it is a folder that can be written to, or can be made. Raises VlmtuneError."""
    existing = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if not existing.is_dir() or not _takes_files(existing):
        raise VlmtuneError(f"{what} {path} cannot be written ({existing} is not a writable folder); {remedy}.")
    return path


def _takes_files(folder: Path) -> bool:
    """Tried, not asked: a file system may be read-only, full, or none (/proc), whatever its permissions say."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
