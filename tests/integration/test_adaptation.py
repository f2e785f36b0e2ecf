"""Methods of a plan through the command line: train, resume, evaluate, predict, export (SPEC C1-C5, C8)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from method_matrix import logits_of
from peft import PeftModel
from safetensors.torch import load_file
from training_setup import encode_all, encoder_of, micro_batches
from transformers import AutoModelForImageTextToText

from vlmtune.export import export_run
from vlmtune.models.load import load_model
from vlmtune.models.quantise import is_quantised
from vlmtune.types import Finding
from vlmtune.use import load_run

FROZEN = [{"match": part, "train": "frozen"} for part in ("vision", "embed", "lm_head")]
FULL_PROJECTOR = {"match": "projector", "train": "full"}
MIXED = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full", "lr": 1.0e-3},
    {"match": "language.layers[0:2]", "train": "lora", "rank": 4},
    {"match": "language.layers[2:4]", "train": "adapter", "options": {"dim": 8}},
    {"match": "language", "train": "frozen"},
    {"match": "lm_head", "train": "lora", "rank": 4},
    {"match": "embed", "train": "frozen"},
]


def with_language(**rule) -> list[dict]:
    return [FULL_PROJECTOR, {"match": "language", **rule}, *FROZEN]


@pytest.fixture
def inputs(rows, tiny_folder):
    encoder = encoder_of(tiny_folder("llava"))
    return micro_batches(encoder, encode_all(encoder, rows), 12)[0].inputs


def trained(vlmtune, write_config, name: str, plan: list[dict], steps: int = 3, **sections) -> Path:
    config = write_config(name, steps, plan=plan, **sections)
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, ""), err
    return Path(yaml.safe_load(config.read_text())["run"])


def weights(run: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / checkpoint
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param({"train": "ia3"}, marks=pytest.mark.slow),
        {"train": "prefix", "options": {"length": 4}},
        pytest.param({"train": "cross_modal", "options": {"dim": 8, "heads": 2}}, marks=pytest.mark.slow),
        pytest.param(
            {
                "train": "lora",
                "rank": {"qk": 2, "vo": 4, "up": 8, "down": 4},
                "lr_b": 4.0,
                "options": {"use_dora": True},
            },
            marks=pytest.mark.slow,
        ),
        {"train": "lora", "rank": 4, "dropout": 0.1, "store": "nf4"},
        pytest.param({"train": "peft", "method": "loha", "options": {"r": 2}}, marks=pytest.mark.slow),
    ],
    ids=lambda rule: rule.get("method", rule["train"]) + rule.get("store", ""),
)
def test_a_run_that_was_interrupted_is_the_same_run(rule, vlmtune, write_config, rows, tmp_path):
    """4 steps, and the same run continued from its second: bit for bit, the optimizer's state included."""
    keep = {"every": 1, "keep": 4}
    whole = trained(vlmtune, write_config, "whole", with_language(**rule), 4, checkpoint=keep)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts, symlinks=True)
    for step in ("step_000003", "step_000004", "latest"):
        path = parts / "checkpoints" / step
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    assert trained(vlmtune, write_config, "parts", with_language(**rule), 4, checkpoint=keep) == parts
    one, other = weights(whole, "step_000004"), weights(parts, "step_000004")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not all(torch.equal(one[key], value) for key, value in weights(whole, "step_000002").items())
    asked = ("predict", rows.parent / "0.png", "what is there", "--model", parts, "--max-new-tokens", 3)
    assert vlmtune(*asked)[0] == 0


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit", "paged_adamw"])
def test_optimizers_of_bitsandbytes(name, vlmtune, write_config, tmp_path):
    """8-bit state in the checkpoint, an exact resume, and a plain word where paging is not to be had."""
    optim = {"lr": 1e-2, "warmup": 2, "name": name}
    plan, keep = with_language(train="full"), {"every": 1, "keep": 4}
    config = write_config("whole", 4, plan=plan, optim=optim, checkpoint=keep)
    code, out, _ = vlmtune("train", config)
    assert code == 0
    assert (f"optim.name: {name} needs CUDA, this is cpu" in out) == name.startswith("paged")
    state = load_file(tmp_path / "whole" / "checkpoints" / "latest" / "optimizer.safetensors")
    moment = "language.layers.0.mlp.up_proj.weight"
    if name == "paged_adamw":
        assert state[f"{moment}/exp_avg"].dtype == torch.float32
    else:
        assert state[f"{moment}/state1"].dtype == torch.uint8 and f"{moment}/absmax1" in state
        assert state["language.norm.weight/state1"].dtype == torch.float32  # below 4096 numbers
        assert not any("qmap" in key for key in state)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    for step in ("step_000003", "step_000004"):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / step)
    (tmp_path / "parts" / "checkpoints" / "latest").unlink()
    config = write_config("parts", 4, plan=plan, optim=optim, checkpoint=keep)
    assert vlmtune("train", config)[0] == 0
    one, other = (weights(tmp_path / run, "step_000004") for run in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_another_optimizer_does_not_take_the_state(vlmtune, write_config):
    config = write_config("run", 3)
    assert vlmtune("train", config)[0] == 0
    config = write_config("run", 3, optim={"lr": 1e-2, "warmup": 2, "name": "adamw8bit"})
    code, _, err = vlmtune("train", config)
    assert code == 1 and "optim.name (adamw -> adamw8bit)" in err


# ---- export -----------------------------------------------------------------------------------------------------


def test_the_mixed_plan_from_start_to_export(vlmtune, write_config, rows, inputs, tmp_path):
    """SPEC C8: frozen, full, LoRA and adapters by layer range, LoRA on the head; kept as an adapter folder."""
    held_out = {"held-out": [{"path": str(rows), "limit": 4}]}
    data = {"train": [{"path": str(rows)}], "eval": held_out, "workers": 0}
    run = trained(vlmtune, write_config, "run", MIXED, data=data)
    code, out, err = vlmtune("eval", run)
    assert (code, err) == (0, "") and "vqa" in out
    table = {row["rule"]: row for row in json.loads((run / "assignment.json").read_text())}
    assert table["language.layers[2:4]"]["method"] == "adapter dim=8" and table["language.layers[2:4]"]["modules"] == 4
    assert table["lm_head"]["trainable"] > 0 and table["embed"]["trainable"] == 0
    record = json.loads((run / "checkpoints" / "latest" / "plan.json").read_text())
    assert [(a["method"], len(a["modules"])) for a in record["adapters"]] == [("lora", 15), ("adapter", 4)]

    code, _, err = vlmtune("export", run, tmp_path / "merged")
    assert code == 1 and "bottleneck adapters cannot be merged" in err and "--as adapter" in err
    code, out, err = vlmtune("export", run, tmp_path / "adapter", "--as", "adapter")
    assert (code, err) == (0, "") and "peft has no bottleneck adapters" in out
    kept = {path.name for path in (tmp_path / "adapter" / "checkpoints" / "latest").rglob("*") if path.is_file()}
    assert kept == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "plan.json",
        "state.json",
        "trained.safetensors",
    }
    assert "losses" not in json.loads((tmp_path / "adapter/checkpoints/latest/state.json").read_text()), "no samples"
    shutil.move(run, tmp_path / "elsewhere")
    one = logits_of(load_run(tmp_path / "elsewhere", "latest").model, inputs)
    other = logits_of(load_run(tmp_path / "adapter", "latest").model, inputs)
    assert torch.equal(one, other)
    asked = ("what is there", "--model", tmp_path / "adapter", "--max-new-tokens", 3)
    assert vlmtune("predict", rows.parent / "0.png", *asked)[0] == 0


