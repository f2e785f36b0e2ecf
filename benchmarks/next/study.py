"""What the studies of this folder share: options, runs that go on where they were interrupted, and recorded results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def results_of(
    about: str,
    draft: Path,
    wanted: Iterable[tuple],
    one_run: Callable[..., dict],
    is_made: Callable[..., bool],
    told: Callable[[dict], str],
) -> tuple[list[dict], bool]:
    """(results of all runs, whether they are to be recorded), as the command line says.

    about: of the script, for --help; draft: where results are kept after each run; wanted: arguments of each run;
    is_made: (result, *arguments) -> whether it is that run's; told: a line about a result.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--from", dest="recorded", type=Path)
    options = parser.parse_args()
    if options.recorded:
        return json.loads(options.recorded.read_text())["results"], options.record
    import torch

    torch.set_num_threads(1)
    results: list[dict[str, Any]] = json.loads(draft.read_text()) if draft.exists() else []
    for run in wanted:
        if not any(is_made(result, *run) for result in results):
            results.append(one_run(*run))
            print(told(results[-1]), flush=True)
            draft.write_text(json.dumps(results))
    return results, options.record
