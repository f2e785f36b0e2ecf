"""How each arm is started on one workload: files it reads, command, environment.

The settings are the same for all: the tower frozen, the merger in full; the language model under LoRA of rank 16 on
every linear module, the same over a base in NF4 (QLoRA), or in full with the embedding; AdamW at 1e-4, no checkpointing
of activations.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PIXELS = 448 * 336


@dataclass(frozen=True)
class Job:
    """model: folder; data: of `workload.write_data`; folder: of this arm's files; steps: of `parts` micro-batches of
    `micro` samples."""

    model: Path
    data: Path
    folder: Path
    steps: int
    precision: str
    method: str
    shape: str
    micro: int = 4
    parts: int = 2
    threads: int = 2

    @property
    def is_bf16(self) -> bool:
        return self.precision == "bf16"


@dataclass(frozen=True)
class Start:
    command: list[str]
    environment: dict[str, str]


def ours(job: Job, python: Path, cached: bool = False) -> Start:
    config = {
        "model": str(job.model), "run": str(job.folder / "run"),
        "data": {"train": [{"path": str(job.data / "ours.jsonl")}], "workers": 0, "max_length": None},
        "plan": _plan(job),
        "optim": {"lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "warmup": "0 steps", "clip": 1.0},
        "train": {
            "length": f"{job.steps} steps", "batch_size": job.parts * job.micro, "micro_batch_size": job.micro,
            "precision": job.precision, "threads": job.threads, "log_every": 1,
        },
        "checkpoint": {"every": "100000 steps"}, "stability": {"statistics": None},
    }  # fmt: skip
    path = job.folder / "config.yaml"
    path.write_text(json.dumps(config))
    settings = ["data.vision_cache=8GB"] if cached else []
    environment = {"VLMTUNE_CACHE": str(job.folder / "cache")}
    return Start([str(python), "-m", "vlmtune", "train", str(path), *settings], environment)


def _plan(job: Job) -> list[dict]:
    front = [{"match": "vision", "train": "frozen"}, {"match": "projector", "train": "full"}]
    if job.method == "full":
        return [*front, {"match": "*", "train": "full"}]
    lora = {"match": "language", "train": "lora", "rank": 16, "alpha": 32}
    return [
        *front, {"match": "language.norm", "train": "frozen"},
        lora | ({"store": "nf4"} if job.method == "qlora" else {}), {"match": "embed", "train": "frozen"},
    ]  # fmt: skip


def ours_cached(job: Job, python: Path) -> Start:
    """The second epoch: what the tower makes is there (`fill` ran before)."""
    return ours(job, python, cached=True)


def fill(start: Start) -> list[str]:
    """The command that fills the cache of `ours_cached`."""
    return [part if part != "train" else "cache" for part in start.command]


def trl(job: Job, python: Path) -> Start:
    settings = {
        "model": str(job.model), "data": str(job.data / "messages.parquet"), "out": str(job.folder / "out"),
        "steps": job.steps, "micro": job.micro, "parts": job.parts, "bf16": job.is_bf16, "threads": job.threads,
        "method": job.method,
    }  # fmt: skip
    return Start([str(python), str(HERE / "arm_trl.py"), json.dumps(settings)], {})


def llamafactory(job: Job, python: Path) -> Start:
    config = {
        "model_name_or_path": str(job.model), "image_max_pixels": PIXELS, "image_min_pixels": PIXELS,
        "trust_remote_code": False, "flash_attn": "sdpa", "disable_gradient_checkpointing": True,
        "stage": "sft", "do_train": True, "freeze_vision_tower": True, "freeze_multi_modal_projector": False,
        **_LLAMAFACTORY[job.method],
        "dataset": "bench", "dataset_dir": str(job.data), "media_dir": str(job.data), "template": "qwen2_vl",
        "cutoff_len": 8192, "overwrite_cache": True, "preprocessing_num_workers": 1, "dataloader_num_workers": 0,
        "disable_shuffling": True, "output_dir": str(job.folder / "out"), "logging_steps": 4, "save_strategy": "no",
        "eval_strategy": "no", "plot_loss": False, "overwrite_output_dir": True, "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": job.micro, "gradient_accumulation_steps": job.parts, "max_steps": job.steps,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optim": "adamw_torch", "bf16": job.is_bf16, "fp16": False, "use_cpu": True, "seed": 42,
        "data_seed": 42, "dataloader_pin_memory": False,
    }  # fmt: skip
    path = job.folder / "config.yaml"
    path.write_text(json.dumps(config))
    return Start([str(python.parent / "llamafactory-cli"), "train", str(path)], {})


_LORA = {
    "finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all",
    "additional_target": "merger",
}  # fmt: skip
_LLAMAFACTORY = {
    "lora": _LORA, "full": {"finetuning_type": "full"},
    "qlora": _LORA | {"quantization_bit": 4, "quantization_method": "bnb"},
}  # fmt: skip


def swift(job: Job, python: Path) -> Start:
    settings = {
        "model": job.model, "model_type": "qwen2_5_vl", "template": "qwen2_5_vl",
        "external_plugins": HERE / "swift_plugin.py",
        "freeze_vit": "true", "freeze_llm": "false", **_SWIFT[job.method],
        "dataset": job.data / "swift.jsonl", "split_dataset_ratio": 0, "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false", "load_from_cache_file": "false",
        "torch_dtype": "bfloat16" if job.is_bf16 else "float32", "bf16": str(job.is_bf16).lower(), "fp16": "false",
        "use_cpu": "true", "attn_impl": "sdpa", "per_device_train_batch_size": job.micro,
        "gradient_accumulation_steps": job.parts,
        "max_steps": job.steps, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0,
        "weight_decay": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "optim": "adamw_torch", "gradient_checkpointing": "false", "vit_gradient_checkpointing": "false",
        "max_length": 8192,
        "dataloader_num_workers": 0, "dataset_num_proc": 1, "dataloader_pin_memory": "false",
        "output_dir": job.folder / "out", "add_version": "false", "logging_steps": 4, "save_strategy": "no",
        "eval_strategy": "no", "report_to": "none", "seed": 42, "data_seed": 42,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = {
        "USE_HF": "1", "MAX_PIXELS": str(PIXELS), "MIN_PIXELS": str(PIXELS), "SPEED_MODEL": str(job.model),
        "MODELSCOPE_CACHE": str(job.folder / "modelscope"),
    }  # fmt: skip
    return Start([str(python.parent / "swift"), "sft", *flags], environment)


def products(job: Job, python: Path) -> Start:
    """No training at all: the products that are needed, and nothing else."""
    settings = {
        "model": str(job.model), "data": str(job.data), "shape": job.shape, "steps": job.steps, "micro": job.micro,
        "parts": job.parts, "bf16": job.is_bf16, "threads": job.threads, "method": job.method,
    }  # fmt: skip
    return Start([str(python), str(HERE / "floor.py"), json.dumps(settings)], {})


_SWIFT_LORA = {
    "tuner_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear",
    "modules_to_save": "merger", "freeze_aligner": "true",
}  # fmt: skip
_SWIFT = {
    "lora": _SWIFT_LORA, "full": {"tuner_type": "full", "freeze_aligner": "false"},
    "qlora": _SWIFT_LORA | {
        "quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "true",
        "bnb_4bit_compute_dtype": "float32",
    },
}  # fmt: skip


ARMS: dict[str, tuple[Callable[[Job, Path], Start], str | None]] = {
    "products alone": (products, None),
    "vlmtune": (ours, None),
    "vlmtune, second epoch": (ours_cached, None),
    "ms-swift": (swift, "ms-swift"),
    "LLaMA-Factory": (llamafactory, "llamafactory"),
    "TRL": (trl, "trl"),
}
"""Name -> how it starts, and the environment under --peers that it needs (None: the one this runs in)."""


def python_of(arm: str, peers: Path) -> Path:
    environment = ARMS[arm][1]
    return Path(sys.executable) if environment is None else peers / environment / "bin" / "python"


def environment(threads: int) -> dict[str, str]:
    """For all arms. Nothing asks a hub or a service."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(HERE / "stopwatch"),
    }  # fmt: skip
