"""Where the parts of a vision-language model live, and the one set of parameter names all families share.

One row per `config.model_type` says which module of the `…ForConditionalGeneration` model is the vision tower, the
projector, the language model, the embedding and the head. From it follow the canonical parameter names that rules,
adapters, logs and checkpoints use:

    vision.layers.3.attn.qkv.weight    language.layers.7.self_attn.q_proj.weight    embed.weight
    vision.<anything else in the tower>   projector.<rest>   language.norm.weight   lm_head.weight   heads.box.weight

The paths are those of transformers 5.23; `anatomy_of` checks every one of them against the model it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from vlmtune.types import VlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("vision", "projector", "language", "embed", "lm_head", "heads")

HEADS = "heads"
"""Name of the ModuleList or ModuleDict of read-outs (boxes, masks) that we attach; plain models have none."""

Coordinates = Literal["norm1000", "pixels", "bins", "bins1000", "markup", "paligemma", "kosmos2"]
"""How a family writes boxes: the names of `data/grounding.py`, whose table shows each (a test compares them)."""


@dataclass(frozen=True)
class Anatomy:
    """Dotted paths from the root of a `…ForConditionalGeneration` model.

    projector: modules, or single parameters, between tower and language model. They may lie inside the tower (the
    Qwen merger), in which case they belong to the projector and not to the tower.
    """

    model_type: str
    vision: str
    vision_layers: str
    projector: tuple[str, ...]
    language: str
    language_layers: str
    embed: str
    head: str
    coordinates: Coordinates


def _row(
    model_type: str,
    vision: str,
    vision_layers: str,
    projector: tuple[str, ...],
    coordinates: Coordinates,
    language: str = "model.language_model",
) -> Anatomy:
    """A row from the few things in which families differ; `vision_layers` is relative to `vision`."""
    return Anatomy(
        model_type=model_type,
        vision=vision,
        vision_layers=f"{vision}.{vision_layers}",
        projector=projector,
        language=language,
        language_layers=f"{language}.layers",
        embed=f"{language}.embed_tokens",
        head="lm_head",
        coordinates=coordinates,
    )


_MERGER = ("model.visual.merger",)
_DEEPSTACK = ("model.visual.merger", "model.visual.deepstack_merger_list")
_CONNECTOR = ("model.connector",)
_PROJECTOR = ("model.multi_modal_projector",)
_NEWLINE = ("model.multi_modal_projector", "model.image_newline")

# Coordinates: Qwen2-VL, Qwen3-VL and InternVL were trained on 0-1000, Qwen2.5-VL on pixels of the resized image,
# PaliGemma on <loc> tokens. The others get 0-1000: they publish no convention, or (LLaVA-1.5) one of fractions with two
# decimals, ten times coarser.
ANATOMIES: dict[str, Anatomy] = {
    row.model_type: row
    for row in (
        _row("qwen2_vl", "model.visual", "blocks", _MERGER, "norm1000"),
        _row("qwen2_5_vl", "model.visual", "blocks", _MERGER, "pixels"),
        _row("qwen3_vl", "model.visual", "blocks", _DEEPSTACK, "norm1000"),
        _row("smolvlm", "model.vision_model", "encoder.layers", _CONNECTOR, "norm1000", "model.text_model"),
        _row("idefics3", "model.vision_model", "encoder.layers", _CONNECTOR, "norm1000", "model.text_model"),
        _row("llava", "model.vision_tower", "encoder.layers", _PROJECTOR, "norm1000"),
        _row("llava_resampler", "model.vision_tower", "encoder.layers", _PROJECTOR, "norm1000"),
        _row("llava_next", "model.vision_tower", "encoder.layers", _NEWLINE, "norm1000"),
        _row("internvl", "model.vision_tower", "encoder.layer", _PROJECTOR, "norm1000"),
        _row("gemma3", "model.vision_tower", "encoder.layers", _PROJECTOR, "norm1000"),
        _row("paligemma", "model.vision_tower", "encoder.layers", _PROJECTOR, "paligemma"),
    )
}

_TOWER_LAYERS = (
    "encoder.layers",
    "vision_model.encoder.layers",
    "blocks",
    "encoder.layer",
    "transformer.layers",
    "layers",
    "layer",
)
"""Where a tower keeps its blocks, relative to the tower: looked up in this order when the row's own path is not there,
because llava-like models take any tower."""

_PEFT_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})
"""Modules peft puts around the original one: they vanish from canonical names."""

_PEFT_CONTAINERS = (
    "modules_to_save", "bottleneck_", "crossmodal_", "prefixkv_",
    "adamss_", "beft_", "boft_", "c3a_", "deft_", "delora_", "fourierft_", "frod_", "glora_", "gralora_", "hada_",
    "hira_", "hra_", "ia3_", "lily_", "ln_tuning_", "lokr_", "lora_", "miss_", "oft_", "osf_", "peanut_", "poly_",
    "psoft_", "pvera_", "randlora_", "road_", "shira_", "supertuning_", "tinylora_", "trainable_tokens_", "unilora_",
    "vblora_", "vera_", "waveft_",
)  # fmt: skip
"""What the names of dictionaries keyed by adapter name begin with (peft 0.21 and our own tuners): the component after
one of them is an adapter's name and vanishes from canonical names."""


