"""Pace of a run: each judgement where it must speak, and where it must be silent."""

from __future__ import annotations

import numpy as np
import pytest

from vlmtune.checks.pace import BLOCK, BLOCKS, MIB, PART, RISING, STOOD_STILL, MemoryWatch, PaceWatch, RateWatch

GIB = 2**30


def steps(
    watch: PaceWatch,
    count: int,
    wait: float = 0.0,
    seconds: float = 1.0,
    tokens: int = 1000,
    busy=None,
    left: int = 1000,
) -> list:
    return [f for _ in range(count) for f in watch.observe(wait * seconds, seconds, tokens, left, busy)]


# ---- data and speed ------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_silent():
    """Times that scatter by a third, lengths that scatter threefold, a slow first step."""
    watch, rng = PaceWatch(), np.random.default_rng(0)
    found = watch.observe(5.0, 30.0, 1000, 400)
    for _ in range(400):
        tokens = int(rng.integers(400, 1200))
        seconds = tokens / 1000 * rng.uniform(0.7, 1.3)
        found += watch.observe(0.1 * seconds, seconds, tokens, 400)
    assert found == []


def test_late_data_is_said_once_until_it_was_in_time_again():
    watch = PaceWatch()
    assert steps(watch, 1 + PART, wait=0.05) == []
    (found,) = steps(watch, 5 * PART, wait=0.4)
    assert (found.level, found.what) == ("warn", "data is late") and "40%" in found.evidence
    assert steps(watch, PART, wait=0.2) == [], "better, and not yet good"
    assert steps(watch, PART, wait=0.4) == []
    assert steps(watch, PART, wait=0.1) == []
    assert [f.what for f in steps(watch, PART, wait=0.4)] == ["data is late"]


def test_a_wait_that_nobody_notices_is_none():
    """Half of the time, of a run that takes 40 seconds; and of one that takes an hour."""
    assert steps(PaceWatch(), 41, wait=0.5, left=0) == []
    assert [f.what for f in steps(PaceWatch(), 41, wait=0.5, left=3600)] == ["data is late"]


def test_steps_that_become_slower_are_seen_after_two_parts():
    watch = PaceWatch()
    steps(watch, 1 + 4 * PART)
    assert steps(watch, PART, seconds=3.0) == [], "one part may be a neighbour's doing"
    (found,) = steps(watch, 3 * PART, seconds=3.0)
    assert found.what == "steps have become slower" and "333" in found.evidence and "1,000" in found.evidence
    assert steps(watch, PART) == []
    assert [f.what for f in steps(watch, 2 * PART, seconds=3.0)] == ["steps have become slower"]


def test_longer_samples_and_waiting_are_not_slow_steps():
    watch = PaceWatch()
    steps(watch, 1 + 4 * PART)
    assert steps(watch, 4 * PART, seconds=3.0, tokens=3000) == []
    assert [f.what for f in steps(watch, 4 * PART, seconds=3.0, wait=2 / 3)] == ["data is late"]


def test_a_new_phase_has_its_own_pace():
    watch = PaceWatch()
    steps(watch, 1 + 4 * PART)
    watch.begin()
    assert steps(watch, 1 + 4 * PART, seconds=3.0) == []


def test_an_idle_gpu_is_said_unless_data_is_late():
    assert [f.what for f in steps(PaceWatch(), 1 + PART, busy=0.2)] == ["the GPU is hardly used"]
    assert [f.what for f in steps(PaceWatch(), 1 + PART, busy=0.2, wait=0.5)] == ["data is late"]
    assert steps(PaceWatch(), 1 + PART, busy=0.9) == []


# ---- memory --------------------------------------------------------------------------------------------------------


def memory(values, free: int = 100 * GIB, left: int = 100) -> list:
    watch = MemoryWatch("it went")
    return [found for value in values if (found := watch.observe(int(value), free, left)) is not None]


def test_a_leak_is_named_with_its_size_and_how_long_memory_lasts():
    rng = np.random.default_rng(0)
    values = (
        2 * GIB + 4 * MIB * np.arange(BLOCK * (RISING + 1)) + rng.uniform(0, 500 * MIB, BLOCK * (RISING + 1)) // 100
    )
    (found,) = memory(values, free=1 * GIB, left=100)
    assert (found.level, found.what) == ("warn", "memory grows from step to step")
    assert "1,024 MiB, lasts to the end" in found.evidence
    per_step = float(found.evidence.split(" MiB a step")[0].split()[-1])
    assert per_step == pytest.approx(4.0, rel=0.03), "the scatter of two blocks of ten over 70 steps"
    (found,) = memory(values, free=1 * GIB, left=1000)
    assert found.level == "fail"
    after = int(found.evidence.split("ends after ")[1].split()[0])
    assert after == pytest.approx(1024 / per_step, rel=0.01) and "of the 1,000 steps left" in found.evidence


@pytest.mark.parametrize("size", [BLOCK * (BLOCKS + 4), BLOCK * BLOCKS * 8])
def test_memory_that_a_step_takes_for_itself_does_not_count(size):
    rng = np.random.default_rng(1)
    steady = 2 * GIB + rng.uniform(0, GIB, size)
    assert memory(steady) == []
    fills_up = 2 * GIB + GIB * (1 - np.exp(-np.arange(size) / 30)) + rng.uniform(0, MIB, size)
    assert memory(fills_up) == []
    little = 2 * GIB + 20 * MIB * np.arange(size) / size
    assert memory(little) == []


def test_a_slow_leak_of_a_long_run_is_seen_and_said_again_when_it_has_grown_by_half():
    size = BLOCK * BLOCKS * 16
    found = memory(GIB + 2 * GIB * np.arange(size) / size + 100 * MIB * np.sin(np.arange(size)))
    assert 1 <= len(found) <= 3
    assert all(f.what == "memory grows from step to step" for f in found)


# ---- learning rates ------------------------------------------------------------------------------------------------


def test_a_rate_that_somebody_else_sets_is_named():
    watch = RateWatch()
    assert watch.observe({"a": 1e-4, "b": 0.0}, {"a": 1e-4, "b": 0.0}, 9) is None
    found = watch.observe({"a": 1e-4, "b": 2e-4}, {"a": 1e-4, "b": 2.1e-4}, 8)
    assert found.level == "fail" and "rule b: planned 0.0002, used 0.00021" in found.evidence
    assert watch.observe({"a": 1e-4}, {"a": 9e-4}, 7) is None, "said once"


def test_steps_without_any_rate_are_said_where_more_follow():
    watch, zero = RateWatch(), {"a": 0.0}
    assert all(watch.observe(zero, zero, 99) is None for _ in range(STOOD_STILL - 1))
    found = watch.observe(zero, zero, 50)
    assert found.what == "nothing is learned any more" and "50 are left" in found.evidence
    watch = RateWatch()
    assert [watch.observe(zero, zero, 0) for _ in range(STOOD_STILL)] == [None] * STOOD_STILL, "the run is over"
    watch = RateWatch()
    for rate in (0.0, 1e-4) * STOOD_STILL:
        assert watch.observe({"a": rate}, {"a": rate}, 9) is None
