"""BatchNorm in a tower that trains: whose statistics it normalises with (SPEC G5).

In training a BatchNorm layer uses the mean and variance of the images it sees in one forward. With accumulation that is
a micro-batch, so 8 micro-batches of 1 are another model than 1 of 8. Two ways out: statistics that stay those of the
base model, or a tower that sees all images of the step at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune.types import Batch, VlmtuneError

KEEPS = "_vlmtune_keeps_statistics"


def batch_norms(model: nn.Module, parameters: Collection[nn.Parameter]) -> dict[str, nn.Module]:
    """Name -> BatchNorm layer, of those with a weight or bias among these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and any(id(p) in wanted for p in module.parameters(recurse=False))
    }


def freeze_statistics(layers: Collection[nn.Module]) -> None:
    """Let these layers use the statistics they have, for good; their weights may train. `set_training_mode` obeys."""
    for layer in layers:
        setattr(layer, KEEPS, True)


def keeps_statistics(module: nn.Module) -> bool:
    return getattr(module, KEEPS, False)


class SharedTower:
    """Runs vision tower and projector once over all images of an optimizer step.

    `begin` with the micro-batches, then give the model `inputs(n, batch)` in place of micro-batch n, run its backward,
    and `finish` after the last one. Statistics and gradients are those of one batch, however it is cut. The activations
    of the tower are held for the whole step.
    """

    def __init__(self, model: PreTrainedModel):
        kind = model.config.model_type
        if kind not in ("llava", "llava_resampler"):
            raise VlmtuneError(
                f"plan: batchnorm: sync needs images as one tensor each, as LLaVA models have them; this is {kind}: "
                "say batchnorm: frozen."
            )
        self.model = model
        self._features: Tensor | None = None
        self._leaves: list[Tensor | None] = []

    def begin(self, micro_batches: Sequence[Batch]) -> None:
        """Run the tower. Raises VlmtuneError for images of several sizes."""
        images = [batch.inputs["pixel_values"] for batch in micro_batches if "pixel_values" in batch.inputs]
        self._leaves, self._features = [None] * len(micro_batches), None
        if not images:
            return
        if len({image.shape[1:] for image in images}) > 1:
            raise VlmtuneError("plan: batchnorm: sync needs images of one size in a step; say batchnorm: frozen.")
        pixels = torch.cat(images).to(self.model.device)
        found = self.model.base_model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        self._features = torch.cat(tuple(found))
        sizes = [len(features) for features in found]
        image = token = 0
        for number, batch in enumerate(micro_batches):
            if "pixel_values" in batch.inputs:
                count = sum(sizes[image : image + len(batch.inputs["pixel_values"])])
                image, end = image + len(batch.inputs["pixel_values"]), token + count
                self._leaves[number] = self._features.detach()[token:end].requires_grad_()
                token = end

    def inputs(self, number: int, batch: Batch) -> Batch:
        """The micro-batch with its features in place of its pixels."""
        leaf = self._leaves[number]
        if leaf is None:
            return batch
        rest = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=[leaf])}
        return replace(batch, inputs=rest | {"mm_encoder_outputs": outputs})

    def finish(self) -> None:
        """Backward through projector and tower, with what the micro-batches left at their features."""
        if self._features is None or not self._features.requires_grad:
            return
        gradients = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves if leaf is not None
        ]
        self._features.backward(torch.cat(gradients))
        self._features, self._leaves = None, []
