"""Can this be written, and how: whole or not at all. Asked before the work whose result would be lost. Level 0."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from vlmtune.errors import VlmtuneError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""errno of a write for which there is no room, or no permission for so much."""


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


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a run folder. Raises VlmtuneError where one is in it.

    The lock is a hidden file beside the folder, which a restart deletes; it goes at the end, and the system frees it
    however the process ends. Workers forked inside do not hold it. File systems that know no locks are used without.
    """
    is_new = not folder.parent.is_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    file = _locked(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody else can have it
        file.close()
        if is_new and not any(folder.parent.iterdir()):
            folder.parent.rmdir()  # nothing came of it


def _locked(path: Path, folder: Path) -> TextIO:
    """An open file under this process's lock. Whoever had it may have deleted it meanwhile: then there is a new one."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                owner = file.read().strip() or "unknown"
                file.close()
                raise VlmtuneError(
                    f"{folder}: another process ({owner}) is at work in this folder; wait until it has ended, or set "
                    "run=… to another."
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()


def write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all. UTF-8."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a draft beside `path`, which then takes its place."""
    draft = path.with_name(f".{path.name}.tmp")
    write(draft)
    sync(draft)
    os.replace(draft, path)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder` that takes its place at the end, or vanishes. Its files may be read by whoever may read
    the folder: safetensors writes some that only their owner may."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(draft.stat().st_mode & 0o666)
                sync(path)
        os.replace(draft, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: a rename must not get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _takes_files(folder: Path) -> bool:
    """Tried, not asked: a file system may be read-only, full, or none (/proc), whatever its permissions say."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def require_run(path: Path) -> None:
    """Refuse what is not a run folder: one with a config.yaml. Raises VlmtuneError that says what it is instead."""
    if (path / "config.yaml").is_file():
        return
    if not path.exists():
        raise VlmtuneError(f"{path} does not exist; pass the folder of a run.")
    for parent in path.absolute().parents:
        if (parent / "config.yaml").is_file() and (parent / "assignment.json").is_file():
            raise VlmtuneError(f"{path} lies in the run folder {parent}; pass that.")
    if path.is_file():
        raise VlmtuneError(f"{path} is a file; pass the folder of a run.")
    inside = sorted(found.parent.name for found in path.glob("*/config.yaml"))
    hint = f"; it holds the runs {', '.join(inside[:4])}" + (", …" if len(inside) > 4 else "") if inside else ""
    raise VlmtuneError(f"{path} is not a run folder: config.yaml is missing{hint}.")
