"""Languages and regions: what each is, and that streams are functions of seed and position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtml.tasks import Languages, Regions, TaskStream

STREAMS: list[Any] = [Languages, Regions]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_batch_depends_on_seed_stream_and_index_alone(kind: type[TaskStream]) -> None:
    stream, again = kind(seed=1), kind(seed=1)
    batches = [next(stream) for _ in range(3)]
    again.load_state_dict({"position": 2})
    assert torch.equal(next(again).sx, batches[2].sx) and again.state_dict() == stream.state_dict()
    for other in (kind(seed=2), kind(seed=1, stream=1)):
        assert not torch.equal(next(other).sx, batches[0].sx)
    assert not torch.equal(batches[0].sx, batches[1].sx)


def test_a_language_is_an_order_of_its_tokens() -> None:
    batch = next(Languages(shots=40, tasks=3, order=1.0, vocabulary=6))
    for x, y in zip(batch.sx, batch.sy, strict=True):
        after = {int(a): int(b) for a, b in zip(x.flatten(), y.flatten(), strict=True)}
        assert sorted(after) == sorted(after.values()) == list(range(6))
        assert all(after[int(a)] == int(b) for a, b in zip(x.flatten(), y.flatten(), strict=True))
        token, met = 0, set()
        while token not in met:  # one cycle through all of them
            met.add(token)
            token = after[token]
        assert len(met) == 6
    assert not torch.equal(batch.sy[0], batch.sy[1])


def test_a_free_language_has_no_order() -> None:
    batch = next(Languages(shots=50, tasks=2, order=0.0, vocabulary=4))
    pairs = batch.sx * 4 + batch.sy
    assert len(pairs[0].unique()) == 16


def test_regions_are_rectangles_of_shades() -> None:
    batch = next(Regions(shots=30, tasks=2, noise=0.0, classes=3))
    for t in range(2):
        classes = {float(v): batch.sy[t][batch.sx[t, :, 0] == v].unique().tolist() for v in batch.sx[t].unique()}
        assert sorted(classes) == [-1.0, 0.0, 1.0] and sorted(c for each in classes.values() for c in each) == [0, 1, 2]
    for image in batch.sy[0]:
        assert len(image.unique()) <= 2
    assert batch.qx.shape == (2, 30, 1, 8, 8) and batch.qy.shape == (2, 30, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Languages(shots=0), "shots"),
        (lambda: Languages(vocabulary=0), "vocabulary"),
        (lambda: Languages(order=1.5), "order"),
        (lambda: Regions(side=0), "side"),
        (lambda: Regions(noise=-1.0), "noise"),
    ],
)
def test_bad_counts_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
