"""Small modules for the tests of tracing: what fuses, and what does not with the reason that must be named."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Body = Callable[..., Any]


class Net(nn.Module):
    """Calls `body(self, *inputs)`; keyword arguments become its layers, parameters and attributes."""

    def __init__(self, body: Body, **members: Any) -> None:
        super().__init__()
        self.body = body
        for name, value in members.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.body(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shapes: Any


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def net(body: Body, *shapes: tuple[int, ...], **members: Callable[[], Any]) -> Case:
    return Case(lambda: Net(body, **{name: make() for name, make in members.items()}), shapes)


def module(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Case:
    return Case(make, shapes)


class Siren(nn.Module):
    """Sine layers with the frequency 30 (Sitzmann et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 7), nn.Linear(7, 7)])
        self.out = nn.Linear(7, 3)
        self.w0 = 30.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(self.w0 * layer(x))
        return self.out(x)


class Film(nn.Module):
    """A latent code that scales and shifts every layer (functa, CAVIA)."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(5))
        self.scale = nn.ModuleList(nn.Linear(5, 6) for _ in range(2))
        self.shift = nn.ModuleList(nn.Linear(5, 6) for _ in range(2))
        self.hidden = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 6)])
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for scale, shift, layer in zip(self.scale, self.shift, self.hidden, strict=True):
            gamma, beta = scale(self.latent), shift(self.latent)
            x = torch.sin(gamma * layer(x) + beta)
        return self.out(x)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out += x
        return F.relu(out, inplace=True)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def _in_place_alias(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    y = F.relu(h, inplace=True)
    return y + h  # h was overwritten: this is 2 * relu


def _branches(m: Any, x: Tensor) -> Tensor:
    assert x.dim() == 2 and x.shape[-1] == 3 and x.shape == x.size() and x.dtype == m.a.weight.dtype
    if x.shape[0] != x.size(0):
        raise ValueError
    if x.shape[1] > 2:
        x = torch.tanh(x)
    return m.a(x)


def _points(m: Any, x: Tensor) -> Tensor:
    n, p, f = x.shape
    return m.a(x.reshape(n * p, f)).view(n, p, -1).flatten(1)


def _unit_dims(m: Any, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1).transpose(2, 3)[:, :, 0]  # [N, 3, 4]
    return m.a(x.unsqueeze(1).squeeze(1).reshape(-1, 12))


_LINEAR = {"a": lambda: nn.Linear(3, 4), "b": lambda: nn.Linear(4, 4)}
_A: dict[str, Callable[[], Any]] = {"a": lambda: nn.Linear(3, 4)}
_Z: dict[str, Callable[[], Any]] = {**_A, "z": lambda: weight(5)}

FUSED: dict[str, Case] = {
    "linear": module(lambda: nn.Linear(3, 2), (3,)),
    "linear without bias": module(lambda: nn.Linear(3, 2, bias=False), (3,)),
    "mlp": module(lambda: mlp(1, 40, 40, 1), (1,)),
    "odd widths": module(lambda: mlp(3, 17, 5, 7), (3,)),
    "points per sample": module(lambda: mlp(2, 9, 3), (11, 2)),
    "grid of points": module(lambda: mlp(2, 9, 3), (3, 5, 2)),
    "images": module(lambda: nn.Sequential(nn.Flatten(), mlp(20, 8, 5)), (1, 4, 5)),
    "siren": module(Siren, (2,)),
    "siren on points": module(Siren, (13, 2)),
    "film": module(Film, (2,)),
    "film on points": module(Film, (4, 2)),
    "residual": module(lambda: nn.Sequential(nn.Linear(3, 6), Residual(6), Residual(6)), (3,)),
    "tied weights": module(_tied, (4,)),
    "activations": module(
        lambda: nn.Sequential(
            nn.Linear(3, 6), nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"),
            nn.SiLU(), nn.Softplus(2.0, 5.0), nn.Identity(), nn.Dropout(0.0), nn.Unflatten(1, (2, 3)), nn.Flatten(),
        ), (3,)),
    "activation functions": net(
        lambda m, x: F.gelu(F.gelu(F.leaky_relu(m.a(x), 0.3)), approximate="tanh") * F.silu(F.softplus(m.a(x), 0.5)),
        (3,), **_A),
    "activation methods": net(lambda m, x: m.a(x).tanh().sigmoid().sin() - torch.cos(2 * m.a(x)).relu(), (3,), **_A),
    "old names": net(lambda m, x: F.tanh(F.sigmoid(torch.special.expit(m.a(x)))), (3,), **_A),
    "arithmetic": net(
        lambda m, x: -(1 - m.a(x)) / 4 + 2 * torch.add(m.a(x), m.a(x).sin(), alpha=3) - m.a(x).mul(0.5).sub(1) ** 2,
        (3,), **_A),
    "more arithmetic": net(
        lambda m, x: torch.rsub(m.a(x), 2.0).square() + torch.addcmul(m.a(x), m.a(x), m.a(x), value=0.5)
        + torch.pow(m.a(x), 3) - (+m.a(x)).neg().div(3), (3,), **_A),
    "in-place": net(lambda m, x: m.a(x).add_(1.0).mul_(2.0).sub_(m.a(x)).relu_(), (3,), **_A),
    "in-place under two names": net(_in_place_alias, (3,), **_A),
    "shared layer": net(lambda m, x: m.b(torch.tanh(m.b(m.a(x)))), (3,), **_LINEAR),
    "branches on static shapes": net(_branches, (3,), **_A),
    "cat": net(lambda m, x: torch.cat([m.a(x), x, m.a(x) * 2], dim=-1), (3,), **_A),
    "cat dim 1": net(lambda m, x: torch.concat((m.a(x), x), 1), (3,), **_A),
    "cat of points": net(lambda m, x: torch.cat([x, m.a(x)], -1), (6, 3), **_A),
    "cat along points": net(lambda m, x: m.a(torch.cat([x, x * x], dim=1)), (6, 3), **_A),
    "stack": net(lambda m, x: torch.stack([m.a(x), m.a(x).sin()], dim=1).flatten(1), (3,), **_A),
    "cat of parameters": net(
        lambda m, x: m.a(x) * torch.cat([m.u, m.v]), (3,), u=lambda: weight(1), v=lambda: weight(3), **_A),
    "latent shift": net(lambda m, x: m.a(x) + m.z, (3,), z=lambda: weight(4), **_A),
    "latent row": net(lambda m, x: m.a(x) + m.z, (6, 3), z=lambda: weight(1, 4), **_A),
    "latent per point": net(lambda m, x: m.a(x) * m.z, (6, 3), z=lambda: weight(6, 4), **_A),
    "latent per point, one feature": net(lambda m, x: m.a(x) * m.z, (6, 3), z=lambda: weight(6, 1), **_A),
    "latent with a batch of one": net(lambda m, x: m.a(x) + m.z, (6, 3), z=lambda: weight(1, 6, 4), **_A),
    "latent per channel": net(lambda m, x: (x * m.z).flatten(1), (2, 3, 4), z=lambda: weight(2, 1, 1)),
    "scalar parameter": net(lambda m, x: m.s * m.a(x), (3,), s=lambda: nn.Parameter(torch.tensor(0.7)), **_A),
    "one feature meets many": net(lambda m, x: x * m.z + m.z, (1,), z=lambda: weight(4)),
    "gate per row": net(lambda m, x: m.a(x) * m.g(x).sigmoid(), (6, 3), g=lambda: nn.Linear(3, 1), **_A),
    "scalar per sample": net(lambda m, x: torch.sin(m.s * x), (), s=lambda: nn.Parameter(torch.tensor(0.7))),
    "squeezed output": net(lambda m, x: m.g(x).squeeze(-1), (3,), g=lambda: nn.Linear(3, 1)),
    "buffers": net(lambda m, x: m.a((x - m.mean) * m.scale), (3,), mean=lambda: torch.randn(3),
                   scale=lambda: torch.tensor(0.5), **_A),
    "latent expand": net(lambda m, x: torch.cat([m.a(x), m.z.expand(x.shape[0], -1)], -1), (3,), **_Z),
    "latent expand, size()": net(lambda m, x: torch.cat([m.z.expand(x.size(0), 5), x], 1), (3,), **_Z),
    "latent expand, len()": net(lambda m, x: torch.cat([x, m.z.unsqueeze(0).expand(len(x), -1)], 1), (3,), **_Z),
    "latent expand, points": net(
        lambda m, x: torch.cat([x, m.z.view(1, 1, -1).expand(x.shape[0], x.shape[1], -1)], -1), (6, 3), **_Z),
    "latent repeat": net(lambda m, x: torch.cat([x, m.z[None].repeat(x.shape[0], 1)], -1), (3,), **_Z),
    "latent expand_as": net(lambda m, x: x * m.s.expand_as(x) + m.t.expand_as(x), (6, 3), s=lambda: weight(1),
                            t=lambda: weight(1, 3)),
    "latent broadcast_to": net(lambda m, x: torch.broadcast_to(m.z, (len(x), 5)) * 2, (3,), **_Z),
    "hypernetwork bias": net(lambda m, x: F.linear(x, m.a.weight, m.h(m.z)), (3,), h=lambda: nn.Linear(5, 4), **_Z),
    "matrix times latent": net(lambda m, x: m.a(x) + m.w @ m.z, (3,), w=lambda: weight(4, 5), **_Z),
    "functional linear": net(lambda m, x: F.linear(x, m.a.weight, m.a.bias), (3,), **_A),
    "matmul with T": net(lambda m, x: x @ m.a.weight.T + m.a.bias, (3,), **_A),
    "addmm": net(lambda m, x: torch.addmm(m.a.bias, x, m.a.weight.t()), (3,), **_A),
    "view": net(lambda m, x: m.a(x.view(x.size(0), -1)), (1, 3), **_A),
    "reshape": net(lambda m, x: m.a(torch.reshape(x, (-1, 3))), (3, 1), **_A),
    "view of a layer": net(lambda m, x: m.a(m.a(x).view(len(x), 3, 1).expand(-1, -1, 1).reshape(len(x), -1)[:, None]
                                            .view_as(x)), (3,), a=lambda: nn.Linear(3, 3)),
    "points in the batch": net(_points, (6, 3), **_A),
    "unit dimensions": net(_unit_dims, (1, 3, 4), a=lambda: nn.Linear(12, 2)),
    "indexing": net(lambda m, x: (m.a(x)[:, :, None] * m.k[..., None]).flatten(1), (3,), k=lambda: weight(4), **_A),
    "conversions": net(
        lambda m, x: m.a(x.to(m.a.weight.dtype).contiguous().clone().type_as(x).to(x.device)), (3,), **_A),
    "keyword layer": net(lambda m, x: m.a(input=x), (3,), **_A),
    "layer made in forward": net(lambda m, x: nn.Tanh()(m.a(x)), (3,), **_A),
    "input-major weight": net(lambda m, x: (x @ m.w + m.v).tanh() @ m.a.weight, (3,), w=lambda: weight(3, 4),
                              v=lambda: weight(4), **_A),
    "weight that is a transpose": net(lambda m, x: F.linear(x, m.w.t(), m.v), (5, 3), w=lambda: weight(3, 4),
                                      v=lambda: weight(4)),
    "tied autoencoder": net(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.t(), m.v), (3,), v=lambda: weight(3), **_A),
    "tied the other way": net(lambda m, x: F.linear((x @ m.w).sin(), m.w) @ m.w, (5, 3), w=lambda: weight(3, 4)),
    "einsum": net(
        lambda m, x: torch.einsum("...h,ho->...o", torch.einsum("npi,oi->npo", x, m.w).sin(), m.v), (5, 3),
        w=lambda: weight(4, 3), v=lambda: weight(4, 2)),
    "einsum, weight first": net(lambda m, x: torch.einsum("o i, b i -> b o", [m.w, x]), (3,), w=lambda: weight(4, 3)),
    "slices": net(
        lambda m, x: x[:, 1:3] * m.a(x)[..., -2:] + x[:, :1] + m.z[2:4] * x[:, 2:] - x[..., 0, None], (3,), **_Z),
    "an index": net(lambda m, x: m.a(x)[:, -1, 1:] * m.a(x)[..., 1][:, 2:3] + x[:, 2, 0][:, None], (6, 3), **_A),
    "slices of points": net(lambda m, x: m.a(torch.cat([x[:, 4:], x[:, :2, :]], 1) * x[:, 1:5]), (6, 3), **_A),
    "chunks": net(lambda m, x: torch.cat([p.sin() * i for i, p in enumerate(m.a(x).chunk(3, -1), 1)], 1), (3,), **_A),
    "splits": net(lambda m, x: next(a * b for a, b in [m.a(x).split([1, 3], 1)]) + m.a(x).split(2, dim=-1)[1][:, :1],
                  (3,), **_A),
    "parts by other names": net(
        lambda m, x: torch.narrow(x, 1, 1, 2) + x.select(-1, 0)[:, None] + m.z.unbind(0)[3] * x.unbind(1)[2][:, None],
        (3,), **_Z),
    "chunks of a parameter": net(lambda m, x: x * m.h(m.z).chunk(2)[0] + m.h(m.z).chunk(2)[1], (3,),
                                 h=lambda: nn.Linear(5, 6), **_Z),
    "FiLM from a hypernetwork": net(
        lambda m, x: next(torch.sin(m.a(x) * (1 + s) + t) for s, t in [m.h(m.z).split(4, -1)]), (7, 3),
        h=lambda: nn.Linear(5, 8), **_Z),
    "a changed slice": net(lambda m, x: m.a(x)[:, 1:].mul_(2.0), (3,), **_A),
    "SwiGLU": net(lambda m, x: m.b(F.silu(m.h(x)[..., :4]) * m.h(x)[..., 4:]), (3,), h=lambda: nn.Linear(3, 8),
                  **_LINEAR),
    "gated units": net(lambda m, x: F.glu(m.a(x)) * nn.GLU(1)(m.a(x)), (3,), **_A),
    "chunks of channels": net(
        lambda m, x: next((p * q.sigmoid()).flatten(1) for p, q in [m.c(x).chunk(2, 1)]), (2, 4, 3),
        c=lambda: nn.Conv2d(2, 6, 1)),
    "a crop": net(lambda m, x: m.c(x)[:, :, 1:-1, 2:].flatten(1), (2, 4, 3), c=lambda: nn.Conv2d(2, 3, 1)),
    "softmax": net(lambda m, x: F.log_softmax(m.b(torch.softmax(m.a(x), -1)), dim=1) * m.a(x).softmax(1), (3,),
                   **_LINEAR),
    "softmax layers": module(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 5), nn.Softmin(-1), nn.LogSoftmax(-1)),
        (6, 3)),
    "softmax of channels": net(lambda m, x: m.c(x).softmax(1).flatten(1), (2, 4, 3), c=lambda: nn.Conv2d(2, 3, 1)),
    "softmax of a latent": net(lambda m, x: m.a(x) * m.h(m.z).softmax(0), (3,), h=lambda: nn.Linear(5, 4), **_Z),
    "exponential units": module(
        lambda: nn.Sequential(nn.Linear(3, 6), nn.ELU(0.7), nn.Linear(6, 6), nn.SELU(), nn.PReLU(), nn.ELU(),
                              nn.LogSigmoid()), (3,)),
    "exponential functions": net(lambda m, x: F.elu(F.selu(m.a(x)), 1.3) * F.elu(m.a(x), inplace=True), (3,), **_A),
    "PReLU": net(lambda m, x: m.p(m.c(x)).flatten(1) * F.prelu(m.c(x), m.s).flatten(1), (2, 4, 3),
                 c=lambda: nn.Conv2d(2, 3, 1), p=lambda: nn.PReLU(3, 0.3), s=lambda: weight(1)),
    "RMSNorm": module(lambda: nn.Sequential(nn.Linear(3, 6), nn.RMSNorm(6, 0.1), nn.Linear(6, 4), nn.RMSNorm(4)), (3,)),
    "RMSNorm of points": net(lambda m, x: F.rms_norm(m.a(x), (5, 4), eps=0.1) * F.rms_norm(m.a(x), (4,), m.w, 0.2),
                             (5, 3), w=lambda: weight(4), **_A),
    "normalize": net(lambda m, x: F.normalize(m.a(x), dim=-1) * F.normalize(m.a(x), eps=2.0), (3,), **_A),
    "normalize channels": net(lambda m, x: F.normalize(m.c(x)).flatten(1), (2, 4, 3), c=lambda: nn.Conv2d(2, 3, 1)),
    "frequencies": net(
        lambda m, x: m.h(torch.cat([x, *(f(2.0**i * 3.1 * x) for i in range(2) for f in (torch.sin, torch.cos))], -1)),
        (6, 2), h=lambda: nn.Linear(10, 3)),
    "frequencies in a buffer": net(
        lambda m, x: m.h(torch.cat([(x[..., None] * m.f).flatten(-2).sin(), (x @ m.g).cos()], -1)), (6, 2),
        f=lambda: torch.tensor([1.0, 2.0, 4.0]), g=lambda: torch.randn(2, 5), h=lambda: nn.Linear(11, 3)),
    "two inputs": net(lambda m, x, c: m.b(torch.cat([m.a(x), c], 1)), (3,), (2,), b=lambda: nn.Linear(6, 2), **_A),
    "keyword inputs": Case(
        lambda: Net(lambda m, x, context: m.a(x) * context, a=nn.Linear(3, 4)), {"context": (4,), "x": (3,)}),
    "dead code": net(lambda m, x: (m.b(m.a(x)), m.a(x))[1], (3,), **_LINEAR),
    "the input itself": net(lambda m, x: x, (3,), **_A),
    "parameter dict": net(lambda m, x: F.linear(x, m.p["w"]) * m.l[0], (3,), l=lambda: nn.ParameterList([weight(4)]),
                          p=lambda: nn.ParameterDict({"w": weight(4, 3)})),
}  # fmt: skip


class Reversal(torch.autograd.Function):
    """A gradient that is not that of the function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


