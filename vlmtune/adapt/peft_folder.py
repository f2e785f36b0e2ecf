"""An adapter folder that plain peft loads, with what was trained in full beside the adapter (SPEC C1, PAINS 7)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from vlmtune.adapt.library import adapter_state, save_adapter
from vlmtune.adapt.plan import Plan
from vlmtune.adapt.serving import why_not_plain_peft
from vlmtune.models.anatomy import anatomy_of, canonical_name
from vlmtune.rules import compile_pattern
from vlmtune.types import VlmtuneError


def write_peft_folder(model: nn.Module, plan: Plan, base: str, folder: Path) -> list[str]:
    """Write the plan's one adapter, and each module that was trained in full as one of peft's `modules_to_save`.

    base: the folder or hub name of the base model. Returns those modules. Raises VlmtuneError where plain peft cannot
    hold what was trained.
    """
    reason = why_not_plain_peft(plan)
    if reason:
        raise VlmtuneError(f"plain peft cannot hold what this plan trains: {reason}.")
    (adapter,) = plan.adapters
    state = dict(adapter_state(model, adapter))
    modules = _whole_modules(model, plan)
    for path in modules:
        state |= {f"{path}.{name}": value for name, value in model.get_submodule(path).state_dict().items()}
    config = copy.deepcopy(adapter.config)
    config.modules_to_save = modules or None
    config.inference_mode, config.base_model_name_or_path = True, base
    save_adapter(_own_memory(state), config, folder)
    return modules


def load_plain_peft(base: nn.Module, folder: Path) -> nn.Module:
    """What a user of peft alone gets from such a folder: the base model, with the adapter and the modules in it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.|transformers\.")  # remarks to authors of code
        return PeftModel.from_pretrained(base, str(folder)).eval().get_base_model()


def _own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (a tied head)."""
    return {name: value.detach().clone() for name, value in state.items()}


def _whole_modules(model: nn.Module, plan: Plan) -> list[str]:
    """The largest modules all of whose parameters belong to rules that train them in full, none of them adapted.

    Raises VlmtuneError where such a module would not hold everything that trains.
    """
    anatomy = anatomy_of(model)
    full = {name for name in plan.parameters if name not in plan.adapter_parameters}
    rules = [pattern for pattern, policy in plan.policies.items() if policy.train == "full"]
    found: list[str] = []
    left = set(full)
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{other}.") for other in found):
            continue
        names = {canonical_name(anatomy, f"{path}.{leaf}") for leaf, _ in module.named_parameters()}
        trained = names & full
        # what no loss can reach stays as it was, and may be saved with the rest
        if trained and names - full <= _frozen_by_design(plan, names, rules):
            found.append(path)
            left -= trained
    if left:
        raise VlmtuneError(
            f"plain peft saves whole modules, and {sorted(left)[0]} is trained in one that is not trained as a whole; "
            "use the merged export."
        )
    return found


def _frozen_by_design(plan: Plan, names: set[str], rules: list[str]) -> set[str]:
    """Of `names`, those that a rule trains in full and that nevertheless cannot learn."""
    patterns = [compile_pattern(rule) for rule in rules]
    return {n for n in names if n not in plan.parameters and any(pattern.match(n) for pattern in patterns)}