@pytest.mark.parametrize(
    "rule",
    [
        {"train": "lora", "rank": 4},
        pytest.param({"train": "lora", "rank": {"qk": 2, "vo": 4, "up": 8, "down": 4}}, marks=pytest.mark.slow),
        pytest.param({"train": "lora", "rank": 4, "options": {"use_dora": True}}, marks=pytest.mark.slow),
        {"train": "ia3"},
        pytest.param({"train": "peft", "method": "loha", "options": {"r": 2}}, marks=pytest.mark.slow),
        {"train": "peft", "method": "vera", "options": {"r": 8}},
    ],
    ids=["lora", "ranks by kind", "dora", "ia3", "loha", "vera"],
)
def test_an_adapter_folder_for_plain_peft(rule, vlmtune, write_config, tiny_folder, rows, inputs, quiet, tmp_path):
    """peft alone, on a fresh base: the adapter and the projector that was trained in full."""
    run = trained(vlmtune, write_config, "run", with_language(**rule))
    proof = export_run(run, "latest", tmp_path / "adapter", quiet, "adapter")
    assert proof["loads_with"] == "peft" and proof["modules_to_save"] == ["model.multi_modal_projector"]
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "vlmtune_export.json"
    }  # fmt: skip
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder("llava"))
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = logits_of(load_run(run, "latest").model, inputs)
    assert torch.equal(logits_of(plain, inputs), ours)
    with plain.disable_adapter():
        assert torch.equal(logits_of(plain, inputs), logits_of(load_model(str(tiny_folder("llava"))), inputs))
    said = [
        vlmtune("predict", rows.parent / "0.png", "what is there", "--model", folder, "--max-new-tokens", 5)
        for folder in (run, tmp_path / "adapter")
    ]
    assert said[0] == said[1] and said[0][0] == 0