LINEAR_ROLES: dict[str, str] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "projection_layer": "o",
    "qkv": "qkv", "proj": "o",
    "gate_proj": "gate", "up_proj": "up", "fc1": "up", "linear_fc1": "up",
    "down_proj": "down", "fc2": "down", "linear_fc2": "down",
}  # fmt: skip
"""Name of a linear module inside a block -> what it does there, in every family above."""

RANK_KINDS: dict[str, tuple[str, ...]] = {
    "qk": ("q", "k", "qkv"),
    "vo": ("v", "o"),
    "up": ("gate", "up"),
    "down": ("down",),
    "cross": ("cross",),
    "other": ("other",),
}
"""The kinds of linear modules that a rule may give ranks by (SPEC C2), and their roles. A fused qkv counts as qk."""


def linear_role(path: str) -> str:
    """One of "q", "k", "v", "qkv", "o", "gate", "up", "down" or "cross" (any of a cross-attention); else "other".

    path: of a linear module, canonical or the model's own. Outside of blocks there are no roles.
    """
    *parents, leaf = path.split(".")
    if any(parent.startswith(("cross_attn", "cross_attention", "crossattention")) for parent in parents):
        return "cross"
    in_block = any(parent in ("layers", "layer", "blocks") for parent in parents)
    return LINEAR_ROLES.get(leaf, "other") if in_block else "other"


def rank_kind(path: str) -> str:
    """The one of RANK_KINDS that a linear module belongs to."""
    role = linear_role(path)
    return next(kind for kind, roles in RANK_KINDS.items() if role in roles)


def supported_model_types() -> tuple[str, ...]:
    return tuple(ANATOMIES)


def require_supported(model_type: str | None, where: str) -> Anatomy:
    """The row of `model_type`; VlmtuneError naming the supported types when there is none."""
    if model_type not in ANATOMIES:
        known = ", ".join(ANATOMIES)
        raise VlmtuneError(
            f"{where} has model_type {model_type!r}, for which vlmtune has no anatomy: use one of {known}, "
            "or add a row to vlmtune/models/anatomy.py."
        )
    return ANATOMIES[model_type]


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of this very model: its family's row, with the blocks of its tower looked up, every path checked.

    A `coordinates` attribute on the model's config overrides the row's.
    Raises VlmtuneError for an unknown family, a path that does not exist, or unknown coordinates.
    """
    where = type(model).__name__
    row = require_supported(getattr(model.config, "model_type", None), where)
    coordinates = getattr(model.config, "coordinates", None) or row.coordinates
    if coordinates not in get_args(Coordinates):
        raise VlmtuneError(
            f"the config of {where} says coordinates: {coordinates!r}; write one of {', '.join(get_args(Coordinates))}."
        )
    anatomy = replace(row, vision_layers=_tower_layers(model, row), coordinates=coordinates)
    paths = (anatomy.vision, anatomy.language, anatomy.language_layers, anatomy.embed, anatomy.head)
    for path in (*paths, *anatomy.projector):
        if _at(model, path) is None:
            raise VlmtuneError(
                f"{where} ({row.model_type}) has no {path!r}: pass the plain ForConditionalGeneration model, not one "
                "wrapped by peft or a trainer, in the transformers version that pyproject.toml names."
            )
    return anatomy


def canonical_name(anatomy: Anatomy, parameter_name: str) -> str:
    """The canonical name of a parameter, from its name in `model.named_parameters()`.

    What peft adds to names is dropped: `…q_proj.base_layer.weight` becomes `…q_proj.weight` and
    `…q_proj.lora_A.default.weight` becomes `…q_proj.lora_A.weight`. A head tied to the embedding is `embed.weight` in
    `canonical_parameters`, because torch reports a shared parameter under its first name only.
    Raises VlmtuneError when the parameter belongs to no part.
    """
    plain = _without_peft(parameter_name)
    for path, canonical in _places(anatomy):
        if plain == path:
            return canonical
        if plain.startswith(path + "."):
            return canonical + plain.removeprefix(path)
    raise VlmtuneError(
        f"parameter {parameter_name!r} of a {anatomy.model_type} model lies in no part that vlmtune knows: "
        "add its path to the row in vlmtune/models/anatomy.py."
    )


def canonical_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, in the model's order, each exactly once (a tied one under its first name).

    Raises VlmtuneError when two parameters would get one name: two adapters of one kind on one module.
    """
    anatomy = anatomy_of(model)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        canonical = canonical_name(anatomy, name)
        if canonical in parameters:
            raise VlmtuneError(
                f"two parameters share the canonical name {canonical!r} (the second is {name!r}): "
                "give each module at most one adapter of a kind."
            )
        parameters[canonical] = parameter
    return parameters


