"""Scores of texts against published examples, second implementations, and the libraries' own defaults."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from vlmtune.errors import VlmtuneError
from vlmtune.evaluate.cider import cider
from vlmtune.evaluate.text import (
    LIBRARIES,
    anls,
    bleu,
    caption_f1,
    chrf,
    exact_match,
    levenshtein,
    library,
    rouge_l,
    words,
)


# Levenshtein 1966 / Wagner-Fischer textbook pairs.
@pytest.mark.parametrize(
    "a, b, edits",
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "abc", 0)],
)
def test_levenshtein_of_published_pairs(a, b, edits):
    assert levenshtein(a, b) == levenshtein(b, a) == edits


def test_anls_follows_the_definition():
    assert anls("sitting", ["kitten"]) == pytest.approx(1 - 3 / 7)
    assert anls("Coca  Cola ", ["coca cola"]) == 1.0  # case and whitespace do not count
    assert anls("coca cola company", ["pepsi", "coca cola"]) == pytest.approx(1 - 8 / 17)  # best answer counts
    assert anls("ab", ["ac"]) == 0.0  # NL = 0.5 is not below the threshold
    assert anls("abc", ["abd"]) == pytest.approx(2 / 3)
    assert anls("", [""]) == 1.0
    assert anls("", ["x"]) == anls("x", [""]) == 0.0
    assert anls("x", []) == 0.0
    assert anls("word " * 5000, ["word"]) == 0.0  # a runaway reply is cheap


def test_anls_forgives_a_misread_letter_only():
    assert anls("restaurent", ["restaurant"]) == pytest.approx(0.9)
    assert anls("exit", ["entrance"]) == 0.0


def test_exact_match_forgives_whitespace_only():
    assert exact_match(" two  words\n", "two words") == 1.0
    assert exact_match("Two words", "two words") == 0.0


def test_caption_f1_of_sets():
    assert caption_f1("hospital top left; factory bottom left", "factory bottom left;hospital top left;") == 1.0
    assert caption_f1("hospital top left", "hospital top left; factory bottom left") == pytest.approx(2 / 3)
    assert caption_f1("a x; b x; c x", "a x; d x") == pytest.approx(2 / 5)
    assert caption_f1("", "a x") == 0.0
    assert caption_f1("", " ; ") == 1.0


# ---- corpora ----------------------------------------------------------------------------------------------------

FOX, JUMPED = "the quick brown fox jumps over the lazy dog", "the quick brown fox jumped over the lazy dog"


def test_bleu_is_the_geometric_mean_of_precisions():
    """8 of 9 words, 6 of 8 pairs, 4 of 7 triples, 2 of 6 quadruples; no penalty, because the lengths agree."""
    expected = (8 / 9 * 6 / 8 * 4 / 7 * 2 / 6) ** 0.25
    assert bleu([FOX], [[JUMPED]]) == pytest.approx(expected)
    assert bleu([FOX], [["unrelated words", JUMPED, FOX]]) == 1.0  # each n-gram counts in any reference
    shorter = " ".join(FOX.split()[:6])
    assert bleu([shorter], [[FOX]]) == pytest.approx(math.exp(1 - 9 / 6))  # brevity


def test_bleu_and_chrf_of_a_corpus_are_no_means():
    """Counts of all samples are added up before anything is divided (Papineni et al. 2002, section 2.2.1)."""
    said, true = [FOX, "one two three four"], [[JUMPED], ["one two three four five"]]
    matches = [(8 + 4) / (9 + 4), (6 + 3) / (8 + 3), (4 + 2) / (7 + 2), (2 + 1) / (6 + 1)]
    expected = math.prod(matches) ** 0.25 * math.exp(1 - 14 / 13)
    assert bleu(said, true) == pytest.approx(expected)
    mean = (bleu(said[:1], true[:1]) + bleu(said[1:], true[1:])) / 2
    assert abs(bleu(said, true) - mean) > 0.01
    assert abs(chrf(said, true) - (chrf(said[:1], true[:1]) + chrf(said[1:], true[1:])) / 2) > 0.001


def chrf_written_out(prediction: str, reference: str) -> float:
    """Popović 2015: precision and recall of character n-grams, averaged over n, then F with beta 2."""
    said, true = prediction.replace(" ", ""), reference.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, 7):
        a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (said, true))
        if a and b:
            shared = sum((a & b).values())
            precisions.append(shared / a.total())
            recalls.append(shared / b.total())
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r) if p + r else 0.0


@pytest.mark.parametrize(
    ("said", "true"), [(FOX, JUMPED), ("red car", "a red car"), ("红色的圆", "红色圆形"), ("abc", "xyz")]
)
def test_chrf_is_the_formula(said, true):
    assert chrf([said], [[true]]) == pytest.approx(chrf_written_out(said, true), abs=1e-9)


def test_rouge_l_of_the_example_of_its_package():
    """The README of rouge-score: the common subsequence is "the quick brown jumps the", 5 of 8 and of 9 words."""
    said, true = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    assert rouge_l([said], [[true]]) == pytest.approx(2 * 5 / (8 + 9))
    assert rouge_l([said, true], [[said, true], [true]]) == 1.0  # the best of several, and a mean
    assert rouge_l([said, ""], [[true], ["x"]]) == pytest.approx(5 / (8 + 9))


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=60), st.text(st.characters(max_codepoint=127), max_size=60))
def test_rouge_l_of_ascii_text_is_the_package_s_own(said, true):
    own = rouge_scorer.RougeScorer(["rougeL"])
    assert words(said) == own._tokenizer.tokenize(said)
    if words(said) or words(true):  # nothing asked and nothing said is 1 here, and 0 there
        assert rouge_l([said], [[true]]) == pytest.approx(own.score(true, said)["rougeL"].fmeasure)


def test_words_of_other_scripts_are_words():
    assert words("Ein grüner Kreis, naïve!") == ["ein", "grüner", "kreis", "naïve"]
    assert words("红色 circle") == ["红", "色", "circle"]
    assert words("हिन्दी शब्द।") == ["हिन्दी", "शब्द"]  # vowel signs are no letters to Python
    assert words("cafe\u0301") == words("café") == ["café"]
    assert rouge_l(["красный круг"], [["красный круг"]]) == 1.0  # the package's own tokens are ASCII only: 0


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ("", "", {"rouge_l": 1.0, "bleu": 0.0, "chrf": 0.0}),
        ("", "a b", {"rouge_l": 0.0, "bleu": 0.0, "chrf": 0.0}),
        ("a b", "", {"rouge_l": 0.0, "bleu": 0.0, "chrf": 0.0}),
        ("...", "!", {"rouge_l": 1.0}),
    ],
)
def test_empty_texts_have_a_score(said, true, expected):
    scores = {"rouge_l": rouge_l, "bleu": bleu, "chrf": chrf}
    assert {name: scores[name]([said], [[true]]) for name in expected} == expected


# Golden: pycocoevalcap 1.2 on the tokens of `words` (its own tokenizer needs Java):
#   scorer = cider_scorer.CiderScorer(n=4, sigma=6.0)
#   for said, accepted in zip(SAID, TRUE): scorer += (" ".join(words(said)), [" ".join(words(t)) for t in accepted])
#   scorer.compute_score()  ->  3.090403156565891
SAID = ["A man riding a horse on the beach.", "two dogs play with a red ball", "a a a a a plate"]
TRUE = [
    ["a man rides a horse along the beach", "man on horseback at the beach", "A person riding a horse"],
    ["two dogs playing with a ball in the park", "dogs play with a red ball"],
    ["a plate of food on a table"],
]


def test_cider_is_what_the_published_code_gives():
    assert cider(SAID, TRUE) == pytest.approx(3.090403156565891, rel=1e-12)  # float64 both, sums in another order


def test_cider_of_closed_forms():
    """Samples that share no word: every n-gram weighs ln 2, so the weights drop out of the cosines."""
    assert cider(["a b c d", "p q r s"], [["a b c d"], ["p q r s"]]) == pytest.approx(10.0)
    assert cider(["a b", "p q"], [["a b"], ["p q"]]) == pytest.approx(5.0)  # there are no triples to agree on
    assert cider(["p q r s", "a b c d"], [["a b c d"], ["p q r s"]]) == 0.0
    # one word more: 4 of 5, 3 of 4, 2 of 3, 1 of 2 n-grams, and a length that differs by one
    expected = 10 * sum(math.sqrt(m / (m + 1)) for m in (1, 2, 3, 4)) / 4 * math.exp(-1 / 72)
    assert cider(["a b c d e", "p q r s t"], [["a b c d"], ["p q r s"]]) == pytest.approx(expected)


def test_cider_does_not_reward_what_all_images_share_or_repeating():
    assert cider(["a", "a"], [["a"], ["a"]]) == 0.0
    once = cider(["a plate of food", "x y"], [["a plate of food"], ["x y z"]])
    assert cider(["a plate plate plate of food", "x y"], [["a plate of food"], ["x y z"]]) < once
    assert cider(["", ""], [["a"], ["b"]]) == 0.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_cider_does_not_depend_on_order(seed):
    random.seed(seed)
    order = random.sample(range(3), 3)
    assert cider([SAID[n] for n in order], [TRUE[n] for n in order]) == pytest.approx(cider(SAID, TRUE))


# ---- libraries --------------------------------------------------------------------------------------------------


def test_libraries_are_imported_when_a_metric_needs_them_and_not_before():
    script = (
        "import sys, vlmtune.evaluate.metrics;"
        "early = {'sacrebleu', 'rouge_score', 'nltk'} & set(sys.modules); assert not early, early;"
        "from vlmtune.evaluate.text import bleu; bleu(['a'], [['a']]); assert 'sacrebleu' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("metric", LIBRARIES)
def test_a_library_that_is_missing_is_named_with_its_remedy(monkeypatch, metric):
    for name in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VlmtuneError, match=rf'{metric} needs \w+, which is not installed: pip install "vlmtune\[metr'):
        library(metric)
