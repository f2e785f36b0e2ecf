"""Fisher traces against autograd's own per-sample gradients, and a model that nobody touched (SPEC F2)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_setup import encode_all, encoder_of, micro_batches, snapshot, write_data

from vlmtune.adapt import fisher
from vlmtune.adapt.fisher import fisher_traces, linear_modules, squared_gradient_norm
from vlmtune.data.batch import collate
from vlmtune.models.load import load_model
from vlmtune.models.vlm import VLM
from vlmtune.types import Batch, Kind, VlmtuneError

ROWS = 5  # one of them without an image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture
def model(tiny_folder, family) -> nn.Module:
    return load_model(str(tiny_folder(family)))


@pytest.fixture
def batches(tiny_folder, family, data) -> list[Batch]:
    encoder = encoder_of(tiny_folder(family))
    return micro_batches(encoder, encode_all(encoder, data), 1)


@pytest.fixture
def llava(tiny_folder) -> nn.Module:
    return load_model(str(tiny_folder("llava")))


@pytest.fixture
def llava_batches(tiny_folder, data) -> list[Batch]:
    encoder = encoder_of(tiny_folder("llava"))
    return micro_batches(encoder, encode_all(encoder, data), 1)


def by_autograd(model: nn.Module, batches: list[Batch], modules: dict[str, nn.Module], mean: bool = False) -> dict:
    """The second source: weights that ask for gradients, one backward per sample, squares of what comes.

    A head tied to the embedding is untied first: its module's gradient is that through the head alone.
    """
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for module in modules.values():
        module.requires_grad_(True)
    totals = dict.fromkeys(modules, 0.0)
    for batch in batches:
        model.zero_grad()
        states = VLM(model)(batch)
        loss = F.cross_entropy(model.get_output_embeddings()(states.hidden).float(), states.targets, reduction="sum")
        (loss / len(states.targets) if mean else loss).backward()
        for name, module in modules.items():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    totals[name] += float(parameter.grad.double().square().sum())
    return {name: total / len(batches) for name, total in totals.items()}


def largest_gap(traces: dict[str, float], expected: dict[str, float]) -> float:
    """Relative; a trace below a millionth of the largest is rounding (attention keys have no gradient in a bias)."""
    assert set(traces) == set(expected) and len(traces) > 3
    floor = 1e-6 * max(expected.values())
    return max(abs(traces[name] - expected[name]) / max(expected[name], floor) for name in expected)


def test_every_linear_module_of_every_family(model, batches):
    modules = linear_modules(model)
    assert {name.split(".")[0] for name in modules} >= {"vision", "language", "lm_head"}
    traces = fisher_traces(model, batches, modules)
    assert all(value > 0 for value in traces.values())
    assert largest_gap(traces, by_autograd(model, batches, modules)) < 1e-4


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_several_images_in_a_sample(model, tiny_folder, family, data):
    """Images of one sample share the tower's modules: their gradients add up before they are squared."""
    encoder = encoder_of(tiny_folder(family))
    several = [sample for sample in encode_all(encoder, data) if sample.pixels][:2]
    rows = collate(several, encoder.pad_token_id)
    of_tokens = {"input_ids", "attention_mask", *several[0].token_extras}
    inputs = {n: value.reshape(1, -1) if n in of_tokens else value for n, value in rows.inputs.items()}
    batch = Batch(inputs, rows.kinds.reshape(1, -1), rows.tasks[:1], ["two images"])
    modules = {name: m for name, m in linear_modules(model).items() if name.startswith("vision")}
    assert len(rows.inputs["image_grid_thw"]) == 2
    assert largest_gap(fisher_traces(model, [batch], modules), by_autograd(model, [batch], modules)) < 1e-4


@pytest.mark.parametrize("gram", [True, False])
def test_both_forms_of_the_norm(gram, monkeypatch):
    """Long narrow and short wide, cut into blocks that do not divide, against the product in float64."""
    monkeypatch.setattr(fisher, "BLOCK", 100)
    tokens, width = (7, 31) if gram else (40, 9)
    assert (tokens * 2 * width < width * width) is gram
    torch.manual_seed(0)
    x, g = torch.randn(tokens, width), torch.randn(tokens, width)
    expected = float((g.double().T @ x.double()).square().sum())
    assert float(squared_gradient_norm(x, g)) == pytest.approx(expected, rel=1e-6)
    assert float(squared_gradient_norm(x.double(), g.double())) == pytest.approx(expected, rel=1e-14)
    assert float(squared_gradient_norm(x.bfloat16(), g)) == pytest.approx(expected, rel=2e-2)


