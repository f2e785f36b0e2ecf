"""Several processes that train one model: what they tell each other, and what is said when one of them is gone.

The door to `torch.distributed`'s collectives. Started by `torchrun`, which gives every process its number (rank); a
process that was started alone is the first of one, and nothing here does anything then. What is told travels as JSON
through gloo, on the CPU, and carries its name: processes that are at different places find out instead of waiting for
each other. Tensors are added up by the backend of their device. Level 0.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vlmtune.errors import VlmtuneError
from vlmtune.interrupt import Interrupted

T = TypeVar("T")
BUCKET = 2**24  # numbers that are added up in one message
FIRST_LOOK, LOOKS = 0.005, 0.1  # seconds between two looks at who has arrived, at first and later
ASKS = 1.0  # seconds between two times that one who waits asks where the others are
ANSWERS = 2.0  # seconds in which a store answers
NAMED = 8  # samples that a process says it is at work with


class Processes:
    """The only process of a run, and what all of them can be asked.

    rank: its number; size: how many there are; local_rank: its number on its machine, and of its GPU; of_machine: how
    many there are on it.
    """

    rank, size, local_rank, of_machine = 0, 1, 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and talks to people."""
        return self.rank == 0

    def at(self, what: str, samples: Sequence[str] = ()) -> None:
        """Leave word of what this process begins to do, and with which samples, for whoever waits for it."""

    def gather(self, what: str, told: T) -> list[T]:
        """What every process told, in the order of ranks. told: JSON values.

        Raises VlmtuneError in all of them where one is silent, gone, or at another place than `what`.
        """
        return [told]

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Around work in which the backend exchanges tensors by itself: the parts of a sharded model.

        Raises VlmtuneError, which names who is missing, in place of what the backend raises.
        """
        yield

    def wait_for_all(self, what: str) -> None:
        """Until all are here, however long the others work, as long as they live."""

    def add_up(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all processes, which is the same to the bit in all of them."""

    @contextlib.contextmanager
    def agreed(self, what: str, patient: bool = True) -> Iterator[None]:
        """Raise VlmtuneError in all processes where one fails within.

        patient: however long it takes; False: a process that takes long counts as silent.
        """
        yield

    def on_first(self, what: str, work: Callable[[], T]) -> T:
        """What `work` returns (JSON values) in the first process; the others wait for it, however long it takes."""
        return work()

    @contextlib.contextmanager
    def first_of_machine_first(self, what: str) -> Iterator[None]:
        """Within, the first process of each machine is ahead of the others of it: they find what it has made."""
        yield


ALONE = Processes()


