"""Everything that a run trains with, made from its config before its folder is touched: `run` trains with it, `check`
looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from vlmtune.adapt.plan import Plan, apply_plan, tensor_digest
from vlmtune.adapt.sharding import Parts, is_worth_sharding, shard_model
from vlmtune.build import (
    Base,
    FittedData,
    build_encoder,
    build_eval_groups,
    build_steps,
    build_train,
    count_samples,
    describe_new_tokens,
    describe_sources,
    describe_surveys,
    fit_data,
    load_base,
    remarks_on_prompts,
)
from vlmtune.build_course import apply_formats, build_settings, training_policies
from vlmtune.build_loss import build_objective
from vlmtune.checks.before import batchnorm_findings
from vlmtune.checks.settings import Course, settings_findings
from vlmtune.config import Config
from vlmtune.data.active import ActiveOrder
from vlmtune.data.batch import collate, with_contrast
from vlmtune.data.encode import Encoder
from vlmtune.data.filler import encode_filler
from vlmtune.data.loader import Steps
from vlmtune.data.pictures import budget_sentence
from vlmtune.data.share import Share
from vlmtune.data.sources import SampleSource
from vlmtune.data.survey import Survey, longest_rows, row_tokens
from vlmtune.evaluate.evaluation import require_chosen
from vlmtune.fast_start import start_fast
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import part_of
from vlmtune.models.packing import is_packing
from vlmtune.models.quantise import place
from vlmtune.models.readouts import readouts_of
from vlmtune.models.trunk import require_two_halves
from vlmtune.models.vlm import checkpoint_activations
from vlmtune.observe.log import CountingBar
from vlmtune.optim.optimizer import usable_here
from vlmtune.optim.precision import bf16_is_fast, resolve_precision
from vlmtune.probe import SAMPLES, Probe
from vlmtune.processes import ALONE, Processes
from vlmtune.shards import fold
from vlmtune.start import (
    Phase,
    check_start,
    check_weights,
    first_micro_batches,
    halves_finding,
    memory_finding,
    memory_there,
    predict_phases,
    require_no_failure,
)
from vlmtune.trainer import Settings
from vlmtune.types import Batch, Encoded, Finding, Sample, VlmtuneError

LOOKED_AT = 64  # samples of a source that has no end


@dataclass(frozen=True)
class Prepared:
    """Everything that a run trains with, before its folder is touched.

    findings: how what learns begins; judged: the values of the config, and memory; both empty where not looked at;
    digests: canonical name -> format and digest of what every trained parameter begins with; filler: of a sharded
    model, a micro-batch without a sample.
    """

    model: torch.nn.Module
    encoder: Encoder
    sources: list[SampleSource]
    groups: dict[str, list[SampleSource]]
    fitted: FittedData
    steps: Steps
    settings: Settings
    plan: Plan
    objective: Objective
    findings: list[Finding]
    judged: list[Finding]
    predictions: list[Phase]
    digests: dict[str, str]
    filler: Batch | None = None


def prepare(
    config: Config,
    device: torch.device,
    console: Console,
    check: bool = True,
    base: Base | None = None,
    processes: Processes = ALONE,
) -> Prepared:
    """Build all parts, count the data, apply the plan, and check how everything begins.

    check: look at the start, the settings and memory; base: where it is loaded already (it is changed); processes: all
    that share the steps: the first of each machine assembles, indexes and counts what the others then find there.
    Raises VlmtuneError for whatever cannot be built, and for the first part that begins wrongly.
    """
    precision = resolve_precision(config.train.precision, device)
    rules = training_policies(config, precision)
    with processes.first_of_machine_first("model and data"):
        base = base or load_base(config, rules=rules)
        model = base.model
        encoder = build_encoder(base.processor, model, config.data)
        train_set = build_train(config.data)
        sources, weights = [member.source for member in train_set], [member.weight for member in train_set]
        groups = build_eval_groups(config)
        for line in describe_sources(sources, groups):
            console.print(f"data: {line}", highlight=False, markup=False)
        optimizer_remark = usable_here(config.optim.name, device)[1]
        remarks = [remark for remark in (base.remark, optimizer_remark) if remark]
        for line in [*remarks, *remarks_on_prompts(config, encoder)]:
            console.print(f"note: {line}", highlight=False, markup=False)
        if base.new_tokens:
            console.print(describe_new_tokens(base), highlight=False, markup=False)
        with CountingBar(console) as bar:
            fitted = fit_data(config, encoder, sources, groups, bar)
    sources, groups = fitted.sources, fitted.groups
    for line in describe_surveys(config, fitted):
        console.print(f"data: {line}", highlight=False, markup=False)
    if config.evaluate.metrics:
        limits = {None, config.evaluate.limit} if config.evaluate.every else {None}
        require_chosen(config.evaluate.metrics, groups, list(readouts_of(model) or []), limits)
    settings = build_settings(config, [source.size for source in sources], precision)
    plan = apply_plan(model, rules, config.model, config.train.seed, base.new_tokens)
    objective = build_objective(config, sources, plan, encoder)
    if config.train.gradient_checkpointing:
        _require_something_to_recompute(config, plan)
        checkpoint_activations(model, config.train.gradient_checkpointing)
    if config.data.vision_cache is not None:
        require_two_halves(model, plan.parameters)
    findings = check_weights(model, plan, encoder) if check else []
    digests = {name: f"{p.dtype} {tensor_digest(p)}" for name, p in plan.parameters.items()}
    formats = apply_formats(model, plan, config)
    parts = None
    if _is_in_parts(config, model, plan, device, processes, encoder.pictures.merges):
        keep_trunk = config.data.vision_cache is not None  # tower and projector run by themselves
        parts = Parts.of(model, plan, keep_trunk)
        plan = shard_model(model, plan, processes.mesh(device), keep_trunk)
        formats.append(f"every process holds a part of the model ({processes.size} of them)")
    else:
        place(model, device)
    for line in formats:
        console.print(line, highlight=False, markup=False)
    steps = build_steps(config, sources, weights, encoder, settings.total_steps)
    fewer = None if encoder.pictures.rule is None else _complexity_finding(steps, config.data.complexity is None)
    if fewer is not None:
        console.print(fewer.evidence, highlight=False, markup=False)
    if isinstance(steps.order, ActiveOrder):
        console.print(steps.order.described(), highlight=False, markup=False)
    share = _share_of(processes, sources, fitted.of_train)
    if parts is None:  # else all processes look at the same samples until the first step
        steps.share = share
    batches = first_micro_batches(steps)
    if objective.consistency is not None:
        _require_pairs(config, objective, batches, processes)
    findings += check_start(model, plan, batches[0], precision) if check else []
    findings += start_fast(model, plan, config.train.fused, config.train.packing, batches[-1], precision, check)
    if is_packing(model):
        steps.room = replace(steps.room, has_padding=False)
    batches = first_micro_batches(steps)
    predictions = predict_phases(config, settings, model, batches, base.new_tokens, device, parts, processes.size)
    made = Prepared(
        model, encoder, sources, groups, fitted, steps, settings, plan, objective, findings, [], predictions, digests
    )
    if check:
        if config.data.vision_cache is not None:
            made.findings.append(halves_finding(model, encoder, _with_images(made), precision))
            require_no_failure(made.findings, "start")
        is_shared = any(rule.batchnorm == "sync" for rule in config.plan)
        made.findings.extend(batchnorm_findings(model, plan, batches, is_shared))
        drawn = [steps.order.finding()] if isinstance(steps.order, ActiveOrder) else []
        made.judged.extend([*_judged_settings(config, made, device), *drawn, memory_finding(predictions, device)])
        made.judged.extend([] if fewer is None else [fewer])
    fold(model)
    return _with_fillers(made, share) if parts is not None else made


def _is_in_parts(
    config: Config,
    model: torch.nn.Module,
    plan: Plan,
    device: torch.device,
    processes: Processes,
    merges_tokens: bool,
) -> bool:
    """Whether every process holds a part of the model (`train.shard`). Raises VlmtuneError where something else of the
    config needs a whole one."""
    wish = config.train.shard
    if processes.size == 1 or wish is False:
        return False
    if wish == "auto":
        there = memory_there(device) // (processes.of_machine if device.type == "cpu" else 1)
        is_large = is_worth_sharding(model, plan, config.optim.name, there)
        if not any(processes.gather("models that are too large", is_large)):
            return False
    needs = {
        f"optim.name: {config.optim.name}": config.optim.name != "adamw",
        "loss.balance gradnorm": config.loss.balance.by == "gradnorm",
        "evaluate.samples_every": config.evaluate.samples_every is not None,
        "loss.consistency": config.loss.consistency is not None,
        "data.complexity on images of one size": merges_tokens,  # the tower runs outside of the model's forward
    }
    if needed := [name for name, is_needed in needs.items() if is_needed]:
        raise VlmtuneError(
            f"{needed[0]} needs a whole model in every process, but "
            + ("train.shard is true" if wish is True else "this one is too large for that (train.shard: auto)")
            + "; change one of them."
        )
    return True


def _complexity_finding(steps: Steps, is_the_models: bool) -> Finding:
    """What the rule of complexity does to the images of the first samples of the run, and whether it does anything.

    is_the_models: the rule came with the model, not from the config.
    """
    first = [steps.order[k] for k in range(min(steps.order.decide(0), LOOKED_AT))]
    budgets = [budget for source, row in first for budget in steps.encoder.budgets(steps.sources[source][row])]
    evidence = budget_sentence(steps.encoder.pictures.rule.measure, budgets)
    if is_the_models:
        evidence += "; the rule came with the model"
    what = "the rule of complexity saves image tokens"
    if budgets and all(budget.tokens == budget.without for budget in budgets):
        values = sorted(budget.complexity for budget in budgets)
        raised = f"raise data.complexity.simple (a quarter of these images are below {values[len(values) // 4]:.2f})"
        other = "set data.complexity.measure to none" if is_the_models else "leave data.complexity out"
        return Finding("warn", what, evidence, f"{raised}, or {other}")
    return Finding("pass", what, evidence)


def _with_fillers(made: Prepared, share: Share | None) -> Prepared:
    """From here on every part of the model runs in all processes at once: micro-batches without an image get one."""
    steps = made.steps
    source, row = steps.order[0]
    filler = encode_filler(steps.encoder, made.sources[source][row].task)
    steps.share, steps.filler = share, filler
    return replace(made, filler=collate([filler], steps.encoder.pad_token_id, fillers=1))


def _share_of(processes: Processes, sources: Sequence[SampleSource], surveys: Sequence[Survey | None]) -> Share | None:
    """What this process takes of every step; None where there is only one."""
    if processes.size == 1:
        return None
    lengths = [
        None if survey is None else row_tokens(source, survey) for source, survey in zip(sources, surveys, strict=True)
    ]
    return Share(processes.rank, processes.size, lengths)


def _require_something_to_recompute(config: Config, plan: Plan) -> None:
    """Raise VlmtuneError where the tower is named but nothing of it trains: then none of it is kept anyway."""
    named = config.train.gradient_checkpointing
    if isinstance(named, list) and "vision" in named and "vision" not in {part_of(name) for name in plan.parameters}:
        raise VlmtuneError(
            "train.gradient_checkpointing names vision, but nothing of the vision tower trains, so no activation of it "
            "is kept; leave vision out."
        )


def _require_pairs(config: Config, objective: Objective, batches: Sequence[Batch], processes: Processes) -> None:
    """Raise VlmtuneError where no sample of the first step is read with another picture, and where that cannot be.

    batches: of that step, this process's.
    """
    if any(rule.batchnorm == "sync" for rule in config.plan):
        raise VlmtuneError(
            "loss.consistency runs the tower over pictures besides those of the step, which batchnorm: sync normalises "
            "together; say batchnorm: frozen."
        )
    own = sum(len(batch.contrasted) for batch in batches), sum(batch.size for batch in batches)
    found, samples = map(sum, zip(*processes.gather("pairs of pictures", own), strict=True))
    if not found and objective.consistency.weight(0.0) > 0:
        raise VlmtuneError(
            f"loss.consistency: none of the {samples} samples of the first step can be read with another picture: they "
            "need images, a task that loss.consistency.tasks names (if any), and for other: another a sample with "
            "another picture and another reply in the same step."
        )


def _with_images(made: Prepared) -> list[Sample]:
    """The first samples of the run that have images, as many as a micro-batch."""
    first = [made.steps.order[k] for k in range(min(made.steps.order.decide(0), LOOKED_AT))]
    samples = [sample for source, row in first if (sample := made.sources[source][row]).images]
    return samples[: made.steps.room.samples]


def _judged_settings(config: Config, made: Prepared, device: torch.device) -> list[Finding]:
    plan, settings = made.plan, made.settings
    in_full = [rule for rule, policy in plan.policies.items() if policy.train == "full"]
    total = settings.total_steps * config.train.batch_size
    decided = made.steps.order.decide(0)  # the rest goes on alike, where it follows losses
    read = count_samples(made.steps.order, made.sources)(decided)
    course = Course(
        steps=settings.total_steps,
        warmup={rule: settings.rates[rule].warmup for rule in in_full},
        clips=[settings.clip, *settings.clip_by_rule.values()],
        epochs={
            name: total / decided * count / source.size
            for (name, count), source in zip(read.items(), made.sources, strict=True)
            if source.size is not None
        },
        held_out=list(made.groups),
        checkpoint_every=settings.checkpoint_every,
        evaluate_every=settings.eval_every if made.groups else None,
        batch=config.train.batch_size,
        all_rows=None if any(source.size is None for source in made.sources) else sum(s.size for s in made.sources),
        precision=settings.precision,
        is_on_cpu=device.type == "cpu",
        has_fast_bf16=bf16_is_fast(device),
    )
    return settings_findings(plan.rows, plan.policies, plan.parameters, course)


def largest_micro_batch(made: Prepared) -> Batch:
    """Of the samples with the most tokens, as many as a micro-batch has; of sources whose samples are not counted, the
    longest of the first that the run reads."""
    size = made.steps.room.samples
    found: list[tuple[int, Encoded]] = []
    for number, (source, survey) in enumerate(zip(made.sources, made.fitted.of_train, strict=True)):
        if survey is None:
            first = [made.steps.order[k] for k in range(min(made.steps.order.decide(0), LOOKED_AT))]
            rows = [row for of, row in first if of == number]
        else:
            rows = longest_rows(source, survey, size)
        found += [(len(sample), sample) for sample in (made.encoder.encode(source[row]) for row in rows)]
    found.sort(key=lambda pair: -pair[0])
    longest = [sample for _, sample in reversed(found[:size])]
    parts = made.steps.room.split([len(sample) for sample in longest])
    largest = max((longest[part] for part in parts), key=lambda part: sum(map(len, part)))
    batch = collate(largest, made.encoder.pad_token_id)
    if made.steps.contrast is None:
        return batch
    return with_contrast(batch, [sample if sample.geometry else None for sample in largest], made.encoder.pad_token_id)


def probe_of(steps: Steps) -> Probe:
    """The first samples of the run."""
    samples = [steps.order[k] for k in range(min(SAMPLES, steps.batch_size))]
    encoded = [steps.encoder.encode(steps.sources[source][row]) for source, row in samples]
    return Probe(collate(encoded, steps.encoder.pad_token_id))
