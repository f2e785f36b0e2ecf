"""Ordered (pattern, value) rules over canonical names (DESIGN idea 3). Level 0.

First match wins. A name without a rule and a rule without a name are both errors: the first is a parameter somebody
forgot, the second a wish that would silently do nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from vlmtune.errors import VlmtuneError

Value = TypeVar("Value")
_RANGE = re.compile(r"\[(\d*):(\d*)\]")


def compile_pattern(pattern: str) -> re.Pattern:
    """`*` is anything, `layers[4:8]` is `layers.4` … `layers.7`, the rest literal; `language` covers all below it."""
    out = []
    position = 0
    for match in _RANGE.finditer(pattern):
        out.append(_glob(pattern[position : match.start()]))
        low, high = match.groups()
        if not high:
            raise VlmtuneError(f"rule {pattern!r}: a range needs an end, for example layers[0:16].")
        numbers = range(int(low or 0), int(high))
        if not numbers:
            raise VlmtuneError(f"rule {pattern!r}: the range is empty.")
        out.append(r"\.(?:" + "|".join(map(str, numbers)) + ")")
        position = match.end()
    out.append(_glob(pattern[position:]))
    return re.compile("".join(out) + r"(?=\.|\Z)")  # a pattern covers a name or everything below it


def _glob(text: str) -> str:
    return ".*".join(re.escape(piece) for piece in text.split("*"))


def assign(rules: Sequence[tuple[str, Value]], names: Iterable[str]) -> dict[str, tuple[str, Value]]:
    """name -> (pattern, value) of the first rule that covers it.

    Raises VlmtuneError listing names no rule covers and rules that cover nothing (or nothing that is left).
    """
    compiled = [(pattern, compile_pattern(pattern), value) for pattern, value in rules]
    names = list(names)
    result: dict[str, tuple[str, Value]] = {}
    for name in names:
        for pattern, regex, value in compiled:
            if regex.match(name):
                result[name] = (pattern, value)
                break
    complaints = []
    missing = [name for name in names if name not in result]
    if missing:
        complaints.append(f"no rule covers {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    patterns = [pattern for pattern, _ in rules]
    complaints += [f"rule {p!r} is written twice" for p in dict.fromkeys(patterns) if patterns.count(p) > 1]
    used = {pattern for pattern, _ in result.values()}
    for pattern, regex, _ in compiled:
        if pattern in used:
            continue
        if any(regex.match(name) for name in names):
            complaints.append(f"rule {pattern!r} comes after rules that already cover everything it names")
        else:
            parts = sorted({n.split(".")[0] for n in names})
            near = difflib.get_close_matches(pattern, parts, 1, 0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"remove it, or name a part: {', '.join(parts)}"
            complaints.append(f"rule {pattern!r} covers nothing ({remedy})")
    if complaints:
        raise VlmtuneError("plan: " + "; ".join(complaints) + ".")
    return result
