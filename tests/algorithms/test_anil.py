"""mtml.ANIL: the same as MAML on the head alone, with the trunk run once; and models of one linear layer."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.tasks import TaskBatch


class Net(nn.Module):
    """A trunk and a head, as MAML takes them."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


def parts(width: int = 40, bias: bool = True) -> tuple[nn.Sequential, nn.Linear]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh()).double(), nn.Linear(width, 3, bias=bias).double()


def batch(loss: str = "cross_entropy", masks: bool = False, tasks: int = 3) -> TaskBatch:
    torch.manual_seed(2)

    def labels(n: int) -> Tensor:
        if loss == "cross_entropy":
            return torch.randint(3, (tasks, n))
        return torch.rand(tasks, n, 3, dtype=torch.float64)

    sx, qx = torch.randn(tasks, 5, 6, dtype=torch.float64), torch.randn(tasks, 7, 6, dtype=torch.float64)
    weights = (torch.rand(tasks, 5), torch.rand(tasks, 7)) if masks else (None, None)
    return TaskBatch(sx, labels(5), qx, labels(7), *weights)


def total(output: Any) -> Tensor:
    return output.loss.sum() + output.output.sin().sum() + output.support_losses.square().sum()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_with_logits", "huber"])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_maml_on_the_head(loss: str, masks: bool, bias: bool) -> None:
    features, head = parts(bias=bias)
    anil = mtml.ANIL(features, head, 0.3, steps=4, loss=loss)
    maml = mtml.MAML(Net(features, head), 0.3, steps=4, loss=loss, params="head.*", backend="general")
    data = batch(loss, masks)
    ours, theirs = anil.meta_forward(data), maml.meta_forward(data)
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-9, atol=1e-11)
    tensors = list(anil.parameters())
    grads = [torch.autograd.grad(total(o), tensors) for o in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
    assert torch.equal(anil.meta_loss(*data[:4], support_mask=data[4], query_mask=data[5]), ours.loss)


@pytest.mark.parametrize("form", ["scalar", "per_step", "names", "inner_lr", "inner_lr_tensor"])
def test_learnable_rates(form: str) -> None:
    features, head = parts()
    rates: dict[str, Any] = {
        "scalar": nn.Parameter(torch.tensor(0.2, dtype=torch.float64)),
        "per_step": nn.Parameter(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)),
        "names": {"weight": 0.2, "bias": 0.4},
        "inner_lr": mtml.InnerLR(head, 0.2),
        "inner_lr_tensor": mtml.InnerLR(head, 0.2, per="tensor", steps=3),
    }
    rate = rates[form]
    anil, data = mtml.ANIL(features, head, rate, steps=3), batch()
    loss = anil.meta_loss(data)
    loss.sum().backward()
    wanted = {f"head.{n}": v for n, v in rate.items()} if isinstance(rate, dict) else rate
    if isinstance(rate, mtml.InnerLR):
        wanted = {f"head.{n}": v for n, v in rate.as_dict().items()}
        learned = [p for name, p in anil.named_parameters() if name.startswith("lr.")]
        assert learned and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    elif isinstance(rate, nn.Parameter):
        assert any(p is rate for p in anil.parameters()) and rate.grad is not None
    net = Net(features, head)
    maml = mtml.MAML(net, wanted, steps=3, params="head.*", backend="general")
    torch.testing.assert_close(loss, maml.meta_loss(data), rtol=1e-9, atol=1e-11)


def test_decay_and_proximal_terms_pull_back() -> None:
    features, head = parts()
    data, norms = batch(), []
    for options in ({}, {"weight_decay": 0.5}, {"proximal": 2.0}):
        adapted = mtml.ANIL(features, head, 0.3, steps=10, **options).adapt_tasks(data)
        own = adapted.detach().params["head.weight"]
        norms.append((float(own.norm()), float((own - head.weight.detach()).norm())))
    assert norms[1][0] < norms[0][0] and norms[2][1] < norms[0][1]


