"""Odd inputs on real (tiny) models, and on broken ones."""

from __future__ import annotations

import pytest
import torch

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.evaluate.edge_cases import edge_cases, run_case
from vlmtune.evaluate.speed import measure_speed
from vlmtune.models.load import load_model, load_processor


def of(folder) -> tuple:
    return load_model(str(folder)).eval(), Encoder(load_processor(str(folder)), coordinates("norm1000"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_every_case_is_answered_or_refused(tiny_folder, family):
    model, encoder = of(tiny_folder(family))
    markers = sorted(set(map(str, encoder.tokenizer.all_special_tokens)))
    cases = {case.name: case for case in edge_cases(encoder, 600, markers)}
    small = {name: case for name, case in cases.items() if "huge" not in name}
    outcomes = [run_case(model, encoder, case, "fp32") for case in small.values()]
    assert not [outcome for outcome in outcomes if outcome.how in ("broke", "not finite")]
    assert sum(outcome.how == "answered" for outcome in outcomes) >= 8
    longest = max(outcome.tokens for outcome in outcomes)
    assert 500 < longest <= 592, "the long prompt fills the context, less the room for a reply"


def test_as_many_images_as_fit(tiny_folder):
    _, encoder = of(tiny_folder("llava"))
    of_one = len(encoder.encode_prompt(edge_cases(encoder, None, [])[0].sample))
    names = [case.name for case in edge_cases(encoder, 3 * of_one, [])]
    counts = [name for name in names if name.endswith(("images", "1 image"))]
    assert counts and counts[0] != "8 images"
    assert "8 images" in [case.name for case in edge_cases(encoder, None, [])]
    assert not [name for name in (case.name for case in edge_cases(encoder, None, [])) if "prompt of" in name]


def test_weights_that_are_not_finite_are_seen(tiny_folder):
    model, encoder = of(tiny_folder("llava"))
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    case = edge_cases(encoder, None, [])[0]
    assert run_case(model, encoder, case, "fp32").how == "not finite"


def test_what_breaks_is_an_outcome(tiny_folder):
    model, encoder = of(tiny_folder("llava"))
    model.get_decoder().layers[0].mlp.down_proj = torch.nn.Linear(3, 3)
    outcome = run_case(model, encoder, edge_cases(encoder, None, [])[0], "fp32")
    assert outcome.how == "broke" and outcome.said.startswith("RuntimeError: ")


def test_speed_counts_tokens_that_were_made(tiny_folder, monkeypatch):
    """The clock advances one second per forward: a token costs one, the first too."""
    model, encoder = of(tiny_folder("llava"))
    clock = {"now": 0.0}
    model.register_forward_pre_hook(lambda *_: clock.update(now=clock["now"] + 1.0))
    monkeypatch.setattr("vlmtune.evaluate.speed.time.perf_counter", lambda: clock["now"])
    samples = [case.sample for case in edge_cases(encoder, None, [])[:2]]
    speed = measure_speed(model, encoder, samples, "fp32")
    assert (speed.first_token, speed.prepare, speed.prompts) == (1.0, 0.0, 2)
    assert speed.tokens_per_second == pytest.approx(1.0)
