"""Models and processors from a folder or the Hub, and processors back to a folder.

Importing this module imports transformers, keeps it quiet, registers our own tower with it, and, where torchvision is
missing, makes processors that have a video slot usable for images (shared STACK notes, section 0). Nothing that the
command line needs for `--help` may import it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMProcessor,
)
from transformers.utils import cached_file, is_torchvision_available
from transformers.utils import logging as transformers_logging

import vlmtune.models.efficientnet  # noqa: F401  registers the tower of the embedded model with AutoConfig
import vlmtune.models.resampler  # noqa: F401  registers LLaVA with a resampler
from vlmtune.models.anatomy import require_supported
from vlmtune.models.quantise import (
    Quantisation,
    as_plain_model,
    guard_gradients,
    quantisation_config,
    require_quantised,
)
from vlmtune.types import VlmtuneError

PROCESSOR_FILES = (
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json"),
    ("tokenizer_config.json",),
)
"""What a folder must hold for its processor to load: one file of each group."""


def load_model(
    path_or_name: str,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    *,
    quantisation: Quantisation | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in a folder or on the Hub, in eval mode on the CPU, as `from_pretrained` gives it.

    attention: an `attn_implementation` of transformers ("sdpa", "eager", or a registered one). quantisation: modules
    that are quantised while they are read (on the GPU where there is one).
    Raises VlmtuneError when there is no such model, its family has no anatomy, or weights are missing in the files
    (transformers would only warn and initialise them at random).
    """
    _require_files(path_or_name, (("config.json",),), "model", "pass the folder that save_pretrained wrote")
    require_supported(_model_type(path_or_name), f"the model {path_or_name!r}")
    how: dict[str, Any] = {}
    if quantisation is not None:
        linear = [path for path, module in meta_model(path_or_name).named_modules() if isinstance(module, nn.Linear)]
        how["quantization_config"] = quantisation_config(quantisation, linear)
        how["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path_or_name,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **how,
        )
    except (OSError, SafetensorError) as error:
        remedy = "take the complete folder; one that vlmtune exported can be deleted and exported again"
        raise VlmtuneError(
            f"the weights of {path_or_name!r} cannot be read ({_first_line(error)}): {remedy}."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise VlmtuneError(
            f"{path_or_name!r} lacks {len(missing)} weights its config.json calls for (first: {missing[0]}), "
            "which would be random: take the complete folder, or the config.json that belongs to it."
        )
    if quantisation is not None:
        require_quantised(model, quantisation)
        guard_gradients(model)
        as_plain_model(model)
    return model


def meta_model(path_or_name: str) -> PreTrainedModel:
    """The model of a config.json without weights: every parameter is on the meta device."""
    _require_files(path_or_name, (("config.json",),), "model", "pass the folder that save_pretrained wrote")
    require_supported(_model_type(path_or_name), f"the model {path_or_name!r}")
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path_or_name))


def stored_dtype(path_or_name: str) -> torch.dtype:
    """The number format that a model's config.json names for its weights; float32 where it names none."""
    config = PreTrainedConfig.get_config_dict(path_or_name)[0]
    name = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), torch.float32) if name else torch.float32
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_processor(path_or_name: str) -> ProcessorMixin:
    """The processor of a model, padding on the right, images prepared by the PIL backend (the same everywhere).

    Raises VlmtuneError naming the files that are missing.
    """
    remedy = "copy them from the base model's folder, or save its processor there"
    _require_files(path_or_name, PROCESSOR_FILES, "processor", remedy)
    try:
        processor = AutoProcessor.from_pretrained(path_or_name)
        if is_torchvision_available():
            processor.image_processor = AutoImageProcessor.from_pretrained(path_or_name, backend="pil")
    except (OSError, ValueError) as error:
        raise VlmtuneError(
            f"the processor of {path_or_name!r} cannot be loaded ({_first_line(error)}): {remedy}."
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise VlmtuneError(
            f"{path_or_name!r} holds only a {type(processor).__name__} where a processor with an image processor "
            f"should be: {remedy}."
        )
    processor.tokenizer.padding_side = "right"
    return processor


def save_processor(processor: ProcessorMixin, source: str, folder: Path) -> None:
    """Write `processor` to `folder` so that it loads everywhere the processor of `source` does.

    source: the folder or Hub name the processor was loaded from. Two things come from there unchanged: the
    `video_processor` section (a processor without one cannot be loaded where torchvision is installed, and ours has
    none where it is not), and the tokenizer's `padding_side` (we train with right, generation needs the family's own).
    """
    video = _source_json(source, "processor_config.json").get("video_processor")
    video = video or _source_json(source, "video_preprocessor_config.json")
    side = _source_json(source, "tokenizer_config.json").get("padding_side")
    processor.save_pretrained(folder)
    if video:
        saved = _read_json(folder / "processor_config.json")
        _write_json(folder / "processor_config.json", saved | {"video_processor": video})
    tokenizer = _read_json(folder / "tokenizer_config.json")
    tokenizer.pop("padding_side", None)
    _write_json(folder / "tokenizer_config.json", tokenizer | ({"padding_side": side} if side else {}))


def _require_files(path_or_name: str, groups: tuple[tuple[str, ...], ...], what: str, remedy: str) -> None:
    """Refuse a folder in which a group of files has no member, and a name that is neither a folder nor a Hub name."""
    folder = Path(path_or_name)
    if folder.is_dir():
        missing = [" or ".join(group) for group in groups if not any((folder / name).is_file() for name in group)]
        if missing:
            raise VlmtuneError(f"no {what} in {path_or_name!r}: {', '.join(missing)} not found; {remedy}.")
    elif folder.exists():
        raise VlmtuneError(f"{path_or_name!r} is a file, not a model folder: pass the folder that contains it.")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_name)):
        raise VlmtuneError(f"the model folder {path_or_name!r} does not exist: check the path.")


def _model_type(path_or_name: str) -> str | None:
    """`model_type` of a config, read without building anything."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path_or_name)
    except OSError as error:
        raise VlmtuneError(
            f"{path_or_name!r} is neither a folder here nor a model that the Hugging Face Hub gave us "
            f"({_first_line(error)}): check the name and the network, or download the model and pass its folder."
        ) from error
    return config.get("model_type")


def _source_json(source: str, name: str) -> dict:
    """A JSON file of a folder or Hub model; empty when it has none."""
    path = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return _read_json(Path(path)) if path else {}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    """The first line of a foreign message without its full stop, to stand inside a sentence of ours."""
    return str(error).strip().split("\n")[0].rstrip(".")


def _allow_images_without_torchvision() -> None:
    """Video processors exist for torchvision only; take them out of the processors that ask for one.

    Changes transformers in this process, once, at import of this module. Image processing is untouched.
    """
    attributes_of = ProcessorMixin.get_attributes.__func__

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in attributes_of(cls) if name != "video_processor"]

    ProcessorMixin.get_attributes = classmethod(get_attributes)
    ProcessorMixin.video_processor = SimpleNamespace(num_frames=None, fps=None, merge_size=1, model_input_names=[])
    defaults = SmolVLMProcessor.__init__.__defaults__
    if len(defaults) == 2:  # video_processor is a required positional argument there
        SmolVLMProcessor.__init__.__defaults__ = (None, *defaults)


transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
if not is_torchvision_available():
    _allow_images_without_torchvision()
