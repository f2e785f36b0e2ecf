"""What several processes tell each other, and what is said when one of them is somewhere else, silent or gone."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from processes_setup import together

from vlmtune import processes
from vlmtune.processes import ALONE, step_seed
from vlmtune.types import VlmtuneError


def test_what_is_told_comes_in_the_order_of_ranks(tmp_path):
    def work(group):
        told = group.gather("words", {"rank": group.rank, "word": "ä" * group.rank, "nan": float("inf")})
        return [told, group.is_first]

    said = together(3, tmp_path, work)
    assert said == [[[{"rank": n, "word": "ä" * n, "nan": float("inf")} for n in range(3)], n == 0] for n in range(3)]


def test_tensors_are_added_up_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "BUCKET", 4)  # several messages, some of one tensor

    def work(group):
        tensors = [
            torch.full((2, 3), float(group.rank)), torch.tensor(1.0), torch.arange(3, dtype=torch.float64) * group.rank
        ]  # fmt: skip
        group.add_up("numbers", tensors)
        return [tensor.tolist() for tensor in tensors]

    assert together(3, tmp_path, work) == [[[[3.0] * 3] * 2, 3.0, [0.0, 3.0, 6.0]]] * 3


def test_work_of_the_first_is_known_to_all(tmp_path):
    """It may take longer than a silent process is waited for."""

    def work(group):
        made = group.on_first("work", lambda: [time.sleep(1.5), os.getpid()][1])
        return [made, os.getpid()]

    said = together(2, tmp_path, work, patience=1.0)
    assert said[0][0] == said[1][0] == said[0][1] != said[1][1]


def test_an_error_of_one_is_an_error_of_all(tmp_path):
    def work(group):
        with group.agreed("reading"):
            if group.rank == 1:
                raise VlmtuneError("x.jsonl is not there.")

    assert together(3, tmp_path, work) == [
        "error: rank 1: x.jsonl is not there.", "error: x.jsonl is not there.", "error: rank 1: x.jsonl is not there."
    ]  # fmt: skip


def test_any_failure_of_one_is_an_error_of_all(tmp_path):
    def work(group):
        try:
            with group.agreed("writing"):
                if group.rank == 0:
                    raise OSError(28, "No space left on device")
        except OSError as error:
            return f"own: {error}"

    own, other = together(2, tmp_path, work)
    assert own == "own: [Errno 28] No space left on device"
    assert other == "error: rank 0: OSError: [Errno 28] No space left on device"


def test_one_that_leaves_says_why(tmp_path):
    """The other waits for it without a limit, and knows at once."""

    def work(group):
        if group.rank == 1:
            group.leave("its page could not be written")
            return "left"
        group.wait_for_all("checkpoint")

    began = time.monotonic()
    waited, _ = together(2, tmp_path, work)
    assert "and ended: its page could not be written" in waited and time.monotonic() - began < 30


def test_waiting_and_telling_are_different_places(tmp_path):
    def work(group):
        group.wait_for_all("checkpoint") if group.rank else group.gather("losses of step 3", 0)

    said = together(2, tmp_path, work, patience=20.0)
    assert "rank 1 is at 'checkpoint' (1), rank 0 is at 'losses of step 3' (1)" in said[1]
    assert said[0].startswith("error: rank 0 at 'losses of step 3'")


def test_a_store_with_words_of_an_earlier_start(tmp_path):
    """torchrun keeps its store when it starts the processes again."""

    def work(group):
        group.wait_for_all("first")
        return group.on_first("number", lambda: group._number)

    assert together(2, tmp_path, work) == together(2, tmp_path, work)


def test_the_first_of_a_machine_is_ahead(tmp_path):
    """The others wait as long as it lives, and go on where it failed."""

    def work(group):
        path = tmp_path / "made"
        with group.first_of_machine_first("making"):
            found = path.exists()
            if group.rank == 0:
                time.sleep(1.2)
                path.write_text("")
        return found

    assert together(3, tmp_path, work, patience=0.5) == [False, True, True]


def test_processes_at_different_places_say_where(tmp_path):
    def work(group):
        group.gather("weights of step 3" if group.rank else "evaluation", 0)

    for error in together(2, tmp_path, work):
        assert "rank 0 is at 'evaluation'" in error and "rank 1 is at 'weights of step 3'" in error


def test_a_silent_process_is_named_with_its_step_and_samples(tmp_path):
    def work(group):
        group.at(f"step 7, micro-batch {group.rank + 1} of 2", [f"sample-{group.rank}"])
        if group.rank == 1:
            time.sleep(4)
            return "slow"
        group.gather("losses of step 7", 0)

    began = time.monotonic()
    said = together(3, tmp_path, work, patience=1.0)
    assert time.monotonic() - began < 30
    assert said[1] == "slow"
    for rank in (0, 2):
        assert f"rank {rank} at 'losses of step 7': others are gone or silent (train.rank_timeout: 1 s)" in said[rank]
        assert "step 7, micro-batch 2 of 2 with samples sample-1" in said[rank]
        assert "sample-0" not in said[rank] and "sample-2" not in said[rank], "they are not silent"


def test_a_killed_process_is_noticed(tmp_path):
    """While others wait for its work without a limit: its pulse has stopped."""

    def work(group):
        if group.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        group.on_first("checkpoint", lambda: None)

    began = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0 ended with -9"):
        together(2, tmp_path, work, patience=1.0)
    assert time.monotonic() - began < 30
    said = (tmp_path / "1.json").read_text()
    assert "rank 1 at 'checkpoint': others are gone or silent" in said and "rank 0 on" in said


def test_one_process_needs_nobody():
    assert ALONE.gather("x", {"a": 1}) == [{"a": 1}] and ALONE.on_first("x", lambda: 3) == 3 and ALONE.is_first
    with pytest.raises(VlmtuneError, match="mine"), ALONE.agreed("x"):
        raise VlmtuneError("mine")


def test_seeds_differ():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 240
    for seed in seeds:
        torch.manual_seed(seed)
