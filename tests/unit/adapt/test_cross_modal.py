"""Cross-modal adapters: text sees the image features of its own sample, those before it, and nothing else (SPEC C4)."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from adapter_setup import (
    NAMES,
    SAMPLES,
    Case,
    adapter_parameters,
    check_a_fresh_process_loads_it,
    check_all_parameters_learn,
    check_checkpointing_changes_no_gradient,
    check_identity,
    check_off_is_base,
    check_save_and_load,
    decoder_targets,
    folder_of,
    greedy_without_cache,
    inject,
    logits_of,
    loss_of,
    pack,
    sample,
    shake,
    tuner_layers,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vlmtune.adapt.bottleneck import BottleneckConfig
from vlmtune.adapt.cross_modal import CrossModalConfig, CrossModalLayer, ImageContext, Images
from vlmtune.adapt.prefix import PrefixConfig
from vlmtune.data.batch import collate
from vlmtune.evaluate.generate import generate_replies
from vlmtune.models.anatomy import anatomy_of, canonical_parameters, part_of
from vlmtune.types import VlmtuneError

PACKABLE = ["qwen2_5_vl", "qwen3_vl", "smolvlm", "llava", "internvl"]
"""Families whose own attention keeps the documents of a packed row apart (shared notes: Gemma 3's does not)."""


@pytest.fixture(scope="module")
def case(tiny_folder, embedded_folder):
    cases: dict[str, Case] = {}

    def of(name: str) -> Case:
        return cases.setdefault(name, Case(folder_of(name, tiny_folder, embedded_folder)))

    return of


def config_of(children=("self_attn", "mlp"), **more):
    return lambda model: CrossModalConfig(
        **{"dim": 8, "heads": 2, "target_modules": decoder_targets(model, children)} | more
    )


def adapted(here: Case, scale: float = 0.3, **more) -> nn.Module:
    model = here.model()
    return shake(inject(model, config_of(**more)(model)), scale)


def effect(model: nn.Module, batch) -> Tensor:
    """float[tokens, vocabulary]: what the adapters change in the logits."""
    on = logits_of(model, batch)
    for layer in tuner_layers(model):
        layer.enable_adapters(False)
    off = logits_of(model, batch)
    for layer in tuner_layers(model):
        layer.enable_adapters(True)
    return on - off


@pytest.mark.parametrize("name", NAMES)
def test_step_0_is_the_base_model(name, case):
    model = check_identity(case(name), config_of())
    assert {type(layer) for layer in tuner_layers(model)} == {CrossModalLayer}
    assert {part_of(n) for n, p in canonical_parameters(model).items() if p.requires_grad} == {"language"}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name, case):
    check_all_parameters_learn(case(name), config_of())


@pytest.mark.parametrize("name", NAMES)
def test_switched_off_is_the_base_model(name, case):
    check_off_is_base(case(name), config_of())


def test_saved_is_loaded(family, case, tmp_path):
    expected = check_save_and_load(case(family), config_of(), tmp_path)
    if family == "internvl":
        check_a_fresh_process_loads_it(case(family), "vlmtune.adapt.cross_modal", tmp_path, expected)


