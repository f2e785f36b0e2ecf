"""The embedded data set: scenes drawn on demand, with questions and exact answers for five tasks.

    recipe = SceneRecipe("base")
    sample = recipe.sample("vqa", 17, "train")     # always the same sample, in any process and order

The scenes are composites: real photos, washed out, with one drawing per quadrant (`layout`), or a written string for
the task "ocr". Questions are in `questions`, pictures in `atlas`.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, replace
from random import Random

from PIL import Image, ImageDraw

from vlmtune.data import questions
from vlmtune.data.atlas import FONTS, ConceptGroup, Split, atlas, bucket, concept_names, font, photo, sprite
from vlmtune.data.layout import SIZE, Background, Scene, SceneObject, arrange, choose_background
from vlmtune.data.questions import VQA_FORMS, Question
from vlmtune.types import Box, Boxes, ImageRef, Sample, Turn, VlmtuneError

__all__ = [
    "TASKS", "SceneRecipe", "concept_names", "draw_background", "draw_objects", "draw_writing", "object_mask",
    "scene_sample",
]  # fmt: skip

TASKS = ("caption", "vqa", "ocr", "grounding", "referring")
CHAT_TASKS = ("vqa", "grounding", "referring")  # tasks that have several questions about one scene
TRIES_PER_TURN = 4
VAL_STRINGS = 15  # percent of all strings, kept for validation in the task "ocr"
LONGEST_STRING = 8  # characters
FONT_SIZES = (18, 22, 26, 30)
INKS = ((0, 0, 0), (160, 0, 0), (0, 0, 150), (0, 80, 0))
WHITE = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))


@dataclass(frozen=True)
class Writing:
    """A string on a background. `origin` is where FreeType starts to draw, `box` what the ink covers, in pixels."""

    text: str
    font: str
    size: int
    ink: tuple[int, int, int]
    origin: tuple[int, int]
    box: tuple[int, int, int, int]


def written_words(concepts: ConceptGroup) -> list[str]:
    """Words that the task "ocr" writes: those of the group's own names for `new`, else of the whole atlas.

    `base` leaves out every word of a `new` name, but spells with the other 370 names of the atlas too: a model that
    has only ever written 72 names lacks most of the letter groups that the next name is made of.
    """
    new = {word for name in concept_names("new") for word in name.split()}
    if concepts == "new":
        return sorted(new)
    words = {word for name in atlas() for word in name.split()}
    return sorted(words - new if concepts == "base" else words)


class SceneRecipe:
    """Samples without end. `sample` is a pure function of (concepts, split, task, index)."""

    def __init__(self, concepts: ConceptGroup = "base"):
        if concepts not in ("base", "new", "all"):
            raise VlmtuneError(f"scenes: concepts must be base, new or all, not {concepts!r}")
        self.concepts = concepts
        self.names = concept_names(concepts)
        self.words = written_words(concepts)

    def sample(self, task: str, index: int, split: Split, turns: int = 1) -> Sample:
        """A user turn (PNG image, question) and an assistant turn (text, or boxes for "grounding").

        With `turns` > 1, up to that many different questions of the same task about the same scene follow each other
        (training scenes of CHAT_TASKS only): looking at an image costs more than a question, so a model that is
        trained from nothing gets more questions per image. The first is that of `turns` = 1, and `meta` is about it.

        `meta`, ready for JSON: answer (str, or None for boxes), boxes ([[x1, y1, x2, y2]] in pixels: found, referred
        to, or written in; [] where the task has none), level ("object", "attribute", "relation", "scene"), question
        (name of the form), name (what grounding asks to find), objects ([{name, kind, box, where}]), background (name
        of the photo).
        VlmtuneError: an unknown task or split, a negative index, or more turns than the task can have.
        """
        id, random = self._seed(task, index, split)
        if turns > 1 and (task not in CHAT_TASKS or split != "train"):
            raise VlmtuneError(f"scenes: only training scenes of {', '.join(CHAT_TASKS)} can have several turns")
        further: list[Question] = []
        if task == "ocr":
            writing, background = self._write(random, split)
            question = questions.what_is_written(writing.text, writing.box)
            image, objects = draw_writing(draw_background(background), writing), ()
        else:
            scene, question = self._ask(task, random, split)
            background, objects = scene.background, scene.objects
            image = draw_objects(draw_background(background), objects)
            further = self._ask_again(task, scene, question, turns - 1, random)
        return _sample(id, task, image, [question, *further], objects, background)

    def question(self, task: str, index: int, split: Split) -> Question:
        """The question and reply of a sample, without drawing it."""
        _, random = self._seed(task, index, split)
        if task == "ocr":
            writing, _ = self._write(random, split)
            return questions.what_is_written(writing.text, writing.box)
        return self._ask(task, random, split)[1]

    def mask(self, index: int, split: Split) -> Image.Image:
        """Which pixels the answer of "referring" sample `index` covers: mode "1", 128 x 128."""
        _, random = self._seed("referring", index, split)
        scene, question = self._ask("referring", random, split)
        return next(object_mask(thing) for thing in scene.objects if thing.box == question.boxes[0])

    def _seed(self, task: str, index: int, split: Split) -> tuple[str, Random]:
        if task not in TASKS:
            raise VlmtuneError(f"scenes: unknown task {task!r}; there are {', '.join(TASKS)}")
        if split not in ("train", "val"):
            raise VlmtuneError(f"scenes: split must be train or val, not {split!r}")
        if index < 0:
            raise VlmtuneError(f"scenes: the index of a sample must not be negative, it is {index}")
        id = f"{self.concepts}/{split}/{task}/{index}"
        return id, Random(id)  # a str seed goes through SHA-512: the same on every platform

    def _ask(self, task: str, random: Random, split: Split) -> tuple[Scene, Question]:
        """A scene, and a question that is clear in it. Scenes where it is not are drawn again."""
        form = _form(task, random)
        copies = (1, 2, 3) if form is questions.count else (1, 1, 1, 2)  # of one concept: counts are equally likely
        area = "reserved" if form is questions.which_photo and split == "val" else split
        wanted = random.choice(copies)
        while True:
            scene = arrange(random, self.names, split, wanted, area)
            if question := form(scene, self.names, random):
                return scene, question

    def _ask_again(self, task: str, scene: Scene, asked: Question, count: int, random: Random) -> list[Question]:
        """At most `count` further questions about the scene, none of them twice; as many as some tries find.

        Grounding asks only for what is there: any number of absent names could be asked for, and "none" teaches no box.
        """
        found = [asked]
        for _ in range(TRIES_PER_TURN * count):
            form = questions.find_present if task == "grounding" else _form(task, random)
            if form is questions.count:  # needs a scene arranged for it: here the answer would mostly be 1
                continue
            question = form(scene, self.names, random)
            if question and question.prompt not in [known.prompt for known in found]:
                found.append(question)
            if len(found) > count:
                break
        return found[1:]

    def _write(self, random: Random, split: Split) -> tuple[Writing, Background]:
        """A number, a word of a name or a time; strings are disjoint between splits, one font is for validation."""
        while True:
            number, hour, minute = random.randint(10, 9999), random.randint(1, 12), random.randint(0, 59)
            word = random.choice(self.words)
            text = random.choice((str(number), word, f"{hour}:{minute:02d}"))
            if len(text) <= LONGEST_STRING and is_val_string(text) == (split == "val"):
                break
        family = random.choice(FONTS[split if random.random() < 0.5 else "train"])
        margin = 2
        fitting = [size for size in FONT_SIZES if _ink_box(text, family, size)[2] <= SIZE - 2 * margin]
        size = random.choice(fitting)
        left, top, right, bottom = _ink_box(text, family, size)
        x = random.randint(margin, SIZE - margin - (right - left)) - left
        y = random.randint(margin, SIZE - margin - (bottom - top)) - top
        box = (x + left, y + top, x + right, y + bottom)
        # Whiter than behind objects: dark ink on a night sky would not be legible.
        background = choose_background(random, split, white=(0.6, 0.8))
        return Writing(text, family, size, random.choice(INKS), (x, y), box), background


def _form(task: str, random: Random) -> questions.Form:
    """The question form of a task; for "vqa" a random one of a random level."""
    form = {"caption": questions.caption, "grounding": questions.find, "referring": questions.what_is_in}.get(task)
    return form or random.choice(VQA_FORMS[random.choice(list(VQA_FORMS))])


def scene_sample(id: str, task: str, scene: Scene, question: Question) -> Sample:
    """A question about a scene as a sample, as `SceneRecipe.sample` makes them."""
    image = draw_objects(draw_background(scene.background), scene.objects)
    return _sample(id, task, image, [question], scene.objects, scene.background)


def _sample(
    id: str,
    task: str,
    image: Image.Image,
    asked: list[Question],
    objects: tuple[SceneObject, ...],
    background: Background,
) -> Sample:
    """One conversation about one image; `meta` is about the first question."""
    masks = {thing.box: object_mask(thing) for thing in objects}
    chat = [Turn("user", (ImageRef(_png(image)), *asked[0].prompt)), Turn("assistant", (asked[0].reply,))]
    for another in asked[1:]:
        chat += [Turn("user", another.prompt), Turn("assistant", (another.reply,))]
    return Sample(
        id=id,
        turns=tuple(_with_masks(turn, masks) for turn in chat),
        task=task,
        origin=f"scenes:{id}",
        meta=_meta(asked[0], objects, background),
    )


def is_val_string(text: str) -> bool:
    """Is this string kept for the validation split of the task "ocr"?"""
    return bucket("ocr" + text) < VAL_STRINGS


def draw_background(background: Background) -> Image.Image:
    """RGB, 128 x 128."""
    # Cropped before it is resized, so that no pixel outside the crop can bleed in.
    square = photo(background.photo).crop(background.crop).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return Image.blend(square, WHITE, background.white)


def draw_objects(image: Image.Image, objects: tuple[SceneObject, ...]) -> Image.Image:
    """The objects on the image, which is changed and returned."""
    for thing in objects:
        picture = sprite(thing.name, thing.size).picture
        image.paste(picture, thing.corner, picture)
    return image


def draw_writing(image: Image.Image, writing: Writing) -> Image.Image:
    """The string on the image, which is changed and returned."""
    ImageDraw.Draw(image).text(writing.origin, writing.text, font=font(writing.font, writing.size), fill=writing.ink)
    return image


def object_mask(thing: SceneObject) -> Image.Image:
    """Mode "1", 128 x 128: the pixels where the object is more than 96/255 opaque."""
    mask = Image.new("1", (SIZE, SIZE))
    mask.paste(1, thing.corner, sprite(thing.name, thing.size).mask)
    return mask


def _ink_box(text: str, family: str, size: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = font(family, size).getbbox(text)
    return int(left), int(top), int(right), int(bottom)


def _with_masks(turn: Turn, masks: dict[Box, Image.Image]) -> Turn:
    parts = (
        replace(part, masks=tuple(_png(masks[box]) for box in part.boxes)) if isinstance(part, Boxes) else part
        for part in turn.parts
    )
    return replace(turn, parts=tuple(parts))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # higher levels cost more time than drawing the scene
    return buffer.getvalue()


def _meta(question: Question, objects: tuple[SceneObject, ...], background: Background) -> dict:
    described = [asdict(thing) for thing in objects]
    return {
        "answer": question.answer,
        "boxes": [list(box) for box in question.boxes],
        "level": question.level,
        "question": question.form,
        **({} if question.name is None else {"name": question.name}),
        "objects": [
            {key: row[key] for key in ("name", "kind", "where")} | {"box": list(row["box"])} for row in described
        ],
        "background": background.photo,
    }
