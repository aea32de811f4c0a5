"""Tests of the Triton losses through its interpreter: test_triton_multihead_loss.py runs them in another process."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases.triton_watch import permuted, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import multihead_loss
from mtml_kernels.losses import CLASS_KINDS, HeadLoss
from mtml_kernels.losses import HEAD_KINDS as KINDS
from mtml_kernels.reference.multihead_loss import multihead_loss as reference
from mtml_kernels.triton.multihead_loss import (
    backward,
    call_backward,
    call_forward,
    call_hand_out,
    forward,
    forward_in_place,
)
from mtml_kernels.triton.multihead_loss.launches import HeadShape, launches
from mtml_kernels.triton.multihead_loss.table import ELEMENTS, LABELS, NARROW, PIXELS, TINY, VOCABULARY, WIDE, tile_of

sys.path.append(str(Path(__file__).resolve().parents[3]))  # bench/ is not installed
from bench.gpu import multihead_loss as gpu_heads

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_multihead_loss.py, which sets the interpreter up"
# The interpreter computes padding lanes, which are masked, in numpy, which warns of their logarithms.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclasses.dataclass
class Head:
    spec: HeadLoss
    logits: Tensor
    target: Tensor
    sample_weights: Tensor | None = None
    class_weights: Tensor | None = None
    pos_weight: Tensor | None = None

    def columns(self, dtype: torch.dtype | None = None) -> list[object]:
        tensors = (self.logits, self.target, self.sample_weights, self.class_weights, self.pos_weight)
        logits, target, *rest = (
            t.to(dtype) if t is not None and dtype and t.is_floating_point() else t for t in tensors
        )
        return [logits, target, self.spec, *rest]


def make(
    spec: HeadLoss,
    *shape: int,
    soft: bool = False,
    weights: bool = False,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Head:
    """A random head; ids hold some ignored ones. `weights`: every weight that the head takes, zeros among them."""
    logits = (torch.randn(shape) * scale).to(dtype)
    head = Head(spec, logits, torch.randn(shape))
    rows = shape[:1]
    if spec.kind in CLASS_KINDS:
        dim = spec.class_dim % len(shape)
        rows, classes = (*shape[:dim], *shape[dim + 1 :]), shape[dim]
        head.target = torch.softmax(torch.randn(shape), dim) * (torch.rand(shape) > 0.2)
        if not soft and spec.kind != "kl":
            head.target = torch.randint(0, max(classes, 1), rows)
            head.target[torch.rand(rows) < 0.2] = spec.ignore_index
            head.class_weights = torch.rand(classes) if weights else None
    elif spec.kind == "gaussian_nll":
        head.target = torch.randn(*shape[:-1], shape[-1] // 2)
    elif spec.kind == "bce_with_logits":
        head.target = torch.rand(shape)
        head.pos_weight = torch.rand(shape[-1]) * 3 if weights else None
    if weights:
        head.sample_weights = torch.rand(rows) * (torch.rand(rows) > 0.2)
    return head


def run(heads: Sequence[Head], **options: bool) -> tuple[Tensor, list[Tensor]]:
    return forward(*map(list, zip(*(h.columns() for h in heads), strict=True)), **options)


def expected(heads: Sequence[Head], dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    logits, *rest = map(list, zip(*(h.columns(dtype) for h in heads), strict=True))
    logits = [z.detach().requires_grad_() for z in logits]
    losses = reference(logits, *rest)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), logits))


def agree(heads: Sequence[Head], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    losses, gradients = run(heads)
    wanted, wanted_gradients = expected(heads)
    torch.testing.assert_close(losses.double(), wanted, rtol=rtol, atol=atol)
    assert len(gradients) == len(heads)
    for head, found, want in zip(heads, gradients, wanted_gradients, strict=True):
        assert found.dtype == head.logits.dtype and found.shape == head.logits.shape and found.is_contiguous()
        torch.testing.assert_close(found.double(), want, rtol=rtol, atol=atol)


def every_kind(weights: bool = False) -> list[Head]:
    heads = [make(HeadLoss(kind), 5, 6, weights=weights) for kind in KINDS]
    heads += [make(HeadLoss(kind, reduction="sum", delta=0.6), 3, 4, 2, weights=weights) for kind in KINDS]
    smooth = HeadLoss(label_smoothing=0.2)
    return [*heads, make(smooth, 7, 9, weights=weights), make(smooth, 4, 3, soft=True, weights=weights)]


@pytest.mark.parametrize("weights", [False, True])
def test_every_kind_in_one_call(weights: bool) -> None:
    agree(every_kind(weights))


def test_launches_go_to_the_device_of_the_tensors() -> None:
    with watched(outside=False, reused=False) as watch:  # addresses lie in a table, and rows are read again
        run(every_kind())
    assert watch.launches and "unguarded" not in {conflict.kind for conflict in watch.conflicts}


def test_every_tile_with_more_than_one_program_and_chunk() -> None:
    heads = [
        make(HeadLoss(), 70, 10),
        make(HeadLoss(label_smoothing=0.1), 17, 161, weights=True),
        make(HeadLoss("kl"), 2, 2500),
        make(HeadLoss(ignore_index=0), 2, 21, 9, 11, weights=True),
        make(HeadLoss(class_dim=-1), 3, 5, 33),
        make(HeadLoss(), 2, 8200, weights=True),  # its rows take the vocabulary's launch
        make(HeadLoss("huber"), 3, 1100),
        make(HeadLoss("gaussian_nll"), 5, 3, 2 * 101, weights=True),
        make(HeadLoss("bce_with_logits"), 2, 3, 300, weights=True),
    ]
    tiles = [tile_of(h.spec, 10, 1, 4) if h.spec.kind not in CLASS_KINDS else -1 for h in heads]
    assert tiles.count(ELEMENTS) == 3
    assert [tile_of(HeadLoss(), c, i, 4) for c, i in ((10, 1), (161, 1), (2500, 1), (8200, 1), (21, 99))] == [
        TINY,
        NARROW,
        WIDE,
        VOCABULARY,
        PIXELS,
    ]
    agree(heads, atol=5e-6)


def test_labels_alone_in_every_tile() -> None:
    """Without smoothing and class weights a head takes the kernel's shorter way, with the same losses."""
    shapes = [(70, 10), (40, 161), (3, 2500), (2, 8200), (2, 21, 9, 11)]
    heads = [make(HeadLoss(ignore_index=1), *shape) for shape in shapes]
    weighted = [dataclasses.replace(h, class_weights=torch.ones(h.logits.shape[1])) for h in heads]
    general = [shape_of(h).tile for h in weighted]
    assert general == [TINY, NARROW, WIDE, VOCABULARY, PIXELS]
    assert [shape_of(h).tile for h in heads] == [tile + LABELS for tile in general]
    agree(heads, atol=5e-6)
    torch.testing.assert_close(run(heads), run(weighted), rtol=1e-5, atol=1e-7)


