"""`vlmtune validate`: what came out of a run, asked before anybody else does (SPEC H3).

Sections: edge_cases, speed, task, retention, diversity, yes_no, safety, fresh, quantised. The trained model and then
the base answer the same questions, never both in memory at once. validate.json in the run folder holds findings and
figures (docs/guide/validate.md).
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmtune.adapt.serving import why_not_merged
from vlmtune.build import best_device, build_encoder, load_base
from vlmtune.build_course import policies
from vlmtune.card import write_card
from vlmtune.check import Section, described
from vlmtune.checks import outcome
from vlmtune.config import Config, load_config
from vlmtune.evaluate.answers import Scoring
from vlmtune.evaluate.edge_cases import edge_cases, run_case
from vlmtune.evaluate.retention import LOSS, compare, pooled
from vlmtune.evaluate.speed import REPEATS, measure_speed
from vlmtune.evaluate.yes_no import QUESTION
from vlmtune.export import export_run
from vlmtune.models.load import stored_dtype
from vlmtune.models.quantise import QUANTISED, place
from vlmtune.observe.page import write_page
from vlmtune.optim.precision import Precision
from vlmtune.paths import require_run, write_text
from vlmtune.sealed import finite, read_json, stage_folders
from vlmtune.types import Finding, VlmtuneError
from vlmtune.use import Loaded, find_checkpoint, last_stage, load_run, products_of
from vlmtune.validation.figures import polled_of, replies_of, safety_of
from vlmtune.validation.fresh import Place, answers_at, ask_fresh, places_to_ask, record_of, samples_at
from vlmtune.validation.quantised import measure_storages
from vlmtune.validation.questions import Answers, Questions, ask, gather, read_files

FORMAT = 1
SECTIONS = (
    "task", "retention", "diversity", "yes_no", "safety", "edge_cases", "speed", "fresh", "quantised",
)  # fmt: skip
COMPARED = ("task", "retention", "diversity", "yes_no", "safety")
"""Sections that ask the base as well."""
FRESH_SAMPLES = 4
FILE = "validate.json"


@dataclass(frozen=True)
class Wish:
    """What the user asked for; fields as the options of the command."""

    checkpoint: str = "latest"
    retain: Sequence[str] = ()
    pope: Path | None = None
    question: str = QUESTION
    safety: Path | None = None
    judge: str | None = None
    skip: Sequence[str] = ()
    limit: int | None = None
    card: Path | None = None


def validate(run: Path, console: Console, wish: Wish, as_json: bool = False) -> int:
    """Validate a checkpoint of a run folder, or of a chain's last stage; returns the exit code, 1 if anything fails.

    Writes validate.json into the run folder, and the model card into `wish.card`, an exported folder. Raises
    VlmtuneError for a folder that is no run, options that do not go together, files that cannot be read, and a judge
    that fails: then nothing is written.
    """
    began = time.perf_counter()
    said = Console(quiet=True) if as_json else console
    validation = Validation(run, wish, said)
    sections = []
    for section in validation.sections():
        sections.append(section)
        for line in described(section):
            said.print(line, highlight=False, soft_wrap=True)
    record = validation.record(sections, time.perf_counter() - began)
    write_text(validation.run / FILE, json.dumps(record, indent=1))
    page = write_page(validation.run)
    if wish.card is not None:
        said.print(
            f"model card: {write_card(wish.card, validation.run)}", highlight=False, markup=False, soft_wrap=True
        )
    if as_json:
        print(json.dumps(record["findings"], indent=1))
    counts = {level: sum(f["level"] == level for f in record["findings"]) for level in ("pass", "warn", "fail")}
    said.print(f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail", highlight=False)
    said.print(f"figures: {validation.run / FILE}, page: {page}", highlight=False, markup=False, soft_wrap=True)
    return int(counts["fail"] > 0)


class Validation:
    """One validation while it goes on: what a section measures, later ones and the record use."""

    def __init__(self, root: Path, wish: Wish, console: Console):
        unknown = [name for name in wish.skip if name not in SECTIONS]
        if unknown:
            raise VlmtuneError(f"--skip {unknown[0]!r}: there is no such section; there are {', '.join(SECTIONS)}.")
        if set(SECTIONS) <= set(wish.skip):
            raise VlmtuneError("--skip names every section, so there is nothing left to look at; leave one out of it.")
        for option, given, section in (
            ("--safety", wish.safety is not None, "safety"), ("--pope", wish.pope is not None, "yes_no"),
            ("--question", wish.question != QUESTION, "yes_no"), ("--retain", bool(wish.retain), "retention"),
        ):  # fmt: skip
            if given and section in wish.skip:
                raise VlmtuneError(f"{option} belongs to the section {section}, which --skip leaves out; keep one.")
        if wish.judge is not None and wish.safety is None:
            raise VlmtuneError("--judge judges the replies to --safety FILE; pass that too, or leave it out.")
        if wish.checkpoint == "base":
            raise VlmtuneError("--checkpoint base: the base is what a checkpoint is compared with; name a checkpoint.")
        self.wish, self.console = wish, console
        self.run = last_stage(root)
        require_run(self.run)
        self.config = load_config(str(self.run / "config.yaml"))
        self.step = find_checkpoint(self.run, wish.checkpoint).resolve().name
        self.base_model = _first_model(root, self.config)
        self.retained, self.files = read_files(
            self.config, wish.retain, wish.pope, wish.safety, wish.judge is not None
        )  # fmt: skip
        self.exported = None if wish.card is None else _require_export(wish.card, self.step)
        self.figures: dict[str, Any] = {}
        self._places: list[Place] = []
        self._here: dict[str, list] = {}
        self._form = "merged"
        self._precision: Precision = "fp32"

    def sections(self) -> Iterator[Section]:
        with self._loaded(lambda: load_run(self.run, self.step)) as trained:
            questions = gather(
                self.config, trained.encoder, self.files, self.retained, self.wish.limit,
                None if "yes_no" in self.wish.skip else self.wish.question, self.console,
            )  # fmt: skip
            answers = ask(trained, questions, self.console, "the trained model answers") if self._compares else None
            for name, work in (("edge_cases", self._edge_cases), ("speed", self._speed)):
                yield from self._section(name, work, trained)
            self._form = "merged" if why_not_merged(trained.plan) is None else "adapter"
            exported_in_full = self._is_exported_in_full()
            if not exported_in_full:
                self._remember(trained)
            scoring = Scoring(trained.encoder.coordinates.without_places, self.config.evaluate.metrics)
        if exported_in_full:
            with self._loaded(lambda: load_run(self.run, self.step, as_stored=False)) as full:
                self._remember(full)
        if answers is not None:
            yield from self._compared(questions, answers, scoring)
        yield from self._saved(questions, scoring)

    def _compared(self, questions: Questions, answers: Answers, scoring: Scoring) -> Iterator[Section]:
        """What rests on the answers of both models."""
        with self._loaded(lambda: _load_before(self.config, self.base_model)) as base:
            before = ask(base, questions, self.console, "the base answers")
        self.console.print(
            f"asked {questions.count:,} questions: the trained model took {answers.seconds:.1f} s, the base "
            f"{before.seconds:.1f} s", highlight=False,
        )  # fmt: skip
        if questions.groups:
            comparisons = compare(before.held_out, answers.held_out, scoring)
            totals = pooled(before.held_out, answers.held_out, scoring)
            self.figures["comparisons"] = [
                {"group": c.group, "task": c.task, "metric": c.metric, "telling": c.telling, **asdict(c.change)}
                for c in comparisons
            ]
            self.figures["groups"] = {
                name: {"retained": name in self.retained, **asdict(change)} for name, change in totals.items()
            }
            yield from self._section("task", self._task, comparisons, totals)
            yield from self._section("retention", self._retention, comparisons, totals)
            yield from self._section("diversity", self._diversity, before, answers)
        else:
            what, remedy = "something is held out", "set data.eval, or pass --retain FILE"
            evidence = "no: what was learned and what was kept cannot be measured"
            yield from self._section("task", lambda: [Finding("warn", what, evidence, remedy)])
        yield from self._section("yes_no", self._yes_no, before, answers)
        yield from self._section("safety", self._safety, questions, before, answers)

    def record(self, sections: Sequence[Section], seconds: float) -> dict[str, Any]:
        """validate.json."""
        findings = [{"section": s.name, **asdict(finding)} for s in sections for finding in s.findings]
        worst = max((f["level"] for f in findings), key=("pass", "warn", "fail").index, default="pass")
        return finite(
            {
                "format": FORMAT, "verdict": worst, "checkpoint": self.step, "base": self.base_model,
                "retained": list(self.retained), "limit": self.wish.limit, "skipped": list(self.wish.skip),
                "seconds": seconds, "findings": findings, "figures": self.figures,
            }
        )  # fmt: skip

    # ---- models -------------------------------------------------------------------------------------------------

    @contextmanager
    def _loaded(self, load: Callable[[], Loaded]) -> Iterator[Loaded]:
        """A model that is gone afterwards: two may not fit beside each other."""
        loaded = load()
        place(loaded.model, best_device())
        yield loaded
        loaded.model = None
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _compares(self) -> bool:
        return not set(COMPARED) <= set(self.wish.skip)

    def _is_exported_in_full(self) -> bool:
        """Whether the export has other weights than were trained with: a quantised base in full, unless it is a folder
        that vlmtune loads as it was trained."""
        is_bundle = self._form == "adapter" if self.exported is None else (self.exported / "config.yaml").is_file()
        return not is_bundle and any(policy.store in QUANTISED for _, policy in policies(self.config))

    def _remember(self, trained: Loaded) -> None:
        """What a fresh process will be compared with."""
        if "fresh" in self.wish.skip:
            return
        self._places = places_to_ask(self.config, trained.encoder, FRESH_SAMPLES)
        here = answers_at(trained.model, trained.encoder, trained.precision, self.config, self._places)
        self._here = record_of(here, trained.encoder)
        stored = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(stored_dtype(trained.model_path), "fp32")
        self._precision = trained.precision if trained.precision != "fp32" else stored

    # ---- sections -----------------------------------------------------------------------------------------------

    def _section(self, name: str, work: Callable[..., Any], *arguments: Any) -> Iterator[Section]:
        """The section, unless it is skipped or has nothing to say."""
        if name in self.wish.skip:
            return
        began = time.perf_counter()
        findings = list(work(*arguments))
        if findings:
            yield Section(name, findings, time.perf_counter() - began)

    def _edge_cases(self, trained: Loaded) -> Iterator[Finding]:
        markers = sorted(set(map(str, trained.encoder.tokenizer.all_special_tokens)))
        cases = edge_cases(trained.encoder, self.config.data.max_length, markers)
        outcomes = [run_case(trained.model, trained.encoder, case, trained.precision) for case in cases]
        self.figures["edge_cases"] = [asdict(one) for one in outcomes]
        return outcome.edge_findings(outcomes)

    def _speed(self, trained: Loaded) -> list[Finding]:
        samples = samples_at(self.config, places_to_ask(self.config, trained.encoder, REPEATS))
        speed = measure_speed(trained.model, trained.encoder, samples, trained.precision)
        device = trained.model.device
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads > 1)}"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        self.figures["speed"] = asdict(speed) | {"device": name}
        return [outcome.speed_finding(speed, name)]

    def _task(self, comparisons, totals) -> list[Finding]:
        totals = {name: change for name, change in totals.items() if name not in self.retained}
        return outcome.reached_findings([c for c in comparisons if c.group in totals], totals)

    def _retention(self, comparisons, totals) -> list[Finding]:
        totals = {name: change for name, change in totals.items() if name in self.retained}
        if not totals:
            remedy = "name held-out groups of what the base could do (evaluate.retain, --retain GROUP), or a file of it"
            return [Finding("warn", "old abilities are kept", "not measured: no group was named for it", remedy)]
        return outcome.kept_findings([c for c in comparisons if c.group in totals], totals)

    def _diversity(self, before: Answers, answers: Answers) -> list[Finding]:
        replies, self.figures["diversity"] = replies_of(before.held_out, answers.held_out)
        return outcome.diversity_findings(replies, self.config.evaluate.max_new_tokens)

    def _yes_no(self, before: Answers, answers: Answers) -> list[Finding]:
        polled, self.figures["yes_no"] = polled_of(before.yes_no, answers.yes_no)
        return outcome.yes_no_findings(polled)

    def _safety(self, questions: Questions, before: Answers, answers: Answers) -> list[Finding]:
        if not questions.probes:
            return []
        verdicts, right, self.figures["safety"] = safety_of(before.probes, answers.probes, self.wish.judge)
        return outcome.safety_findings(*verdicts, right)

    # ---- what was saved -----------------------------------------------------------------------------------------

    def _saved(self, questions: Questions, scoring: Scoring) -> Iterator[Section]:
        """Of the exported folder that was named, or one that is made for this and goes again."""
        if "fresh" in self.wish.skip and "quantised" in self.wish.skip:
            return
        if self.exported is not None:
            yield from self._of_folder(self.exported, questions, scoring)
            return
        with tempfile.TemporaryDirectory(prefix=".validate-", dir=self.run) as draft:  # the disk of the run, not /tmp
            folder = Path(draft) / "export"
            try:
                export_run(self.run, self.step, folder, Console(quiet=True), self._form)
            except VlmtuneError as error:
                sentence, _, remedy = str(error).rstrip(".").rpartition("; ")
                finding = Finding(
                    "fail", "the checkpoint can be exported", sentence or remedy, remedy if sentence else ""
                )
                yield from self._section("fresh", lambda: [finding])
                return
            yield from self._of_folder(folder, questions, scoring)

    def _of_folder(self, folder: Path, questions: Questions, scoring) -> Iterator[Section]:
        yield from self._section("fresh", self._fresh, folder)
        yield from self._section("quantised", self._quantised, folder, questions, scoring)

    def _fresh(self, folder: Path) -> list[Finding]:
        form = "the exported model" if (folder / "config.json").is_file() else "the exported folder"
        fresh = ask_fresh(folder, self.run / "config.yaml", self._places, self._here, self._precision)
        self.figures["fresh"] = asdict(fresh)
        return [outcome.fresh_finding(fresh, form)]

    def _quantised(self, folder: Path, questions: Questions, scoring) -> Iterator[Finding]:
        what, remedy = "quantised weights answer as float32 does", "export with --as merged"
        if not (folder / "config.json").is_file():
            yield Finding("warn", what, "not measured: adapters that are not merged are not quantised", remedy)
            return
        measured, missing = measure_storages(folder, self.config, questions.groups, scoring)
        self.figures["quantised"] = [
            {"storage": one.storage, "bytes": one.bytes, "full_bytes": one.full_bytes, LOSS: asdict(one.loss),
             "score": asdict(one.score)}
            for one in measured
        ]  # fmt: skip
        yield from map(outcome.quantised_finding, measured)
        for storage, why in missing.items():
            yield Finding("warn", f"{storage} answers as float32 does", f"not measured: {why}", "")


def _first_model(root: Path, config: Config) -> str:
    """The base; of a chain what its first stage started from: later stages start from an earlier one's result."""
    if not (root / "stages.json").is_file():
        return config.model
    return load_config(str(stage_folders(root)[0] / "config.yaml")).model


def _load_before(config: Config, model: str) -> Loaded:
    config = config.model_copy(update={"model": model})
    base = load_base(config)
    encoder = build_encoder(base.processor, base.model, config.data)
    return Loaded(base.model.eval(), encoder, config, base.path, None, products_of(config))


def _require_export(folder: Path, step: str) -> Path:
    """The folder, if it is an export of this checkpoint."""
    proof = folder / "vlmtune_export.json"
    if not proof.is_file():
        raise VlmtuneError(
            f"--card {folder} is not a folder that `vlmtune export` wrote (no {proof.name}); export first."
        )
    made_of = read_json(proof, "export again").get("checkpoint")
    if made_of != step:
        raise VlmtuneError(
            f"--card {folder} is an export of {made_of}, not of {step}; export again, or --checkpoint {made_of}."
        )
    return folder