def _custom(m: Any, x: Tensor) -> Tensor:
    return m.a(Reversal.apply(x))


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.a(x)
    return x


def _stale_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    other = h.view(-1, 2, 2)
    h += 1.0
    return other.flatten(1) + h


def _changed_slice(h: Tensor) -> Tensor:
    h[:, :2].mul_(2.0)
    return h  # its first two features are other ones


def _counts(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.a(x)


def _looks_at_type(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if isinstance(x, Tensor) else -m.a(x)


def _hooked() -> nn.Module:
    model = mlp(3, 4, 2)
    model[1].register_forward_hook(lambda m, args, out: out * 2)
    return model


def _replaced() -> nn.Module:
    model = mlp(3, 4, 2)
    model[1].forward = lambda x: x * 2  # type: ignore[assignment]
    return model


def _parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))


def _root_hook() -> nn.Module:
    model = nn.Linear(3, 2)
    model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    return model


class Unfused(NamedTuple):
    case: Case
    reasons: tuple[str, ...]


def no(body: Body, reason: str, *shapes: tuple[int, ...], **members: Callable[[], Any]) -> Unfused:
    return Unfused(net(body, *(shapes or ((3,),)), **(members or _A)), (reason,))


def no_module(make: Callable[[], nn.Module], *reasons: str, shape: tuple[int, ...] = (3,)) -> Unfused:
    return Unfused(module(make, shape), reasons)


