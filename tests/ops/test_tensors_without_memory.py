"""Tensors that have shapes and dtypes like any other and no memory of their own: an error names them, no crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import mtml
from mtml_kernels import head_inner_loop, linear_multihead_loss, multihead_loss, task_conv2d, task_linear, task_update
from mtml_kernels.memory import in_memory

Make = Callable[[Tensor], Tensor]


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def resized(t: Tensor, part: float) -> Tensor:
    """A contiguous view into a storage that has been cut to a part of what the view reads (FSDP's idiom is 0)."""
    whole = torch.stack([t, t]).clone()
    view = whole[1]
    whole.untyped_storage().resize_(int((1 + part) * t.numel() * t.itemsize) if part else 0)
    return view


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def strided(t: Tensor) -> Tensor:
    """As `freed`, and a copy is needed to make it contiguous."""
    view = torch.stack([t, t], -1)[..., 0]
    view.untyped_storage().resize_(0)
    return view


WITHOUT: dict[str, Make] = {
    "TwoTensor": lambda t: TwoTensor(t, t.clone()),
    "MaskedTensor": lambda t: masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
    "FakeTensor": fake,
    "freed": freed,
    "freed view": lambda t: resized(t, 0),
    "cut view": lambda t: resized(t, 0.5),
    "freed strided": strided,
    "sparse": lambda t: t.to_sparse(),
}


def batch() -> dict[str, Tensor]:
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 1)
    return {"sx": x, "sy": y, "qx": x.clone(), "qy": y.clone()}


def model() -> mtml.MAML:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return mtml.MAML(net, lr=0.1, steps=2, loss="mse", backend="cpu")


