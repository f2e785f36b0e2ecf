"""Pieces of a rendered conversation -> token ids, so that nothing a user typed can become a control token."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from vlmtune.types import Kind


@dataclass(frozen=True, eq=False)
class Place:
    """A box on its way into a text. start: where its numbers begin in the piece that writes it; box: fractions of the
    canvas; list_of: the part of the sample it stands in; mask: as in `types.Boxes`."""

    start: int
    box: tuple[float, ...]
    image: int
    list_of: int
    is_answer: bool
    mask: Path | bytes | None


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered text. `control`: may contain real control tokens. `opens`: a reply starts here.

    places: the boxes it writes, one behind the other, where read-outs want to know; else none.
    """

    text: str
    kind: Kind
    turn: int = -1
    control: bool = False
    opens: bool = False
    places: tuple[Place, ...] = ()


def split_at_boxes(piece: Piece) -> list[Piece]:
    """The piece cut in front of the numbers of each of its boxes; each of the cuts has one place or none."""
    if not piece.places:
        return [piece]
    starts = [place.start for place in piece.places]
    cuts = zip(starts, [*starts[1:], len(piece.text)], piece.places, strict=True)
    pieces = [replace(piece, text=piece.text[begin:end], places=(place,)) for begin, end, place in cuts]
    if starts[0]:
        pieces.insert(0, replace(piece, text=piece.text[: starts[0]], places=()))
    return [pieces[0], *(replace(later, opens=False) for later in pieces[1:])]


class PieceTokeniser:
    """tokenizer: backed by tokenizers; chat_template, coordinate_tokens: say which added tokens steer the model.

    control: matches every control token.
    """

    def __init__(self, tokenizer, chat_template: str, coordinate_tokens: list[str]):
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)  # nobody else sets its padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._control_tokens = _control_tokens(tokenizer, chat_template, coordinate_tokens)
        self.control = re.compile("|".join(map(re.escape, sorted(self._control_tokens, key=len, reverse=True))))
        self._control_text = {index: token for token, index in self._control_tokens.items()}
        self._start_matters = self.ids("a") != self._ids_behind("\n", "a")

    def tokenise(self, pieces: list[Piece]) -> tuple[list[int], list[Piece]]:
        """Every token and the piece it is of. Runs end at control tokens and where a reply opens."""
        ids: list[int] = []
        owners: list[Piece] = []
        run: list[Piece] = []

        def flush() -> None:
            if run:
                before = self._control_text.get(ids[-1], "\n") if ids else ""
                for token, piece in self._tokenise_run(run, before):
                    ids.append(token)
                    owners.append(piece)
                run.clear()

        for piece in pieces:
            if piece.opens:
                flush()
            if not piece.control:
                run.append(piece)
                continue
            position = 0
            for match in self.control.finditer(piece.text):
                if match.start() > position:
                    run.append(replace(piece, text=piece.text[position : match.start()]))
                flush()
                ids.append(self._control_tokens[match.group()])
                owners.append(piece)
                position = match.end()
            if position < len(piece.text):
                run.append(replace(piece, text=piece.text[position:]))
        flush()
        return ids, owners

    def _tokenise_run(self, run: list[Piece], before: str) -> list[tuple[int, Piece]]:
        """(id, piece it came from). before: what stands in front of the run (a control token, a stand-in, nothing)."""
        text = "".join(piece.text for piece in run)
        ends = list(accumulate(len(piece.text) for piece in run))
        result = []
        for begin, stop in self._harmless(text):
            for token, start, end in self._tokens_behind(before if begin == 0 else "\n", text[begin:stop]):
                owner = bisect_right(ends, begin + max(end - 1, start))
                result.append((token, run[min(owner, len(run) - 1)]))
        return result

    def _tokens_behind(self, before: str, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of `text` where it does not begin the conversation.

        Tokenizers of the SentencePiece family write a space in front of a text; "ASSISTANT:" + " yes" must not get a
        second one. As in transformers' `encode_marked_chat`, `before` is tokenised with it and taken off again.
        """
        if before and self._start_matters:
            head = self.ids(before)
            tokens = self._tokens(before + text)
            if [token for token, _, _ in tokens[: len(head)]] == head:
                skip = len(before)
                return [(t, max(0, start - skip), max(0, end - skip)) for t, start, end in tokens[len(head) :]]
        return self._tokens(text)

    def _tokens(self, text: str) -> list[tuple[int, int, int]]:
        out = self._tokenizer.encode(text, add_special_tokens=False)
        return [(token, *span) for token, span in zip(out.ids, out.offsets, strict=True)]

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _ids_behind(self, before: str, text: str) -> list[int]:
        return self.ids(before + text)[len(self.ids(before)) :]

    def _harmless(self, text: str) -> Iterator[tuple[int, int]]:
        """(begin, stop) of stretches without a control token: what looks like one was typed, so it is cut in two.

        Cutting works for every tokenizer, also for added tokens that are not marked special, which
        `split_special_tokens` leaves whole.
        """
        begin = 0
        while (match := self.control.search(text, begin)) is not None:
            yield begin, match.start() + 1
            begin = match.start() + 1
        if begin < len(text):
            yield begin, len(text)


def _control_tokens(tokenizer, chat_template: str, coordinate_tokens: list[str]) -> dict[str, int]:
    """Added tokens that steer the model: special ones, those of the chat template, coordinates (not white space)."""
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if not token.content.isspace()
        and (token.special or token.content in chat_template or token.content in coordinate_tokens)
    }
