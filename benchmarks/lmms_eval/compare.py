"""Does a model that vlmtune exported answer in lmms-eval what it answers in vlmtune? README.md has the commands.

    python benchmarks/lmms_eval/compare.py write FOLDER      scenes, a run's config, and a local task of lmms-eval
    python benchmarks/lmms_eval/compare.py agree FOLDER      reply by reply, and the metric; exit code 1 if they differ

Between the two: `vlmtune train`, `export` and `eval`, and lmms-eval in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import yaml

from vlmtune.build import build_encoder
from vlmtune.data.export_scenes import write_split
from vlmtune.data.scenes import SceneRecipe
from vlmtune.data.sources import FileSource
from vlmtune.evaluate.generate import generate_replies
from vlmtune.evaluate.metrics import reference_text
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.tiny import write_tiny

TASK = "vlmtune_scenes_vqa"
MAX_NEW_TOKENS = 64


def write(folder: Path, count: int, model: str) -> None:
    """scenes/, run.yaml (ten steps of LoRA, evaluated on the scenes) and task/ in `folder`.

    model: "embedded", or "tiny", a random LLaVA of 1 MB with a CLIP tower, which is written too.
    """
    folder = folder.absolute()
    if model == "tiny":
        model = str(write_tiny("llava", folder / "base"))
    rows = write_split(SceneRecipe("base"), ["vqa"], "val", count, folder / "scenes")
    config = {
        "model": model,
        "run": str(folder / "run"),
        "data": {
            "train": [{"scenes": "base", "task": "vqa"}],
            "eval": {"held": [{"path": str(rows)}]},
            "workers": 0,
        },
        "plan": [{"match": "language", "train": "lora", "rank": 8}, {"match": "*", "train": "frozen"}],
        "optim": {"warmup": 2},
        "train": {"length": 10, "batch_size": 8, "micro_batch_size": 8, "precision": "fp32", "threads": 1},
        "evaluate": {"max_new_tokens": MAX_NEW_TOKENS, "metrics": {"vqa": ["exact_match"]}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    task = folder / "task"
    task.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("task.py"), task / "task.py")
    source = FileSource(rows)
    with (task / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for sample in (source[n] for n in range(source.size)):
            asked, answered = (reference_text(turn) for turn in sample.turns)
            row = {"id": sample.id, "image": str(sample.images[0].source), "question": asked, "answer": answered}
            lines.write(json.dumps(row) + "\n")
    described = (
        f"task: {TASK}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {task / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_visual: !function task.visual\n"
        "doc_to_text: !function task.question\n"
        "doc_to_target: answer\n"
        f"generation_kwargs: {{max_new_tokens: {MAX_NEW_TOKENS}, temperature: 0, do_sample: false}}\n"
        "process_results: !function task.score\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (task / f"{TASK}.yaml").write_text(described)


def agree(folder: Path) -> bool:
    """Print both figures and the replies that differ."""
    theirs = _logged(folder)
    source = FileSource(folder / "scenes" / "val.jsonl")
    samples = [source[n] for n in range(source.size)]
    model, path = load_model(str(folder / "model")).eval(), str(folder / "model")
    encoder = build_encoder(load_processor(path), model)
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    ours = generate_replies(model, encoder, prompts, MAX_NEW_TOKENS, 16)
    differing = [(s.id, o, theirs[s.id]) for s, o in zip(samples, ours, strict=True) if o != theirs[s.id]]
    for name, one, other in differing:
        print(f"{name}: vlmtune {one!r}, lmms-eval {other!r}")
    print(f"{len(samples) - len(differing)} of {len(samples)} replies are the same")
    measured = json.loads((folder / "vlmtune.json").read_text())["held/vqa/exact_match"]
    results = json.loads(next((folder / "lmms").rglob("*_results.json")).read_text())["results"][TASK]
    reported = results["exact_match,none"]
    print(f"exact_match: vlmtune eval {measured}, lmms-eval {reported}")
    return not differing and measured == reported


def _logged(folder: Path) -> dict[str, str]:
    """Sample id -> reply, from the samples that lmms-eval logged."""
    ids = [json.loads(line)["id"] for line in (folder / "task" / "rows.jsonl").read_text().splitlines()]
    logged = next((folder / "lmms").rglob(f"*_samples_{TASK}.jsonl")).read_text().splitlines()
    replies = {}
    for record in map(json.loads, logged):
        reply = record["filtered_resps"]
        replies[ids[record["doc_id"]]] = reply[0] if isinstance(reply, list) else reply
    return replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "agree"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--count", type=int, default=100, help="scenes")
    wish = parser.parse_args()
    if wish.what == "write":
        write(wish.folder, wish.count, wish.model)
    elif not agree(wish.folder):
        sys.exit(1)


if __name__ == "__main__":
    main()