def call(kind: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Twice: what is remembered of a good call changes nothing."""
    # of these PyTorch's own operations, in the checks before, know less than others
    other = (RuntimeError, NotImplementedError, ValueError) if kind in ("sparse", "MaskedTensor") else ()
    for _ in range(2):
        with pytest.raises((TypeError, *other)) as caught:
            function(**arguments)
        assert other or "memory of its own" in str(caught.value)


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("name", ["sx", "sy", "qx", "qy", "support_mask", "query_mask"])
@pytest.mark.filterwarnings("ignore")
def test_maml(kind: str, name: str) -> None:
    maml, data = model(), batch() | {"support_mask": torch.rand(2, 4), "query_mask": torch.rand(2, 4)}
    maml.meta_loss(**data)
    call(kind, maml.meta_loss, data | {name: WITHOUT[kind](data[name])})


@pytest.mark.parametrize("kind", ["freed", "freed view", "cut view"])
def test_parameters(kind: str) -> None:
    """FSDP frees a parameter between its uses; the next call says so, and works again once it is back."""
    maml, data = model(), batch()
    before = maml.meta_loss(**data)
    weight = maml.module[0].weight
    kept = weight.detach().clone()
    weight.data = WITHOUT[kind](kept)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"params\[0\].*memory of its own.*storage holds"):
            maml.meta_loss(**data)
    weight.data = kept
    assert torch.equal(maml.meta_loss(**data), before)


@pytest.mark.parametrize("kind", ["freed", "freed view", "cut view", "freed strided"])
def test_rates(kind: str) -> None:
    maml, data = model(), batch()
    maml.lr = WITHOUT[kind](torch.tensor([0.1, 0.2]))
    call(kind, maml.meta_loss, data)


def test_a_storage_freed_in_place_and_back() -> None:
    """The same parameter at the address at which it was found whole before."""
    maml, data = model(), batch()
    before = maml.meta_loss(**data)
    storage = maml.module[0].weight.untyped_storage()
    size, kept = storage.nbytes(), maml.module[0].weight.detach().clone()
    storage.resize_(0)
    with pytest.raises(TypeError, match=r"params\[0\]"):
        maml.meta_loss(**data)
    storage.resize_(size)
    maml.module[0].weight.data.copy_(kept)
    assert torch.equal(maml.meta_loss(**data), before)


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("name", ["features_support", "features_query", "labels", "weight", "bias", "query_labels"])
@pytest.mark.filterwarnings("ignore")
def test_head_inner_loop(kind: str, name: str) -> None:
    x = torch.randn(2, 4, 3)
    data: dict[str, Any] = {"features_support": x, "features_query": x, "labels": torch.randn(2, 4, 2)}
    data |= {"query_labels": torch.randn(2, 4, 2), "weight": torch.randn(2, 3), "bias": torch.randn(2)}
    options = {"lr": 0.1, "steps": 2, "loss": "mse", "form": "gram", "backend": "cpu"}
    head_inner_loop(**data, **options)
    call(kind, head_inner_loop, data | options | {name: WITHOUT[kind](data[name])})


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_multihead_loss(kind: str, at: int) -> None:
    heads = [torch.randn(5, 3), torch.randn(5, 3)]
    multihead_loss([heads[0]], [heads[1]], "mse")
    heads[at] = WITHOUT[kind](heads[at])
    call(kind, multihead_loss, {"logits": [heads[0]], "targets": [heads[1]], "kinds": "mse", "backend": "cpu"})
    weighted = {"sample_weights": [torch.rand(5)]}
    call(
        kind, multihead_loss, {"logits": [heads[0]], "targets": [heads[1]], "kinds": "mse", "backend": "cpu"} | weighted
    )


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("name", ["features", "weights", "biases", "targets"])
@pytest.mark.filterwarnings("ignore")
def test_linear_multihead_loss(kind: str, name: str) -> None:
    data: dict[str, Any] = {"features": torch.randn(5, 3), "weights": [torch.randn(2, 3)]}
    data |= {"biases": [torch.randn(2)], "targets": [torch.randn(5, 2)]}
    linear_multihead_loss(**data, kinds="mse")
    value = data[name]
    made = WITHOUT[kind](value if name == "features" else value[0])
    call(
        kind,
        linear_multihead_loss,
        data | {name: made if name == "features" else [made]} | {"kinds": "mse", "backend": "cpu"},
    )


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "shared", "params", "grads", "state"])
@pytest.mark.filterwarnings("ignore")
def test_building_blocks(kind: str, name: str) -> None:
    if name in ("params", "grads", "state"):
        lists = {"params": [torch.rand(2, 3)], "grads": [torch.rand(2, 3)], "state": [torch.rand(2, 3)] * 2}
        lists[name] = [WITHOUT[kind](lists[name][0]), *lists[name][1:]]
        call(kind, task_update, lists | {"lr": 0.1, "step": 1, "rule": "adam", "backend": "cpu"})
        return
    images, kernels = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 5, 2, 3, 3)
    for function, x, weight in ((task_linear, images[..., 0, 0], kernels[..., 0, 0]), (task_conv2d, images, kernels)):
        data = {"x": x, "weight": weight[0] if name == "shared" else weight, "bias": torch.randn(2, 5)}
        at = "weight" if name == "shared" else name
        call(kind, function, data | {at: WITHOUT[kind](data[at].contiguous()), "backend": "cpu"})  # type: ignore[arg-type]


def test_zeros_that_nobody_wrote_are_zeros() -> None:
    maml, data = model(), batch()
    zeros = torch._efficientzerotensor(2, 4, 3)
    assert torch.equal(maml.meta_loss(**data | {"sx": zeros}), maml.meta_loss(**data | {"sx": torch.zeros(2, 4, 3)}))


def test_plain_views_pass() -> None:
    """What does have memory: slices, transposes, expanded and negated values, an empty tensor, a subclass."""

    class Own(Tensor):
        pass

    base = torch.randn(4, 3)
    views = [
        base,
        base[1:3],
        base.t(),
        base[0].expand(4, 3),
        base[:, ::2],
        base[:0],
        torch.randn(()),
        base.as_subclass(Own),
    ]
    for t in [*views, torch.randn(3, dtype=torch.complex64).conj().imag]:
        assert torch.equal(in_memory("t", t), t)


def test_the_message_names_the_way_out() -> None:
    with pytest.raises(
        TypeError, match=r"support_x.*memory of its own, got TwoTensor float32 \[2, 4, 3\].*wrapper holds"
    ):
        data = batch()
        model().meta_loss(**data | {"sx": TwoTensor(data["sx"], data["sx"])})


def test_other_devices_than_the_cpu_are_read_where_a_kernel_runs_on_them() -> None:
    """Of a GPU that need not be there: a fake tensor's device is no reason to refuse it, that it is fake is one."""
    with FakeTensorMode():
        t = torch.ones(2, device="cuda")
        with pytest.raises(TypeError, match="which the CPU engine cannot read"):
            in_memory("t", t)
        with pytest.raises(TypeError, match="which has no values in memory"):
            in_memory("t", t, "cuda")
    with pytest.raises(TypeError, match="which does not lie on 'cuda'"):
        in_memory("t", torch.ones(2), "cuda")
