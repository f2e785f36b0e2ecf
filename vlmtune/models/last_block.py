"""The feed-forward part of the last block, computed only at positions whose states somebody reads.

Behind the last attention every position is on its own: what the loss does not read need not be computed, nor run
backward. In a block this part is most of the work, and most positions of an image conversation carry no loss.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmtune.models.anatomy import anatomy_of

READ_ROWS = "read_rows"
"""Argument of the model's forward: int64[N], the positions of its only row that are read. It reaches every block, also
when a checkpointed one runs again in the backward. Without it nothing changes."""


def compute_only_what_is_read(model: PreTrainedModel) -> None:
    """Let the last block heed READ_ROWS. `compute_everything` undoes it."""
    block = _last_block(model)
    if block is not None and not hasattr(block, "reading"):
        block.reading = _Reading()
        block.reading.watch(block)


def compute_everything(model: PreTrainedModel) -> None:
    """Undo `compute_only_what_is_read`."""
    block = _last_block(model)
    if block is not None and hasattr(block, "reading"):
        block.reading.stop()
        del block.reading


def _last_block(model: PreTrainedModel) -> nn.Module | None:
    """None where its feed-forward part is not one of dense layers (a mixture of experts looks at all tokens)."""
    block = list(model.get_submodule(anatomy_of(model).language_layers))[-1]
    feed_forward = getattr(block, "mlp", None)
    inner = getattr(feed_forward, "base_layer", feed_forward)
    return block if hasattr(inner, "down_proj") else None


class _Reading:
    """Hooks of one block. They hang on its parts and not on itself: of a checkpointed block only those run again."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.length = 0
        self._handles: list[Any] = []

    def watch(self, block: nn.Module) -> None:
        self._handles = [
            block.self_attn.register_forward_pre_hook(self.hear, with_kwargs=True),
            block.mlp.register_forward_pre_hook(self.take),
            block.mlp.register_forward_hook(self.put_back),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def hear(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows = kwargs.get(READ_ROWS)

    def take(self, feed_forward: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """float[1, N, D] of float[1, T, D]."""
        if self.rows is None:
            return None
        self.length = args[0].shape[1]
        return args[0][:, self.rows], *args[1:]

    def put_back(self, feed_forward: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """float[1, T, D], zero where nobody reads. What was heard is forgotten: a call of the part alone is whole."""
        rows, self.rows = self.rows, None
        if rows is None:
            return None
        return output.new_zeros(1, self.length, output.shape[-1]).index_copy_(1, rows, output)
