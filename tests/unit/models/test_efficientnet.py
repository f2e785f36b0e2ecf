"""The tower: folding its norms and splitting its batches change the speed, not the tokens."""

import pytest
import torch

from vlmtune.models import efficientnet
from vlmtune.models.efficientnet import (
    IMAGES_AT_ONCE,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    imagenet_state_dict,
)

SIDE = 64


@pytest.fixture(scope="module")
def tower():
    model = EfficientNetLiteModel(EfficientNetLiteConfig(SIDE)).eval()
    model.load_state_dict(imagenet_state_dict())
    return model


@pytest.fixture
def pixels():
    return torch.randn(IMAGES_AT_ONCE + 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_folded_norms_give_the_tokens_of_separate_ones(tower, pixels, monkeypatch):
    folded = tower(pixels).last_hidden_state
    monkeypatch.setattr(efficientnet, "_normed", lambda convolution, norm, x: norm(convolution(x)))
    # tokens have unit variance; 48 layers of float32 rounding in another order
    torch.testing.assert_close(folded, tower(pixels).last_hidden_state, atol=1e-4, rtol=0)


@torch.no_grad()
def test_tokens_do_not_depend_on_the_batch(tower, pixels):
    together = tower(pixels).last_hidden_state
    alone = torch.cat([tower(image[None]).last_hidden_state for image in pixels])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_a_tower_that_trains_sees_the_whole_batch_once(pixels):
    model = EfficientNetLiteModel(EfficientNetLiteConfig(SIDE)).train()
    model(pixels).last_hidden_state.sum().backward()
    assert model.stem_norm.num_batches_tracked == 1
    seen = model.stem(pixels).mean(dim=(0, 2, 3)) * model.stem_norm.momentum
    torch.testing.assert_close(model.stem_norm.running_mean, seen, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_norms_pass_gradients_to_weights_before_and_in_them(tower, pixels):
    """Fine-tuning with fixed statistics: the folded form has the gradient of the plain one."""
    model = EfficientNetLiteModel(EfficientNetLiteConfig(SIDE)).eval()
    model.load_state_dict(tower.state_dict())
    grads = {}
    for name in ("folded", "plain"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "plain":
                patch.setattr(efficientnet, "_normed", lambda convolution, norm, x: norm(convolution(x)))
            model.zero_grad()
            model(pixels[:2]).last_hidden_state.square().mul(
                torch.linspace(0, 1, model.config.hidden_size)
            ).mean().backward()
            block = model.blocks[12]
            grads[name] = [block.expand.weight.grad.clone(), block.expand_norm.bias.grad.clone()]
    for folded, plain in zip(grads["folded"], grads["plain"], strict=True):
        assert (folded - plain).norm() < 1e-3 * plain.norm()
