"""Next-token cross-entropy on supervised positions only, in chunks, per token (SPEC B1).

Shapes: N supervised tokens of a micro-batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20  # float32 logits held at once


def chunk_rows(vocabulary: int) -> int:
    """Rows per chunk so that its float32 logits take about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _FrozenHead(torch.autograd.Function):
    """Frozen weight: d loss / d hidden = (softmax - onehot) · W is kept from the forward; the backward only scales it.

    This is exact because each row's gradient is its upstream gradient (a number) times a vector known in the forward.
    The softmax is not divided by its sum: the much smaller product is.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        losses = torch.empty(len(targets), dtype=_wide(weight), device=hidden.device)
        directions = torch.empty_like(hidden)
        scratch = _scratch(hidden, weight, min(rows, len(targets)))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, scratch)
            losses[part], exponentials, total = _nll_and_exponentials(logits, targets[part])
            exponentials[torch.arange(len(logits), device=logits.device), targets[part]] -= total
            scaled = (exponentials.to(weight.dtype) @ weight).to(losses.dtype)
            directions[part] = scaled.div_(total.unsqueeze(1)).to(hidden.dtype)
        ctx.save_for_backward(directions)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (directions,) = ctx.saved_tensors
        return upstream.unsqueeze(1).to(directions.dtype) * directions, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Trainable weight: logits are recomputed chunk by chunk in the backward instead of being stored."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        losses = torch.empty(len(targets), dtype=_wide(weight), device=hidden.device)
        normalisers = torch.empty_like(losses)
        scratch = _scratch(hidden, weight, min(rows, len(targets)))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, scratch)
            chosen = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            losses[part] = _nll_and_exponentials(logits, targets[part])[0]
            normalisers[part] = losses[part] + chosen
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.rows = rows
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=_wide(weight))
        d_bias = torch.zeros_like(bias, dtype=_wide(weight)) if bias is not None else None
        scratch = _scratch(hidden, weight, min(ctx.rows, len(targets)))
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            d_logits = _minus_onehot(_logits(hidden[part], weight, bias, scratch), targets[part], normalisers[part])
            d_logits *= upstream[part].unsqueeze(1)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[part] = (d_logits @ weight).to(hidden.dtype)
            if d_weight.dtype == weight.dtype:
                d_weight.addmm_(d_logits.T, hidden[part].to(weight.dtype))  # no second [V, D]
            else:
                d_weight += d_logits.T @ hidden[part].to(weight.dtype)
        return d_hidden, d_weight.to(weight.dtype), d_bias.to(bias.dtype) if bias is not None else None, None, None


_kept: dict[tuple[int, torch.dtype], Tensor] = {}
"""Of each thread and dtype: memory for logits on a CPU, where a fresh 64 MiB costs as much as a pass over them."""


def _scratch(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Uninitialised [rows, V] in the dtype of logits."""
    shape, dtype = (rows, weight.shape[0]), _wide(weight)
    if type(hidden) is not Tensor or hidden.device.type != "cpu":  # allocators of GPUs keep it; others only count
        return torch.empty(shape, dtype=dtype, device=hidden.device)
    key, size = (threading.get_ident(), dtype), rows * weight.shape[0]
    if key not in _kept or _kept[key].numel() < size:
        with torch.inference_mode(False):  # an evaluation may come first, and training uses it afterwards
            _kept[key] = torch.empty(size, dtype=dtype)
    return _kept[key][:size].view(shape)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """float32[n, V] (float64 for a float64 weight), in `scratch`; the product runs in the weight's dtype."""
    logits = scratch[: len(hidden)]
    if weight.dtype == logits.dtype:
        torch.mm(hidden.to(weight.dtype), weight.T, out=logits)
    else:
        logits.copy_(hidden.to(weight.dtype) @ weight.T)
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def _nll_and_exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log softmax at the targets float[n]; exp(logits - largest) float[n, V], over `logits`; its sums float[n]."""
    logits -= logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    total = logits.exp_().sum(dim=1)
    return total.log() - chosen, logits, total


def _wide(weight: Tensor) -> torch.dtype:
    """What losses and sums are kept in: float32, or the weight's own dtype if that is wider."""
    return torch.promote_types(weight.dtype, torch.float32)


def _nll(logits: Tensor, targets: Tensor, normaliser: Tensor) -> Tensor:
    """normaliser: log of the sum of exp(logits), float[n]."""
    return normaliser - logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def _minus_onehot(logits: Tensor, targets: Tensor, normaliser: Tensor) -> Tensor:
    """softmax(logits) - onehot(targets), float32[n, V], written over `logits`."""
    probabilities = logits.sub_(normaliser.unsqueeze(1)).exp_()
    probabilities[torch.arange(len(targets), device=logits.device), targets] -= 1
    return probabilities


def token_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, rows: int | None = None) -> Tensor:
    """Cross-entropy of each token, float32[N].

    hidden: float[N, D], the states that predict `targets` int64[N] (already shifted). head: the model's output
    embedding; a plain `nn.Linear` takes the fused path, anything else (an adapter around it) is run chunk by chunk and
    recomputed in the backward. rows: tokens per chunk. Under autocast the product runs in the autocast dtype, as the
    model's own head would.
    """
    if len(targets) == 0:  # the graph must still reach every parameter
        is_training = any(parameter.requires_grad for parameter in head.parameters())
        return (head(hidden) if is_training else hidden).sum(dim=1).float()
    if type(head) is nn.Linear:
        weight, bias = head.weight, head.bias
        device = hidden.device.type
        trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
        rows = rows or chunk_rows(weight.shape[0])
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            function = _TrainableHead if trainable else _FrozenHead
            return function.apply(hidden, weight, bias, targets, rows)
    rows = rows or max(1, chunk_rows(head.base_layer.out_features if hasattr(head, "base_layer") else 65536))

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        return _nll(logits, targets, logits.logsumexp(dim=1))

    chunks = [
        checkpoint(chunk, hidden[i : i + rows], targets[i : i + rows], use_reentrant=False)
        for i in range(0, len(targets), rows)
    ]
    return torch.cat(chunks)
