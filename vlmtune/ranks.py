"""`vlmtune ranks`: measure which linear modules the replies depend on, and write a config with LoRA ranks that follow
it, at the parameters of a uniform rank (SPEC F2)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from vlmtune import __version__
from vlmtune.adapt.fisher import fisher_traces, linear_modules
from vlmtune.adapt.plan import assign_rules
from vlmtune.adapt.rank_budget import allocate_ranks
from vlmtune.build import (
    best_device,
    build_encoder,
    build_steps,
    build_train,
    describe_sources,
    describe_surveys,
    fit_data,
    load_base,
    remarks_on_prompts,
)
from vlmtune.build_course import build_settings, policies
from vlmtune.config import Config, Rule, parse_config
from vlmtune.data.batch import collate
from vlmtune.data.loader import Steps
from vlmtune.models.quantise import place
from vlmtune.observe.log import CountingBar
from vlmtune.optim.precision import autocast, resolve_precision
from vlmtune.paths import require_new_file
from vlmtune.rules import assign, compile_pattern
from vlmtune.types import Batch, VlmtuneError

MULTIPLE, LOWEST, HIGHEST = 4, 4, 64
HEAT = "·░▒▓█"
ONLY_LORA = ("train", "rank", "alpha", "dropout", "lr", "lr_b", "weight_decay", "options")
"""Fields of a rule that mean nothing on what stays frozen beside the adapted modules."""

Per = Literal["module", "kind", "layer"]
Count = Literal["parameters", "ranks"]


@dataclass(frozen=True)
class Module:
    """A linear module that a rule adapts. cost: LoRA parameters of one rank, in + out; limit: its largest rank."""

    name: str
    cost: int
    limit: int


@dataclass(frozen=True)
class Ranks:
    """The outcome. traces, ranks: by canonical name of module; samples: how many were measured on."""

    traces: dict[str, float]
    ranks: dict[str, int]
    rules: list[Rule]
    samples: int


def choose_ranks(
    config: Config,
    console: Console,
    output: Path,
    budget: int = 16,
    samples: int = 64,
    per: Per = "module",
    count: Count = "parameters",
    power: float = 0.5,
) -> Ranks:
    """Measure, allocate, print, and write the config with the new plan to `output`.

    budget: a uniform rank, whose sum of LoRA parameters (or of ranks: `count`) is spent exactly; samples: the first of
    the run; per: what shares a rank: nothing, modules of one kind in all layers, or a layer; power: of importance in
    the target (`adapt.rank_budget`). Raises VlmtuneError, before anything is measured, for a plan without a LoRA rule,
    a budget that no module could have, and an output that exists or cannot be written.
    """
    if output.exists():
        raise VlmtuneError(f"--output {output} exists; name another file, or delete it.")
    require_new_file(output, "--output")
    lora = [rule for rule in config.plan if rule.train == "lora"]
    if not lora:
        raise VlmtuneError("ranks: no rule of the plan says train: lora, so there is no rank to choose; add one.")
    for rule in lora:
        _alpha_per_rank(rule)
    _require_budget(budget)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = best_device()

    base = load_base(config)
    names = list(assign_rules(base.model, policies(config)))
    linear = linear_modules(base.model)
    modules = adapted_modules(config.plan, names, linear)
    _require_room(modules, budget)
    encoder = build_encoder(base.processor, base.model, config.data)
    for line in [*([base.remark] if base.remark else []), *remarks_on_prompts(config, encoder)]:
        console.print(f"note: {line}", highlight=False, markup=False)
    train_set = build_train(config.data)
    with CountingBar(console) as bar:
        fitted = fit_data(config, encoder, [member.source for member in train_set], {}, bar)
    for line in [*describe_sources(fitted.sources, {}), *describe_surveys(config, fitted)]:
        console.print(f"data: {line}", highlight=False, markup=False)
    precision = resolve_precision(config.train.precision, device)
    settings = build_settings(config, [source.size for source in fitted.sources], precision)
    weights = [member.weight for member in train_set]
    steps = build_steps(config, fitted.sources, weights, encoder, settings.total_steps)
    chosen = first_samples(steps, samples)
    if len(chosen) < samples:
        console.print(f"note: the run has only {len(chosen)} different samples to measure on", highlight=False)

    place(base.model, device)
    began = time.perf_counter()
    with CountingBar(console, "measuring") as bar, autocast(precision, device):
        batches = _batches(steps, chosen, device, bar)
        traces = fisher_traces(base.model, batches, {module.name: linear[module.name] for module in modules})
    seconds = time.perf_counter() - began
    ranks = grouped_ranks(modules, traces, budget, per, count, power)
    rules = rules_with_ranks(config.plan, names, ranks)
    result = Ranks(traces, ranks, rules, len(chosen))
    console.print(ranks_table(modules, result))
    _write(output, config, result, f"budget: {count} of uniform rank {budget}; one rank per {per}; power {power:g}")
    spent = sum(module.cost * ranks[module.name] for module in modules)
    uniform = sum(module.cost for module in modules) * budget
    console.print(
        f"measured on {len(chosen)} samples in {seconds:.1f} s, {precision} on {device.type}; {spent:,} LoRA "
        f"parameters in {len(modules)} modules (rank {budget} everywhere: {uniform:,}), {len(rules)} rules\n"
        f"plan: {output}; train it with: vlmtune train {output}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return result


def adapted_modules(rules: Sequence[Rule], names: Sequence[str], linear: Mapping[str, nn.Linear]) -> list[Module]:
    """The linear modules whose weight's rule says lora, in the model's order.

    names: canonical ones of parameters, with the head's where it is tied and adapted all the same.
    """
    assignment = assign([(rule.match, rule) for rule in rules], names)
    return [
        Module(name, module.in_features + module.out_features, min(module.in_features, module.out_features))
        for name, module in linear.items()
        if f"{name}.weight" in assignment and assignment[f"{name}.weight"][1].train == "lora"
    ]


def first_samples(steps: Steps, wanted: int) -> list[tuple[int, int]]:
    """(source, row) of the first `wanted` different samples of a run; fewer where it has not more."""
    found: dict[tuple[int, int], None] = {}
    for k in range(steps.order.decide(0)):
        if len(found) == wanted:
            break
        found[steps.order[k]] = None
    return list(found)


def _batches(steps: Steps, chosen: list[tuple[int, int]], device: torch.device, bar: CountingBar) -> Iterator[Batch]:
    for number, (source, row) in enumerate(chosen, 1):
        encoded = steps.encoder.encode(steps.sources[source][row])
        yield collate([encoded], steps.encoder.pad_token_id).to(device)
        bar("importance of modules on", number, len(chosen))


def grouped_ranks(
    modules: Sequence[Module], traces: Mapping[str, float], budget: int, per: Per, count: Count, power: float
) -> dict[str, int]:
    """Rank of every module. The importance of a group is the mean trace of its modules, its cost the sum of theirs."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(group_of(module.name, per), []).append(module)
    costs = {
        group: sum(member.cost if count == "parameters" else 1 for member in members)
        for group, members in groups.items()
    }
    found = allocate_ranks(
        {group: sum(traces[m.name] for m in members) / len(members) for group, members in groups.items()},
        costs, budget * sum(costs.values()), MULTIPLE, LOWEST, HIGHEST, power,
        {group: min(member.limit for member in members) for group, members in groups.items()},
    )  # fmt: skip
    return {module.name: found[group_of(module.name, per)] for module in modules}


