"""Steps: which samples, in which micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.loader import Room, Steps, load_steps
from vlmtune.data.mixture import Mixture
from vlmtune.data.sources import SceneSource
from vlmtune.models.load import load_processor
from vlmtune.schedule import piecewise


@pytest.fixture(scope="module")
def steps(embedded_folder):
    sources = [SceneSource("base", "caption", "train"), SceneSource("base", "grounding", "train", turns=4)]
    mixture = Mixture([None, None], [piecewise(1.0), piecewise(1.0)], 24, seed=3)
    return Steps(sources, mixture, Encoder(load_processor(str(embedded_folder)), coordinates("bins")), 12, Room(4))


def test_a_step_holds_its_samples_and_like_lengths_share_a_micro_batch(steps):
    for step in range(2):
        drawn = [steps.order[k] for k in range(12 * step, 12 * step + 12)]
        wanted = sorted(steps.sources[source][row].id for source, row in drawn)
        batches = steps[step]
        assert sorted(id for batch in batches for id in batch.sample_ids) == wanted
        widths = [batch.kinds.shape[1] for batch in batches]
        assert widths == sorted(widths) and widths[0] < widths[-1]
        for batch, wider in zip(batches, batches[1:], strict=False):
            assert batch.inputs["attention_mask"].sum(1).max() <= wider.inputs["attention_mask"].sum(1).min()


def test_workers_change_nothing(steps):
    def ids(workers):
        return [
            [batch.inputs["input_ids"].tolist() for batch in batches] for batches in load_steps(steps, 0, 2, workers)
        ]

    assert ids(0) == ids(2)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 12),
    st.none() | st.integers(1, 200),
    st.booleans(),
)
def test_room_is_kept_to(lengths, samples, tokens, has_padding):
    """Every sample once, in order; no forward above its limits but one sample alone; none with room to spare."""
    lengths = sorted(lengths)
    parts = Room(samples, tokens, has_padding).split(lengths)
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(len(lengths)))

    def size(part):
        inside = lengths[part]
        return len(inside) * max(inside) if has_padding else sum(inside)

    for part in parts:
        count = part.stop - part.start
        assert count <= samples and (tokens is None or count == 1 or size(part) <= tokens)
    for part in parts[:-1]:
        more = slice(part.start, part.stop + 1)
        assert part.stop - part.start == samples or size(more) > tokens
