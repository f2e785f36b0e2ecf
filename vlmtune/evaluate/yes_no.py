"""Does a model say that things are there which are not? Yes/no questions with known answers (SPEC H3).

POPE, Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models": per image as many things that
are there as things that are not, the latter chosen in three ways:

random        any name of the data that is not in the image
popular       the names that are in the most images of the data
adversarial   the names that most often stand in one image with what is there
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from vlmtune.data.negatives import objects_of
from vlmtune.evaluate.metrics import reference_text
from vlmtune.evaluate.proportions import wilson
from vlmtune.types import Sample, Text, Turn, VlmtuneError

YesNo = Literal["yes", "no"]
CATEGORIES = ("random", "popular", "adversarial")
QUESTION = "Is there {a} {name} in the image?"
TASK = "pope"
META = "pope"  # field of a row's meta: its category, or a list of them
IMAGES = 50  # that questions are made for: 6 to 12 questions each
PER_IMAGE = 2  # things that are there, and as many of each category that are not

_FIRST_SENTENCE = re.compile(r"[.!?\n]")
_WORD = re.compile(r"[a-z]+(?:'t)?")
_NO = {"no", "not", "isn't", "aren't", "don't", "doesn't", "cannot", "can't", "none"}


def said(reply: str) -> YesNo | None:
    """What a reply says, from its first sentence: "no" where a negation stands in it, "yes" where that word does.

    POPE's own script counts every reply without a negation as yes; a reply that is neither is None here and is wrong.
    """
    words = set(_WORD.findall(_FIRST_SENTENCE.split(reply.strip().lower().replace("\u2019", "'"))[0]))
    return "no" if words & _NO else "yes" if words & {"yes", "yeah", "yep"} else None


@dataclass(frozen=True)
class YesNoScores:
    """Counts of replies. yes is the positive class, as in POPE; unclear: neither yes nor no, and wrong."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int
    unclear_yes: int  # where yes was right
    unclear_no: int

    @property
    def count(self) -> int:
        return self.asked_yes + self.true_no + self.false_yes + self.unclear_no

    @property
    def asked_yes(self) -> int:
        """Questions whose answer is yes."""
        return self.true_yes + self.false_no + self.unclear_yes

    @property
    def said_yes(self) -> int:
        return self.true_yes + self.false_yes

    @property
    def unclear(self) -> int:
        return self.unclear_yes + self.unclear_no

    @property
    def precision(self) -> float:
        """Of what was affirmed, the share that is so; 0 where nothing was."""
        return self.true_yes / self.said_yes if self.said_yes else 0.0

    @property
    def recall(self) -> float:
        return self.true_yes / self.asked_yes if self.asked_yes else 0.0

    @property
    def f1(self) -> float:
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @property
    def accuracy(self) -> float:
        return (self.true_yes + self.true_no) / self.count

    @property
    def yes_rate(self) -> float:
        return self.said_yes / self.count

    def record(self) -> dict[str, object]:
        """For JSON. Intervals are 95% (Wilson), each of the questions that its share counts."""
        right = self.true_yes + self.true_no
        return {
            "count": self.count, "asked_yes": self.asked_yes, "accuracy": self.accuracy, "precision": self.precision,
            "recall": self.recall, "f1": self.f1, "yes_rate": self.yes_rate, "unclear": self.unclear,
            "intervals": {
                "accuracy": wilson(right, self.count), "precision": wilson(self.true_yes, self.said_yes),
                "recall": wilson(self.true_yes, self.asked_yes), "yes_rate": wilson(self.said_yes, self.count),
            },
        }  # fmt: skip


def yes_no_scores(replies: Sequence[str], truths: Sequence[YesNo]) -> YesNoScores:
    """ValueError: no replies, or not as many as truths."""
    if len(replies) != len(truths) or not replies:
        raise ValueError(f"yes/no scores need a truth for each reply; got {len(replies)} and {len(truths)}")
    counts = Counter(zip(map(said, replies), truths, strict=True))
    return YesNoScores(
        counts["yes", "yes"], counts["yes", "no"], counts["no", "no"], counts["no", "yes"], counts[None, "yes"],
        counts[None, "no"],
    )  # fmt: skip


