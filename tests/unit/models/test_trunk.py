"""Tower and projector run apart: together they are the model's own features; what is kept changes nothing."""

from __future__ import annotations

import pytest
import torch
from training_setup import encoder_of, png, write_data

from vlmtune.data.batch import collate
from vlmtune.data.feature_store import FeatureStore
from vlmtune.data.sources import FileSource
from vlmtune.models.load import load_model
from vlmtune.models.trunk import CachedVision, require_two_halves
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.types import ImageRef, Sample, Text, Turn, VlmtuneError


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Text alone, one image, two images of other sizes, and one image twice."""
    source = FileSource(write_data(tmp_path_factory.mktemp("data"), 6))
    plain = [source[n] for n in range(5)]
    image = plain[0].images[0]
    other = ImageRef(png(77))
    two = Turn("user", (image, other, Text("which")))
    reply = Turn("assistant", (Text("left"),))
    return [*plain, Sample("two", (two, reply)), Sample("twice", (Turn("user", (image, image, Text("same"))), reply))]


@pytest.fixture
def made(tiny_folder, family, samples, tmp_path):
    """(model with a frozen tower, plain batch, encoder that looks up, store)."""
    folder = tiny_folder(family)
    model, encoder = load_model(str(folder)), encoder_of(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projector" in name or "connector" in name or "merger" in name)
    set_training_mode(model)
    store = FeatureStore(tmp_path / "store", 2**30)
    return model, samples, encoder, encoder.looking_up(store), store


def batch_of(encoder, samples):
    return collate([encoder.encode(sample) for sample in samples], encoder.pad_token_id)


def test_both_halves_are_the_whole(family, made):
    """States and gradients of the projector, from new features and from kept ones; every image is kept once."""
    model, samples, plain, looking, store = made
    vlm = VLM(model, CachedVision(model, store.put))
    weights = torch.Generator().manual_seed(0)

    def run(encoder):
        batch = batch_of(encoder, samples)
        model.zero_grad(set_to_none=True)
        states = vlm(batch)
        draw = torch.rand(states.hidden.shape, generator=weights.manual_seed(0))
        (states.hidden * draw).sum().backward()
        return states.hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, gradients = run(plain)
    for moment in ("new", "waiting", "on disk"):
        images = batch_of(looking, samples).images
        assert all((image.features is None) == (moment == "new") for image in images)
        assert all(bool(image.pixels) == (moment == "new") for image in images)
        halves, of_halves = run(looking)
        # a product of more rows may be summed in another order; everything else is the same arithmetic
        torch.testing.assert_close(halves, whole, rtol=0, atol=2e-6)
        assert of_halves.keys() == gradients.keys() != set()
        for name, gradient in gradients.items():
            torch.testing.assert_close(of_halves[name], gradient, rtol=1e-5, atol=1e-5)
        if moment == "new":
            first = halves
        else:
            assert torch.equal(halves, first), "what is kept is what was made, to the last bit"
            store.flush()
    assert len(store) == len({image.key for image in images}) < len(images)


def test_what_one_image_becomes_depends_on_no_other(family, made):
    model, samples, _, looking, store = made
    vision = CachedVision(model, lambda key, features: None)
    together = batch_of(looking, samples).images
    vision.inputs(together)
    for image, alone in zip(together, batch_of(looking, samples).images, strict=True):
        vision.inputs([alone])
        assert image.features.keys() == alone.features.keys()
        assert all(torch.equal(value, alone.features[name]) for name, value in image.features.items())


def test_a_tower_that_trains_is_refused(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    require_two_halves(model)
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    with pytest.raises(VlmtuneError, match=r"vision tower trains \(1 tensors, first .*fc1.weight\).*freeze it"):
        require_two_halves(model)
