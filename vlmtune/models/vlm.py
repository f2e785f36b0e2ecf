"""A Hugging Face vision-language model as the training step sees it: batch in, supervised hidden states out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.batchnorm import keeps_statistics
from vlmtune.models.last_block import READ_ROWS
from vlmtune.models.merging import model_inputs
from vlmtune.models.packing import PackedRow, is_packing, pack, packed_forward
from vlmtune.models.trunk import CachedVision
from vlmtune.shards import fold, run_body
from vlmtune.types import Batch, VlmtuneError, supervised_mask, token_weights


@dataclass
class Supervised:
    """The positions of a micro-batch that carry loss (N of them, in row-major order).

    hidden float[N, D]: the state that predicts the token; targets int64[N]: the token; kinds int8[N]; row int64[N]:
    which sample of the micro-batch it belongs to; weights float32[N]: above 0; states: all of them, as the model gave
    them, None where only those of loss were asked for; packed: how they lie, where padding was taken out.
    """

    hidden: Tensor
    targets: Tensor
    kinds: Tensor
    row: Tensor
    weights: Tensor
    states: Tensor | None = None
    packed: PackedRow | None = None

    @property
    def sequence(self) -> Tensor:
        """float[B, T, D]: all states, for read-outs."""
        return self.states if self.packed is None else self.packed.padded(self.states)


class VLM(nn.Module):
    """Wraps a `*ForConditionalGeneration` model; the language head is left to the loss (SPEC B1).

    vision: makes inputs of the images of a batch that has them in place of pixels.
    """

    def __init__(self, model: PreTrainedModel, vision: CachedVision | None = None):
        super().__init__()
        text = model.config.get_text_config()
        if model.config.model_type == "paligemma" and getattr(text, "final_logit_softcapping", None) is not None:
            raise VlmtuneError(
                "this PaliGemma caps its logits (final_logit_softcapping, PaliGemma 2), which the loss does not do; "
                "use a PaliGemma 1 model."
            )
        self.model, self.vision = model, vision

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(
        self,
        batch: Batch,
        kind_weights: Tensor | None = None,
        read: Tensor | None = None,
        every_state: bool = True,
    ) -> Supervised:
        """Run the body (vision tower, projector, language model) once; no logits are made.

        kind_weights: float32[len(Kind)] of `TokenWeights.at`; None: 1 for every supervised kind.
        read: int64[B, T], ids to read in place of the batch's, which stay what is predicted (`losses.exposure`).
        every_state: False where nobody asks for `states`: then those without loss need not be finished.
        """
        inputs = batch.inputs if read is None else batch.inputs | {"input_ids": read}
        if batch.images:
            inputs = inputs | self.vision.inputs(batch.images)
        inputs = model_inputs(self.model, batch, inputs)
        packed = pack(self.model, inputs) if is_packing(self.model) else None
        kinds = batch.kinds[:, 1:]
        weights = supervised_mask(kinds).float() if kind_weights is None else token_weights(kinds, kind_weights)
        rows, at = (weights > 0).nonzero(as_tuple=True)  # on a GPU the host waits here, once
        places = None if packed is None else packed.positions()[rows, at]
        if packed is not None and not every_state:
            packed.inputs[READ_ROWS] = places
        states = self._body(inputs, packed)
        return Supervised(
            hidden=states[rows, at] if packed is None else states[0, places],
            targets=batch.inputs["input_ids"][rows, at + 1],
            kinds=kinds[rows, at],
            row=rows,
            weights=weights[rows, at],
            states=states if every_state or packed is None else None,
            packed=packed,
        )

    def _body(self, inputs: dict[str, Any], packed: PackedRow | None) -> Tensor:
        if packed is None:
            return run_body(self.model, **inputs, use_cache=False).last_hidden_state
        with packed_forward():
            return run_body(self.model, **packed.inputs, use_cache=False).last_hidden_state


def checkpoint_activations(model: PreTrainedModel, parts: bool | Sequence[str] = True) -> None:
    """Recompute activations of blocks in the backward, without reentry (PAINS 5). parts: vision, language; True: both.

    Transformers also makes the outputs of embeddings require a gradient, which only reentrant checkpoints need: a
    frozen tower would be recomputed and run backward for nothing.
    """
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()
    if parts is True:
        return
    anatomy = anatomy_of(model)
    for part, path in (("vision", anatomy.vision), ("language", anatomy.language)):
        if part not in parts:
            for module in model.get_submodule(path).modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode within, and as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def set_training_mode(model: nn.Module) -> None:
    """Train mode only where something trains.

    A module whose whole subtree is frozen stays in eval mode: otherwise BatchNorm statistics of a frozen tower would
    drift with every batch and the "frozen" part would change (SPEC G5). A sharded model gives back what evaluations
    gathered.
    """
    fold(model)
    model.train()
    trains = {id(module) for module in model.modules() if any(p.requires_grad for p in module.parameters())}
    for module in model.modules():
        if id(module) not in trains and any(True for _ in module.parameters()):
            module.eval()
        if keeps_statistics(module):
            module.eval()
    for module in model.modules():
        # its own flag decides whether a layer recomputes: gradients also flow through a frozen language model
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
