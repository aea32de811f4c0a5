"""learn2learn's tools: modules with a history, transforms of gradients, layers, models."""

from __future__ import annotations

import argparse
import dataclasses
import doctest
import importlib
import pkgutil
import warnings
from typing import Any

import pytest
import torch
from cases.maml_oracle import assert_same, mlp
from torch import Tensor, nn

import mtml.compat.learn2learn as l2l

MODULES = [
    module.name
    for module in pkgutil.walk_packages(l2l.__path__, l2l.__name__ + ".")
    if "lightning" not in module.name and ".data" not in module.name
]


@pytest.mark.parametrize("name", [l2l.__name__, *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_all_names_are_there() -> None:
    for name in MODULES:
        module = importlib.import_module(name)
        assert all(hasattr(module, n) for n in module.__all__ if n not in ("benchmarks", "datasets", "transforms"))


def test_what_is_not_here_says_so() -> None:
    with pytest.raises(AttributeError, match=r"gym: environments .* are not part of mtml.compat; install the original"):
        _ = l2l.gym
    with pytest.raises(AttributeError, match="SVClassifier: it needs the solver qpth"):
        _ = l2l.nn.SVClassifier
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = l2l.nothing


# --- utils -----------------------------------------------------------------------------------------------------------


def test_update_module() -> None:
    model = mlp(3, 4, 2)
    clone = l2l.clone_module(model)
    updates = [torch.randn_like(p).requires_grad_() for p in model.parameters()]
    assert l2l.update_module(clone, [*updates[:-1], None]) is clone
    for p, q, u in zip(model.parameters(), clone.parameters(), [*updates[:-1], 0], strict=True):
        assert_same(q, p + u)
    sum(p.sum() for p in clone.parameters()).backward()  # type: ignore[union-attr]
    assert all(t.grad is not None for t in [*model.parameters(), *updates[:-1]])
    with pytest.raises(ValueError, match="one for each of the module's 4 parameters"):
        l2l.update_module(clone, updates[:2])


def test_update_module_by_attributes_of_tensors() -> None:
    model = l2l.clone_module(nn.BatchNorm1d(3))
    weight, mean = model.weight, model.running_mean
    weight.update, mean.update = torch.ones(3), torch.ones(3)
    l2l.update_module(model)
    assert_same([model.weight, model.running_mean], [weight + 1, mean + 1])
    after = model.weight
    l2l.update_module(model)
    assert model.weight is after and weight.update is None


def test_memo_keeps_what_modules_share() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    memo: dict[Any, Tensor] = {}
    first, second = l2l.clone_module(a, memo=memo), l2l.clone_module(b, memo)
    assert first.weight is second.weight is not a.weight
    updated: dict[Tensor, Tensor] = {}
    ones = [torch.ones(3, 3), torch.ones(3)]
    l2l.update_module(first, ones, memo=updated)
    l2l.update_module(second, ones, memo=updated)
    assert first.weight is second.weight
    assert_same(first.weight, a.weight + 1)
    assert l2l.clone_module("no module") == "no module"


def test_maml_and_meta_sgd_updates() -> None:
    model = mlp(3, 2)
    grads = [torch.ones_like(p) for p in model.parameters()]
    clone = l2l.algorithms.maml_update(l2l.clone_module(model), 0.5, [grads[0], None])
    assert_same(list(clone.parameters()), [model[0].weight - 0.5, model[0].bias])
    rates = [torch.full_like(p, 0.25) for p in model.parameters()]
    clone = l2l.algorithms.meta_sgd_update(l2l.clone_module(model), rates, grads)
    assert_same(list(clone.parameters()), [p - 0.25 for p in model.parameters()])
    with pytest.raises(ValueError, match="one for each of the model's 2 parameters, got 1 rates and 2 gradients"):
        l2l.algorithms.meta_sgd_update(clone, rates[:1], grads)
    leaf = mlp(3, 2)
    before = leaf[0].weight
    before.grad, before._lr = torch.ones_like(before), 0.5  # type: ignore[attr-defined]
    l2l.algorithms.meta_sgd_update(leaf)
    assert_same(leaf[0].weight, before - 0.5)


def test_detach_module() -> None:
    model = mlp(3, 2)
    clone = l2l.clone_module(model)
    l2l.detach_module(clone, keep_requires_grad=True)
    clone(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in clone.parameters())
    l2l.detach_module(clone)
    assert not any(p.requires_grad for p in clone.parameters())
    l2l.detach_module(None)


def test_distributions() -> None:
    mean = torch.zeros(2, requires_grad=True)
    inner = torch.distributions.Normal(mean * 2, torch.ones(2))
    dist = torch.distributions.Independent(inner, 1)
    clone = l2l.clone_distribution(dist)
    assert clone.base_dist is not inner
    clone.log_prob(torch.ones(2)).backward()
    assert_same(mean.grad, torch.full((2,), 2.0))
    assert l2l.detach_distribution(clone) is clone and not clone.base_dist.loc.requires_grad and inner.loc.requires_grad


def test_small_things() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    l2l.magic_box(3 * x).backward()
    assert x.grad == 3 and l2l.magic_box(5) == 5
    assert l2l.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75

    @dataclasses.dataclass
    class Inner:
        width: int = 4

    found = l2l.flatten_config(argparse.Namespace(lr=0.1, model=Inner()))
    assert found == {"lr": 0.1, "model.width": 4}
    with pytest.warns(UserWarning, match="once"):
        l2l.warn_once("once")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        l2l.warn_once("once")
    with pytest.raises(RuntimeError, match="severe"):
        l2l.warn_once("severe", severity="error")
    with pytest.raises(ValueError, match="severity: expected 'default', 'deprecation', 'error' or a class"):
        l2l.warn_once("of no kind", severity="warning")
    for _ in range(2):  # a filter that makes errors of warnings has shown nothing yet
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="of no kind"):
            warnings.simplefilter("error")
            l2l.warn_once("of no kind")
    with pytest.warns(FutureWarning, match="of no kind"):
        l2l.warn_once("of no kind", severity=FutureWarning)


# --- optim -----------------------------------------------------------------------------------------------------------


def test_curvature_of_a_convolution_is_its_mode_products() -> None:
    grad = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    curvature = l2l.optim.MetaCurvatureTransform(nn.Parameter(grad), lr=0.5)
    assert_same(curvature(grad), 0.5 * grad)
    for p in curvature.parameters():
        nn.init.normal_(p)
    by_row = torch.tensordot(curvature.mc_in, grad.flatten(2), ([1], [0]))
    by_column = torch.tensordot(by_row, curvature.mc_out, ([1], [0])).movedim(-1, 1)
    assert_same(curvature(grad), 0.5 * (by_column @ curvature.mc_f.t()).reshape(grad.shape))
    with pytest.raises(NotImplementedError, match=r"param: expected one of 1, 2 or 4 dimensions, got \[2, 2, 2\]"):
        l2l.optim.MetaCurvatureTransform(torch.ones(2, 2, 2))
    with pytest.raises(NotImplementedError, match="TransformDictionary"):
        l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)(torch.ones(2, 2, 2))


