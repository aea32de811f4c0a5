"""The CUDA code within the compiled module against the GPUs of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mtml_kernels.doctor.processes import in_a_process

__all__ = ["cuda", "main", "serving_code"]

Capability = tuple[int, int]


def serving_code(codes: Iterable[str], capability: Capability) -> str | None:
    """Which of the codes a GPU runs: the newest native one, else the newest PTX, which its driver compiles.

    Example:
        >>> serving_code(["sm_80", "sm_100f", "compute_80"], (10, 3)), serving_code(["sm_80"], (9, 0))
        ('sm_100f', None)
    """
    return max((code for code in codes if _serves(code, capability)), key=_preference, default=None)


def _parts(code: str) -> tuple[bool, int, str]:
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code)
    if match is None:
        raise ValueError(f"code: expected sm_<number> or compute_<number>, got {code!r}")
    return match[1] == "sm", int(match[2]), match[3]


def _serves(code: str, capability: Capability) -> bool:
    native, number, variant = _parts(code)
    own = 10 * capability[0] + capability[1]
    if variant == "a":  # this chip alone
        return number == own
    within_family = native or variant == "f"
    return number <= own and (number // 10 == capability[0] or not within_family)


def _preference(code: str) -> tuple[bool, int, str]:
    native, number, variant = _parts(code)
    return native, number, variant


def cuda() -> dict[str, Any]:
    """What was built, which GPUs are here, and for each the verdict; how to build for them where it is missing."""
    from mtml_kernels.native import cuda_device

    codes = cuda_device.built_codes()
    if not codes:
        return {"built": [], "build": f"in a checkout, with nvcc: {cuda_device.rebuild_command(_torch_devices())}"}
    driver, runtime = cuda_device.versions()
    found = cuda_device.devices()
    ran: dict[str, Any] = in_a_process(__name__) if found else {}
    shown = [
        asdict(device)
        | {"capability": f"{device.capability[0]}.{device.capability[1]}"}
        | verdict(serving_code(codes, device.capability), ran.get(str(index), {"error": ran.get("error", "none ran")}))
        for index, device in enumerate(found)
    ]
    return {"built": list(codes), "runtime": runtime, "driver": driver, "devices": shown}


def verdict(code: str | None, ran: dict[str, Any]) -> dict[str, Any]:
    """`ok` by what a kernel did on the GPU, not by what the list of codes lets expect."""
    expected = f"runs {code}" if code else "no code for it"
    if code and code.startswith("compute"):
        expected += " (PTX, which the driver compiles when it is first used)"
    if "error" in ran:
        return {"ok": False, "verdict": f"{expected}; a kernel there: {ran['error']}"}
    return {"ok": True, "verdict": f"{expected}; a kernel of {ran['architecture']} ran"}


def _torch_devices() -> list[Capability]:
    """Of the GPUs that PyTorch sees, where the module itself sees none."""
    try:
        import torch
    except ImportError:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_capability(index) for index in range(count)]


def main() -> None:
    """Prints {index: {"architecture"} or {"error"}}: what the probe's kernel did on each GPU."""
    from mtml_kernels.native import cuda_device

    results: dict[str, dict[str, Any]] = {}
    for index in range(len(cuda_device.devices())):
        try:
            results[str(index)] = {"architecture": cuda_device.probe(index)}
        except RuntimeError as error:
            results[str(index)] = {"error": str(error)}
    print(json.dumps(results))
