"""Signals as a wish: noted while a step runs, obeyed everywhere else (SPEC D8)."""

from __future__ import annotations

import os
import signal

import pytest

from vlmtune.interrupt import Interrupted, StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_a_step_it_stops_on_the_spot(number, code):
    with StopRequest().listening(), pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


def test_inside_a_step_it_is_only_noted():
    reached = []
    with StopRequest().listening() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(stop.number)
        with pytest.raises(Interrupted):
            stop.raise_if_asked()
    assert reached == [signal.SIGTERM]


def test_a_second_signal_does_not_wait():
    with StopRequest().listening() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_part_that_changes_nothing_is_broken_off():
    with StopRequest().listening() as stop, stop.deferred():
        with pytest.raises(Interrupted), stop.immediate():
            os.kill(os.getpid(), signal.SIGTERM)
        entered = False
        with pytest.raises(Interrupted), stop.immediate():
            entered = True
        assert not entered, "whoever was asked to stop begins nothing"


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
