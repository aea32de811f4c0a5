"""The GPUs of the building machine, as its driver tells. No context is made."""

from __future__ import annotations

import ctypes

__all__ = ["capabilities"]

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def capabilities(library: str = "libcuda.so.1") -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that CUDA_VISIBLE_DEVICES shows.

    Raises:
        LookupError: there is no driver or no GPU; the reason.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise LookupError(f"no driver: {library} cannot be loaded") from None
    ask = _Driver(driver)
    ask("cuInit", 0)
    count = ask.number("cuDeviceGetCount")
    if not count:
        raise LookupError("the driver sees no GPU")
    devices = [ask.number("cuDeviceGet", index) for index in range(count)]
    return [
        (ask.number("cuDeviceGetAttribute", MAJOR, device), ask.number("cuDeviceGetAttribute", MINOR, device))
        for device in devices
    ]


class _Driver:
    """Calls of the driver's functions, whose result is a status."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise LookupError(f"{name} answers {status}")

    def number(self, name: str, *arguments: object) -> int:
        """What a function writes through its first argument."""
        value = ctypes.c_int()
        self(name, ctypes.byref(value), *arguments)
        return value.value