def test_lora_everywhere_loads_with_plain_peft(vlmtune, write_config, tiny_folder, inputs, quiet, tmp_path):
    """On the tower, the projector and the head too: paths, not suffixes, so each in its place."""
    plan = [{"match": part, "train": "lora", "rank": 4} for part in ("vision", "projector", "language", "lm_head")]
    run = trained(vlmtune, write_config, "run", [*plan, {"match": "embed", "train": "frozen"}])
    assert export_run(run, "latest", tmp_path / "adapter", quiet, "adapter")["modules_to_save"] == []
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder("llava"))
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(plain, inputs), logits_of(load_run(run, "latest").model, inputs))
    code, _, err = vlmtune("export", run, tmp_path / "merged")
    assert (code, err) == (0, "")


def test_pissa_is_merged_and_kept_by_us(vlmtune, write_config, tiny_folder, inputs, tmp_path):
    """It changes the base weights when it starts, so a folder for plain peft would need those too."""
    rule = {"train": "lora", "rank": 4, "options": {"init_lora_weights": "pissa"}}
    run = trained(vlmtune, write_config, "run", with_language(**rule))
    code, out, err = vlmtune("export", run, tmp_path / "adapter", "--as", "adapter")
    assert (code, err) == (0, "") and "pissa changes the base weights" in out
    assert vlmtune("export", run, tmp_path / "merged")[0] == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    ours = logits_of(load_run(run, "latest").model, inputs)
    assert float((logits_of(merged, inputs) - ours).abs().max()) < 1e-4 * float(ours.abs().max())


