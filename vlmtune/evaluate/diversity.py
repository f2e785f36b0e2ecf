"""Whether replies differ from each other, repeat themselves, or never end. Functions on texts, no model in sight.

distinct-n: Li et al. 2016, "A Diversity-Promoting Objective Function"; repeated n-grams: Welleck et al. 2020, "Neural
Text Generation with Unlikelihood Training" (seq-rep-n).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

REPEATED = 4  # tokens of the n-grams that are looked at for repetition, as Welleck et al.

# a word, or one character of a script that writes none (CJK, kana, hangul syllables stay words), or a mark
_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|\w+|[^\w\s]")


@dataclass(frozen=True)
class Diversity:
    """Of a list of texts. distinct_1, distinct_2: different n-grams / all n-grams, over all texts together; repetition:
    mean share of 4-grams of a text that it had before; commonest: the text that occurs most, and its share."""

    count: int
    distinct_1: float
    distinct_2: float
    repetition: float
    commonest: str
    commonest_share: float


def diversity(texts: Sequence[str]) -> Diversity:
    """ValueError: no texts."""
    if not texts:
        raise ValueError("diversity needs at least one text")
    text, times = Counter(texts).most_common(1)[0]
    repeated = sum(map(repetition, texts)) / len(texts)
    return Diversity(len(texts), distinct(texts, 1), distinct(texts, 2), repeated, text, times / len(texts))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams / all n-grams, none of them over the border of two texts; 0 where there is none."""
    grams = [gram for text in texts for gram in _grams(units(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = REPEATED) -> float:
    """1 - different n-grams / all n-grams of one text; 0 for a text of fewer units."""
    grams = _grams(units(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def units(text: str) -> list[str]:
    """Words and marks, lower case."""
    return _UNIT.findall(text.lower())


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
