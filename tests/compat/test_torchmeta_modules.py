"""torchmeta's modules: what they compute with `params`, and what is left of the original's traps."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtml.compat.torchmeta import modules as mm

X = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=X)


IDS = torch.tensor([[0, 2, 1], [3, 1, 1]])
# (ours, PyTorch's, arguments, keyword arguments, inputs)
LAYERS: dict[str, tuple[type, type, tuple[Any, ...], dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
    "linear": (mm.MetaLinear, nn.Linear, (4, 3), {}, lambda: (rand(5, 4),)),
    "linear, no bias": (mm.MetaLinear, nn.Linear, (4, 3), {"bias": False}, lambda: (rand(5, 4),)),
    "bilinear": (mm.MetaBilinear, nn.Bilinear, (4, 3, 2), {}, lambda: (rand(5, 4), rand(5, 3))),
    "conv1d": (mm.MetaConv1d, nn.Conv1d, (2, 4, 3), {"stride": 2, "groups": 2}, lambda: (rand(2, 2, 9),)),
    "conv2d": (mm.MetaConv2d, nn.Conv2d, (2, 4, 3), {"padding": "same"}, lambda: (rand(2, 2, 5, 5),)),
    "conv2d, reflect": (
        mm.MetaConv2d,
        nn.Conv2d,
        (2, 4, 3),
        {"padding": 1, "padding_mode": "reflect", "dilation": 2},
        lambda: (rand(2, 2, 7, 7),),
    ),
    "conv3d": (mm.MetaConv3d, nn.Conv3d, (1, 2, 2), {}, lambda: (rand(1, 1, 3, 3, 3),)),
    "batchnorm1d": (mm.MetaBatchNorm1d, nn.BatchNorm1d, (4,), {}, lambda: (rand(6, 4),)),
    "batchnorm2d": (mm.MetaBatchNorm2d, nn.BatchNorm2d, (2,), {"momentum": None}, lambda: (rand(3, 2, 4, 4),)),
    "batchnorm2d, no statistics": (
        mm.MetaBatchNorm2d,
        nn.BatchNorm2d,
        (2,),
        {"momentum": 1.0, "track_running_stats": False},
        lambda: (rand(3, 2, 4, 4),),
    ),
    "batchnorm3d, no weights": (
        mm.MetaBatchNorm3d,
        nn.BatchNorm3d,
        (2,),
        {"affine": False},
        lambda: (rand(3, 2, 2, 2, 2),),
    ),
    "layernorm": (mm.MetaLayerNorm, nn.LayerNorm, ((3, 4),), {}, lambda: (rand(5, 3, 4),)),
    "embedding": (mm.MetaEmbedding, nn.Embedding, (4, 3), {"padding_idx": 1}, lambda: (IDS,)),
    "embeddingbag": (mm.MetaEmbeddingBag, nn.EmbeddingBag, (4, 3), {"mode": "sum"}, lambda: (IDS, None, rand(2, 3))),
    "embeddingbag, padding": (mm.MetaEmbeddingBag, nn.EmbeddingBag, (4, 3), {"padding_idx": 1}, lambda: (IDS,)),
    "attention": (
        mm.MetaMultiheadAttention,
        nn.MultiheadAttention,
        (6, 2),
        {"batch_first": True, "add_bias_kv": True},
        lambda: (rand(2, 5, 6), rand(2, 4, 6), rand(2, 4, 6)),
    ),
}


def pair(name: str) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    """Ours, PyTorch's with the same state, and inputs."""
    kind, plain, arguments, keywords, inputs = LAYERS[name]
    mine, theirs = kind(*arguments, **keywords).to(X), plain(*arguments, **keywords).to(X)
    theirs.load_state_dict(mine.state_dict())  # strict: the same keys
    return mine, theirs, inputs()


def values(outcome: Any) -> Tensor:
    return outcome[0] if isinstance(outcome, tuple) else outcome


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_with_params(name: str, training: bool) -> None:
    mine, theirs, inputs = pair(name)
    assert isinstance(mine, LAYERS[name][1]) and isinstance(mine, mm.MetaModule)
    mine.train(training), theirs.train(training)
    torch.testing.assert_close(mine(*inputs), theirs(*inputs), rtol=0, atol=0)
    params = {n: torch.randn_like(p).requires_grad_() for n, p in mine.named_parameters()}
    assert list(params) == [n for n, _ in mine.meta_named_parameters()]
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.copy_(params[n])
    found, expected = values(mine(*inputs, params=params)), values(theirs(*inputs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for (n, a), b in zip(mine.named_buffers(), theirs.buffers(), strict=True):  # running statistics moved twice
        torch.testing.assert_close(a, b, msg=n)
    if not params:
        return
    mine_grads = torch.autograd.grad(found.square().sum(), list(params.values()))
    their_grads = torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))
    for a, b in zip(mine_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_what_params_leave_out_is_the_layers_own(name: str) -> None:
    """The original computed without a bias, or a weight, that params did not name."""
    mine, theirs, inputs = pair(name)
    for n, p in mine.named_parameters():
        other = torch.randn_like(p)
        expected = functional_call(theirs, {n: other}, inputs)
        torch.testing.assert_close(values(mine(*inputs, params={n: other})), values(expected), rtol=1e-12, atol=1e-12)


def test_a_wrong_number_of_dimensions() -> None:
    layer = mm.MetaBatchNorm2d(2)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.zeros(3, 2), params=dict(layer.named_parameters()))


