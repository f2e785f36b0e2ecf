"""Which held-out samples a limited validation asks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlmtune.validation.questions import spread


@given(st.integers(0, 500), st.none() | st.integers(1, 600))
def test_spread(size, limit):
    rows = spread(size, limit)
    assert len(rows) == (size if limit is None else min(size, limit))
    assert rows == sorted(set(rows)) and all(0 <= row < size for row in rows)


def test_every_fifth_of_a_file_that_is_sorted_by_task_is_asked():
    tasks = [task for task in "abcde" for _ in range(40)]
    assert {tasks[row] for row in spread(len(tasks), 5)} == set("abcde")
