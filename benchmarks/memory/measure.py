"""Predicted and measured peak memory of a training step, configuration by configuration (SPEC C9).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory/measure.py            # writes results.md and results.json
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory/measure.py llava-full # one configuration, printed

Every configuration runs in a process of its own: a step of a tiny model of the same family and plan first (it loads the
libraries), then resident memory is read, the real model is built with random weights, the plan is applied, the
high-water mark is reset, and two optimizer steps run. Measured is the high-water mark less what was resident before
the model. Large blocks are mapped and unmapped one by one (MALLOC_MMAP_THRESHOLD_), so that resident memory follows
the allocations. The prediction sees the config, the rules and the sizes of the batch, and never the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """family: of the shapes below; plan: of `rules`; the rest is what the prediction is told."""

    family: str
    plan: str
    samples: int
    tokens: int
    checkpointing: bool = False
    precision: str = "bf16"
    optimizer: str = "adamw"
    micro_batches: int = 1
    size: int = 224

    @property
    def name(self) -> str:
        parts = [self.family, self.plan, f"b{self.samples}", f"t{self.tokens}", self.precision]
        parts += ["ckpt"] if self.checkpointing else []
        parts += [self.optimizer] if self.optimizer != "adamw" else []
        parts += [f"x{self.micro_batches}"] if self.micro_batches > 1 else []
        return "-".join(parts)


CASES = (
    Case("qwen2_5_vl", "full", 1, 512),
    Case("qwen2_5_vl", "full", 4, 512),
    Case("qwen2_5_vl", "full", 4, 512, checkpointing=True),
    Case("qwen2_5_vl", "full", 2, 512, precision="fp32"),
    Case("qwen2_5_vl", "full", 2, 256, micro_batches=2),
    Case("qwen2_5_vl", "full", 1, 256, optimizer="adamw8bit"),
    Case("qwen2_5_vl", "lora", 1, 1024),
    Case("qwen2_5_vl", "lora", 4, 512),
    Case("qwen2_5_vl", "lora", 4, 512, checkpointing=True),
    Case("qwen2_5_vl", "lora_bf16", 2, 512),
    Case("qwen2_5_vl", "lora_bf16", 2, 1024, checkpointing=True),
    Case("qwen2_5_vl", "lora_nf4", 1, 512),
    Case("qwen2_5_vl", "lora_nf4", 2, 512, checkpointing=True),
    Case("qwen2_5_vl", "projector", 2, 512),
    Case("llava", "full", 2, 512),
    Case("llava", "lora", 4, 512),
    Case("llava", "lora", 8, 512, checkpointing=True),
    Case("llava", "lora", 2, 512, precision="fp32"),
    Case("llava", "projector", 4, 512),
    Case("llava", "everything_lora", 2, 512),
)


def shaped(family: str, small: bool):
    """A config of the family: about 90 M parameters, or (small) 1 M for the step that loads the libraries."""
    import transformers

    text = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "num_attention_heads": 10,
            "num_key_value_heads": 2, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
    if small:
        text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "vocab_size": 512}  # fmt: skip
    if family == "qwen2_5_vl":
        vision = {"hidden_size": 384, "intermediate_size": 1024, "num_heads": 6, "depth": 6, "window_size": 112,
                  "fullatt_block_indexes": [2, 5], "out_hidden_size": text["hidden_size"]}  # fmt: skip
        if small:
            vision |= {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "depth": 2}
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        sections = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        return transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False,
            image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503,
        )  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 64 if small else 384,
              "intermediate_size": 128 if small else 1536, "num_hidden_layers": 3 if small else 8,
              "num_attention_heads": 2 if small else 6, "image_size": 224, "patch_size": 14}  # fmt: skip
    return transformers.LlavaConfig(
        text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_id=500, image_seq_length=256,
        tie_word_embeddings=False,
    )  # fmt: skip


def rules(plan: str):
    from vlmtune.adapt.plan import Policy

    def lora(store: str = "fp32"):
        return Policy("lora", lr=2e-4, rank=16, alpha=32.0, store=store)

    full, frozen, half = Policy("full", lr=1e-5), Policy("frozen"), Policy("frozen", store="bf16")
    vision, projector, language, rest = {
        "full": (full, full, full, full),
        "lora": (frozen, full, lora(), frozen),
        "lora_bf16": (half, full, lora("bf16"), half),
        "lora_nf4": (half, full, lora("nf4"), half),
        "projector": (frozen, full, frozen, frozen),
        "everything_lora": (lora(), lora(), lora(), frozen),
    }[plan]
    return [("vision", vision), ("projector", projector), ("language", language), ("embed", rest), ("lm_head", rest)]


def run(case: Case) -> dict:
    """In a process of its own: predict, then measure."""
    import torch

    from vlmtune.adapt.memory import StepSettings, predict
    from vlmtune.models.synthetic import BatchShape

    settings = StepSettings(
        precision=case.precision, gradient_checkpointing=case.checkpointing, optimizer=case.optimizer,
        micro_batches=case.micro_batches,
    )  # fmt: skip
    images = 1
    shape = BatchShape(case.samples, case.tokens, images, case.size, case.size, case.tokens // 4)
    tiny = BatchShape(1, 300, 1, case.size, case.size, 16)
    torch.set_num_threads(1)
    steps(shaped(case.family, small=True), case, tiny)
    started = time.perf_counter()
    prediction = predict(shaped(case.family, small=False), rules(case.plan), shape, settings)
    seconds = time.perf_counter() - started
    gc.collect()
    before = resident()
    parameters = steps(shaped(case.family, small=False), case, shape)
    measured = high_water() - before
    place, peak = prediction.peak
    items = {item: size for item, size in peak.items.items() if size}
    return {
        "name": case.name, **asdict(case), "parameters": parameters, "predicted": prediction.total,
        "measured": measured, "error": prediction.total / measured - 1, "place": place, "items": items,
        "seconds_to_predict": seconds, "resident_before": before,
    }  # fmt: skip


def steps(config, case: Case, shape) -> int:
    """Build, plan, reset the high-water mark, and run two optimizer steps; returns the number of parameters."""
    import torch
    import transformers

    from vlmtune.adapt.plan import apply_plan
    from vlmtune.losses.objective import Objective
    from vlmtune.models.synthetic import synthetic_batch
    from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
    from vlmtune.optim.clip import clip_gradients
    from vlmtune.optim.precision import autocast
    from vlmtune.step import TrainingModule

    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    count = sum(parameter.numel() for parameter in model.parameters())
    quantise(model, rules(case.plan), case.precision)
    plan = apply_plan(model, rules(case.plan), "random", 0)
    if case.checkpointing:
        checkpoint_activations(model)
    set_training_mode(model)
    batch = synthetic_batch(config, shape)
    batch.inputs = {name: value.contiguous() for name, value in batch.inputs.items()}
    objective = Objective()
    module = TrainingModule(VLM(model), objective)
    optimizer = make_optimizer(case.optimizer, plan)
    gc.collect()
    reset_high_water()
    for _ in range(2):
        weights = objective.weights([batch] * case.micro_batches)
        for _ in range(case.micro_batches):
            with autocast(case.precision, torch.device("cpu")):
                losses = module(batch, weights)
            losses.total.backward()
            del losses
        clip_gradients(plan.groups(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return count


def quantise(model, wish, precision: str) -> None:
    """Put bitsandbytes' modules where the plan says nf4, as loading a quantised model does."""
    import torch

    from vlmtune.adapt.storage import wanted_quantisation

    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    wanted = wanted_quantisation(model, wish, True, compute)
    for path in () if wanted is None else wanted.modules:
        model.set_submodule(path, four_bits(model.get_submodule(path), True, compute))


