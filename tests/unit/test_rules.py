"""Rules: first match wins, patterns cover whole names, and nothing is silently left out (DESIGN idea 3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.errors import VlmtuneError
from vlmtune.rules import assign, compile_pattern

NAMES = [
    *(f"vision.layers.{n}.attn.weight" for n in range(12)),
    "vision.norm.weight",
    "projector.linear_1.weight",
    *(f"language.layers.{n}.mlp.weight" for n in range(12)),
    "embed.weight",
]


def covered(pattern: str) -> list[str]:
    regex = compile_pattern(pattern)
    return [name for name in NAMES if regex.match(name)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("vision", [n for n in NAMES if n.startswith("vision.")]),
        ("vision.layers.1", ["vision.layers.1.attn.weight"]),  # not 10 and 11
        ("vision.layers[0:2]", ["vision.layers.0.attn.weight", "vision.layers.1.attn.weight"]),
        ("vision.layers[:1]", ["vision.layers.0.attn.weight"]),
        ("vision.layers[10:12]", ["vision.layers.10.attn.weight", "vision.layers.11.attn.weight"]),
        ("*.norm", ["vision.norm.weight"]),
        ("*.layers[3:4].mlp", ["language.layers.3.mlp.weight"]),
        ("*", NAMES),
        ("embed.weight", ["embed.weight"]),
        ("embed.wei", []),  # a pattern ends where a name part ends
        ("projector.linear.1", []),
        ("project.r", []),  # a dot is a dot
    ],
)
def test_a_pattern_covers(pattern, expected):
    assert covered(pattern) == expected


@given(low=st.integers(0, 14), high=st.integers(0, 14))
def test_a_range_is_a_python_range(low, high):
    pattern = f"vision.layers[{low}:{high}]"
    if low >= high:
        with pytest.raises(VlmtuneError, match="range is empty"):
            compile_pattern(pattern)
    else:
        assert covered(pattern) == [f"vision.layers.{n}.attn.weight" for n in range(low, min(high, 12))]


def test_a_range_without_end_is_refused():
    with pytest.raises(VlmtuneError, match=r"layers\[4:\].*needs an end"):
        compile_pattern("vision.layers[4:]")


def test_first_match_wins():
    result = assign([("vision.layers[0:2]", "a"), ("vision", "b"), ("*", "c")], NAMES)
    assert list(result) == NAMES
    values = [result[name][1] for name in NAMES]
    assert values == ["a"] * 2 + ["b"] * 11 + ["c"] * 14
    assert result["vision.norm.weight"] == ("vision", "b")


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(VlmtuneError, match="no rule covers embed.weight") as caught:
        assign([("vision", 1), ("projector", 1), ("language", 1)], NAMES)
    assert "more" not in str(caught.value)
    with pytest.raises(VlmtuneError, match="no rule covers vision.layers.0.attn.weight and 12 more"):
        assign([("projector", 1), ("language", 1), ("embed", 1)], NAMES)


def test_a_rule_that_covers_nothing_is_an_error_with_the_nearest_part():
    with pytest.raises(VlmtuneError, match="rule 'projectr' covers nothing .did you mean 'projector'"):
        assign([("projectr", 1), ("*", 2)], NAMES)


def test_a_rule_behind_rules_that_cover_its_names_is_an_error():
    with pytest.raises(VlmtuneError, match="rule 'vision' comes after rules that already cover everything"):
        assign([("*", 1), ("vision", 2)], NAMES)


def test_the_same_pattern_twice_is_an_error():
    with pytest.raises(VlmtuneError, match="rule 'vision' is written twice"):
        assign([("vision", 1), ("vision", 2), ("*", 3)], NAMES)


def test_all_complaints_come_at_once():
    with pytest.raises(VlmtuneError) as caught:
        assign([("heads", 1), ("vision", 1), ("vision.norm", 1)], NAMES)
    message = str(caught.value)
    assert "no rule covers projector.linear_1.weight and 13 more" in message
    assert "'heads' covers nothing" in message
    assert "'vision.norm' comes after" in message


@given(st.lists(st.sampled_from(["vision", "*.layers[0:6]", "language", "*.weight", "embed", "*"]), unique=True))
def test_every_name_gets_the_value_of_the_first_pattern_that_covers_it(patterns):
    rules = [(pattern, number) for number, pattern in enumerate(patterns)]
    try:
        result = assign(rules, NAMES)
    except VlmtuneError:
        firsts = [next((n for n, p in enumerate(patterns) if name in covered(p)), None) for name in NAMES]
        assert None in firsts or set(firsts) != set(range(len(patterns)))
    else:
        for name, (pattern, number) in result.items():
            assert pattern == patterns[number]
            assert name in covered(pattern)
            assert not any(name in covered(earlier) for earlier in patterns[:number])
