"""Bytes as people write them."""

from __future__ import annotations

import re

from vlmtune.errors import VlmtuneError

GIB = 2**30
_UNITS = {"b": 1, "kb": 2**10, "kib": 2**10, "mb": 2**20, "mib": 2**20, "gb": GIB, "gib": GIB, "g": GIB,
          "tb": 2**40, "tib": 2**40}  # fmt: skip


def parse_bytes(text: str, what: str = "size") -> int:
    """Bytes of "24GB", "16 GiB", "500MB". GB are 2^30 bytes, as graphics cards count.

    Raises VlmtuneError about `what` for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(text))
    if found is None or found.group(2).lower() not in _UNITS:
        raise VlmtuneError(f"{what} {text!r} is not a size; write a number and a unit, for example 24GB or 900MB.")
    size = int(float(found.group(1)) * _UNITS[found.group(2).lower()])
    if size <= 0:
        raise VlmtuneError(f"{what} {text!r} is nothing; write more than zero, for example 24GB.")
    return size


def bytes_text(size: float) -> str:
    """ "812 KiB", "3.4 MiB", "1.2 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 2**10:,.0f} KiB"
