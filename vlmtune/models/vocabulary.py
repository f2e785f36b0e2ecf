"""New tokens: into the tokenizer, and as rows into the embedding and the head (SPEC A8, B11, D6).

A new row starts as the mean of the rows of the tokens that were there. Nothing is drawn at random, so a run and its
resume, its evaluation and its export all grow the same base into the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from vlmtune.types import VlmtuneError


@dataclass(frozen=True)
class NewTokens:
    """Tokens that the base model lacks: `texts[n]` has row `first + n` of the embedding and of the head."""

    first: int = 0
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self))


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> NewTokens:
    """Add ordinary (not special) tokens to `tokenizer` and rows for them to `model`, both in place.

    Embedding and head, tied or not, grow by what is needed and never shrink: rows to spare (a padded vocabulary) are
    used first. A new row, of the head's bias too, is the mean of the rows of all tokens the tokenizer had.
    Raises VlmtuneError for a text that is a token already, comes twice, overlaps another added token, or that this
    tokenizer does not keep whole.
    """
    if not texts:
        return NewTokens()
    vocabulary = tokenizer.get_vocab()
    _require_new(texts, vocabulary, [token.content for token in tokenizer.added_tokens_decoder.values()])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    ids = tokenizer.convert_tokens_to_ids(list(texts))
    _require_whole(texts, ids, tokenizer)
    new = NewTokens(ids[0], tuple(texts))
    _add_rows(model, new, sorted(set(vocabulary.values())))
    return new


def _require_new(texts: Sequence[str], vocabulary: dict[str, int], added: list[str]) -> None:
    for position, text in enumerate(texts):
        if not text or any(character.isspace() for character in text):
            raise VlmtuneError(f"new token {text!r} is empty or holds white space; write it without.")
        if text in texts[:position]:
            raise VlmtuneError(f"new token {text!r} is asked for twice; remove one.")
        if text in vocabulary:
            raise VlmtuneError(f"new token {text!r} is in the tokenizer already (id {vocabulary[text]}); remove it.")
    known = [*added, *texts]
    for text in texts:
        other = next((other for other in known if other != text and (text in other or other in text)), None)
        if other is not None:
            inner, outer = sorted((text, other), key=len)
            raise VlmtuneError(
                f"new token {text!r}: {inner!r} is part of the added token {outer!r}, so which of them a text holds "
                "would depend on what stands around it; choose another spelling."
            )


def _require_whole(texts: Sequence[str], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Each new token is one id of its own, in order, wherever it stands, and is decoded as it was written."""
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise VlmtuneError("the tokenizer gave the new tokens ids that do not follow each other; use another base.")
    for text, index in zip(texts, ids, strict=True):
        inside = tokenizer(f"a{text}a", add_special_tokens=False, verbose=False)["input_ids"]
        decoded = tokenizer.decode([index], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        if inside.count(index) != 1 or decoded != text:
            raise VlmtuneError(
                f"the tokenizer does not keep the new token {text!r} whole (it comes back as {decoded!r}); "
                "spell it in plain ASCII."
            )


def _add_rows(model: PreTrainedModel, new: NewTokens, known: list[int]) -> None:
    """known: ids of the tokens whose rows are averaged."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embed.weight
    embed.weight = _with_rows(embed.weight, new.rows, known)
    head.weight = embed.weight if is_tied else _with_rows(head.weight, new.rows, known)
    if head.bias is not None:
        head.bias = _with_rows(head.bias, new.rows, known)
    embed.num_embeddings, head.out_features = len(embed.weight), len(head.weight)
    model.config.get_text_config().vocab_size = model.vocab_size = len(embed.weight)


def _with_rows(parameter: nn.Parameter, rows: slice, known: list[int]) -> nn.Parameter:
    """float[V, D] (a bias: float[V]) -> float[max(V, rows.stop), D] with the mean of rows `known` in `rows`."""
    old: Tensor = parameter.detach()
    missing = max(0, rows.stop - len(old))
    grown = torch.cat([old, old.new_zeros(missing, *old.shape[1:])])
    wide = torch.promote_types(old.dtype, torch.float32)
    grown[rows] = old[[index for index in known if index < len(old)]].mean(0, dtype=wide).to(old.dtype)
    return nn.Parameter(grown, parameter.requires_grad)


def embedding_rows(model: nn.Module) -> int:
    """Rows of the embedding, those of new tokens included."""
    table = model.get_input_embeddings()
    return len(getattr(table, "base_layer", table).weight)
