"""From the loss section of a config to the objective, and the read-outs it needs (`build.py` does the rest)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmtune.adapt.plan import Plan
from vlmtune.config import BoxTerm, Config
from vlmtune.data.contrast import Contrast
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import BinTokens
from vlmtune.data.sources import SampleSource
from vlmtune.losses.balance import Balance, Fixed, GradNorm, InitialLosses, InverseInitial, Uncertainty
from vlmtune.losses.boxes import BoxLoss
from vlmtune.losses.consistency import Consistency
from vlmtune.losses.exposure import Exposure, ExposureRate
from vlmtune.losses.objective import Objective, Term
from vlmtune.losses.referring import HeadBoxLoss, ReferringLoss
from vlmtune.losses.weights import TokenWeights
from vlmtune.schedule import piecewise
from vlmtune.types import VlmtuneError

SHARED_PARTS = ("vision", "projector", "language")  # in the order of the forward


def wanted_readouts(config: Config) -> set[str]:
    """Names of the heads that the losses of this config read."""
    wish = config.loss
    heads = {"box"} if wish.box is not None and wish.box.read == "head" else set()
    return heads if wish.referring is None else heads | _referring(config).heads


def build_objective(config: Config, sources: Sequence[SampleSource], plan: Plan, encoder: Encoder) -> Objective:
    """The loss section of the config, for these sources (their tasks), this plan (what tasks share) and this encoder
    (how boxes are written)."""
    wish = config.loss.balance
    weights = TokenWeights({kind: piecewise(weight) for kind, weight in config.loss.weights.items()})
    further = _terms(config, encoder), _exposure(config, encoder), _consistency(config)
    if wish.by == "tokens":
        return Objective(weights, None, *further)
    tasks = sorted(set().union(*(source.tasks() for source in sources)))
    for name in ("weights", "initial"):
        _require_same_tasks(f"loss.balance.{name}", getattr(wish, name), tasks)
    initial = InitialLosses(tasks, wish.initial_steps or 10, wish.initial)
    match wish.by:
        case "fixed":
            balance: Balance = Fixed(wish.weights)
        case "inverse":
            balance = InverseInitial(initial)
        case "uncertainty":
            balance = Uncertainty(tasks)
        case "gradnorm":
            balance = GradNorm(initial, last_shared_block(plan), 1.5 if wish.alpha is None else wish.alpha)
    return Objective(weights, balance, *further)


def _terms(config: Config, encoder: Encoder) -> list[Term]:
    box, referring = config.loss.box, config.loss.referring
    terms: list[Term] = []
    if box is not None:
        terms.append(HeadBoxLoss(box.l1, box.giou) if box.read == "head" else _token_box_loss(box, encoder))
    return terms if referring is None else [*terms, _referring(config)]


def _referring(config: Config) -> ReferringLoss:
    wish = config.loss.referring
    return ReferringLoss(wish.mask, wish.box, wish.consistency)


def _token_box_loss(wish: BoxTerm, encoder: Encoder) -> BoxLoss:
    convention = encoder.coordinates
    if not isinstance(convention, BinTokens):
        raise VlmtuneError(
            f"loss.box reads boxes from coordinate tokens, but this model writes them as {convention.name!r}; set "
            "read: head, or data.coordinates to bins or bins1000 (with data.add_coordinate_tokens where they are new)."
        )
    token_id = encoder.tokenizer.convert_tokens_to_ids
    values = {token_id(token): value for token, value in convention.numbers().items()}
    return BoxLoss(values, token_id("<box>"), token_id("</box>"), wish.l1, wish.giou)


DEFAULT_K = {"linear": 0.0, "exponential": 0.01, "inverse_sigmoid": 10.0}


def _exposure(config: Config, encoder: Encoder) -> Exposure | None:
    wish = config.loss.exposure
    if wish is None:
        return None
    k = DEFAULT_K[wish.decay] if wish.k is None else wish.k
    rate = ExposureRate(wish.decay, wish.rate, wish.start, k)
    return Exposure(rate, encoder.stop_token_ids() | encoder.image_token_ids)


DEFAULT_MARGIN = 0.5


def _consistency(config: Config) -> Consistency | None:
    wish = config.loss.consistency
    if wish is None:
        return None
    margin = DEFAULT_MARGIN if wish.margin is None else wish.margin
    return Consistency(wish.by, piecewise(wish.weight), margin)


def build_contrast(config: Config) -> Contrast | None:
    """What the consistency loss reads besides the samples. Raises VlmtuneError for steps of one sample, which have no
    other picture."""
    wish = config.loss.consistency
    if wish is None:
        return None
    if wish.other == "another" and config.train.batch_size == 1:
        raise VlmtuneError(
            "loss.consistency reads the picture of another sample of the step, but train.batch_size is 1; raise it, or "
            "set loss.consistency.other to blank."
        )
    return Contrast(wish.other, None if wish.tasks is None else frozenset(wish.tasks), piecewise(wish.weight))


def _require_same_tasks(key: str, named: dict[str, float] | None, tasks: Sequence[str]) -> None:
    if named is None:
        return
    unknown, missing = sorted(set(named) - set(tasks)), sorted(set(tasks) - set(named))
    if unknown:
        raise VlmtuneError(
            f"{key}: no training sample has the task {unknown[0]!r}; tasks of data.train: {', '.join(tasks)}."
        )
    if missing:
        raise VlmtuneError(f"{key} has no number for the task {', '.join(missing)} of data.train; add it.")


def last_shared_block(plan: Plan) -> list[torch.nn.Parameter]:
    """What trains in the last block that every task passes: the highest language layer with a trainable parameter (its
    adapters too), else the projector, else the highest vision layer. Raises VlmtuneError where none of them trains."""
    layers: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
    for name, parameter in plan.parameters.items():
        part, *rest = name.split(".")
        if part in SHARED_PARTS:
            layer = int(rest[1]) if rest[0] == "layers" else -1
            layers.setdefault((SHARED_PARTS.index(part), layer), []).append(parameter)
    if not layers:
        raise VlmtuneError(
            "loss.balance gradnorm compares gradients where the tasks meet, but the plan trains neither the language "
            "model nor projector nor vision; train one, or balance by uncertainty."
        )
    return layers[max(layers)]