def test_adapt_tasks_gives_the_models_of_meta_forward() -> None:
    features, head = parts()
    anil, data = mtml.ANIL(features, head, 0.3, steps=4), batch()
    expected = anil.meta_forward(data)
    adapted = anil.adapt_tasks(data)
    assert adapted.params["head.weight"].shape == (3, 3, 40) and adapted.params["head.bias"].shape == (3, 3)
    torch.testing.assert_close(adapted(data.qx), expected.output)
    torch.testing.assert_close(adapted.loss(data), expected.loss)
    torch.testing.assert_close(adapted.support_losses, expected.support_losses)
    torch.testing.assert_close(adapted.task(1)(data.qx[1]), expected.output[1])
    grads = [torch.autograd.grad(loss.sum(), list(anil.parameters())) for loss in (adapted.loss(data), expected.loss)]
    torch.testing.assert_close(*grads)
    assert not adapted.detach().params["head.weight"].requires_grad


def test_steps_override_and_no_grad() -> None:
    features, head = parts()
    anil, data = mtml.ANIL(features, head, 0.3, steps=1), batch()
    assert anil.meta_forward(data, steps=5).support_losses.shape == (5, 3)
    with torch.no_grad():
        assert not anil.meta_loss(data, steps=2).requires_grad
    none = anil.meta_forward(data, steps=0).output
    torch.testing.assert_close(none, anil(data.qx.flatten(0, 1)).unflatten(0, (3, 7)))


def test_the_trunk_runs_once() -> None:
    features, head = parts()
    seen: list[tuple[int, ...]] = []
    features.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    mtml.ANIL(features, head, 0.1, steps=5).meta_loss(batch())
    assert seen == [(3 * 5 + 3 * 7, 6)]


def test_images_and_several_inputs() -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.flatten(1) * b

    x, y = torch.randn(2, 4, 2, 3), torch.randint(2, (2, 4))
    anil = mtml.ANIL(nn.Conv1d(2, 3, 1), nn.Linear(9, 2), 0.1, steps=2)
    assert anil.meta_loss(x, y, x, y).shape == (2,)
    both = (x, torch.randn(2, 4, 6))
    assert mtml.ANIL(Pair(), nn.Linear(6, 2), 0.1).meta_loss(both, y, both, y).shape == (2,)
    named = {"a": both[0], "b": both[1]}
    assert mtml.ANIL(Pair(), nn.Linear(6, 2), 0.1).meta_loss(named, y, named, y).shape == (2,)


def test_explain() -> None:
    features, head = parts()
    explanation = mtml.ANIL(features, head, 0.1, steps=10).explain(batch())
    assert explanation.to_dict()["path"] == "head" and "Gram form" in str(explanation)
    assert "head.weight" in str(explanation)


def test_explain_has_every_attribute_that_is_documented() -> None:
    features, head = parts()
    explanation = mtml.ANIL(features, head, 0.1, steps=2, loss="mse", query_loss=nn.BCEWithLogitsLoss()).explain(
        *(torch.rand(2, 4, 6).double(), torch.rand(2, 4, 3).double()) * 2
    )
    assert (explanation.loss, explanation.query_loss, explanation.low_rank) == ("mse", "BCEWithLogitsLoss", 0)
    assert list(explanation.to_dict()) == [field.name for field in dataclasses.fields(mtml.Explanation)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.low_rank = 1  # type: ignore[misc]


def test_what_anil_does_not_have_is_refused() -> None:
    features, head = parts()
    anil = mtml.ANIL(features, head, 0.1, steps=2)
    for option in ({"first_order": True}, {"step_weights": [0.5, 0.5]}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))}: .*mtml\.MAML"):
            anil.meta_loss(batch(), **option)
    with pytest.raises(ValueError, match=r"keep_steps: .*mtml\.MAML"):
        anil.adapt_tasks(batch(), keep_steps=True)


