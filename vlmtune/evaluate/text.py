"""Scores of texts against texts, no model in sight (SPEC H3, PAINS 23).

A function of one `prediction` scores one sample; a function of `predictions` scores a corpus, which need not be a mean
over its samples. All are in [0, 1], more being better.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Sequence
from types import ModuleType

from vlmtune.errors import VlmtuneError

ANLS_THRESHOLD = 0.5
LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score.rouge_scorer"}

# Han, kana and Thai are written without spaces: a character stands for a word there.
_WITHOUT_SPACES = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def normalised(text: str) -> str:
    """Runs of whitespace become one space, ends are trimmed; case and punctuation stay."""
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Lower-case runs of letters, their marks, and digits; of scripts without spaces every character.

    Punctuation is left out. On ASCII text these are the tokens of the rouge-score package (a test compares them).
    """
    kept = (
        letter if letter.isalnum() or unicodedata.category(letter).startswith("M") else " "
        for letter in unicodedata.normalize("NFC", text.lower())
    )  # fmt: skip
    return _WITHOUT_SPACES.sub(r" \g<0> ", "".join(kept)).split()


def exact_match(prediction: str, reference: str) -> float:
    """1.0 when the two agree up to whitespace. Case counts: the format of an answer is part of what is learned."""
    return float(normalised(prediction) == normalised(reference))


def anls(prediction: str, references: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one sample: the best over its accepted answers.

    1 - NL where NL = edits / longer length, and 0 when NL >= threshold; case and whitespace do not count.
    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, eq. 1; DocVQA uses the same.
    """
    return max((_levenshtein_similarity(prediction, reference, threshold) for reference in references), default=0.0)


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, from_a in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, from_b in enumerate(b, start=1):
            substituted = diagonal + (from_a != from_b)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def caption_f1(prediction: str, reference: str) -> float:
    """F1 between two sets of items, "hospital top left; factory bottom left"; both sets empty is 1.0."""
    said, true = _items(prediction), _items(reference)
    if not said and not true:
        return 1.0
    return 2 * len(said & true) / (len(said) + len(true))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a corpus, as sacrebleu's default: 13a tokens, case counts, exponential smoothing; / 100.

    references: of each prediction, any number. Source: Papineni et al. 2002; Post 2018.
    """
    score = library("bleu").corpus_bleu(list(predictions), _streams(references), force=True).score
    return min(1.0, score / 100)  # a perfect corpus is 100.00000000000004


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of a corpus, as sacrebleu's default: characters 1- to 6-grams, recall counts twice; / 100.

    Needs no tokens, so it fits languages without spaces. Source: Popović 2015.
    """
    return library("chrf").corpus_chrf(list(predictions), _streams(references)).score / 100


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F1 of the longest common subsequence of words, the best over the references of a sample, mean over samples.

    By the rouge-score package with our `words` and without stemming. Neither side with a word: 1.0.
    Source: Lin 2004.
    """
    scorer = library("rouge_l").RougeScorer(["rougeL"], tokenizer=_Words())

    def of_one(prediction: str, accepted: Sequence[str]) -> float:
        if not words(prediction):
            return float(any(not words(reference) for reference in accepted))
        return scorer.score_multi(list(accepted), prediction)["rougeL"].fmeasure

    scores = [of_one(*pair) for pair in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores)


def library(metric: str) -> ModuleType:
    """What computes this metric. Raises VlmtuneError where it is not installed."""
    try:
        return importlib.import_module(LIBRARIES[metric])
    except ImportError as error:
        package = LIBRARIES[metric].partition(".")[0]
        raise VlmtuneError(
            f'the metric {metric} needs {package}, which is not installed: pip install "vlmtune[metrics]".'
        ) from error


class _Words:
    """The tokenizer that rouge-score asks."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References of each sample -> sacrebleu's first, second, … references, None where a sample has no more."""
    most = max(len(accepted) for accepted in references)
    return [[accepted[n] if n < len(accepted) else None for accepted in references] for n in range(most)]


def _levenshtein_similarity(prediction: str, reference: str, threshold: float) -> float:
    a, b = normalised(prediction).lower(), normalised(reference).lower()
    longer = max(len(a), len(b))
    if longer == 0:
        return 1.0
    # At least as many edits as the lengths differ: a runaway reply need not be compared character by character.
    if abs(len(a) - len(b)) / longer >= threshold:
        return 0.0
    distance = levenshtein(a, b) / longer
    return 1.0 - distance if distance < threshold else 0.0


def _items(caption: str) -> set[str]:
    return {normalised(item) for item in caption.split(";")} - {""}
