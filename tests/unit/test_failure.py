"""A step that was not finite: diagnosed in place, saved as it was, read back (SPEC F5)."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from training_setup import (
    encode_all,
    encoder_of,
    extend,
    full_rules,
    lora_rules,
    micro_batches,
    write_boxes,
    write_data,
)

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.build_loss import last_shared_block
from vlmtune.checkpoint import restore_rng, rng_state
from vlmtune.checks.examine import Picture, pictures_of
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.failure import Diagnosis, diagnose, draw, failure_name, load_failure, save_failure
from vlmtune.losses.balance import GradNorm, InitialLosses
from vlmtune.losses.exposure import Exposure
from vlmtune.losses.objective import Objective
from vlmtune.losses.referring import HeadBoxLoss
from vlmtune.models.batchnorm import SharedTower
from vlmtune.models.load import load_processor
from vlmtune.models.readouts import attach_readouts
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.models.vocabulary import embedding_rows
from vlmtune.step import TrainingModule
from vlmtune.types import Batch, ImageRef, Kind, Sample, Text, Turn, VlmtuneError

RECORD = {
    "step": 3, "progress": 0.25, "precision": "fp16", "scale": 65536.0, "lr": {"language": 1e-3},
    "norm_history": [{"total": 2.0, "language": 1.0}, {"total": float("inf"), "language": float("nan")}],
    "loss_history": [1.5, float("-inf")], "what": "gradient of language",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tiny_folder) -> Encoder:
    return encoder_of(tiny_folder("llava"))


@pytest.fixture(scope="module")
def step(encoder, tmp_path_factory) -> list[Batch]:
    """Two micro-batches of two samples; the last sample has no image."""
    encoded = encode_all(encoder, write_data(tmp_path_factory.mktemp("data"), 4))
    return micro_batches(encoder, encoded, 2)


class Setting:
    """A training module on tiny llava, and a diagnosis of a step with it."""

    def __init__(
        self, folder: Path, encoder: Encoder, step: list[Batch], plan="full", objective=None, heads=(), new=()
    ):
        torch.manual_seed(0)
        self.model, _, tokens = extend(folder, new, "norm1000")
        if heads:
            attach_readouts(self.model, heads, 0)
        rules = full_rules(self.model) if plan == "full" else lora_rules(self.model, dropout=0.5)
        if new:
            rules = [(part, Policy("new_rows", lr=1e-3) if part in ("embed", "lm_head") else p) for part, p in rules]
        self.plan = apply_plan(self.model, rules, str(folder), 0, tokens)
        set_training_mode(self.model)
        self.module = TrainingModule(VLM(self.model), objective(self.plan) if objective else Objective())
        self.encoder, self.step, self.tower = encoder, step, None

    def diagnose(self, precision: str = "fp32", scale: float = 1.0, rng: dict | None = None, **more) -> Diagnosis:
        weights = self.module.objective.weights(self.step)
        told = {"norm_history": [], "loss_history": [], "lr": {}, "tower": self.tower} | more
        return diagnose(
            self.model, self.module, self.step, weights, precision, scale, rng or rng_state(), **told,
            vocabulary_size=embedding_rows(self.model), encoder=self.encoder,
        )  # fmt: skip


@pytest.fixture
def setting(tiny_folder, encoder, step) -> Setting:
    return Setting(tiny_folder("llava"), encoder, [clone(batch) for batch in step])


def clone(batch: Batch) -> Batch:
    return dataclasses.replace(batch, inputs={k: v.clone() for k, v in batch.inputs.items()}, kinds=batch.kinds.clone())


def same(one: Batch, other: Batch) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    return (
        one.inputs.keys() == other.inputs.keys()
        and all(equal(value, other.inputs[name]) for name, value in one.inputs.items())
        and equal(one.kinds, other.kinds)
        and (one.tasks, one.sample_ids) == (other.tasks, other.sample_ids)
        and len(one.regions) == len(other.regions)
        and all(
            a == b
            and (m.at, m.list_of, m.is_answer, m.image) == (n.at, n.list_of, n.is_answer, n.image)
            and all(equal(getattr(m, part), getattr(n, part)) for part in ("box", "patches", "mask"))
            for (a, m), (b, n) in zip(one.regions, other.regions, strict=True)
        )
    )


# ---- diagnosis ---------------------------------------------------------------------------------------------------


def test_the_sentence_has_place_cause_and_remedy(setting):
    setting.step[1].inputs["pixel_values"].view(-1)[5] = float("nan")
    found = setting.diagnose()
    assert found.micro_batch == 1 and found.samples == ("s2", "s3")
    assert found.sentence == (
        "input pixel_values: 1 of 9,408 values NaN; first read by vision.embeddings.patch_embedding (Conv2d); most "
        "probable: the data: the images (image 1 of sample s2: 1 of 9,408 values NaN); open that file and mend it, or "
        "leave its row out."
    )
    assert found.findings == [*found.causes, *found.examined]


def test_the_same_random_numbers_are_drawn_again(tiny_folder, encoder, step):
    """Dropout of a half: what overflows with one mask does not with most others."""
    setting = Setting(tiny_folder("llava"), encoder, step[:1], "lora")

    class Rare(nn.Module):
        """Infinite for one mask in many."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (torch.rand(()) > 0.2).float()

    language = setting.model.model.language_model
    language.norm = nn.Sequential(language.norm, Rare())
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        rng = rng_state()
        total = setting.module(step[0], setting.module.objective.weights(step[:1])).total
        seen.add(is_finite := bool(torch.isfinite(total.detach())))
        torch.manual_seed(99)
        found = setting.diagnose(rng=rng)
        assert (found.origin is None) == is_finite
        if not is_finite:
            assert found.origin.module == "language.norm.1"
    assert seen == {True, False}


