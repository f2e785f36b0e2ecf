"""Masks and boxes that heads read, scored on examples whose heads are set by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.evaluate.regions import covered_cells, region_scores
from vlmtune.models.readouts import WIDTH, BoxHead, MaskHead
from vlmtune.types import PER_PATCH, Batch, ImageGeometry, Region

PATCHES = torch.arange(6).view(2, 3)  # tokens 0 to 5 of the image; token 6 is the region


@pytest.fixture
def heads() -> nn.ModuleDict:
    """A mask head whose logit in every cell of a patch is 10 × the first number of its state, and a box head that
    always says the middle half of the canvas."""
    box, mask = BoxHead(4), MaskHead(4)
    with torch.no_grad():
        for parameter in (*mask.parameters(), *box.out.parameters()):
            parameter.zero_()
        mask.query.bias[0] = 10 * WIDTH**0.5
        mask.key.weight[::WIDTH, 0] = 1.0
    return nn.ModuleDict({"box": box, "mask": mask})


def scored(heads, said: list[list[int]], true: list[torch.Tensor | None], sizes: list[tuple[int, int]], box=None):
    """said: of every row the patches that the mask head covers; sizes: width and height of the originals."""
    hidden = torch.zeros(len(said), 7, 4)
    for row, patches in enumerate(said):
        hidden[row, :6, 0] = -1.0
        hidden[row, patches, 0] = 1.0
    box = torch.tensor(box or [0.25, 0.25, 0.75, 0.75])
    regions = [(row, Region(6, box, row, True, 0, PATCHES, mask)) for row, mask in enumerate(true)]
    batch = Batch({}, torch.zeros(0), ["referring"] * len(said), [], regions)
    geometry = [[ImageGeometry(width, height, 48, 32)] for width, height in sizes]
    with torch.no_grad():
        return region_scores(hidden, heads, batch, geometry)


def mask_of(patches: list[int]) -> torch.Tensor:
    cells = torch.zeros(2, 3)
    cells.view(-1)[patches] = 1.0
    return cells.repeat_interleave(PER_PATCH, 0).repeat_interleave(PER_PATCH, 1)


def value(scores, metric: str) -> float:
    mine = [score for score in scores if score.metric == metric]
    return sum(score.value for score in mine) / sum(score.weight for score in mine)


def test_mask_iou_of_whole_patches(heads):
    """Patches 0, 1 said and 1, 2, 5 true: one shared of four. The other image: two of three."""
    scores = scored(heads, [[0, 1], [3, 4]], [mask_of([1, 2, 5]), mask_of([3, 4, 5])], [(48, 32), (48, 32)])
    assert [score.value for score in scores if score.metric == "mask_iou"] == [1 / 4, 2 / 3]
    assert value(scores, "mask_iou") == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert value(scores, "mask_oiou") == pytest.approx((1 + 2) / (4 + 3))


def test_the_overall_iou_counts_pixels_of_the_originals(heads):
    """The second image is ten times as wide and high, so its patches count a hundred times."""
    scores = scored(heads, [[0, 1], [3, 4]], [mask_of([1, 2, 5]), mask_of([3, 4, 5])], [(48, 32), (480, 320)])
    assert value(scores, "mask_oiou") == pytest.approx((1 + 200) / (4 + 300))
    unions = [score.weight for score in scores if score.metric == "mask_oiou"]
    assert unions == pytest.approx([4 * 16 * 16, 3 * 160 * 160])
    assert value(scores, "mask_iou") == pytest.approx((1 / 4 + 2 / 3) / 2)


def test_head_iou_of_a_known_box(heads):
    scores = scored(heads, [[]], [None], [(48, 32)], box=[0.25, 0.25, 0.75, 1.0])
    assert [(score.metric, score.value) for score in scores] == [("head_iou", pytest.approx(2 / 3))]


def test_nothing_said_and_nothing_visible(heads):
    """An object that is cropped away has an empty mask: to say so is right."""
    scores = scored(heads, [[], [0]], [torch.zeros(16, 24), torch.zeros(16, 24)], [(48, 32)] * 2)
    assert [score.value for score in scores if score.metric == "mask_iou"] == [1.0, 0.0]


def test_a_small_object_is_the_cell_that_it_covers_most(heads):
    small = torch.zeros(16, 24)
    small[3, 4:6] = torch.tensor([0.3, 0.1])
    assert covered_cells(small).nonzero().tolist() == [[3, 4]]
    assert covered_cells(mask_of([2])).sum() == PER_PATCH**2 and covered_cells(torch.full((2, 2), 0.5)).all()
    scores = scored(heads, [[]], [small], [(48, 32)])
    assert value(scores, "mask_iou") == 0.0, "to say nothing is wrong"
