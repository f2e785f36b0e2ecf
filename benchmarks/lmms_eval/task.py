"""The functions of the local lmms-eval task of `compare.py`. lmms-eval imports this file, which needs no vlmtune."""

from __future__ import annotations

from PIL import Image


def visual(row: dict) -> list[Image.Image]:
    return [Image.open(row["image"]).convert("RGB")]


def question(row: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return row["question"]


def score(row: dict, replies: list[str]) -> dict[str, float]:
    """1 where the reply is the answer, up to whitespace."""
    return {"exact_match": float(" ".join(replies[0].split()) == row["answer"])}
