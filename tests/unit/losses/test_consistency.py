"""Replies that depend on the image: closed forms, the model's own logits, and which pictures are read."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from training_setup import encoder_of, png, write_data

from vlmtune.config import Config
from vlmtune.data.batch import batches_of, collate, tensors_of
from vlmtune.data.contrast import GREY, Contrast
from vlmtune.data.loader import Room, Steps
from vlmtune.data.mixture import Mixture
from vlmtune.data.sources import FileSource
from vlmtune.losses.consistency import Consistency, reply_means
from vlmtune.losses.objective import Objective
from vlmtune.models.load import load_model
from vlmtune.models.vlm import VLM, Supervised
from vlmtune.schedule import piecewise
from vlmtune.step import TrainingModule
from vlmtune.types import Batch, ImageRef, Kind, Sample, Text, Turn, supervised_mask


def always(progress: float) -> float:
    return 1.0


class Source:
    """A list as a source."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, index):
        return self.samples[index]


def asked(number: int, picture: int | None, reply: str, task: str = "vqa") -> Sample:
    image = () if picture is None else (ImageRef(png(picture)),)
    turns = (Turn("user", (*image, Text("what is it"))), Turn("assistant", (Text(reply),)))
    return Sample(f"s{number}", turns, task)


def states_of(rows: list[int], kinds: list[int]) -> Supervised:
    empty = torch.empty(0)
    return Supervised(empty, empty, torch.tensor(kinds), torch.tensor(rows), empty)


def test_closed_form():
    """Means over tokens of replies alone; a hinge, or the logistic loss, of their differences, summed over pairs."""
    reply, said = int(Kind.RESPONSE), int(Kind.INSTRUCTION)
    own = torch.tensor([1.0, 3.0, 9.0, 0.5], requires_grad=True)
    other = torch.tensor([2.5, 2.5, 1.0], requires_grad=True)
    states = states_of([0, 0, 0, 2], [reply, reply, said, reply])  # row 1 has no reply here
    others = states_of([0, 0, 1], [reply, reply, reply])
    batch = Batch({}, torch.zeros(3, 4), ["a"] * 3, ["0", "1", "2"], contrasted=[0, 2])
    gained = [2.5 - 2.0, 1.0 - 0.5]
    costs, total = Consistency("margin", always, 0.7)(own, states, other, others, batch)
    assert float(costs.detach()) == pytest.approx(2 * 0.2) and float(total) == pytest.approx(sum(gained))
    assert not total.requires_grad
    costs.backward()
    assert own.grad.tolist() == [0.5, 0.5, 0.0, 1.0] and other.grad.tolist() == [-0.5, -0.5, -1.0]
    costs, _ = Consistency("contrast", always)(own, states, other, others, batch)
    assert float(costs.detach()) == pytest.approx(sum(float(F.softplus(torch.tensor(-g))) for g in gained))