def test_copies_adapt_their_own_head() -> None:
    features, head = parts()
    anil, data = mtml.ANIL(features, head, 0.1), batch()
    for copied in (copy.deepcopy(anil), pickle.loads(pickle.dumps(anil))):
        assert torch.equal(copied.meta_loss(data), anil.meta_loss(data))
        copied.meta_loss(data).sum().backward()
        assert copied.head.weight.grad is not None and head.weight.grad is None


def test_anil_compiles_to_one_graph() -> None:
    features, head = parts()
    anil, data = mtml.ANIL(features, head, 0.1), tuple(batch())
    compiled = torch.compile(lambda: anil.meta_loss(*data[:4]), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), anil.meta_loss(*data[:4]))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"head": nn.Sequential(nn.Linear(40, 3))}, TypeError, r"head: expected an nn\.Linear.*mtml\.MAML\(head"),
        ({"loss": lambda a, b: a.sum()}, ValueError, r"loss: expected one of.*mtml\.MAML\(head"),
        ({"loss": "nll"}, ValueError, "loss: expected one of"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"steps": -1}, ValueError, "steps: expected an int >= 0"),
        ({"lr": {"weight": 0.1}}, ValueError, "lr: expected rates for"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay: expected finite"),
    ],
)
def test_bad_arguments_are_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    features, head = parts()
    with pytest.raises(error, match=message):
        mtml.ANIL(**({"features": features, "head": head, "lr": 0.1} | wrong))


def test_rates_per_element_are_refused() -> None:
    features, head = parts()
    with pytest.raises(ValueError, match=r"lr\['weight'\]: .*per element.*mtml\.MetaSGD"):
        mtml.ANIL(features, head, mtml.InnerLR(head, 0.1, per="element"))


def test_batches_that_do_not_fit_are_named() -> None:
    features, head = parts()
    anil, data = mtml.ANIL(features, head, 0.1), batch()
    with pytest.raises(ValueError, match="sy: expected its first dimensions"):
        anil.meta_loss(data.sx, data.sy[:, :2], data.qx, data.qy)
    with pytest.raises(ValueError, match="at least one task"):
        anil.meta_loss(data.sx[:0], data.sy[:0], data.qx[:0], data.qy[:0])
    with pytest.raises(mtml.BackendUnavailable, match="triton"):
        mtml.ANIL(features, head, 0.1, backend="triton").meta_loss(data)


# --- MAML on one linear layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [None, ["0.weight"]])
@pytest.mark.parametrize("rate", ["number", "per_step", "names"])
def test_maml_of_one_linear_layer_takes_the_gram_form(params: Any, rate: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 3)).double()
    step = torch.linspace(0.1, 0.5, 4, dtype=torch.float64)
    lr: Any = {"number": 0.3, "per_step": step, "names": {"0.weight": 0.2, "0.bias": 0.4}}[rate]
    if params and rate == "names":
        lr = {"0.weight": 0.2}
    sx, qx = (0.3 * torch.randn(2, n, 200, dtype=torch.float64) for n in (5, 7))
    data = (sx.requires_grad_(), torch.randint(3, (2, 5)), qx.requires_grad_(), torch.randint(3, (2, 7)))
    found = []
    for backend in ("auto", "general"):
        maml = mtml.MAML(net, lr, steps=4, params=params, backend=backend)
        output = maml.meta_forward(*data)
        adapted = maml.adapt_tasks(*data[:2])
        grads = torch.autograd.grad(total(output), [*net.parameters(), sx, qx])
        found.append((*output, *grads, *(adapted.params[name] for name in sorted(adapted.params))))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    assert "Gram matrix" in str(mtml.MAML(net, lr, steps=4, params=params).explain(*data))


def test_multi_step_losses_of_one_linear_layer_keep_weights() -> None:
    net = nn.Linear(200, 3).double()
    sx, sy = 0.3 * torch.randn(2, 5, 200, dtype=torch.float64), torch.randint(3, (2, 5))
    losses = [
        mtml.MAML(net, 0.2, steps=2, backend=b).meta_loss(sx, sy, sx, sy, step_weights=[0.5, 1.0])
        for b in ("auto", "general")
    ]
    torch.testing.assert_close(*losses)
