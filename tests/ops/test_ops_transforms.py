"""The registered ops under torch.func and forward mode: one error that names the way out, never a lost tangent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases.head_inner_loop import make_head_case
from cases.inner_loop import make_case
from torch import Tensor
from torch.autograd import forward_ad

from mtml_kernels import HeadLoss, head_inner_loop, multihead_loss, task_conv2d, task_linear, task_update
from mtml_kernels.schema.multihead_loss import encode
from mtml_kernels.schema.update import UpdateSpec

Arguments = Sequence[Any]
WAY_OUT = "has no rule for forward mode.*Way out: "


def _inner_loop() -> Arguments:
    return (*make_case(masks=True, step_weights=True, keep=1).op_arguments(15), "cpu")


def _inner_loop_backward() -> Arguments:
    arguments = _inner_loop()
    loss, _, _, adapted, carry = torch.ops.mtml.inner_loop(*arguments)
    given = [torch.randn_like(t) for t in adapted]
    return (torch.randn_like(loss), None, None, given, [True] * len(given), *arguments[:-1], carry, "cpu")


def _head() -> Arguments:
    return (*make_head_case(masks=True).args._replace(needs=31), "cpu")


def _head_backward() -> Arguments:
    outputs = torch.ops.mtml.head_inner_loop(*_head())
    return (*(torch.randn_like(t) for t in outputs[:4]), *_head()[:-1], outputs[4], "cpu")


def _multihead() -> Arguments:
    logits, targets = [torch.randn(4, 3).double(), torch.randn(4, 2).double()], [torch.arange(4) % 3, torch.ones(4, 2)]
    heads = encode([HeadLoss(), HeadLoss("mse")], [False, False])
    return (logits, [targets[0], targets[1].double()], [torch.rand(4).double()], [1], heads, True, "cpu")


def _multihead_backward() -> Arguments:
    logits = _multihead()[0]
    _, gradients = torch.ops.mtml.multihead_loss(*_multihead())
    return (torch.randn(2).double(), gradients, logits, [1, 1], "cpu")


def _task_linear() -> Arguments:
    return (
        torch.randn(2, 3, 4).double(),
        torch.randn(2, 5, 4).double(),
        torch.randn(1, 5).double(),
        2,
        1.0,
        0.0,
        "cpu",
    )


def _task_linear_backward() -> Arguments:
    y = torch.ops.mtml.task_linear(*_task_linear())
    return (torch.randn_like(y), y, *_task_linear()[:-1], 7, "cpu")


def _task_conv2d() -> Arguments:
    x, weight = torch.randn(2, 2, 2, 4, 4).double(), torch.randn(1, 2, 1, 3, 3).double()
    return (x, weight, torch.randn(2, 2).double(), [1, 1], [1, 0], [1, 1], 2, "cpu")


def _task_conv2d_backward() -> Arguments:
    y = torch.ops.mtml.task_conv2d(*_task_conv2d())
    return (torch.randn_like(y), y, *_task_conv2d()[:-1], 7, "cpu")


def _task_update() -> Arguments:
    spec = UpdateSpec("adam", clipped=True)
    tensors = [[torch.rand(2, 3).double(), torch.rand(2, 2, 2).double()] for _ in range(4)]
    hyper = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.9, 0.99, 1e-3, 0.0], dtype=torch.float64)
    rates = [torch.rand(1, 3).double(), torch.rand(2, 1, 1).double()]
    return (tensors[0], tensors[1], rates, [*tensors[2], *tensors[3]], hyper, spec.encode(), 3, "cpu")


def _task_update_backward() -> Arguments:
    results = torch.ops.mtml.task_update(*_task_update())
    return ([torch.randn_like(t) for t in results], *_task_update())


BLOCKS = (task_linear, task_conv2d, task_update)  # by which their ops are registered
OPS: dict[str, Callable[[], Arguments]] = {
    "inner_loop": _inner_loop,
    "inner_loop_backward": _inner_loop_backward,
    "head_inner_loop": _head,
    "head_inner_loop_backward": _head_backward,
    "multihead_loss": _multihead,
    "multihead_loss_backward": _multihead_backward,
    "task_linear": _task_linear,
    "task_linear_backward": _task_linear_backward,
    "task_conv2d": _task_conv2d,
    "task_conv2d_backward": _task_conv2d_backward,
    "task_update": _task_update,
    "task_update_backward": _task_update_backward,
}
every_op = pytest.mark.parametrize("name", OPS)


def test_these_are_all_ops() -> None:
    found = torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
    assert {n.split("::")[1] for n in found if n.startswith("mtml::")} == set(OPS)


def _floats(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() and values.numel() else []
    return [t for v in values for t in _floats(v)] if isinstance(values, list | tuple) else []


def _with(values: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(values, list | tuple):
        return [_with(v, old, new) for v in values]
    return new if values is old else values


def _first(outputs: Any) -> Tensor:
    return next(t for t in _flat(outputs) if t.numel())


def _flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for o in outputs for t in _flat(o)]


def _jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jvp(f, (x,), (x,))


def _dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x)))


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": _jvp,
    "dual": _dual,
    "dual that requires grad": lambda f, x: _dual(f, x.clone().requires_grad_()),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp of jvp": lambda f, x: _jvp(lambda a: _jvp(f, a)[1], x),
    "outer jvp": lambda f, x: _jvp(lambda a: _jvp(lambda b: f(a) * b.sum(), x)[1], x),
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda a: _jvp(f, a)[1])(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda a: f(a).sum())(x),
}


@every_op
@pytest.mark.parametrize("way", WAYS)
def test_an_op_raises_for_every_argument(way: str, name: str) -> None:
    arguments = OPS[name]()
    tensors = _floats(arguments)
    assert tensors
    for x in tensors if way in ("jvp", "dual", "grad") else tensors[:1]:
        with pytest.raises(RuntimeError, match=WAY_OUT):
            WAYS[way](lambda a, x=x: _first(getattr(torch.ops.mtml, name)(*_with(arguments, x, a))), x)  # type: ignore[misc]


@every_op
def test_a_compiled_tangent_of_an_op_raises(name: str) -> None:
    arguments = OPS[name]()
    x = _floats(arguments)[0]
    torch._dynamo.reset()

    def tangent(x: Tensor) -> Tensor:
        op = getattr(torch.ops.mtml, name)
        return _jvp(lambda a: _first(op(*_with(arguments, _floats(arguments)[0], a))), x)[1]

    with pytest.raises(RuntimeError, match="has no rule for forward mode"):
        torch.compile(tangent, backend="eager")(x)


@every_op
def test_what_has_no_tangent_runs_in_forward_mode(name: str) -> None:
    """A constant beside what is differentiated; under vmap every sample of a batch."""
    arguments = OPS[name]()
    op = getattr(torch.ops.mtml, name)
    expected = _first(op(*arguments))
    x = _floats(arguments)[0]
    _, tangent = _jvp(lambda a: _first(op(*arguments)) * a.sum(), x)
    torch.testing.assert_close(tangent, expected * x.sum())
    two = torch.func.vmap(lambda a: _first(op(*_with(arguments, x, a))))(torch.stack([x, x]))
    torch.testing.assert_close(two, torch.stack([expected, expected]))


# --- the functions over them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params", "lr", "support_x", "query_x"])
@pytest.mark.parametrize("way", [w for w in WAYS if w != "grad"])
def test_inner_loop_calls_raise(way: str, name: str) -> None:
    case = make_case()
    group = getattr(case, name)

    def f(a: Tensor) -> Tensor:
        setattr(case, name, [a, *group[1:]])
        return case.call("cpu")[0]

    with pytest.raises(RuntimeError, match='backend="general"'):
        WAYS[way](f, group[0])


@pytest.mark.parametrize("name", ["support_y", "query_y", "support_mask", "query_mask", "step_weights"])
def test_tangents_of_targets_and_masks_are_not_lost(name: str) -> None:
    case = make_case(masks=True, step_weights=True)
    with forward_ad.dual_level():
        value = getattr(case, name)
        setattr(case, name, forward_ad.make_dual(value, value))
        with pytest.raises(RuntimeError, match='backend="general"'):
            case.call("cpu")
    head = make_head_case(masks=True)
    if name == "support_mask":
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match='backend="general"'):
            mask = head.args.support_mask
            assert mask is not None
            head.replace(support_mask=forward_ad.make_dual(mask, mask)).call("cpu")


@pytest.mark.parametrize("which", ["inner_loop", "head_inner_loop"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_tangent_of_the_cotangent_is_not_lost(recorded: bool, which: str) -> None:
    """The loop ran before the dual level; its backward runs in it."""
    case: Any = make_case() if which == "inner_loop" else make_head_case()
    case = case.requiring_grad()
    loss = case.call("cpu")[0]
    ones = torch.ones_like(loss)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='backend="general"'):
        torch.autograd.grad(loss, case.tensors(), forward_ad.make_dual(ones, ones), create_graph=recorded)


@pytest.mark.parametrize("which", ["inner_loop", "head_inner_loop"])
def test_a_batch_of_cotangents(which: str) -> None:
    case: Any = make_case() if which == "inner_loop" else make_head_case()
    case = case.requiring_grad()
    loss = case.call("cpu")[0]
    cotangents = torch.eye(len(loss), dtype=loss.dtype)

    def pull(c: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, case.tensors(), c, retain_graph=True)

    each = [torch.stack(t) for t in zip(*map(pull, cotangents), strict=True)]
    torch.testing.assert_close(list(torch.func.vmap(pull)(cotangents)), each)
    with pytest.raises(RuntimeError, match="atching rule"):  # PyTorch's older vmap, for which an op can have no rule
        torch.autograd.grad(loss, case.tensors(), cotangents, is_grads_batched=True)


@pytest.mark.parametrize("form", ["gram", "weight"])
@pytest.mark.parametrize("way", WAYS)
def test_head_inner_loop_raises(way: str, form: str) -> None:
    features, labels, weight = torch.randn(2, 4, 3).double(), torch.randint(2, (2, 4)), torch.randn(2, 3).double()

    def f(w: Tensor) -> Tensor:
        options: dict[str, Any] = {"steps": 2, "query_labels": labels, "form": form, "backend": "cpu"}
        return head_inner_loop(features, labels, features, w, None, 0.1, **options).loss

    with pytest.raises(RuntimeError, match='backend="general"'):
        WAYS[way](f, weight)


def test_the_functions_way_out_of_an_op() -> None:
    logits, targets, _, _, _, _, backend = _multihead()

    def losses(a: Tensor) -> Tensor:
        return multihead_loss([a, logits[1]], targets, ["cross_entropy", "mse"], backend=backend)

    _, tangent = _jvp(losses, logits[0])
    assert tangent[0].abs() > 1e-3 and tangent[1] == 0