def test_a_scale_that_is_too_large(setting):
    """2^40 x a gradient of about 1 overflows in float16 products, a scale of 1 does not."""
    found = setting.diagnose("fp16", 2.0**40)
    assert found.origin.kind == "gradient" and found.origin.module == "lm_head"  # its products are in float16
    assert found.causes[0].what == "the loss scale is too large for this batch"
    assert setting.diagnose("fp16", 2.0**8).origin is None


def test_gradients_whose_norm_alone_overflows(setting):
    """Squares of 1e25 do not fit in float32."""
    found = setting.diagnose("fp32", 1e25)
    assert found.origin.kind == "sum" and "their norm is not" in found.origin.detail
    assert found.micro_batch is None


def test_histories_reach_the_causes(setting):
    setting.model.lm_head.weight.data.mul_(1e38).mul_(40)  # finite still; products are not
    calm = [{"lm_head": 1.0, "total": 1.0}] * 5
    found = setting.diagnose(
        norm_history=[*calm, {"lm_head": 1e4, "total": 1e4}], loss_history=[3.0], lr={"lm_head": 9}
    )
    assert found.origin.module == "lm_head"
    assert "training was diverging" in [cause.what for cause in found.causes]


def test_what_the_objective_gathers_is_left_alone(tiny_folder, encoder, step):
    """GradNorm keeps gradients of the step, scheduled sampling draws: the rerun must not add to them."""

    def objective(plan) -> Objective:
        initial = InitialLosses(["caption", "vqa"], 1, {"caption": 2.0, "vqa": 2.0})
        return Objective(
            balance=GradNorm(initial, last_shared_block(plan)),
            exposure=Exposure(lambda _: 0.5, encoder.image_token_ids),
        )

    setting = Setting(tiny_folder("llava"), encoder, step, "lora", objective)
    balance = setting.module.objective.balance
    for batch in step:
        setting.module(batch, setting.module.objective.weights(step))
    before = {task: [g.clone() for g in parts] for task, parts in balance._gradients.items()}
    assert before
    assert setting.diagnose().origin is None
    assert all(
        torch.equal(a, b) for t, parts in balance._gradients.items() for a, b in zip(parts, before[t], strict=True)
    )
    setting.model.lm_head.weight.data.fill_(float("nan"))
    assert setting.diagnose().origin.parameter == "lm_head.weight"


