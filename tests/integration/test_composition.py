"""Every balance with every further term, weights by kind and accumulation: the same step, however it is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sizes_of_tests import by_default
from training_setup import gradient_gap

from vlmtune.build import load_base
from vlmtune.build_loss import wanted_readouts
from vlmtune.config import Config
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import BinTokens, coordinates
from vlmtune.data.scenes import SceneRecipe
from vlmtune.losses.balance import Balance, ByTokens, Fixed, GradNorm, InitialLosses, InverseInitial, Uncertainty
from vlmtune.losses.boxes import BoxLoss
from vlmtune.losses.objective import Objective
from vlmtune.losses.referring import HeadBoxLoss, ReferringLoss
from vlmtune.losses.weights import TokenWeights
from vlmtune.models.vlm import VLM
from vlmtune.schedule import piecewise
from vlmtune.step import TrainingModule

TASKS = ["caption", "grounding", "referring"]
INITIAL = {"caption": 2.0, "grounding": 1.0, "referring": 0.5}
BALANCES: dict[str, Callable[[list], Balance]] = {
    "tokens": lambda shared: ByTokens(),
    "fixed": lambda shared: Fixed({"caption": 0.2, "grounding": 1.0, "referring": 0.5}),
    "inverse": lambda shared: InverseInitial(InitialLosses(TASKS, 10, INITIAL)),
    "uncertainty": lambda shared: Uncertainty(TASKS),
    "gradnorm": lambda shared: GradNorm(InitialLosses(TASKS, 10, INITIAL), shared, 1.5),
}


@pytest.fixture(scope="module")
def base():
    tree = {"train": [{"scenes": "base", "task": "caption"}]}
    plan = [{"match": "*", "train": "full"}]
    config = Config(model="embedded", data=tree, plan=plan, loss={"referring": {}, "box": {"read": "head"}})
    assert wanted_readouts(config) == {"box", "mask"}
    loaded = load_base(config)
    encoder = Encoder(loaded.processor, coordinates("bins"), reads_regions=True)
    recipe = SceneRecipe("base")
    samples = [encoder.encode(recipe.sample(TASKS[n % 3], n, "train")) for n in range(6)]
    loaded.model.eval()
    return loaded.model, encoder, samples


def by_tokens(encoder: Encoder) -> BoxLoss:
    token_id = encoder.tokenizer.convert_tokens_to_ids
    convention = encoder.coordinates
    assert isinstance(convention, BinTokens)
    values = {token_id(token): value for token, value in convention.numbers().items()}
    return BoxLoss(values, token_id("<box>"), token_id("</box>"))


@pytest.mark.parametrize("balance", by_default(["gradnorm"], BALANCES))
@pytest.mark.parametrize("box", ["tokens", "head"])
def test_a_step_is_the_same_however_it_is_cut(base, balance, box):
    """Loss to 1e-5 and gradients to 1e-3 of their largest entry: other orders of some thousand float32 terms."""
    model, encoder, samples = base
    shared = [p for name, p in model.named_parameters() if ".layers.5." in name]
    box_loss = by_tokens(encoder) if box == "tokens" else HeadBoxLoss()
    weights = TokenWeights({"box": piecewise(2.0), "instruction": piecewise(0.1)})
    results = []
    for size in (6, 2, 1):
        objective = Objective(weights, BALANCES[balance](shared), [box_loss, ReferringLoss()])
        module = TrainingModule(VLM(model), objective)
        model.zero_grad()
        batches = [collate(samples[n : n + size], encoder.pad_token_id) for n in range(0, 6, size)]
        step = objective.weights(batches, 0.5)
        total = 0.0
        for batch in batches:
            loss = module(batch, step).total
            loss.backward()
            total += float(loss.detach())
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        results.append((total, gradients))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        assert gradient_gap(results[0][1], gradients) < 1e-3
    assert any(name.startswith("vlm.model.heads.mask") for name in results[0][1])
