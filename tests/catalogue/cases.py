"""All cases in the order of the table, and which of them the quick run of the tests leaves out."""

from __future__ import annotations

from dataclasses import replace

from . import config_cases, data_cases, healthy, run_cases
from .case import Case, Healthy

QUICK = frozenset(
    (
        "lr_of_an_exponent", "clipped_to_nothing", "rank_of_the_matrix", "replies_cut_in_evaluation", "base_with_nan",
        "normalised_by_nothing", "pixels_not_rescaled", "tokenizer_of_another_model", "vision_trains_on_text",
        "projector_alone_on_text", "source_without_weight", "typed_markers",
        "boxes_as_text", "lr_explodes", "lr_diverges_unchecked", "little_to_learn",
        "float16_overflow", "cut_checkpoint", "most_rows_dropped", "lora_and_projector", "in_full", "staged_unfreezing",
        "text_alone", "csv_rows", "boxes", "many_scripts", "short_answers", "run_lora_and_projector",
    )
)  # fmt: skip
"""Of the cases that take a whole check or a training, one to three seconds each: those that every test run makes. What
is refused at once is always made."""
ENDS_EARLY = frozenset(
    (
        "unknown_key", "patience_without_evaluation", "batch_not_divisible", "missing_data_file", "wrong_image_root",
        "mistyped_rule", "everything_frozen", "warmup_longer_than_run", "schedule_that_never_trains",
        "weight_for_no_task", "no_weight_for_a_task", "all_weights_zero", "limit_drops_everything",
        "limit_below_pictures", "rank_above_the_matrix", "coordinates_without_tokens", "cut_base_model",
        "no_chat_template", "run_folder_unwritable", "missing_image", "truncated_image", "empty_image",
        "web_page_as_image", "lfs_pointer", "decompression_bomb", "paths_of_another_machine", "too_many_marks",
        "empty_reply", "no_replies", "roles_exchanged", "wrong_encoding", "cut_row", "mixed_formats", "unknown_role",
        "leaked_rows", "over_long_row", "boxes_in_fractions", "boxes_in_thousandths", "boxes_y_first",
        "boxes_with_width", "box_outside", "boxes_of_the_original", "boxes_before_exif",
    )
)  # fmt: skip
"""Cases that end at once, within half a second."""


def _timed(entry):
    return replace(entry, is_slow=entry.name not in QUICK | ENDS_EARLY)


CASES: list[Case] = [_timed(case) for case in (*config_cases.CASES, *data_cases.CASES, *run_cases.CASES)]
HEALTHY: list[Healthy] = [_timed(case) for case in healthy.HEALTHY]
