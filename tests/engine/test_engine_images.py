"""The compiled engine against the reference in float64 on images: random networks and options, then every internal path
of convolutions, normalisations and pooling (csrc/cpu/inner_loop/plan/images.cpp says which there are).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.conv_random import Channelwise, LastNorm
from cases.engine import (
    ALL_FORMS,
    ENGINE,
    GROUPS,
    LOSSES,
    check,
    converted,
    cotangents_of,
    evaluate,
    is_finite,
    worst_error,
)
from cases.images import Both, Shape, conv_block, headed, image_case, random_image_case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import check_all, every_cotangent
from torch import Tensor, nn

from mtml_kernels.batch_norm import per_step_batch_norm
from mtml_kernels.losses import LossSpec

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

seeds = st.integers(0, 2**40)
# Cotangents that make the whole way back run: step weights, all steps kept, seeds from the support losses.
WHOLE: dict[str, Any] = {"keep": 2, "step_weights": True}
Net = Callable[[], nn.Module]


# --- random networks --------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(seeds)
def test_random_networks(seed: int) -> None:
    rng = random.Random(seed)
    case = random_image_case(seed)
    wanted = [group for group in GROUPS if rng.random() < 0.7]
    check(case, cotangents_of(case, rng), wanted or ["params"], threads=rng.choice([1, 1, 2]))


@settings(max_examples=40)
@given(seeds)
def test_random_networks_in_float32(seed: int) -> None:
    """Other lanes are padding here: such a mistake is of the order of the values, far above rounding."""
    case = random_image_case(seed)
    cotangents = cotangents_of(case, random.Random(seed))
    small, single = converted(case, torch.float32), [c if c is None else c.float() for c in cotangents]
    expected = evaluate(converted(small, torch.float64), "reference", cotangents)
    theirs = evaluate(small, "reference", single)
    if is_finite(expected) and is_finite(theirs):
        error, usual = (worst_error(r, expected) for r in (evaluate(small, ENGINE, single), theirs))
        assert error < 1e-4 + 100 * usual


# --- convolutions -----------------------------------------------------------------------------------------------------

CONVS: dict[str, tuple[Shape, Net]] = {
    "padded": ((2, 6, 5), lambda: nn.Conv2d(2, 4, 3, padding=1)),
    "kernel beside the image": ((2, 4, 4), lambda: nn.Conv2d(2, 3, 3, padding=3)),
    "kernel of the image": ((3, 5, 4), lambda: nn.Conv2d(3, 4, (5, 4))),
    "stride beyond the kernel": ((2, 9, 8), lambda: nn.Conv2d(2, 3, 2, stride=3)),
    "stride beyond the image": ((2, 3, 3), lambda: nn.Conv2d(2, 3, 1, stride=5)),
    "stride and padding": ((2, 7, 6), lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1)),
    "stride one way": ((2, 6, 7), lambda: nn.Conv2d(2, 3, (3, 1), stride=(1, 2), padding=(2, 0))),
    "dilation": ((2, 8, 9), lambda: nn.Conv2d(2, 3, 3, dilation=(2, 3), padding=2)),
    "dilation and stride": ((2, 9, 9), lambda: nn.Conv2d(2, 3, 2, dilation=3, stride=2, padding=1)),
    "same, even": ((2, 5, 6), lambda: nn.Conv2d(2, 3, (4, 2), padding="same")),
    "points": ((3, 4, 5), lambda: nn.Conv2d(3, 5, 1)),
    "points, every other": ((3, 4, 5), lambda: nn.Conv2d(3, 5, 1, stride=2, padding=1)),
    "image of a point": ((3, 1, 1), lambda: nn.Conv2d(3, 5, 3, padding=1)),
    "image of a column": ((2, 6, 1), lambda: nn.Conv2d(2, 3, (3, 1))),
    "sequence": ((2, 9), lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1)),
    "long chains": ((30, 4, 5), lambda: nn.Conv2d(30, 5, 3, padding=1)),  # 270 numbers: cut after 256
    "one run beyond a chain": ((90, 2, 5), lambda: nn.Conv2d(90, 3, (1, 5))),  # 450 numbers in a row
    "channels beyond a chain": ((260, 2, 2), lambda: nn.Conv2d(260, 3, 1)),
    "groups": ((6, 5, 4), lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2)),
    "depthwise": ((5, 6, 5), lambda: nn.Conv2d(5, 5, 3, stride=2, padding=1, groups=5, bias=False)),
    "depthwise, twice as wide": ((3, 4, 4), lambda: nn.Conv2d(3, 6, 2, groups=3)),
    "depthwise, two vectors": ((17, 3, 4), lambda: nn.Conv2d(17, 17, 2, dilation=2, padding=1, groups=17)),
    "no bias": ((2, 5, 5), lambda: nn.Conv2d(2, 3, 2, bias=False)),
}


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str, followed: bool) -> None:
    """As the first layer and, `followed`, as the second, whose input's gradient is wanted; then batch statistics are
    taken of the outputs.
    """
    shape, make = CONVS[name]
    conv = make()
    layers: list[nn.Module] = [conv, nn.Tanh()]
    if followed:
        point: Any = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        norm: Any = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
        layers = [point(shape[0], shape[0], 1), nn.SiLU(), conv, norm(conv.out_channels), nn.Tanh()]
    check_all(image_case(headed(shape, *layers), shape, support=4, steps=2, **WHOLE))


@pytest.mark.parametrize("width", [1, 3, 5, 17, 33, 65, 130])
def test_channel_counts(width: int) -> None:
    """From a part of one vector to several panels of eight, in and out, with all four functions of a fused chain."""
    layers = [
        *conv_block(2, width, nn.ReLU(), kernel=2),
        *conv_block(width, width, nn.ReLU(), nn.MaxPool2d(2), padding=1),
    ]
    case = image_case(headed((2, 5, 5), *layers), (2, 5, 5), support=3, steps=2)
    check(case, every_cotangent(case))


PAIRS: dict[str, tuple[Shape, nn.Conv1d | nn.Conv2d]] = {
    "padded": ((16, 7, 9), nn.Conv2d(16, 16, 3, padding=1)),
    "not padded": ((17, 7, 8), nn.Conv2d(17, 20, 3)),
    "padded twice": ((16, 6, 7), nn.Conv2d(16, 33, 3, padding=2)),
    "one kernel row": ((16, 6, 7), nn.Conv2d(16, 18, (1, 3), padding=(0, 3))),
    "five kernel rows, strided": ((16, 6, 8), nn.Conv2d(16, 18, (5, 3), (2, 1), (2, 0))),
    "two kernel rows, far apart": ((16, 9, 8), nn.Conv2d(16, 18, (2, 3), (3, 1), (1, 1))),
    "dilated rows": ((16, 9, 6), nn.Conv2d(16, 18, 3, 1, (2, 1), (2, 1))),
    "one dimension": ((16, 11), nn.Conv1d(16, 17, 3, padding=1)),
    "several samples a unit": ((16, 4, 4), nn.Conv2d(16, 16, 3, padding=1)),
}


@pytest.mark.parametrize("followed", ["tanh", "batch", "group"])
@pytest.mark.parametrize("name", PAIRS)
def test_three_taps_a_row_two_pixels_at_a_time(name: str, followed: str) -> None:
    """Layers of 16 channels and more; another kernel before them, so that their input has a gradient and a tangent."""
    shape, conv = PAIRS[name]
    before, width = type(conv)(2, shape[0], 1), conv.out_channels
    batch = nn.BatchNorm1d(width) if isinstance(conv, nn.Conv1d) else nn.BatchNorm2d(width)
    after = {"tanh": [nn.Tanh()], "batch": [batch, nn.ReLU()], "group": [nn.GroupNorm(1, width), nn.ReLU()]}[followed]
    case = image_case(headed((2, *shape[1:]), before, nn.Tanh(), conv, *after), (2, *shape[1:]), support=5, query=4)
    for threads in (1, 2):
        check(case, every_cotangent(case), threads=threads)


@pytest.mark.parametrize("first", ["batch", "group", "of tanh"])
@pytest.mark.parametrize("size", [28, 40])
def test_bands_of_large_images(size: int, first: str) -> None:
    """One image of 32 channels is larger than the first-level cache: several units a sample, several groups of samples,
    partial statistics for bands of rows; with group normalisation, several blocks of samples. "of tanh": statistics
    that no convolution takes.
    """
    norms: dict[str, list[nn.Module]] = {
        "batch": [nn.BatchNorm2d(32)],
        "group": [nn.GroupNorm(4, 32)],
        "of tanh": [nn.Tanh(), nn.BatchNorm2d(32)],
    }
    layers = [nn.Conv2d(1, 32, 3, padding=1), *norms[first], nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 6, 3, padding=1), NORMS["group" if first == "group" else "batch"](6, 0, 0), nn.ReLU()]
    model = headed((1, size, size), *layers, nn.AvgPool2d(size // 4))
    case = image_case(model, (1, size, size), support=3, query=2, tasks=1, steps=1, keep=1)
    check(case, every_cotangent(case))


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
def test_large_first_layers_that_are_made_again(norm: str, window: tuple[int, int]) -> None:
    """Without gradients of the inputs the query set's large first outputs have no place: their peaks are taken while
    they are in cache, and they are made again where their gradient is needed. Negative weights make minima of peaks.
    """
    layers = [nn.Conv2d(2, 32, 3, padding=1), NORMS[norm](32, 41, 38), nn.ReLU(), nn.MaxPool2d(window)]
    layers += [nn.Conv2d(32, 6, 3, padding=1), NORMS[norm](6, 0, 0), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    model = headed((2, 41, 38), *layers)
    with torch.no_grad():
        model[1].weight[::3] *= -1
        model[1].weight[1] = 0
    case = image_case(model, (2, 41, 38), support=3, query=4, tasks=2, steps=2, keep=1, lr_scale=0.02)
    for threads in (1, 2):
        check(case, every_cotangent(case), wanted=("params", "lr"), threads=threads)


def test_a_layer_large_enough_for_several_parts() -> None:
    """Above 64 million multiply-adds the weight's gradient is summed in parts, each over groups of samples."""
    model = headed((32, 20, 20), *conv_block(32, 64, nn.ReLU(), nn.MaxPool2d(4), padding=1))
    case = image_case(model, (32, 20, 20), support=10, query=1, tasks=1, steps=1)
    cotangents: list[Tensor | None] = [torch.ones(1, dtype=torch.float64), None, None]
    check(case, cotangents, threads=2)


