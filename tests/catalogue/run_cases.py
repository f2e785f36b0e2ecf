"""Runs that went wrong, trained here for a few steps, and what happened to their folders. The command is
`vlmtune doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .case import Case, run_command
from .config_cases import IN_FULL, image_processor, on_model, plan, weights
from .data_cases import questions, replies
from .workshop import Workshop, box_row, reply_of

AT_START, IN_RUN = "at the start: ", "in the run: "
SHORT = {"train__length": 12, "checkpoint__every": 6}


def trained(*arguments: str, **over: Any) -> Callable[[Workshop], Path]:
    """The folder of a run of this config, however it ended."""
    return lambda shop: run_of(shop.config(**SHORT | over), *arguments)


def run_of(config: Path, *arguments: str) -> Path:
    run_command("train", config, *arguments)
    return config.parent / config.stem


def case(name: str, wrong: str, what: str, build: Callable[[Workshop], Path], says: str = "", slow=False) -> Case:
    return Case(name, "run", wrong, build, what, says, "doctor", slow)


def lora(lr: float, **over: Any) -> list[dict[str, Any]]:
    return plan({"match": "language", "train": "lora", "rank": 4, "lr": lr, **over})


def on_data(change, rows: int = 24, **over: Any) -> Callable[[Workshop], Path]:
    return lambda shop: run_of(shop.config(shop.data(rows=rows, change=change), **SHORT | over))


def on_base(spoil: Callable[[Path], None], **over: Any) -> Callable[[Workshop], Path]:
    return lambda shop: run_of(on_model(spoil, **SHORT | over)(shop))


# ---- what happens to a run folder ----------------------------------------------------------------------------------


def afterwards(change: Callable[[Path], None], **over: Any) -> Callable[[Workshop], Path]:
    """A run that went well, and then."""

    def build(shop: Workshop) -> Path:
        run = trained(**over)(shop)
        change(run)
        return run

    return build


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def cut_checkpoint(run: Path) -> None:
    path = newest(run) / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lost_checkpoints(run: Path) -> None:
    for folder in (run / "checkpoints").glob("step_*"):
        for path in folder.rglob("*.safetensors"):
            path.write_bytes(b"")


def other_versions(run: Path) -> None:
    path = run / "environment.json"
    tree = json.loads(path.read_text())
    tree["packages"]["transformers"] = "4.49.0"
    path.write_text(json.dumps(tree))


def huge_projector(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(tensors) if "multi_modal_projector" in n and n.endswith("linear_2.weight"))
    tensors[name] *= 1e6


def one_nan_in_vision(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(tensors) if "vision" in n and n.endswith("fc1.weight"))
    tensors[name][0, 0] = torch.nan


def long_prompts(text: str, row) -> str:
    return f"{text} Think first. " + "Look at the picture, and at every part of it, before you answer. " * 15


def long_and_short(rows, folder, random) -> None:
    questions(long_prompts)(rows, folder, random)
    replies(lambda text, number: "red")(rows, folder, random)


def never_read(shop: Workshop) -> Path:
    second = shop.data("second")
    sources = [{"path": str(shop.data())}, {"path": str(second), "weight": [[0, 0.0], [0.9, 1e-6]]}]
    return run_of(shop.config(Path(), data__train=sources, **SHORT))


def mostly_dropped(shop: Workshop) -> Path:
    path = shop.data(change=lambda rows, folder, random: [
        reply_of(row).update(content=reply_of(row)["content"] * 12) for row in random.sample(rows, 10)
    ] and None)  # fmt: skip
    return run_of(shop.config(path, data__max_length=120, data__on_overlong="drop", **SHORT))


IN_FULL_AT_1E_2 = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full", "lr": 1e-2}]


def forgetting(shop: Workshop) -> Path:
    """The base learned to answer in words; then it learns boxes alone."""
    words = shop.data("words", 24)
    shop.made["val"] = shop.data("val", 8)
    first = shop.config(words, "first", plan=IN_FULL_AT_1E_2, train__length=30, checkpoint__every=30)
    run_of(first, "--no-check")
    model = shop.folder / "taught"
    run_command("export", shop.folder / "first", model)
    held_out = {"old": [{"path": str(shop.made["val"])}], "new": [{"path": str(shop.data("boxes_val", 8, box_row))}]}
    second = shop.config(
        shop.data("boxes", 24, box_row), "second", model=str(model), plan=IN_FULL_AT_1E_2, data__eval=held_out,
        **SHORT | {"train__length": 30},
    )  # fmt: skip
    return run_of(second, "--no-check")


CASES = [
    case("lr_explodes", "The learning rate was 1e30: the second step is not finite.",
         "weights have grown", trained(optim__lr=1e30, optim__warmup=0, plan=lora(1e30))),
    case("lr_diverges", "A rate a hundred times too high for LoRA.", AT_START + "learning rates are usual",
         trained(plan=lora(3.0), train__length=40), "far above"),
    case("lr_diverges_unchecked", "The same with --no-check.", IN_RUN + "the model is worse than before training",
         trained("--no-check", plan=IN_FULL, train__length=40)),
    case("run_lr_too_low", "A rate of 1e-9 for everything.", AT_START + "learning rates are usual",
         trained(plan=[{**rule, "lr": 1e-9} if "lr" in rule else rule for rule in plan()]), "far below"),
    case("run_lr_too_low_unchecked", "The same with --no-check.", "the training loss fell",
         trained("--no-check", plan=[{**rule, "lr": 1e-9} if "lr" in rule else rule for rule in plan()]), "hardly"),
    case("clipped_to_nothing_unchecked", "A limit of the norm of 1e-9, with SGD's habits in mind.",
         AT_START + "gradients are clipped", trained(optim__clip=1e-9), "at 1e-09"),
    case("overfitted", "Trained in full for 30 epochs of 8 rows, with --no-check.", "the held-out loss follows",
         lambda shop: run_of(shop.config(shop.data(rows=8), plan=IN_FULL_AT_1E_2, train__length="40 epochs",
                                         evaluate__every="5 epochs"), "--no-check"), "it turned"),
    case("forgotten", "Trained on one task alone; another one that the base could do is lost.",
         "no held-out task got worse", forgetting, "old/"),
    case("learned_by_heart", "60 epochs of 8 rows.", AT_START + "no source is read too often",
         lambda shop: run_of(shop.config(shop.data(rows=8), train__length="60 epochs", evaluate__every="10 epochs")),
         "60 times"),
    case("nan_in_base", "A weight of the vision tower is NaN.", "weights were not finite before this step",
         on_base(weights(one_nan_in_vision)), "vision"),
    case("float16_overflow", "A base whose projector leaves float16.", "float16 overflow in projector.linear_2",
         on_base(weights(huge_projector), train__precision="fp16")),
    case("pixels_of_nothing", "The image processor divides by a standard deviation of 0.", "the data: the images",
         on_base(image_processor(image_std=[0, 0, 0]))),
    case("little_to_learn", "Prompts of 1000 tokens with an answer of a word.",
         "there is something to learn in every source",
         on_data(long_and_short)),
    case("source_never_read", "A source got its weight when the run was over.", "every source was read", never_read,
         "second.jsonl"),
    case("most_rows_dropped", "max_length was cut down, and what is too long is dropped.", "most rows are used",
         mostly_dropped, "left out"),
    case("cut_checkpoint", "The disk was full while a checkpoint was copied.", "checkpoints are whole",
         afterwards(cut_checkpoint), "trained.safetensors is damaged"),
    case("all_checkpoints_damaged", "All checkpoints were copied with a failing disk.", "checkpoints are whole",
         afterwards(lost_checkpoints), "damaged"),
    case("other_versions", "transformers was upgraded since.", "the versions are those of the run",
         afterwards(other_versions), "transformers 4.49.0"),
]  # fmt: skip
