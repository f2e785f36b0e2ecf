"""Sentence ends: Latin, CJK, code fences; what looks like an end and is none."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.sentences import sentence_ends


def pieces(text):
    offsets = [0, *sentence_ends(text), len(text)]
    return [text[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize(
    "expected",
    [
        ["One cat.", " Two dogs!", " Why?"],
        ["It costs 3.14 at example.com today.", " Good."],
        ["He said “stop.”", " Then he left."],
        ["Dr. Smith met J. S. Bach, e.g. at no. 4, etc. and so on.", " End"],
        ["It was I.", " Yes"],
        ["猫が二匹います。", "犬は？", "いません"],
        ["他说：“走吧。”", "然后离开。"],
        ["一。", "Two.", " 三！", "four"],
        ["Wait...", " what?!", " No"],
        ["Items:", "\n- a cat", "\n- a dog", "\n\nDone"],
        ["1. First thing.", "\n2. Second thing"],
        ["Run:", "\n```python\nx = 1. \nprint(x)\n\ny = 2\n```", "\nThat is all.", " Ok"],
        ["A:", "\n~~~\n``` . \n~~~", "\nB"],
        ["A:", "\n````\n```\nin. side\n```\n````", "\nB."],
        ["Look:", "\n```a``` is code on one line.", " Then"],
        ["**Bold.**", " More"],
        ["no end at all"],
        ["क्या है।", " हाँ"],
    ],
    ids=lambda pieces: pieces[0][:12],
)
def test_text_is_cut_at_sentences(expected):
    assert pieces("".join(expected)) == expected


def test_an_open_fence_has_no_end_in_it():
    assert pieces("Look.\n```\na. b.\nc.\n") == ["Look.", "\n```\na. b.\nc.\n"]


def test_nothing_comes_before_the_first_character_or_after_the_last():
    assert sentence_ends("") == [] and sentence_ends(".") == [] and sentence_ends("\n\n") == []


def offsets_in_fences(text):
    """The same rule, line by line: offsets from the start of a fence to the end of its closing line, exclusive."""
    inside, opened, position = set(), None, 0
    for line in text.split("\n"):
        bare = line.lstrip(" ")
        mark = re.match(r"`{3,}|~{3,}", bare) if len(line) - len(bare) <= 3 else None
        if opened is None and mark and not (mark[0][0] == "`" and "`" in bare[mark.end() :]):
            opened = mark[0], position
        elif opened and mark and mark[0].startswith(opened[0]) and not bare[mark.end() :].strip():
            inside |= set(range(opened[1] + 1, position + len(line.rstrip())))
            opened = None
        position += len(line) + 1
    return inside | set(range(opened[1] + 1, len(text) + 1) if opened else ())


@given(st.text(alphabet='ab .!?。\n`~*"”', max_size=60))
def test_ends_are_ascending_behind_something_and_never_in_a_fence(text):
    ends = sentence_ends(text)
    assert ends == sorted(set(ends)) and all(0 < end < len(text) for end in ends)
    assert not offsets_in_fences(text) & set(ends)
    assert all(text[:end].strip() for end in ends)


@given(st.text(alphabet="ab.\n`", max_size=40), st.text(alphabet="ab.\n", max_size=20))
def test_ends_of_a_text_do_not_depend_on_what_follows_a_closed_part(text, tail):
    """Ends before a line break stay ends, whatever is written behind it."""
    closed = text + "\n\n"
    before = [end for end in sentence_ends(closed + "x") if end < len(text)]
    after = [end for end in sentence_ends(closed + "x" + tail) if end < len(text)]
    assert before == after
