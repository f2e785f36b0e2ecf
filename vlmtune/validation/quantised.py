"""What shorter weights cost: an exported model in bf16, int8 and NF4 beside float32, on held-out samples (SPEC H3)."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vlmtune.adapt.plan import Policy
from vlmtune.adapt.storage import wanted_quantisation
from vlmtune.build import best_device, build_encoder
from vlmtune.checks.outcome import Quantised
from vlmtune.config import Config
from vlmtune.evaluate.answers import Answer, Scoring, answer
from vlmtune.evaluate.paired import paired_change
from vlmtune.models.load import load_model, load_processor, meta_model
from vlmtune.models.quantise import place, stored_bytes
from vlmtune.types import Sample, VlmtuneError

STORAGES = ("bf16", "int8", "nf4")
SAMPLES = 64  # spread over all held-out ones: every storage answers them again


def measure_storages(
    folder: Path, config: Config, groups: Mapping[str, Sequence[Sample]], scoring: Scoring
) -> tuple[list[Quantised], dict[str, str]]:
    """Each storage that can be measured, and the others with the reason: storage -> why.

    As it would be served: products in bfloat16; of int8 and NF4 the linear modules of the language model are quantised
    and the rest is bfloat16 (PAINS 36).
    """
    every = [sample for samples in groups.values() for sample in samples]
    if not every:
        return [], {storage: "nothing is held out to ask" for storage in STORAGES}
    chosen = [every[n * len(every) // min(SAMPLES, len(every))] for n in range(min(SAMPLES, len(every)))]
    full, full_bytes = _answered(folder, "fp32", config, chosen)
    found, missing = [], {}
    for storage in STORAGES:
        try:
            answers, size = _answered(folder, storage, config, chosen)
        except VlmtuneError as error:  # bitsandbytes is not installed, or this model has nothing to quantise
            missing[storage] = str(error).rstrip(".")
            continue
        loss = paired_change([one.loss for one in full], [one.loss for one in answers])
        score = paired_change(*([scoring.telling_score(one) for one in side] for side in (full, answers)))
        found.append(Quantised(storage, size, full_bytes, loss, score))
    return found, missing


def _answered(folder: Path, storage: str, config: Config, samples: Sequence[Sample]) -> tuple[list[Answer], int]:
    """The answers, and the bytes of the weights with what quantisation adds."""
    quantisation = None
    if storage in ("int8", "nf4"):
        rules = [("language", Policy("frozen", store=storage)), ("*", Policy("frozen"))]
        quantisation = wanted_quantisation(meta_model(str(folder)), rules, True, torch.bfloat16)
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    model = load_model(str(folder), dtype, quantisation=quantisation).eval()
    place(model, best_device())
    answers = answer(
        model, build_encoder(load_processor(str(folder)), model), {"": samples}, batch_size=config.evaluate.batch_size,
        max_new_tokens=config.evaluate.max_new_tokens, precision="fp32" if storage == "fp32" else "bf16",
    )  # fmt: skip
    size = sum(stored_bytes(model))
    del model
    gc.collect()
    return answers, size
