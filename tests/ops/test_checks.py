"""Bad input: the error names the argument, what was expected, what came, and a way out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases.maml_oracle import classification, mlp, regression
from torch import Tensor, nn

from mtml import MAML, InnerLR
from mtml_kernels import checks
from mtml_kernels.ops.inner_loop import BACKENDS

every_path = pytest.mark.parametrize("backend", ["general", *BACKENDS.available()])


def fails(error: type[Exception], text: str, backend: str, batch: Any, **options: Any) -> None:
    call = {key: options.pop(key) for key in ("support_mask", "query_mask", "step_weights", "steps") if key in options}
    model = options.pop("model", None) or mlp(3, 4, 4)
    with pytest.raises(error, match=text):
        MAML(model, options.pop("lr", 0.1), backend=backend, **options).meta_loss(*batch, **call)


@every_path
def test_shapes_that_disagree(backend: str) -> None:
    sx, sy, qx, qy = classification()
    fails(
        ValueError,
        r"sy: expected its first dimensions to be \[T, S\] = \[3, 5\], got \[2, 5\]",
        backend,
        (sx, sy[:2], qx, qy),
    )
    fails(ValueError, r"sy: .* = \[3, 5\], got \[3, 4\]", backend, (sx, sy[:, :4], qx, qy))
    fails(ValueError, r"qx: .* = \[3, 4\], got \[2, 4, 3\]", backend, (sx, sy, qx[:2], qy))
    fails(ValueError, r"qy: .* = \[3, 4\], got \[3, 3\]", backend, (sx, sy, qx, qy[:, :3]))
    fails(ValueError, r"sx: expected \[T, S, ...\]", backend, (sx[:, 0, 0], sy, qx, qy))
    fails(ValueError, r"sy: expected class ids of shape \[3, 5\]", backend, (sx, sy[..., None], qx, qy))
    fails(
        ValueError,
        r"support_mask: expected \[T, S\] = \[3, 5\]",
        backend,
        (sx, sy, qx, qy),
        support_mask=torch.ones(3, 4),
    )
    fails(
        ValueError, r"query_mask: expected \[T, Q\] = \[3, 4\]", backend, (sx, sy, qx, qy), query_mask=torch.ones(3, 5)
    )
    fails(TypeError, "support_mask: expected a tensor", backend, (sx, sy, qx, qy), support_mask=[1.0])
    fails(TypeError, r"sx\[0\]: expected a tensor|expected tensors", backend, ((3,), sy, qx, qy))
    sx, sy, qx, qy = regression()
    fails(
        ValueError, r"sy: expected the shape of the model's output \[3, 5, 4\]", backend, (sx, sy, qx, qy), loss="mse"
    )


@every_path
@pytest.mark.parametrize("label", [-1, 4, 1_000_000])
def test_labels_out_of_range(backend: str, label: int) -> None:
    sx, sy, qx, qy = classification()
    for index, name in ((1, "s"), (3, "q")):
        batch = [t.clone() for t in (sx, sy, qx, qy)]
        batch[index][1, 2] = label
        with pytest.raises(ValueError, match=rf"{name}\w*y: expected class ids .*got {label}"):
            MAML(mlp(3, 4, 4), 0.1, backend=backend).meta_loss(*batch)


@every_path
def test_integers_where_floats_are_needed(backend: str) -> None:
    sx, sy, qx, qy = classification()
    fails(TypeError, r"sx: expected float64.*got int64", backend, (sx.long(), sy, qx.long(), qy))
    fails(TypeError, r"sy: expected integer class ids", backend, (sx, sy.double(), qx, qy))
    sx, sy, qx, qy = regression(outputs=4)
    fails(TypeError, r"sy: expected floating-point targets", backend, (sx, sy.long(), qx, qy.long()), loss="mse")


def test_the_first_layer_is_named() -> None:
    sx, sy, qx, qy = classification()
    fails(
        TypeError, r"first layer '0 ?.*linear.*got int64.*\.to\(torch.float64\)", "auto", (sx.long(), sy, qx.long(), qy)
    )


def test_embeddings_take_integers() -> None:
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 4)).double()
    batch = (
        torch.randint(6, (3, 5, 2)),
        torch.randint(4, (3, 5)),
        torch.randint(6, (3, 2, 2)),
        torch.randint(4, (3, 2)),
    )
    assert MAML(model, 0.1, backend="general").meta_loss(*batch).shape == (3,)


@every_path
def test_mixed_dtypes_and_devices(backend: str) -> None:
    sx, sy, qx, qy = regression(outputs=4)
    fails(TypeError, r"sx: expected float64.*got float32", backend, (sx.float(), sy, qx.float(), qy), loss="mse")
    if backend != "general":  # which, like PyTorch, promotes
        fails(TypeError, r"sy: expected float64 .*got float32", backend, (sx, sy.float(), qx, qy), loss="mse")
    fails(
        ValueError, r"sx: expected the model's device cpu, got meta", backend, (sx.to("meta"), sy, qx, qy), loss="mse"
    )
    fails(
        ValueError, r"qy: expected the model's device cpu, got meta", backend, (sx, sy, qx, qy.to("meta")), loss="mse"
    )


@every_path
def test_empty_tasks(backend: str) -> None:
    sx, sy, qx, qy = classification()
    fails(ValueError, "sx: expected at least one task, got T = 0", backend, (sx[:0], sy[:0], qx[:0], qy[:0]))
    fails(ValueError, "sx: expected at least one support sample .* S = 0", backend, (sx[:, :0], sy[:, :0], qx, qy))
    fails(ValueError, "qx: expected at least one query sample", backend, (sx, sy, qx[:, :0], qy[:, :0]))
    maml = MAML(mlp(3, 4, 4), 0.1, steps=0, backend=backend)
    assert maml.meta_loss(sx[:, :0], sy[:, :0], qx, qy).isfinite().all()


@every_path
def test_rates(backend: str) -> None:
    batch, model = classification(), mlp(3, 4, 4)
    names = dict(model.named_parameters())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lr: expected finite rates"):
            MAML(model, bad, backend=backend)
    with pytest.raises(TypeError, match="lr: expected a number or a tensor, got 'fast'"):
        MAML(model, "fast", backend=backend)  # type: ignore[arg-type]
    rate = torch.tensor(0.1, dtype=torch.float64)
    maml = MAML(model, rate, backend=backend)
    maml.meta_loss(*batch)
    rate.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr: expected finite rates, got nan"):
        maml.meta_loss(*batch)
    fails(ValueError, "lr: expected at least steps=3 rates, got 2", backend, batch, lr=torch.full((2,), 0.1), steps=3)
    fails(
        ValueError, r"lr: expected a number, a scalar tensor or one rate per step", backend, batch, lr=torch.ones(2, 2)
    )
    table: dict[str, Any] = dict.fromkeys(names, 0.1)
    fails(ValueError, "got none for '2.bias'", backend, batch, lr={n: 0.1 for n in names if n != "2.bias"}, model=model)
    fails(
        ValueError,
        "expected names of the model's tensors, got '3.bias'",
        backend,
        batch,
        lr=table | {"3.bias": 0.1},
        model=model,
    )
    wrong = table | {"0.weight": torch.ones(3)}
    fails(
        ValueError,
        r"lr\['0.weight'\]: expected a scalar, .*\[4, 3\].*\[K, 1, 1\] or \[K, 4, 3\]",
        backend,
        batch,
        lr=wrong,
        model=model,
    )
    few = table | {"0.weight": torch.ones(2, 1, 1)}
    fails(ValueError, r"lr\['0.weight'\]: expected at least steps=3", backend, batch, lr=few, model=model, steps=3)


def test_names() -> None:
    model, batch = mlp(3, 4, 4), classification()
    with pytest.raises(ValueError, match=r"loss: expected one of .*got 'hinge'"):
        MAML(model, 0.1, loss="hinge")
    with pytest.raises(TypeError, match="loss: expected"):
        MAML(model, 0.1, query_loss=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction"):
        MAML(model, 0.1, loss=nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', .*got 'tpu'"):
        MAML(model, 0.1, backend="tpu")
    with pytest.raises(ValueError, match=r"batch_norm: expected one of 'module', .*'per_step'; got 'each'"):
        MAML(model, 0.1, batch_norm="each")
    with pytest.raises(ValueError, match="layer '0' keeps none"):
        MAML(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), 0.1, batch_norm="running")
    with pytest.raises(TypeError, match=r"steps: expected an int >= 0, got 1.5"):
        MAML(model, 0.1, steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps: expected an int >= 0, got -1"):
        MAML(model, 0.1).meta_loss(*batch, steps=-1)
    with pytest.raises(TypeError, match=r"model: expected an nn.Module"):
        MAML(lambda x: x, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="update: expected a callable"):
        MAML(model, 0.1, update="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        MAML(mlp(3, 4, 4).requires_grad_(False), 0.1).meta_loss(*batch)
    lazy = nn.Sequential(nn.LazyLinear(4))
    for make in (lambda: MAML(lazy, 0.1).meta_loss(*batch), lambda: InnerLR(lazy)):
        with pytest.raises(ValueError, match=r"model: expected initialised parameters, but '0.weight' is lazy"):
            make()


def test_step_weights() -> None:
    batch = classification()
    for count, weights in itertools.product((1, 4), (list, torch.tensor)):
        fails(
            ValueError,
            rf"step_weights: expected 2 weights .* or 3 .*got {count}",
            "auto",
            batch,
            steps=2,
            step_weights=weights([0.1] * count),
        )
    fails(TypeError, "step_weights: expected numbers", "auto", batch, step_weights=1.0)


def test_padding_may_be_labelled_as_ignored() -> None:
    """F.cross_entropy passes over the label -100, so it counts as no sample at all."""
    sx, sy, qx, qy = classification()
    padded = sy.clone()
    padded[:, 3:] = -100
    maml = MAML(mlp(3, 4, 4), 0.1, backend="general")
    torch.testing.assert_close(maml.meta_loss(sx, padded, qx, qy), maml.meta_loss(sx[:, :3], sy[:, :3], qx, qy))
    mask = torch.ones(3, 5, dtype=torch.float64)
    torch.testing.assert_close(
        maml.meta_loss(sx, padded, qx, qy, support_mask=mask), maml.meta_loss(sx, padded, qx, qy)
    )
    assert maml.meta_loss(sx, torch.full_like(sy, -100), qx, qy).isfinite().all()


def test_helpers() -> None:
    assert checks.shown(torch.zeros(2, 3)) == "float32 [2, 3] on cpu"
    assert len(checks.shown("x" * 500)) < 100
    nested: dict[str, Tensor | tuple[Tensor, ...]] = {"a": torch.zeros(1), "b": (torch.zeros(2),)}
    assert [name for name, _ in checks.leaves("sx", nested)] == ["sx['a']", "sx['b'][0]"]
    with pytest.raises(TypeError, match=r"sx\['a'\]: expected a tensor"):
        list(checks.leaves("sx", {"a": None}))
    checks.check_finite("lr", torch.full((4,), 3e38))  # the sum overflows, no element does


@pytest.mark.parametrize("value", ["no", "False", 0.0, [], torch.ones(2)])
def test_a_word_is_no_switch(value: Any) -> None:
    model, batch = mlp(3, 4, 4), classification()
    for given, call in (({"first_order": value}, {}), ({}, {"first_order": value})):
        with pytest.raises(TypeError, match="first_order: expected True or False, got "):
            MAML(model, 0.1, **given).meta_loss(*batch, **call)
    for switch in (1, torch.tensor(True), True):
        assert MAML(model, 0.1, first_order=switch).explain(*batch).first_order is True


@pytest.mark.parametrize("value", ["a", ["a", "b"], 3, [None, 1.0]])
def test_step_weights_are_numbers(value: Any) -> None:
    fails(
        TypeError,
        "step_weights: expected numbers or a tensor, got ",
        "general",
        classification(),
        step_weights=value,
        steps=2,
    )


@pytest.mark.parametrize("value", [[float("nan"), 1.0], [0.0, float("inf")], torch.tensor([float("nan"), 1.0])])
def test_step_weights_are_finite(value: Any) -> None:
    fails(
        ValueError,
        r"step_weights: expected finite numbers, got \[",
        "general",
        classification(),
        step_weights=value,
        steps=2,
    )
