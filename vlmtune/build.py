"""From a config to the parts: the only place that unpacks it. Components take plain arguments."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmtune.adapt.plan import Policy
from vlmtune.adapt.storage import loads_in_file_format, wanted_quantisation
from vlmtune.build_course import policies
from vlmtune.build_loss import build_contrast, wanted_readouts
from vlmtune.config import EXPORTED, INHERIT, Config, Data, Source
from vlmtune.data.active import ActiveOrder
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.loader import Room, Steps, load_steps
from vlmtune.data.mixture import Mixture
from vlmtune.data.negatives import Form, NegativeSource, form_of_question
from vlmtune.data.prompts import length_remark, system_prompt
from vlmtune.data.resolution import set_pixel_limits
from vlmtune.data.sampling import Order, TemperatureOrder, every_task, grouped, pools_of
from vlmtune.data.sources import FileSource, PromptedSource, SampleSource, SceneSource
from vlmtune.data.survey import FittedSource, Survey, change_records, refuse_overlong, survey_source
from vlmtune.data.templates import set_template
from vlmtune.data.window import Window
from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.embedded import embedded_digest, write_embedded, write_untrained
from vlmtune.models.load import load_model, load_processor, meta_model, stored_dtype
from vlmtune.models.quantise import QUANTISED
from vlmtune.models.readouts import attach_readouts, readouts_of
from vlmtune.models.vocabulary import NewTokens, add_tokens
from vlmtune.optim.precision import resolve_precision
from vlmtune.schedule import Piecewise, combined, piecewise
from vlmtune.types import VlmtuneError

EMBEDDED, EMBEDDED_UNTRAINED = "embedded", "embedded_untrained"

# what may change between a run and its resume without changing a bit of the training
NOT_FINGERPRINTED = (
    ("run",),
    ("data", "workers"),
    ("data", "eval"),
    ("train", "threads"),
    ("train", "log_every"),
    ("train", "rank_timeout"),
    ("train", "shard"),
    ("checkpoint", "keep"),
    ("checkpoint", "background"),
    ("checkpoint", "patience"),
    ("stability",),  # says what to do about a failure, so that a run can go on after one
    ("evaluate", "gallery"),
    ("evaluate", "samples_every"),
    ("evaluate", "batch_size"),
    ("evaluate", "retain"),
)


def cache_folder() -> Path:
    """Where assembled model folders and indexes of data files are kept: $VLMTUNE_CACHE, else ~/.cache/vlmtune."""
    folder = Path(os.environ.get("VLMTUNE_CACHE", Path.home() / ".cache" / "vlmtune"))
    if folder.exists() and not folder.is_dir():
        raise VlmtuneError(f"{folder} is no folder, so nothing can be kept there; set VLMTUNE_CACHE to one.")
    return folder


def resolve_model(name: str) -> str:
    """A model name as the user wrote it -> a folder or hub name that plain `from_pretrained` loads."""
    if name == EMBEDDED:
        # named by content: a folder assembled from other weights can never be taken for this one
        tag = embedded_digest()[:12]
        return str(write_embedded(cache_folder() / f"embedded-{tag}"))
    if name == EMBEDDED_UNTRAINED:
        from vlmtune.data.corpus import text_corpus

        folder = Path(tempfile.mkdtemp(prefix="vlmtune-untrained-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return str(write_untrained(folder, text_corpus(), coordinates("bins").tokens()))
    if re.search(rf"/\d+_[^/]+/{EXPORTED}$", name) and not Path(name).exists():
        raise VlmtuneError(f"{name} is not there yet: train the stage that makes it first, or the whole chain.")
    return name


@dataclass(frozen=True)
class Base:
    """What a config starts from: the model in a folder (or hub), with the tokens that the config adds to it."""

    path: str
    model: torch.nn.Module
    processor: object
    new_tokens: NewTokens
    remark: str | None  # on the chat template


def load_base(config: Config, as_stored: bool = True, rules: list[tuple[str, Policy]] | None = None) -> Base:
    """The base of a config. as_stored: weights in the formats that the rules say; False: all of them in float32.

    rules: those that will be applied (None: the config's).
    """
    path = resolve_model(config.model)
    processor = load_processor(path)
    remark = set_template(processor, config.data.template)
    model = _load_as_stored(path, config, rules or policies(config)) if as_stored else load_model(path)
    wanted = _wanted_tokens(config.data, model, processor.tokenizer)
    new_tokens = add_tokens(model, processor.tokenizer, wanted)
    if readouts := wanted_readouts(config):
        attach_readouts(model, sorted(readouts), config.train.seed)
    return Base(path, model, processor, new_tokens, remark)


def _load_as_stored(path: str, config: Config, rules: list[tuple[str, Policy]]) -> torch.nn.Module:
    if not loads_in_file_format(rules):
        return load_model(path)
    precision = resolve_precision(config.train.precision, best_device())
    if precision == "fp32" and any(policy.store == "bf16" for _, policy in rules):
        raise VlmtuneError(
            "train.precision is fp32, but a rule says store: bf16; bfloat16 weights need train.precision: bf16."
        )
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    shorter = any(policy.store in QUANTISED for _, policy in rules)
    quantisation = wanted_quantisation(meta_model(path), rules, config.quantise.double, compute) if shorter else None
    return load_model(path, stored_dtype(path), quantisation=quantisation)


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wanted_tokens(data: Data, model: torch.nn.Module, tokenizer) -> list[str]:
    """The tokens of `data.coordinates` that the tokenizer lacks (if they may be added), then `data.new_tokens`."""
    if not data.add_coordinate_tokens:
        return data.new_tokens
    convention = coordinates(_convention(data.coordinates, model))
    if not convention.tokens():
        raise VlmtuneError(
            f"data.add_coordinate_tokens: coordinates {convention.name!r} have no tokens of their own; remove it, or "
            "set data.coordinates to one that has (bins1000, kosmos2, paligemma)."
        )
    vocabulary = tokenizer.get_vocab()
    return [token for token in convention.tokens() if token not in vocabulary] + data.new_tokens


def _convention(wish: str, model: torch.nn.Module) -> str:
    return anatomy_of(model).coordinates if wish == "auto" else wish


def build_encoder(processor, model: torch.nn.Module, wish: Data | None = None) -> Encoder:
    """wish: the data section of the config; None: the model as it is, without a limit of length."""
    reads_regions = readouts_of(model) is not None
    if wish is None:
        return Encoder(processor, coordinates(anatomy_of(model).coordinates), reads_regions=reads_regions)
    set_pixel_limits(processor.image_processor, wish.min_pixels, wish.max_pixels)
    convention = coordinates(_convention(wish.coordinates, model))
    return Encoder(processor, convention, wish.max_length, wish.max_pixels_per_sample, reads_regions)


def describe_new_tokens(base: Base) -> str:
    """One line: which tokens are new, and the rows they have."""
    texts, rows = base.new_tokens.texts, base.new_tokens.rows
    some = " ".join(texts) if len(texts) <= 3 else f"{texts[0]} … {texts[-1]}"
    size = base.model.get_input_embeddings().num_embeddings
    return (
        f"new tokens: {len(texts)} ({some}), rows {rows.start} to {rows.stop - 1} of {size}, each the mean of the rows "
        "of the tokens that were there"
    )


@dataclass(frozen=True)
class Weighted:
    """A source and its weight in the mixture, over progress."""

    source: SampleSource
    weight: Piecewise


def build_train(wish: Data) -> list[Weighted]:
    """Every source of data.train, each followed by the negatives that are made of it."""
    return [member for source in wish.train for member in _with_negatives(source, wish)]


def build_source(source: Source, wish: Data) -> SampleSource:
    """The samples of a source themselves. wish: the data section that it stands in."""
    return _prompted(_build_plain(source), source, wish)


def _prompted(plain: SampleSource, source: Source, wish: Data) -> SampleSource:
    prompt = wish.system if source.system == INHERIT else source.system
    return plain if prompt is None else PromptedSource(plain, system_prompt(prompt))


def _with_negatives(source: Source, wish: Data) -> list[Weighted]:
    plain, weight = _build_plain(source), piecewise(source.weight)
    if source.negatives is None:
        return [Weighted(_prompted(plain, source, wish), weight)]
    form = form_of_question(plain[0])
    shares = negative_shares(source, form)
    members = []
    for kind, share in shares.items():
        asked = source.negatives
        made = plain if kind == "samples" else NegativeSource(plain, kind, form, asked.verify, asked.what)
        if max(share.values) > 0:
            members.append(Weighted(_prompted(made, source, wish), combined(float.__mul__, weight, share)))
    return members


def negative_shares(source: Source, form: Form) -> dict[str, Piecewise]:
    """`samples` (the positives) and every kind of negative -> its share of what is drawn from this source.

    Of samples about regions, as many ask whether a name is there where it is ("confirmed") as where it is not; they
    count as positives. Raises VlmtuneError where that leaves no room for the samples themselves.
    """
    wish, is_detection = source.negatives, form == "detection"
    ratio = piecewise((3.0 if is_detection else 1.0) if wish.ratio is None else wish.ratio)
    background = (0.0 if is_detection else 1.0) if wish.background is None else wish.background
    parts = (ratio, piecewise(wish.hard), piecewise(wish.random), piecewise(background))

    def share(of: str) -> Piecewise:
        def at(ratio: float, hard: float, random: float, background: float) -> float:
            kinds = {"hard": hard, "random": random, "background": background}
            if ratio > 0 and sum(kinds.values()) == 0:
                raise VlmtuneError(f"negatives of {_name_of(source)}: hard, random and background are all 0 at a time.")
            negatives = ratio / (1.0 + ratio)
            now = {kind: negatives * part / (sum(kinds.values()) or 1.0) for kind, part in kinds.items()}
            now["confirmed"] = 0.0 if is_detection else now["hard"] + now["random"]
            now["samples"] = 1.0 - negatives - now["confirmed"]
            if now["samples"] < -1e-9:
                raise VlmtuneError(
                    f'negatives of {_name_of(source)}: with ratio {ratio:g}, questions answered "no" and as many '
                    'answered "yes" leave no room for the samples; lower ratio, or raise background.'
                )
            return max(now[of], 0.0)

        return combined(at, *parts)

    return {of: share(of) for of in ("samples", "hard", "random", "background", "confirmed")}


def _name_of(source: Source) -> str:
    return source.path or f"scenes {source.scenes} {source.task}"


def _build_plain(source: Source) -> SampleSource:
    if source.scenes is not None:
        return SceneSource(source.scenes, source.task, source.split, source.limit, source.turns, source.start)
    root = Path(source.image_root) if source.image_root else None
    if root is not None and not root.is_dir():
        raise VlmtuneError(f"image_root {root} of {source.path} does not exist.")
    return FileSource(source.path, root, source.task, source.limit, source.split, cache_folder() / "indexes")


def source_names(sources: Sequence[SampleSource]) -> list[str]:
    """A name of its own for every source of a mixture: files in different folders may be called the same."""
    names: list[str] = []
    for source in sources:
        same = sum(earlier.name == source.name for earlier in sources[: len(names)])
        names.append(f"{source.name} ({same + 1})" if same else source.name)
    return names


def describe_sources(sources: Sequence[SampleSource], groups: dict[str, list[SampleSource]]) -> list[str]:
    """One line for every source: the name, and the format that was seen in it."""
    lines = [f"train {name}: {source.format}" for name, source in zip(source_names(sources), sources, strict=True)]
    for group, held_out in groups.items():
        lines += [f"eval {group}, {name}: {s.format}" for name, s in zip(source_names(held_out), held_out, strict=True)]
    return lines


def remarks_on_prompts(config: Config, encoder: Encoder) -> list[str]:
    """One line for every system prompt of an unusual length. Raises VlmtuneError where the model takes none."""
    sources = [*config.data.train, *(source for group in config.data.eval.values() for source in group)]
    wishes = {config.data.system if source.system == INHERIT else source.system for source in sources} - {None}
    if wishes and not encoder.takes_system:
        raise VlmtuneError(
            "data.system: the chat template has no system role; remove it, or write the rules into the questions."
        )
    prompts = [system_prompt(wish) for wish in sorted(wishes)]
    remarks = [length_remark(prompt, encoder.text_length(prompt.text)) for prompt in prompts]
    return [remark for remark in remarks if remark]


def count_samples(order: Order, sources: Sequence[SampleSource]) -> Callable[[int], dict[str, int]]:
    """samples of the run so far -> source name -> how many of them came from it. A pure function, so resumes agree."""
    names = source_names(sources)
    return lambda samples: dict(zip(names, order.counts(samples), strict=True))


def build_eval_groups(config: Config) -> dict[str, list[SampleSource]]:
    wish = config.data
    groups = {
        name: [member.source for source in sources for member in _with_negatives(source, wish)]
        for name, sources in wish.eval.items()
    }
    for name, sources in groups.items():
        for source in sources:
            if source.size is None:
                raise VlmtuneError(f"data.eval.{name}: {source.name} has no end; give it a limit.")
    return groups


@dataclass(frozen=True)
class FittedData:
    """Sources after the context window. surveys: (name, survey) of every source that could be counted; of_train: of
    every training source, None where it could not be."""

    sources: list[SampleSource]
    groups: dict[str, list[SampleSource]]
    surveys: list[tuple[str, Survey]]
    of_train: list[Survey | None]


def fit_data(
    config: Config,
    encoder: Encoder,
    sources: Sequence[SampleSource],
    groups: dict[str, list[SampleSource]],
    progress: Callable[[str, int, int], None] = lambda name, done, rows: None,
) -> FittedData:
    """Count every sample of every file; drop or trim what is too long, as data.on_overlong says, and leave out what
    cannot be used where data.on_bad_row says so.

    progress: is told name, rows done and rows of the source being counted. Scenes are not counted: the encoder checks
    them one by one. Raises VlmtuneError for overlong samples (on_overlong: error), and rows that cannot be read.
    """
    wish = config.data
    drop_bad = wish.on_bad_row == "drop"
    if wish.max_length is None and not drop_bad:
        return FittedData(list(sources), groups, [], [None] * len(sources))
    window = None if wish.max_length is None else Window(wish.max_length, wish.reply_reserve)
    surveys: list[tuple[str, Survey]] = []

    def fitted(source: SampleSource, name: str) -> SampleSource:
        if source.identity is None:
            return source
        survey = survey_source(
            source, encoder, window, cache_folder() / "lengths", wish.workers,
            lambda done: progress(name, done, source.size), drop_bad,
        )  # fmt: skip
        surveys.append((name, survey))
        as_it_is = wish.on_overlong == "error" and not survey.bad
        return source if as_it_is else FittedSource(source, survey, encoder, window, wish.on_overlong)

    names = source_names(sources)
    kept = [fitted(*pair) for pair in zip(sources, names, strict=True)]
    counted = dict(surveys)
    held_out = {
        group: [fitted(source, f"{group}/{name}") for source, name in zip(members, source_names(members), strict=True)]
        for group, members in groups.items()
    }
    if wish.on_overlong == "error":
        refuse_overlong(surveys, wish.max_length)
    return FittedData(kept, held_out, surveys, [counted.get(name) for name in names])


def describe_surveys(config: Config, fitted: FittedData) -> list[str]:
    """One line for every source that has rows that cannot be used, and one for samples above data.max_length."""
    lines = []
    for name, survey in fitted.surveys:
        lines += [f"{name}: {survey.bad_sentence()}"] if survey.bad else []
        lines += [f"{name}: {survey.sentence(config.data.max_length)}"] if survey.overlong else []
    return lines


def changes(config: Config, fitted: FittedData) -> dict[str, list[dict]]:
    """What was left out and what the context window did, for dropped.jsonl and changed.jsonl of a run."""
    rows: dict[str, list[dict]] = {"dropped.jsonl": [], "changed.jsonl": []}
    for name, survey in fitted.surveys:
        for file, records in zip(rows, change_records(name, survey, config.data.on_overlong), strict=True):
            rows[file] += records
    return rows


def build_steps(
    config: Config,
    sources: list[SampleSource],
    weights: Sequence[Piecewise],
    encoder: Encoder,
    steps: int,
) -> Steps:
    order = build_order(config, sources, weights, steps)
    wish = config.train
    room = Room(wish.samples_per_forward, wish.micro_batch_tokens)
    return Steps(
        sources, order, encoder, wish.batch_size, room, contrast=build_contrast(config),
        numbered=isinstance(order, ActiveOrder),
    )  # fmt: skip


def build_order(config: Config, sources: Sequence[SampleSource], weights: Sequence[Piecewise], steps: int) -> Order:
    """Which sample is number k, as data.sampling says. weights: of the sources, where they decide."""
    wish, batch, seed = config.data.sampling, config.train.batch_size, config.train.seed
    sizes = [source.size for source in sources]
    if wish.by == "weights":
        return Mixture(sizes, weights, steps * batch, seed)
    if wish.by == "active":
        return _active_order(config, sources, steps)
    pools = pools_of([source.tasks() for source in sources], sizes)
    if wish.by == "every_task":
        return every_task(pools, steps, batch, seed)
    if wish.by == "grouped":
        return grouped(pools, steps, batch, seed)
    temperature = 1.0 if wish.temperature is None else wish.temperature
    return TemperatureOrder(pools, steps, batch, seed, temperature, wish.every or 50)


def _active_order(config: Config, sources: Sequence[SampleSource], steps: int) -> ActiveOrder:
    endless = [source.name for source in sources if source.size is None]
    if endless:
        raise VlmtuneError(
            f"data.sampling active: {', '.join(endless)} has no end, so no sample of it comes twice; give it a limit, "
            "or sample by temperature, which follows the losses of tasks."
        )
    wish = config.data.sampling
    return ActiveOrder(
        [source.tasks() for source in sources], steps, config.train.batch_size, config.train.seed,
        wish.measure or "loss", wish.every or 50, wish.floor or 0.5,
    )  # fmt: skip


def step_loader(steps: Steps, workers: int):
    return lambda start, stop: load_steps(steps, start, stop, workers)


def fingerprint_tree(config: Config) -> dict:
    """The config without what may change between a run and its resume."""
    tree = config.model_dump(mode="json")
    for *parents, leaf in NOT_FINGERPRINTED:
        node = tree
        for step in parents:
            node = node[step]
        node.pop(leaf)
    tree["data"]["vision_cache"] = tree["data"]["vision_cache"] is not None  # how large it may be is nobody's business
    return tree


__all__ = [
    "FittedData", "build_encoder", "build_eval_groups", "build_source", "build_steps", "build_train", "cache_folder",
    "changes", "count_samples", "describe_new_tokens", "describe_sources", "describe_surveys", "fingerprint_tree",
    "fit_data", "load_base", "load_model",
    "remarks_on_prompts", "resolve_model", "source_names", "step_loader",
]  # fmt: skip
