"""From one `Sample` to token ids, kinds and pixels, through the model's own processor and chat template.

The chat template writes the text around the parts; the parts themselves are held apart by sentinels, so the span of
every part is known and nothing is searched in what a user typed (SPEC A1-A3, B2):

1. images go through the image processor first: sizes and placeholder expansions are known before any text is written;
2. the template renders the conversation with each part wrapped in Unicode noncharacters;
3. the rendering is cut at those characters into pieces (text, kind, turn); template text between them is SPECIAL;
4. pieces are cut into runs at real control tokens (only template text, expanded images and rendered places can hold
   any) and at the start of each reply, where generation starts as well; each run is tokenised on its own.

For ordinary text the ids equal those of `AutoProcessor.apply_chat_template` on the same messages. Text that looks like
a control token is tokenised as the characters it is.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from vlmtune import __version__
from vlmtune.data.coordinates import Coordinates, box_row
from vlmtune.data.feature_store import FeatureStore
from vlmtune.data.pictures import Budget, Pictures, ProcessedImages
from vlmtune.data.regions import regions_of, require_mask_sizes
from vlmtune.data.tokenise import Piece, PieceTokeniser, Place, split_at_boxes
from vlmtune.types import (
    SUPERVISED,
    Boxes,
    Encoded,
    ImageName,
    ImageRef,
    Kind,
    Points,
    Sample,
    Text,
    Turn,
    VlmtuneError,
)

# Unicode noncharacters, never part of text: OPEN index CLOSE text OPEN CLOSE around each part
OPEN, CLOSE = "\ufdd0", "\ufdd1"
SENTINEL = re.compile(f"{OPEN}(\\d*){CLOSE}")
ROLES = ("system", "user", "assistant")


class Encoder:
    """Encodes samples for one model.

    processor: any `ProcessorMixin` with a tokenizers-backed tokenizer and a chat template; coordinates: how this model
    writes boxes; max_length: tokens, image placeholders included (None = no limit); max_pixels_per_sample: of
    all images of a sample together; reads_regions: find out where read-outs look, and decode masks.
    """

    def __init__(
        self,
        processor,
        coordinates: Coordinates,
        max_length: int | None = None,
        max_pixels_per_sample: int | None = None,
        reads_regions: bool = False,
    ):
        if getattr(processor, "chat_template", None) is None:
            raise VlmtuneError("The processor has no chat template: add chat_template.jinja to the model folder.")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.coordinates = coordinates
        self.max_length, self.reads_regions = max_length, reads_regions
        self.pictures = Pictures(processor, max_pixels_per_sample)
        if reads_regions and self.pictures.merges:
            raise VlmtuneError(
                "data.complexity merges image tokens of this model, but loss.boxes and loss.referring look at all of "
                "them; leave one of the two out."
            )
        self._store: FeatureStore | None = None
        _require_tokens(self.tokenizer, coordinates)
        self.image_token_ids = {int(i) for i in processor.image_token_ids if i is not None}
        self._tokens = PieceTokeniser(self.tokenizer, processor.chat_template, coordinates.tokens())
        self._prefix_ids = _automatic_prefix(self.tokenizer)
        self._trims = {role: self._template_trims(role) for role in ROLES}
        self._lead = self._reply_lead()
        text_only = processor(text=["a"], return_tensors="pt")
        self._extra_names = [n for n in ("token_type_ids", "mm_token_type_ids") if n in text_only]
        self._stops = self._find_stops()

    # ---- public -------------------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def identity(self) -> str:
        """A digest of everything that the tokens of a sample, and whether it has any, depend on besides the sample."""
        image_processor = self.processor.image_processor
        parts = [
            __version__,
            type(image_processor).__name__,
            image_processor.to_json_string(),
            self.pictures.per_sample,
            self.processor.chat_template,
            self.tokenizer.backend_tokenizer.to_str(),
            self.coordinates.name,
            self.reads_regions,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, sample: Sample, images: Sequence[Image.Image] | None = None) -> Encoded:
        """The whole conversation. images: those of the sample, where somebody decoded them already.

        Raises VlmtuneError (naming the sample) for anything that cannot be encoded.
        """
        if not any(turn.role == "assistant" and turn.train and not turn.is_empty for turn in sample.turns):
            raise VlmtuneError(
                f"{_where(sample)}: no assistant reply to learn from; add one or remove the row.", code="reply_empty"
            )
        encoded = self._encode(sample, sample.turns, add_generation_prompt=False, decoded=images)
        if self.max_length is not None and len(encoded) > self.max_length:
            raise VlmtuneError(
                f"{_where(sample)}: {len(encoded)} tokens (images included) exceed max_length {self.max_length}; "
                "raise data.max_length or shorten the sample."
            )
        return encoded

    def without_limit(self) -> Encoder:
        """The same encoder for samples of any length."""
        free = copy.copy(self)
        free.max_length = None
        return free

    def looking_up(self, store: FeatureStore) -> Encoder:
        """The same encoder, that gives `images` in place of pixels, with the features that are in the store."""
        looking = copy.copy(self)
        looking._store = store
        return looking

    def count(self, sample: Sample) -> int:
        """Tokens of `encode(sample)`, images included, without decoding one, unless a rule of complexity asks for it:
        their sizes stand in file headers."""
        images = self.pictures.measure(sample.images, sample.max_pixels, _where(sample))
        ids, _ = self._tokens_of(sample, sample.turns, images, prompt=False)
        if self.reads_regions:
            require_mask_sizes(sample, images.geometry, _where(sample))
        return len(ids)

    def budgets(self, sample: Sample) -> list[Budget]:
        """What the rule of complexity makes of each image of a sample; nothing without one."""
        if self.pictures.rule is None:
            return []
        return self.pictures.budgets(sample.images, sample.max_pixels, _where(sample))

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The conversation up to the last reply, ending in the generation prompt: what the model sees at inference."""
        turns = list(sample.turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        return self._encode(sample, tuple(turns), add_generation_prompt=True)

    @property
    def takes_system(self) -> bool:
        """Whether the chat template has a place for a system turn."""
        turns = tuple(Turn(role, (Text("a"),)) for role in ROLES)
        try:
            return bool((self.encode(Sample("probe", turns)).turn == 0).any())
        except VlmtuneError:
            return False

    def text_length(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._tokens.ids(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a generated reply: up to the end-of-turn token, coordinates kept."""
        ids = [int(i) for i in ids]
        stops = self.stop_token_ids()
        end = next((n for n, i in enumerate(ids) if i in stops), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()

    def stop_token_ids(self) -> set[int]:
        """Ids that end a reply: the tokenizer's eos and the token the template writes after a reply."""
        return set(self._stops)

    @property
    def end_of_reply(self) -> int:
        """Id of the token that the template writes behind every reply."""
        return self._end_of_reply

    def _find_stops(self) -> set[int]:
        probe = (Turn("user", (Text("a"),)), Turn("assistant", (Text("b"),)))
        encoded = self._encode(Sample("probe", probe), probe, add_generation_prompt=False)
        self._end_of_reply = int(encoded.ids[encoded.kinds == Kind.RESPONSE][-1])
        return {self._end_of_reply, int(self.tokenizer.eos_token_id), self.pad_token_id}

    # ---- text ---------------------------------------------------------------------------------------------------

    def _encode(
        self,
        sample: Sample,
        turns: tuple[Turn, ...],
        add_generation_prompt: bool,
        decoded: Sequence[Image.Image] | None = None,
    ) -> Encoded:
        if self._store is not None and decoded is None:
            images = self.pictures.look_up(_images_of(turns), sample.max_pixels, _where(sample), self._store)
        elif decoded is None:
            images = self.pictures.load(_images_of(turns), sample.max_pixels, _where(sample))
        else:
            images = self.pictures.process(decoded, sample.max_pixels, _where(sample))
        ids, owners = self._tokens_of(sample, turns, images, add_generation_prompt)
        regions = []
        if self.reads_regions:
            regions = regions_of(ids, owners, self.processor, images.geometry, _where(sample))
        extras = {}
        if self._extra_names:
            types = torch.as_tensor(np.asarray(self.processor.create_mm_token_type_ids([ids])))[0].long()
            extras = {name: types for name in self._extra_names}
        return Encoded(
            id=sample.id,
            task=sample.task,
            ids=torch.tensor(ids, dtype=torch.int64),
            kinds=torch.tensor([int(piece.kind) for piece in owners], dtype=torch.int8),
            turn=torch.tensor([piece.turn for piece in owners], dtype=torch.int16),
            pixels=images.pixels,
            token_extras=extras,
            geometry=images.geometry,
            origin=sample.origin,
            regions=regions,
            images=images.images,
            merges=images.merges,
        )

    def _tokens_of(
        self, sample: Sample, turns: tuple[Turn, ...], images: ProcessedImages, prompt: bool
    ) -> tuple[list[int], list[Piece]]:
        """Every token of the conversation, and the piece it is of."""
        pieces = self._pieces(sample, turns, images, prompt)
        ids, owners = self._tokens.tokenise(pieces)
        bos = self.tokenizer.bos_token
        template_writes_bos = bool(bos and pieces and pieces[0].control and pieces[0].text.startswith(bos))
        if self._prefix_ids and not template_writes_bos:
            ids = [*self._prefix_ids, *ids]
            owners = [Piece("", Kind.SPECIAL)] * len(self._prefix_ids) + owners
        return ids, owners

    def _pieces(self, sample: Sample, turns: tuple[Turn, ...], images: ProcessedImages, prompt: bool) -> list[Piece]:
        """Render the template around the parts and cut the rendering into pieces."""
        parts: list[Piece] = []
        messages = []
        for index, turn in enumerate(turns):
            entries: list[list[int] | None] = []  # numbers of the pieces of one text; None: an image
            inline = False
            for part in turn.parts:
                if not isinstance(part, ImageRef) or part.id is not None:
                    # what stands inside a text is no text of its own to the template, which may trim each one
                    within = not isinstance(part, Text) or part.entity
                    if entries and entries[-1] is not None and (inline or within):
                        entries[-1].append(len(parts))
                    else:
                        entries.append([len(parts)])
                    inline = within
                    parts.append(self._part_piece(sample, turn, index, len(parts), part, images))
                if isinstance(part, ImageRef):
                    entries.append(None)
            if self._trims[turn.role]:
                _strip_ends(entries, parts)
            messages.append({"role": turn.role, "content": _content(entries, parts)})
        rendered = self._render(messages, prompt, sample)
        self._check_rewrite(rendered, messages, prompt, sample)
        return self._cut(rendered, parts, images, sample, turns)

    def _part_piece(self, sample: Sample, turn: Turn, index: int, number: int, part, images: ProcessedImages) -> Piece:
        """number: of this part among the pieces of the sample."""
        reply = turn.role == "assistant"
        plain = Kind.INSTRUCTION if not reply else Kind.RESPONSE if turn.train else Kind.UNTRAINED
        if isinstance(part, ImageRef):
            part = ImageName(part.id)
        if isinstance(part, (Text, ImageName)):
            if OPEN in part.text or CLOSE in part.text:
                raise VlmtuneError(f"{_where(sample)}: text holds U+FDD0 or U+FDD1, reserved by Unicode; remove them.")
            is_entity = plain == Kind.RESPONSE and isinstance(part, Text) and part.entity
            return Piece(part.text, Kind.ENTITY if is_entity else plain, index)
        if isinstance(part, (Boxes, Points)):
            if part.image >= len(images.geometry):
                what = "box" if isinstance(part, Boxes) else "point"
                raise VlmtuneError(
                    f"{_where(sample)}: a {what} refers to image {part.image}, but the sample has "
                    f"{len(images.geometry)}."
                )
            geometry = images.geometry[part.image]
            try:
                if isinstance(part, Boxes):
                    text = self.coordinates.render(part.boxes, geometry, part.region)
                else:
                    text = self.coordinates.render_points(part.points, geometry, part.click)
            except VlmtuneError as error:
                raise VlmtuneError(f"{_where(sample)}: {error}", code=error.code) from error
            kind = Kind.BOX if plain == Kind.RESPONSE else plain
            read = self.reads_regions and isinstance(part, Boxes) and part.boxes and kind != Kind.UNTRAINED
            places = self._places(part, text, kind, number, geometry) if read else ()
            return Piece(text, kind, index, control=True, places=places)
        raise VlmtuneError(f"{_where(sample)}: unknown content part {type(part).__name__}.")

    def _places(self, part: Boxes, text: str, kind: Kind, number: int, geometry) -> tuple[Place, ...]:
        starts = self.coordinates.box_starts(text)
        masks = part.masks or [None] * len(part.boxes)
        answers = kind == Kind.BOX and not part.region
        return tuple(
            Place(start, box_row(box, geometry), part.image, number, answers, mask)
            for start, box, mask in zip(starts, part.boxes, masks, strict=True)
        )

    def _render(self, messages: list[dict], prompt: bool, sample: Sample | None) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's raise_exception has no class of its own
            raise VlmtuneError(
                f"{_where(sample) if sample else 'probe'}: the chat template refuses this conversation: {error}"
            ) from error

    def _check_rewrite(self, rendered: str, messages: list[dict], prompt: bool, sample: Sample) -> None:
        """The template must have written every part as it was given: otherwise spans and ids would drift apart."""
        plain = [
            {
                "role": m["role"],
                "content": [
                    p if p["type"] == "image" else p | {"text": SENTINEL.sub("", p["text"])} for p in m["content"]
                ],
            }
            for m in messages
        ]
        if SENTINEL.sub("", rendered) != self._render(plain, prompt, sample):
            raise VlmtuneError(_rewrites(sample))

    def _cut(self, rendered: str, parts: list[Piece], images: ProcessedImages, sample: Sample, turns) -> list[Piece]:
        pieces: list[Piece] = []
        expansions = iter(images.expansions)
        used = 0
        position = 0
        seen: set[int] = set()
        opened: set[int] = set()
        inside: int | None = None
        for match in [*SENTINEL.finditer(rendered), None]:
            text = rendered[position : match.start()] if match else rendered[position:]
            if inside is None:
                literals = _split_placeholders(text, self.processor.image_token)
                for literal, is_image in literals:
                    if is_image:
                        expansion = next(expansions, None)
                        used += 1
                        if expansion is not None:
                            pieces.append(Piece(expansion, Kind.IMAGE, control=True))
                    elif literal:
                        pieces.append(Piece(literal, Kind.SPECIAL, control=True))
            else:
                part = parts[inside]
                if text != part.text:
                    raise VlmtuneError(_rewrites(sample))
                first = turns[part.turn].role == "assistant" and part.turn not in opened
                opened.add(part.turn)
                if first and self._lead and pieces and pieces[-1].text.endswith(self._lead):
                    pieces[-1] = replace(pieces[-1], text=pieces[-1].text.removesuffix(self._lead))
                    pieces.append(Piece(self._lead, part.kind, part.turn, opens=True))
                    first = False
                pieces += split_at_boxes(replace(part, opens=first))
            if match:
                inside = int(match.group(1)) if match.group(1) else None
                if inside is not None:
                    seen.add(inside)
                position = match.end()
        if len(seen) != len(parts) or used != len(images.expansions):
            raise VlmtuneError(
                f"{_where(sample)}: the chat template wrote {len(seen)} of {len(parts)} text parts and {used} image "
                f"placeholders for {len(images.expansions)} images; this template does not fit this conversation."
            )
        return _supervise_end_of_turn(pieces, self._tokens.control, sample)

    def _reply_lead(self) -> str:
        """White space between the generation prompt and a reply ("Assistant:" + " ok"): the model has to write it."""
        question = {"role": "user", "content": [{"type": "text", "text": "y"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": OPEN}]}
        prompt = self._render([question], True, None)
        before, mark, _ = self._render([question, answer], False, None).partition(OPEN)
        lead = before.removeprefix(prompt)
        return lead if mark and before.startswith(prompt) and lead.isspace() else ""

    def _template_trims(self, role: str) -> bool:
        """Whether the template strips white space around the content of this role (Gemma's does)."""
        content = [{"type": "text", "text": " \nx\n "}]
        before = [{"role": "user", "content": [{"type": "text", "text": "y"}]}] if role == "assistant" else []
        after = [{"role": "user", "content": [{"type": "text", "text": "y"}]}] if role == "system" else []
        try:
            rendered = self._render([*before, {"role": role, "content": content}, *after], False, None)
        except VlmtuneError:
            return False  # the template has no such role; a sample that uses it is refused with its id
        return " \nx\n " not in rendered


# ---- helpers of one purpose each --------------------------------------------------------------------------------


def _where(sample: Sample) -> str:
    return f"{sample.origin} (sample {sample.id})" if sample.origin else f"sample {sample.id}"


def _images_of(turns: Sequence[Turn]) -> list[ImageRef]:
    return [part for turn in turns for part in turn.parts if isinstance(part, ImageRef)]


def _rewrites(sample: Sample) -> str:
    return (
        f"{_where(sample)}: the chat template rewrites message text (a trim, a cut or a filter that vlmtune does not "
        "know); the span of the reply would be wrong. Use a template that writes content as it is."
    )


def _require_tokens(tokenizer, coordinates: Coordinates) -> None:
    """A coordinate token that the tokenizer lacks would be cut into characters: ten tokens where one is meant."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in coordinates.tokens() if token not in vocabulary]
    if missing:
        raise VlmtuneError(
            f"coordinates {coordinates.name!r} need {len(missing)} tokens that the model's tokenizer lacks (first: "
            f"{missing[0]}); set data.add_coordinate_tokens: true, or data.coordinates to one without tokens of its "
            "own (norm1000, pixels, markup)."
        )


def _automatic_prefix(tokenizer) -> list[int]:
    """Ids the tokenizer puts in front by itself (a bos, in the Llama family)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: len(full) - len(bare)] if full[len(full) - len(bare) :] == bare else []


def _strip_ends(entries: list[list[int] | None], parts: list[Piece]) -> None:
    """Where the template trims each text, trim it ourselves, outside the sentinels."""
    for entry in entries:
        for order, strip in ((entry or [], str.lstrip), (reversed(entry or []), str.rstrip)):
            for number in order:
                parts[number] = replace(parts[number], text=strip(parts[number].text))
                if parts[number].text:
                    break


def _content(entries: list[list[int] | None], parts: list[Piece]) -> list[dict]:
    """The content of a message as chat templates take it, every piece between sentinels."""
    return [
        {"type": "image"}
        if entry is None
        else {"type": "text", "text": "".join(f"{OPEN}{n}{CLOSE}{parts[n].text}{OPEN}{CLOSE}" for n in entry)}
        for entry in entries
    ]


def _split_placeholders(text: str, placeholder: str) -> list[tuple[str, bool]]:
    """[(text, False), (placeholder, True), …] of a stretch the template wrote."""
    out: list[tuple[str, bool]] = []
    for n, literal in enumerate(text.split(placeholder)):
        if n:
            out.append((placeholder, True))
        out.append((literal, False))
    return out


def _supervise_end_of_turn(pieces: list[Piece], control_re: re.Pattern, sample: Sample) -> list[Piece]:
    """Give the end-of-turn token after each reply (and white space before it) the kind and turn of that reply."""
    out: list[Piece] = []
    for n, piece in enumerate(pieces):
        reply = out[-1] if out else None
        if piece.kind == Kind.SPECIAL and reply is not None and reply.kind in (*SUPERVISED, Kind.UNTRAINED):
            match = control_re.search(piece.text)
            if match is None or piece.text[: match.start()].strip():
                raise VlmtuneError(
                    f"{_where(sample)}: the chat template writes {piece.text[:20]!r} after a reply instead of an "
                    "end-of-turn token, so the model would never learn to stop; use a template that ends replies."
                )
            ended = reply.kind != Kind.UNTRAINED and not sample.turns[reply.turn].cut
            kind = Kind.RESPONSE if ended else Kind.UNTRAINED  # a reply that was cut did not end here
            out.append(Piece(piece.text[: match.end()], kind, reply.turn, control=True))
            if match.end() < len(piece.text):
                out.append(Piece(piece.text[match.end() :], Kind.SPECIAL, control=True))
        else:
            if n == len(pieces) - 1 and piece.kind in SUPERVISED:
                raise VlmtuneError(f"{_where(sample)}: the chat template writes no end-of-turn token after the reply.")
            out.append(piece)
    return out
