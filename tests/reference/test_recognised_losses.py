"""Callables as losses of the table: what is recognised, what only looks alike, and what must run live."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.callable_losses import IDS, LIVE, NUMBERS, OTHERS, WEIGHTS, Known
from torch import Tensor, nn

from mtml_kernels.losses import LossSpec, Opaque, Recognised, Sizes, in_words, live_because, recognise, resolve
from mtml_kernels.losses.matching import LARGEST, Match, match

KNOWN = {**{f"ids: {name}": k for name, k in IDS.items()}, **{f"numbers: {name}": k for name, k in NUMBERS.items()}}


def found(loss: Any, ids: bool, shape: tuple[int, ...] = (6, 4), dtype: torch.dtype = torch.float32) -> Match | str:
    sizes = Sizes(shape, shape[:1], torch.int64, dtype) if ids else Sizes(shape, shape, dtype, dtype)
    return live_because(loss) or match(loss, sizes)


@pytest.mark.parametrize("name", KNOWN)
def test_spellings_are_recognised(name: str) -> None:
    known: Known = KNOWN[name]
    match = found(known.loss, name.startswith("ids"))
    assert isinstance(match, Match), match
    assert (match.spec, match.weighs, match.passes_over) == (known.spec, known.weighs, known.passes_over)
    assert match.scale == pytest.approx(known.scale, rel=1e-14)


@pytest.mark.parametrize("name", LIVE)
def test_what_may_change_unseen_runs_live(name: str) -> None:
    loss, why = LIVE[name]
    assert why in str(live_because(loss)), live_because(loss)


@pytest.mark.parametrize("name", OTHERS)
def test_lookalikes_are_not_recognised(name: str) -> None:
    loss, ids, why = OTHERS[name]
    reason = found(loss, ids)
    assert isinstance(reason, str) and re.search(why, reason), reason


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("ignored", [0, 1])
def test_an_ignored_class_is_seen_at_every_size(samples: int, classes: int, ignored: int) -> None:
    reason = found(lambda o, t: F.cross_entropy(o, t, ignore_index=ignored), True, (samples, classes))
    assert isinstance(reason, str)
    whole = found(lambda o, t: F.cross_entropy(o, t), True, (samples, classes))
    assert isinstance(whole, Match) and whole.spec == LossSpec("cross_entropy") and whole.scale == 1.0


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1)])
def test_one_number_has_two_sides(shape: tuple[int, ...]) -> None:
    one_sided = found(lambda o, t: ((o - t).abs() + (o - t)).mean(), False, shape)
    pinball = found(lambda o, t: (0.5 * (o - t).abs() + 0.4 * (o - t)).mean(), False, shape)
    assert isinstance(one_sided, str) and isinstance(pinball, str)
    assert found(lambda o, t: (o - t).abs().mean(), False, shape) == Match(LossSpec("l1"))


@pytest.mark.parametrize("delta", [1e-6, 0.01, 1 / 3, 2.0, 77.0, 1e5, 1e8])
def test_the_threshold_is_found(delta: float) -> None:
    found_ = found(lambda o, t: F.huber_loss(o, t, delta=delta), False)
    assert found_ == Match(LossSpec("huber", delta=delta))


@pytest.mark.parametrize("smoothing", [0.0, 1e-6, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_smoothing_is_found(smoothing: float, classes: int) -> None:
    found_ = found(lambda o, t: F.cross_entropy(o, t, label_smoothing=smoothing), True, (3, classes))
    assert isinstance(found_, Match) and found_.spec.kind == "cross_entropy" and found_.scale == 1.0
    assert found_.spec.label_smoothing == pytest.approx(smoothing, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("output", "target"), [((5, 1), (5,)), ((5, 1, 3), (5, 3)), ((5,), (5, 1))])
def test_a_target_in_another_shape(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    def of(loss: Callable[[Tensor, Tensor], Tensor]) -> Match | str:
        return match(loss, Sizes(output, target, torch.float32, torch.float32))

    assert of(lambda o, t: F.mse_loss(o.reshape(t.shape), t)) == Match(LossSpec("mse"), flat=True)
    assert of(lambda o, t: (o.squeeze() - t.squeeze()).square().mean()) == Match(LossSpec("mse"), flat=True)
    broadcast = of(lambda o, t: ((o - t) ** 2).mean())
    assert isinstance(broadcast, str), "each output against every target"


def test_shapes_and_dtypes_that_are_not_tried() -> None:
    loss = resolve(lambda o, t: F.mse_loss(o, t))
    assert isinstance(loss, Opaque)

    def reason(*shape: int, kind: torch.dtype = torch.float32) -> str:
        result = recognise(loss, Sizes(shape, shape, kind, torch.float32), masked=False)
        assert isinstance(result, Opaque)
        return result.reason

    assert "torch.float64" in reason(3, 2, kind=torch.float64)
    assert "torch.bool" in reason(3, 2, kind=torch.bool)
    assert "none of them" in reason(3, 2, kind=torch.int64)
    assert "too many" in reason(2, LARGEST) and "too many" in reason(0, 2)
    assert "too many" in reason(2, 1 << 20, kind=torch.int64)


def test_masks_and_factors() -> None:
    def of(loss: Any, masked: bool, factors: bool = True) -> str:
        opaque = resolve(loss)
        assert isinstance(opaque, Opaque) and opaque.unknown
        result = recognise(opaque, Sizes((3, 2), (3, 2), torch.float32, torch.float32), masked, factors)
        return str(result) if isinstance(result, Recognised) else result.reason

    half, each = (lambda o, t: 0.5 * F.mse_loss(o, t)), (lambda o, t: (o - t).square().sum(1))
    assert of(half, False) == "0.5 x mse (recognised: <lambda>)"
    assert of(half, False, False) == (
        "<lambda>: this callable is not fused: it computes 0.5 x mse, which is fused without the factor"
    )
    assert "cannot be weighed" in of(half, True)
    assert of(each, True) == "2 x mse (recognised: <lambda>)"
    assert "fused without the factor" in of(lambda o, t: -F.mse_loss(o, t), False)


def test_losses_in_words() -> None:
    assert in_words(LossSpec("mse")) == "mse"
    assert in_words(LossSpec("huber", "sum", delta=0.5)) == "huber(delta=0.5, sum)"
    assert in_words(LossSpec("cross_entropy", label_smoothing=0.1)) == "cross_entropy(label_smoothing=0.1)"


def test_what_pytorch_has_options_for_keeps_its_reason() -> None:
    """It is known for what it is, and not followed."""
    for loss in (nn.CrossEntropyLoss(weight=WEIGHTS), functools.partial(F.cross_entropy, ignore_index=0)):
        opaque = resolve(loss)
        assert isinstance(opaque, Opaque) and not opaque.unknown


def test_random_numbers_are_not_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found(lambda o, t: F.mse_loss(o, t), False)
    assert torch.equal(torch.rand(4), expected)


def test_a_loss_is_tried_apart_from_the_callers_context() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert found(lambda o, t: F.mse_loss(o, t), False) == Match(LossSpec("mse"))
