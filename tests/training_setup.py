"""A tiny training run in one call: data of unequal lengths, encoder, plan, trainer. Nothing is downloaded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlmtune.adapt.plan import Plan, Policy, apply_plan
from vlmtune.adapt.sharding import shard_model
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.filler import encode_filler
from vlmtune.data.grounding import coordinates
from vlmtune.data.loader import Room, Steps, load_steps
from vlmtune.data.mixture import Mixture
from vlmtune.data.sources import FileSource
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import canonical_parameters, part_modules
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.models.vocabulary import NewTokens, add_tokens
from vlmtune.optim.optimizer import build_adamw
from vlmtune.processes import Group
from vlmtune.schedule import Piecewise, Rate, cosine_with_warmup, piecewise
from vlmtune.step import TrainingModule
from vlmtune.trainer import Settings, Trainer
from vlmtune.types import Batch, Encoded

WORDS = (
    "red", "blue", "green", "yellow", "circle", "square", "triangle", "left", "right", "picture", "one", "two", "three",
    "big", "small", "box",
)  # fmt: skip
TEXT_ONLY = 3
"""Index of the one sample without an image."""

PLAN = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full"},
    {"match": "language", "train": "lora", "rank": 4, "dropout": 0.1},
    {"match": "embed", "train": "frozen"},
    {"match": "lm_head", "train": "frozen"},
]
"""Of runs of the debug size on a tiny LLaVA."""
IN_FULL = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full", "lr": 1e-3}]
STAGE_STEPS = {"align": 4, "tasks": 5, "instruct": 4}
"""Of the chain that `tests/integration` trains."""


def png(seed: int) -> bytes:
    """64x48 pixels of noise: small, and different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(folder: Path, rows: int, images: bool = True) -> Path:
    """train.jsonl of `rows` conversations with replies of 1 to 11 words, two tasks, some with two turns."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        content: list[dict] = [{"type": "text", "text": "what is there" + " in the picture" * (i % 3)}]
        if images and i != TEXT_ONLY:
            (folder / f"{i}.png").write_bytes(png(i))
            content.insert(0, {"type": "image", "image": f"{i}.png"})
        reply = " ".join(WORDS[(i + n) % len(WORDS)] for n in range(1 + 3 * i % 11))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
        if i % 5 == 1:
            messages += [{"role": "user", "content": "how many"}, {"role": "assistant", "content": WORDS[10 + i % 3]}]
        lines.append(json.dumps({"id": f"s{i}", "task": ("caption", "vqa")[i % 2], "messages": messages}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_boxes(folder: Path, rows: int) -> Path:
    """boxes.jsonl: every reply is a box, after the text `<found>`; boxes and words differ from row to row."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        (folder / f"{i}.png").write_bytes(png(i))
        question = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"where is the {WORDS[i % 7]}"}]
        box = [4.0 + i, 6.0, 40.0 + i, 30.0 + i]
        answer = [{"type": "text", "text": "<found> " + WORDS[i % 7]}, {"type": "box", "boxes": [box]}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"b{i}", "task": "grounding", "messages": messages}))
    path = folder / "boxes.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def encoder_of(model_folder: Path, convention: str = "norm1000") -> Encoder:
    return Encoder(load_processor(str(model_folder)), coordinates(convention))


def extend(model_folder: Path, texts: Sequence[str], convention: str) -> tuple[nn.Module, Encoder, NewTokens]:
    """The model of a folder with new tokens, and the encoder that knows them."""
    model, processor = load_model(str(model_folder)), load_processor(str(model_folder))
    new = add_tokens(model, processor.tokenizer, texts)
    return model, Encoder(processor, coordinates(convention)), new


def encode_all(encoder: Encoder, data: Path) -> list[Encoded]:
    source = FileSource(data)
    return [encoder.encode(source[i]) for i in range(source.size)]


def micro_batches(encoder: Encoder, encoded: Sequence[Encoded], size: int) -> list[Batch]:
    return [collate(encoded[i : i + size], encoder.pad_token_id) for i in range(0, len(encoded), size)]


def full_rules(model: nn.Module, lr: float = 1e-3) -> list[tuple[str, Policy]]:
    """Everything this model has trains fully."""
    return [(part, Policy("full", lr=lr)) for part, modules in part_modules(model).items() if modules]