UNFUSED: dict[str, Unfused] = {
    "unknown layers": no_module(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Mish(), nn.ReLU(), nn.Flatten()),
        "0 (Conv3d): this layer is not fused", "1 (Mish): this layer is not fused", shape=(1, 5, 5, 5)),
    "subclassed activation": no_module(
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Mish()), "1 (Mish): this layer is not fused"),
    "softmax over the batch": no(lambda m, x: torch.softmax(m.a(x), 0), "it changes the batch dimension"),
    "softmax over points": no(lambda m, x: x.softmax(2), "neither its features nor its channels", (2, 3, 4)),
    "two reasons": Unfused(net(lambda m, x: F.mish(m.a(x)) + x.exp(), (3,), **_A), ("mish", "exp")),
    "mean over the batch": no(lambda m, x: m.a(x) - m.a(x).mean(0), "it reduces over the samples of the batch"),
    "gram matrix": no(lambda m, x: x @ x.T, "it moves the batch dimension"),
    "attention": no(lambda m, x: x @ x.transpose(1, 2), "product of two computed tensors", (4, 3)),
    "transposition": no(lambda m, x: x.transpose(1, 3), "transposing the elements", (4, 3, 2)),
    "batch in the middle": no(lambda m, x: x.unsqueeze(0), "it changes the batch dimension"),
    "batch last": no(lambda m, x: x.view(3, -1), "fixes the first dimension"),
    "samples merged": no(lambda m, x: m.a(x).reshape(1, -1), "fixes the first dimension"),
    "cat along the batch": no(lambda m, x: torch.cat([x, x]), "joins along the batch dimension"),
    "folded output": no(lambda m, x: m.a(x).flatten(0, 1), "does not start with the batch dimension", (4, 3)),
    "bare squeeze": no(lambda m, x: m.a(x).squeeze(), "name it: squeeze(-1)"),
    "other samples": no(lambda m, x: m.a(x) + m.z, "meets the batch dimension", **_Z | {"z": lambda: weight(5, 4)}),
    "samples by samples": no(lambda m, x: x[:, 0:1].squeeze(1) + x, "mixes samples"),
    "outer sum": no(lambda m, x: m.g(x).squeeze(-1) + x, "mixes samples", g=lambda: nn.Linear(3, 1)),
    "batched rows": no(lambda m, x: x + x.view(x.shape[0], 1, -1), "cannot be broadcast", (4, 3)),
    "slice of the batch": no(lambda m, x: m.a(x[:2]), "selects samples of the batch"),
    "slice with a step": no(lambda m, x: m.a(x)[:, ::2], "slices with a step"),
    "empty slice": no(lambda m, x: m.a(x)[:, 4:], "an empty slice"),
    "index past the end": no(lambda m, x: m.a(x)[:, 4], "index 4 of a dimension of 4"),
    "indices": no(lambda m, x: m.a(x)[:, [0, 2]], "by numbers and slices"),
    "chunk of the batch": no(lambda m, x: m.a(x).chunk(2)[0], "it changes the batch dimension"),
    "einsum of values": no(lambda m, x: torch.einsum("bi,bj->bij", x, x), "einsum"),
    "length of another power": no(lambda m, x: F.normalize(m.a(x), p=1), "p=2"),
    "weight as value too": no(lambda m, x: m.a(x) * m.a.weight, "as a linear weight and as a plain value",
                              a=lambda: nn.Linear(3, 1)),
    "computed weight": no(lambda m, x: F.linear(x, m.a.weight * 2), "must be a parameter itself"),
    "product of values": no(lambda m, x: m.a(x) @ m.b(m.b(x)), "product of two computed tensors",
                            a=lambda: nn.Linear(3, 3), b=lambda: nn.Linear(3, 3)),
    "division by a tensor": no(lambda m, x: m.a(x) / m.s, "division by a tensor", s=lambda: weight(1), **_A),
    "square root": no(lambda m, x: m.a(x) ** 0.5, "only the powers 2 and 3"),
    "detach": no(lambda m, x: m.a(x).detach() + m.a(x), "hides a part of the gradient"),
    "data": no(lambda m, x: m.a(x).data + m.a(x), "hides a part of the gradient"),
    "no_grad": no(_no_grad, "torch.no_grad()"),
    "custom function": no(_custom, "custom autograd Function"),
    "active dropout": no_module(
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), "1 (Dropout): dropout with p=0.5"),
    "functional dropout": no(lambda m, x: F.dropout(m.a(x)), "dropout with p=0.5"),
    "random": no(lambda m, x: m.a(x) + torch.randn_like(x), "it is random"),
    "python random": no(lambda m, x: m.a(x) * random.random(), "computes something else than its trace"),
    "type of an argument": no(_looks_at_type, "computes something else than its trace"),
    "outer product": no(lambda m, x: m.a(x)[:, None] * m.k[:, None], "over some of the rows only",
                        k=lambda: weight(2), **_A),
    "control flow": no(lambda m, x: m.a(x) if x.sum() > 0 else x, "Tensor.sum"),
    "control flow on values": no(lambda m, x: m.a(x) if x else x, "cannot be traced: TraceError"),
    "control flow on the batch": no(lambda m, x: m.a(x) if x.shape[0] > 3 else x, "operator.gt"),
    "batch size as a number": no(lambda m, x: m.a(x) / x.shape[0], "division by a tensor"),
    "batch size as a factor": no(lambda m, x: m.a(x) * x.shape[0], "the batch size enters the computation"),
    "constant tensor": no(lambda m, x: m.a(x) + torch.ones(4), "register it as a buffer"),
    "integer buffer": no(
        lambda m, x: m.a(x) + m.i, "the buffer i has dtype torch.int64", i=lambda: torch.arange(4), **_A),
    "dtype": no(lambda m, x: m.a(x.float()), "Tensor.float"),
    "dtype by name": no(lambda m, x: m.a(x.to(torch.float64)), "a conversion to torch.float64"),
    "out": no(lambda m, x: torch.add(x, x, out=x), "these arguments are not fused"),
    "in-place on the input": no(lambda m, x: m.a(x.add_(1.0)), "it changes the input input_0 in place"),
    "in-place on a parameter": no(lambda m, x: m.a(x) + m.z.mul_(2.0), "changes the parameter z in place",
                                  z=lambda: weight(4), **_A),
    "view of overwritten memory": no(_stale_view, "changed in place"),
    "slice of overwritten memory": no(lambda m, x: _changed_slice(m.a(x)), "changed in place"),
    "side effects": no(_counts, "forward sets calls on the module"),
    "tuple output": no(lambda m, x: (m.a(x), x), "output: it is a tuple"),
    "dict output": no(lambda m, x: {"y": m.a(x)}, "output: it is a"),
    "constant output": no(lambda m, x: m.a.weight, "output: it does not depend on the input"),
    "wrong features": no(lambda m, x: m.a(x), "the layer expects 3 features", (5,)),
    "error in forward": no(lambda m, x: m.missing(x), "AttributeError"),
    "too many inputs": no(lambda m, x: m.a(x), "cannot be traced: TypeError", (3,), (3,)),
    "hook": no_module(_hooked, "1 (ReLU): it has hooks"),
    "hook on the model": no_module(_root_hook, "forward (Linear): it has hooks"),
    "weight_norm": no_module(_parametrized, "0 (ParametrizedLinear): it has parametrizations"),
    "replaced forward": no_module(_replaced, "its forward was replaced"),
    "compiled": no_module(lambda: torch.compile(nn.Linear(3, 2)), "dynamo-optimized"),
}  # fmt: skip
