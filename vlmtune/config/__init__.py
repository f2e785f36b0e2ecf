"""The configuration: small strict models, every complaint at once, the same objects as the Python API.

A file is YAML; `key=value` on the command line overrides one leaf (`optim.lr=1e-4`, `plan.2.rank=8`).
"""

from vlmtune.config.course import Checkpoint, Evaluate, Optim, Stability, Train
from vlmtune.config.data import INHERIT, Data, Negatives, Sampling, Source
from vlmtune.config.learning_rate import LrSegment
from vlmtune.config.load import (
    config_schema,
    differing_keys,
    dump_config,
    load_config,
    load_run_config,
    parse_config,
    recipe_names,
)
from vlmtune.config.loss import Balance, BoxTerm, ConsistencyTerm, ExposureTerm, Loss, ReferringTerm
from vlmtune.config.plan import Quantise, RankKind, Rule
from vlmtune.config.stages import EXPORTED, Chain, Stage, dump_chain, stage_folder
from vlmtune.config.values import Strict
from vlmtune.config.whole import Config

__all__ = [
    "EXPORTED", "INHERIT", "Balance", "BoxTerm", "Chain", "Checkpoint", "Config", "ConsistencyTerm", "Data", "Evaluate",
    "ExposureTerm", "Loss", "LrSegment", "Negatives", "Optim", "Quantise", "RankKind", "ReferringTerm", "Rule",
    "Sampling", "Source",
    "Stability", "Stage", "Strict", "Train", "config_schema", "differing_keys", "dump_chain", "dump_config",
    "load_config", "load_run_config", "parse_config", "recipe_names", "stage_folder",
]  # fmt: skip