@pytest.mark.parametrize("layers", ["language", "language.layers[1:3]"], ids=["all layers", "some layers"])
def test_a_quantised_run_is_merged_into_the_full_base(
    layers, vlmtune, write_config, tiny_folder, inputs, quiet, tmp_path
):
    """Three gaps: NF4 base + adapter, full base + adapter, merged. The last two agree, the first shows NF4's price."""
    quantised = {"match": layers, "train": "lora", "rank": 4, "store": "nf4"}
    rest = [] if layers == "language" else [{"match": "language", "train": "lora", "rank": 4}]
    run = trained(vlmtune, write_config, "run", [FULL_PROJECTOR, quantised, *rest, *FROZEN], 3)
    code, out, err = vlmtune("export", run, tmp_path / "merged")
    assert (code, err) == (0, "") and "trained on a quantised base" in out
    gaps = json.loads((tmp_path / "merged" / "vlmtune_export.json").read_text())["quantised_gaps"]
    assert gaps["full to merged"] < 1e-4 < 1e-3 < gaps["quantised to full"] < 0.5
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    full = logits_of(load_run(run, "latest", as_stored=False).model, inputs)
    assert float((logits_of(merged, inputs) - full).abs().max()) < 1e-4 * float(full.abs().max())
    assert not hasattr(merged.config, "quantization_config")
    proof = export_run(run, "latest", tmp_path / "adapter", quiet, "adapter")
    assert proof["loads_with"] == "peft" and proof["relative_logit_gap"] < 1e-4


def test_a_bf16_base_trains_and_exports(vlmtune, write_config, tiny_folder, rows, inputs, tmp_path):
    """store: bf16 halves what is frozen; the adapter and the projector stay float32."""
    plan = [
        {**FULL_PROJECTOR},
        {"match": "language", "train": "lora", "rank": 4, "store": "bf16"},
        *({**rule, "store": "bf16"} for rule in FROZEN),
    ]
    train = {"length": 3, "batch_size": 4, "micro_batch_size": 2, "log_every": 1}
    code, _, err = vlmtune("train", write_config("run", 3, plan=plan, train={**train, "precision": "fp32"}))
    assert code == 1 and "bfloat16 weights need train.precision: bf16" in err
    run = trained(vlmtune, write_config, "run", plan, train={**train, "precision": "bf16"})
    model = load_run(run, "latest").model
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {d for n, d in kept.items() if "lora_" in n or "projector" in n} == {torch.float32}
    assert {d for n, d in kept.items() if "lora_" not in n and "projector" not in n} == {torch.bfloat16}
    asked = ("predict", rows.parent / "0.png", "what is there", "--model", run, "--max-new-tokens", 3)
    assert vlmtune(*asked)[0] == 0
    code, _, err = vlmtune("export", run, tmp_path / "merged")
    assert (code, err) == (0, "")
    full = logits_of(load_run(run, "latest", as_stored=False).model, inputs)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert float((logits_of(merged, inputs) - full).abs().max()) < 1e-4 * float(full.abs().max())


def test_a_frozen_base_is_kept_in_the_format_of_its_products(vlmtune, write_config):
    """store: auto, the default under bf16: half the weights, the same losses to the last bit, also when it goes on."""
    train = {"length": 4, "batch_size": 4, "micro_batch_size": 2, "log_every": 1, "precision": "bf16"}
    kept = {}
    for store in ("auto", "fp32"):
        rules = [{"match": "language", "train": "lora", "rank": 4}, *FROZEN]
        plan = [FULL_PROJECTOR, *({**rule, "store": store} for rule in rules)]
        every = {"train": train, "checkpoint": {"every": 2}}
        run = trained(vlmtune, write_config, store, plan, **every)
        shutil.rmtree(run / "checkpoints" / "step_000004")
        run = trained(vlmtune, write_config, store, plan, **every)  # goes on
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        items = json.loads((run / "memory.json").read_text())["items"]
        kept[store] = [row["loss"] for row in rows if row["kind"] == "train"], items
    assert kept["auto"][0] == kept["fp32"][0] and len(kept["auto"][0]) == 4
    assert kept["auto"][1]["weights bf16"] > 0 and "weights bf16" not in kept["fp32"][1]
    saved = kept["fp32"][1]["weights fp32"] - kept["auto"][1]["weights fp32"]
    assert saved == 2 * kept["auto"][1]["weights bf16"]


