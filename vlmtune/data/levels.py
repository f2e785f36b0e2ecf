"""Questions at four levels with a closed set of answers: what the alignment matrix is measured on (SPEC A7).

A linear probe answers one fixed question about many images, so the embedded scenes are asked few questions, each of
them often, in the phrasings of `questions`:

| level | question | answers |
| --- | --- | --- |
| object | What is in [region]? | 8 names |
| | Any X? of two names | yes, no |
| attribute | What kind is top left? | 6 kinds |
| | How many X? | 1, 2, 3 |
| | Larger: X or Y? | X, Y |
| relation | Is X left of Y? Is X above Y? of two pairs | yes, no |
| scene | Which photo? | seven photos |

What is right is drawn first, each answer as likely as the others, and then a scene in which it is right. All are
validation scenes: photos, crops and pairs of concepts that no training scene shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from random import Random
from typing import get_args

from vlmtune.data import questions
from vlmtune.data.atlas import PHOTOS, ConceptGroup, atlas, concept_names, sprite
from vlmtune.data.layout import OBJECT_SIZES, PLACES, Scene, SceneObject, arrange, held_out
from vlmtune.data.questions import CLEARLY_LARGER, Level, Question
from vlmtune.data.scenes import scene_sample
from vlmtune.types import Boxes, Sample

LEVELS: tuple[Level, ...] = get_args(Level)
NAMES_ASKED, KINDS_ASKED = 8, 6  # few, so that a probe sees enough images of each
POOL = 12  # names that the scenes of a question about some of them are arranged from, so that those come up often
KIND_AT = PLACES[0, 0]
LARGER_AT_LEAST = 0.1  # of the sizes two concepts are drawn in, for either to be asked about as the larger
_SIZES = range(OBJECT_SIZES[0], OBJECT_SIZES[1] + 1)


@dataclass(frozen=True)
class LevelQuestion:
    """A sample whose reply is one of `labels`. question: its wording, by which probes tell questions apart; a region
    is "[region]" in it."""

    level: Level
    sample: Sample
    question: str
    answer: str
    labels: tuple[str, ...]

    @property
    def region(self) -> Boxes | None:
        """The one place that the question points at, in pixels of the original; None without, or with several."""
        asked = [part for turn in self.sample.turns if turn.role == "user" for part in turn.parts]
        places = [part for part in asked if isinstance(part, Boxes)]
        return places[0] if len(places) == 1 and len(places[0].boxes) == 1 else None


@dataclass(frozen=True)
class _Form:
    """A fixed question. draw: (random, the right answer) -> a scene and its question, or None to try again."""

    labels: tuple[str, ...]
    draw: Callable[[Random, str], tuple[Scene, Question | None]]


def _either_can_be_larger(one: str, other: str) -> bool:
    """Not a pair of which one is so thin that it (almost) never is: no scene would ever make it right."""
    areas, other_areas = ([sprite(name, size).area for size in _SIZES] for name in (one, other))
    sizes = list(product(areas, other_areas))
    larger = sum(area >= CLEARLY_LARGER * other_area for area, other_area in sizes) / len(sizes)
    smaller = sum(other_area >= CLEARLY_LARGER * area for area, other_area in sizes) / len(sizes)
    return min(larger, smaller) >= LARGER_AT_LEAST


class LevelScenes:
    """The questions of one level about the embedded scenes; a pure function of (concepts, level, index)."""

    def __init__(self, level: Level, concepts: ConceptGroup):
        self.level, self.concepts = level, concepts
        self.names = concept_names(concepts)
        self._forms = list(self._make_forms(Random(f"levels/{concepts}/{level}")))

    def __getitem__(self, index: int) -> LevelQuestion:
        id = f"{self.concepts}/val/{self.level}/{index}"
        random = Random(f"levels/{id}")
        form = self._forms[index % len(self._forms)]
        answer = random.choice(form.labels)
        while True:
            scene, question = form.draw(random, answer)
            if question is not None and question.answer == answer:
                break
        wording = "".join("[region]" if isinstance(part, Boxes) else part.text for part in question.prompt)
        sample = scene_sample(id, "referring" if question.boxes else "vqa", scene, question)
        return LevelQuestion(self.level, sample, wording, answer, form.labels)

    def _make_forms(self, random: Random) -> Iterator[_Form]:
        """The questions in turn; those with many answers come twice."""
        pairs = [pair for pair in combinations(self.names, 2) if held_out(*pair)]
        if self.level == "object":
            naming = _Form(tuple(random.sample(self.names, NAMES_ASKED)), self._draw_name)
            for name in random.sample(self.names, 2):
                yield naming
                yield _Form(("yes", "no"), lambda random, _, name=name: self._draw_existence(random, name))
        elif self.level == "attribute":
            known = sorted({atlas()[name].kind for name in self.names})
            kinds = _Form(tuple(random.sample(known, KINDS_ASKED)), self._draw_kind)
            counted, pair = random.choice(self.names), random.choice(pairs)
            while not _either_can_be_larger(*pair):
                pair = random.choice(pairs)
            yield kinds
            yield _Form(("1", "2", "3"), lambda random, answer: self._draw_count(random, counted, answer))
            yield kinds
            yield _Form(pair, lambda random, _: self._draw_pair(random, pair, questions.larger_of))
        elif self.level == "relation":
            for pair in random.sample(pairs, 2):
                for relation in questions.AXES:
                    yield _Form(("yes", "no"), lambda random, _, pair=pair, relation=relation: self._draw_pair(
                        random, pair, lambda one, other: questions.relation_of(one, relation, other)
                    ))  # fmt: skip
        else:
            photos = tuple(name.replace("_", " ") for name in PHOTOS["train"])
            yield _Form(photos, self._draw_photo)

    def _draw_name(self, random: Random, answer: str) -> tuple[Scene, Question | None]:
        scene = self._scene(random, [answer], random.choice((1, 1, 1, 2)))
        things = [thing for thing in scene.objects if thing.name == answer]
        return scene, questions.name_of(random.choice(things)) if things else None

    def _draw_existence(self, random: Random, name: str) -> tuple[Scene, Question]:
        scene = self._scene(random, [name], random.choice((1, 1, 1, 2)))
        return scene, questions.existence_of(scene, name)

    def _draw_kind(self, random: Random, answer: str) -> tuple[Scene, Question | None]:
        of_kind = [name for name in self.names if atlas()[name].kind == answer]
        scene = self._scene(random, of_kind, 1)
        there = [thing for thing in scene.objects if thing.where == KIND_AT]
        return scene, questions.kind_of(there[0]) if there else None

    def _draw_count(self, random: Random, name: str, answer: str) -> tuple[Scene, Question]:
        scene = self._scene(random, [name], int(answer))
        return scene, questions.count_of(scene, name)

    def _draw_pair(
        self,
        random: Random,
        pair: Sequence[str],
        ask: Callable[[SceneObject, SceneObject], Question | None],
    ) -> tuple[Scene, Question | None]:
        scene = self._scene(random, pair, 1)
        things = [[thing for thing in scene.objects if thing.name == name] for name in pair]
        if any(len(found) != 1 for found in things):
            return scene, None
        return scene, ask(*(found[0] for found in things))

    def _draw_photo(self, random: Random, answer: str) -> tuple[Scene, Question]:
        # of validation photos nobody could know the name; the reserved strip of the others is as new as they are
        scene = arrange(random, self.names, "val", 1, "reserved")
        return scene, questions.which_photo(scene, self.names, random)

    def _scene(self, random: Random, asked: Sequence[str], copies: int) -> Scene:
        """Of some names, those that are asked about among them."""
        others = [name for name in self.names if name not in asked]
        pool = [*asked, *random.sample(others, min(len(others), max(0, POOL - len(asked))))]
        return arrange(random, pool, "val", copies, "val")
