"""Grids of patch features of every family: where they are, the model's own output, and what a probe reads (A7)."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from training_setup import encoder_of

from vlmtune.data.batch import collate
from vlmtune.data.levels import LevelScenes
from vlmtune.evaluate.alignment import CELLS, features_of
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.features import image_features, pooled, pooled_under, stage_digest
from vlmtune.models.load import load_model
from vlmtune.types import ImageGeometry, ImageRef, Sample, Text, Turn, VlmtuneError

CANVAS = ImageGeometry(128, 128, 128, 128)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    kept: dict = {}

    def of(family: str):
        if family not in kept:
            folder = tiny_folder(family)
            kept[family] = load_model(str(folder)).eval(), encoder_of(folder)
        return kept[family]

    return of


def with_a_square(corner: tuple[int, int] | None, size: tuple[int, int] = (128, 128)) -> Sample:
    """Grey, with a bright square of a quarter of each side at (column, row) of 4 x 4 places."""
    pixels = np.full((size[1], size[0], 3), 90, dtype=np.uint8)
    if corner is not None:
        column, row = corner
        height, width = size[1] // 4, size[0] // 4
        pixels[row * height : (row + 1) * height, column * width : (column + 1) * width] = (250, 60, 200)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Sample("s", (Turn("user", (ImageRef(buffer.getvalue()), Text("what is there"))),), origin="a.jsonl:1")


def grids(loaded, family: str, sample: Sample):
    model, encoder = loaded(family)
    encoded = encoder.encode_prompt(sample)
    inputs = collate([encoded], encoder.pad_token_id).inputs
    leads = hasattr(encoder.processor.image_processor, "do_pan_and_scan")
    return image_features(model, inputs, encoded.geometry[0], "first" if leads else "last")


@pytest.mark.parametrize("corner", [(0, 0), (3, 0), (0, 3), (2, 3)])
def test_a_feature_is_where_its_patch_is(loaded, family, corner):
    """What a square changes, it changes most in its own quarter of the grid: tower and projector, any order of patches
    inside the model. (In a random tower of two blocks the residual stream outweighs attention.)"""
    plain, marked = (grids(loaded, family, with_a_square(at)) for at in (None, corner))
    for stage in ("vision", "projector"):
        change = (getattr(marked, stage) - getattr(plain, stage)).norm(dim=-1)
        rows, columns = change.shape
        assert rows > 1 and columns > 1
        row, column = divmod(int(change.argmax()), columns)
        quadrant = (column * 2 // columns, row * 2 // rows)
        assert quadrant == (corner[0] // 2, corner[1] // 2), (stage, change.shape)


def test_the_projector_grid_is_what_the_language_model_gets(loaded, family):
    """As sets of vectors: `get_image_features` gives the same ones, of all tiles."""
    model, encoder = loaded(family)
    sample = with_a_square((1, 2))
    inputs = collate([encoder.encode_prompt(sample)], encoder.pad_token_id).inputs
    pixels = {name: value for name, value in inputs.items() if "pixel" in name or "grid" in name}
    with torch.inference_mode():
        theirs = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
    mine = grids(loaded, family, sample).projector.flatten(0, 1)
    gaps = torch.cdist(mine.double(), theirs.double()).min(dim=1).values
    assert float(gaps.max()) < 1e-6, "the same call; only alignment in memory may round otherwise"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_any_shape(loaded, family):
    wide = grids(loaded, family, with_a_square((3, 1), (224, 112)))
    rows, columns, _ = wide.vision.shape
    assert columns > rows and wide.projector.shape[:2] == (rows // 2, columns // 2)
    assert pooled(wide.vision, CELLS).shape == (CELLS * CELLS * 32,)


def test_grids_of_one_tower_by_hand():
    grid = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    assert torch.equal(pooled(grid, 1), grid.mean((0, 1)))
    assert torch.equal(pooled(grid, 2)[:3], grid[0, :2].mean(0))
    assert torch.equal(pooled_under(grid, (0.0, 0.0, 0.25, 0.5)), grid[0, 0])
    # half of the first column and all of the second, of the upper row
    expected = (0.5 * grid[0, 0] + grid[0, 1]) / 1.5
    assert torch.allclose(pooled_under(grid, (0.125, 0.0, 0.5, 0.5)), expected)
    assert pooled_under(grid, (1.0, 0.0, 1.5, 1.0)) is None and pooled_under(grid, (0.5, 0.5, 0.5, 0.5)) is None


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.tuples(*[st.floats(-0.5, 1.5)] * 4).map(lambda b: (*sorted(b[::2]), *sorted(b[1::2]))),
)
def test_under_a_box_is_a_mean_of_what_it_covers(rows, columns, sides):
    """Against counting a fine raster of points."""
    x1, x2, y1, y2 = sides
    grid = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns, 1)
    found = pooled_under(grid, (x1, y1, x2, y2))
    seen = min(x2, 1) - max(x1, 0), min(y2, 1) - max(y1, 0)
    if found is None:
        assert min(seen) < 1e-9, "an area of so little is rounding"
        return
    assume(min(seen) > 1e-6)
    assert -1e-4 <= float(found) <= rows * columns - 1 + 1e-4
    steps = 400
    across = max(x1, 0) + (min(x2, 1) - max(x1, 0)) * (np.arange(steps) + 0.5) / steps
    down = max(y1, 0) + (min(y2, 1) - max(y1, 0)) * (np.arange(steps) + 0.5) / steps
    cells = np.minimum((across * columns).astype(int), columns - 1)[None] + columns * np.minimum(
        (down * rows).astype(int), rows - 1
    )[:, None]  # fmt: skip
    # a point may fall on the wrong side of an edge: 1/400 of the range of values along each axis
    assert float(found) == pytest.approx(cells.mean(), abs=rows * columns / 100 + 1e-3)


def test_probes_view_regions_and_whole_images(loaded, family):
    model, encoder = loaded(family)
    scenes = LevelScenes("object", "new")
    asked = [scenes[0], scenes[1]]
    counted = []
    found = features_of(model, encoder, asked, lambda *progress: counted.append(progress))
    assert asked[0].region is not None and asked[1].region is None
    for stage in ("vision", "projector"):
        under, whole = found[stage]
        assert whole.numel() == CELLS**2 * under.numel() and torch.isfinite(whole).all()
    assert counted[-1] == ("images of object", 2, 2)
    again = features_of(model, encoder, asked, lambda *progress: None)
    assert all(torch.equal(a, b) for stage in found for a, b in zip(found[stage], again[stage], strict=True))


def test_a_digest_changes_with_its_part_and_those_before(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    before = {stage: stage_digest(model, stage) for stage in ("vision", "projector")}
    names = {part: next(n for n in canonical_parameters(model) if n.startswith(part)) for part in
             ("language", "projector", "vision")}  # fmt: skip

    def changed(part: str) -> set[str]:
        with torch.no_grad():
            canonical_parameters(model)[names[part]].flatten()[0] += 1.0
        return {stage for stage in before if stage_digest(model, stage) != before[stage]}

    assert changed("language") == set()
    assert changed("projector") == {"projector"}
    assert changed("vision") == {"vision", "projector"}


def test_features_that_are_no_grid_are_refused(loaded, monkeypatch):
    model, encoder = loaded("llava")
    inputs = collate([encoder.encode_prompt(with_a_square(None))], encoder.pad_token_id).inputs
    monkeypatch.setattr(model.config, "vision_feature_select_strategy", "full")
    with_class_token = image_features(model, inputs, CANVAS, "last")
    assert with_class_token.vision.shape[:2] == (4, 4), "the class token is left out"
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, taken: (taken[0][:, :7],))
    try:
        with pytest.raises(VlmtuneError, match="7 patch features of an image of 128x128 pixels form no grid"):
            image_features(model, inputs, CANVAS, "last")
    finally:
        hook.remove()
