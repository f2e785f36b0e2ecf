"""SIGTERM and SIGINT as a wish: a training step is finished and saved first, everything else stops at once. Level 0."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Somebody asked the process to stop. number: of the signal; the message says where things stand."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + number, as a shell reports a process that the signal ended."""
        return 128 + self.number


class StopRequest:
    """Whether a signal came. Outside `deferred` it raises Interrupted on the spot; inside, the code asks `number`.

    A second signal always stops on the spot: whoever sends it does not want to wait. again: how the user goes on.
    `is_patient`: not inside `deferred`; one of several processes gets a signal more than once, and none may leave the
    others in the middle.
    """

    def __init__(self, again: str = "the same command continues") -> None:
        self.again = again
        self.number: int | None = None
        self.is_patient = False
        self._is_deferred = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals until the end of the block (in the main thread; elsewhere Python allows no handlers)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal inside."""
        with self._deferring(True):
            yield

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside `deferred`: a part that may be broken off anywhere, because it changes nothing."""
        with self._deferring(False):
            self.raise_if_asked()
            yield

    def raise_if_asked(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise self.interrupted(self.number)

    @contextlib.contextmanager
    def _deferring(self, value: bool) -> Iterator[None]:
        before, self._is_deferred = self._is_deferred, value
        try:
            yield
        finally:
            self._is_deferred = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self.number = self.number is None, number
        if not (self._is_deferred and (is_first or self.is_patient)):
            raise self.interrupted(number)

    def interrupted(self, number: int) -> Interrupted:
        """What is raised for a signal."""
        return Interrupted(number, f"stopped by {signal.Signals(number).name}; {self.again}")


def leave_signals_to_parent() -> None:
    """In a worker process: a terminal sends Ctrl-C to the whole group, and the parent decides what it means."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