def shape_of(head: Head) -> HeadShape:
    hard, weighted = not head.target.is_floating_point(), head.class_weights is not None
    return HeadShape(head.spec, head.logits.shape, head.logits.dtype, hard, -1, True, weighted)


@pytest.mark.parametrize("seed", [0, 1])
def test_any_program_may_be_the_last(seed: int) -> None:
    """Equal bits whatever the order of programs, of which the last adds up the losses of its head."""
    heads = [make(HeadLoss(), 700, 3), make(HeadLoss("mse"), 9, 1100), make(HeadLoss(), 6, 5)]
    assert [int(group.table["blocks"].max()) for group in launches(tuple(shape_of(h) for h in heads))] == [6]
    expected = run(heads)
    with permuted(seed):
        found = run(heads)
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


@st.composite
def random_heads(draw: st.DrawFn) -> list[Head]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    heads = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(KINDS))
        spec = HeadLoss(
            kind,
            reduction=draw(st.sampled_from(["mean", "sum"])),
            ignore_index=draw(st.sampled_from([-100, 0, 2])),
            label_smoothing=draw(st.sampled_from([0.0, 0.3])) if kind == "cross_entropy" else 0.0,
            class_dim=draw(st.sampled_from([1, -1])),
        )
        shape = [draw(st.sampled_from([1, 2, 5, 40])), draw(st.sampled_from([1, 3, 20]))]
        shape += draw(st.lists(st.sampled_from([1, 2, 7]), max_size=2))
        if kind == "gaussian_nll":
            shape[-1] *= 2
        heads.append(make(spec, *shape, soft=draw(st.booleans()), weights=draw(st.booleans())))
    return heads


