"""How the cost of a step grows: 1, 2 and 4 times the images, the reply, the samples, for vlmtune and ms-swift.

    python benchmarks/speed/growth.py PEERS WORK --record

Each row is a run of run.py with one thing doubled; a figure is the median over rounds, and the growth against the first
row of its kind, so that rows of other moments of the machine are compared by their matmul peak as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from run import measure, parser

HERE = Path(__file__).parent
ARMS = ["vlmtune", "ms-swift"]
ROWS = {
    "images": [("1", {"case": "short"}), ("2", {"case": "two"}), ("4", {"case": "four"})],
    "reply": [("1", {"case": "reply"}), ("2", {"case": "reply2"}), ("4", {"case": "reply4"})],
    "samples": [("1", {"micro": 1}), ("2", {"micro": 2}), ("4", {"micro": 4})],
}
"""What grows -> how often, and the options of run.py."""


def table(rows: list[dict]) -> str:
    lines = [
        "| what | times | arm | s per step | growth | growth of the products | peak memory MiB | growth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, arm in row["arms"].items():
            first = next(other for other in rows if other["what"] == row["what"])
            lines.append(
                f"| {row['what']} | {row['times']} | {name} | {arm['median']:.2f} "
                f"| {_work(arm) / _work(first['arms'][name]):.2f} | {row['needed'] / first['needed']:.2f} "
                f"| {arm['peak_mib']:.0f} | {arm['peak_mib'] / first['arms'][name]['peak_mib']:.2f} |"
            )
    return "\n".join(lines)


def _work(arm: dict) -> float:
    """Seconds times the peak of the same moment."""
    return statistics.median(s * peak for s, peak in zip(arm["seconds"], arm["peaks"], strict=True))


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(arms=ARMS, parts=1, micro=2, warmup=5, block=1, rounds=3)  # steps without a probe of ours
    options.add_argument("--what", nargs="+", choices=ROWS, default=list(ROWS), help="the others stay as recorded")
    wish = options.parse_args()
    recorded = HERE / "growth.json"
    kept = json.loads(recorded.read_text()) if recorded.exists() and wish.record else []
    rows = [row for row in kept if row["what"] not in wish.what]
    for what in wish.what:
        for times, changed in ROWS[what]:
            args = argparse.Namespace(**vars(wish) | changed)
            result = measure(args)
            for arm in result["arms"].values():
                arm["peaks"] = result["peaks"]
            rows.append({"what": what, "times": times, "needed": result["needed"], "arms": result["arms"]})
            print(table(rows), flush=True)
    if wish.record:
        recorded.write_text(json.dumps(rows, indent=1))
        head = __doc__.split("\n\n")[0]
        (HERE / "growth.md").write_text(f"# How cost grows\n\n{head}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
