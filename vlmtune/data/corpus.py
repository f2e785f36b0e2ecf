"""The text the embedded model's tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from vlmtune.data.atlas import atlas
from vlmtune.data.scenes import TASKS, SceneRecipe
from vlmtune.types import Text

SENTENCES_PER_TASK = 400
NAME_REPEATS = 10


def text_corpus() -> Iterator[str]:
    """Every name of the atlas, in front of which a space may stand, and sentences of all five tasks.

    All 466 names, so that a name no model was trained on is still spelled with pieces that others share.
    """
    for name, concept in atlas().items():
        for _ in range(NAME_REPEATS):
            yield name
            yield f"Find {name}."
            yield f"What kind is {name}? {concept.kind}"
    recipe = SceneRecipe("all")
    for task in TASKS:
        for index in range(SENTENCES_PER_TASK):
            question = recipe.question(task, index, "train")
            yield "".join(part.text for part in question.prompt if isinstance(part, Text))
            yield question.answer or ""