@pytest.mark.slow
@settings(max_examples=20)
@given(random_heads())
def test_random_heads(heads: list[Head]) -> None:
    agree(heads)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, rtol: float) -> None:
    heads = [make(h.spec, *h.logits.shape, dtype=dtype) for h in every_kind()]
    losses, gradients = run(heads)
    wanted, wanted_gradients = expected(heads)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-5, atol=2e-6)  # of logits that were rounded before
    for found, want in zip(gradients, wanted_gradients, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=rtol, atol=1e-6)


def test_heads_of_different_dtypes_keep_theirs() -> None:
    heads = [make(HeadLoss(), 4, 5, dtype=t) for t in (torch.float32, torch.float16, torch.float32)]
    losses, gradients = run(heads)
    torch.testing.assert_close(losses.double(), expected(heads)[0], rtol=1e-5, atol=1e-6)
    assert [g.dtype for g in gradients] == [h.logits.dtype for h in heads]


def test_nothing_to_count() -> None:
    ignored = make(HeadLoss(label_smoothing=0.1), 5, 4)
    ignored.target.fill_(-100)
    unweighted = make(HeadLoss("mse"), 5, 4)
    unweighted.sample_weights = torch.zeros(5)
    one_class = make(HeadLoss(), 6, 1, scale=1e4)
    shapes = [(HeadLoss(), (0, 4)), (HeadLoss("mse"), (0, 4)), (HeadLoss("l1"), (3, 0)), (HeadLoss("kl"), (3, 0))]
    empty = [make(spec, *shape) for spec, shape in shapes]
    heads = [ignored, unweighted, one_class, *empty, make(HeadLoss(), 3, 4)]
    losses, gradients = run(heads)
    assert losses[:-1].tolist() == [0.0] * (len(heads) - 1) and losses[-1] > 0
    assert all(not g.any() for g in gradients[:-1]) and gradients[-1].any()
    assert run([make(HeadLoss(), 0, 4)])[0].tolist() == [0.0]
    losses, gradients = forward([], [], [])
    assert losses.shape == (0,) and gradients == []


def test_logits_of_1e4() -> None:
    heads = [make(HeadLoss(kind), 8, 6, scale=1e4) for kind in KINDS if kind != "gaussian_nll"]
    heads.append(make(HeadLoss(label_smoothing=0.1), 8, 6, scale=1e4))
    heads[0].target = heads[0].logits.argmax(1)
    agree(heads, rtol=1e-5)


def errors(heads: Sequence[Head], found: tuple[Tensor, list[Tensor]]) -> Tensor:
    """Largest error of each head's loss and gradient, [2, heads]."""
    losses, gradients = expected(heads)
    pairs = zip(found[1], gradients, strict=True)
    return torch.stack([(found[0] - losses).abs(), torch.stack([(g - w).abs().max() for g, w in pairs])])


@pytest.mark.slow
def test_errors_are_those_of_pytorch() -> None:
    ours, theirs = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        heads = [make(HeadLoss(kind), 32, 12) for kind in KINDS]
        ours.append(errors(heads, run(heads)))
        theirs.append(errors(heads, expected(heads, torch.float32)))
    ours_median, theirs_median = (torch.stack(e).median(0).values for e in (ours, theirs))
    assert (ours_median <= 2 * theirs_median + 1e-9).all(), (ours_median, theirs_median)


