"""Questions about scenes, with answers that follow exactly from what was placed where.

Every form has one phrasing of at most three words around the names, places and relations it asks about; the language
model that ships with the package is tiny. A form is a function of a scene that returns None when the question would be
ambiguous in this scene; the caller then draws another scene. Yes/no forms toss for the answer first, so that they are
balanced whatever the scenes are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from vlmtune.data.atlas import atlas, dominant_colour
from vlmtune.data.layout import Scene, SceneObject
from vlmtune.types import Box, Boxes, Part, Text

Level = Literal["object", "attribute", "relation", "scene"]
NONE = "none"  # the reply to "Find X." when there is no X
CLEAR_MARGIN = 20  # pixels between two centres, for "left of" and "above" to be beyond dispute
CLEARLY_LARGER = 1.25  # ratio of two box areas, for "larger" to be beyond dispute
ABSENT_SHARE = 1 / 8  # of the grounding questions that ask for something absent


@dataclass(frozen=True)
class Question:
    """What is asked (`prompt`, the parts after the image) and the reply. `boxes` are the boxes it is about, in pixels.

    `name` is what it asks to find. `form` is a short name of the question form; `level` says how much of the scene the
    answer needs.
    """

    form: str
    level: Level
    prompt: tuple[Part, ...]
    reply: Text | Boxes
    boxes: tuple[Box, ...] = ()
    name: str | None = None

    @property
    def answer(self) -> str | None:
        """The reply as text; None when it consists of boxes."""
        return self.reply.text if isinstance(self.reply, Text) else None


Form = Callable[[Scene, Sequence[str], Random], Question | None]
"""scene, the names a question may mention, random -> the question, or None when it has no clear answer here."""


def _ask(form: str, level: Level, question: str, answer: str) -> Question:
    return Question(form, level, (Text(question),), Text(answer))


def _single(scene: Scene) -> list[SceneObject]:
    """The objects whose name is enough to say which one is meant."""
    names = [thing.name for thing in scene.objects]
    return [thing for thing in scene.objects if names.count(thing.name) == 1]


def _absent_name(scene: Scene, names: Sequence[str], random: Random) -> str:
    """A name that is not in the scene; half of the time, where possible, of a kind that is (a hard negative)."""
    present = {thing.name for thing in scene.objects}
    kind = random.choice(scene.objects).kind
    absent = [name for name in names if name not in present]
    same_kind = [name for name in absent if atlas()[name].kind == kind]
    return random.choice(same_kind if same_kind and random.random() < 0.5 else absent)


# Object: what is here.


def what_is_at(scene: Scene, names: Sequence[str], random: Random) -> Question:
    thing = random.choice(scene.objects)
    return _ask("what_is_at", "object", f"What is {thing.where}?", thing.name)


def exists(scene: Scene, names: Sequence[str], random: Random) -> Question:
    if random.random() < 0.5:
        return existence_of(scene, random.choice(scene.objects).name)
    return existence_of(scene, _absent_name(scene, names, random))


def existence_of(scene: Scene, name: str) -> Question:
    """Is there one? yes or no."""
    is_there = any(thing.name == name for thing in scene.objects)
    return _ask("exists", "object", f"Any {name}?", "yes" if is_there else "no")


# Attribute: what it is like.


def kind_at(scene: Scene, names: Sequence[str], random: Random) -> Question:
    return kind_of(random.choice(scene.objects))


def kind_of(thing: SceneObject) -> Question:
    return _ask("kind_at", "attribute", f"What kind is {thing.where}?", thing.kind)


def count(scene: Scene, names: Sequence[str], random: Random) -> Question:
    present = [thing.name for thing in scene.objects]
    return count_of(scene, max(present, key=present.count))


def count_of(scene: Scene, name: str) -> Question:
    present = [thing.name for thing in scene.objects]
    return _ask("count", "attribute", f"How many {name}?", str(present.count(name)))


def larger(scene: Scene, names: Sequence[str], random: Random) -> Question | None:
    things = _single(scene)
    if len(things) < 2:
        return None
    return larger_of(*random.sample(things, 2))


def larger_of(one: SceneObject, other: SceneObject) -> Question | None:
    """The name of the larger one, where it is clearly so."""
    small, large = sorted((one, other), key=lambda thing: thing.area)
    if large.area < CLEARLY_LARGER * small.area:
        return None
    return _ask("larger", "attribute", f"Larger: {one.name} or {other.name}?", large.name)


def colour(scene: Scene, names: Sequence[str], random: Random) -> Question | None:
    clear = [thing for thing in scene.objects if dominant_colour(thing.name)]
    if not clear:
        return None
    thing = random.choice(clear)
    return _ask("colour", "attribute", f"What colour is {thing.name}?", dominant_colour(thing.name))


# Relation: where it is to something else.

AXES = {"left of": 0, "above": 1}  # relation -> the coordinate that is smaller


def related(scene: Scene, names: Sequence[str], random: Random) -> Question | None:
    """Is X left of (above) Y? yes or no."""
    relation = random.choice(list(AXES))
    axis = AXES[relation]
    things = _single(scene)
    if len(things) < 2:
        return None
    low, high = sorted(random.sample(things, 2), key=lambda thing: thing.centre[axis])
    if high.centre[axis] - low.centre[axis] < CLEAR_MARGIN:
        return None
    first, second = (low, high) if random.choice(("yes", "no")) == "yes" else (high, low)
    return relation_of(first, relation, second)


def relation_of(first: SceneObject, relation: str, second: SceneObject) -> Question | None:
    """Is the first one left of (above) the second? yes or no, where it is clearly so. relation: one of AXES."""
    axis = AXES[relation]
    ahead = second.centre[axis] - first.centre[axis]
    if abs(ahead) < CLEAR_MARGIN:
        return None
    answer = "yes" if ahead > 0 else "no"
    return _ask(relation.replace(" ", "_"), "relation", f"Is {first.name} {relation} {second.name}?", answer)


def what_is_related(scene: Scene, names: Sequence[str], random: Random) -> Question | None:
    """What is left of (above) X? Asked when one object lies on that side of X at all, and clearly so."""
    relation = random.choice(list(AXES))
    axis = AXES[relation]
    answers = []
    for anchor in _single(scene):
        before = [thing for thing in scene.objects if thing.centre[axis] < anchor.centre[axis]]
        if len(before) == 1 and anchor.centre[axis] - before[0].centre[axis] >= CLEAR_MARGIN:
            answers.append((anchor, before[0]))
    if not answers:
        return None
    anchor, thing = random.choice(answers)
    form = f"what_is_{relation.replace(' ', '_')}"
    return _ask(form, "relation", f"What is {relation} {anchor.name}?", thing.name)


# Scene: the whole picture.


def which_photo(scene: Scene, names: Sequence[str], random: Random) -> Question:
    return _ask("which_photo", "scene", "Which photo?", scene.background.photo.replace("_", " "))


VQA_FORMS: dict[Level, tuple[Form, ...]] = {
    "object": (what_is_at, exists),
    "attribute": (kind_at, count, larger, colour),
    "relation": (related, what_is_related),
    "scene": (which_photo,),
}


# The other four tasks have one form each.


def caption(scene: Scene, names: Sequence[str], random: Random) -> Question:
    text = "; ".join(f"{thing.name} {thing.where}" for thing in scene.objects)
    return _ask("caption", "scene", "Describe the image.", text)


def find(scene: Scene, names: Sequence[str], random: Random) -> Question:
    """Find X: every box of X in reading order, or "none"."""
    if random.random() < ABSENT_SHARE:
        name = _absent_name(scene, names, random)
        return Question("find_absent", "object", (Text(f"Find {name}."),), Text(NONE), name=name)
    return find_present(scene, names, random)


def find_present(scene: Scene, names: Sequence[str], random: Random) -> Question:
    """Find X, where there is an X."""
    name = random.choice(scene.objects).name
    boxes = tuple(thing.box for thing in scene.objects if thing.name == name)
    return Question("find", "object", (Text(f"Find {name}."),), Boxes(boxes), boxes, name)


def what_is_in(scene: Scene, names: Sequence[str], random: Random) -> Question:
    return name_of(random.choice(scene.objects))


def name_of(thing: SceneObject) -> Question:
    """What is in this region?"""
    prompt = (Text("What is in "), Boxes((thing.box,), region=True), Text("?"))
    return Question("what_is_in", "object", prompt, Text(thing.name), (thing.box,))


def what_is_written(text: str, box: Box) -> Question:
    return Question("what_is_written", "object", (Text("What is written?"),), Text(text), (box,))
