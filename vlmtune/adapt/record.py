"""A plan as JSON: saved with every checkpoint, compared when one is loaded (SPEC C8)."""

from __future__ import annotations

from typing import Any

from vlmtune.adapt.methods import Adapter, alpha_of, rank_of
from vlmtune.adapt.plan import Plan
from vlmtune.types import VlmtuneError


def plan_record(plan: Plan) -> dict[str, Any]:
    """Rules, adapters with their modules, what trains fully, the base's digest, and the assignment table."""
    return {
        "rules": [{"match": pattern, **_described(policy)} for pattern, policy in plan.policies.items()],
        "adapters": [_adapter(adapter) for adapter in plan.adapters],
        "full": [name for name in plan.parameters if name not in plan.adapter_parameters],
        "base": plan.base,
        "rows": plan.rows,
    }


def _described(policy) -> dict[str, Any]:
    return {key: dict(value) if key == "options" else value for key, value in policy.__dict__.items()}


def _adapter(adapter: Adapter) -> dict[str, Any]:
    is_lora = adapter.method == "lora"
    modules = {
        path: {"rule": target.rule, **({"rank": rank_of(target), "alpha": alpha_of(target)} if is_lora else {})}
        for path, target in adapter.targets.items()
    }
    return {"name": adapter.name, "method": adapter.method, "modules": modules}


def require_same_plan(stored: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises VlmtuneError where a checkpoint belongs to another base model, or to a plan with other adapters."""
    other = [name for name, digest in stored["base"].items() if now["base"].get(name, digest) != digest]
    if other:
        raise VlmtuneError(
            f"{where} was trained on another base model: {len(other)} of {len(stored['base'])} tensors had other "
            f"weights there, first {other[0]}. Use the model that the run was trained on."
        )
    before = {adapter["name"]: adapter for adapter in stored["adapters"]}
    after = {adapter["name"]: adapter for adapter in now["adapters"]}
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            raise VlmtuneError(f"{where} has {_names(before)}, but the plan {_names(after)}; was the plan changed?")
        if old["method"] != new["method"]:
            raise VlmtuneError(
                f"{where}: adapter {name!r} is {old['method']}, in the plan {new['method']}; was the plan changed?"
            )
        odd = sorted(set(old["modules"]) ^ set(new["modules"]))
        if odd:
            raise VlmtuneError(
                f"{where}: adapter {name!r} and the plan adapt different modules, for example {odd[0]}; was the plan "
                "changed?"
            )
        for path, module in old["modules"].items():
            if module.get("rank") != new["modules"][path].get("rank"):
                raise VlmtuneError(
                    f"{where}: {path} has rank {module.get('rank')}, in the plan {new['modules'][path].get('rank')}; "
                    "was the rank changed?"
                )


def _names(adapters: dict[str, dict]) -> str:
    return "adapters " + ", ".join(f"{name} ({a['method']})" for name, a in adapters.items()) if adapters else "none"
