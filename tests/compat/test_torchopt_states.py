"""States of modules and optimizers in mtml.compat.torchopt."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mtml.compat import torchopt


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))


def same(a: Any, b: Any) -> bool:
    return all(x is y for x, y in zip(torchopt.pytree.tree_leaves(a), torchopt.pytree.tree_leaves(b), strict=True))


def test_extract_and_recover() -> None:
    net, x = net_of(), torch.randn(6, 2)
    before = dict(net.named_parameters())
    means: Any = net[1].running_mean
    kept = means.clone()
    state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    inner = torchopt.MetaAdam(net)
    for _ in range(3):
        for _ in range(2):
            inner.step(net(x).square().mean())
        torchopt.recover_state_dict(net, state)
        assert all(p is before[name] for name, p in net.named_parameters())
        assert torch.equal(net[1].running_mean, kept)  # type: ignore[arg-type]
    assert [sorted(each) for each in state.params] == [["bias", "weight"], ["bias", "weight"], ["weight"]]


@pytest.mark.parametrize("by", ["reference", "ref", "copy", "clone", "deepcopy", "deepclone"])
def test_every_mode(by: str) -> None:
    net = net_of()
    new = torchopt.module_clone(net, by=by)
    assert type(new) is nn.Sequential and new[0] is not net[0] and torch.equal(new[0].weight, net[0].weight)
    assert (new[0].weight is net[0].weight) is by.startswith("ref")
    assert isinstance(new[0].weight, nn.Parameter) is not by.endswith(("copy", "clone")) or by.startswith("deep")
    net.zero_grad()
    new.eval()(torch.ones(1, 2)).sum().backward()
    assert (net[0].weight.grad is None) is by.startswith("deep")
    if by.startswith("deep"):
        with torch.no_grad():
            new[0].weight.zero_()
        assert net[0].weight.abs().sum() > 0


def test_deep_copies_on_a_device_are_copies() -> None:
    net = net_of()
    state = torchopt.extract_state_dict(net, by="deepcopy", device="cpu")
    assert state.params[0]["weight"].data_ptr() != net[0].weight.data_ptr()


def test_clones_of_optimizers_and_trees() -> None:
    net, x = net_of(), torch.randn(6, 2)
    inner = torchopt.MetaAdam(net)
    inner.step(net(x).square().mean())
    other = torchopt.module_clone(inner, by="copy")
    assert other is not inner and not same(other.state_dict()[0][0].mu, inner.state_dict()[0][0].mu)
    assert torch.equal(other.state_dict()[0][0].mu[0], inner.state_dict()[0][0].mu[0])
    assert same(torchopt.extract_state_dict(inner), inner.state_dict())
    tree = {"a": [torch.ones(1)], "b": None}
    assert torchopt.module_clone(tree)["a"][0] is tree["a"][0] and torchopt.module_clone(tree)["b"] is None  # type: ignore[index]


def test_a_cloned_optimizer_takes_parameters_of_its_own() -> None:
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    inner = torchopt.MetaSGD(net, lr=0.1)
    clone = torchopt.module_clone(inner, by="copy")
    clone.add_param_group(other)
    x = torch.ones(1, 2)
    clone.step((net(x) + other(x)).sum())
    inner.step(net(x).sum())  # of one group still
    assert (len(clone.state_dict()), len(inner.state_dict())) == (2, 1)
    assert torchopt.module_clone({"weight": net.weight, "steps": 3}, by="copy")["steps"] == 3


def test_stop_gradient() -> None:
    net, x = net_of(), torch.randn(6, 2)
    inner = torchopt.MetaAdam(net)
    inner.step(net(x).square().mean())
    assert not net[0].weight.is_leaf
    state = torchopt.extract_state_dict(net, by="copy")
    assert torchopt.module_detach_(net) is net
    torchopt.stop_gradient(inner)
    torchopt.stop_gradient(state)
    tensors = [*net.parameters(), *inner.state_dict()[0][0].mu, state.params[0]["weight"]]
    assert all(t.is_leaf and t.requires_grad for t in tensors)


class ScaleByAdamState(NamedTuple):
    """The original's: a count of its own for each parameter, fields by these names."""

    mu: Any
    nu: Any
    count: Any


class TraceState(NamedTuple):
    trace: Any


class UninitializedState(NamedTuple):
    pass


def test_states_of_the_original_load_and_ours_have_their_form() -> None:
    nets = net_of(), net_of()
    inner = [torchopt.MetaAdam(net) for net in nets]
    x = torch.randn(6, 2)
    for net, each in zip(nets, inner, strict=True):
        each.step(net(x).square().mean())
    ((adam, empty),) = inner[0].state_dict()
    assert adam._fields == ScaleByAdamState._fields and empty == ()
    assert [t.shape for t in adam.mu] == [(3,), (3, 2), (3,), (3,), (1, 3)]  # bias, weight: sorted, layer by layer
    assert all(count.dtype is torch.int64 and count.ndim == 0 for count in adam.count)
    theirs = ScaleByAdamState(adam.mu, adam.nu, [count.clone() for count in adam.count])
    inner[1].load_state_dict(((theirs, ()),))
    for net, each in zip(nets, inner, strict=True):
        each.step(net(x).square().mean())
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    momentum = torchopt.MetaSGD(nets[0], 0.1, momentum=0.9, dampening=0.5)
    momentum.load_state_dict((UninitializedState(),))
    momentum.step(nets[0](x).square().mean())
    fresh = momentum.state_dict()[0][0]
    momentum.load_state_dict(((TraceState([t.detach() for t in fresh.trace]), ()),))
    before = nets[0][2].weight
    momentum.step(nets[0](x).square().mean())
    assert not torch.equal(before, nets[0][2].weight)


def test_models_keep_their_keys_and_load() -> None:
    net = net_of()
    keys, x = list(net.state_dict()), torch.randn(6, 2)
    torchopt.MetaSGD(net, 0.1).step(net(x).square().mean())
    assert list(net.state_dict()) == keys
    other = net_of()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))


def test_pickles_and_deep_copies_of_optimizer_and_model() -> None:
    net, x = net_of(), torch.randn(6, 2)
    inner = torchopt.MetaAdamW(net, torchopt.schedule.linear_schedule(0.1, 0.01, 5), mask=[True])
    for again in (copy.deepcopy((net, inner)), pickle.loads(pickle.dumps((net, inner)))):
        again[1].step(again[0](x).square().mean())
        assert not again[0][0].weight.is_leaf and net[0].weight.is_leaf


def test_errors_say_what_to_do() -> None:
    net = net_of()
    with pytest.raises(ValueError, match="by: expected one of reference, copy, deepcopy"):
        torchopt.extract_state_dict(net, by="value")
    with pytest.raises(ValueError, match="enable_visual: expected False"):
        torchopt.extract_state_dict(net, enable_visual=True)
    for function in (torchopt.extract_state_dict, lambda target: torchopt.recover_state_dict(target, ())):
        with pytest.raises(TypeError, match=r"target: expected an nn.Module or a MetaOptimizer"):
            function([Tensor()])
    with pytest.raises(TypeError, match="state: expected what extract_state_dict gives"):
        torchopt.recover_state_dict(net, net.state_dict())
    with pytest.raises(ValueError, match="state: expected parameters of this module"):
        torchopt.recover_state_dict(nn.Linear(1, 1), torchopt.extract_state_dict(net))