@pytest.mark.parametrize("children", [("self_attn",), ("mlp",), ("self_attn", "mlp")], ids=str)
def test_checkpointing_changes_no_gradient(family, children, case):
    check_checkpointing_changes_no_gradient(case(family), config_of(children))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_the_features_reach_the_projector(name, case):
    """Against a finite difference along the gradient, in float64: what the adapter reads is not cut off the graph."""
    here = case(name)
    model = adapted(here).double()
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in here.batch.inputs.items()}
    batch = replace(here.batch, inputs=inputs)
    projector = [p for n, p in canonical_parameters(model).items() if part_of(n) == "projector"]
    for parameter in projector:
        parameter.requires_grad_(True)
    loss_of(model, batch).backward()
    gradients = [p.grad for p in projector]
    size = float(sum((g**2).sum() for g in gradients)) ** 0.5
    moved = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for parameter, gradient in zip(projector, gradients, strict=True):
                parameter.add_(gradient, alpha=step / size)
            moved.append(float(loss_of(model, batch)))
            for parameter, gradient in zip(projector, gradients, strict=True):
                parameter.sub_(gradient, alpha=step / size)
    # the loss is taken in float32: steps of 1e-4 leave about three digits
    assert (moved[0] - moved[1]) / 2e-4 == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_keeps_its_samples_apart(name, case):
    """Another sample's pixels change nothing in mine; my own do; the order of the batch is no matter."""
    here = case(name)
    model = adapted(here)
    first, text, two, last = SAMPLES
    mask = here.batch.inputs["attention_mask"].bool()
    row = torch.arange(len(SAMPLES)).unsqueeze(1).expand_as(mask)[mask]
    before = logits_of(model, here.batch)
    changed = logits_of(model, here.collate([first, text, sample(12, 13), last]))
    assert torch.equal(before[row != 2], changed[row != 2])
    assert not torch.allclose(before[row == 2], changed[row == 2], atol=1e-3)
    turned = logits_of(model, here.collate([last, two, text, first]))
    lengths = [int(n) for n in mask.sum(1)]
    back = torch.cat(list(reversed(turned.split(lengths[::-1]))))
    assert float((back - before).abs().max()) < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_added_where_there_is_no_image(name, case):
    """Exactly zero: for a sample without image, beside samples with some or not, and before the first image."""
    here = case(name)
    model = adapted(here)
    mask = here.batch.inputs["attention_mask"].bool()
    row = torch.arange(len(SAMPLES)).unsqueeze(1).expand_as(mask)[mask]
    added = effect(model, here.batch)
    assert torch.isfinite(added).all()
    assert float(added[row == 1].abs().max()) == 0.0
    is_image = (here.batch.inputs["input_ids"] == model.config.image_token_id)[mask]
    for number in (0, 2, 3):
        mine, image = added[row == number], is_image[row == number]
        until = int(image.nonzero()[0])
        assert float(mine[:until].abs().max()) == 0.0
        assert float(mine[int(image.nonzero()[-1]) + 1 :].abs().max()) > 0.01
    alone = effect(model, here.collate([SAMPLES[1], sample(question="and here")]))
    assert float(alone.abs().max()) == 0.0


