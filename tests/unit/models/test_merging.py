"""Squares of image tokens averaged into one: by hand, with gradients, with a cache, without padding, in generation."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from training_setup import encoder_of, full_rules, gradient_gap, lora_rules, png

from vlmtune.adapt.plan import apply_plan
from vlmtune.checks.before import identity_findings
from vlmtune.checks.examine import pictures_of
from vlmtune.config import Config
from vlmtune.data.batch import collate
from vlmtune.data.complexity_rule import ComplexityRule, set_rule
from vlmtune.data.encode import Encoder
from vlmtune.data.feature_store import FeatureStore
from vlmtune.data.grounding import coordinates
from vlmtune.evaluate.edge_cases import Case, run_case
from vlmtune.evaluate.generate import generate, generate_replies
from vlmtune.evaluate.speed import measure_speed
from vlmtune.losses.objective import Objective
from vlmtune.models.batchnorm import SharedTower
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.merging import averaged, model_inputs, require_mergeable
from vlmtune.models.packing import use_packed_attention
from vlmtune.models.trunk import CachedVision
from vlmtune.models.vlm import VLM, evaluating
from vlmtune.prepare import _is_in_parts
from vlmtune.probe import Probe
from vlmtune.step import TrainingModule
from vlmtune.types import Batch, ImageRef, Kind, Sample, Text, Turn, VlmtuneError

FAMILIES = ("llava", "gemma3")
RULE = ComplexityRule("edges", 0.25, 0.02, 0.3)


def flat(colour: str) -> ImageRef:
    file = io.BytesIO()
    picture = Image.new("RGB", (80, 80), "white")
    picture.paste(Image.new("RGB", (30, 30), colour), (10, 20))
    picture.save(file, "PNG")
    return ImageRef(file.getvalue())


def conversation(name: str, *images: ImageRef) -> Sample:
    turns = (Turn("user", (*images, Text("what is it" + " then" * len(name)))), Turn("assistant", (Text(name),)))
    return Sample(name, turns)


SAMPLES = [
    conversation("simple", flat("red")),
    conversation("crowded", ImageRef(png(1))),
    conversation("text"),
    conversation("both ways", ImageRef(png(2)), flat("blue"), flat("red")),
]
MERGES = [2, 1, 1, 2, 2]


def with_rule(folder) -> Encoder:
    processor = load_processor(str(folder))
    set_rule(processor.image_processor, RULE)
    return Encoder(processor, coordinates("norm1000"))


def batch_of(encoder: Encoder, samples=SAMPLES) -> Batch:
    return collate([encoder.encode(sample) for sample in samples], encoder.pad_token_id)


@pytest.fixture
def made(tiny_folder, request):
    """(model, encoder with the rule, a batch of merged and other images) of a family."""
    folder = tiny_folder(getattr(request, "param", "llava"))
    encoder = with_rule(folder)
    return load_model(str(folder)), encoder, batch_of(encoder)


every_family = pytest.mark.parametrize("made", FAMILIES, indirect=True)


def by_hand(grid: torch.Tensor) -> torch.Tensor:
    """float[g / 2 * g / 2, D] of float[g * g, D], one token after another."""
    side = int(len(grid) ** 0.5)
    rows = []
    for top in range(0, side, 2):
        for left in range(0, side, 2):
            four = [grid[(top + down) * side + left + across] for down in (0, 1) for across in (0, 1)]
            rows.append(sum(four) / 4)
    return torch.stack(rows)


def paligemma() -> transformers.PaliGemmaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
        **sizes,
    }
    text = {"model_type": "gemma", "vocab_size": 100, "num_key_value_heads": 1, "head_dim": 8, **sizes}
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=99, projection_dim=16, hidden_size=16
    )
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


def paligemma_batch(merges: list[int]) -> Batch:
    """A row of each image; the first token after the image tokens and all behind are text."""
    counts = [16 // merge**2 for merge in merges]
    width = max(counts) + 6
    ids = torch.zeros(len(merges), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(counts):
        ids[row, : count + 6] = torch.tensor([99] * count + [2, 5, 6, 7, 8, 1])
        mask[row, : count + 6] = 1
    kinds = torch.where(mask.bool(), int(Kind.RESPONSE), int(Kind.PADDING)).to(torch.int8)
    kinds[ids == 99] = int(Kind.IMAGE)
    pixels = torch.randn(len(merges), 3, 56, 56, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "token_type_ids": torch.zeros_like(ids)}
    names = [str(row) for row in range(len(merges))]
    return Batch(inputs, kinds, ["t"] * len(merges), names, merges=merges)


@pytest.mark.parametrize("family", [*FAMILIES, "paligemma"])
def test_tokens_are_the_averages_written_by_hand(family, tiny_folder):
    if family == "paligemma":
        model, batch = paligemma(), paligemma_batch([2, 1, 2])
    else:
        model, batch = load_model(str(tiny_folder(family))).eval(), batch_of(with_rule(tiny_folder(family)))
        assert batch.merges == MERGES
    with torch.no_grad():
        own = model.base_model.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output
        wanted = [by_hand(grid) if side == 2 else grid for grid, side in zip(own, batch.merges, strict=True)]
        inputs = model_inputs(model, batch)
        found = inputs["mm_encoder_outputs"]["image"].pooler_output
        torch.testing.assert_close(found if isinstance(found, torch.Tensor) else torch.cat(found), torch.cat(wanted))
        assert "pixel_values" not in inputs and "pixel_values" in batch.inputs
        logits = model(**inputs).logits  # as many image tokens as there are places for them
    token = model.config.image_token_id
    assert int((batch.inputs["input_ids"] == token).sum()) == len(torch.cat(wanted))
    assert bool(torch.isfinite(logits).all())


def test_an_average_keeps_rows_and_columns():
    grid = torch.arange(16.0).view(16, 1)
    assert averaged(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(averaged(grid, 1), grid)


def test_nothing_merged_is_the_plain_call(made):
    """To the last bit: only the tower runs before the model and not in it."""
    model, _, _ = made
    plain = batch_of(encoder_of(model.config._name_or_path))
    assert plain.merges == [] and model_inputs(model, plain) is plain.inputs
    ones = Batch(plain.inputs, plain.kinds, plain.tasks, plain.sample_ids, merges=[1] * 5)
    with evaluating(model), torch.no_grad():
        assert torch.equal(model(**model_inputs(model, ones)).logits, model(**plain.inputs).logits)


@every_family
def test_rows_do_not_depend_on_each_other(made):
    """A sample of merged and other images in a padded batch has the states that it has alone."""
    model, encoder, batch = made
    with evaluating(model), torch.no_grad():
        together = VLM(model)(batch)
        for row, sample in enumerate(SAMPLES):
            alone = VLM(model)(batch_of(encoder, [sample]))
            torch.testing.assert_close(together.hidden[together.row == row], alone.hidden, atol=1e-5, rtol=1e-4)


@every_family
def test_gradients_reach_tower_and_projector(made):
    model, _, batch = made
    plan = apply_plan(model, full_rules(model), "base", seed=0)
    module = TrainingModule(VLM(model), Objective())
    module(batch, module.objective.weights([batch])).total.backward()
    for part in ("vision", "projector"):
        names = [name for name in plan.parameters if name.startswith(part)]
        assert names and any(bool(plan.parameters[name].grad.abs().max() > 0) for name in names)
    # a finite difference along the gradient of one tensor
    name = next(name for name in plan.parameters if name.startswith("projector") and name.endswith("weight"))
    parameter, step = plan.parameters[name], 1e-2
    direction = parameter.grad / parameter.grad.norm()

    def loss(by: float) -> float:
        with torch.no_grad():
            parameter.add_(by * direction)
            value = float(module(batch, module.objective.weights([batch])).total)
            parameter.sub_(by * direction)
        return value

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert slope == pytest.approx(float(parameter.grad.norm()), rel=0.05)


@every_family
def test_kept_features_are_merged_the_same(made, tmp_path):
    """States and gradients of the projector with features that were looked up, new and kept."""
    model, encoder, batch = made
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projector" in name)
    store = FeatureStore(tmp_path, 2**24)
    cached = VLM(model, CachedVision(model, store.put))

    def run(vlm: VLM, of: Batch):
        model.zero_grad(set_to_none=True)
        hidden = vlm(of).hidden
        hidden.square().sum().backward()
        return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with evaluating(model):
        states, gradients = run(VLM(model), batch)
        for _ in ("new", "kept"):
            looked_up = batch_of(encoder.looking_up(store))
            assert looked_up.merges == MERGES and "pixel_values" not in looked_up.inputs
            found, of_found = run(cached, looked_up)
            torch.testing.assert_close(found, states, rtol=0, atol=2e-5)
            assert gradient_gap(of_found, gradients) < 1e-4


def test_packed_is_padded(made):
    model, _, batch = made
    with evaluating(model), torch.no_grad():
        padded = VLM(model)(batch)
        use_packed_attention(model)
        packed = VLM(model)(batch)
    assert packed.packed is not None and padded.packed is None
    torch.testing.assert_close(packed.hidden, padded.hidden, atol=1e-5, rtol=1e-4)
    assert packed.targets.equal(padded.targets)


def test_one_tower_for_a_step_in_parts(made):
    """`batchnorm: sync`: features of all micro-batches at once, each image merged as its sample says."""
    model, encoder, whole = made
    parts = [batch_of(encoder, SAMPLES[:2]), batch_of(encoder, SAMPLES[2:])]
    with evaluating(model):
        tower = SharedTower(model)
        tower.begin(parts)
        found = [VLM(model)(tower.inputs(number, part)).hidden for number, part in enumerate(parts)]
        sum(states.square().sum() for states in found).backward()
        tower.finish()
        shared = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        states = VLM(model)(whole).hidden
        states.square().sum().backward()
    torch.testing.assert_close(torch.cat(found), states, atol=1e-5, rtol=1e-4)
    assert gradient_gap(shared, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}) < 1e-4


@every_family
def test_generation_of_a_batch_is_that_of_each_alone(made):
    model, encoder, _ = made
    prompts = [encoder.encode_prompt(sample) for sample in SAMPLES]
    assert [prompt.merges for prompt in prompts] == [[2], [1], [], [1, 2, 2]]
    with evaluating(model):
        together = generate(model, encoder, prompts, 6, 4)
        assert together == [generate(model, encoder, [prompt], 6, 1)[0] for prompt in prompts]
        # the first token is the one of a plain forward: later steps do not see the image again
        first = batch_of(encoder, SAMPLES[:1])
        prompt = collate(prompts[:1], encoder.pad_token_id)
        with torch.no_grad():
            logits = model(**model_inputs(model, prompt)).logits[0, -1]
    logits[sorted(encoder.image_token_ids)] = -torch.inf
    assert together[0].ids[0] == int(logits.argmax()) and first.merges == [2]


def test_speed_and_edge_cases_take_merged_images(made):
    model, encoder, _ = made
    with evaluating(model):
        speed = measure_speed(model, encoder, SAMPLES[:1], "fp32")
        assert speed.prompt_tokens == len(encoder.encode_prompt(SAMPLES[0]))
        assert run_case(model, encoder, Case("simple", SAMPLES[0]), "fp32").how == "answered"
        assert generate_replies(model, encoder, [], 4, 4) == []


def test_the_start_and_the_stored_samples_are_compared_with_merged_images(made, tmp_path):
    model, _, batch = made
    plan = apply_plan(model, lora_rules(model), "base", seed=0)
    (finding,) = identity_findings(model, plan, batch)
    assert finding.level == "pass"
    probe = Probe(batch)
    probe.save(tmp_path)
    assert Probe.load(tmp_path).losses(model, "fp32") == probe.losses(model, "fp32")


def test_images_find_their_samples(made):
    _, encoder, batch = made
    found = [(picture.sample, picture.number) for picture in pictures_of(batch, encoder.image_token_ids)]
    assert found == [("simple", 1), ("crowded", 1), ("both ways", 1), ("both ways", 2), ("both ways", 3)]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_families_without_one_grid_are_refused(tiny_folder):
    for family in ("llava", "gemma3"):
        require_mergeable(load_model(str(tiny_folder(family))))
    require_mergeable(paligemma())
    with torch.device("meta"):
        tiled = transformers.AutoModelForImageTextToText.from_config(transformers.LlavaNextConfig())
        packed = transformers.AutoModelForImageTextToText.from_config(
            transformers.LlavaConfig(vision_config=transformers.PixtralVisionConfig(num_hidden_layers=1))
        )
    for model in (tiled, packed):
        with pytest.raises(
            VlmtuneError, match="can neither be made smaller nor have their tokens merged; leave it out"
        ):
            require_mergeable(model)


def test_parts_of_a_model_are_refused():
    """The tower runs outside of the model's forward, where parts are gathered."""
    source = {"train": [{"path": "a.jsonl"}]}
    config = Config.model_validate(
        {"model": "m", "data": source, "plan": [{"match": "*", "train": "full"}], "train": {"length": 1, "shard": True}}
    )
    two = SimpleNamespace(size=2)
    with pytest.raises(
        VlmtuneError, match="data.complexity on images of one size needs a whole model in every process"
    ):
        _is_in_parts(config, None, None, torch.device("cpu"), two, merges_tokens=True)
    assert _is_in_parts(config, None, None, torch.device("cpu"), two, merges_tokens=False)
