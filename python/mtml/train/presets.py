"""Settings of image experiments by name; every rate is one under a cross-entropy averaged over the support set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mtml.algorithms.maml_plus_plus import multi_step_weights
from mtml.tasks.errors import DataError
from mtml.train.models import INITS, NORMS

__all__ = ["NETS", "PRESETS", "Preset", "default_preset", "resolve", "step_weights"]

LEARN = ("no", "all", "tensor", "element")
NETS = ("mlp", "conv4")


@dataclass(frozen=True)
class Preset:
    """How one experiment trains; `per` makes the inner rates learnable ("all", "tensor", "element")."""

    meta_batch: int
    queries: int  # per class, in training
    steps: int
    test_steps: int
    inner_lr: float
    outer_lr: float
    init: str = "torch"
    norm: str = "none"  # of `mtml.train.models`
    batch_norm: str = "module"  # of `mtml.MAML`
    per: str | None = None
    rates_per_step: bool = False
    cosine: bool = False
    outer_floor: float = 0.0  # where the cosine ends
    multi_step: float = 0.0  # share of the training in which the losses after all steps count
    test_queries: int | None = None  # per class, where figures were published: batch statistics depend on them
    shift: int = 0  # pixels by which training drawings are moved at random
    iterations: int | None = None  # the published number


def finn2017(ways: int, shots: int, net: str = "mlp") -> Preset:
    """The MAML paper's. Its code sums the cross-entropy over the support set and divides by the shots, so under a mean
    its inner rates 0.4 (5 ways) and 0.1 (20 ways) are both 2.0. Its networks have BatchNorm, which bears that rate: by
    batch statistics, without a scale, with a bias that the inner loop leaves alone.

    It is judged as it was published, with as many queries a class as shots: where a query set is normalised by its own
    statistics, one query of each class makes an easier test than fifteen.

    Deviations: TensorFlow's Adam adds epsilon before its bias correction; turned characters are classes of their own
    here, while the paper's code turns each class of a task by a random angle, which is the same but for chance.
    """
    many = ways > 5
    return Preset(
        meta_batch=16 if many else 32,
        queries=shots,
        steps=5 if many else 1,
        test_steps=5 if many else 3,
        inner_lr=(0.1 if many else 0.4) * ways,
        outer_lr=1e-3,
        init="finn2017",
        norm="bias",
        test_queries=shots,
        iterations=60_000,
    )


def learn2learn(ways: int, shots: int, net: str = "mlp") -> Preset:
    """Of learn2learn's Omniglot example: one step at 0.5, outer Adam at 3e-3; the scale and bias of BatchNorm are
    adapted like weights.

    Deviations: no running statistics are kept, which its example never uses; the split is `--split`, its example takes
    1100 characters to train.
    """
    return Preset(
        meta_batch=32,
        queries=shots,
        steps=1,
        test_steps=1,
        inner_lr=0.5,
        outer_lr=3e-3,
        init="learn2learn",
        norm="affine",
        test_queries=shots,
        iterations=60_000,
    )


def maml_plus_plus(ways: int, shots: int, net: str = "mlp") -> Preset:
    """MAML++: a learned rate for every tensor and step from 0.1, 5 steps, losses after every step in the first tenth of
    the training, annealed towards the last; BatchNorm whose scale and bias are meta-learned but not adapted; outer rate
    from 1e-3 to 1e-5 along a cosine.

    Deviations: the cosine and the annealing move with every iteration, not every 500; second order from the start, as
    in its Omniglot runs; drawings are not augmented beyond rotations; one network is judged where the paper takes an
    ensemble of the five best by validation; `conv4` has strides, the paper's network max-pooling. BatchNorm has
    a scale and a bias for every step, and keeps none of the paper's running statistics per step, which never normalise.

    Paper: Antoniou, Edwards, Storkey, "How to train your MAML", 2019.
    """
    return Preset(
        meta_batch=8,
        queries=1,
        steps=5,
        test_steps=5,
        inner_lr=0.1,
        outer_lr=1e-3,
        init="maml++",
        norm="meta-affine",
        test_queries=1,
        batch_norm="per_step",
        per="tensor",
        rates_per_step=True,
        cosine=True,
        outer_floor=1e-5,
        multi_step=0.1,
        iterations=50_000,
    )


def mtml(ways: int, shots: int, net: str = "mlp") -> Preset:
    """What trained the perceptron without BatchNorm best in a given time, judged on 100 validation characters.

    It owes most to He's initialisation, then to moving the drawings. A learned rate was a little worse than the fixed
    one after equal time, as were 2 inner steps, half the tasks, fewer queries and other rates, inner or outer.
    """
    if net != "mlp":
        others = ", ".join(name for name in PRESETS if name != "mtml")
        raise DataError(
            f"preset: expected one of {others} with --net {net}, got 'mtml', which was tuned for the perceptron"
        )
    return Preset(
        meta_batch=32,
        queries=5,
        steps=1,
        test_steps=3,
        inner_lr=0.8,
        outer_lr=2e-3,
        init="he",
        cosine=True,
        shift=2,
    )


PRESETS: dict[str, Callable[..., Preset]] = {
    "mtml": mtml,
    "finn2017": finn2017,
    "learn2learn": learn2learn,
    "maml++": maml_plus_plus,
}


def default_preset(net: str) -> str:
    """The preset where none is named."""
    return "mtml" if net == "mlp" else "finn2017"


def resolve(name: str, ways: int, shots: int, *, net: str = "mlp", **given: Any) -> Preset:
    """The preset of that name with the settings `given` (None: the preset's own) in place of its own.

    Raises:
        DataError: where a name is unknown, or settings do not go together.
    """
    for label, value, known in (
        ("net", net, NETS),
        ("preset", name, tuple(PRESETS)),
        ("init", given.get("init"), INITS),
        ("norm", given.get("norm"), NORMS),
        ("learn-lr", given.get("per"), LEARN),
    ):
        if value is not None and value not in known:
            raise DataError(f"{label}: expected one of {', '.join(known)}; got {value!r}")
    own = PRESETS[name](ways, shots, net)
    wanted = {key: value for key, value in given.items() if value is not None}
    chosen = replace(own, **wanted)
    if chosen.per == "no":
        chosen = replace(chosen, per=None)
    return _together(replace(chosen, rates_per_step=chosen.rates_per_step and chosen.per is not None), wanted)


def _together(preset: Preset, given: dict[str, Any]) -> Preset:
    """The preset with what follows from the settings given; raises where they contradict each other."""
    if preset.rates_per_step and preset.test_steps > preset.steps:
        if "test_steps" in given:
            raise DataError(
                f"test-steps: expected at most the {preset.steps} steps of training, each of which has learned rates "
                f"of its own; got {preset.test_steps}. Raise --steps, or give --learn-lr no"
            )
        preset = replace(preset, test_steps=preset.steps)
    if preset.norm == "none" and preset.batch_norm == "per_step":
        return replace(preset, batch_norm="module")  # there is nothing to have statistics
    return preset


def step_weights(preset: Preset, used: float) -> list[float] | None:
    """The weights of the query losses after each step when the share `used` of the training is over (MAML++).

    None where the last alone counts.
    """
    return multi_step_weights(preset.steps, used, preset.multi_step)
