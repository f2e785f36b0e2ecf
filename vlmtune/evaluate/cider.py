"""CIDEr-D: how much a caption says what people say of the same image, weighted by what they say of few others.

Source: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, section 5; written here,
because its only implementation is bound to a Java tokenizer. Figures are those of that one on the same tokens (a test).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from vlmtune.evaluate.text import words

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words by which a caption may differ in length
Grams = Counter[tuple[str, ...]]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a corpus, from 0 to 10: mean over samples, references and n-grams of 1 to 4 words.

    An n-gram weighs tf · ln(samples / samples whose references have it), so that what all images share counts nothing:
    one sample, or samples that all have the same references, score 0. Words are `text.words`.
    """
    said = [_grams(words(prediction)) for prediction in predictions]
    true = [[_grams(words(reference)) for reference in accepted] for accepted in references]
    seen_in = Counter(gram for accepted in true for gram in set().union(*accepted))
    largest = math.log(len(true))
    weight = {gram: largest - math.log(count) for gram, count in seen_in.items()}

    def similarity(prediction: Grams, reference: Grams) -> float:
        p, r = _Vector(prediction, weight, largest), _Vector(reference, weight, largest)
        cosines = sum(p.clipped_cosine(r, n) for n in range(1, LONGEST + 1)) / LONGEST
        return cosines * math.exp(-((p.length - r.length) ** 2) / (2 * SIGMA**2))

    of_samples = [
        sum(similarity(prediction, reference) for reference in accepted) / len(accepted)
        for prediction, accepted in zip(said, true, strict=True)
    ]
    return 10.0 * sum(of_samples) / len(of_samples)


class _Vector:
    """The tf-idf of every n-gram of a caption. length: its pairs of words, which is what the published code counts."""

    def __init__(self, grams: Grams, weight: dict[tuple[str, ...], float], unseen: float):
        self.values: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST + 1)]
        for gram, count in grams.items():
            self.values[len(gram)][gram] = count * weight.get(gram, unseen)
        self.norms = [math.sqrt(sum(value * value for value in part.values())) for part in self.values]
        self.length = sum(count for gram, count in grams.items() if len(gram) == 2)

    def clipped_cosine(self, reference: _Vector, n: int) -> float:
        """The cosine of n-grams, in which none counts more often than in the reference: repeating does not pay."""
        both = self.norms[n] * reference.norms[n]
        if not both:
            return 0.0
        mine, true = self.values[n], reference.values[n]
        return sum(min(mine[gram], true[gram]) * true[gram] for gram in mine.keys() & true.keys()) / both


def _grams(text: Sequence[str]) -> Grams:
    return Counter(tuple(text[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))
