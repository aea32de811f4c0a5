"""The options of ``python -m bench transfer``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands, positive


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where meta-learning does not help beyond the intervals."""
    import torch

    from bench.measure import transfer

    torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in ("seeds", "iterations", "shots", "steps", "own")}
    setting = transfer.Setting(**given)
    found = transfer.measure(setting, lambda line: print(line, flush=True))
    print("\n".join(found.lines()), flush=True)
    return 0 if found.ok else 1


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "transfer",
        help="new tasks after mtml.MultiTaskMAML, after joint training, and from scratch",
        description="Equal steps on the support sets of tasks that no model was trained on, over many seeds.",
    )
    p.add_argument("--seeds", type=_several, default=20, help="default %(default)s")
    p.add_argument("--iterations", type=positive, default=600, help="of training (default %(default)s)")
    p.add_argument("--shots", type=positive, default=10, help="samples to adapt on (default %(default)s)")
    p.add_argument("--steps", type=positive, default=5, help="of adaptation (default %(default)s)")
    p.add_argument("--own", type=_share, default=0.9, help="share of a task's own part, 0..1 (default %(default)s)")
    p.add_argument("--threads", type=positive, default=1, help="default %(default)s: the models are small")
    p.set_defaults(call=run)


def _several(text: str) -> int:
    value = positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError("expected at least 2: an interval needs several")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("expected a share between 0 and 1")
    return value
