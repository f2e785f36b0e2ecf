"""What run.py measured, as a table, a picture of the losses and a record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
RECORDED = HERE / "results.json"
OURS, FLOOR = "vlmtune", "products alone"


def table(results: Sequence[dict]) -> str:
    """Markdown: a section for every case."""
    lines = []
    for result in results:
        arms = result["arms"]
        last = min(len(arm["losses"]) for name, arm in arms.items() if name != FLOOR)
        peers = {name: arm for name, arm in arms.items() if not name.startswith(OURS) and name != FLOOR}
        fastest = min(peers, key=lambda name: peers[name]["median"]) if peers else None
        lines += [
            f"## {_title(result)}", "",
            f"{result['samples']} samples a step, in {result['parts']} micro-batches, with {result['tokens']:,.0f} "
            f"tokens, {result['supervised']:,.0f} of them supervised; {result['threads']} threads; "
            f"{result['processor']}; {result['date']}; product of 2048 x 2048: {min(result['peaks']):.0f} to "
            f"{max(result['peaks']):.0f} GFLOP/s.", "",
            f"| arm | s per step | samples/s | supervised tokens/s | against {fastest or 'itself'} | of the peak "
            f"| of products alone | peak memory MiB | loss of step {last} |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, arm in arms.items():
            against = "" if fastest is None else f"{_ratio(arms[fastest], arm):.2f} x"
            median = arm["median"]
            reached = f"{_ratio(arms[FLOOR], arm):.0%}" if FLOOR in arms and "second" not in name else ""
            memory, loss = ("", "") if name == FLOOR else (f"{arm['peak_mib']:.0f}", f"{arm['losses'][last - 1]:.4f}")
            lines.append(
                f"| {name} | {median:.2f} ({min(arm['seconds']):.2f} to {max(arm['seconds']):.2f}) "
                f"| {result['samples'] / median:.2f} | {result['supervised'] / median:.0f} | {against} "
                f"| {arm['mfu']:.0%} | {reached} | {memory} | {loss} |"
            )
        lines += ["", _same_work(arms), ""]
    return "\n".join(lines)


def _title(result: dict) -> str:
    return f"{result['case']}, {result['shape']} model, {result['method']}, {result['precision']}"


def _ratio(base: dict, arm: dict) -> float:
    return statistics.median(b / a for b, a in zip(base["seconds"], arm["seconds"], strict=True))


def _same_work(arms: dict[str, dict]) -> str:
    """The largest difference of the loss of any step to ours."""
    ours = arms.get(OURS)
    if ours is None:
        return ""
    said = []
    for name, arm in arms.items():
        if name not in (OURS, FLOOR):
            gap = max(abs(a - b) for a, b in zip(arm["losses"], ours["losses"], strict=False))
            said.append(f"{name} {gap:.1e} over {len(arm['losses'])} steps")
    return "Largest difference of the loss of a step to vlmtune's: " + ", ".join(said) + "."


def write(result: dict) -> None:
    """Put it in place of an older one of the same case."""
    results = json.loads(RECORDED.read_text()) if RECORDED.exists() else []
    key = ("case", "shape", "method", "precision", "samples", "parts")
    results = [old for old in results if any(old[name] != result[name] for name in key)] + [result]
    RECORDED.write_text(json.dumps(results, indent=1))
    head = (HERE / "run.py").read_text().split('"""')[1].strip().splitlines()[0]
    (HERE / "results.md").write_text(
        f"# Speed and memory\n\n{head} `python benchmarks/speed/run.py`\n\n{table(results)}"
    )
    draw(results)


def draw(results: Sequence[dict]) -> None:
    """Losses of all arms, laid over each other."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        trained = [(name, arm) for name, arm in result["arms"].items() if name != FLOOR]
        for number, (name, arm) in enumerate(trained):
            steps = range(1, len(arm["losses"]) + 1)
            axis.plot(steps, arm["losses"], label=name, linewidth=5 - number, alpha=0.7)
        axis.set_title(f"{_title(result)}, {result['parts']} x {result['samples'] // result['parts']}", fontsize=8)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "losses.svg")