def test_without_any_image_every_parameter_has_a_gradient(family, case):
    """Distributed training waits for each of them: zero, but there."""
    here = case(family)
    model = adapted(here)
    loss_of(model, here.collate([SAMPLES[1]])).backward()
    gradients = [p.grad for p in adapter_parameters(model).values()]
    assert all(g is not None and float(g.abs().max()) == 0.0 for g in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_a_later_image_changes_nothing_before_it(name, case):
    here = case(name)
    model = adapted(here)
    one, other = here.collate([sample(2, 3)]), here.collate([sample(2, 33)])
    ids = one.inputs["input_ids"][0]
    starts = (ids == model.config.image_token_id).nonzero().flatten()
    second = int(starts[len(starts) // 2])  # both images have the same number of placeholders
    before, changed = logits_of(model, one), logits_of(model, other)
    assert torch.equal(before[:second], changed[:second])
    assert not torch.allclose(before[second:], changed[second:], atol=1e-3)
    swapped = logits_of(model, here.collate([sample(22, 3)]))
    assert not torch.allclose(before[second:], swapped[second:], atol=1e-3)


@pytest.mark.parametrize("name", [*PACKABLE, "embedded"])
@torch.no_grad()
def test_a_packed_row_keeps_its_documents_apart(name, case):
    here = case(name)
    model = adapted(here)
    first, text, two, last = SAMPLES

    def packed(samples):
        row, lengths = pack(model, here, samples)
        return model(**row, use_cache=False).logits[0].split(lengths)

    before = packed([first, two, text, last])
    changed = packed([sample(11), two, text, last])
    assert all(torch.equal(before[n], changed[n]) for n in (1, 2, 3))
    assert not torch.allclose(before[0], changed[0], atol=1e-3)
    changed = packed([first, sample(12, 13), text, last])
    assert all(torch.equal(before[n], changed[n]) for n in (0, 2, 3))
    for mine, single in zip(before, [first, two, text, last], strict=True):
        alone = logits_of(model, here.collate([single]))
        assert float((mine - alone).abs().max()) < 1e-4 * float(alone.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name, case):
    here = case(name)
    model = adapted(here)
    together = logits_of(model, here.batch)
    alone = torch.cat([logits_of(model, here.collate([s])) for s in SAMPLES])
    # other shapes, other kernels: float32 rounding through the layers
    assert float((together - alone).abs().max()) < 1e-4 * float(alone.abs().max())


@torch.no_grad()
def test_an_image_that_is_padding_is_nobodys(case):
    """A masked dummy image, which keeps the vision tower busy on every rank, adds nothing to the text behind it."""
    here = case("llava")
    model = adapted(here)
    batch = here.collate([SAMPLES[0]])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    hidden = mask.masked_fill(ids == model.config.image_token_id, 0)
    batch.inputs["attention_mask"] = hidden
    assert float(effect(model, batch).abs().max()) == 0.0
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None] & hidden.bool()[:, None, None]
    for square in (causal, torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)):
        by_2d = model(**batch.inputs, use_cache=False).logits[hidden.bool()]
        by_4d = model(**batch.inputs | {"attention_mask": square}, use_cache=False).logits[hidden.bool()]
        torch.testing.assert_close(by_4d, by_2d, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_in_a_padded_batch_is_teacher_forcing(name, case):
    here = case(name)
    model = here.model()
    prompts = [here.encoder.encode_prompt(s) for s in SAMPLES]
    base = generate_replies(model, here.encoder, prompts, 6, batch_size=4)
    shake(inject(model, config_of()(model)), scale=1.0)
    replies = generate_replies(model, here.encoder, prompts, 6, batch_size=4)
    assert replies == [greedy_without_cache(model, here, s, 6) for s in SAMPLES]
    assert replies != base
    with_gradients = model.generate.__wrapped__(
        model,
        **collate(prompts[:1], here.encoder.pad_token_id, side="left").inputs,
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=sorted(here.encoder.image_token_ids),
        eos_token_id=sorted(here.encoder.stop_token_ids()),
    )
    width = len(prompts[0])
    assert here.encoder.decode(with_gradients[0, width:].tolist()) == replies[0]


@torch.no_grad()
def test_a_second_image_in_the_middle_of_a_cached_conversation(case):
    """The cache's features and the new ones together: as if the conversation had been read at once."""
    here = case("llava")
    model = adapted(here)
    batch = here.collate([sample(2, 3)])
    ids, pixels = batch.inputs["input_ids"], batch.inputs["pixel_values"]
    placeholders = (ids[0] == model.config.image_token_id).nonzero().flatten()
    cut = int(placeholders[len(placeholders) // 2 - 1]) + 2
    whole = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    begin = model(input_ids=ids[:, :cut], pixel_values=pixels[:1], use_cache=True)
    rest = model(input_ids=ids[:, cut:], pixel_values=pixels[1:], past_key_values=begin.past_key_values)
    torch.testing.assert_close(torch.cat([begin.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beam_search_and_static_caches_keep_the_features(case):
    here = case("llava")
    model = shake(inject(here.model(), config_of()(here.model())), scale=1.0)
    prompts = [here.encoder.encode_prompt(s) for s in SAMPLES]
    inputs = collate(prompts, here.encoder.pad_token_id, side="left").inputs
    suppress = sorted(here.encoder.image_token_ids)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=suppress)
    static = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, suppress_tokens=suppress, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert torch.equal(plain, static)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "suppress_tokens": suppress}
    together = model.generate(**inputs, **options)
    without = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(together, without)


@torch.no_grad()
def test_what_the_adapter_cannot_know_is_refused(case):
    here = case("llava")
    model = here.model()
    batch = here.collate(SAMPLES[:1])
    cache = model(**batch.inputs, use_cache=True).past_key_values
    inject(model, config_of()(model))
    with pytest.raises(VlmtuneError, match="cache was filled by a model without this adapter"):
        model(input_ids=batch.inputs["input_ids"][:, -1:], past_key_values=cache)
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    with pytest.raises(VlmtuneError, match="without input_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(VlmtuneError, match="without the model around it"):
        model.get_decoder()(inputs_embeds=embeds)
    logits_of(model, batch)


def test_nothing_stays_after_a_step(case):
    """Neither with nor without checkpointing, nor after an error in the middle of a pass."""
    here = case("qwen2_5_vl")
    model = adapted(here)
    model.activation_checkpointing_enable()
    model.train()
    loss = loss_of(model, here.batch)
    loss.backward()
    del loss
    assert _images_in_memory() == 0
    generate_replies(model.eval(), here.encoder, [here.encoder.encode_prompt(SAMPLES[0])], 3, 1)
    with pytest.raises(Exception, match=r"."):
        model(**here.batch.inputs | {"pixel_values": here.batch.inputs["pixel_values"][:1]})
    assert _images_in_memory() == 0


def _images_in_memory() -> int:
    gc.collect()
    return sum(isinstance(thing, Images) for thing in gc.get_objects())


def test_a_copy_is_a_model_of_its_own(case):
    here = case("smolvlm")
    base_keys = set(here.model().state_dict())
    model = adapted(here)
    expected = logits_of(model, here.batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, here.batch), expected)
    contexts = [{id(layer.context) for layer in tuner_layers(m)} for m in (model, twin)]
    assert len(contexts[0]) == len(contexts[1]) == 1 and contexts[0] != contexts[1]
    shake(twin, seed=6)
    assert not torch.equal(logits_of(twin, here.batch), expected)
    assert torch.equal(logits_of(model, here.batch), expected)
    ours = set(model.state_dict()) - {k.replace(".mlp.", ".mlp.base_layer.").replace(
        ".self_attn.", ".self_attn.base_layer.") if ".text_model.layers." in k else k for k in base_keys}  # fmt: skip
    assert all("crossmodal_" in key for key in ours) and len(ours) == len(adapter_parameters(model))


def test_unloading_takes_the_hooks_off(case):
    here = case("internvl")
    base = here.model()
    expected, hooks = logits_of(base, here.batch), _hooks(base)
    model = get_peft_model(base, config_of()(base))
    shake(model)
    with pytest.raises(VlmtuneError, match="keep and load the adapter folder"):
        model.merge_and_unload()
    assert _hooks(base) > hooks
    plain = model.unload()
    assert _hooks(plain) == hooks and tuner_layers(plain) == []
    assert torch.equal(logits_of(plain, here.batch), expected)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_a_second_adapter_shares_the_context(case):
    here = case("llava")
    model = here.model()
    inject(model, CrossModalConfig(dim=8, target_modules=decoder_targets(model, ["mlp"], "0")), "one")
    hooks = _hooks(model)
    inject(model, CrossModalConfig(dim=4, target_modules=decoder_targets(model, ["mlp"], "1")), "two")
    assert _hooks(model) == hooks
    assert len({id(layer.context) for layer in tuner_layers(model)}) == 1


def test_all_kinds_in_one_model(family, case):
    """LoRA, bottleneck, prefix and cross-modal on disjoint modules: each has an effect, each learns."""
    here = case(family)
    model = here.model()
    inject(model, LoraConfig(r=2, target_modules=decoder_targets(model, ["self_attn"], "0") + r"\.q_proj"), "a")
    inject(model, BottleneckConfig(dim=4, target_modules=decoder_targets(model, ["mlp"], "0")), "b")
    inject(model, PrefixConfig(length=3, target_modules=decoder_targets(model, ["self_attn"], "1")), "c")
    inject(model, CrossModalConfig(dim=8, target_modules=decoder_targets(model, ["mlp"], "1")), "d")
    shake(model)
    everything = logits_of(model, here.batch)
    assert len(tuner_layers(model)) == 4
    for layer in tuner_layers(model):
        layer.enable_adapters(False)
        assert not torch.allclose(logits_of(model, here.batch), everything, atol=1e-4), type(layer).__name__
        layer.enable_adapters(True)
    loss_of(model, here.batch).backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapter_parameters(model).values())
    assert torch.equal(logits_of(model, here.batch), everything)
    prompts = [here.encoder.encode_prompt(s) for s in SAMPLES]
    replies = generate_replies(model, here.encoder, prompts, 4, 4)
    assert replies == [greedy_without_cache(model, here, s, 4) for s in SAMPLES]


def test_cross_modal_around_prefix_around_bottleneck(case):
    """Three of ours on one attention module: the innermost is still found."""
    here = case("qwen3_vl")
    model = here.model()
    target = decoder_targets(model, ["self_attn"])
    for name, config in (
        ("a", BottleneckConfig(dim=4, target_modules=target)),
        ("b", PrefixConfig(length=3, target_modules=target)),
        ("c", CrossModalConfig(dim=8, target_modules=target)),
    ):
        inject(model, config, name)
    shake(model)
    logits = logits_of(model, here.batch)
    assert torch.isfinite(logits).all()
    assert len(canonical_parameters(model)) == len(list(model.named_parameters()))


@pytest.mark.parametrize("target", ["input_layernorm", "mlp.down_proj"])
def test_only_sublayers_of_the_language_model(target, case):
    model = case("llava").model()
    with pytest.raises(VlmtuneError, match="is not the attention or feed-forward module"):
        inject(model, CrossModalConfig(target_modules=decoder_targets(model, [target])))
    tower = rf"{anatomy_of(model).vision_layers}\.\d+\.mlp"
    with pytest.raises(VlmtuneError, match="vision_tower.* is not the attention or feed-forward module"):
        inject(model, CrossModalConfig(target_modules=tower))


def test_a_context_belongs_to_a_pass():
    with pytest.raises(VlmtuneError, match="without the model around it"):
        ImageContext(5).current  # noqa: B018


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"heads": 0}, {"heads": 3}, {"dim": "8"}], ids=str)
def test_wrong_values(wrong):
    (name,) = wrong
    with pytest.raises(VlmtuneError, match=name):
        CrossModalConfig(**wrong)
