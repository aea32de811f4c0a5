"""mtml.ProtoMAML: heads from prototypes, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.few_shot import clusters, perceptron, trained
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from mtml.tasks import TaskBatch

D = torch.float64
T, C, S, Q, K = 3, 3, 7, 5, 3


def trunk() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).to(D)


def conv() -> nn.Sequential:
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)
    return nn.Sequential(*layers).to(D)


def batch(images: bool = False, mask: bool = False) -> TaskBatch:
    shape = (1, 4, 4) if images else (4,)
    y = torch.stack([torch.cat((torch.randperm(C), torch.randint(C, (S - C,)))) for _ in range(T)])
    weights = torch.rand(T, S, dtype=D) + 0.1 if mask else None
    sets = torch.randn(T, S, *shape, dtype=D), y, torch.randn(T, Q, *shape, dtype=D), torch.randint(C, (T, Q))
    return TaskBatch(*sets, weights)


def learner(features: nn.Module, **options: Any) -> mtml.ProtoMAML:
    return mtml.ProtoMAML(features, nn.Linear(5, C).to(D), lr=0.2, steps=K, **options)


def plain(proto: mtml.ProtoMAML, data: TaskBatch, first_order: bool = False, detached: bool = False) -> Tensor:
    losses = []
    for t in range(T):
        x, y = data.sx[t], data.sy[t]
        w = torch.ones(S, dtype=D) if data.support_mask is None else data.support_mask[t]
        f = proto.module.features(x)
        centres = torch.stack([sum(w[s] * f[s] for s in range(S) if y[s] == k) / w[y == k].sum() for k in range(C)])
        centres = centres.detach() if detached else centres
        fast = dict(proto.module.named_parameters())
        fast |= {"head.weight": 2 * centres, "head.bias": -(centres**2).sum(1)}
        fast = {n: p if p.requires_grad else p.requires_grad_() for n, p in fast.items()}
        fast = {n: p.view_as(p) for n, p in fast.items()}  # inner gradients by the head and the trunk apart
        for _ in range(K):
            each = F.cross_entropy(functional_call(proto.module, fast, (x,)), y, reduction="none")
            grads = torch.autograd.grad((w * each).sum() / w.sum(), list(fast.values()), create_graph=True)
            grads = tuple(g.detach() for g in grads) if first_order else grads
            fast = {n: p - 0.2 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(proto.module, fast, (data.qx[t],)), data.qy[t]))
    return torch.stack(losses)


def gradients(losses: Tensor, proto: mtml.ProtoMAML) -> tuple[Tensor, ...]:
    total = (torch.linspace(0.5, 1.5, T, dtype=D) * losses).sum()
    return torch.autograd.grad(total, list(proto.module.features.parameters()))


@pytest.mark.parametrize("backend", ["auto", "general"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_equal_to_a_plain_loop(first_order: bool, mask: bool, backend: str) -> None:
    proto, data = learner(trunk(), first_order=first_order, backend=backend), batch(mask=mask)
    found, wanted = proto.meta_loss(data), plain(proto, data, first_order)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(found, proto), gradients(wanted, proto), rtol=1e-9, atol=1e-11)
    proto.meta_loss(data).sum().backward()
    assert proto.module.head.weight.grad is None or not proto.module.head.weight.grad.any()
    torch.testing.assert_close(proto.adapt_tasks(data).loss(data), wanted, rtol=1e-9, atol=1e-11)


def test_batch_statistics_are_those_of_each_set() -> None:
    proto, data = learner(conv()), batch(images=True)
    found, wanted = proto.meta_loss(data), plain(proto, data)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradients(found, proto), gradients(wanted, proto), rtol=1e-6, atol=1e-8)
    assert proto.explain(data).path == "fused"


def test_control_second_order_and_the_prototypes_are_differentiated() -> None:
    proto, data = learner(trunk()), batch()
    exact = gradients(proto.meta_loss(data), proto)
    for dropped in ({"first_order": True}, {"detached": True}):
        other = gradients(plain(proto, data, **dropped), proto)
        assert all(float((a - b).norm() / a.norm()) > 1e-2 for a, b in zip(exact, other, strict=True))


def test_without_steps_it_is_a_prototypical_network() -> None:
    proto, data = learner(trunk()), batch()
    output = proto.meta_forward(data, steps=0).output
    f, q = proto.module.features(data.sx), proto.module.features(data.qx)
    centres = torch.stack([torch.stack([f[t][data.sy[t] == k].mean(0) for k in range(C)]) for t in range(T)])
    distance = (q[:, :, None] - centres[:, None]).square().sum(3)
    torch.testing.assert_close(output, q.square().sum(2, keepdim=True) - distance)


def test_ignored_ids_have_no_part_in_a_prototype() -> None:
    proto, data = learner(trunk()), batch()
    cut = proto.prototypes(data.sx[:, : S - 1], data.sy[:, : S - 1])
    ignored = data.sy.index_fill(1, torch.tensor([S - 1]), -100)
    torch.testing.assert_close(proto.prototypes(data.sx, ignored), cut)


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return str(error.value)


def test_errors_name_the_argument() -> None:
    proto, data = learner(trunk()), batch()
    gone = data._replace(sy=data.sy.index_put((torch.tensor(1),), torch.zeros(S, dtype=torch.int64)))
    assert "got none of class 1 in task 1" in raised(lambda: proto.meta_loss(gone))
    assert raised(lambda: proto.meta_loss(data._replace(sy=data.sy.double()))).startswith("sy: expected class ids")
    assert raised(lambda: proto.meta_loss(data._replace(sy=data.sy + 2))).startswith("sy: ")
    assert raised(lambda: proto.meta_loss(data, start={})).startswith("start: ProtoMAML starts")
    assert raised(lambda: proto.adapt_tasks(data, per_step=True)).startswith("per_step: ProtoMAML")
    assert raised(lambda: learner(trunk(), params="features.*")).startswith("params: expected the head")
    bare = nn.Linear(5, C, bias=False)
    assert raised(lambda: mtml.ProtoMAML(trunk(), bare, 0.1)).startswith("head: expected an nn.Linear with a bias")
    assert raised(lambda: mtml.ProtoMAML(nn.Conv2d(1, 3, 3), nn.Linear(5, 3), 0.1).meta_loss(
        torch.randn(2, 3, 1, 4, 4), torch.arange(3).expand(2, 3), torch.randn(2, 3, 1, 4, 4), torch.zeros(2, 3).long()
    )).startswith("features: expected the trunk")  # fmt: skip


def test_it_learns() -> None:
    proto = mtml.ProtoMAML(perceptron(6, 8), nn.Linear(8, 3), lr=0.05, steps=3)
    before, after = trained(proto, clusters, 100)
    assert after < 0.5 * before
