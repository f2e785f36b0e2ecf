"""`train: new_rows`: the plan around it, the modules, and what is refused (B11, D6)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_setup import encode_all, extend, full_rules, micro_batches, write_boxes

from vlmtune.adapt.new_rows import EmbeddingWithNewRows, HeadWithNewRows, merge_new_rows
from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.data.grounding import coordinates
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.load import load_model
from vlmtune.types import VlmtuneError

TOKENS = [*coordinates("bins1000").tokens(), "<found>"]
ROWS, FROZEN = Policy("new_rows", lr=1e-3, weight_decay=0.1), Policy("frozen")


def is_tied(model: nn.Module) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def rules_of(model: nn.Module, **wishes: Policy) -> list[tuple[str, Policy]]:
    """One rule per part: new rows in embedding and head, the rest frozen, unless wished otherwise."""
    wishes = {"embed": ROWS, "lm_head": ROWS} | wishes
    return [(part, wishes.get(part, FROZEN)) for part, _ in full_rules(model)]


@pytest.fixture
def extended(tiny_folder, family):
    return extend(tiny_folder(family), TOKENS, "bins1000")


@pytest.fixture
def llava(tiny_folder):
    return extend(tiny_folder("llava"), TOKENS, "bins1000")


def test_only_the_new_rows_are_parameters_that_train(extended):
    model, _, new = extended
    tied = is_tied(model)
    plan = apply_plan(model, rules_of(model), "base", 0, new)
    names = ["embed.new_rows.weight"] + ([] if tied else ["lm_head.new_rows.weight"])
    assert sorted(plan.parameters) == names
    assert all(p.shape == (1009, 64) for p in plan.parameters.values())
    assert (model.get_output_embeddings().new_rows.weight is model.get_input_embeddings().new_rows.weight) == tied
    trains = {n for n, p in canonical_parameters(model).items() if p.requires_grad}
    assert trains == set(names)
    groups = plan.optimizer_groups()
    assert sorted(n for group in groups for n in group["names"]) == names
    assert all((group["lr"], group["weight_decay"]) == (1e-3, 0.1) for group in groups)


def test_the_table_counts_the_new_rows(llava):
    model, _, new = llava
    plan = apply_plan(model, rules_of(model), "base", 0, new)
    rows = {row["part"]: row for row in plan.rows}
    for part in ("embed", "lm_head"):
        row = rows[part]
        assert (row["method"], row["trainable"], row["lr"]) == ("new_rows 1009", 1009 * 64, 1e-3)
        assert row["examples"] == [f"{part}.new_rows.weight"]
    assert {row["method"] for part, row in rows.items() if part not in ("embed", "lm_head")} == {"frozen"}


@torch.no_grad()
def test_wrapped_computes_what_merged_computes(extended, tmp_path):
    """With random rows, on samples that use them; scaled embeddings (Gemma) too. Then plain modules are back."""
    model, encoder, new = extended
    (batch,) = micro_batches(encoder, encode_all(encoder, write_boxes(tmp_path, 4)), 4)
    before, keys = model.eval()(**batch.inputs).logits, list(model.state_dict())
    plan = apply_plan(model, rules_of(model), "base", 0, new)
    assert torch.equal(model(**batch.inputs).logits[..., : new.first], before[..., : new.first])
    for n, parameter in enumerate(plan.parameters.values()):
        parameter.normal_(generator=torch.Generator().manual_seed(n))
    wrapped = model(**batch.inputs).logits
    assert isinstance(model.get_input_embeddings(), EmbeddingWithNewRows)
    assert isinstance(model.get_output_embeddings(), HeadWithNewRows)
    merge_new_rows(model)
    assert list(model.state_dict()) == keys and type(model.get_output_embeddings()) is nn.Linear
    merged = model(**batch.inputs).logits
    scale = float(merged.abs().max())
    assert float((wrapped - before).abs().max()) > 0.01 * scale
    # two products of [n, D] and [V, D] instead of one: float32 rounding
    assert float((wrapped - merged).abs().max()) < 1e-5 * scale
    assert is_tied(model) == is_tied(load_model(model.name_or_path))


def test_a_bias_of_the_head_trains_with_its_rows():
    head = nn.Linear(3, 6)
    wrapped = HeadWithNewRows(head, slice(3, 5))
    hidden = torch.randn(2, 7, 3)
    plain = head(hidden)
    assert torch.allclose(wrapped(hidden), plain)
    wrapped(hidden).sum().backward()
    assert wrapped.new_rows.bias.grad.tolist() == [14.0, 14.0] and wrapped.new_rows.weight.shape == (2, 3)
    with torch.no_grad():
        wrapped.new_rows.bias += 1
    assert torch.allclose(wrapped.merge()(hidden) - plain, torch.tensor([0.0, 0, 0, 1, 1, 0]), atol=1e-6)


def test_the_first_new_row_is_not_taken_for_padding():
    """`padding_idx` counts in rows of the base: row 0 of the small table must still get its gradient."""
    wrapped = EmbeddingWithNewRows(nn.Embedding(6, 3, padding_idx=0), slice(4, 6))
    wrapped(torch.tensor([[0, 4, 5, 5]])).sum().backward()
    assert wrapped.new_rows.weight.grad.tolist() == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"embed": FROZEN}, r"'embed' says frozen, but 1009 new tokens have rows in embed; .* Say train: new_rows"),
        ({"lm_head": FROZEN}, r"'lm_head' says frozen, but 1009 new tokens have rows in lm_head"),
        ({"language": ROWS}, r"'language' says new_rows, but covers language\..*; only embed and lm_head"),
        ({"embed": Policy("lora", lr=1e-3)}, r"'embed' asks for LoRA, but covers no linear module"),
    ],
)
def test_what_makes_no_sense_is_refused(wishes, message, llava):
    model, _, new = llava
    with pytest.raises(VlmtuneError, match=message):
        apply_plan(model, rules_of(model, **wishes), "base", 0, new)


def test_new_rows_without_new_tokens_are_refused(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    with pytest.raises(VlmtuneError, match=r"'embed' says new_rows, but this run adds no token .* data.new_tokens"):
        apply_plan(model, rules_of(model), "base", 0)


def test_other_methods_may_train_the_tables(llava):
    """Full embedding beside new rows in the head; nothing is wrapped that trains as a whole."""
    model, _, new = llava
    plan = apply_plan(model, rules_of(model, embed=Policy("full", lr=1e-3)), "base", 0, new)
    assert sorted(plan.parameters) == ["embed.weight", "lm_head.new_rows.weight"]
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_lora_on_the_head_can_tell_new_tokens_apart(llava):
    """Its base rows are all alike, B's rows are not: allowed."""
    model, _, new = llava
    plan = apply_plan(model, rules_of(model, lm_head=Policy("lora", lr=1e-3, rank=4)), "base", 0, new)
    assert sorted(plan.parameters) == ["embed.new_rows.weight", "lm_head.lora_A.weight", "lm_head.lora_B.weight"]
