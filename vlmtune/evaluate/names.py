"""Which metrics there are, and which a task has by itself. Standard library only: a config is read without torch."""

from __future__ import annotations

import difflib

from vlmtune.errors import VlmtuneError

TEXT_METRICS = ("exact_match", "accuracy", "f1", "anls", "vqa_accuracy", "bleu", "chrf", "rouge_l", "cider")
BOX_METRICS = ("mean_iou", "acc_50")
REGION_METRICS = ("head_iou", "mask_iou", "mask_oiou")  # of read-outs: nothing is generated for them
CORPUS_METRICS = ("bleu", "chrf", "cider", "mask_oiou")  # of all samples together, no means over them
WIDE_METRICS = ("cider",)  # beyond 0 to 1
METRICS = (*TEXT_METRICS, *BOX_METRICS, *REGION_METRICS)

TASK_METRICS = {
    "caption": ("f1", "exact_match"),
    "vqa": ("exact_match",),
    "ocr": ("anls", "exact_match"),
    "grounding": BOX_METRICS,
    "referring": ("accuracy",),
}
OTHER_NAMES = {  # what papers and other frameworks call it -> the name here
    "acc@0.5": "acc_50", "acc@50": "acc_50", "precision@0.5": "acc_50", "em": "exact_match", "cider-d": "cider",
    "ciou": "mask_oiou", "oiou": "mask_oiou", "rouge": "rouge_l", "chrf++": "chrf", "iou": "mean_iou",
}  # fmt: skip


def task_metrics(task: str) -> tuple[str, ...]:
    """The metrics of a task for which nobody chose others, the telling one first. An unknown task is compared as text.

    An unknown task gets "mean_iou" and "acc_50" as well where its reference replies hold boxes, and every task
    `REGION_METRICS` where the model has read-outs.
    """
    return TASK_METRICS.get(task, ("exact_match",))


def require_metric(name: str) -> None:
    """Raises VlmtuneError naming the nearest metric for a name that is none."""
    if name in METRICS:
        return
    lower = name.lower()
    near = OTHER_NAMES.get(lower) or next(iter(difflib.get_close_matches(lower, METRICS, 1, 0.6)), None)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(METRICS)}"
    raise VlmtuneError(f"there is no metric {name!r} ({hint})")
