"""Cross-modal adapters as a method of peft: after a sub-layer, text attends to the image features of its own sample.

    y + up(attention(W_q y, W_k F, W_v F))      y float[B, T, D]: the sub-layer's output

F are the projected image features as they enter the language model: the rows of `inputs_embeds` at image
placeholders. Gradients flow through them into the projector. A bottleneck of width `dim` with cross-attention in the
place of the non-linearity (cf. the gated cross-attention of Alayrac et al. 2022, Flamingo); `up` starts at zero, so
that step 0 is the base model, bit for bit.

Who sees what: a text token sees the features of images before it in its own document. Documents are the rows of a batch
and, in a packed row, what lies between two restarts of the position ids (transformers' own rule). Where a token sees
nothing (no image, or only later ones), and at the placeholders themselves, the adapter adds exactly zero. In cached
generation the features of the prefill travel with the cache.

How the features get to the blocks. Hooks on the model's body read the ids, a hook on the language model takes the
features, and they go down as a keyword argument to every block's attention module, where a hook takes them off again.
An argument, not a global: a block recomputed under gradient checkpointing gets those it had, however many passes came
in between.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vlmtune.adapt.extension import (
    SubLayer,
    SubLayerConfig,
    SubLayerTuner,
    float32_linear,
    join_output,
    linear_modules,
    new_peft_type,
    register,
    require_size,
    split_output,
)
from vlmtune.models.anatomy import anatomy_of
from vlmtune.types import VlmtuneError

CROSSMODAL = new_peft_type("CROSSMODAL")

_KEYWORD = "vlmtune_images"
"""Name of the keyword argument that goes down to the blocks, and of the attribute that a KV cache carries."""


@dataclass
class CrossModalConfig(SubLayerConfig):
    """dim: width of queries, keys and values together; heads: how many heads share it.

    target_modules: attention or feed-forward modules of the language model's blocks (`…layers.7.mlp`).
    """

    dim: int = 64
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CROSSMODAL
        require_size("cross_modal", "dim", self.dim)
        require_size("cross_modal", "heads", self.heads)
        if self.dim % self.heads:
            raise VlmtuneError(f"cross_modal: dim {self.dim} cannot be shared evenly by {self.heads} heads.")


@dataclass(eq=False)
class Images:
    """The image features that the tokens of one forward pass may look at: N slots per row, at least one.

    features float[B, N, D]; is_real bool[B, N]: False for the slots that fill a row up, and for placeholders that are
    padding; visible bool[B, 1, T, N]: which token sees which slot. projected: per adapter its (keys, values), kept
    between the steps of one generation, without gradients.
    """

    features: Tensor
    is_real: Tensor
    visible: Tensor
    projected: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class _Pass:
    """One forward pass of the model's body, from its first hook to its last."""

    ids: Tensor
    mask: Tensor | None
    position_ids: Tensor | None
    cache: Any
    past: int
    images: Images | None = None