def test_one_kernel_in_several_places() -> None:
    """Its gradient is written by one convolution and added to by the others, streamed ones among them."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    for tail in ([], [nn.BatchNorm2d(3), nn.ReLU()]):
        layers = [conv, nn.Tanh(), conv, *tail, Both(conv, nn.Sequential(nn.Tanh(), conv)), nn.MaxPool2d(2)]
        check_all(image_case(headed((3, 5, 4), *layers), (3, 5, 4), lr="element_per_step", support=4, **WHOLE))


READERS: dict[str, Net] = {
    "two convolutions": lambda: Both(nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 1)),
    "two normalisations": lambda: Both(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
    "normalised and as it is": lambda: Both(nn.Identity(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
    "pooled and normalised": lambda: Both(nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2)), nn.MaxPool2d(2)),
    "pooled twice": lambda: Both(nn.MaxPool2d(2), nn.AvgPool2d(2)),
    "three activations": lambda: Both(nn.ReLU(), nn.Tanh(), nn.GELU()),
}


@pytest.mark.parametrize("before", ["conv", "norm", "relu", "pool", "input"])
@pytest.mark.parametrize("name", READERS)
def test_several_readers(name: str, before: str) -> None:
    """Of a convolution, of a normalisation, of its relu, of its pooling: no chain may swallow what others read."""
    chain = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    count = ["input", "conv", "norm", "relu", "pool"].index(before)
    shape = (4, 9, 8) if before == "pool" else (4, 5, 4)
    model = headed(shape, *chain[:count], READERS[name](), nn.Conv2d(3 if "conv" in name else 4, 3, 2), nn.Tanh())
    check_all(image_case(model, shape, support=3, steps=2, **WHOLE))


# --- normalisations with what follows them ----------------------------------------------------------------------------

NORMS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "batch": lambda c, h, w: nn.BatchNorm2d(c, eps=1e-3),
    "group": lambda c, h, w: nn.GroupNorm(2, c),
    "instance": lambda c, h, w: nn.InstanceNorm2d(c, affine=True),
    "layer": lambda c, h, w: nn.LayerNorm([c, h, w]),
    "layer of points": lambda c, h, w: LastNorm(c),
    "layer of rows": lambda c, h, w: nn.LayerNorm(w),
}
TAILS: dict[str, tuple[nn.Module, ...]] = {
    "nothing": (),
    "relu": (nn.ReLU(),),
    "leaky": (nn.LeakyReLU(0.2),),
    "leaky without slope": (nn.LeakyReLU(0.0),),
    "leaky the other way": (nn.LeakyReLU(-0.3),),
    "two relus": (nn.ReLU(), nn.ReLU()),
    "leaky, relu": (nn.LeakyReLU(0.3), nn.ReLU()),
    "tanh": (nn.Tanh(),),
    "pool": (nn.MaxPool2d(2),),
    "relu, pool": (nn.ReLU(), nn.MaxPool2d(2)),
    "leaky, pool": (nn.LeakyReLU(0.2), nn.MaxPool2d((2, 3))),
    "pool, relu": (nn.MaxPool2d(2), nn.ReLU(inplace=True)),
    "relu, pool, relu": (nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(inplace=True)),
    "relu, pool, tanh": (nn.ReLU(), nn.MaxPool2d(2), nn.Tanh()),
    "relu, pool of everything": (nn.ReLU(), nn.MaxPool2d((5, 7))),
    "relu, pool of points": (nn.ReLU(), nn.MaxPool2d(1)),
    "relu, overlapping pool": (nn.ReLU(), nn.MaxPool2d(3, 2)),
    "relu, padded pool": (nn.ReLU(), nn.MaxPool2d(2, 2, 1)),
    "relu, pool with gaps": (nn.ReLU(), nn.MaxPool2d(2, 3)),
    "relu, dilated pool": (nn.ReLU(), nn.MaxPool2d(2, 2, dilation=2)),
    "relu, ceil pool": (nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
    "relu, average": (nn.ReLU(), nn.AvgPool2d(2)),
    "norm again": (nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("norm", NORMS)
def test_chains(norm: str, tail: str) -> None:
    """Images of 5 x 7: windows of two leave a row and a column over, which still count in the statistics. Weights are
    of both signs, so that a window's winner need not be its largest value.
    """
    layers = [nn.Conv2d(2, 4, 3, padding=1), NORMS[norm](4, 5, 7), *TAILS[tail]]
    case = image_case(headed((2, 5, 7), *layers), (2, 5, 7), support=3, steps=2, lr="tensor", **WHOLE)
    check(case, every_cotangent(case))


@pytest.mark.parametrize("affine", ["neither", "weight", "bias"])
@pytest.mark.parametrize("norm", NORMS)
def test_normalisations_without_weight_or_bias(norm: str, affine: str) -> None:
    if norm == "group" and affine == "bias":
        pytest.skip("PyTorch itself fails to differentiate it")
    for tail in ("relu, pool", "tanh"):
        layer = NORMS[norm](3, 4, 5) if norm != "group" else nn.GroupNorm(3, 3)
        owner = layer.norm if isinstance(layer, LastNorm) else layer
        for name in {"neither": ["weight", "bias"], "weight": ["bias"], "bias": ["weight"]}[affine]:
            owner.register_parameter(name, None)
        model = headed((2, 4, 5), nn.Conv2d(2, 3, 3, padding=1, bias=False), layer, *TAILS[tail])
        check_all(image_case(model, (2, 4, 5), support=3, steps=2))


@pytest.mark.parametrize("norm", NORMS)
def test_normalisations_of_what_no_convolution_made(norm: str) -> None:
    """Of the input, of a sum, of a pooled value, of another normalisation."""
    make = NORMS[norm]
    befores: list[list[nn.Module]] = [
        [],
        [Both(nn.Conv2d(4, 4, 1), nn.Identity())],
        [nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)],
        [nn.Conv2d(4, 4, 1), make(4, 4, 5)],
        [nn.Conv2d(4, 4, 3, padding=1, groups=2)],
    ]
    for before in befores:
        model = headed((4, 4, 5), *before, make(4, 4, 5), nn.ReLU(), nn.MaxPool2d(2))
        case = image_case(model, (4, 4, 5), support=3, steps=2, **WHOLE)
        check(case, every_cotangent(case))


def test_batch_normalisation_of_rows() -> None:
    """Behind linear layers (the MLPs of Omniglot), and of sequences."""
    for tail in (nn.ReLU(), nn.LeakyReLU(0.1), nn.Tanh()):
        layers = [nn.Linear(5, 33), nn.BatchNorm1d(33), tail, nn.Linear(33, 7), nn.BatchNorm1d(7), tail]
        check_all(image_case(headed((5,), *layers), (5,), support=6, query=5, steps=2, lr="element", **WHOLE))
    layers = [nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(5)]
    check_all(image_case(headed((2, 9), *layers), (2, 9), support=3, **WHOLE))


def test_weights_of_zero_and_ties() -> None:
    """Blank images, channels that are 0 everywhere, weights of 0: every window is a tie, which its first pixel wins."""
    for norm, pool in itertools.product(
        ("batch", "group", "instance", "none"), (nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1))
    ):
        layer = nn.Identity() if norm == "none" else NORMS[norm](4, 5, 5)
        model = headed((1, 5, 5), nn.Conv2d(1, 4, 3, padding=1), layer, nn.ReLU(), pool, seed=3)
        with torch.no_grad():
            model[0].weight[1] = 0  # a channel without variance
            model[0].bias.abs_()
            if norm != "none":
                model[1].weight[2] = 0
        case = image_case(model, (1, 5, 5), support=4, query=4, steps=2, keep=2, lr_scale=0.02)
        for x in (case.support_x[0], case.query_x[0]):
            x[:, 0] = 0  # a blank image
            x.view(*x.shape[:2], 5, 5)[:, :, 2:] = 0  # and blank halves
        check(case, every_cotangent(case))


# --- pooling that stands alone ----------------------------------------------------------------------------------------

POOLS: dict[str, tuple[Shape, tuple[nn.Module, ...]]] = {
    "max": ((3, 5, 7), (nn.MaxPool2d(2),)),
    "max, overlapping": ((3, 6, 7), (nn.MaxPool2d(3, 1, 1),)),
    "max, dilated": ((3, 7, 6), (nn.MaxPool2d(2, 1, 1, dilation=2),)),
    "max, ceil": ((3, 5, 6), (nn.MaxPool2d(3, 2, 1, ceil_mode=True),)),
    "max, larger steps": ((3, 7, 7), (nn.MaxPool2d(2, 3),)),
    "max, relu": ((3, 5, 6), (nn.MaxPool2d(2), nn.ReLU(inplace=True))),
    "max, sigmoid": ((3, 5, 6), (nn.MaxPool2d(2), nn.Sigmoid())),
    "max twice": ((3, 9, 8), (nn.MaxPool2d(2), nn.MaxPool2d(2))),
    "average": ((3, 6, 7), (nn.AvgPool2d(3, 2, 1),)),
    "average, ceil": ((3, 6, 7), (nn.AvgPool2d(3, 2, 1, ceil_mode=True),)),
    "average, points": ((3, 6, 7), (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),)),
    "average, divisor": ((3, 6, 7), (nn.AvgPool2d(2, divisor_override=3),)),
    "adaptive": ((3, 5, 7), (nn.AdaptiveAvgPool2d((3, 4)),)),
    "adaptive, larger": ((3, 2, 3), (nn.AdaptiveAvgPool2d((5, 4)),)),
    "adaptive, one": ((17, 4, 3), (nn.AdaptiveAvgPool2d(1),)),
    "of sequences": ((3, 9), (nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2))),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str) -> None:
    shape, layers = POOLS[name]
    conv: Any = nn.Conv2d if len(shape) == 3 else nn.Conv1d
    for before in ([], [conv(shape[0], shape[0], 1)]):
        check_all(image_case(headed(shape, *before, *layers), shape, support=3, steps=2, **WHOLE))


# --- options ----------------------------------------------------------------------------------------------------------


def small_conv4(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, pooled: bool = True, width: int = 5) -> nn.Module:
    """Two blocks of Conv-4 and its head."""
    tail = [nn.ReLU(), nn.MaxPool2d(2)] if pooled else [nn.ReLU()]
    layers: list[nn.Module] = []
    for channels in (1, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1, stride=1 if pooled else 2), norm(width), *tail]
    return headed((1, 9, 9), *layers)


ADAPTED: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "the first convolution": lambda name: name.startswith("0."),
    "the first kernel": lambda name: name == "0.weight",
    "the second convolution": lambda name: name.startswith("4."),
    "biases of convolutions": lambda name: name in ("0.bias", "4.bias"),
    "normalisations": lambda name: name[0] in "15",
    "the first normalisation": lambda name: name[0] == "1",
    "weights of normalisations": lambda name: name in ("1.weight", "5.weight"),
    "biases of normalisations": lambda name: name in ("1.bias", "5.bias"),
    "the head": lambda name: name[0] == "9",
    "all but the head": lambda name: name[0] != "9",
    "nothing": lambda name: False,
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_subsets(name: str, first_order: bool) -> None:
    """Which values have tangents, which have gradients in the inner loop, and which only in the outer one."""
    lr = "all_per_step" if name == "nothing" else "element_per_step"
    for norm in (nn.BatchNorm2d, lambda width: nn.GroupNorm(1, width)):
        model = small_conv4(norm)
        case = image_case(model, (1, 9, 9), adapt=ADAPTED[name], lr=lr, first_order=first_order, support=4, **WHOLE)
        check(case, every_cotangent(case))
        check(case, every_cotangent(case), ["params"])


@pytest.mark.parametrize("lr", ALL_FORMS)
@pytest.mark.parametrize("pooled", [True, False])
def test_rates_and_losses(lr: str, pooled: bool) -> None:
    """Every form of rates, element by element on kernels too; every loss; masks; steps 0 to 3."""
    model = small_conv4(pooled=pooled)
    first = 2 * ALL_FORMS.index(lr) + pooled
    for steps, loss in ((first % 4, LOSSES[first]), (3 - first % 4, LOSSES[first - 6])):
        options: dict[str, Any] = {"masks": ("some", "empty"), "loss": loss, "lr_scale": 0.03}
        check_all(image_case(model, (1, 9, 9), lr=lr, steps=steps, support=3, **options, **WHOLE))


@pytest.mark.parametrize("query", [None, 0, 1, 7])
@pytest.mark.parametrize("support", [1, 5])
def test_sizes_of_sets(support: int, query: int | None) -> None:
    for tasks, targets in ((1, True), (3, True), (2, False)):
        sizes: dict[str, Any] = {"support": support, "query": query, "tasks": tasks, "targets": targets}
        check_all(image_case(small_conv4(), (1, 9, 9), **sizes, **WHOLE))


def test_no_tasks() -> None:
    case = image_case(small_conv4(), (1, 9, 9), tasks=0, keep=2)
    check(case, every_cotangent(case))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_normalisation_with_rows_for_the_steps(rows: int, weighted: bool) -> None:
    """Three steps read the rows 0, 1, 2 as far as there are any; with step weights query passes read others."""
    model = per_step_batch_norm(small_conv4(), rows)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name[0] in "15":
                tensor.copy_(torch.randn_like(tensor))
    options: dict[str, Any] = {"batch_norm": "per_step", "steps": 3, "support": 4, "step_weights": weighted}
    for first_order in (False, True):
        case = image_case(model, (1, 9, 9), lr="tensor_per_step", keep=2, first_order=first_order, **options)
        check_all(case)


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_running_statistics_and_batch_statistics(mode: str) -> None:
    """In eval mode normalisation is a scale and a shift of channels; "batch" takes statistics all the same."""
    model = small_conv4().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    check_all(image_case(model, (1, 9, 9), batch_norm=mode, support=1 if mode == "running" else 3, **WHOLE))


def test_channelwise_factors_and_a_convolution_at_the_output() -> None:
    """The loss reads the image; the output's gradient is read twice."""
    for tail in (
        [],
        [nn.BatchNorm2d(3)],
        [nn.BatchNorm2d(3), nn.ReLU()],
        [nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)],
    ):
        trunk = [nn.Conv2d(1, 4, 3), Channelwise((4, 3, 4), True), nn.Tanh(), nn.Conv2d(4, 3, 2), *tail]
        model = nn.Sequential(*trunk).double()
        check_all(image_case(model, (1, 5, 6), support=3, loss=LossSpec("mse"), **WHOLE))


