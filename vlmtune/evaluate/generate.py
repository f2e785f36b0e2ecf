"""Replies for a list of samples: greedy, in left-padded batches, through the training encoder (PAINS 10, 44)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.types import Encoded, Sample


@torch.inference_mode()
def generate_replies(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[str]:
    """One reply per prompt, in order.

    Prompts are sorted by length into batches so that little padding is made; a batch gives the same replies as one
    sample at a time, because padding is on the left and masked.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=encoder.pad_token_id,
        eos_token_id=sorted(encoder.stop_token_ids()),
        # a generated image placeholder would have no features behind it and break the next forward
        suppress_tokens=sorted(encoder.image_token_ids),
    )
    replies: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([prompts[i] for i in chosen], encoder.pad_token_id, side="left").to(model.device)
        out = model.generate(**batch.inputs, generation_config=config)
        width = batch.inputs["input_ids"].shape[1]
        for i, ids in zip(chosen, out[:, width:].tolist(), strict=True):
            replies[i] = encoder.decode(ids)
    return replies


def reply(model: PreTrainedModel, encoder: Encoder, sample: Sample, max_new_tokens: int) -> str:
    """The reply to one conversation (a trailing assistant turn is ignored)."""
    return generate_replies(model, encoder, [encoder.encode_prompt(sample)], max_new_tokens, 1)[0]
