"""Train the rows of new tokens and nothing else of an embedding or head (SPEC B11, D6).

The base stays a frozen parameter. Its new rows are stood in for by a small parameter of their own, float[n, D], so
the optimizer, weight decay, clipping and checkpoints never see an old row.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.vocabulary import NewTokens

NEW_ROWS = "new_rows"
"""Name of the small module inside its wrapper: `embed.new_rows.weight`, `lm_head.new_rows.weight`."""


class _WithNewRows(nn.Module):
    """`base_layer`: the whole module; `new_rows`: a module of its class that has the new rows only."""

    def __init__(self, base_layer: nn.Module, rows: slice, weight: nn.Parameter | None = None):
        """weight: float[n, D] shared with a tied module; None: a copy of the base's rows."""
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows
        # deepcopy takes what the memo holds for the parameters: same class, same scaling, no copy of the base's rows
        memo = {id(base_layer.weight): _copy(base_layer.weight, rows) if weight is None else weight}
        if getattr(base_layer, "bias", None) is not None:
            memo[id(base_layer.bias)] = _copy(base_layer.bias, rows)
        self.new_rows = copy.deepcopy(base_layer, memo)

    def merge(self) -> nn.Module:
        """Write the rows into the base and return it."""
        with torch.no_grad():
            for name, parameter in self.new_rows.named_parameters():
                self.base_layer.get_parameter(name)[self.rows] = parameter
        return self.base_layer


class EmbeddingWithNewRows(_WithNewRows):
    def __init__(self, base_layer: nn.Embedding, rows: slice):
        super().__init__(base_layer, rows)
        self.new_rows.num_embeddings = rows.stop - rows.start
        self.new_rows.padding_idx = None  # it counts in rows of the base

    def forward(self, ids: Tensor) -> Tensor:
        """int64[B, T] -> float[B, T, D]"""
        index = ids - self.rows.start
        is_new = (ids >= self.rows.start) & (ids < self.rows.stop)
        new = self.new_rows(index.clamp(0, self.new_rows.num_embeddings - 1))
        return torch.where(is_new.unsqueeze(-1), new, self.base_layer(ids))


class HeadWithNewRows(_WithNewRows):
    def __init__(self, base_layer: nn.Linear, rows: slice, weight: nn.Parameter | None = None):
        super().__init__(base_layer, rows, weight)
        self.new_rows.out_features = rows.stop - rows.start

    def forward(self, hidden: Tensor) -> Tensor:
        """float[…, D] -> logits float[…, V]"""
        logits = self.base_layer(hidden)
        logits[..., self.rows] = self.new_rows(hidden)
        return logits


def split_new_rows(model: nn.Module, parts: set[str], new: NewTokens) -> None:
    """Put the wrappers into `model` for `parts` ("embed", "lm_head"). A head tied to the embedding goes with it."""
    anatomy = anatomy_of(model)
    embed, head = model.get_submodule(anatomy.embed), model.get_submodule(anatomy.head)
    is_tied = head.weight is embed.weight
    shared = None
    if "embed" in parts:
        embedding = EmbeddingWithNewRows(embed, new.rows)
        shared = embedding.new_rows.weight if is_tied else None
        model.set_submodule(anatomy.embed, embedding)
    if shared is not None or "lm_head" in parts:
        model.set_submodule(anatomy.head, HeadWithNewRows(head, new.rows, shared))


def merge_new_rows(model: nn.Module) -> None:
    """Write trained rows into their bases and put the plain modules back; nothing to do for a model without."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _WithNewRows):
            model.set_submodule(name, module.merge())


def _copy(parameter: nn.Parameter, rows: slice) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[rows].clone())