def test_statistics_of_a_tower_that_trains_are_put_back(embedded_folder, tmp_path):
    encoder = Encoder(load_processor(str(embedded_folder)), coordinates("bins"))
    encoded = encode_all(encoder, write_data(tmp_path, 2))
    setting = Setting(embedded_folder, encoder, micro_batches(encoder, encoded, 2))
    assert setting.model.model.vision_tower.stem_norm.training
    setting.step[0].inputs["pixel_values"].view(-1)[0] = float("inf")
    before = {name: buffer.clone() for name, buffer in setting.model.named_buffers()}
    assert setting.diagnose().origin.kind == "inputs"
    assert all(torch.equal(buffer, before[name]) for name, buffer in setting.model.named_buffers())


def test_a_tower_that_sees_all_images_of_the_step(embedded_folder, tmp_path):
    """batchnorm: sync: the rerun is of the whole step, forward, backward and the tower's own backward at the end."""
    encoder = Encoder(load_processor(str(embedded_folder)), coordinates("bins"))
    encoded = encode_all(encoder, write_data(tmp_path, 3))
    setting = Setting(embedded_folder, encoder, micro_batches(encoder, encoded, 1))
    setting.tower = SharedTower(setting.model)
    before = {name: buffer.clone() for name, buffer in setting.model.named_buffers()}
    assert setting.diagnose().origin is None
    block = setting.model.model.vision_tower.blocks[2]
    forward = block.forward
    block.forward = lambda x: Bad.apply(forward(x))
    found = setting.diagnose().origin
    assert (found.kind, found.module, found.operation) == ("gradient", "vision.layers.2", "BadBackward")
    del block.forward
    block.project_norm.weight.data[0] = float("inf")
    assert setting.diagnose().origin.parameter == "vision.layers.2.project_norm.weight"
    block.project_norm.weight.data[0] = 1.0
    setting.step[1].inputs["pixel_values"].view(-1)[9] = float("nan")
    found = setting.diagnose()
    assert (found.origin.kind, found.origin.module) == ("inputs", "vision.stem") and found.micro_batch is None
    assert found.causes[0].evidence.startswith("image 1 of sample s1: ")
    assert all(torch.equal(buffer, before[name]) for name, buffer in setting.model.named_buffers())