def test_parameter_update() -> None:
    net = mlp(3, 4, 2)
    table = l2l.optim.TransformDictionary({net[2]: lambda p: l2l.nn.Scale(p.shape, 3.0).double()})
    update = l2l.optim.ParameterUpdate(net.parameters(), table)
    x = torch.randn(5, 3, dtype=torch.float64)
    grads = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    found = update(net(x).square().mean(), net.parameters())
    assert_same(found, [grads[0], grads[1], 3 * grads[2], 3 * grads[3]])
    with pytest.raises(RuntimeError, match=r"does not depend on .*'parameter 2 \[2, 4\]'"):
        update(net[0].weight.sum(), net.parameters())
    assert update(net[0].weight.sum(), net.parameters(), allow_unused=True)[2] is None
    with pytest.raises(ValueError, match="parameters: expected 4"):
        update(net(x).sum(), list(net.parameters())[:2])
    with pytest.raises(ValueError, match="make a module or None, got int"):
        l2l.optim.ParameterUpdate(net.parameters(), lambda p: 3)
    with pytest.raises(ValueError, match="modules and parameters as keys, got str"):
        l2l.optim.TransformDictionary({"0": None})  # type: ignore[dict-item]


def test_differentiable_sgd() -> None:
    net = mlp(3, 2)
    clone, grads = l2l.clone_module(net), [torch.ones_like(p) for p in net.parameters()]
    l2l.optim.DifferentiableSGD(0.5)(clone, [grads[0], None])
    assert_same(list(clone.parameters()), [net[0].weight - 0.5, net[0].bias])
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    l2l.optim.DifferentiableSGD(rate)(clone, grads)
    clone[0].bias.sum().backward()
    assert rate.grad == -2
    with pytest.raises(ValueError, match="gradients: expected one for each of the module's 2"):
        l2l.optim.DifferentiableSGD(0.5)(clone, grads[:1])


