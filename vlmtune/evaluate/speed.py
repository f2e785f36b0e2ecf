"""How fast one reply comes: until its first token, and for each one after it (SPEC H3)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.evaluate.generate import generation_config
from vlmtune.models.merging import model_inputs
from vlmtune.optim.precision import Precision, autocast
from vlmtune.types import Sample

TOKENS = 32  # after the first
REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Medians over prompts, one at a time. prepare: seconds to decode the image and encode the prompt; first_token:
    seconds from there until the first token; tokens_per_second: of those after it; prompt_tokens: median length."""

    prepare: float
    first_token: float
    tokens_per_second: float
    prompt_tokens: int
    prompts: int


def measure_speed(model: torch.nn.Module, encoder: Encoder, samples: Sequence[Sample], precision: Precision) -> Speed:
    """On the first REPEATS samples, after one that does not count. No token ends a reply before its time."""
    chosen = [samples[n % len(samples)] for n in range(min(REPEATS, len(samples)))]
    device = next(model.parameters()).device
    timed = []
    with torch.inference_mode(), autocast(precision, device):
        for sample in [chosen[0], *chosen]:
            began = _now(device)
            prompt = encoder.encode_prompt(sample)
            batch = collate([prompt], encoder.pad_token_id, side="left").to(device)
            ready = _now(device)
            model.generate(**model_inputs(model, batch), generation_config=generation_config(encoder, 1, 1))
            first = _now(device)
            longer = generation_config(encoder, 1 + TOKENS, 1 + TOKENS)
            model.generate(**model_inputs(model, batch), generation_config=longer)
            last = _now(device)
            decoding = max((last - first) - (first - ready), 1e-9)
            timed.append((ready - began, first - ready, TOKENS / decoding, len(prompt)))
    prepare, first_token, rate, length = (statistics.median(column) for column in zip(*timed[1:], strict=True))
    return Speed(prepare, first_token, rate, int(length), len(chosen))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
