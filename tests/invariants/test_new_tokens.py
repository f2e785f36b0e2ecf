"""New rows alone: the gradient of full training there, nothing elsewhere, and a resume to the last bit (B11, D6)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sizes_of_tests import by_default
from training_setup import (
    encode_all,
    extend,
    full_rules,
    gradient_gap,
    loss_and_gradients,
    make_trainer,
    micro_batches,
    snapshot,
    write_boxes,
)

from vlmtune.adapt.new_rows import merge_new_rows
from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.checkpoint import load_weights
from vlmtune.data.grounding import coordinates
from vlmtune.models.load import load_model
from vlmtune.models.tiny import FAMILIES
from vlmtune.optim.optimizer import optimizer_tensors
from vlmtune.types import VlmtuneError

NAMES = [*FAMILIES, "embedded"]  # tied: internvl, gemma3, embedded; the others have a head of their own
BINS1000, BINS = (coordinates(convention).tokens() for convention in ("bins1000", "bins"))


def tokens_for(name: str) -> list[str]:
    """The embedded model has the tags of boxes and regions already."""
    return [token for token in BINS1000 if name != "embedded" or token not in BINS] + ["<found>"]


@pytest.fixture(scope="session")
def boxes(tmp_path_factory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("boxes"), 8)


def rules_with(table: Policy, language: Policy = Policy("full", lr=1e-2)):  # noqa: B008  frozen
    """`table` on embedding and head, tower frozen, the rest as said."""

    def rules(model) -> list[tuple[str, Policy]]:
        wishes = {"embed": table, "lm_head": table, "vision": Policy("frozen"), "language": language}
        return [(part, wishes.get(part, Policy("full", lr=1e-2))) for part, _ in full_rules(model)]

    return rules


ROWS = Policy("new_rows", lr=1e-2, weight_decay=0.5)
LORA = Policy("lora", lr=1e-2, rank=4, alpha=8.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_full_training_in_these_rows(name, model_folder, boxes):
    """Second source: everything of the tables trains, and the gradient is cut to the new rows afterwards."""
    found = {}
    for table in (ROWS, Policy("full", lr=1e-2)):
        model, encoder, new = extend(model_folder(name), tokens_for(name), "bins1000")
        batches = micro_batches(encoder, encode_all(encoder, boxes), 3)
        assert all(bool((batch.inputs["input_ids"] >= new.first).any()) for batch in batches)
        apply_plan(model, rules_with(table)(model), "base", 0, new)
        found[table.train] = loss_and_gradients(model, batches)
    (loss, rows), (full_loss, full) = found["new_rows"], found["full"]
    assert loss == pytest.approx(full_loss, rel=1e-6)
    expected = {
        name.replace(".weight", ".new_rows.weight") if name in ("embed.weight", "lm_head.weight") else name: (
            value[new.rows] if name in ("embed.weight", "lm_head.weight") else value
        )
        for name, value in full.items()
    }
    assert bool(rows["embed.new_rows.weight"].any())
    assert gradient_gap(rows, expected) < 1e-4  # the same sums in another order, float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", [Policy("full", lr=1e-2), LORA], ids=["full", "lora"])
def test_old_rows_are_bit_identical_after_training(name, language, model_folder, boxes, tmp_path):
    """With weight decay, AdamW's moments and clipping; every new row that the data uses has moved, each its own way."""
    setup = make_trainer(
        model_folder(name), boxes, tmp_path, rules_with(ROWS, language), total_steps=4, clip=0.01,
        new_tokens=tokens_for(name), convention="bins1000",
    )  # fmt: skip
    old = load_model(str(model_folder(name)))
    seen = torch.cat([sample.ids for sample in encode_all(setup.encoder, boxes)]).unique()
    setup.trainer.fit()
    assert all("lora_" in n or n.startswith(("embed.new_rows", "lm_head.new_rows", "projector", "language"))
               for n in setup.plan.parameters)  # fmt: skip
    new = setup.plan.new_tokens
    merge_new_rows(setup.model)
    for table, base in (
        (setup.model.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (setup.model.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert torch.equal(table[: new.first], base[: new.first])
        used = table[seen[seen >= new.first]]
        assert len(used) > 10 and len(used.unique(dim=0)) == len(used)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "embedded"])
def test_a_resume_is_exact_and_the_checkpoint_holds_the_rows_only(name, model_folder, boxes, tmp_path):
    def trainer(folder: str, steps: int = 6):
        return make_trainer(
            model_folder(name), boxes, tmp_path / folder, rules_with(ROWS, LORA), steps, checkpoint_every=3,
            new_tokens=tokens_for(name), convention="bins1000",
        )  # fmt: skip

    straight = trainer("straight")
    straight.trainer.fit()
    resumed = trainer("resumed")
    resumed.trainer.resume(tmp_path / "straight" / "step_000003")
    resumed.trainer.fit()
    one, other = snapshot(straight.model), snapshot(resumed.model)
    assert set(one) == set(other) and [key for key in one if not torch.equal(one[key], other[key])] == []
    one, other = (optimizer_tensors(setup.trainer.optimizer) for setup in (straight, resumed))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    count = len(tokens_for(name))
    rows = {key: value for key, value in one.items() if key.startswith(("embed", "lm_head")) and "/exp" in key}
    assert rows and all(len(value) == count for value in rows.values())
    described = json.loads((tmp_path / "resumed" / "latest" / "state.json").read_text())
    assert described["new_tokens"]["texts"] == tokens_for(name)


@pytest.mark.parametrize("name", by_default((), ["llava", "internvl", "embedded"]))
def test_a_fresh_process_computes_the_same(name, model_folder, boxes, tmp_path):
    """Base + checkpoint in a new Python: logits to the last bit."""
    setup = make_trainer(
        model_folder(name), boxes, tmp_path / "c", rules_with(ROWS, LORA), 3, checkpoint_every=3,
        new_tokens=tokens_for(name), convention="bins1000",
    )  # fmt: skip
    setup.trainer.fit()
    expected = logits_of(setup.model, setup.encoder, boxes)
    here = str(Path(__file__).parent)
    script = (
        f"import sys; sys.path[:0] = {[here, *sys.path]!r}\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\nfrom test_new_tokens import reload_logits\n"
        "from safetensors.torch import save_file\n"
        f"logits = reload_logits({name!r}, Path({str(model_folder(name))!r}), Path({str(boxes)!r}), "
        f"Path({str(tmp_path / 'c' / 'latest')!r}))\n"
        f"save_file({{'logits': logits}}, {str(tmp_path / 'logits.safetensors')!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def reload_logits(name: str, folder: Path, data: Path, checkpoint: Path) -> torch.Tensor:
    model, encoder, new = extend(folder, tokens_for(name), "bins1000")
    plan = apply_plan(model, rules_with(ROWS, LORA)(model), "base", 1, new)
    load_weights(checkpoint, model, plan)
    return logits_of(model, encoder, data)


@torch.no_grad()
def logits_of(model, encoder, data: Path) -> torch.Tensor:
    (batch,) = micro_batches(encoder, encode_all(encoder, data), 8)
    return model.eval()(**batch.inputs, use_cache=False).logits[batch.inputs["attention_mask"].bool()]


def test_a_checkpoint_of_other_new_tokens_is_refused(model_folder, boxes, tmp_path):
    """The same number of rows, but they belong to other tokens."""
    setup = make_trainer(
        model_folder("llava"),
        boxes,
        tmp_path,
        rules_with(ROWS),
        2,
        new_tokens=tokens_for("llava"),
        convention="bins1000",
    )
    setup.trainer.fit()
    model, _, new = extend(model_folder("llava"), tokens_for("llava")[::-1], "bins1000")
    plan = apply_plan(model, rules_with(ROWS)(model), "base", 0, new)
    with pytest.raises(VlmtuneError, match="its new tokens have other rows than they would get now"):
        load_weights(tmp_path / "latest", model, plan)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_bfloat16_products_and_recomputed_activations(name, model_folder, boxes, tmp_path):
    """One step under autocast with gradient checkpointing: float32 rows, with the gradient that merged tables have."""
    gradients = {}
    for table in (ROWS, Policy("full", lr=1e-2)):
        setup = make_trainer(
            model_folder(name), boxes, tmp_path / table.train, rules_with(table), 2, gradient_checkpointing=True,
            precision="bf16", new_tokens=tokens_for(name), convention="bins1000",
        )  # fmt: skip
        setup.trainer.optimizer.zero_grad = lambda: None  # keep what the step computed
        setup.trainer.train_step(next(iter(setup.trainer.steps(0, 1))))
        gradients[table.train] = {n: p.grad for n, p in setup.plan.parameters.items()}
    rows = gradients["new_rows"]["embed.new_rows.weight"]
    full = gradients["full"]["embed.weight"][setup.plan.new_tokens.rows]
    assert rows.dtype == torch.float32 and bool(rows.any())
    # clipped by different norms; bfloat16 has 8 bits
    cosine = torch.nn.functional.cosine_similarity(rows.flatten(), full.flatten(), dim=0)
    assert float(cosine) > 0.999