def lora_rules(model: nn.Module, dropout: float = 0.0, rank: int = 4) -> list[tuple[str, Policy]]:
    """The usual plan: tower frozen, projector full, LoRA on the language model, embeddings and head frozen."""
    wishes = {
        "projector": Policy("full", lr=1e-3, weight_decay=0.01),
        "language": Policy("lora", lr=2e-3, rank=rank, alpha=2.0 * rank, dropout=dropout),
    }
    return [(part, wishes.get(part, Policy("frozen"))) for part, modules in part_modules(model).items() if modules]


def loss_and_gradients(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """One step's loss and the gradient of every trainable parameter, computed as `Trainer.train_step` does."""
    module = TrainingModule(VLM(model), Objective())
    parameters = canonical_parameters(model)
    for parameter in parameters.values():
        parameter.grad = None
    weights = module.objective.weights(batches)
    loss = 0.0
    for batch in batches:
        total = module(batch, weights).total
        total.backward()
        loss += float(total.detach())
    return loss, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def gradient_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference, relative to the tensor's own largest entry.

    Entries below a thousandth of the largest gradient of all do not set the scale: some gradients are zero by
    symmetry (a bias on attention keys) and hold nothing but rounding.
    """
    assert set(one) == set(other), f"gradients only in one: {sorted(set(one) ^ set(other))[:3]}"
    assert one, "no gradients to compare"
    floor = 1e-3 * max(float(g.abs().max()) for g in one.values())
    return max(float((one[n] - other[n]).abs().max()) / max(floor, float(one[n].abs().max())) for n in one)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass
class Setup:
    """A trainer and what it was made of."""

    model: nn.Module
    encoder: Encoder
    plan: Plan
    trainer: Trainer
    steps: Steps


def make_trainer(
    model_folder: Path,
    data: Path,
    folder: Path,
    rules: Callable[[nn.Module], list[tuple[str, Policy]]] = lora_rules,
    total_steps: int = 20,
    workers: int = 0,
    micro_batch_size: int = 2,
    checkpoint_every: int = 5,
    observers: Sequence = (),
    gradient_checkpointing: bool = False,
    new_tokens: Sequence[str] = (),
    convention: str = "norm1000",
    over: Mapping[str, Piecewise] | None = None,
    parts: Mapping[str, Any] | None = None,
    device: str = "cpu",
    eps: float = 1e-8,
    holders: Group | None = None,
    **settings,
) -> Setup:
    """A trainer over `data`, 4 samples a step, seeded, float32; `settings` override `Settings` fields.

    eps: of AdamW; holders: processes of which each holds a part of the model; over: rule -> factor on its learning rate
    over progress; parts: further arguments of `Trainer`.
    """
    torch.manual_seed(0)
    model, encoder, new = extend(model_folder, new_tokens, convention)
    model.to(device)
    source = FileSource(data)
    mixture = Mixture([source.size], [piecewise(1.0)], total_steps * 4, seed=0)
    steps = Steps([source], mixture, encoder, 4, Room(micro_batch_size))
    plan = apply_plan(model, rules(model), str(model_folder), seed=0, new_tokens=new)
    if gradient_checkpointing:
        checkpoint_activations(model)
    parts = dict(parts or {})
    if holders is not None:
        plan = shard_model(model, plan, holders.mesh(torch.device(device)))
        steps.filler = encode_filler(encoder, source[0].task)
        parts |= {"processes": holders, "filler": collate([steps.filler], encoder.pad_token_id, fillers=1)}
    wishes = {
        "total_steps": total_steps,
        "rates": {
            rule: Rate(
                lambda step: cosine_with_warmup(step, total_steps, 2, 0.1),
                (over or {}).get(rule, piecewise(1.0)),
                2,
                total_steps,
            )
            for rule in plan.policies
        },
        "clip": 1.0,
        "clip_by_rule": {},
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": checkpoint_every,
        "keep": 2,
        "eval_every": None,
        "best": "loss",
        "best_is": "lowest",
    }
    trainer = Trainer(
        model,
        plan,
        Objective(),
        build_adamw(plan.optimizer_groups(), (0.9, 0.999), eps),
        lambda start, stop: load_steps(steps, start, stop, workers),
        Settings(**wishes | settings),
        folder,
        "fingerprint",
        torch.device(device),
        observers,
        **parts,
    )
    set_training_mode(model)
    return Setup(model, encoder, plan, trainer, steps)