class Autoencoder(mm.MetaModule):
    """The decoder's weight is the encoder's, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mm.MetaSequential(mm.MetaLinear(3, 3), nn.Tanh())
        self.decoder = mm.MetaSequential(nn.Tanh(), mm.MetaLinear(3, 3))
        self.decoder[1].weight = self.encoder[0].weight

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        x = self.encoder(x, params=self.get_subdict(params, "encoder"))
        return self.decoder(x, params=self.get_subdict(params, "decoder"))


@pytest.mark.parametrize("whole", [False, True], ids=["a tensor", "a module"])
def test_a_shared_tensor_is_found_by_its_first_name(whole: bool) -> None:
    """The original stopped with a KeyError, or (a whole module) took the tensor before adaptation."""
    model = Autoencoder().to(X)
    if whole:
        model.decoder = mm.MetaSequential(model.encoder[0], nn.Tanh())
    names = [n for n, _ in model.meta_named_parameters()]
    assert "encoder.0.weight" in names and "decoder.0.weight" not in names and "decoder.1.weight" not in names
    params, x = {n: torch.randn_like(p) for n, p in model.meta_named_parameters()}, rand(5, 3)
    torch.testing.assert_close(model(x, params=params), functional_call(model, params, (x,)), rtol=1e-12, atol=1e-12)


def test_a_module_without_its_share_warns_and_computes_with_its_own() -> None:
    model, x = Autoencoder().to(X), rand(5, 3)
    model.decoder = mm.MetaSequential(mm.MetaLinear(3, 3)).to(X)
    params = {n: torch.randn_like(p) for n, p in model.encoder.meta_named_parameters(prefix="encoder")}
    with pytest.warns(UserWarning, match="'decoder' of Autoencoder, got only encoder.0.weight, encoder.0.bias"):
        found = model(x, params=params)
    torch.testing.assert_close(found, functional_call(model, params, (x,)))


def test_names_that_begin_alike_are_not_mixed_up() -> None:
    model = mm.MetaSequential(*[nn.Identity() for _ in range(10)], mm.MetaLinear(2, 2), mm.MetaLinear(2, 2))
    assert list(model.get_subdict({"1.weight": 0, "10.bias": 1}, "10")) == ["bias"]
    assert list(model.get_subdict({"a.b.weight": 0}, "a.b")) == ["weight"]
    assert isinstance(model.get_subdict({"10.bias": 1}, "10"), OrderedDict)
    assert model.get_subdict(None, "10") is None
    assert dict(model.get_subdict({"10.bias": 1})) == {"10.bias": 1}


def test_meta_parameters_are_those_of_meta_modules() -> None:
    model = mm.MetaSequential(nn.Linear(2, 2), mm.MetaLinear(2, 2), nn.Sequential(mm.MetaLinear(2, 2, bias=False)))
    assert [n for n, _ in model.meta_named_parameters()] == ["1.weight", "1.bias", "2.0.weight"]
    assert next(n for n, _ in model.meta_named_parameters(prefix="net")) == "net.1.weight"
    assert list(model.meta_parameters(recurse=False)) == []
    assert [id(p) for p in model.meta_parameters()] == [id(p) for _, p in model.meta_named_parameters()]


def test_sequential_refuses_what_is_no_module() -> None:
    model = mm.MetaSequential(mm.MetaLinear(2, 2))
    model._modules["1"] = torch.relu  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"1: expected an nn.Module"):
        model(torch.zeros(1, 2), params=dict(model[0].named_parameters(prefix="0")))


def test_copies_and_pickles() -> None:
    model, x = Autoencoder(), torch.randn(5, 3)
    params = {n: torch.randn_like(p) for n, p in model.meta_named_parameters()}
    expected = model(x, params=params)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert again.decoder[1].weight is again.encoder[0].weight
        torch.testing.assert_close(again(x, params=params), expected)
        again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_data_parallel_takes_params_by_either_name(prefix: str) -> None:
    """The original looked for "module." on GPUs alone."""
    model, x = mm.MetaSequential(mm.MetaLinear(2, 3), nn.ReLU()), torch.randn(5, 2)
    wrapped = mm.DataParallel(model)
    assert next(wrapped.meta_named_parameters())[0] == "module.0.weight"
    params = {n: torch.randn_like(p) for n, p in model.meta_named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = wrapped(x, params={prefix + n: p for n, p in params.items()})
        torch.testing.assert_close(wrapped(x, params=None), model(x))
    torch.testing.assert_close(found, model(x, params=params))
