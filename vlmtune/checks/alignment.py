"""What an alignment matrix says: one reading per level (SPEC A7). Figures in, findings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmtune.evaluate.proportions import Estimate, accuracy, difference
from vlmtune.types import Finding

Right = Mapping[str, Sequence[bool]]
"""row of the matrix -> whether each test question was answered rightly, in one order."""


def reading(level: str, prior: Sequence[bool], before: Right | None, after: Right, off: int = 0) -> list[Finding]:
    """What the rows of one level say together, and what training lost.

    prior: answering without looking, question by question; before: of the untrained model, None where it was not
    measured; off: generated answers that are none of the labels. Rows differ where the 95 % interval of their paired
    difference leaves 0 out.
    """
    found = [_gap(level, prior, after, off)]
    if before is not None:
        lost = difference(before["generated"], after["generated"])
        if lost.low > 0:
            found.append(
                Finding(
                    "warn", f"{level}: training keeps what was there",
                    f"generated answers fell from {shown(before['generated'])} to {shown(after['generated'])}",
                    "mix samples of this level into data.train (replay), lower the learning rate or the rank",
                )
            )  # fmt: skip
    return found


def _gap(level: str, prior: Sequence[bool], after: Right, off: int) -> Finding:
    what = f"{level}: language says what vision shows"
    seen, said = after["vision"], after["generated"]
    shows, knows = difference(seen, prior).low > 0, difference(said, prior).low > 0
    evidence = f"a linear probe on the tower is right on {shown(seen)}, generated answers on {shown(said)}"
    if not shows and not knows:
        return Finding(
            "warn", what,
            f"neither is better than answering without looking ({accuracy(prior).value:.2f}): {evidence}",
            "raise data.max_pixels or let the tower learn (plan: vision); first look whether these questions can be "
            "answered from the images",
        )  # fmt: skip
    if not shows:
        return Finding(
            "pass", what, f"answers are better than what a linear probe reads: {evidence}; the features hold it in "
            "another form, or the question gives it away",
        )  # fmt: skip
    gap = difference(seen, said)
    if gap.low <= 0:
        return Finding("pass", what, f"{evidence}; difference {_signed(gap)}")
    evidence = f"vision knows, language does not say: {evidence}; difference {_signed(gap)}"
    if difference(seen, after["projector"]).low > 0:
        return Finding(
            "warn", what, f"{evidence}; a probe behind the projector has only {shown(after['projector'])} left",
            "train the projector in full, on more samples of this level",
        )  # fmt: skip
    chosen = after["by probability"]
    if difference(chosen, said).low > 0:
        more = ", and more samples of this level" if difference(seen, chosen).low > 0 else ""
        return Finding(
            "warn", what, f"{evidence}; the most probable of the answers is right on {shown(chosen)}, "
            f"and {off} of {len(said)} replies are none of them",
            f"teach the form of the reply: samples whose reply is the answer and nothing else{more}",
        )  # fmt: skip
    return Finding(
        "warn", what, evidence, "train on more samples of this level, the language model and the projector together"
    )


def shown(right: Sequence[bool]) -> str:
    """Accuracy and interval: ".73 [.65 .79]"."""
    found = accuracy(right)
    return f"{_short(found.value)} [{_short(found.low)} {_short(found.high)}]"


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 1 else "1.00"


def _signed(found: Estimate) -> str:
    return f"{found.value:+.2f} [{found.low:+.2f} {found.high:+.2f}]"
