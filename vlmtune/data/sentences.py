"""Where a reply may be cut: after a sentence, never inside a code block (SPEC G2)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator

_CLOSERS = "\"'”’»)\\]}」』）】》〉*_"
# A full stop ends a sentence when white space follows (3.14 and example.com do not); CJK marks need none.
_LATIN = re.compile(rf"[.!?…؟।]+[{_CLOSERS}]*(?=\s|\Z)")
_CJK = re.compile(rf"[。！？｡．]+[{_CLOSERS}]*")
_LINE = re.compile(r"[^\s][^\S\n]*(?=\n)")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
_WORD_BEFORE = re.compile(r"(\S+)\Z")
_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "etc", "e.g", "i.e", "cf", "fig", "figs", "eq", "no", "nr",
    "vol", "ed", "eds", "approx", "dept", "est", "inc", "ltd", "co", "corp", "ca", "bzw", "usw", "z.b", "d.h", "u.a",
    "ggf", "vgl", "p.ej", "c.à.d",
))  # fmt: skip


def sentence_ends(text: str) -> list[int]:
    """Offsets in `text` after which it may be cut, ascending, without its own end.

    Ends are sentence marks (Latin ones before white space, CJK ones anywhere, closing quotes included), and ends of
    lines, since items of lists and headings carry no mark. A code fence (``` or ~~~) is one block: there is no end in
    it, and one behind its closing line; a fence that never closes runs to the end of the text. Full stops of
    abbreviations, initials ("J. Smith") and list numbers ("2. ") do not count.
    """
    found = {match.end() for match in _CJK.finditer(text)} | {match.end() for match in _LINE.finditer(text)}
    found |= {match.end() for match in _LATIN.finditer(text) if not _is_abbreviation(text, match)}
    fences = list(_fences(text))
    starts = [start for start, _ in fences]

    def in_fence(offset: int) -> bool:
        n = bisect_right(starts, offset - 1) - 1
        return n >= 0 and offset < fences[n][1]

    # an end directly before a fence is a line's end and stays; the closing line of a fence is one as well
    return sorted(offset for offset in found if 0 < offset < len(text) and not in_fence(offset))


def _fences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every fenced block with both fence lines; the end of an unclosed one lies beyond the text."""
    opened: re.Match | None = None
    for line in _FENCE.finditer(text):
        mark, rest = line.groups()
        if opened is None:
            if mark[0] == "~" or "`" not in rest:  # ```a``` on one line is inline code
                opened = line
        elif mark[0] == opened[1][0] and len(mark) >= len(opened[1]) and not rest.strip():
            yield opened.start(), line.start() + len(line[0].rstrip())
            opened = None
    if opened is not None:
        yield opened.start(), len(text) + 1


def _is_abbreviation(text: str, mark: re.Match) -> bool:
    if not mark[0].startswith(".") or mark[0].startswith(".."):
        return False
    before = _WORD_BEFORE.search(text, max(0, mark.start() - 24), mark.start())
    if before is None:
        return False
    word = before[1].lstrip("\"'“‘«([{*_")
    line_start = text.rfind("\n", 0, before.start()) + 1
    is_list_number = word.isdigit() and not text[line_start : before.start()].strip()
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return is_list_number or is_initial or word.lower() in _ABBREVIATIONS