# --- memory: the paths of place_state in csrc/cpu/inner_loop/plan/plan.cpp --------------------------------------------


def wide_net(width: int = 200) -> nn.Module:
    """A kernel of 3 x 3 x 200 x 200, 2.9 MB in float64, over a small image."""
    return headed((2, 4, 4), *conv_block(2, width, nn.ReLU(), kernel=1), *conv_block(width, width, nn.ReLU()))


@pytest.mark.parametrize("keep", [0, 2])
def test_segments_between_checkpoints(keep: int) -> None:
    """The kernel and its transpose take 5.8 MB a step: 27 are above 128 MiB a task, so every sixth is kept, and the
    steps between are run again (the last segment has three).
    """
    options: dict[str, Any] = {"tasks": 1, "support": 1, "query": 1, "steps": 27, "lr_scale": 0.003}
    case = image_case(wide_net(), (2, 4, 4), keep=keep, **options)
    check(case, every_cotangent(case), ["params"])


def test_planes_computed_again() -> None:
    """Three planes of 40 x 40 x 16 for each of 20 images in 12 steps are 147 MB, above 128 MiB: none are kept."""
    model = headed((1, 40, 40), *conv_block(1, 16, nn.ReLU(), padding=1), nn.Conv2d(16, 2, 8, stride=8))
    case = image_case(model, (1, 40, 40), tasks=1, support=20, query=1, steps=12, lr_scale=0.01)
    check(case, every_cotangent(case))


def test_rounding_near_a_large_mean() -> None:
    """Statistics of values around 1e6 keep their digits: squares are taken around the mean."""
    case = image_case(small_conv4(), (1, 9, 9), support=4, **WHOLE)
    far = dataclasses.replace(case, support_x=[case.support_x[0] + 1e4], query_x=[case.query_x[0] + 1e4])
    expected = evaluate(far, "reference", every_cotangent(far))
    assert worst_error(evaluate(far, ENGINE, every_cotangent(far)), expected) < 1e-6