class Group(Processes):
    """One of several processes. A silent one is waited for `patience` seconds.

    store: what all of them write to and read from; machine: which one this process runs on; of_machine: processes on
    it, None: all.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        patience: float,
        local_rank: int = 0,
        machine: int = 0,
        of_machine: int | None = None,
    ):
        self.rank, self.size, self.local_rank, self.of_machine = rank, size, local_rank, of_machine or size
        self.patience, self.machine = patience, machine
        limit = datetime.timedelta(seconds=patience)
        store.set_timeout(limit)
        store = dist.PrefixStore(_meeting(store, rank, size, patience), store)
        backend = "gloo"
        if torch.cuda.is_available():
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a sum that does not come is an exception
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, store=dist.PrefixStore("collectives", store), rank=rank, world_size=size, timeout=limit
        )
        self._store = dist.PrefixStore("word", store)
        self._number = 0  # of exchanges so far: the same in all processes, unless something is wrong
        self._word: dict[str, Any] = {"host": platform.node(), "at": "start", "samples": [], "number": 0, "waits": ""}
        self._pulse = _Pulse(dist.PrefixStore("pulse", store.clone()), rank, patience)
        self.at("start")

    def close(self) -> None:
        """At the end of what all of them do."""
        self._pulse.stop()
        dist.destroy_process_group()

    def leave(self, why: str) -> None:
        """Before the others: they are told, and not waited for."""
        self._word["left"] = why
        _answered(lambda: self._store.set(str(self.rank), json.dumps(self._word)))
        self._pulse.stop()

    def at(self, what: str, samples: Sequence[str] = ()) -> None:
        self._word |= {"at": what, "samples": list(samples[:NAMED])}
        with self._explained(what):
            self._store.set(str(self.rank), json.dumps(self._word))

    def gather(self, what: str, told: T) -> list[T]:
        self._enter(what)
        payload = json.dumps([self._number, what, told]).encode()
        with self._explained(what):
            found = _gathered(payload, self.size)
        read = [json.loads(text) for text in found]
        if any(row[:2] != read[0][:2] for row in read):
            raise VlmtuneError(_elsewhere({rank: (at, number) for rank, (number, at, _) in enumerate(read)}))
        return [row[2] for row in read]

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no class of its own
                raise
            with self._explained(what):
                raise

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All processes in a row, for the parts of a sharded model."""
        return init_device_mesh(device.type, (self.size,))

    def wait_for_all(self, what: str) -> None:
        self._enter(what)
        key = f"here/{self._number}"
        with self._explained(what):
            self._store.add(key, 1)
            watch, pause, asked = self._pulse.watch(self.size), FIRST_LOOK, time.monotonic()
            while self._store.add(key, 0) < self.size:
                time.sleep(pause)
                pause = min(2 * pause, LOOKS)
                if silent := watch.silent():
                    raise VlmtuneError(self._missing(what, silent))
                if time.monotonic() - asked > ASKS:
                    self._require_same_place(what)
                    asked = time.monotonic()
        self.gather(what, None)

    def _require_same_place(self, what: str) -> None:
        """Of those that wait already. Raises VlmtuneError where one waits for something else, or has left."""
        words = self._words() or {}
        left = [rank for rank, word in words.items() if "left" in word]
        if left:
            raise VlmtuneError(self._missing(what, left))
        for rank, word in words.items():
            if word["number"] == self._number and word["waits"] != what:
                raise VlmtuneError(_elsewhere({self.rank: (what, self._number), rank: (word["waits"], self._number)}))

    def add_up(self, what: str, tensors: Sequence[Tensor]) -> None:
        numbers = sum(tensor.numel() for tensor in tensors)
        self.gather(f"{what}: {len(tensors)} tensors, {numbers} numbers", None)
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._explained(what):
                dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def agreed(self, what: str, patient: bool = True) -> Iterator[None]:
        own: Exception | None = None
        try:
            yield
        except Interrupted:  # a signal comes to all, or its process leaves
            raise
        except Exception as error:
            own = error
        if patient:
            self.wait_for_all(what)
        said = None if own is None else str(own) if isinstance(own, VlmtuneError) else f"{type(own).__name__}: {own}"
        told = self.gather(what, said)
        if own is not None:
            raise own
        if others := [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]:
            raise VlmtuneError(others[0])

    def on_first(self, what: str, work: Callable[[], T]) -> T:
        made = None
        with self.agreed(what):
            if self.is_first:
                made = work()
        return self.gather(f"result of {what}", made)[0]

    @contextlib.contextmanager
    def first_of_machine_first(self, what: str) -> Iterator[None]:
        key = f"first/{self._number}/{what}/{self.machine}"  # a chain of stages comes here again and again
        if self.local_rank:
            first = self.rank - self.local_rank
            watch = self._pulse.watch(self.size)
            with self._explained(what):
                while not self._store.check([key]):
                    time.sleep(LOOKS)
                    if first in watch.silent() or "left" in (self._words() or {}).get(first, {}):
                        raise VlmtuneError(self._missing(what, [first]))
        try:
            yield
        finally:
            if not self.local_rank:
                self._store.set(key, "done")

    # ---- where the others are ----------------------------------------------------------------------------------------

    def _enter(self, what: str) -> None:
        """Begin the next exchange. What this process did last stays in its word: that is what others ask for."""
        self._number += 1
        self._word |= {"number": self._number, "waits": what}
        with self._explained(what):
            self._store.set(str(self.rank), json.dumps(self._word))

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """What a collective raises, as a sentence that names who is missing."""
        try:
            yield
        except VlmtuneError:
            raise
        except RuntimeError as error:  # gloo, NCCL and the store have no class of their own for all of it
            first = str(error).strip().splitlines()[0]
            raise VlmtuneError(f"{self._missing(what, None)} [{first}]") from error

    def _missing(self, what: str, silent: Sequence[int] | None) -> str:
        """silent: ranks known to be; None: those that have not come as far as this one."""
        words = self._words()
        if words is None:
            return (
                f"rank {self.rank} at {what!r}: the machine of rank 0 cannot be reached any more; look at its log, and "
                "at the network between them. The same command continues from the newest checkpoint."
            )
        others = [rank for rank in range(self.size) if rank != self.rank]
        if silent is None:
            silent = [rank for rank in others if words.get(rank, {"number": 0})["number"] < self._number]
        said = "gone or silent"
        if not silent:  # all have come as far as this one: one of them has left since
            said, silent = "gone: they waited for this one, or one of them ended", others
        named = "; ".join(_described(rank, words.get(rank)) for rank in silent[:4])
        return (
            f"rank {self.rank} at {what!r}: others are {said} (train.rank_timeout: {self.patience:g} s). Last heard of "
            f"them: {named}. Look at their logs; the same command continues from the newest checkpoint."
        )

    def _words(self) -> dict[int, dict[str, Any]] | None:
        """rank -> what it last said of itself; None where nobody can be asked."""

        def read() -> dict[int, dict[str, Any]]:
            there = [rank for rank in range(self.size) if self._store.check([str(rank)])]
            return {rank: json.loads(self._store.get(str(rank))) for rank in there}

        return _answered(read)


def _described(rank: int, word: dict[str, Any] | None) -> str:
    if word is None:
        return f"rank {rank} never said anything"
    samples = f" with samples {', '.join(word['samples'])}" if word["samples"] else ""
    left = f", and ended: {word['left']}" if "left" in word else ""
    return f"rank {rank} on {word['host']}: {word['at']}{samples}{left}"


