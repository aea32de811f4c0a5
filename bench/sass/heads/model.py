"""A launch's time from the clocks of some of its programs, spread over the grid (emulation/launches.py).

    time     launch + max(issue, bytes, latency)
    issue    programs of the busiest multiprocessor * the clocks of its busiest unit for one program
    bytes    sectors that programs read and write / bandwidth of L2; the same, once each / bandwidth of memory where
             they do not fit L2
    latency  rounds of programs * the chain of one, phase by phase; at least the longest chain

A multiprocessor holds as many programs as registers and shared memory leave room for; where it has more to do they come
in rounds. Programs that did not run are taken for the mean of those that did. PyTorch's products are those of the first
prediction (`mtml_kernels/schedule/predict.py`), its other kernels launch and bytes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.sass.chips import SCHEDULERS, Chip
from bench.sass.emulation.clocks import Phase
from bench.sass.emulation.launches import Ran
from bench.sass.model import Launch, bytes_seconds
from mtml_kernels.schedule.devices import LAUNCH_SECONDS

__all__ = ["time_of"]


def _busiest(phases: Sequence[Phase]) -> float:
    """Clocks of a multiprocessor for one program."""
    units = {"issue": sum(phase.issued for phase in phases) / SCHEDULERS}
    for phase in phases:
        for name, clocks in phase.units.items():
            units[name] = units.get(name, 0.0) + clocks
    return max(units.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def time_of(ran: Ran, chip: Chip) -> Launch:
    """One launch's time."""
    code, programs = ran.code, ran.launch.programs
    resident = chip.resident(code.registers, code.shared, code.warps)
    processors, hertz = chip.device.processors, chip.device.hertz
    own = -(-programs // processors)
    together = min(resident, own)
    chains = [sum(p.clocks if together == 1 else p.chain for p in one.phases) for one in ran.programs]
    latency = max(max(chains), _mean(chains) * -(-own // together))
    work = [_busiest(one.phases) for one in ran.programs]
    near, far = ran.moved()
    issued = _mean([sum(p.issued for p in one.phases) for one in ran.programs])
    multiplied = _mean([sum(p.issued_fma for p in one.phases) for one in ran.programs])
    return Launch(
        name=ran.launch.name,
        launch=LAUNCH_SECONDS,
        issue=max(max(work), _mean(work) * own) / hertz,
        matrix=0.0,
        bytes=max(near / chip.device.l2_bandwidth, bytes_seconds(far, chip)),
        latency=latency / hertz,
        programs=programs,
        resident=resident,
        waves=programs / (processors * resident),
        issued=round(issued * programs),
        fma=round(multiplied * programs),
        moved=far,
        longest=(1, max(len(one.phases) for one in ran.programs)),
    )
