"""Checks of inner loops on the GPU itself, for a backend and a device; on the CPU they show that they can fail."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.measure import runner  # noqa: E402
from bench.workloads import WORKLOADS, Workload, convnet  # noqa: E402
from mtml import MAML  # noqa: E402

ORDERS = [[0, 1, 2], [2, 1, 0], [1, 0, 2]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")

SMALL: dict[str, Workload] = {
    "sinusoid": replace(WORKLOADS["sinusoid"], tasks=3),
    "odd": replace(WORKLOADS["tiny"], tasks=1, support=1, query=7),
    "omniglot_mlp": replace(WORKLOADS["omniglot_mlp"], tasks=2, query=9),
    "siren_sine": replace(WORKLOADS["siren_sine"], tasks=2, support=65, query=33),
    "conv": replace(
        WORKLOADS["mini_conv"],
        build=lambda: convnet(3, 8, 8 * 2 * 2, 5, depth=2),
        tasks=2,
        query=6,
        x=(3, 9, 9),
        steps=2,
    ),
}


def check_meta_step(w: Workload, provider: str, device: str, bits: bool = True) -> None:
    """Right, without a fallback to another path, and with `bits` the same bits again."""
    options = runner.Options(device=device)
    prepared, row = runner.admit(w, provider, options, runner.gate_for(w, options))
    assert prepared is not None and row.ok, row.note
    assert row.note == "", row.note
    first, again = runner.outcome(prepared), runner.outcome(prepared)
    same = all(map(torch.equal, [first[0], *first[1]], [again[0], *again[1]]))
    assert same or not bits, "equal inputs, other bits"


def check_order(backend: str, device: str, order: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several forwards before their backwards, recorded and not, and a graph that is retained: the same bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).to(device)
    params = list(net.parameters())
    batches = [[torch.randn(4, 5, size, device=device) for size in (3, 2, 3, 2)] for _ in order]

    def gradients(recorded: bool) -> list[list[Tensor]]:
        monkeypatch.setenv("MTML_CUDA_GRAPHS", "1" if recorded else "0")
        maml = MAML(net, lr=0.1, steps=3, loss="mse", backend=backend)
        losses = [maml.meta_loss(*batch).mean() for batch in batches]
        found: list[list[Tensor]] = [[]] * len(losses)
        for i in order:
            first = torch.autograd.grad(losses[i], params, retain_graph=True)
            found[i] = [losses[i].detach(), *torch.autograd.grad(losses[i], params)]
            assert all(map(torch.equal, first, found[i][1:])), "a retained graph, other bits"
        return found

    plain = gradients(False)
    for _ in range(3):  # compiled, recorded, replayed
        for ours, theirs in zip(gradients(True), plain, strict=True):
            assert all(map(torch.equal, ours, theirs)), "recorded, other bits"