def test_mean_of_log_likelihood_is_a_choice(llava, llava_batches):
    modules = linear_modules(llava)
    mean = fisher_traces(llava, llava_batches, modules, "mean")
    assert mean != fisher_traces(llava, llava_batches, modules)
    assert largest_gap(mean, by_autograd(llava, llava_batches, modules, mean=True)) < 1e-4


def test_padding_does_not_matter(model, batches, tiny_folder, family):
    """Rows padded on the right, as a longer neighbour would pad them."""
    values = {"input_ids": encoder_of(tiny_folder(family)).pad_token_id} | dict.fromkeys(
        ("attention_mask", "token_type_ids", "mm_token_type_ids"), 0
    )

    def padded(batch: Batch) -> Batch:
        inputs = {n: F.pad(v, (0, 9), value=values[n]) if n in values else v for n, v in batch.inputs.items()}
        kinds = F.pad(batch.kinds, (0, 9), value=int(Kind.PADDING))
        return Batch(inputs, kinds, batch.tasks, batch.sample_ids)

    modules = linear_modules(model)
    longer = fisher_traces(model, [padded(batch) for batch in batches], modules)
    assert largest_gap(longer, fisher_traces(model, batches, modules)) < 1e-4


def test_bfloat16(llava, llava_batches):
    """Activations have 8 bits: a few per cent in the norm of a whole matrix."""
    modules = linear_modules(llava)
    exact = fisher_traces(llava, llava_batches, modules)
    llava.bfloat16()
    halved = [
        Batch(
            {n: v.bfloat16() if v.is_floating_point() else v for n, v in b.inputs.items()},
            b.kinds,
            b.tasks,
            b.sample_ids,
        )
        for b in llava_batches
    ]
    traces = fisher_traces(llava, halved, modules)
    assert largest_gap(traces, by_autograd(llava, halved, modules)) < 0.02  # same activations, float32 products
    assert largest_gap(traces, exact) < 0.2


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_around_the_call(llava, llava_batches, autocast):
    """Under autocast the model computes in bfloat16, the products of the norm do not."""
    modules = linear_modules(llava)
    exact = fisher_traces(llava, llava_batches, modules)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        traces = fisher_traces(llava, llava_batches, modules)
    gap = largest_gap(traces, exact)
    assert (0 < gap < 0.2) if autocast else gap == 0