def test_confident_bce_keeps_its_small_losses() -> None:
    head = Head(HeadLoss("bce_with_logits"), torch.tensor([[20.0, 12.0, -30.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    agree([head], rtol=1e-5, atol=0)


def test_bits_do_not_depend_on_the_other_heads() -> None:
    heads = [*every_kind(True), make(HeadLoss(), 70, 10), make(HeadLoss(), 2, 8200), make(HeadLoss(), 2, 8203)]
    together = run(heads)
    for i, head in enumerate(heads):
        alone = run([head])
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])
    assert torch.equal(run(heads, want_grad=False)[0], together[0])
    assert run(heads, want_grad=False)[1] == []


def test_nan_stays_in_its_row_and_head() -> None:
    heads = every_kind()
    heads[0].logits[2, 1] = float("nan")
    heads[0].target[2] = 0
    losses, gradients = run(heads)
    assert losses.isnan().tolist() == [True] + [False] * (len(heads) - 1)
    assert gradients[0].isnan().any(1).tolist() == [False, False, True, False, False]
    assert not any(g.isnan().any() for g in gradients[1:])


@pytest.mark.parametrize(("kind", "which"), [(k, "sample_weights") for k in KINDS] + [(KINDS[0], "class_weights")])
@pytest.mark.parametrize("odd", [[1.0, float("inf"), 0.0], [1.0, float("nan"), 0.0], [3e38, 3e38, 0.0]])
def test_weights_without_a_sum_make_nan_of_the_head_alone(kind: str, which: str, odd: list[float]) -> None:
    heads = [make(HeadLoss(kind), 3, 4) for _ in range(3)]
    if which == "class_weights":
        odd = [*odd, 1.0]
    for head in heads if kind == "cross_entropy" else []:
        head.target = torch.tensor([0, 1, 2])
    setattr(heads[1], which, torch.tensor(odd))
    losses, gradients = run(heads)
    assert losses.isnan().tolist() == [False, True, False]
    assert not gradients[0].isnan().any() and gradients[1].isnan().any() and not gradients[2].isnan().any()
    if which == "sample_weights":  # a row of weight 0 counts for nothing
        assert not gradients[1][2].any()


def test_classes_that_are_masked_out() -> None:
    """Logits of -inf, a whole first chunk among them; without smoothing the reference agrees."""
    heads = [make(HeadLoss(ignore_index=0), 4, 10), make(HeadLoss(ignore_index=0), 2, 2100)]
    for head, masked in zip(heads, (5, 1500), strict=True):
        head.logits[:, :masked] = float("-inf")
        head.target.fill_(head.logits.shape[1] - 1)
    agree(heads)


def test_labels_out_of_range() -> None:
    heads = [make(HeadLoss(), 5, 4), make(HeadLoss(reduction="sum"), 40, 4), make(HeadLoss("mse"), 5, 4)]
    run(heads, check_labels=True)
    heads[1].target[37], heads[1].target[33] = -1, 4
    losses, gradients = run(heads)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradients[1].isnan().any(1).nonzero().flatten().tolist() == [33, 37]
    with pytest.raises(ValueError, match=r"head 1 expected class ids from 0 to 3 .*got 4 in row 33"):
        run(heads, check_labels=True)
    heads[0].target[0] = 2**40
    assert run(heads)[0].isnan().tolist() == [True, True, False]


def test_views_and_other_types_of_input() -> None:
    head = make(HeadLoss(), 6, 5, weights=True)
    wide = make(HeadLoss(class_dim=-1), 6, 3, 5)
    wide.sample_weights = torch.rand(6).double()  # one a sample of 3 rows
    views = dataclasses.replace(
        head,
        logits=head.logits.t().contiguous().t(),
        target=torch.stack([head.target, head.target], 1)[:, 0].to(torch.int32),
        sample_weights=torch.stack([head.sample_weights] * 2, 1)[:, 0],
    )
    agree([views, wide])
    assert torch.equal(run([views])[0], run([head])[0])


def test_backward_scales_into_new_tensors() -> None:
    heads = [*every_kind(), make(HeadLoss(), 2, 3000), make(HeadLoss(), 0, 4), make(HeadLoss(), 3, 4, dtype=torch.half)]
    gradients = run(heads)[1]
    before = [g.clone() for g in gradients]
    cotangents = torch.randn(len(heads))
    scaled = backward(gradients, cotangents)
    for found, gradient, old, c in zip(scaled, gradients, before, cotangents, strict=True):
        assert torch.equal(gradient, old)
        assert torch.equal(found, (c * old.float()).to(old.dtype))
        assert found.numel() == 0 or found.data_ptr() != gradient.data_ptr()
    for found, old in zip(backward(gradients, torch.tensor(2.0).expand(len(heads))), before, strict=True):
        assert torch.equal(found, 2 * old)


def test_gradients_are_handed_out_in_their_own_memory() -> None:
    heads = [make(HeadLoss(), 6, 5), make(HeadLoss("mse"), 3, 1400), make(HeadLoss(), 3, 4, dtype=torch.half)]
    gradients = run(heads)[1]
    cotangents = torch.tensor([1.0, -0.5, 3.0])
    expected = backward(gradients, cotangents)
    found = call_hand_out(gradients, cotangents, [1, 1, 1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [g.data_ptr() for g in found] == [g.data_ptr() for g in gradients]
    call_hand_out(gradients, torch.tensor([float("nan"), 1.0, 1.0]), [1, 1, 1])
    assert gradients[0].isnan().all() and torch.equal(gradients[1], expected[1])


def test_losses_whose_gradients_are_written_over_the_logits() -> None:
    heads = [*every_kind(True), make(HeadLoss(), 2, 3000), make(HeadLoss(), 2, 8200, dtype=torch.half)]
    losses, gradients = run(heads)
    columns = [list(column) for column in zip(*(h.columns() for h in heads), strict=True)]
    logits = columns[0] = [z.clone() for z in columns[0]]
    assert torch.equal(forward_in_place(*columns, want_grad=False), losses)
    assert all(torch.equal(z, h.logits) for z, h in zip(logits, heads, strict=True))
    assert torch.equal(forward_in_place(*columns), losses)
    assert all(torch.equal(z, g) for z, g in zip(logits, gradients, strict=True))


@pytest.mark.parametrize("cotangent", [[1.0, 1.0], [2.0, -1.0]])
def test_a_second_backward_is_right_whatever_became_of_the_first(cotangent: list[float]) -> None:
    logits = [torch.randn(6, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    targets, by = [torch.randint(5, (6,)), torch.randint(4, (3,))], torch.tensor(cotangent)
    losses = multihead_loss(logits, targets, backend="triton")
    first = torch.autograd.grad(losses, logits, by, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(losses, logits, by), kept, strict=True))
    expected = torch.autograd.grad(multihead_loss(logits, targets, backend="reference"), logits, by)
    torch.testing.assert_close(kept, list(expected))


def test_values_still_to_be_negated() -> None:
    head = make(HeadLoss(), 6, 5, weights=True)
    assert head.sample_weights is not None
    views = dataclasses.replace(
        head, logits=torch._neg_view(-head.logits), sample_weights=torch._neg_view(-head.sample_weights)
    )
    assert torch.equal(run([views])[0], run([head])[0])


def test_equals_pytorchs_own_losses() -> None:
    z, y = torch.randn(9, 7), torch.randint(0, 7, (9,))
    assert run([Head(HeadLoss(), z, y)])[0][0].item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
    kl = F.kl_div(z.log_softmax(1), z.flip(0).softmax(1), reduction="batchmean").item()
    assert run([Head(HeadLoss("kl"), z, z.flip(0).softmax(1))])[0][0].item() == pytest.approx(kl, rel=1e-5)


class Call(NamedTuple):
    """What the op tells its backends of a call."""

    specs: tuple[HeadLoss, ...]
    stacked: tuple[bool, ...]
    counts: list[int]


class Tensors(NamedTuple):
    logits: list[Tensor]
    targets: list[Tensor]
    sample_weights: list[Tensor | None]
    class_weights: list[Tensor | None]
    pos_weights: list[Tensor | None]


def test_stacks_of_equal_heads_are_so_many_heads() -> None:
    heads = [make(HeadLoss(), 6, 5, weights=True) for _ in range(3)]
    other = make(HeadLoss("bce_with_logits"), 4, 3, weights=True, dtype=torch.float32)
    wanted, wanted_gradients = run([*heads, other])
    stack = [torch.stack(list(column)) for column in zip(*(h.columns()[:2] for h in heads), strict=True)]
    own, classes = (torch.stack([getattr(h, n) for h in heads]) for n in ("sample_weights", "class_weights"))
    empty = [t[:0] for t in (*stack, own, classes)]
    entries = [[*stack, own, classes, None], other.columns()[:2] + other.columns()[3:], [*empty, None]]
    tensors = Tensors(*map(list, zip(*entries, strict=True)))
    call = Call((HeadLoss(), other.spec, HeadLoss()), (True, False, True), [3, 1, 0])
    losses, gradients = call_forward(call, tensors, True)
    assert torch.equal(losses, wanted)
    assert [g.shape for g in gradients] == [z.shape for z in tensors.logits]
    for found, want in zip([*gradients[0], gradients[1]], wanted_gradients, strict=True):
        assert torch.equal(found, want)
    cotangent = torch.randn(4)
    scaled = call_backward(gradients, cotangent, call.counts)
    assert torch.equal(scaled[0], gradients[0] * cotangent[:3, None, None])
    assert torch.equal(scaled[1], gradients[1] * cotangent[3]) and scaled[2].shape == (0, 6, 5)
    assert call_forward(call, tensors, False)[1] == []


def test_the_benchmark_compares_before_it_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny(draw: gpu_heads.Draw) -> gpu_heads.Heads:
        logits = [draw.leaf(4, 3), draw.leaf(4, 2)]
        return gpu_heads.Heads(logits, [draw.labels(3, 4), torch.rand(4, 2)], [HeadLoss(), HeadLoss("huber")])

    monkeypatch.setitem(gpu_heads.CASES, "tiny", tiny)
    assert gpu_heads.run_case("tiny", ["eager", "mtml", "liger", "torch:chunked"], torch.float32, "cpu", 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["liger", "torch:chunked", "eager", "mtml"]
    assert all("not timed" in line for line in lines[:2]) and "x the fastest peer" in lines[3]
    monkeypatch.setattr(gpu_heads, "error", lambda *_: float("nan"))
    assert not gpu_heads.run_case("tiny", ["mtml"], torch.float32, "cpu", 0.01)
    assert "mismatch" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_linear_heads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(gpu_heads.CASES, "tiny", lambda draw: gpu_heads.linear_heads(draw, 12, 5, 6, 3))
    gpu_heads.run_case("tiny", ["eager", "mtml", "liger", "torch:chunked"], torch.float32, "cpu", 0.01)
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert "TFLOP/s" in lines["mtml"] and "x the fastest peer" in lines["mtml"] and "TFLOP/s" in lines["eager"]
    assert "not installed" in lines["liger"] or "TFLOP/s" in lines["liger"]
    own = hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert ("TFLOP/s" if own else "has no linear_cross_entropy") in lines["torch:chunked"]


def test_heads_whose_offsets_do_not_fit_are_refused() -> None:
    huge = HeadShape(HeadLoss(), (1, 21, 2**26), torch.float32, True, -1, True)
    with pytest.raises(ValueError, match=r"head 1 .*needs offsets above 2\^31"):
        launches((huge._replace(shape=(1, 21, 2**20)), huge))
