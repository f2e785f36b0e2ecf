"""What `vlmtune validate` asks: held-out groups, probe files, yes/no questions, safety prompts; and the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from vlmtune.build import build_eval_groups, cache_folder, fit_data
from vlmtune.config import Config
from vlmtune.data.encode import Encoder
from vlmtune.data.files import open_reader
from vlmtune.data.prompts import system_prompt
from vlmtune.data.sources import FileSource, with_system
from vlmtune.errors import VlmtuneError
from vlmtune.evaluate.answers import Answer, answer
from vlmtune.evaluate.safety import read_probes
from vlmtune.evaluate.yes_no import QUESTION, poll, require_question, require_yes_no, truth_of
from vlmtune.observe.log import CountingBar
from vlmtune.types import Sample
from vlmtune.use import Loaded

YES_NO_TOKENS = 16  # of a reply to a yes/no question: the first sentence counts


@dataclass(frozen=True)
class Files:
    """What the user brings besides the run's own data, read before any model is loaded.

    retain: name -> samples of a probe file; pope: yes/no rows; safety: prompts.
    """

    retain: Mapping[str, list[Sample]] = field(default_factory=dict)
    pope: Sequence[Sample] = ()
    safety: Sequence[Sample] = ()


def read_files(
    config: Config, retain: Sequence[str], pope: Path | None, safety: Path | None, is_judged: bool
) -> tuple[list[str], Files]:
    """The names of the groups to keep, and what the files hold. retain: names of data.eval, or data files.

    Raises VlmtuneError for a name that is neither, a file that cannot be read, and rows that say nothing to check.
    """
    names, files = [], {}
    for wish in retain or config.evaluate.retain:
        if wish in config.data.eval:
            names.append(wish)
        elif Path(wish).exists():
            name = Path(wish).stem
            if name in files or name in config.data.eval:
                raise VlmtuneError(f"--retain {wish}: there is a group {name} already; rename the file.")
            files[name] = _rows(wish, config)
            names.append(name)
        else:
            known = ", ".join(config.data.eval) or "none"
            raise VlmtuneError(
                f"--retain {wish}: the run holds out no such group ({known}), and there is no such file; name one."
            )
    polls = require_yes_no(_rows(pope, config)) if pope is not None else []
    probes: list[Sample] = []
    if safety is not None:
        reader = open_reader(safety, cache=cache_folder() / "indexes")
        roots = [] if reader.folder is None else [reader.folder]
        probes = [_prompted(sample, config) for sample in read_probes(reader, roots, is_judged)]
    return list(dict.fromkeys(names)), Files(files, polls, probes)


def _rows(path: Path | str, config: Config) -> list[Sample]:
    source = FileSource(path, cache=cache_folder() / "indexes")
    return [_prompted(source[index], config) for index in range(source.size)]


def _prompted(sample: Sample, config: Config) -> Sample:
    """With the run's system prompt, as its own data has it."""
    return sample if config.data.system is None else with_system(sample, system_prompt(config.data.system))


@dataclass(frozen=True)
class Questions:
    """groups: held-out samples by group, probe files among them; retained: names of those whose ability has to stay;
    polls: yes/no questions; probes: safety prompts."""

    groups: Mapping[str, Sequence[Sample]]
    retained: Sequence[str]
    polls: Sequence[Sample]
    probes: Sequence[Sample]

    @property
    def count(self) -> int:
        return sum(map(len, self.groups.values())) + len(self.polls) + len(self.probes)


def spread(size: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `size`, evenly spread: files are often sorted by task."""
    count = size if limit is None else min(size, limit)
    return [number * size // count for number in range(count)]


def gather(
    config: Config,
    encoder: Encoder,
    files: Files,
    retained: Sequence[str],
    limit: int | None,
    question: str | None,
    console: Console,
) -> Questions:
    """limit: samples of each source, evenly spread over it. question: of yes/no questions made from `meta.objects` of
    held-out samples, None: make none.

    Raises VlmtuneError where there are none such, and the question, another than the usual one, had no effect.
    """
    with CountingBar(console) as bar:
        groups = fit_data(config, encoder, [], build_eval_groups(config), bar).groups
    held_out = {
        group: [source[row] for source in sources for row in spread(source.size, limit)]
        for group, sources in groups.items()
    }
    held_out |= {name: [samples[row] for row in spread(len(samples), limit)] for name, samples in files.retain.items()}
    if question is None:
        return Questions(held_out, retained, files.pope, files.safety)
    require_question(question)
    polls = poll((sample for samples in held_out.values() for sample in samples), question)
    if not polls and question != QUESTION:
        raise VlmtuneError(
            "--question: no held-out sample says in meta.objects what is in its image, so there is nothing to ask; "
            "leave it out, or pass --pope FILE with questions of your own."
        )
    return Questions(held_out, retained, [*polls, *files.pope], files.safety)


@dataclass(frozen=True)
class Answers:
    """Of one model, in the order of the questions. seconds: for all of them."""

    held_out: list[Answer]
    polls: list[Answer]
    probes: list[Answer]
    seconds: float

    @property
    def yes_no(self) -> list[Answer]:
        """To questions whose right reply is yes or no: those asked for it, and those among the held-out samples."""
        return [*self.polls, *(one for one in self.held_out if truth_of(one.sample) is not None)]


def ask(loaded: Loaded, questions: Questions, console: Console, doing: str) -> Answers:
    wish = loaded.config.evaluate
    began = time.perf_counter()
    done = 0

    with CountingBar(console, doing) as bar:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            bar("questions", done, questions.count)

        def answered(groups: Mapping[str, Sequence[Sample]], limit: int, with_reference: bool = True) -> list[Answer]:
            return answer(
                loaded.model, loaded.encoder, groups, batch_size=wish.batch_size, max_new_tokens=limit,
                precision=loaded.precision, with_reference=with_reference, progress=progress,
            )  # fmt: skip

        held_out = answered(questions.groups, wish.max_new_tokens)
        polls = answered({"": questions.polls}, min(YES_NO_TOKENS, wish.max_new_tokens), False)
        probes = answered({"": questions.probes}, wish.max_new_tokens, False)
    return Answers(held_out, polls, probes, time.perf_counter() - began)
