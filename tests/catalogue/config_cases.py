"""Configs with one thing wrong, and model folders. The command is `vlmtune check`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmtune.checks.examine import PIXELS
from vlmtune.data.check import CODES

from .case import REFUSED, Case
from .workshop import PLAN, Row, Thing, Workshop

RATES, WARMUP = "learning rates are usual", "warmup is usual"
PLAN_SECTION, START_SECTION, STEP_SECTION = (
    "data, lengths and rules fit together", "the run can be built", "the largest batch goes forward and backward"
)  # fmt: skip
MODEL_SECTION = "the model can be loaded"


def setting(**over: Any) -> Callable[[Workshop], Path]:
    return lambda shop: shop.config(**over)


def case(name: str, wrong: str, what: str, build: Callable[[Workshop], Path], says: str = "") -> Case:
    return Case(name, "config", wrong, build, what, says)


def plan(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """`PLAN` with rules exchanged for those of the same `match`."""
    new = {change["match"]: change for change in changes}
    return [new.get(rule["match"], rule) for rule in PLAN]


ALL_FROZEN = [{"match": "*", "train": "frozen"}]
IN_FULL = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full", "lr": 5e-1}]
VISION_TOO = plan({"match": "vision", "train": "full", "lr": 1e-3})


def text_row(name: str, image: str, thing: Thing, number: int) -> Row:
    return {"id": name, "question": f"What colour has the {thing.shape} of {name}?", "answer": f"It is {thing.colour}."}


def on_text(**over: Any) -> Callable[[Workshop], Path]:
    """A config on data without pictures."""

    def build(shop: Workshop) -> Path:
        shop.made["val"] = shop.data("val", 8, text_row)
        return shop.config(shop.data(row=text_row), **over)

    return build


def two_sources(shop: Workshop) -> Path:
    late = {"path": str(shop.data("second")), "weight": [[0, 0.0], [0.9, 1e-6]]}
    return shop.config(Path(), data__train=[{"path": str(shop.data())}, late])


# ---- model folders -------------------------------------------------------------------------------------------------


def on_model(spoil: Callable[[Path], None], **over: Any) -> Callable[[Workshop], Path]:
    """A config on a copy of the model folder that `spoil` has changed."""

    def build(shop: Workshop) -> Path:
        folder = shop.folder / "model"
        shutil.copytree(shop.model, folder)
        spoil(folder)
        return shop.config(model=str(folder), **over)

    return build


def json_file(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return spoil


def image_processor(**settings: Any) -> Callable[[Path], None]:
    return json_file("processor_config.json", lambda tree: tree["image_processor"].update(settings))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def one_nan(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(tensors) if "language" in n and n.endswith("down_proj.weight"))
    tensors[name][3, 4] = torch.nan


def no_norms(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(tensors) if n.endswith("input_layernorm.weight"))
    tensors[name].zero_()


def fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    """The embedding without the rows of the last tokens."""
    for name in [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        tensors[name] = tensors[name][:-2].clone()


def shrunk(folder: Path) -> None:
    weights(fewer_rows)(folder)
    json_file("config.json", lambda tree: tree["text_config"].update(vocab_size=tree["text_config"]["vocab_size"] - 2))(
        folder
    )


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_template(folder: Path) -> None:
    for path in folder.glob("chat_template*"):
        path.unlink()
    json_file("tokenizer_config.json", lambda tree: tree.pop("chat_template", None))(folder)


CASES = [
    case("unknown_key", "The learning rate is called learning_rate.", REFUSED, setting(optim__learning_rate=1e-4),
         "learning_rate"),
    case("patience_without_evaluation", "Early stopping is on, and nothing is evaluated during the run.", REFUSED,
         setting(checkpoint__patience=3), "checkpoint.patience counts evaluations"),
    case("batch_not_divisible", "A batch of 4 in micro-batches of 3.", REFUSED, setting(train__micro_batch_size=3),
         "micro_batch_size"),
    case("missing_data_file", "The data file has another name.", PLAN_SECTION,
         setting(data__train__0__path="train_final_v2.jsonl"), "train_final_v2.jsonl does not exist"),
    case("wrong_image_root", "image_root is a folder of another machine.", PLAN_SECTION,
         setting(data__train__0__image_root="/data/coco"), "image_root /data/coco"),
    case("mistyped_rule", "The rule for the vision tower is spelled visoin.", PLAN_SECTION,
         setting(plan__0__match="visoin"), "no rule covers vision"),
    case("everything_frozen", "Every part is frozen.", START_SECTION, setting(plan=ALL_FROZEN), "nothing would train"),
    case("warmup_longer_than_run", "The warmup was copied from a longer run.", PLAN_SECTION,
         setting(optim__warmup=500), "optim.warmup is 500 steps"),
    case("schedule_that_never_trains", "All learning rates are 0 for the first half of the run.", START_SECTION,
         setting(plan=plan({"match": "projector", "train": "full", "lr": [[0, 0], [0.5, 1e-3]]},
                           {"match": "language", "train": "lora", "lr": [[0, 0], [0.5, 1e-3]]})), "nothing trains"),
    case("weight_for_no_task", "A task weight is for a task that the data does not have.", START_SECTION,
         setting(loss__balance={"by": "fixed", "weights": {"caption": 1.0, "vqa": 1.0, "ocr": 2.0}}), "ocr"),
    case("no_weight_for_a_task", "A task of the data has no weight.", START_SECTION,
         setting(loss__balance={"by": "fixed", "weights": {"caption": 1.0}}), "vqa"),
    case("all_weights_zero", "Replies have the weight 0, and nothing else carries loss.", REFUSED,
         setting(loss__weights={"response": 0.0, "box": 0.0, "entity": 0.0}), "weights"),
    case("limit_drops_everything", "max_length is below the tokens of one picture, and what is too long is dropped.",
         START_SECTION, setting(data__max_length=16, data__on_overlong="drop"), "exceeds data.max_length 16"),
    case("limit_below_pictures", "max_length is below the tokens of one picture.", CODES["too_long"][1],
         setting(data__max_length=16), "exceed data.max_length 16"),
    case("lr_of_an_exponent", "A learning rate of 20 where 0.02 was meant.", RATES,
         setting(plan=plan({"match": "language", "train": "lora", "rank": 4, "lr": 20.0})), "far above: language 20"),
    case("lora_lr_in_full", "The learning rate of LoRA, for training in full.", RATES, setting(plan=IN_FULL),
         "far above"),
    case("lr_too_low", "A learning rate of 1e-7 where 1e-2 was meant.", RATES,
         setting(plan=plan({"match": "language", "train": "lora", "rank": 4, "lr": 1e-7})), "far below: language"),
    case("warmup_of_half_the_run", "The warmup lasts for half of the run.", WARMUP, setting(optim__warmup=4), "50%"),
    case("no_warmup", "Training in full begins with the full rate.", WARMUP,
         setting(optim__warmup=0, train__length=40), "none, and projector"),
    case("no_clipping", "Clipping is off.", "gradients are clipped", setting(optim__clip=None), "no limit"),
    case("clipped_to_nothing", "The limit of the norm is 1e-6.", "gradients are clipped", setting(optim__clip=1e-6),
         "at 1e-06"),
    case("huge_weight_decay", "A weight decay of 0.9.", "weight decay is usual",
         setting(optim__weight_decay=0.9), "0.9"),
    case("alpha_of_another_rank", "alpha 512 was kept while the rank went down to 4.", "LoRA's alpha fits its rank",
         setting(plan=plan({"match": "language", "train": "lora", "rank": 4, "alpha": 512.0, "lr": 1e-2})),
         "alpha 512, rank 4"),
    case("rank_above_the_matrix", "A rank of 128 in a model of width 64.", START_SECTION,
         setting(plan=plan({"match": "language", "train": "lora", "rank": 128, "lr": 1e-2})), "rank 128 exceeds"),
    case("rank_of_the_matrix", "A rank of 32, and keys have a width of 32.", "LoRA is smaller than what it adapts",
         setting(plan=plan({"match": "language", "train": "lora", "rank": 32, "lr": 1e-2})), "rank 32"),
    case("float16_on_cpu", "float16 without a GPU.", "the number format suits the machine",
         setting(train__precision="fp16"), "float16 on a CPU"),
    case("far_too_many_epochs", "30 epochs of 24 rows.", "no source is read too often",
         setting(train__length="30 epochs"), "30 times"),
    case("nothing_held_out", "No data is held out.", "something is held out", setting(data__eval={}), "data.eval"),
    case("no_checkpoint_on_the_way", "1200 steps, and a checkpoint at the end alone.",
         "checkpoints are written on the way",
         lambda shop: shop.config(shop.data(rows=600), train__length=1200, checkpoint__every=5000, optim__warmup=30),
         "every 5,000 steps"),
    case("source_without_weight", "The second source has its weight when the run is over.", "every source is read",
         two_sources, "second.jsonl"),
    case("evaluation_after_the_end", "evaluate.every is longer than the run.", "held-out data is looked at on the way",
         setting(evaluate__every=500), "every 500 steps"),
    case("batch_larger_than_data", "A batch of 32 from 24 rows.", "a batch holds no row twice",
         setting(train__batch_size=32, train__length=4), "32 samples of 24 rows"),
    case("checkpoints_for_no_disk", "More checkpoints are kept than the disk holds.", "the disk holds the checkpoints",
         setting(checkpoint__keep=10**9), "MiB are free"),
    case("replies_cut_in_evaluation", "Generation stops at 3 tokens, the replies have more.",
         "replies can be generated to their ends", setting(evaluate={"generate": True, "max_new_tokens": 3}),
         "max_new_tokens is 3"),
    case("other_template", "A template of another model.", "the chat template is the model's own",
         setting(data__template="single"), "takes the place"),
    case("coordinates_without_tokens", "Coordinates of 1000 tokens that the tokenizer does not have.", MODEL_SECTION,
         setting(data__coordinates="bins1000"), "bins1000"),
    case("vision_trains_on_text", "The vision tower trains, and the data has no pictures.", STEP_SECTION,
         on_text(plan=VISION_TOO), "got no gradient, first vision"),
    case("projector_alone_on_text", "The projector alone trains, and the data has no pictures.", STEP_SECTION,
         on_text(plan=plan({"match": "language", "train": "frozen"})), "got no gradient, first projector"),
    case("tokenizer_of_another_model", "The tokenizer has tokens that the embedding has no row for.",
         START_SECTION, on_model(shrunk), "the embedding has a row for every token: no"),
    case("base_with_nan", "A weight of the base model is NaN.", "weights were not finite before this step",
         on_model(weights(one_nan)), "down_proj"),
    case("base_not_complete", "A norm of the base model was never loaded.", "norms let signals through",
         on_model(weights(no_norms)), "all zero"),
    case("cut_base_model", "The download of the base model broke off.", MODEL_SECTION, on_model(cut_weights),
         "cannot be read"),
    case("no_chat_template", "The model folder has no chat template.", MODEL_SECTION, on_model(no_template),
         "has no chat template"),
    case("normalised_by_nothing", "The image processor divides by a standard deviation of 0.", PIXELS,
         on_model(image_processor(image_std=[0, 0, 0])),
         "values infinite"),
    case("pixels_not_rescaled", "The image processor normalises without dividing by 255.", PIXELS,
         on_model(image_processor(do_rescale=False)),
         "black and white end at"),
    case("run_folder_unwritable", "The run folder lies where nothing can be written.",
         "the run folder can be written", setting(run="/proc/vlmtune/run"), "cannot be written"),
]  # fmt: skip