def test_learnable_optimizer_has_the_hypergradient() -> None:
    # w1 = w0 - lr s g0; d loss(w1) / ds = -lr g0 . g1
    net = nn.Linear(1, 1, bias=False).double()
    optimizer = l2l.optim.LearnableOptimizer(net, lambda p: l2l.nn.Scale(1).double(), lr=0.1)
    x, w0, grads = torch.tensor([[2.0]], dtype=torch.float64), net.weight.item(), []
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        grads.append(net.weight.grad.item())
        (scale,) = optimizer.parameters()
        if len(grads) == 1:
            assert scale.grad is None
            optimizer.step()
    assert_same(scale.grad.item(), -0.1 * grads[0] * grads[1])
    assert net.weight.item() == pytest.approx(w0 - 0.1 * grads[0])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    with pytest.raises(TypeError, match=r"model: expected an nn.Module"):
        l2l.optim.LearnableOptimizer([], None)  # type: ignore[arg-type]


# --- nn --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psd", [False, True])
def test_kronecker_linear_is_a_kronecker_product(psd: bool) -> None:
    layer, x = l2l.nn.KroneckerLinear(2, 3, psd=psd).double(), torch.randn(2, 3, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p)
    left, right = (m.t() @ m if psd else m for m in (layer.left, layer.right))
    want = torch.kron(right.t().contiguous(), left) @ x.t().flatten() + layer.bias.t().flatten()
    assert_same(layer(x.t().flatten()), want)
    assert_same(layer(x).t().flatten(), want)
    for wrong in (torch.ones(5), torch.ones(3, 2)):
        with pytest.raises(ValueError, match="x: expected"):
            layer(wrong)


def test_kronecker_cells() -> None:
    x = torch.randn(5, 2, 3)
    out, hidden = l2l.nn.KroneckerRNN(2, 3)(x, torch.zeros_like(x))
    assert_same([out, hidden], [torch.tanh(x)] * 2)
    out, (h, c) = l2l.nn.KroneckerLSTM(2, 3)(x, (torch.zeros_like(x), torch.zeros_like(x)))
    want = torch.sigmoid(x) * torch.tanh(x)
    assert_same([out, h, c], [torch.sigmoid(x) * torch.tanh(want)] * 2 + [want], atol=1e-6)


def test_prototypes() -> None:
    support, labels, queries = torch.randn(8, 4).double(), torch.tensor([2, 0, 2, 0, 5, 5, 0, 2]), torch.randn(3, 4)
    classifier, means = l2l.nn.PrototypicalClassifier(), [support[labels == c].mean(0) for c in (0, 2, 5)]
    with pytest.raises(RuntimeError, match="call fit_"):
        classifier(queries)
    assert_same(classifier.fit_(support, labels), torch.stack(means))
    assert_same(classifier(queries.double()), -torch.cdist(queries.double(), torch.stack(means)).square())
    cosine = l2l.nn.PrototypicalClassifier(support, labels, distance="cosine")
    want = torch.cosine_similarity(queries.double()[:, None], torch.stack(means)[None], dim=2)
    assert_same(cosine(queries.double()), want, atol=1e-6)
    with pytest.raises(ValueError, match="distance: expected 'euclidean', 'cosine' or a callable, got 'hamming'"):
        l2l.nn.PrototypicalClassifier(distance="hamming")


def test_metamodule_and_parameter_transform() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    want = net(x)
    wrap = {nn.Linear: lambda layer: l2l.nn.ParameterTransform(layer, lambda p: l2l.nn.Scale(p.shape))}
    meta = l2l.nn.MetaModule(net, wrap)
    assert_same(meta(x), want)
    meta(x).sum().backward()
    own = list(meta.meta_parameters())
    assert len(own) == 4 and all(p.grad is not None for p in own)
    assert [p for p in meta.parameters() if p.requires_grad and not any(p is q for q in own)] == []
    bare = meta.module()
    assert [type(m) for m in bare] == [nn.Linear, nn.ReLU, nn.Sequential] and type(bare[2][0]) is nn.Linear
    with pytest.raises(ValueError, match=r"without layers of its own, got one with '0.weight'"):
        l2l.nn.ParameterTransform(bare, lambda p: l2l.nn.Scale(p.shape))
    failing = l2l.nn.ParameterTransform(nn.Linear(3, 4), lambda p: l2l.nn.Scale(p.shape))
    with pytest.raises(RuntimeError):
        failing(torch.ones(1, 2))
    assert isinstance(failing.module.weight, nn.Parameter)


