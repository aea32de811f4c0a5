"""Every layer and loss of torch.nn with inputs for it, and functions that no layer stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Entry(NamedTuple):
    """What to build, and what to call it with: floating-point tensors in `inputs` are differentiated by."""

    build: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    fixed: Callable[[], tuple[Any, ...]] = tuple  # targets and the like, after the inputs


def on(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (r(*shape),)


CONTAINERS = {
    "Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "RNNBase",
    "RNNCellBase", "Sequential",
}  # fmt: skip

ELEMENTWISE = (
    "AlphaDropout CELU Dropout Dropout1d Dropout2d Dropout3d ELU FeatureAlphaDropout "
    "GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid "
    "Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid "
    "Softplus Softshrink Softsign Tanh Tanhshrink"
)


def _elementwise(name: str) -> Entry:
    options = {"p": 0.0} if "Dropout" in name else {}
    shape = (2, 7, *[1] * int(name[-2])) if name[:-2] == "Dropout" else (2, 7)
    return Entry(lambda: getattr(nn, name)(**options).train(name != "RReLU"), on(*shape))


def _images(d: int) -> dict[str, Entry]:
    """Layers that exist for one, two and three dimensions."""
    x = on(2, 4, *[5] * d)
    entries = {
        f"AdaptiveAvgPool{d}d": Entry(lambda: _get("AdaptiveAvgPool", d)(2), x),
        f"AdaptiveMaxPool{d}d": Entry(lambda: _get("AdaptiveMaxPool", d)(2), x),
        f"AvgPool{d}d": Entry(lambda: _get("AvgPool", d)(2), x),
        f"BatchNorm{d}d": Entry(lambda: _get("BatchNorm", d)(4), x),
        f"Conv{d}d": Entry(lambda: _get("Conv", d)(4, 2, 2, padding=1, groups=2), x),
        f"ConvTranspose{d}d": Entry(lambda: _get("ConvTranspose", d)(4, 2, 2), x),
        f"InstanceNorm{d}d": Entry(lambda: _get("InstanceNorm", d)(4, affine=True), x),
        f"LPPool{d}d": Entry(lambda: _get("LPPool", d)(2, 2), x),
        f"MaxPool{d}d": Entry(lambda: _get("MaxPool", d)(2), x),
        f"MaxUnpool{d}d": Entry(lambda: _unpool(d), x),
    }
    for kind in ("CircularPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "ZeroPad"):
        value = (0.5,) if kind == "ConstantPad" else ()
        entries[f"{kind}{d}d"] = Entry(lambda kind=kind, value=value: _get(kind, d)(1, *value), x)
    if d > 1:
        options: dict[str, Any] = {"output_size": 2, "_random_samples": torch.full((2, 4, d), 0.3, dtype=torch.float64)}
        entries[f"FractionalMaxPool{d}d"] = Entry(lambda: _get("FractionalMaxPool", d)(2, **options), x)
    return entries


def _get(name: str, d: int) -> Any:
    return getattr(nn, f"{name}{d}d")


def _unpool(d: int) -> Callable[[Tensor], Tensor]:
    pool, unpool = _get("MaxPool", d)(2, return_indices=True), _get("MaxUnpool", d)(2)
    return lambda x: unpool(*pool(x), output_size=x.shape)


def _losses() -> dict[str, Entry]:
    labels, logits = lambda: (torch.tensor([0, 3, 1]),), on(3, 4)
    signs = lambda: (torch.tensor([[1.0, -1, 1, 1]] * 3, dtype=torch.float64),)  # noqa: E731
    same = lambda: (r(3, 4),)  # noqa: E731
    share = lambda: (torch.rand(3, 4, dtype=torch.float64),)  # noqa: E731
    pair = lambda: (r(3, 4), r(3, 4))  # noqa: E731
    which = lambda: (torch.tensor([1, -1, 1]),)  # noqa: E731
    multi = lambda: (torch.tensor([[1, 0, -1, 2], [3, -1, 0, 0], [-1, 1, 1, 1]]),)  # noqa: E731
    head = lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2])  # noqa: E731
    return {
        "AdaptiveLogSoftmaxWithLoss": Entry(head, logits, labels),
        "BCELoss": Entry(lambda: lambda x, t: nn.BCELoss()(x.sigmoid(), t), logits, share),
        "BCEWithLogitsLoss": Entry(nn.BCEWithLogitsLoss, logits, share),
        "CosineEmbeddingLoss": Entry(nn.CosineEmbeddingLoss, pair, which),
        "CrossEntropyLoss": Entry(lambda: nn.CrossEntropyLoss(label_smoothing=0.1), logits, labels),
        "GaussianNLLLoss": Entry(lambda: lambda x, t: nn.GaussianNLLLoss()(x, t, x.square() + 1), logits, same),
        "HingeEmbeddingLoss": Entry(nn.HingeEmbeddingLoss, logits, signs),
        "HuberLoss": Entry(nn.HuberLoss, logits, same),
        "KLDivLoss": Entry(lambda: nn.KLDivLoss(reduction="batchmean"), logits, share),
        "L1Loss": Entry(nn.L1Loss, logits, same),
        "LinearCrossEntropyLoss": Entry(lambda: nn.LinearCrossEntropyLoss(4, 5), logits, labels),
        "MSELoss": Entry(nn.MSELoss, logits, same),
        "MarginRankingLoss": Entry(nn.MarginRankingLoss, lambda: (r(3), r(3)), which),
        "MultiLabelMarginLoss": Entry(nn.MultiLabelMarginLoss, logits, multi),
        "MultiLabelSoftMarginLoss": Entry(nn.MultiLabelSoftMarginLoss, logits, share),
        "MultiMarginLoss": Entry(lambda: nn.MultiMarginLoss(2, 0.7), logits, labels),
        "NLLLoss": Entry(nn.NLLLoss, logits, labels),
        "NLLLoss2d": Entry(nn.NLLLoss, on(3, 4, 2), lambda: (torch.tensor([[0, 3], [1, 1], [2, 0]]),)),
        "PoissonNLLLoss": Entry(nn.PoissonNLLLoss, logits, share),
        "SmoothL1Loss": Entry(nn.SmoothL1Loss, logits, same),
        "SoftMarginLoss": Entry(nn.SoftMarginLoss, logits, signs),
        "TripletMarginLoss": Entry(nn.TripletMarginLoss, lambda: (r(3, 4), r(3, 4), r(3, 4))),
        "TripletMarginWithDistanceLoss": Entry(
            lambda: nn.TripletMarginWithDistanceLoss(distance_function=lambda a, b: torch.cdist(a, b).sum(1)),
            lambda: (r(3, 4), r(3, 4), r(3, 4)),
        ),
    }


def _attention() -> dict[str, Entry]:
    options: dict[str, Any] = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0, "batch_first": True}
    encoder = lambda: nn.TransformerEncoderLayer(**options)  # noqa: E731
    decoder = lambda: nn.TransformerDecoderLayer(**options)  # noqa: E731
    whole = lambda: nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **options)  # noqa: E731
    attend = lambda: nn.MultiheadAttention(4, 2, batch_first=True)  # noqa: E731
    two = lambda: (r(2, 3, 4), r(2, 2, 4))  # noqa: E731
    return {
        "MultiheadAttention": Entry(
            lambda: _Calls(attend(), lambda m, x: m(x, x, x, need_weights=False)[0]), on(2, 3, 4)
        ),
        "Transformer": Entry(whole, two),
        "TransformerDecoder": Entry(lambda: nn.TransformerDecoder(decoder(), 1), two),
        "TransformerDecoderLayer": Entry(decoder, two),
        "TransformerEncoder": Entry(
            lambda: nn.TransformerEncoder(encoder(), 1, enable_nested_tensor=False), on(2, 3, 4)
        ),
        "TransformerEncoderLayer": Entry(encoder, on(2, 3, 4)),
    }


class _Calls(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.inner, *inputs)


ids = torch.tensor([[0, 1, 3], [2, 2, 1]])

OTHERS = {
    "Bilinear": Entry(lambda: nn.Bilinear(3, 4, 2), lambda: (r(2, 3), r(2, 4))),
    "ChannelShuffle": Entry(lambda: nn.ChannelShuffle(2), on(2, 4, 3)),
    "CosineSimilarity": Entry(nn.CosineSimilarity, lambda: (r(2, 3), r(2, 3))),
    "Embedding": Entry(lambda: nn.Embedding(5, 3), tuple, lambda: (ids,)),
    "EmbeddingBag": Entry(lambda: nn.EmbeddingBag(5, 3), tuple, lambda: (ids,)),
    "Flatten": Entry(nn.Flatten, on(2, 3, 2)),
    "Fold": Entry(lambda: nn.Fold((3, 3), 2), on(2, 8, 4)),
    "GLU": Entry(nn.GLU, on(2, 6)),
    "GRU": Entry(lambda: nn.GRU(3, 2), on(2, 2, 3)),
    "GRUCell": Entry(lambda: nn.GRUCell(3, 2), on(2, 3)),
    "GroupNorm": Entry(lambda: nn.GroupNorm(2, 4), on(2, 4, 3)),
    "LSTM": Entry(lambda: nn.LSTM(3, 2), on(2, 2, 3)),
    "LSTMCell": Entry(lambda: nn.LSTMCell(3, 2), on(2, 3)),
    "LayerNorm": Entry(lambda: nn.LayerNorm(4), on(2, 4)),
    "Linear": Entry(lambda: nn.Linear(3, 2), on(2, 3)),
    "LocalResponseNorm": Entry(lambda: nn.LocalResponseNorm(2), on(2, 4, 3)),
    "LogSoftmax": Entry(lambda: nn.LogSoftmax(1), on(2, 4)),
    "PairwiseDistance": Entry(nn.PairwiseDistance, lambda: (r(2, 3), r(2, 3))),
    "PixelShuffle": Entry(lambda: nn.PixelShuffle(2), on(1, 4, 2, 2)),
    "PixelUnshuffle": Entry(lambda: nn.PixelUnshuffle(2), on(1, 1, 4, 4)),
    "RMSNorm": Entry(lambda: nn.RMSNorm(4), on(2, 4)),
    "RNN": Entry(lambda: nn.RNN(3, 2), on(2, 2, 3)),
    "RNNCell": Entry(lambda: nn.RNNCell(3, 2), on(2, 3)),
    "Softmax": Entry(lambda: nn.Softmax(1), on(2, 4)),
    "Softmax2d": Entry(nn.Softmax2d, on(1, 3, 2, 2)),
    "Softmin": Entry(lambda: nn.Softmin(1), on(2, 4)),
    "SyncBatchNorm": Entry(lambda: nn.SyncBatchNorm(4).eval(), on(3, 4)),
    "Threshold": Entry(lambda: nn.Threshold(0.1, 0.2), on(2, 7)),
    "Unflatten": Entry(lambda: nn.Unflatten(1, (2, 2)), on(2, 4)),
    "Unfold": Entry(lambda: nn.Unfold(2), on(1, 2, 3, 3)),
    "Upsample": Entry(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), on(1, 2, 3, 3)),
    "UpsamplingBilinear2d": Entry(lambda: nn.UpsamplingBilinear2d(scale_factor=2), on(1, 2, 3, 3)),
    "UpsamplingNearest2d": Entry(lambda: nn.UpsamplingNearest2d(scale_factor=2), on(1, 2, 3, 3)),
}

LAYERS: dict[str, Entry] = {
    **{name: _elementwise(name) for name in ELEMENTWISE.split()},
    **_images(1),
    **_images(2),
    **_images(3),
    **_losses(),
    **_attention(),
    **OTHERS,
}


def grid(x: Tensor, at: Tensor) -> Tensor:
    return F.grid_sample(x, torch.tanh(at), align_corners=False)


def plain(function: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: function


def _bags(mode: str, **options: Any) -> Callable[[], Any]:
    return plain(lambda w, i, o=None: F.embedding_bag(i, w, o, mode=mode, **options))


def _distances() -> dict[str, Entry]:
    two, found = (lambda: (r(2, 3, 4), r(2, 2, 4))), {}
    for p in (0.0, 1.0, 1.5, 2.0, 3.0, float("inf")):
        found[f"cdist {p}"] = Entry(plain(lambda a, b, p=p: torch.cdist(a, b, p)), two)
        found[f"pdist {p}"] = Entry(plain(lambda a, p=p: F.pdist(a, p)), on(4, 3))
    found["cdist of equal rows"] = Entry(plain(lambda a: torch.cdist(a, a)), on(3, 4))
    return found


def _embedding_bags() -> dict[str, Entry]:
    flat, offsets, found = ids.flatten(), torch.tensor([0, 2, 2, 5]), {}
    for mode in ("sum", "mean", "max"):
        found[f"bags {mode}"] = Entry(_bags(mode, padding_idx=2), on(5, 3), lambda: (ids,))
        found[f"offsets {mode}"] = Entry(_bags(mode), on(5, 3), lambda: (flat, offsets))
        last = {"include_last_offset": True, "padding_idx": -2}
        found[f"last offset {mode}"] = Entry(_bags(mode, **last), on(5, 3), lambda: (flat, torch.tensor([0, 2, 2, 6])))
    weighted = plain(lambda w, p, i: F.embedding_bag(i, w, mode="sum", per_sample_weights=p))
    return found | {"bags weighted": Entry(weighted, lambda: (r(5, 3), r(2, 3)), lambda: (ids,))}


def _margins() -> dict[str, Entry]:
    found, labels = {}, torch.tensor([0, 3, 1])
    multi = torch.tensor([[1, 0, -1, 2], [3, -1, 0, 0], [-1, 1, 1, 1]])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
    for how in ("none", "mean", "sum"):
        for p in (1, 2):
            one = plain(lambda x, how=how, p=p: F.multi_margin_loss(x, labels, p, 0.7, weight, reduction=how))
            found[f"multi_margin {p} {how}"] = Entry(one, on(3, 4))
        many = plain(lambda x, how=how: F.multilabel_margin_loss(x, multi, reduction=how))
        found[f"multilabel_margin {how}"] = Entry(many, on(3, 4))
    found["multi_margin of one"] = Entry(plain(lambda x: F.multi_margin_loss(x, torch.tensor(2))), on(4))
    found["multilabel_margin of one"] = Entry(plain(lambda x: F.multilabel_margin_loss(x, multi[0])), on(4))
    return found


FUNCTIONS: dict[str, Entry] = {
    **_distances(),
    **_embedding_bags(),
    **_margins(),
    "affine_grid": Entry(plain(lambda t: F.affine_grid(t, [1, 1, 2, 2], align_corners=False)), on(1, 2, 3)),
    "conv_tbc": Entry(plain(F.conv_tbc), lambda: (r(3, 2, 4), r(2, 4, 2), r(2))),
    "grid_sample": Entry(plain(grid), lambda: (r(1, 2, 4, 4), r(1, 3, 3, 2))),
    "hardsigmoid in place": Entry(plain(lambda x: F.hardsigmoid(3 * x, inplace=True)), on(9)),
    "hardsigmoid operator": Entry(plain(lambda x: torch.ops.aten.hardsigmoid(3 * x)), on(9)),
    "normalize": Entry(plain(F.normalize), on(3, 4)),
}
if hasattr(nn, "LinearCrossEntropyOptions"):
    FUNCTIONS["linear_cross_entropy"] = Entry(
        plain(lambda x, w, t: F.linear_cross_entropy(x, w, t, options=nn.LinearCrossEntropyOptions())),
        lambda: (r(3, 4), r(5, 4)),
        lambda: (torch.tensor([1, 0, 4]),),
    )
