"""Every method of a plan, as rules for a model: the rows of the test matrix. Used by tests and by the fresh process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_setup import full_rules

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.storage import wanted_quantisation
from vlmtune.checkpoint import load_weights
from vlmtune.models.load import load_model, meta_model

Rules = list[tuple[str, Policy]]


@dataclass(frozen=True)
class Method:
    """language: what the rule for the language model says (rows of their own go in front). identity: how far from the
    base model it may be at step 0, relative to the largest logit; None: it is another model by design. merges: whether
    its adapters can be merged into the weights."""

    language: Policy
    front: tuple[tuple[str, Policy], ...] = ()
    identity: float | None = 0.0
    merges: bool = True


def _lora(**more) -> Policy:
    return Policy(**{"train": "lora", "lr": 1e-2, "rank": 4} | more)


def _peft(method: str, **options) -> Policy:
    return Policy("peft", lr=1e-2, method=method, options=options)


ROUNDING = 1e-5  # float32 rounding of recomposed weights through a few layers
METHODS: dict[str, Method] = {
    "full": Method(Policy("full", lr=1e-3)),
    "lora": Method(_lora()),
    "lora_by_kind": Method(_lora(rank={"qk": 2, "vo": 4, "up": 8, "down": 4})),
    "dora": Method(_lora(options={"use_dora": True}), identity=ROUNDING),
    "rslora": Method(_lora(options={"use_rslora": True})),
    "pissa": Method(_lora(options={"init_lora_weights": "pissa"}), identity=ROUNDING),
    "olora": Method(_lora(options={"init_lora_weights": "olora"}), identity=ROUNDING),
    "ia3": Method(Policy("ia3", lr=1e-2)),
    "adapter": Method(Policy("adapter", lr=1e-2, options={"dim": 8}), merges=False),
    "adapter_parallel": Method(Policy("adapter", lr=1e-2, options={"dim": 8, "mode": "parallel"}), merges=False),
    "cross_modal": Method(Policy("cross_modal", lr=1e-2, options={"dim": 8, "heads": 2}), merges=False),
    "prefix": Method(Policy("prefix", lr=1e-2, options={"length": 4}), merges=False),
    "prefix_plain": Method(
        Policy("prefix", lr=1e-2, options={"length": 4, "gated": False}), identity=None, merges=False
    ),
    "loha": Method(_peft("loha", r=2)),
    "lokr": Method(_peft("lokr", r=2)),
    "oft": Method(_peft("oft", r=0, oft_block_size=8), identity=ROUNDING),
    "boft": Method(_peft("boft"), identity=ROUNDING),
    "vera": Method(_peft("vera", r=8)),
    "nf4": Method(_lora(store="nf4")),
    "nf4_adapter": Method(Policy("adapter", lr=1e-2, options={"dim": 8}, store="nf4"), merges=False),
    "int8": Method(_lora(store="int8")),
    "mixed": Method(
        Policy("ia3", lr=1e-2),
        front=(
            ("language.layers[0:1]", _lora(dropout=0.1)),
            ("language.layers[1:2]", Policy("adapter", lr=1e-2, options={"dim": 4})),
            ("language.layers[2:3]", _lora(options={"use_dora": True})),
        ),
        identity=ROUNDING,
        merges=False,
    ),
}


def rules_for(model: nn.Module, name: str) -> Rules:
    """The method on the language model, the projector in full, the rest frozen."""
    method = METHODS[name]
    wishes = {"projector": Policy("full", lr=1e-3), "language": method.language}
    rest = [(part, wishes.get(part, Policy("frozen"))) for part, _ in full_rules(model)]
    return [*method.front, *rest]


def load_for(folder: Path, name: str) -> tuple[nn.Module, Rules]:
    """The model as its rules store it, without adapters."""
    shape = meta_model(str(folder))
    rules = rules_for(shape, name)
    quantisation = wanted_quantisation(shape, rules, double=True, compute=torch.float32)
    return load_model(str(folder), quantisation=quantisation), rules


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """float32[N, V]: of all tokens that are not padding."""
    return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


def reload(folder: Path, name: str, checkpoint: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a checkpoint in a model that was loaded anew. The seed differs: nothing random may survive."""
    model, rules = load_for(folder, name)
    plan = apply_plan(model, rules, str(folder), seed=1)
    load_weights(checkpoint, model, plan)
    return logits_of(model.eval(), inputs)


Reload = Callable[[Path, str, Path, dict[str, Tensor]], Tensor]


def main(folder: str, inputs: str, *checkpoints: str) -> None:
    """A fresh process: writes `<checkpoint>/again.safetensors` with the logits of each method's checkpoint."""
    batch = load_file(inputs)
    for checkpoint in map(Path, checkpoints):
        logits = reload(Path(folder), checkpoint.parent.name, checkpoint, batch)
        save_file({"logits": logits.contiguous()}, checkpoint.parent / "again.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