def _elsewhere(places: Mapping[int, tuple[str, int]]) -> str:
    """places: rank -> what it is at, and the number of that exchange."""
    return (
        "the processes are not at the same place: "
        + ", ".join(f"rank {rank} is at {at!r} ({number})" for rank, (at, number) in places.items())
        + "; they must run the same command on the same data. If they do, please report it."
    )


def _answered(ask: Callable[[], T]) -> T | None:
    """What a store answers; None where it does not within `ANSWERS` seconds: a machine that is gone says nothing, and
    some of the store's calls have no limit of their own."""
    found: list[T] = []

    def asking() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(ask())

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(ANSWERS)
    return found[0] if found else None


def _meeting(store: dist.Store, rank: int, size: int, patience: float) -> str:
    """A name that the processes of this start have in common and no earlier start had: torchrun keeps its store when it
    starts them again, with everything that is in it.

    Each says a word of its own; the first publishes a name with the words it saw until all have answered to it.
    Raises RuntimeError where they do not come together within `patience` seconds.
    """
    word, until = uuid.uuid4().hex, time.monotonic() + patience
    store.set(f"word/{rank}", word)
    seen: list[str] = []
    name = ""
    while time.monotonic() < until:
        if rank == 0:
            there = [other for other in range(size) if store.check([f"word/{other}"])]
            words = [store.get(f"word/{other}").decode() for other in there]
            if len(words) == size and words != seen:
                name, seen = uuid.uuid4().hex, words
                store.set("meeting", json.dumps({"name": name, "words": words}))
            if name and all(store.check([f"answer/{name}/{other}"]) for other in range(1, size)):
                store.set(f"closed/{name}", "")
                return name
        elif store.check(["meeting"]):
            meeting = json.loads(store.get("meeting"))
            if meeting["words"][rank : rank + 1] == [word]:
                store.set(f"answer/{meeting['name']}/{rank}", "")
                if store.check([f"closed/{meeting['name']}"]):
                    return meeting["name"]
        time.sleep(FIRST_LOOK)
    raise RuntimeError(f"{size} processes did not come together")


def _gathered(payload: bytes, size: int) -> list[bytes]:
    """The bytes of every process. Their lengths first, because all must send equally much."""
    length = torch.tensor([len(payload)])
    lengths = [torch.zeros_like(length) for _ in range(size)]
    dist.all_gather(lengths, length)
    longest = max(int(length) for length in lengths)
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    found = [torch.zeros_like(own) for _ in range(size)]
    dist.all_gather(found, own)
    return [bytes(row[: int(length)].numpy()) for row, length in zip(found, lengths, strict=True)]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one format and device, together about `BUCKET` numbers."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or numbers + tensor.numel() > BUCKET):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of everything that one process draws in one optimizer step: other numbers for every triple."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little", signed=True)


class _Pulse:
    """A thread that says again and again that this process lives, and looks at the others' pulses."""

    def __init__(self, store: dist.Store, rank: int, patience: float):
        self.store, self.rank, self.patience = store, rank, patience
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="vlmtune-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=1)  # the machine of the store may be gone: then it waits for an answer

    def watch(self, size: int) -> _Watch:
        return _Watch(self.store, self.rank, size, self.patience)

    def _beat(self) -> None:
        try:
            while not self._ended.wait(min(self.patience / 5, 5)):
                self.store.add(str(self.rank), 1)
        except RuntimeError:  # the machine of the store is gone: the next exchange says so
            return


class _Watch:
    """Whose pulse has not moved for `patience` seconds."""

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float):
        self.store, self.patience = store, patience
        now = time.monotonic()
        self._seen = {other: (0, now) for other in range(size) if other != rank}
        self._next = now + patience / 5

    def silent(self) -> list[int]:
        """Asks the store now and then."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + self.patience / 5
        for other, (beats, _) in self._seen.items():
            if (current := self.store.add(str(other), 0)) != beats:
                self._seen[other] = current, now
        return [other for other, (_, since) in self._seen.items() if now - since > self.patience]


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command of this Python in `count` processes of this machine, as `torchrun --standalone` does.

    Returns 0, or the exit code of the first that failed (128 + number for a signal, also one that came here): what
    went wrong was said by the process itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


@contextlib.contextmanager
def joined(patience: float) -> Iterator[Processes]:
    """The processes that `torchrun` started this one with, by the environment that it sets.

    patience: seconds that a silent process is waited for. Raises VlmtuneError where they do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    rank, local_rank = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise VlmtuneError(
                f"rank {rank}: this machine has {torch.cuda.device_count()} GPUs and more processes; start as many as "
                "it has (--nproc-per-node)."
            )
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=patience)))
        machine, here = (int(os.environ.get(name, "0")) for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE"))
        group = Group(store, rank, size, patience, local_rank, machine, here or None)
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise VlmtuneError(
            f"rank {rank} of {size} did not find the others at {where} within {patience:g} s "
            f"({str(error).strip().splitlines()[0]}); see that all are started with the same command, and that the "
            "network lets them through."
        ) from error
    try:
        yield group
    except BaseException as error:
        group.leave(str(error) or type(error).__name__)
        raise
    group.close()
