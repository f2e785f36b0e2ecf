"""New tokens are whole, ordinary tokens; their rows are the mean; nothing shrinks and nothing else changes (D6)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vlmtune.data.grounding import coordinates
from vlmtune.models.load import load_model, load_processor, save_processor
from vlmtune.models.vocabulary import NewTokens, add_tokens
from vlmtune.types import VlmtuneError

BINS = coordinates("bins1000").tokens()


@pytest.fixture
def base(tiny_folder, family):
    folder = str(tiny_folder(family))
    return load_model(folder), load_processor(folder).tokenizer


@pytest.fixture
def llava(tiny_folder):
    folder = str(tiny_folder("llava"))
    return load_model(folder), load_processor(folder).tokenizer


def tables(model) -> list[nn.Parameter]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def test_rows_are_the_mean_and_old_rows_are_untouched(base):
    model, tokenizer = base
    before = [table.detach().clone() for table in tables(model)]
    others = {n: p.detach().clone() for n, p in model.named_parameters() if not any(p is t for t in tables(model))}
    size, was_tied = len(tokenizer), tables(model)[0] is tables(model)[1]
    new = add_tokens(model, tokenizer, BINS)
    assert (new.first, len(new), len(tokenizer)) == (size, 1008, size + 1008)
    assert (tables(model)[0] is tables(model)[1]) == was_tied
    for old, table in zip(before, tables(model), strict=True):
        assert table.shape == (size + 1008, 64) and torch.equal(table[:size], old)
        mean = old.double().mean(0)  # the second source: plain, in float64
        torch.testing.assert_close(table[size:].double(), mean.expand(1008, -1), rtol=0, atol=1e-8)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in others.items())
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embed.num_embeddings == head.out_features == model.config.get_text_config().vocab_size == size + 1008


def test_the_shapes_are_those_of_transformers_own_resize(base, tiny_folder, family):
    model, tokenizer = base
    add_tokens(model, tokenizer, BINS)
    theirs = load_model(str(tiny_folder(family)))
    theirs.resize_token_embeddings(len(tokenizer))
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    assert model.config.to_dict() == theirs.config.to_dict()


def test_tokens_are_whole_and_stay_in_plain_text(base, tiny_folder, family, tmp_path):
    """Also after saving, with plain transformers, where special tokens are skipped."""
    _, tokenizer = base
    processor = load_processor(str(tiny_folder(family)))
    model = load_model(str(tiny_folder(family)))
    new = add_tokens(model, processor.tokenizer, [*BINS, "<found>"])
    save_processor(processor, str(tiny_folder(family)), tmp_path)
    text = "the <found> is at <box><loc_000><loc_025><loc_500><loc_999></box>"
    for tokens in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        rows = [i - new.first for i in ids if i >= new.first]
        assert [new.texts[row] for row in rows] == ["<found>", "<box>", "<loc_000>", "<loc_025>", "<loc_500>",
                                                    "<loc_999>", "</box>"]  # fmt: skip
        assert tokens.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("spare", [0, 1, 5, 40])
def test_rows_to_spare_are_used_first_and_nothing_shrinks(spare, llava):
    """A vocabulary padded by `spare` rows, for 5 new tokens: the mean takes no part of the padding."""
    model, tokenizer = llava
    size = len(tokenizer)
    model.resize_token_embeddings(size + spare, mean_resizing=False)
    with torch.no_grad():
        for table in tables(model):
            table[size:] = 1e3
    before = [table.detach().clone() for table in tables(model)]
    add_tokens(model, tokenizer, [f"<n{i}>" for i in range(5)])
    for old, table in zip(before, tables(model), strict=True):
        assert len(table) == size + max(spare, 5)
        torch.testing.assert_close(table[size : size + 5], old[:size].mean(0).expand(5, -1), rtol=0, atol=1e-7)
        assert torch.equal(table[:size], old[:size]) and torch.equal(table[size + 5 :], old[size + 5 :])


def test_a_bias_of_the_head_grows_too(llava):
    model, tokenizer = llava
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.arange(len(tokenizer), dtype=torch.float32))
    add_tokens(model, tokenizer, ["<a>", "<b>"])
    middle = (head.out_features - 3) / 2
    assert head.bias[-2:].tolist() == [middle, middle] and head(torch.zeros(64)).shape == (len(tokenizer),)


def test_the_mean_of_bfloat16_rows_is_taken_in_float32(llava):
    """bfloat16 cannot count beyond 256: a sum of ones kept in it would stay there."""
    model, tokenizer = llava
    model.to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1.0)
    add_tokens(model, tokenizer, ["<a>"])
    assert model.get_input_embeddings().weight[-1].tolist() == [1.0] * 64


def test_the_grown_model_is_saved_and_loads_plainly(base, tiny_folder, family, tmp_path):
    """Equal logits on a text with new tokens, from plain `from_pretrained` and `AutoProcessor`."""
    model, _ = base
    processor = load_processor(str(tiny_folder(family)))
    add_tokens(model, processor.tokenizer, BINS)
    with torch.no_grad():
        for table in tables(model):
            table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    save_processor(processor, str(tiny_folder(family)), tmp_path)
    again, tokenizer = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    ids = tokenizer.tokenizer("a box <box><loc_000><loc_999></box>", return_tensors="pt")["input_ids"]
    assert int((ids >= len(processor.tokenizer) - 1008).sum()) == 4
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_nothing_asked_nothing_done(llava):
    model, tokenizer = llava
    size = len(tokenizer)
    assert add_tokens(model, tokenizer, []) == NewTokens() and not NewTokens()
    assert len(tokenizer) == size == len(tables(model)[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["<a>", "<a>"], "'<a>' is asked for twice; remove one"),
        (["</s>"], r"'</s>' is in the tokenizer already \(id \d+\); remove it"),
        (["circle me"], "'circle me' is empty or holds white space"),
        (["a\u00a0b"], "holds white space"),
        ([""], "'' is empty or holds white space"),
        (["my<image>"], "'my<image>': '<image>' is part of the added token 'my<image>'"),
        (["imag"], "'imag': 'imag' is part of the added token '<image>'"),
        (["<loc", "<loc_1>"], "'<loc' is part of the added token '<loc_1>'.* another spelling"),
        (["<é>"], "does not keep the new token '<é>' whole .* plain ASCII"),
    ],
)
def test_what_is_refused(texts, message, llava):
    with pytest.raises(VlmtuneError, match=message):
        add_tokens(*llava, texts)
