"""VQA accuracy: an answer is as right as people agree on it (Antol et al. 2015, Goyal et al. 2017)."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANNOTATORS = 10
AGREEING = 3  # other annotators who make an answer wholly right

# The lists of the official evaluation. A word that lacks one of these apostrophes gets it back.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, letter in enumerate(form)
    if letter == "'"
}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_OF_A_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD_OF_NO_NUMBER = re.compile(r"\.(?!\d)")


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the ten annotators of min(1, others with this answer / 3): one agreeing person is .3, four are 1.

    answers: those of the ten. Both sides are put into the official form first, where the official script leaves answers
    on which all agree as they are. ValueError: not ten answers.
    """
    if len(answers) != ANNOTATORS:
        raise ValueError(f"VQA accuracy is defined on {ANNOTATORS} answers, got {len(answers)}")
    said = official_form(prediction)
    agrees = [official_form(answer) == said for answer in answers]
    return sum(min(1.0, (sum(agrees) - agree) / AGREEING) for agree in agrees) / ANNOTATORS


def official_form(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers to ten as digits, apostrophes where they belong.

    A punctuation mark beside a space is dropped, and so are all where a number has a comma (1,000); others become
    spaces.
    """
    text = " ".join(answer.split())
    drops_all = _COMMA_OF_A_NUMBER.search(text) is not None
    form = text
    for mark in PUNCTUATION:
        drops = drops_all or f"{mark} " in text or f" {mark}" in text
        form = form.replace(mark, "" if drops else " ")
    form = _PERIOD_OF_NO_NUMBER.sub("", form)
    found = [NUMBERS.get(word, word) for word in form.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)
