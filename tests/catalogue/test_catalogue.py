"""Every case of the catalogue is named as docs/guide/catalogue.md says, and nothing is said about what is sound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from . import record
from .case import REFUSED, Case, Healthy, ask
from .cases import CASES, ENDS_EARLY, HEALTHY, QUICK
from .short_model import write_short

RECORDED = {entry.name: entry for entry in record.read()}
LEAST, RATE = 40, 0.9  # cases, and the share whose cause is named first


def timed(entries: list) -> list:
    return [pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] if entry.is_slow else []) for entry in entries]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_short(tmp_path_factory.mktemp("short") / "model")


@pytest.mark.parametrize("case", timed(CASES))
def test_the_cause_is_named_as_recorded(case: Case, model, tmp_path):
    _, argument = record.make(case, model, tmp_path)
    said = ask(case.command, argument)
    assert case.names_it(said.first) == RECORDED[case.name].is_named, [(f.level, f.what, f.evidence) for f in said.odd]
    assert said.code == int(any(finding.level == "fail" for finding in said.findings))


@pytest.mark.parametrize("case", timed(HEALTHY))
def test_nothing_is_said_about_what_is_sound(case: Healthy, model, tmp_path):
    _, argument = record.make(case, model, tmp_path)
    said = ask(case.command, argument)
    assert said.odd == [] and said.code == 0 and len(said.findings) > 5


@pytest.mark.parametrize("name", ["mojibake", "boxes_y_first", "texts_exchanged", "contradicting_labels"])
def test_another_seed_has_the_same_cause(name, model, tmp_path):
    case = next(case for case in CASES if case.name == name)
    _, argument = record.make(case, model, tmp_path, seed=7)
    assert case.names_it(ask(case.command, argument).first)


def test_the_page_lists_the_cases_as_they_are():
    assert [(entry.name, entry.wrong, entry.command) for entry in record.read()] == [
        (case.name, case.wrong, case.command) for kind in record.KINDS for case in CASES if case.kind == kind
    ]


def test_the_page_states_the_rate_of_its_table_and_it_is_high_enough():
    page, entries = record.PAGE.read_text(encoding="utf-8"), record.read()
    assert record.rate_line(entries) in page and "\n".join(record.healthy_lines(record.read_healthy())) in page
    assert len(entries) >= LEAST and sum(entry.is_named for entry in entries) >= RATE * len(entries)


def test_the_page_lists_all_that_is_sound():
    assert record.read_healthy() == {case.name: "nothing" for case in HEALTHY} and len(HEALTHY) >= 10


def test_what_is_said_names_the_cause():
    """The recorded words hold what the case asks for: no case is called named that is not."""
    for case in CASES:
        said = RECORDED[case.name].said
        if RECORDED[case.name].is_named and not said.endswith("…`"):
            assert (case.what == REFUSED or case.what in said) and case.says.replace("|", "\\|") in said, case.name


def test_cases_are_distinct():
    names = Counter(entry.name for entry in (*CASES, *HEALTHY))
    assert max(names.values()) == 1 and set(names) >= QUICK | ENDS_EARLY
    causes = Counter((case.command, case.what, case.says) for case in CASES)
    twice = [cause for cause, count in causes.items() if count > 1]
    assert not twice, "two cases that one text names could be one case"
    assert min(Counter(case.kind for case in CASES).values()) >= 15