def four_bits(linear, double: bool, compute):
    """A `Linear4bit` of bitsandbytes with the weights of a plain linear module."""
    import bitsandbytes as bnb
    from torch import nn

    has_bias = linear.bias is not None
    four = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute, compress_statistics=double, quant_type="nf4"
    )
    four.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    if has_bias:
        four.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    four.support_avx512bf16_for_cpu = False  # its repacked weights have no gradient (STACK 3)
    return four.to("cpu")


def make_optimizer(name: str, plan):
    from vlmtune.optim.optimizer import build_adamw

    return build_adamw(plan.optimizer_groups(), (0.9, 0.999), 1e-8, name)


def resident() -> int:
    return _status("VmRSS")


def high_water() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_child(name: str) -> dict:
    command = [sys.executable, __file__, name, "--child"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bits_per_parameter() -> dict[str, float]:
    """Measured on bitsandbytes' own modules, 4 matrices of 4096 x 4096: storage of codes and of constants."""
    import torch
    from torch import nn

    from vlmtune.models.quantise import stored_bytes

    found = {}
    for name, double in (("plain", False), ("double", True)):
        with torch.no_grad():
            layers = nn.ModuleList(four_bits(nn.Linear(4096, 4096, bias=False), double, torch.bfloat16)
                                   for _ in range(4))  # fmt: skip
        weights, constants = stored_bytes(layers)
        count = 4 * 4096 * 4096
        found |= {f"{name} codes": 8 * weights / count, f"{name} constants": 8 * constants / count}
    return found


def line(row: dict) -> str:
    return (
        f"{row['name']:44} predicted {row['predicted'] / MIB:7.0f} MiB  measured {row['measured'] / MIB:7.0f} MiB  "
        f"{100 * row['error']:+5.1f}%  {row['place']}"
    )


def write_results(rows: list[dict], bits: dict[str, float]) -> None:
    (HERE / "results.json").write_text(json.dumps({"cases": rows, "bits_per_parameter": bits}, indent=1))
    worst = max(abs(row["error"]) for row in rows)
    text = [
        "# Predicted and measured peak memory",
        "",
        "Written by `OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory/measure.py`, whose top says what is measured",
        "and how. Two optimizer steps on a CPU, random models of published families with about 90 million parameters.",
        f"{len(rows)} configurations; the largest difference is {100 * worst:.1f}%.",
        "",
        "| configuration | parameters | predicted, MiB | measured, MiB | difference | peak in |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        text.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['predicted'] / MIB:.0f} | "
            f"{row['measured'] / MIB:.0f} | {100 * row['error']:+.1f}% | {row['place']} |"
        )
    text += [
        "",
        "Names: family, plan (`rules` in the script), samples (b), tokens (t), precision, checkpointing (ckpt),",
        "optimizer, micro-batches (x). The prediction holds 27 MiB for libraries (`LIBRARIES` in",
        "`vlmtune/adapt/prediction.py`). They come from an earlier run of this table, in which the ledger alone was",
        "5 to 32 MiB below what was measured.",
        "No GPU was at hand: what is predicted for one has not been compared with a measurement.",
        "",
        "## Bits per parameter of NF4",
        "",
        "bitsandbytes `Linear4bit`, 4 matrices of 4096 x 4096.",
        "",
        "| | codes | constants | together |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, label in (("plain", "without double quantisation"), ("double", "with double quantisation")):
        codes, constants = bits[f"{name} codes"], bits[f"{name} constants"]
        text.append(f"| {label} | {codes:.4f} | {constants:.4f} | {codes + constants:.4f} |")
    (HERE / "results.md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "names", nargs="*", help="parts of names of configurations (default: all, and results are kept)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = {case.name: case for case in CASES}
    if options.child:
        print(json.dumps(run(cases[options.names[0]])))
        return
    names = [name for name in cases if not options.names or any(wish in name for wish in options.names)]
    bits = {} if options.names else bits_per_parameter()
    rows = []
    for name in names:
        rows.append(in_child(name))
        print(line(rows[-1]), f"  ({rows[-1]['seconds_to_predict']:.1f} s)", flush=True)
    if not options.names:  # all of them or none: half a table would pass for the whole
        write_results(rows, bits)


if __name__ == "__main__":
    main()