def group_of(name: str, per: Per) -> str:
    """What shares a rank with this module: "language.layers.*.mlp.up_proj", "language.layers.3", or itself."""
    layer = re.match(r"(.*?)\.(\d+)\.(.*)", name)
    if per == "module" or layer is None:
        return name
    stem, number, rest = layer.groups()
    return f"{stem}.*.{rest}" if per == "kind" else f"{stem}.{number}"


def rules_with_ranks(rules: Sequence[Rule], names: Sequence[str], ranks: Mapping[str, int]) -> list[Rule]:
    """The plan with every LoRA rule replaced by rules that give its modules these ranks; the others as they are.

    names: canonical names of all parameters (`adapted_modules`); ranks: of every adapted module. A rule is as wide as
    equal ranks allow ("language.layers[2:5].mlp"). What a LoRA rule covers beside linear modules stays frozen, as it
    was under LoRA.
    """
    assignment = assign([(rule.match, number) for number, rule in enumerate(rules)], names)
    number_of = {name: number for name, (_, number) in assignment.items()}
    result: list[Rule] = []
    for number, rule in enumerate(rules):
        if rule.train != "lora":
            result.append(rule)
            continue
        mine = {module: rank for module, rank in ranks.items() if number_of[f"{module}.weight"] == number}
        later = [name for name, owner in number_of.items() if owner > number]
        nodes = _joined([node for part in _children("", mine) for node in _uniform(part, mine, later)])
        for pattern, rank in nodes:
            ratio = _alpha_per_rank(rule)
            alpha = {} if ratio is None else {"alpha": ratio * rank ** _exponent(rule)}
            kept = rule.model_dump(exclude_unset=True, exclude={"match", "rank", "alpha"})
            result.append(Rule(match=pattern, rank=rank, **alpha, **kept))
        covered = [compile_pattern(pattern) for pattern, _ in nodes]
        rest = [n for n, owner in number_of.items() if owner == number and not any(c.match(n) for c in covered)]
        if rest:
            kept = rule.model_dump(exclude_unset=True, exclude=set(ONLY_LORA))
            result.append(Rule(train="frozen", **kept))
    return result


