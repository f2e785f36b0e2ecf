"""Heads: the dot product written out, boxes that are never inverted, and models that are the same without them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.load import load_model
from vlmtune.models.readouts import CELLS, WIDTH, BoxHead, MaskHead, attach_readouts, detach_readouts, readouts_of
from vlmtune.types import PER_PATCH


@torch.no_grad()
def test_mask_logits_are_dot_products_of_the_state_with_every_cell_of_every_patch():
    torch.manual_seed(0)
    head, states, patches = MaskHead(5), torch.randn(2, 5), torch.randn(2, 2, 3, 5)
    cells = torch.zeros(2, 2 * CELLS, 3 * CELLS)
    for n in range(2):
        for r in range(2 * CELLS):
            for c in range(3 * CELLS):
                key = head.key(patches[n, r // CELLS, c // CELLS]).view(CELLS, CELLS, WIDTH)[r % CELLS, c % CELLS]
                cells[n, r, c] = key @ head.query(states[n]) / WIDTH**0.5 + head.bias
    size = (2 * PER_PATCH, 3 * PER_PATCH)
    expected = F.interpolate(cells[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(head(states, patches), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_boxes_are_never_inverted():
    torch.manual_seed(0)
    head = BoxHead(5)
    head.out.weight.mul_(50)
    boxes = head(torch.randn(200, 5))
    assert bool((boxes[:, 2:] >= boxes[:, :2]).all()) and boxes.dtype == torch.float32


def test_a_model_is_the_same_before_with_and_after_its_heads(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(5, 13)[None]
    logits = model(input_ids=ids).logits
    state = torch.get_rng_state()
    attach_readouts(model, ["mask", "box"], seed=3)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model(input_ids=ids).logits, logits)
    names = [name for name in canonical_parameters(model) if name.startswith("heads.")]
    assert names[:2] == ["heads.box.hidden.weight", "heads.box.hidden.bias"] and len(names) == 9
    first = {name: value.clone() for name, value in readouts_of(model).state_dict().items()}
    taken = detach_readouts(model)
    assert set(taken) == set(first) and readouts_of(model) is None and detach_readouts(model) == {}
    assert set(model.state_dict()) == set(before)
    attach_readouts(model, ["box", "mask"], seed=3)
    again = readouts_of(model).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
