"""Checkpoints that a thread writes while training goes on (`checkpoint.background`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vlmtune.checkpoint import Draft
from vlmtune.processes import Processes
from vlmtune.types import VlmtuneError


class Background:
    """One checkpoint at a time. All processes call `begin` and `look` at the same places of a run: of a model in parts
    each of them writes, and the checkpoint gets its name once all have."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self._pool: ThreadPoolExecutor | None = None
        self._draft: Draft | None = None
        self._left: deque[Callable[[], None]] = deque()
        self._running: Future[None] | None = None
        self._then: Callable[[], None] = lambda: None

    def begin(self, draft: Draft | None, then: Callable[[], None]) -> None:
        """draft: with copies; None in a process that writes nothing; then: is done by all once it has its name.

        Raises VlmtuneError where the one before could not be written.
        """
        self.look(wait=True)
        self._draft, self._then = draft, then
        self._left = deque([_nothing, _nothing] if draft is None else [draft.rows, draft.rest])
        self._go_on()

    def look(self, wait: bool = False) -> None:
        """Go on with what is written, as far as all processes are; wait: until it is finished.

        Raises VlmtuneError in all processes where one could not write.
        """
        while self._running is not None:
            if not wait and not all(self.processes.gather("a checkpoint in the background", self._running.done())):
                return
            try:
                with self.processes.agreed("a checkpoint in the background"):
                    self._running.result()
            except VlmtuneError:
                self._running = None
                if self._draft is not None:
                    self._draft.discard()
                raise
            if self._left:
                self._go_on()
            else:
                self._running = self._draft = None
                with self.processes.agreed("the name of a checkpoint"):
                    self._then()

    def _go_on(self) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="vlmtune-checkpoint")
        self._running = self._pool.submit(self._left.popleft())


def _nothing() -> None:
    """What a process does for a checkpoint that another one writes."""