class Bad(torch.autograd.Function):
    """Finite forward, NaN backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def test_text_alone_where_only_the_tower_trains(tiny_folder, encoder):
    """Its loss reaches nothing that trains: no backward, and no fault."""
    sample = Sample("t", (Turn("user", (Text("how many"),)), Turn("assistant", (Text("two"),))))
    setting = Setting(tiny_folder("llava"), encoder, [collate([encoder.encode(sample)], encoder.pad_token_id)])
    for name, parameter in setting.plan.parameters.items():
        parameter.requires_grad_(name.startswith("vision"))
    assert setting.diagnose().origin is None


@pytest.mark.parametrize("part", ["embed", "lm_head"])
def test_new_rows(tiny_folder, step, encoder, part):
    """An embedding in a wrapper: its rows are counted, and its parts are named."""
    setting = Setting(tiny_folder("llava"), encoder, [clone(batch) for batch in step], new=["<red>", "<blue>"])
    first = next(n for n in sorted(setting.plan.parameters) if n.startswith(part))
    assert first == f"{part}.new_rows.weight"
    assert embedding_rows(setting.model) == setting.plan.new_tokens.first + 2
    setting.step[0].inputs["input_ids"][0, 1] = setting.plan.new_tokens.first + 1  # a token that has such a row
    assert setting.diagnose().origin is None
    setting.plan.parameters[first].data[1, 0] = float("nan")
    found = setting.diagnose().origin
    assert (found.kind, found.module, found.parameter) == ("weights", f"{part}.new_rows", first)


@pytest.mark.parametrize("with_boxes", [True, False])
def test_read_outs_and_their_terms(tiny_folder, tmp_path, with_boxes):
    """A head that runs, a head that no box of the batch calls, and a target that is not finite."""
    folder = tiny_folder("qwen3_vl")
    encoder = Encoder(load_processor(str(folder)), coordinates("norm1000"), reads_regions=True)
    data = write_boxes(tmp_path, 2) if with_boxes else write_data(tmp_path, 2)
    batch = collate(encode_all(encoder, data), encoder.pad_token_id)
    setting = Setting(folder, encoder, [batch], "full", lambda plan: Objective(terms=[HeadBoxLoss()]), ["box"])
    assert setting.diagnose().origin is None
    setting.model.heads["box"].out.bias.data[1] = float("nan")
    found = setting.diagnose().origin
    assert (found.kind, found.module, found.parameter) == ("weights", "heads.box.out", "heads.box.out.bias")
    setting.model.heads["box"].out.bias.data[1] = 0.0
    if with_boxes:
        batch.regions[1][1].box[2] = float("inf")
        found = setting.diagnose()
        origin = found.origin  # scipy's matching refuses such a box
        assert (origin.kind, origin.module, origin.layer) == ("inputs", "objective.terms.0", "HeadBoxLoss")
        assert origin.detail == "input box: 1 of 4 values infinite"
        assert found.causes[0].evidence == "box of sample b1: 1 of 4 values infinite"


def test_a_diagnosis_survives_json(setting):
    setting.model.lm_head.weight.data[3, 3] = float("inf")
    found = setting.diagnose()
    assert found.origin.broken == ("lm_head.weight",)
    assert Diagnosis.of_record(json.loads(json.dumps(found.record()))) == found
    setting.model.lm_head.weight.data[3, 3] = 0.0
    sound = setting.diagnose()
    assert Diagnosis.of_record(json.loads(json.dumps(sound.record()))) == sound


# ---- on disk -----------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, step, encoder, setting):
    broken = [clone(batch) for batch in step]
    broken[0].inputs["pixel_values"].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    setting.step = broken
    found, rng = setting.diagnose(), rng_state()
    folder = tmp_path / "failures" / failure_name(4)
    save_failure(folder, broken, RECORD, rng, found, encoder)
    assert folder.name == "step_000004"
    again = load_failure(folder)
    assert len(again.micro_batches) == 2
    assert all(same(a, b) for a, b in zip(again.micro_batches, broken, strict=True))
    assert again.rng == rng and again.diagnosis == found
    assert {key: again.record[key] for key in ("step", "progress", "scale", "lr", "what")} == {
        key: RECORD[key] for key in ("step", "progress", "scale", "lr", "what")
    }
    assert str(again.record["norm_history"]) == str(RECORD["norm_history"]), "not finite numbers come back"
    assert again.record["loss_history"] == RECORD["loss_history"]
    restore_rng(again.rng)  # every generator takes it
    json.loads((folder / "failure.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN
    assert {path.name for path in folder.iterdir()} == {"batch.safetensors", "failure.json", "samples.txt", "images"}


def test_regions_are_saved_too(tmp_path, tiny_folder):
    processor = load_processor(str(tiny_folder("qwen2_5_vl")))
    encoder = Encoder(processor, coordinates("norm1000"), reads_regions=True)
    batch = collate(encode_all(encoder, write_boxes(tmp_path / "data", 3)), encoder.pad_token_id)
    assert batch.regions
    save_failure(tmp_path / "f", [batch], RECORD, rng_state())
    assert same(load_failure(tmp_path / "f").micro_batches[0], batch)


def test_saving_again_replaces_and_leaves_the_checkpoint(tmp_path, step, encoder):
    folder = tmp_path / "f"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "state.json").write_text("{}")
    save_failure(folder, step, RECORD, rng_state(), encoder=encoder)
    assert len(list((folder / "images").iterdir())) == 3
    save_failure(folder, step[1:], RECORD, rng_state(), encoder=encoder)
    assert len(load_failure(folder).micro_batches) == 1
    assert len(list((folder / "images").iterdir())) == 1
    assert load_failure(folder).checkpoint == folder / "checkpoint"
    assert (folder / "checkpoint" / "state.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["failure.json", "batch.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "one byte"])
def test_a_damaged_file_is_named(tmp_path, step, name, how):
    folder = tmp_path / "f"
    save_failure(folder, step, RECORD, rng_state())
    path = folder / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(VlmtuneError, match=name):
        load_failure(folder)


def test_another_format_is_refused(tmp_path, step):
    save_failure(tmp_path / "f", step, RECORD, rng_state())
    path = tmp_path / "f" / "failure.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(VlmtuneError, match="format 2, not 1"):
        load_failure(tmp_path / "f")


def test_an_incomplete_record_is_an_error_of_the_program(tmp_path, step):
    with pytest.raises(ValueError, match="lacks lr, loss_history"):
        save_failure(tmp_path / "f", step, {k: v for k, v in RECORD.items() if k not in ("lr", "loss_history")}, {})


def test_samples_are_readable(tmp_path, step, encoder):
    broken = [clone(step[0])]
    row, place = 1, int((broken[0].kinds[1] == Kind.RESPONSE).nonzero()[0])
    broken[0].inputs["input_ids"][row, place] = 10**6
    save_failure(tmp_path / "f", broken, RECORD, rng_state(), encoder=encoder)
    text = (tmp_path / "f" / "samples.txt").read_text()
    assert "micro-batch 1, sample s0, task caption" in text
    assert "  instruction  what is there\n" in text and "  response      red</s>\n" in text
    assert "⟨image × 16⟩" in text and "⟨ids [1000000]⟩" in text


# ---- images ------------------------------------------------------------------------------------------------------

CORNERS = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (255, 255, 0)}
"""(right, bottom) -> colour of that quarter."""


def quarters(width: int, height: int) -> bytes:
    image = Image.new("RGB", (width, height))
    for (right, bottom), colour in CORNERS.items():
        image.paste(colour, (right * width // 2, bottom * height // 2, (right + 1) * width // 2, height))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drawn(encoder: Encoder, width: int, height: int) -> tuple[Picture, Image.Image]:
    """The last tile of an image, which is the whole of it where it is cut, and what is drawn of it."""
    user = Turn("user", (ImageRef(quarters(width, height)), Text("what is there")))
    encoded = encoder.encode(Sample("q", (user, Turn("assistant", (Text("red"),)))))
    picture = pictures_of(collate([encoded], encoder.pad_token_id), encoder.image_token_ids)[-1]
    return picture, draw(picture, encoder.processor.image_processor)


@pytest.mark.parametrize("size", [(112, 56), (56, 112), (64, 64)])
def test_images_come_back_in_their_colours(tiny_folder, family, size):
    _, image = drawn(encoder_of(tiny_folder(family)), *size)
    for (right, bottom), colour in CORNERS.items():
        # a third from the corner: inside that quarter, whatever was cropped to a square or resized
        place = (image.width * (1 + right) // 3, image.height * (1 + bottom) // 3)
        seen = image.getpixel(place)
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= 8, (place, seen)  # resizing and rounding


def test_pixels_that_are_not_finite_are_magenta(encoder):
    picture, _ = drawn(encoder, 64, 64)
    picture.values[1, 10, 20] = float("inf")
    image = draw(picture, encoder.processor.image_processor)
    assert image.getpixel((20, 10)) == (255, 0, 255)
    assert sum(image.getpixel((x, y)) == (255, 0, 255) for x in range(56) for y in range(56)) == 1
