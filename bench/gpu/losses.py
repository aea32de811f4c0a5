"""Multi-head losses judged and put into rows: the providers of ``bench.gpu.multihead_loss``, on any heads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.gpu import multihead_loss as heads
from bench.measure.gate import within
from bench.report.record import Record
from bench.workloads.heads import Draw

Build = Callable[[Draw], heads.Heads]
Step = Callable[[str, heads.Heads], Callable[[], Any]]
DTYPE = torch.bfloat16
"""What language models train in, and what every peer has kernels for."""


class Admission:
    """Lets providers of some heads run once and judges them, against eager PyTorch in float64."""

    def __init__(self, name: str, build: Build, dtype: torch.dtype, device: str, step: Step = heads.step) -> None:
        self.name, self.dtype, self.step = name, dtype, step
        self.own = build(Draw(dtype, device, 0))
        self.truth = heads.step("eager", self.own.copy(torch.float64))()
        self.limit = 4 * heads.error(heads.step("eager", self.own)(), self.truth) + 1e-6

    def admit(self, provider: str) -> tuple[Callable[[], Any] | None, Record]:
        """(None, a row that says why) where it cannot run or is wrong."""

        row = Record(self.name, provider, "ok", dtype=str(self.dtype).removeprefix("torch."))
        reason = heads.unavailable(provider, self.own)
        if reason is not None:
            return None, replace(row, status="skipped", note=reason)
        start = time.perf_counter()
        try:
            run = self.step(provider, self.own.copy(self.dtype))  # leaves of its own, for Liger writes over logits
            found = heads.error(run(), self.truth)
        except Exception as failure:  # a provider that cannot run is reported, never hidden
            return None, replace(row, status="failed", note=f"{type(failure).__name__}: {str(failure).strip()[:200]}")
        seconds = time.perf_counter() - start
        row = replace(row, first_s=seconds, match_error=found, match_score=found / self.limit)
        if not within(found, self.limit):
            why = f"error {found:.1e}, limit {self.limit:.1e}: not timed"
            return None, replace(row, status="mismatch", note=why)
        return run, row
