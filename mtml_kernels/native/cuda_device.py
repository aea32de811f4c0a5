"""The GPUs as the compiled module sees them, and whether it has code for them; none in a build without CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.native import engine

__all__ = ["Capability", "Device", "built_codes", "devices", "probe", "rebuild_command", "versions"]

Capability = tuple[int, int]  # major, minor


@dataclass(frozen=True)
class Device:
    """What decides how kernels are launched."""

    name: str
    capability: Capability
    multiprocessors: int
    shared_bytes: int  # the most that one block may ask for
    memory_bytes: int


def rebuild_command(capabilities: Iterable[Capability] = ()) -> str:
    """What to run in a checkout, for given GPUs; for those of the default list, where none are given.

    Example:
        >>> rebuild_command([(9, 0)])
        'MTML_CUDA=1 MTML_CUDA_ARCHS=90 pip install --no-build-isolation --force-reinstall --no-deps .'
    """
    archs = ",".join(str(10 * major + minor) for major, minor in sorted(set(capabilities)))
    variables = f"MTML_CUDA=1 MTML_CUDA_ARCHS={archs}" if archs else "MTML_CUDA=1"
    return f"{variables} pip install --no-build-isolation --force-reinstall --no-deps ."


def built_codes() -> tuple[str, ...]:
    """The codes within the module, as nvcc calls them: sm_90 native, compute_90 PTX. Empty in a build without CUDA."""
    return tuple(getattr(engine(), "cuda_archs", "").split())


def versions() -> tuple[str | None, str]:
    """The newest CUDA that the driver supports (None: there is no driver), and that of the run-time library within."""

    def shown(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    driver, runtime = engine().cuda_versions()
    return shown(driver) if driver else None, shown(runtime)


def devices() -> list[Device]:
    """The GPUs that CUDA_VISIBLE_DEVICES shows; none in a build without CUDA or without a driver. Makes no context."""
    if not built_codes():
        return []
    return [
        Device(found.name, found.capability, found.multiprocessors, found.shared_bytes, found.memory_bytes)
        for found in engine().cuda_devices()
    ]


def probe(index: int) -> int:
    """Runs the smallest kernel on a GPU: 10 * capability of the code that ran. Makes a context.

    Raises:
        BackendUnavailable: this build has no code for it; names the command that builds it.
    """
    if not built_codes():
        raise BackendUnavailable(f"this build has no CUDA code; in a checkout: {rebuild_command()}")
    module = engine()
    try:
        ran: int = module.cuda_probe(index)
    except module.NoDeviceCode as error:
        raise BackendUnavailable(no_code(index, devices()[index], built_codes(), str(error))) from error
    return ran


def no_code(index: int, device: Device, codes: Iterable[str], reason: str) -> str:
    """The words for a GPU that none of the codes serves."""
    found = f"GPU {index} ({device.name}) has compute capability {'.'.join(map(str, device.capability))}"
    return (
        f"{found}, and this build has code for {', '.join(codes)} ({reason}); in a checkout: "
        f"{rebuild_command([device.capability])}"
    )