def part_of(canonical: str) -> str:
    """The part (one of PARTS) a canonical parameter name belongs to."""
    return canonical.split(".", 1)[0]


def part_modules(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Every part's modules: the largest ones that hold nothing of another part, so that no two parts overlap.

    Qwen's tower holds the merger, therefore its `vision` is the tower's other children. `heads` is empty when no
    read-out was attached, `lm_head` when the head is tied: its weight is `embed.weight`.
    """
    anatomy = anatomy_of(model)
    projector = [found for path in anatomy.projector if isinstance(found := _at(model, path), nn.Module)]
    embed, head, heads = _at(model, anatomy.embed), _at(model, anatomy.head), _at(model, HEADS)
    embed_parameters = {id(parameter) for parameter in embed.parameters()}
    is_tied = any(id(parameter) in embed_parameters for parameter in head.parameters())
    return {
        "vision": _without(_at(model, anatomy.vision), projector),
        "projector": projector,
        "language": _without(_at(model, anatomy.language), [embed]),
        "embed": [embed],
        "lm_head": [] if is_tied else [head],
        "heads": [] if heads is None else [heads],
    }


def unreachable_parameters(model: PreTrainedModel) -> set[str]:
    """Canonical names of parameters that no loss can ever reach, by the family's design: never train them.

    Llava-like models read the tower's `hidden_states[vision_feature_layer]`, taken before the final norm: later blocks
    and that norm get no gradient (InternVL reads the normed output when the layer is -1). SigLIP's pooling head and a
    mask token for masked-image pre-training are never read. Distributed training breaks on such parameters (PAINS
    33); `tests/unit/models/test_anatomy.py` compares this set with a real backward.
    """
    anatomy = anatomy_of(model)
    unread = {"head", "mask_token"}
    first_unused_block = len(_at(model, anatomy.vision_layers))
    chosen = getattr(model.config, "vision_feature_layer", None)
    if chosen is not None:
        indices = [chosen] if isinstance(chosen, int) else list(chosen)
        states = first_unused_block + 1  # the input of the first block comes before the outputs of all blocks
        first_unused_block = max(index if index >= 0 else states + index for index in indices)
        if model.config.model_type != "internvl":
            unread.add("post_layernorm")
        elif chosen != -1:
            unread.add("layernorm")

    def is_unreachable(name: str) -> bool:
        part, *rest = name.split(".")
        if part != "vision":
            return False
        if rest[0] == "layers":
            return int(rest[1]) >= first_unused_block
        return not unread.isdisjoint(rest)

    return {name for name in canonical_parameters(model) if is_unreachable(name)}


def _places(anatomy: Anatomy) -> list[tuple[str, str]]:
    """(path in the model, canonical prefix), inner paths before the ones that contain them."""
    places = [
        (anatomy.vision, "vision"),
        (anatomy.vision_layers, "vision.layers"),
        (anatomy.language, "language"),
        (anatomy.language_layers, "language.layers"),
        (anatomy.embed, "embed"),
        (anatomy.head, "lm_head"),
        (HEADS, "heads"),
    ]
    for path in anatomy.projector:
        is_only = len(anatomy.projector) == 1
        places.append((path, "projector" if is_only else f"projector.{path.rsplit('.', 1)[-1]}"))
    return sorted(places, key=lambda place: len(place[0]), reverse=True)


def _without_peft(name: str) -> str:
    kept: list[str] = []
    is_adapter_name = False
    for component in name.split("."):
        if not is_adapter_name and component not in _PEFT_WRAPPERS:
            kept.append(component)
        is_adapter_name = not is_adapter_name and component.startswith(_PEFT_CONTAINERS)
    return ".".join(kept)


def _at(root: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    """What lies at a dotted path, or None."""
    found = root
    for component in path.split("."):
        found = getattr(found, component, None)
    return found


def _tower_layers(model: nn.Module, row: Anatomy) -> str:
    """Path of the tower's list of blocks: the row's, or the first known place that holds a ModuleList."""
    candidates = (row.vision_layers, *(f"{row.vision}.{layers}" for layers in _TOWER_LAYERS))
    for path in candidates:
        if isinstance(_at(model, path), nn.ModuleList):
            return path
    tower = type(_at(model, row.vision)).__name__
    raise VlmtuneError(
        f"the vision tower {tower} at {row.vision!r} of {type(model).__name__} keeps its blocks in none of "
        f"{', '.join(_TOWER_LAYERS)}: add the place to _TOWER_LAYERS in vlmtune/models/anatomy.py."
    )


def _without(module: nn.Module, excluded: list[nn.Module]) -> list[nn.Module]:
    """The largest submodules of `module` that hold none of `excluded`."""
    if any(module is other for other in excluded):
        return []
    inside = list(module.modules())
    if not any(other is found for other in excluded for found in inside):
        return [module]
    return [kept for child in module.children() for kept in _without(child, excluded)]