def test_no_gradient_beyond_the_margin():
    own, other = torch.tensor([0.1], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    states = states_of([0], [int(Kind.RESPONSE)])
    batch = Batch({}, torch.zeros(1, 2), ["a"], ["0"], contrasted=[0])
    costs, _ = Consistency("margin", always, 0.5)(own, states, other, states, batch)
    costs.backward()
    assert float(costs.detach()) == 0 and float(own.grad) == float(other.grad) == 0


# ---- in a step -------------------------------------------------------------------------------------------------------


def steps_of(encoder, data, micro: int, other: str = "another", tasks=None, batch: int = 6) -> Steps:
    source = FileSource(data)
    order = Mixture([source.size], [piecewise(1.0)], batch, seed=0)
    return Steps([source], order, encoder, batch, Room(micro), contrast=Contrast(other, tasks, always))


def gradients(model, batches: list[Batch], consistency: Consistency | None) -> tuple[float, dict, dict]:
    module = TrainingModule(VLM(model), Objective(consistency=consistency))
    model.zero_grad()
    weights = module.objective.weights(batches)
    total, terms = 0.0, {}
    for batch in batches:
        losses = module(batch, weights)
        losses.total.backward()
        total += float(losses.total.detach())
        terms = {name: terms.get(name, 0.0) + float(value) for name, value in losses.terms.items()}
    return total, terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", pytest.param("smolvlm", marks=pytest.mark.slow)])
def test_it_is_what_the_models_own_logits_say(family, tiny_folder, tmp_path):
    """Of both readings, by transformers' forward and log_softmax; and it does not depend on the micro-batches."""
    folder = tiny_folder(family)
    model, encoder = load_model(str(folder)).eval(), encoder_of(folder)
    data = write_data(tmp_path, 6)
    by_one, together = steps_of(encoder, data, 1)[0], steps_of(encoder, data, 6)[0]
    (whole,) = together
    assert sorted(whole.contrasted) == [row for row, id in enumerate(whole.sample_ids) if id != "s3"], "text alone"
    assert torch.equal(whole.contrast.inputs["input_ids"][0][: whole.kinds.shape[1]],
                       whole.inputs["input_ids"][whole.contrasted[0]][: whole.contrast.kinds.shape[1]])  # fmt: skip

    def likelihoods(batch: Batch) -> list[float]:
        with torch.no_grad():
            log = model(**batch.inputs, use_cache=False).logits.log_softmax(-1)[:, :-1]
        chosen = log.gather(2, batch.inputs["input_ids"][:, 1:, None])[..., 0]
        carries = supervised_mask(batch.kinds[:, 1:])
        return [float(row[mask].mean()) for row, mask in zip(chosen, carries, strict=True)]

    own, other = likelihoods(whole), likelihoods(whole.contrast)
    gained = [own[row] - theirs for row, theirs in zip(whole.contrasted, other, strict=True)]
    consistency = Consistency("margin", always, 0.5)
    plain, _, _ = gradients(model, together, None)
    total, terms, found = gradients(model, together, consistency)
    wanted = sum(max(0.0, 0.5 - gain) for gain in gained) / len(gained)
    # float32 sums of some tens of log-probabilities of order 5
    assert terms["consistency"] == pytest.approx(wanted, abs=1e-5) and total == pytest.approx(plain + wanted, abs=1e-5)
    assert terms["consistency/gain"] == pytest.approx(sum(gained) / len(gained), abs=1e-5)
    apart, _, same = gradients(model, by_one, consistency)
    assert apart == pytest.approx(total, rel=1e-5)
    for name, gradient in found.items():
        assert torch.allclose(gradient, same[name], atol=1e-5 * (1 + float(gradient.abs().max()))), name


def test_the_weight_is_a_schedule_and_0_reads_nothing_twice(tiny_folder, tmp_path):
    folder = tiny_folder("llava")
    encoder, data = encoder_of(folder), write_data(tmp_path, 6)
    steps = steps_of(encoder, data, 6)
    steps.contrast = Contrast("another", None, piecewise([[0, 0], [0.5, 0.3]]))
    (batch,) = steps[0]
    assert batch.contrast is None and batch.contrasted == []
    objective = Objective(consistency=Consistency("margin", piecewise([[0, 0], [0.5, 0.3]]), 0.5))
    assert [objective.weights([batch], progress).consistency for progress in (0.0, 0.5)] == [0.0, 0.3]


def test_a_saved_step_has_its_contrast(tiny_folder, tmp_path):
    """What `vlmtune doctor` runs again is the whole step."""
    batches = steps_of(encoder_of(tiny_folder("llava")), write_data(tmp_path, 6), 3)[0]
    again = batches_of(*tensors_of(batches))
    for before, after in zip(batches, again, strict=True):
        assert after.contrasted == before.contrasted and after.contrast.sample_ids == before.contrast.sample_ids
        assert all(torch.equal(after.contrast.inputs[name], value) for name, value in before.contrast.inputs.items())
        assert not torch.equal(before.contrast.inputs["pixel_values"],
                               before.inputs["pixel_values"][: len(before.contrasted)])  # fmt: skip


# ---- which pictures --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return encoder_of(tiny_folder("llava"))


def pictures_read(encoder, samples, number: int, other="another", tasks=None):
    """The pixels that a sample is read with besides its own; None: with none."""
    own = encoder.encode(samples[number])
    found = Contrast(other, tasks, always).encode(number, own, samples.__getitem__, len(samples), encoder)
    assert found is None or (torch.equal(found.ids, own.ids) and torch.equal(found.kinds, own.kinds))
    return None if found is None else found.pixels["pixel_values"]


def test_the_next_sample_with_another_picture_and_another_reply(encoder):
    samples = [asked(0, 1, "red"), asked(1, 1, "blue"), asked(2, 2, "red"), asked(3, None, "green"), asked(4, 3, "one")]
    own = [encoder.encode(sample).pixels.get("pixel_values") for sample in samples]
    # not 1 (the same picture), not 2 (the same reply), not 3 (no picture)
    assert torch.equal(pictures_read(encoder, samples, 0), own[4])
    assert torch.equal(pictures_read(encoder, samples, 1), own[2])
    assert torch.equal(pictures_read(encoder, samples, 4), own[0]), "the order of the step has no end"
    assert pictures_read(encoder, samples, 3) is None
    assert pictures_read(encoder, [samples[0], samples[2]], 0) is None, "nobody else says anything else"


def test_other_pictures_have_the_size_of_the_sample_s_own(tiny_folder):
    """A family whose tokens depend on the size of a picture has as many of them."""
    import io

    from PIL import Image

    encoder = encoder_of(tiny_folder("qwen2_5_vl"))
    file = io.BytesIO()
    Image.new("RGB", (200, 60), (10, 200, 30)).save(file, "PNG")
    wide = replace(asked(1, 1, "blue"), turns=(Turn("user", (ImageRef(file.getvalue()), Text("a"))),
                                               Turn("assistant", (Text("blue"),))))  # fmt: skip
    assert pictures_read(encoder, [asked(0, 1, "red"), wide], 0) is not None


def test_blank_pictures_and_tasks(encoder):
    samples = [asked(0, 1, "red"), asked(1, 2, "red", task="caption")]
    blank = pictures_read(encoder, samples, 0, "blank")
    per_channel = blank.flatten(2)
    assert torch.equal(per_channel.amin(-1), per_channel.amax(-1)) and len(set(GREY)) == 1
    assert pictures_read(encoder, samples, 0, "blank", frozenset({"caption"})) is None
    assert pictures_read(encoder, samples, 1, "blank", frozenset({"caption"})) is not None


def test_all_processes_choose_the_same(encoder):
    """A partner is looked for in the whole step, whoever has it."""
    samples = [asked(n, n, f"{n}") for n in range(6)]

    class Half:
        def of(self, drawn):
            return [1, 4]

    def step(share):
        order = [(0, n) for n in range(6)]

        class Order:
            def __getitem__(self, k):
                return order[k]

            def __len__(self):
                return 6

        found = Steps(
            [Source(samples)], Order(), encoder, 6, Room(6), share, contrast=Contrast("another", None, always)
        )
        (batch,) = found[0]
        return dict(zip(batch.contrast.sample_ids, batch.contrast.inputs["pixel_values"], strict=True))

    whole, half = step(None), step(Half())
    assert set(half) == {"s1", "s4"} and all(torch.equal(half[name], whole[name]) for name in half)


# ---- config ----------------------------------------------------------------------------------------------------------


@cache
def base_tree() -> dict:
    return {"model": "embedded", "run": "x", "data": {"train": [{"scenes": "new", "task": "vqa"}]},
            "plan": [{"match": "*", "train": "full"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"weight": -1}, "weight is below 0"),
        ({"weight": 0}, "0 all the time"),
        ({"by": "contrast", "margin": 1}, "margin means nothing with by: contrast"),
        ({"margin": 0}, "greater than 0"),
        ({"other": "mine"}, "another"),
        ({"tasks": []}, "at least 1"),
    ],
)
def test_wrong_wishes(wish, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        Config.model_validate(base_tree() | {"loss": {"consistency": wish}})


def test_reply_means_of_a_row_without_a_reply():
    assert reply_means(torch.ones(1), states_of([1], [int(Kind.RESPONSE)]), 3).tolist() == [0.0, 1.0, 0.0]


def test_memory_is_predicted_with_both_readings(tiny_folder, tmp_path):
    """The counted step keeps the activations of two forwards."""
    from training_setup import full_rules

    from vlmtune.adapt.counted_step import count_step
    from vlmtune.adapt.prediction import StepSettings
    from vlmtune.data.batch import with_contrast

    folder = tiny_folder("llava")
    model, encoder = load_model(str(folder)), encoder_of(folder)
    encoded = [encoder.encode(asked(n, n, "red")) for n in range(2)]
    batch = collate(encoded, encoder.pad_token_id)
    settings = StepSettings(
        precision="fp32", gradient_checkpointing=False, optimizer="adamw", double=False, micro_batches=1, device="cpu",
        packing=False, fused=False,
    )  # fmt: skip
    once, twice = (
        count_step(model.config, full_rules(model), b, settings)
        for b in (batch, with_contrast(batch, encoded, encoder.pad_token_id))
    )
    assert sum(twice.saved.values()) == pytest.approx(2 * sum(once.saved.values()), rel=0.05)
