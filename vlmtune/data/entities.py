"""Key entities: words of a reply whose tokens may weigh more in the loss (SPEC B3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from vlmtune.types import Part, Text, Turn


def entity_pattern(entities: Sequence[str]) -> re.Pattern[str]:
    """Any of the entities as whole words, as they are written; of two that begin alike the longer one."""
    longest_first = sorted(set(entities), key=len, reverse=True)
    return re.compile("|".join(rf"(?<!\w){re.escape(e)}(?!\w)" for e in longest_first))


def mark_entities(turns: Sequence[Turn], entities: Sequence[str]) -> tuple[Turn, ...]:
    """The turns with every occurrence in a reply that trains as a text part of its own."""
    pattern = entity_pattern(entities)
    return tuple(
        replace(turn, parts=tuple(piece for part in turn.parts for piece in _split(part, pattern)))
        if turn.role == "assistant" and turn.train
        else turn
        for turn in turns
    )


def _split(part: Part, pattern: re.Pattern[str]) -> list[Part]:
    if not isinstance(part, Text) or part.entity:
        return [part]
    pieces: list[Part] = []
    position = 0
    for match in pattern.finditer(part.text):
        pieces += [Text(part.text[position : match.start()]), Text(match.group(), entity=True)]
        position = match.end()
    pieces.append(Text(part.text[position:]))
    return [piece for piece in pieces if piece != Text("")] or [part]