def truth_of(sample: Sample) -> YesNo | None:
    """ "yes" or "no" where that is all the reference says, whatever its case and full stop; else None."""
    turns = [turn for turn in sample.turns if turn.role == "assistant"]
    text = reference_text(turns[-1]).lower().rstrip(".!") if turns else ""
    return text if text in ("yes", "no") else None


def categories_of(sample: Sample) -> list[str]:
    """What `meta.pope` says: one category or a list of them; the sample's task where it says nothing.

    Raises VlmtuneError naming the sample for anything else.
    """
    found = sample.meta.get(META, sample.task)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
        raise VlmtuneError(
            f"{sample.origin} (sample {sample.id}): meta.{META} is a category such as adversarial, or a list of them, "
            f"not {str(found)[:80]}."
        )
    return found


def require_yes_no(samples: Iterable[Sample]) -> list[Sample]:
    """The samples of a probe file. Raises VlmtuneError naming the first whose reference is not yes or no."""
    checked = []
    for sample in samples:
        if truth_of(sample) is None:
            raise VlmtuneError(
                f"{sample.origin} (sample {sample.id}): the reply of a yes/no probe is yes or no and nothing else; "
                "correct it or remove the row."
            )
        categories_of(sample)
        checked.append(sample)
    return checked


def poll(samples: Iterable[Sample], question: str = QUESTION) -> list[Sample]:
    """POPE questions about the first IMAGES images of samples that say in `meta.objects` all that is there.

    What is popular, and what stands together, is counted over all of them. question: with {name} in it once, and
    perhaps {a} for the article. A pure function. Samples without objects or with several images are passed over.
    Raises VlmtuneError for a question without {name}, and meta.objects that cannot be read.
    """
    require_question(question)
    seen = [
        (sample, sorted({thing.name for thing in objects_of(sample)}))
        for sample in samples
        if sample.meta.get("objects") and len(sample.images) == 1
    ]
    popular = Counter(name for _, there in seen for name in there)
    together: dict[str, Counter[str]] = {}
    for _, there in seen:
        for name in there:
            together.setdefault(name, Counter()).update(other for other in there if other != name)
    return [
        asked
        for sample, there in seen[:IMAGES]
        for asked in _questions_about(sample, there, popular, together, question)
    ]


def require_question(question: str) -> None:
    if question.count("{name}") != 1:
        raise VlmtuneError(f"the question {question!r} does not hold {{name}} once; write for example {QUESTION!r}.")


def _questions_about(
    sample: Sample, there: list[str], popular: Counter[str], together: Mapping[str, Counter[str]], question: str
) -> list[Sample]:
    random = Random(f"{sample.id}/pope")
    positives = random.sample(there, min(PER_IMAGE, len(there)))
    absent = [name for name in popular if name not in there]
    beside = Counter()
    for name in there:
        beside.update({other: times for other, times in together[name].items() if other not in there})
    # ties are broken by the name: the same questions in any process
    ranked = {
        "random": random.sample(sorted(absent), min(len(positives), len(absent))),
        "popular": sorted(absent, key=lambda name: (-popular[name], name))[: len(positives)],
        "adversarial": sorted(absent, key=lambda name: (-beside[name], -popular[name], name))[: len(positives)],
    }
    if any(len(chosen) < len(positives) for chosen in ranked.values()):
        return []  # everything that the data knows is in this image
    asked: dict[tuple[str, YesNo], list[str]] = {(name, "yes"): list(CATEGORIES) for name in positives}
    for category in CATEGORIES:
        for name in ranked[category]:
            asked.setdefault((name, "no"), []).append(category)
    system = [turn for turn in sample.turns[:1] if turn.role == "system"]
    found = []
    for number, ((name, truth), categories) in enumerate(asked.items()):
        prompt = Turn("user", (sample.images[0], Text(_filled(question, name))))
        turns = (*system, prompt, Turn("assistant", (Text(truth),)))
        meta = {META: categories, "name": name}
        found.append(Sample(f"{sample.id}/pope/{number}", turns, TASK, sample.origin, meta, sample.max_pixels))
    return found


def _filled(question: str, name: str) -> str:
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return question.replace("{a}", article).replace("{name}", name)