def test_freeze() -> None:
    net = l2l.nn.freeze(nn.Linear(2, 1))
    assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in l2l.nn.unfreeze(net).parameters())
    assert l2l.nn.Flatten()(torch.ones(3, 2, 2).mT).shape == (3, 4) and l2l.nn.Flatten()(torch.ones(3)).shape == (3, 1)
    assert l2l.nn.Lambda(lambda x: x + 1)(1) == 2


# --- vision.models ---------------------------------------------------------------------------------------------------

BLOCK = ["normalize.weight", "normalize.bias"]
STATISTICS = ["normalize.running_mean", "normalize.running_var", "normalize.num_batches_tracked"]
CONV = [*BLOCK, *STATISTICS, "conv.weight", "conv.bias"]
HEAD = ["classifier.weight", "classifier.bias"]


def keys(prefix: str, names: list[str], blocks: int = 4) -> list[str]:
    return [f"{prefix}{i}.{name}" for i in range(blocks) for name in names]


def test_models_have_learn2learns_state_dicts() -> None:
    models = l2l.vision.models
    linear = [*BLOCK, "linear.weight", "linear.bias"]
    assert list(models.OmniglotFC(9, 5).state_dict()) == [*keys("features.1.", linear), *HEAD]
    assert list(models.OmniglotCNN(5).state_dict()) == [*keys("base.", CONV), *keys("features.1.", CONV), *HEAD]
    assert list(models.CNN4(5).state_dict()) == [*keys("features.", CONV), *HEAD]
    assert list(models.ConvBase(layers=2).state_dict()) == keys("", CONV, 2)
    resnet = models.ResNet12(5).state_dict()
    assert len(resnet) == 4 * (4 + 4 * 5) + 2
    assert {"features.layer3.0.downsample.1.running_var", "features.layer4.0.bn3.bias"} <= set(resnet)
    backbone = models.WRN28Backbone(depth=10, widen_factor=1).state_dict()
    assert len(backbone) == 2 + 3 * (4 + 2 * 5) + 2 * 2 + 5 and "layer2.0.shortcut.0.bias" in backbone


@pytest.mark.parametrize(
    ("build", "size", "classes"),
    [
        (lambda m: m.OmniglotFC(28 * 28, 5), (1, 28, 28), 5),
        (lambda m: m.OmniglotCNN(7, hidden_size=8, layers=3), (28, 28), 7),
        (lambda m: m.CNN4(5, hidden_size=8), (3, 84, 84), 5),
        (lambda m: m.CNN4(5, hidden_size=8, layers=2, max_pool=False, embedding_size=8 * 36), (3, 84, 84), 5),
        (lambda m: m.ResNet12(5, hidden_size=512, wider=False), (3, 84, 84), 5),
    ],
)
def test_models_run(build: Any, size: tuple[int, ...], classes: int) -> None:
    model = build(l2l.vision.models)
    assert model(torch.randn(2, *size)).shape == (2, classes)


def test_wide_residual_backbone() -> None:
    backbone = l2l.vision.models.WRN28Backbone(depth=10, widen_factor=1)
    assert backbone(torch.randn(1, 3, 84, 84)).shape == (1, 64)
    with pytest.raises(ValueError, match=r"depth: expected 6 n \+ 4, got 9"):
        l2l.vision.models.WRN28Backbone(depth=9)


def test_drop_block() -> None:
    drop = importlib.import_module(f"{l2l.__name__}.vision.models.resnet12").DropBlock(3)
    out = drop(torch.ones(50, 4, 12, 12), 0.02)
    dropped = out == 0
    assert out.mean().item() == pytest.approx(1.0)
    assert 0.05 < dropped.float().mean() < 0.2  # (1 - 0.02)^9 of the inner pixels stay
    corner = dropped[:, :, 5, 5] & ~dropped[:, :, 4, 5] & ~dropped[:, :, 5, 4] & ~dropped[:, :, 4, 4]
    assert corner.any() and dropped[:, :, 5:8, 5:8][corner].all()
    assert drop.eval()(out, 0.5) is out


def test_clones_count_their_forwards_together() -> None:
    block = importlib.import_module(f"{l2l.__name__}.vision.models.resnet12").BasicBlock(3, 3, drop_rate=0.1)
    for _ in range(2):
        l2l.clone_module(block)(torch.ones(2, 3, 8, 8))
    assert block.forwards == [2]