class ImageContext:
    """What the cross-modal layers of one model share: the hooks, and which images the running block may look at."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self._pass: _Pass | None = None
        self._current: weakref.ref[Images] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model starts with a context that has seen nothing."""
        return self.__dict__ | {"_pass": None, "_current": None}

    @property
    def current(self) -> Images:
        """The images of the block that is running. VlmtuneError outside a forward pass of the whole model."""
        images = self._current() if self._current is not None else None
        if images is None:
            raise VlmtuneError(
                "cross_modal: a block ran without the model around it, so its image features are unknown; "
                "call the vision-language model (or its body), not the language model alone."
            )
        return images

    def install(self, model: nn.Module) -> None:
        """Hook the model, once."""
        if self._handles:
            return
        anatomy = anatomy_of(model)
        body, language = model.base_model, model.get_submodule(anatomy.language)
        self._handles = [
            body.register_forward_pre_hook(self._before_body, with_kwargs=True),
            body.register_forward_hook(self._after_body, always_call=True),
            language.register_forward_pre_hook(self._before_language, with_kwargs=True),
        ]
        for number, block in enumerate(model.get_submodule(anatomy.language_layers)):
            attention = getattr(block, "self_attn", None)
            if attention is None:
                raise VlmtuneError(
                    f"cross_modal: block {number} ({type(block).__name__}) of {anatomy.language_layers} has no "
                    "self_attn, through which the image features reach it."
                )
            if isinstance(attention, BaseTunerLayer):
                attention = attention.get_base_layer()
            self._handles.append(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_body(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise VlmtuneError("cross_modal: the model was called without input_ids, which say where its images are.")
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self._pass = _Pass(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), cache, past)

    def _before_language(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._pass is None:  # the language model alone: `current` complains if an adapter is there to need it
            return None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            raise VlmtuneError(
                f"cross_modal: {type(module).__name__} was not given inputs_embeds by name, so its image features "
                "cannot be read; this adapter does not work on this family."
            )
        self._pass.images = self._look(self._pass, embeds)
        return args, {**kwargs, _KEYWORD: self._pass.images}

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = kwargs.pop(_KEYWORD, None)
        # weak: whoever may need the images again (checkpointing, the cache) holds them; nothing stays after a step
        self._current = weakref.ref(images) if images is not None else None
        return args, kwargs

    def _after_body(self, module: nn.Module, args: tuple, output: Any) -> None:
        done, self._pass, self._current = self._pass, None, None
        if done is None or done.images is None:  # the pass failed before it had any
            return
        cache = done.cache if done.cache is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _KEYWORD, done.images)

    def _look(self, now: _Pass, embeds: Tensor) -> Images:
        """Gather the features of this pass, and those that the cache remembers. embeds float[B, T, D]."""
        rows, tokens = now.ids.shape
        is_image = now.ids == self.image_token_id
        slots = int(is_image.sum(1).max())
        if now.past and not hasattr(now.cache, _KEYWORD):
            raise VlmtuneError(
                "cross_modal: the cache was filled by a model without this adapter, so the image features of its "
                "tokens are unknown; start with an empty cache."
            )
        before: Images | None = getattr(now.cache, _KEYWORD) if now.past else None
        is_text = ~is_image.unsqueeze(-1)
        if before is not None and slots == 0:  # a step of generation: all images are in the past
            visible = (before.is_real.unsqueeze(1) & is_text).unsqueeze(1)
            return Images(before.features, before.is_real, visible, before.projected)
        # placeholders first, in order; rows with fewer are filled up with slots that nobody sees
        slot = torch.argsort((~is_image).to(torch.int8), dim=1, stable=True)[:, : max(1, slots)]
        features = embeds.gather(1, slot.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        is_real = is_image.gather(1, slot)
        may_read = _may_read(now, slot)
        comes_later = torch.arange(tokens, device=embeds.device).view(1, tokens, 1) > slot.unsqueeze(1)
        visible = may_read & comes_later & is_real.unsqueeze(1) & is_text
        is_real = is_real & may_read[:, -1]
        if before is not None:
            visible = torch.cat([before.is_real.unsqueeze(1) & is_text, visible], dim=2)
            features = torch.cat([before.features, features], dim=1)
            is_real = torch.cat([before.is_real, is_real], dim=1)
        return Images(features, is_real, visible.unsqueeze(1))


def _may_read(now: _Pass, slot: Tensor) -> Tensor:
    """bool[B, T, N] (or [B, 1, N], the same for all tokens): whether a token's document holds position `slot`
    int64[B, N].

    Says what the model's own attention mask says, but for causality: padding is nobody's, documents of a packed row are
    strangers.
    """
    rows, tokens = now.ids.shape
    mask = now.mask
    if isinstance(mask, dict):  # one per kind of layer (Gemma 3); the sliding ones forget, the full one does not
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is not None and mask.dim() == 2:
        return mask[:, now.past : now.past + tokens].bool().expand(rows, -1).gather(1, slot).unsqueeze(1)
    if mask is not None:
        attended = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        attended = attended[:, 0, :, now.past : now.past + tokens].expand(rows, -1, -1)
        return attended.gather(2, slot.unsqueeze(1).expand(-1, tokens, -1))
    documents = _documents(now)
    if documents is None:
        return torch.ones_like(slot, dtype=torch.bool).unsqueeze(1)
    return documents.unsqueeze(2) == documents.gather(1, slot).unsqueeze(1)


def _documents(now: _Pass) -> Tensor | None:
    """int64[B, T]: number of the document each token of a packed row belongs to; None when nothing says that rows are
    packed.

    transformers' rule (`masking_utils.find_packed_sequence_indices`): without attention mask and cache, a document
    begins wherever text positions do not go up by one. Qwen's position ids [4, B, T] hold the text positions first;
    its [3, B, T] hold none.
    """
    ids = now.position_ids
    if ids is None or now.cache is not None or (ids.dim() == 3 and ids.shape[0] != 4):
        return None
    text = (ids[0] if ids.dim() == 3 else ids).expand(now.ids.shape[0], -1)
    begins = torch.diff(text, prepend=text[:, :1] - 1) != 1
    return begins.cumsum(1)


class CrossModalLayer(SubLayer):
    """A sub-layer of a decoder block with cross-attention to the sample's image features after it."""

    method = "cross_modal"
    adapter_layer_names = ("crossmodal_query", "crossmodal_key", "crossmodal_value", "crossmodal_up")
    other_param_names = ("crossmodal_heads",)

    def __init__(self, base_layer: nn.Module, context: ImageContext, path: str, feature_width: int) -> None:
        super().__init__(base_layer)
        self.context = context
        self.path = path
        self.feature_width = feature_width
        self.crossmodal_query = nn.ModuleDict()
        self.crossmodal_key = nn.ModuleDict()
        self.crossmodal_value = nn.ModuleDict()
        self.crossmodal_up = nn.ModuleDict()
        self.crossmodal_heads: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: CrossModalConfig) -> None:
        width = list(linear_modules(self.base_layer))[-1].out_features
        # no biases: what attends to nothing must add exactly zero, and softmax would cancel one on keys anyway
        shapes = {
            "query": (width, config.dim),
            "key": (self.feature_width, config.dim),
            "value": (self.feature_width, config.dim),
            "up": (config.dim, width),
        }
        for name, (inputs, outputs) in shapes.items():
            linear = float32_linear(inputs, outputs, self.base_device(), bias=False)
            getattr(self, f"crossmodal_{name}")[adapter_name] = linear
        nn.init.zeros_(self.crossmodal_up[adapter_name].weight)
        self.crossmodal_heads[adapter_name] = config.heads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-layer returns, its hidden states float[B, T, D] adapted."""
        output = self.base_layer(*args, **kwargs)
        active = self.active_here()
        if not active:
            return output
        hidden, rest = split_output(output)
        images = self.context.current
        for name in active:
            hidden = hidden + self._correction(name, hidden, images).to(hidden.dtype)
        return join_output(output, hidden, rest)

    def _correction(self, name: str, hidden: Tensor, images: Images) -> Tensor:
        """up(attention(W_q hidden, W_k F, W_v F)): float[B, T, D] -> float[B, T, D]."""
        heads = self.crossmodal_heads[name]
        query = _by_head(self.crossmodal_query[name], hidden, heads)
        key, value = self._keys_and_values(name, images, heads)
        sees_any = images.visible.any(dim=-1, keepdim=True)
        # a row of softmax that sees nothing would be NaN: it looks at everything, and is then put to zero
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=images.visible | ~sees_any)
        seen = torch.where(sees_any, seen, torch.zeros((), dtype=seen.dtype, device=seen.device))
        up = self.crossmodal_up[name]
        return up(seen.transpose(1, 2).flatten(2).to(up.weight.dtype))

    def _keys_and_values(self, name: str, images: Images, heads: int) -> tuple[Tensor, Tensor]:
        """float[B, heads, N, dim / heads] each; made once per generation."""
        known = f"{self.path}:{name}"
        if known in images.projected:
            return images.projected[known]
        made = tuple(
            _by_head(linear[name], images.features, heads) for linear in (self.crossmodal_key, self.crossmodal_value)
        )
        if not torch.is_grad_enabled():
            images.projected[known] = made
        return made


def _by_head(linear: nn.Module, states: Tensor, heads: int) -> Tensor:
    """float[B, T, width] -> float[B, heads, T, dim / heads]."""
    return linear(states.to(linear.weight.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)


class CrossModalTuner(SubLayerTuner):
    prefix = "crossmodal_"
    tuner_layer_cls = CrossModalLayer

    def require_supported(self, target: nn.Module, path: str) -> None:
        blocks = anatomy_of(self.model).language_layers
        is_sublayer = re.fullmatch(rf"{re.escape(blocks)}\.\d+\.\w+", path)
        if is_sublayer is None or next(linear_modules(target), None) is None:
            raise VlmtuneError(
                f"cross_modal: {path} ({type(target).__name__}) is not the attention or feed-forward module of a block "
                f"in {blocks}; text meets image features there only."
            )

    def make_layer(self, target: nn.Module, path: str) -> CrossModalLayer:
        return CrossModalLayer(target, self._context, path, self.model.config.get_text_config().hidden_size)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        contexts = (module.context for module in model.modules() if isinstance(module, CrossModalLayer))
        self._context = next(contexts, None) or ImageContext(model.config.image_token_id)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._context.install(model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._context.remove()
        return model


register("crossmodal", CrossModalConfig, CrossModalTuner)