class Twice(nn.Module):
    """Runs one linear module two times, and changes the first result in place, as residual code may."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner(x)
        first += 1.0
        return first + self.inner(input=x * 2.0)


def test_a_module_that_runs_twice(llava, llava_batches):
    """The gradient of both uses together, not the sum of two norms."""
    modules = linear_modules(llava)
    attention = llava.model.language_model.layers[0].self_attn
    attention.v_proj = Twice(attention.v_proj)
    traces = fisher_traces(llava, llava_batches, modules)
    expected = by_autograd(llava, llava_batches, modules)
    assert largest_gap(traces, expected) < 1e-4


def test_trainable_head_and_quantised_weights(llava, llava_batches):
    """4-bit weights ask for no gradient; the traces are those of the same model with the weights they stand for."""
    bnb = pytest.importorskip("bitsandbytes")
    names = [name for name in linear_modules(llava) if name.startswith("language")]
    for path, module in list(llava.named_modules()):
        if isinstance(module, nn.Linear) and "language_model" in path:
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.float32, quant_type="nf4"
            )
            small.load_state_dict(module.state_dict())
            parent, _, leaf = path.rpartition(".")
            setattr(llava.get_submodule(parent), leaf, small.to("cpu"))
    modules = {name: module for name, module in linear_modules(llava).items() if name in names}
    assert len(modules) == len(names) and all(m.weight.dtype == torch.uint8 for m in modules.values())
    before = {name: m.weight.clone() for name, m in modules.items()}
    flags = [m.support_avx512bf16_for_cpu for m in modules.values()]
    traces = fisher_traces(llava, llava_batches, modules)
    assert flags == [m.support_avx512bf16_for_cpu for m in modules.values()]
    assert all(torch.equal(before[name], m.weight) for name, m in modules.items()), "weights were packed"

    plain = {}
    for path, module in list(llava.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight.data = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            parent, _, leaf = path.rpartition(".")
            setattr(llava.get_submodule(parent), leaf, dense)
    plain = {name: module for name, module in linear_modules(llava).items() if name in names}
    assert largest_gap(traces, by_autograd(llava, llava_batches, plain)) < 1e-4

    packed = next(iter(modules.values()))
    packed.weight.quant_state.packing_format_for_cpu = True
    llava.packed = packed
    with pytest.raises(VlmtuneError, match="packed by a forward"):
        fisher_traces(llava, llava_batches, modules)


def test_the_model_is_as_before(llava, llava_batches):
    llava.train()
    llava.model.vision_tower.eval()
    asking = [p for p in llava.parameters()][::2]
    for parameter in asking:
        parameter.requires_grad_(False)
    next(llava.parameters()).grad = torch.ones_like(next(llava.parameters()))
    with torch.no_grad():
        VLM(llava)(llava_batches[0])  # transformers adds hooks of its own in the first forward
    state, modes = snapshot(llava), [m.training for m in llava.modules()]
    flags, rng = [p.requires_grad for p in llava.parameters()], torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in llava.modules()]

    def require_same():
        assert all(torch.equal(value, state[name]) for name, value in llava.state_dict().items())
        assert modes == [m.training for m in llava.modules()]
        assert flags == [p.requires_grad for p in llava.parameters()]
        assert hooks == [len(m._forward_hooks) for m in llava.modules()]
        assert torch.equal(rng, torch.get_rng_state())
        grads = [p.grad for p in llava.parameters()]
        assert torch.equal(grads[0], torch.ones_like(grads[0])) and not any(g is not None for g in grads[1:])

    with torch.no_grad():  # whatever the caller is in
        traces = fisher_traces(llava, llava_batches, linear_modules(llava))
    assert min(traces.values()) > 0
    require_same()

    def broken():
        yield llava_batches[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        fisher_traces(llava, broken(), linear_modules(llava))
    require_same()


def test_samples_that_cannot_be_measured(llava, llava_batches, tiny_folder, data):
    modules = linear_modules(llava)
    encoder = encoder_of(tiny_folder("llava"))
    pair = micro_batches(encoder, encode_all(encoder, data), 2)
    first = llava_batches[0]
    silent = Batch(first.inputs, torch.full_like(first.kinds, int(Kind.SPECIAL)), first.tasks, first.sample_ids)
    with pytest.raises(VlmtuneError, match="2 samples .first: s0.*one sample"):
        fisher_traces(llava, pair, modules)
    with pytest.raises(VlmtuneError, match="sample s0 has no supervised token"):
        fisher_traces(llava, [silent], modules)
    with pytest.raises(VlmtuneError, match="no sample to measure on"):
        fisher_traces(llava, [], modules)
    text_only = next(batch for batch in llava_batches if "pixel_values" not in batch.inputs)
    with pytest.raises(VlmtuneError, match=r"no gradient came to vision.layers.0.* in any of 1 samples, nor to"):
        fisher_traces(llava, [text_only], modules)
    with torch.no_grad():
        llava.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(VlmtuneError, match="sample s0 are not finite"):
        fisher_traces(llava, [first], modules)


def test_modules_that_cannot_be_measured(llava, llava_batches):
    with pytest.raises(VlmtuneError, match="norm is a LlamaRMSNorm"):
        fisher_traces(llava, llava_batches, {"norm": llava.model.language_model.norm})
    with pytest.raises(VlmtuneError, match="no module to measure"):
        fisher_traces(llava, llava_batches, {})

    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    block = llava.model.language_model.layers[1].mlp
    cut = Cut(block.down_proj.in_features, block.down_proj.out_features, bias=False)
    block.down_proj = cut
    with pytest.raises(VlmtuneError, match="down_proj passes no gradient on"):
        fisher_traces(llava, llava_batches, linear_modules(llava))


def test_recomputation_is_refused(llava, llava_batches, monkeypatch):
    mlp = llava.model.language_model.layers[0].mlp
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: checkpoint(plain, x, use_reentrant=False))
    with pytest.raises(VlmtuneError, match="runs again in the backward"):
        fisher_traces(llava, llava_batches, linear_modules(llava))


def test_gradient_checkpointing_of_the_model_is_not_in_the_way(llava, llava_batches):
    modules = linear_modules(llava)
    traces = fisher_traces(llava, llava_batches, modules)
    llava.activation_checkpointing_enable()
    assert fisher_traces(llava, llava_batches, modules) == traces