def _alpha_per_rank(rule: Rule) -> float | None:
    """LoRA's scale under a rule, which stays; None where alpha is the default."""
    if rule.alpha is None:
        return None
    rank = 16 if rule.rank is None else rule.rank
    if not isinstance(rank, int):
        raise VlmtuneError(
            f"ranks: rule {rule.match!r} has one alpha for several ranks, so there is no alpha per rank to keep; leave "
            "alpha out (2 x rank), or give one rank."
        )
    return rule.alpha / rank ** _exponent(rule)


def _exponent(rule: Rule) -> float:
    """Of the rank in LoRA's scale, alpha / rank or, rank-stabilised, alpha / sqrt(rank)."""
    return 0.5 if rule.options.get("use_rslora") else 1.0


def _children(prefix: str, modules: Mapping[str, int]) -> list[str]:
    """The names one component longer than `prefix` that lead to a module, in order."""
    start = f"{prefix}." if prefix else ""
    below = [name.removeprefix(start) for name in modules if name.startswith(start)]
    return list(dict.fromkeys(start + name.split(".")[0] for name in below))


def _uniform(prefix: str, modules: Mapping[str, int], later: Sequence[str]) -> list[tuple[str, int]]:
    """(name, rank) of the widest parts below `prefix` that have one rank and no parameter of a later rule."""
    below = {rank for name, rank in modules.items() if name == prefix or name.startswith(f"{prefix}.")}
    clashes = any(name.startswith(f"{prefix}.") for name in later)
    if prefix in modules:  # a bias of another rule stays with it
        return [(f"{prefix}.weight" if clashes else prefix, modules[prefix])]
    if len(below) == 1 and not clashes:
        return [(prefix, below.pop())]
    return [node for child in _children(prefix, modules) for node in _uniform(child, modules, later)]