def test_a_tied_head_is_adapted_over_a_quantised_model(vlmtune, write_config, tiny_folder):
    plan = [
        {"match": "lm_head", "train": "lora", "rank": 4},
        {"match": "language", "train": "lora", "rank": 4, "store": "nf4"},
        {"match": "*", "train": "frozen"},
    ]
    run = trained(vlmtune, write_config, "run", plan, model=str(tiny_folder("gemma3")))
    methods = {row["rule"]: row["method"] for row in json.loads((run / "assignment.json").read_text())}
    assert methods["lm_head"] == "lora r4 α8" and methods["language"] == "lora r4 α8 on nf4"


@pytest.mark.parametrize("family", ["gemma3", "internvl", "embedded"])
def test_lora_on_a_tied_head_leaves_the_embedding_alone(family, vlmtune, write_config, tmp_path, request):
    """Merged into the shared weight it would change the embedding too, so the export has a head of its own."""
    folder = request.getfixturevalue("embedded_folder") if family == "embedded" else None
    folder = folder or request.getfixturevalue("tiny_folder")(family)
    plan = [{"match": "lm_head", "train": "lora", "rank": 4}, {"match": "*", "train": "frozen"}]
    run = trained(vlmtune, write_config, "run", plan, model=str(folder))
    assert json.loads((run / "memory.json").read_text())["predicted"] > 0
    table = {row["rule"]: row for row in json.loads((run / "assignment.json").read_text())}
    assert table["lm_head"]["trainable"] == table["lm_head"]["parameters"] > 0
    code, _, err = vlmtune("export", run, tmp_path / "merged")
    assert (code, err) == (0, "")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    base = load_model(str(folder))
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)
    assert merged.config.tie_word_embeddings is False


def test_gguf_is_refused_with_the_reason(vlmtune, tmp_path):
    code, _, err = vlmtune("export", tmp_path, tmp_path / "out", "--as", "gguf")
    assert code == 1 and "mmproj" in err and "convert_hf_to_gguf.py" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("double", [True, False])
def test_double_quantisation_is_an_option(double, vlmtune, write_config):
    plan = with_language(train="lora", rank=4, store="nf4")
    run = trained(vlmtune, write_config, "run", plan, quantise={"double": double})
    weights = [p for p in load_run(run, "latest").model.parameters() if is_quantised(p)]
    assert len(weights) == 28 and {weight.quant_state.nested for weight in weights} == {double}


def test_a_start_that_is_wrong_stops_the_run(vlmtune, write_config, tmp_path, monkeypatch):
    """Before anything is written."""
    wrong = Finding("fail", "outputs of adapters start at zero", "1 tensor, largest value 3", "check its rule")
    monkeypatch.setattr("vlmtune.start.initial_findings", lambda *_: [wrong])
    code, _, err = vlmtune("train", write_config("run", 3))
    assert code == 1 and "start: outputs of adapters start at zero: no, 1 tensor" in err
    assert not (tmp_path / "run").exists()


def test_a_projector_drawn_anew_is_another_run(vlmtune, write_config):
    rest = with_language(train="lora", rank=4)[1:]
    kept = trained(vlmtune, write_config, "kept", [FULL_PROJECTOR, *rest])
    drawn = trained(vlmtune, write_config, "drawn", [{**FULL_PROJECTOR, "init": "xavier"}, *rest])
    name = "trained.safetensors/projector.linear_1.weight"
    assert not torch.equal(weights(kept, "latest")[name], weights(drawn, "latest")[name])
    assert any("Xavier" in finding["what"] for finding in json.loads((drawn / "start.json").read_text()))


