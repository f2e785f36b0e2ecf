"""What the tests of our own adapters share: a batch of unlike samples, injection, checks every adapter must pass."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_setup import encoder_of, png

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.load import load_model
from vlmtune.models.tiny import FAMILIES
from vlmtune.types import Batch, ImageRef, Sample, Text, Turn

NAMES = [*FAMILIES, "embedded"]
"""Every tiny family and the embedded architecture."""


def folder_of(name: str, tiny_folder: Callable[[str], Path], embedded_folder: Path) -> Path:
    return embedded_folder if name == "embedded" else tiny_folder(name)


def sample(*seeds: int, question: str = "what is there", reply: str = "red circle") -> Sample:
    """A conversation about one image of noise per seed; no seed, no image. Each image is followed by some text."""
    parts = [part for seed in seeds for part in (ImageRef(png(seed)), Text(f" picture {question} "))]
    turns = (Turn("user", tuple(parts) or (Text(question),)), Turn("assistant", (Text(reply),)))
    return Sample(f"s{seeds}", turns)


SAMPLES = (sample(1), sample(question="how many big circle"), sample(2, 3), sample(4, reply="one blue square left"))
"""One image, none, two, one with a longer reply."""


class Case:
    """A model folder, its encoder, and the batch of SAMPLES; encoding is done once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder: Encoder = encoder_of(folder)
        self.batch: Batch = self.collate(SAMPLES)

    def collate(self, samples: Sequence[Sample], side: str = "right") -> Batch:
        return collate([self.encoder.encode(s) for s in samples], self.encoder.pad_token_id, side=side)

    def model(self) -> nn.Module:
        return load_model(str(self.folder))


def decoder_targets(model: nn.Module, children: Sequence[str], layers: str = r"\d+") -> str:
    """Regex of these children of the language model's blocks."""
    return rf"{re.escape(anatomy_of(model).language_layers)}\.({layers})\.({'|'.join(children)})"


def inject(model: nn.Module, config: PeftConfig, name: str = "default", seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, model, name)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shake(model: nn.Module, scale: float = 0.3, seed: int = 5) -> nn.Module:
    """Fill every adapter with noise, so that it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """float[tokens that are not padding, vocabulary]."""
    return model(**batch.inputs, use_cache=False).logits[batch.inputs["attention_mask"].bool()]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over all tokens but padding and images, as the plain formula says."""
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    targets = batch.inputs["input_ids"][:, 1:]
    counts = batch.inputs["attention_mask"][:, 1:].bool() & (targets != model.config.image_token_id)
    return nn.functional.cross_entropy(logits[counts], targets[counts])


def check_identity(case: Case, make: Callable[[nn.Module], PeftConfig]) -> nn.Module:
    """At step 0 the adapted model is the base model, to the last bit, also under bfloat16 autocast."""
    model = case.model()
    before = logits_of(model, case.batch)
    with torch.autocast("cpu", torch.bfloat16):
        before_bf16 = logits_of(model, case.batch)
    inject(model, make(model))
    assert torch.equal(logits_of(model, case.batch), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(model, case.batch), before_bf16)
    return model


def check_all_parameters_learn(case: Case, make: Callable[[nn.Module], PeftConfig]) -> None:
    """Only adapters train; each has a gradient at once, and after one step none is zero. They change the answer."""
    model = inject(case.model(), make(case.model())).train()
    before = logits_of(model.eval(), case.batch)
    trainable = adapter_parameters(model)
    held = {id(p) for layer in tuner_layers(model) for p in layer.parameters()}
    assert trainable and {id(p) for p in trainable.values()} <= held
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    loss_of(model, case.batch).backward()
    assert [name for name, p in trainable.items() if p.grad is None] == []
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, case.batch).backward()
    assert [name for name, p in trainable.items() if not bool(p.grad.abs().max() > 0)] == []
    optimizer.step()
    assert not torch.equal(logits_of(model, case.batch), before)


def check_off_is_base(case: Case, make: Callable[[nn.Module], PeftConfig]) -> None:
    """Switched off, the model is the base model; switched on again, it is what it was."""
    model = case.model()
    base = logits_of(model, case.batch)
    shake(inject(model, make(model)))
    adapted = logits_of(model, case.batch)
    assert not torch.allclose(adapted, base, atol=1e-3)
    for layer in tuner_layers(model):
        layer.enable_adapters(False)
    assert torch.equal(logits_of(model, case.batch), base)
    for layer in tuner_layers(model):
        layer.enable_adapters(True)
    assert torch.equal(logits_of(model, case.batch), adapted)