def _joined(nodes: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Equal parts of neighbouring layers in one pattern, at the place of the first of them."""
    runs: list[tuple[str, list[int], str, int]] = []  # what stands before the layers, layers, what behind, rank
    for name, rank in nodes:
        before, number, behind = re.fullmatch(r"(.*?)(?:\.(\d+)((?:\..*)?))?", name).groups()
        if number is None:
            runs.append((name, [], "", rank))
            continue
        layer = int(number)
        for run in runs:
            if run == (before, run[1], behind, rank) and run[1] and run[1][-1] == layer - 1:
                run[1].append(layer)
                break
        else:
            runs.append((before, [layer], behind, rank))
    return [(f"{before}{_layers(layers)}{behind}", rank) for before, layers, behind, rank in runs]


def _layers(layers: list[int]) -> str:
    """As patterns write them: nothing, ".3" or "[3:5]"."""
    if len(layers) < 2:
        return "".join(f".{layer}" for layer in layers)
    return f"[{layers[0]}:{layers[-1] + 1}]"


def ranks_table(modules: Sequence[Module], result: Ranks) -> Table:
    """One row per kind of module: importance by layer as shades of one logarithmic scale, its share, ranks by layer."""
    table = Table(title="importance (Fisher trace) and rank, by layer", title_justify="left")
    for heading, justify in (
        ("modules", "left"), ("importance", "left"), ("mean trace", "right"), ("share", "right"), ("ranks", "left"),
        ("parameters", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)
    rows: dict[str, list[Module]] = {}
    for module in modules:
        rows.setdefault(group_of(module.name, "kind"), []).append(module)
    everything = sum(result.traces.values())
    for kind, members in rows.items():
        traces = [result.traces[member.name] for member in members]
        ranks = [result.ranks[member.name] for member in members]
        spent = sum(member.cost * rank for member, rank in zip(members, ranks, strict=True))
        table.add_row(
            kind, _heat(traces, result.traces.values()), f"{sum(traces) / len(traces):.3g}",
            f"{sum(traces) / everything:.1%}", _runs(ranks), f"{spent:,}",
        )  # fmt: skip
    table.add_section()
    spent = sum(module.cost * result.ranks[module.name] for module in modules)
    table.add_row("all", "", f"{everything / len(modules):.3g}", "", "", f"{spent:,}")
    return table


def _heat(traces: Sequence[float], of: Iterable[float]) -> str:
    """One shade per layer; each is a fifth of the way from the least to the greatest trace, in logarithms."""
    logs = [math.log(trace) for trace in of if trace > 0]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    shades = [0 if t == 0 else min(int((math.log(t) - low) / span * len(HEAT)), len(HEAT) - 1) for t in traces]
    return "".join(HEAT[shade] for shade in shades)


def _runs(ranks: Sequence[int]) -> str:
    """8 8 8 12 -> "8x3 12"."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and found[-1][0] == rank:
            found[-1][1] += 1
        else:
            found.append([rank, 1])
    return " ".join(f"{rank}x{times}" if times > 1 else str(rank) for rank, times in found)


def _write(path: Path, config: Config, result: Ranks, how: str) -> None:
    """The config as it was given, with the new plan, one rule per line. Never over a file that is there."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["plan"] = [rule.model_dump(mode="json", exclude_unset=True) for rule in result.rules]
    parse_config(tree, str(path))
    lines = [
        f"# Written by vlmtune ranks {__version__}: LoRA ranks that follow Fisher traces on {result.samples} training "
        "samples.",
        f"# {how}.",
    ]
    for key, value in tree.items():
        if key == "plan":
            lines.append("plan:")
            in_one_line = {"default_flow_style": True, "sort_keys": False, "width": math.inf, "allow_unicode": True}
            lines += [f"  - {yaml.safe_dump(rule, **in_one_line).strip()}" for rule in value]
        else:
            lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120).strip())
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise VlmtuneError(f"--output {path} cannot be written ({error.strerror}); name another file.") from error


def _require_budget(budget: int) -> None:
    if budget % MULTIPLE or not LOWEST <= budget <= HIGHEST:
        below = min(max(budget // MULTIPLE * MULTIPLE, LOWEST), HIGHEST)
        near = " or ".join(str(rank) for rank in sorted({below, min(max(below + MULTIPLE, LOWEST), HIGHEST)}))
        raise VlmtuneError(
            f"--budget {budget}: ranks are multiples of {MULTIPLE} from {LOWEST} to {HIGHEST}, and so is the "
            f"uniform rank whose parameters are spent; take {near}."
        )


def _require_room(modules: Sequence[Module], budget: int) -> None:
    for module in modules:
        if module.limit < budget:
            raise VlmtuneError(
                f"--budget {budget} exceeds the smaller dimension {module.limit} of {module.name}; take a smaller one."
            )