@pytest.mark.parametrize(
    ("text", "complaint"), [("{", "is damaged"), ("[]", "is damaged"), ("{}", "names no base model")]
)
def test_a_foreign_adapter_folder_that_cannot_be_read(text, complaint, vlmtune, rows, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    code, _, err = vlmtune("predict", rows.parent / "0.png", "what is there", "--model", tmp_path)
    assert code == 1 and complaint in err and "adapter_config.json" in err


# ---- what is refused --------------------------------------------------------------------------------------------


def test_the_adapter_of_another_base_model_is_refused(vlmtune, write_config, tiny_folder, tmp_path):
    """Same shapes, other weights: without a digest of the base it would load and answer nonsense."""
    from vlmtune.models.tiny import write_tiny

    run = trained(vlmtune, write_config, "run", with_language(train="lora", rank=4))
    other = write_tiny("llava", tmp_path / "other", seed=1)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_folder("llava")), str(other)))
    code, _, err = vlmtune("export", run, tmp_path / "merged")
    assert code == 1 and "was trained on another base model" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (with_language(train="lora", rank=65), "rule 'language': rank 65 exceeds model.language_model"),
        (with_language(train="lora", rank={"qk": 4}), "is of kind 'vo'; add vo"),
        (
            with_language(train="lora", options={"use_dorra": True}),
            "rule 'language': lora has no option 'use_dorra' (did you mean use_dora",
        ),
        (with_language(train="lora", options={"init_lora_weights": "eva"}), "computed from data before training"),
        (with_language(train="lora", options={"use_dora": 3}), "option use_dora of lora is 3; write true or false"),
        (with_language(train="lora", options={"r": 3}), "did you mean rank, a field of the rule"),
        (with_language(train="lora", options={"init_lora_weights": "foo"}), "foo is unknown; use gaussian, orthogonal"),
        (
            with_language(train="lora", store="nf4", options={"init_lora_weights": "pissa"}),
            "takes a base weight apart, which store: nf4 has packed",
        ),
        (with_language(train="peft", method="loha", options={"r": "many"}), "option r of loha is 'many'"),
        (with_language(train="cross_modal", options={"dim": 10, "heads": 3}), "rule 'language': cross_modal: dim 10"),
        (
            [
                {"match": "language.layers.*.mlp", "train": "lora", "rank": {"qk": 4, "up": 4, "down": 4}},
                {"match": "*", "train": "frozen"},
            ],
            "gives qk a rank, but covers no such module (only up, down)",
        ),
        (with_language(train="peft", method="lohaa"), "did you mean loha"),
        (with_language(train="peft", method="vblora"), "keeps state outside of the layers"),
        (with_language(train="peft", method="adalora"), "use train: lora with ranks from `vlmtune ranks`"),
        (with_language(train="peft"), "train: peft needs one"),
        (with_language(train="lora", store="nf4", init="xavier"), "they must all learn again"),
        (with_language(train="ia3", rank=4), "rank only mean something with train: lora"),
        (with_language(train="full", store="nf4"), "store: nf4 with train: full: quantised weights have no gradient"),
        (with_language(train="full", store="bf16"), "store: bf16 with train: full would lose small updates"),
        (with_language(train="lora", rank="many"), "plan.1.rank: write a whole number from 1 up, or one for each kind"),
        (with_language(train="lora", rank={"upp": 4}), "plan.1.rank: write a whole number from 1 up"),
        (with_language(train="lora", rank={}), "plan.1.rank: write a whole number from 1 up"),
        (with_language(train="lora", init="xavier"), "they must all learn again: train: full"),
        (with_language(train="adapter", options={"dim": 0}), "dim"),
        (
            [{"match": "projector", "train": "adapter"}, {"match": "*", "train": "frozen"}],
            "covers no whole attention or feed-forward part of a block",
        ),
        (
            [{"match": "vision", "train": "prefix"}, {"match": "*", "train": "frozen"}],
            "covers no whole attention of a decoder block",
        ),
        (
            [{"match": "language.layers.*.self_attn.q_proj", "train": "ia3"}, {"match": "*", "train": "frozen"}],
            "covers no key, value or feed-forward output projection",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_a_plan_cannot_be(plan, complaint, vlmtune, write_config, tmp_path):
    code, out, err = vlmtune("train", write_config("run", 4, plan=plan))
    assert code == 1 and complaint in err, err
    assert not (tmp_path / "run").exists()