def check_save_and_load(case: Case, make: Callable[[nn.Module], PeftConfig], folder: Path) -> Tensor:
    """The state holds the adapter and nothing else; in a fresh model, under another name, it answers the same."""
    model = case.model()
    config = make(model)
    shake(inject(model, config))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {id(v) for v in adapter_parameters(model).values()} and len(state) == len(adapter_parameters(model))
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in adapter_parameters(model).values())
    save_file(
        {f"base_model.model.{name}": v.contiguous() for name, v in state.items()}, folder / "adapter_model.safetensors"
    )
    config.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value

    fresh = inject(case.model(), PeftConfig.from_pretrained(str(folder)), "other", seed=9)
    report = set_peft_model_state_dict(fresh, load_file(folder / "adapter_model.safetensors"), adapter_name="other")
    assert report.unexpected_keys == [] and not [key for key in report.missing_keys if "other" in key]
    expected = logits_of(model, case.batch)
    assert torch.equal(logits_of(fresh, case.batch), expected)

    empty = case.model()  # made on the meta device, then filled: how peft loads big adapters
    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), empty, low_cpu_mem_usage=True)
    set_peft_model_state_dict(empty, load_file(folder / "adapter_model.safetensors"), low_cpu_mem_usage=True)
    assert torch.equal(logits_of(empty, case.batch), expected)
    return expected


def check_a_fresh_process_loads_it(case: Case, module: str, folder: Path, expected: Tensor) -> None:
    """`peft.PeftModel.from_pretrained`, in a process that has imported nothing but our tuner, gives the same logits."""
    save_file(case.batch.inputs, folder / "batch.safetensors")
    script = f"""
import torch
torch.set_num_threads(1)
import {module}
from peft import PeftModel
from safetensors.torch import load_file, save_file
from vlmtune.models.load import load_model
model = PeftModel.from_pretrained(load_model({str(case.folder)!r}), {str(folder)!r}).eval()
batch = load_file({str(folder / "batch.safetensors")!r})
with torch.no_grad():
    logits = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
save_file({{"logits": logits}}, {str(folder / "logits.safetensors")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(folder / "logits.safetensors")["logits"], expected)


def check_checkpointing_changes_no_gradient(case: Case, make: Callable[[nn.Module], PeftConfig]) -> None:
    """Two passes before one backward: every block, recomputed, must see what it saw in its own pass."""
    other = case.collate([sample(7), sample(8, 9)])
    gradients = []
    for checkpointing in (False, True):
        model = case.model()
        shake(inject(model, make(model)))
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        (loss_of(model, case.batch) + 2 * loss_of(model, other)).backward()
        # LLaVA reads no output of its last tower block, so nothing there has a gradient
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None})
    plain, recomputed = gradients
    assert plain and set(plain) == set(recomputed)
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        # the same operations on the same numbers; accumulation into one tensor may come in another order
        assert float((gradient - recomputed[name]).abs().max()) <= 1e-5 * scale, name


@torch.no_grad()
def greedy_without_cache(model: nn.Module, case: Case, prompt: Sample, tokens: int) -> str:
    """The reply by whole forward passes over the growing sequence, without cache and without padding."""
    batch = collate([case.encoder.encode_prompt(prompt)], case.encoder.pad_token_id)
    inputs, made = dict(batch.inputs), []
    for _ in range(tokens):
        logits = model(**inputs, use_cache=False).logits[0, -1]
        logits[sorted(case.encoder.image_token_ids)] = -torch.inf
        made.append(int(logits.argmax()))
        for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                new = {"input_ids": made[-1], "attention_mask": 1}.get(name, 0)
                inputs[name] = torch.cat([inputs[name], torch.tensor([[new]])], dim=1)
    return case.encoder.decode(made)


def pack(model: nn.Module, case: Case, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[int]]:
    """(inputs of one packed row, length of each document): no attention mask, positions that start again (STACK §1)."""
    batches = [case.collate([s]).inputs for s in samples]
    row = {"input_ids": torch.cat([b["input_ids"] for b in batches], dim=1)}
    if "mm_token_type_ids" in batches[0]:
        row["mm_token_type_ids"] = torch.cat([b["mm_token_type_ids"] for b in batches], dim=1)
    for name in {n for b in batches for n in b} - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        present = [b[name] for b in batches if name in b]
        # the SmolVLM family has one row of crops per sample: [1, crops, …]
        row[name] = torch.cat(present, dim=1 if model.config.model_type == "smolvlm" else 0)
    lengths = [b["input_ids"].shape[1] for b in batches]
    text = torch.cat([torch.arange(length) for length in lengths])[None]
    if hasattr(model.model, "get_rope_index"):
        rotary = [
            model.model.get_rope_index(
                b["input_ids"], mm_token_type_ids=b["mm_token_type_ids"], image_grid_thw=b.get("image_grid_thw")
            )[0]
            for b in batches
        ]
        row["position_ids"] = torch.cat([text[None], torch.cat(rotary, dim=2)])
    else:
        row["position_ids"] = text
    return row, lengths
