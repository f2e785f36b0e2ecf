"""TRL's SFTTrainer on the workload; arms.py says with what settings (JSON, the first argument)."""

import json
import sys

import torch
from datasets import Image, List, load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

wish = json.loads(sys.argv[1])
torch.set_num_threads(wish["threads"])
rows = load_dataset("parquet", data_files=wish["data"], split="train").cast_column("images", List(Image()))
model = {"dtype": "bfloat16" if wish["bf16"] else "float32", "attn_implementation": "sdpa"}
if wish["method"] == "qlora":
    model["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if wish["bf16"] else torch.float32,
        llm_int8_skip_modules=["visual", "lm_head"],
    )  # fmt: skip
args = SFTConfig(
    output_dir=wish["out"], max_steps=wish["steps"], per_device_train_batch_size=wish["micro"],
    gradient_accumulation_steps=wish["parts"], learning_rate=1e-4, lr_scheduler_type="constant", warmup_steps=0,
    weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", bf16=wish["bf16"], fp16=False, use_cpu=True, seed=42,
    data_seed=42, train_sampling_strategy="sequential", logging_steps=4, save_strategy="no", eval_strategy="no",
    report_to="none", disable_tqdm=True, dataloader_num_workers=0, dataloader_pin_memory=False,
    gradient_checkpointing=False, max_length=None, assistant_only_loss=True,
    model_init_kwargs=model,
)  # fmt: skip
lora = LoraConfig(
    r=16, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", modules_to_save=["merger"],
    target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
)  # fmt: skip
adapted = None if wish["method"] == "full" else lora
trainer = SFTTrainer(model=wish["model"], args=args, train_dataset=rows, peft_config=adapted)
if wish["method"] == "full":
    tower = trainer.model.model.visual
    tower.requires_grad_(False)
    tower.merger.requires_grad_(True)
trainer.train()
