"""DESIGN.md's levels and doors, read off the imports of every module; and a command line that starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import vlmtune

PACKAGE = Path(vlmtune.__file__).parent
LEVELS = (
    (
        "errors",
        "types",
        "rules",
        "schedule",
        "paths",
        "interrupt",
        "observer",
        "sealed",
        "sizes",
        "processes",
        "shards",
        "tensor_file",
    ),
    ("data", "models", "losses", "optim"),
    ("adapt", "evaluate"),
    ("checks",),
    ("trainer", "checkpoint", "observe", "probe", "recovery", "soundness", "step", "background"),
    (
        "config",
        "build",
        "build_loss",
        "build_course",
        "stages",
        "run",
        "use",
        "view",
        "check",
        "check_data",
        "prepare",
        "ranks",
        "plan_model",
        "outcome",
        "samples",
        "watch",
        "start",
        "fast_start",
        "export",
        "failure",
        "composition",
        "replay",
        "doctor",
        "comparison",
        "card",
        "validation",
        "align",
        "vision_cache",
        "same_run",
    ),
    ("cli", "__main__"),
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
MAY_MEET = {  # siblings that DESIGN.md allows to import each other
    0: {
        ("types", "errors"),
        ("rules", "errors"),
        ("schedule", "errors"),
        ("paths", "errors"),
        ("observer", "types"),
        ("sealed", "errors"),
        ("sizes", "errors"),
        ("processes", "errors"),
        ("tensor_file", "shards"),
        ("processes", "interrupt"),
    },
    4: {
        ("trainer", "checkpoint"),
        ("trainer", "background"),
        ("background", "checkpoint"),
        ("trainer", "probe"),
        ("trainer", "recovery"),
        ("trainer", "soundness"),
        ("soundness", "probe"),
        ("trainer", "step"),
        ("checkpoint", "probe"),
        ("recovery", "checkpoint"),
        ("step", "recovery"),
    },
    5: {
        *(
            (part, other)
            for part in ("run", "use", "view", "check_data", "ranks", "export", "plan_model")
            for other in ("build", "config")
        ),
        ("build", "config"),
        ("build", "build_loss"),
        ("build", "build_course"),
        ("build_course", "config"),
        *((part, "build_course") for part in ("run", "use", "view", "ranks", "export", "start")),
        ("build_loss", "config"),
        *(("prepare", other) for other in ("build", "build_course", "build_loss", "config", "fast_start", "start")),
        *(
            ("check", other)
            for other in (
                "build",
                "build_course",
                "build_loss",
                "check_data",
                "config",
                "failure",
                "prepare",
                "start",
                "use",
            )  # fmt: skip
        ),
        ("run", "prepare"),
        ("run", "same_run"),
        *(("same_run", other) for other in ("build", "config", "prepare")),
        ("run", "view"),
        ("run", "vision_cache"),
        ("run", "outcome"),
        ("run", "samples"),
        ("use", "outcome"),
        ("export", "use"),
        ("start", "config"),
        ("run", "start"),
        ("run", "failure"),
        ("run", "composition"),
        ("composition", "build"),
        *(("stages", other) for other in ("build", "build_course", "build_loss", "config", "export", "run")),
        *(("replay", other) for other in ("build", "build_course", "build_loss", "config", "failure")),
        ("composition", "config"),
        ("card", "config"),
        ("export", "card"),
        *(("validation", other) for other in ("build", "build_course", "card", "check", "config", "export", "use")),
        *(("vision_cache", other) for other in ("build", "config", "prepare")),
        *(("align", other) for other in ("build", "check", "config", "samples", "use")),
        ("doctor", "config"),
        ("doctor", "failure"),
        ("doctor", "replay"),
        *(("comparison", other) for other in ("build", "build_course", "build_loss", "config", "run", "use")),
    },
    6: {("__main__", "cli")},
}
DOORS = {
    "transformers": ("models/", "data/encode.py", "data/resolution.py", "evaluate/generate.py"),
    "peft": ("adapt/",),
    "bitsandbytes": ("models/quantise.py", "optim/optimizer.py"),
    "pyarrow": ("data/tables.py",),
    "datasets": ("data/tables.py",),
    "sacrebleu": ("evaluate/text.py",),
    "rouge_score": ("evaluate/text.py",),
    "accelerate": (),
    "deepspeed": (),
}
FOREIGN = {  # of level 0
    **dict.fromkeys(("types", "processes", "shards"), {"torch"}),
    "tensor_file": {"torch", "safetensors"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part(name: str) -> str:
    """`vlmtune.data.encode.Encoder` -> `data`."""
    return name.split(".")[1]


def own_part(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


def internal_edges() -> list[tuple[str, str, str]]:
    """(file, its part, imported part) of every import between two parts."""
    edges = []
    for path in FILES:
        for name in imports_of(path):
            if name.startswith("vlmtune.") and own_part(path) != "__init__" and part(name) != own_part(path):
                edges.append((relative(path), own_part(path), part(name)))
    return [edge for edge in edges if edge[2] != "__version__"]


def test_every_part_has_a_level():
    parts = {own_part(path) for path in FILES} - {"__init__", "recipes"}
    assert parts <= LEVEL.keys(), f"give {sorted(parts - LEVEL.keys())} a level here and in DESIGN.md"


def test_design_lists_the_same_levels():
    design = (PACKAGE.parent / "DESIGN.md").read_text(encoding="utf-8")
    for number, parts in enumerate(LEVELS):
        line = next(line for line in design.splitlines() if line.startswith(f"{number}  "))
        missing = [name for name in parts if name not in line and name != "__main__"]
        assert not missing, f"DESIGN.md, level {number}, lacks {missing}"


def test_arrows_go_down_only():
    edges = internal_edges()
    assert len(edges) > 60, "the parser found too few imports to prove anything"
    wrong = {
        (file, other)
        for file, mine, other in edges
        if LEVEL[other] > LEVEL[mine]
        or (LEVEL[other] == LEVEL[mine] and (mine, other) not in MAY_MEET.get(LEVEL[mine], ()))
    }
    assert not wrong


def test_every_permitted_meeting_happens():
    """A permission nobody uses any more is taken away."""
    met = {(mine, other) for _, mine, other in internal_edges()}
    assert not {pair for pairs in MAY_MEET.values() for pair in pairs} - met


def test_level_0_imports_only_torch_and_the_standard_library():
    for name in LEVELS[0]:
        foreign = {imported.split(".")[0] for imported in imports_of(PACKAGE / f"{name}.py")}
        foreign -= {*sys.stdlib_module_names, "vlmtune"}
        assert foreign <= FOREIGN.get(name, set()), f"{name}.py imports {foreign}"


def test_one_door_per_dependency():
    entered = set()
    for path in FILES:
        for name in imports_of(path):
            package = name.split(".")[0]
            if package in DOORS:
                assert relative(path).startswith(DOORS[package]), f"{relative(path)} imports {package}; see DESIGN.md"
                entered.add(package)
    assert {"transformers", "peft"} <= entered


def test_no_pickle():
    """DESIGN decision 7. What others published as a pickle is read with `weights_only=True`."""
    for path in FILES:
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("pickle", "dill", "joblib")], path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                call = ast.unparse(node)
                assert not call.startswith("torch.save("), path
                assert not call.startswith("torch.load(") or "weights_only=True" in call, path


def test_the_command_line_starts_without_torch():
    """`--help`, `schema` and `recipes` answer at once: torch and transformers take seconds to import."""
    script = (
        "import sys, vlmtune.cli, vlmtune.config; vlmtune.config.recipe_names();"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
