"""Replies for a list of samples: greedy, in left-padded batches, through the training encoder (PAINS 10, 44)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.models.merging import model_inputs
from vlmtune.shards import forward_only
from vlmtune.types import Encoded, Sample


@dataclass(frozen=True)
class Generated:
    """ids: the new tokens, the one that ended the reply included; ended: whether one did, before the limit."""

    ids: list[int]
    ended: bool


def generate(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[Generated]:
    """New tokens of each prompt, in order.

    Prompts are sorted by length into batches so that little padding is made; a batch gives the same replies as one
    sample at a time, because padding is on the left and masked.
    """
    config = generation_config(encoder, max_new_tokens)
    found: list[Generated] = [Generated([], False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    stops = encoder.stop_token_ids()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([prompts[i] for i in chosen], encoder.pad_token_id, side="left").to(model.device)
        with forward_only(model):
            out = model.generate(**model_inputs(model, batch), generation_config=config)
        width = batch.inputs["input_ids"].shape[1]
        for i, ids in zip(chosen, out[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in stops), None)
            found[i] = Generated(ids if end is None else ids[: end + 1], end is not None)
    return found


def generation_config(encoder: Encoder, max_new_tokens: int, min_new_tokens: int = 0, **further) -> GenerationConfig:
    """Greedy, up to the end of a reply. further: fields of transformers' own."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        do_sample=False,
        pad_token_id=encoder.pad_token_id,
        eos_token_id=sorted(encoder.stop_token_ids()),
        # a generated image placeholder would have no features behind it and break the next forward
        suppress_tokens=sorted(encoder.image_token_ids),
        **further,
    )


def generate_replies(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[str]:
    """One reply per prompt, in order."""
    made = generate(model, encoder, prompts, max_new_tokens, batch_size)
    return [encoder.decode(generated.ids) for generated in made]


def reply(model: PreTrainedModel, encoder: Encoder, sample: Sample, max_new_tokens: int) -> str:
    """The reply to one conversation (a trailing assistant turn is ignored)."""
    return generate_replies(model, encoder, [encoder.encode_prompt(sample)], max_new_tokens, 1)[0]
