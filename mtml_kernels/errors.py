"""Errors and warnings that callers may want to catch by type."""

from torch import OutOfMemoryError

__all__ = ["BackendUnavailable", "DeviceMemoryError", "FallbackWarning"]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run this call here; the message says why and names the way out.

    Automatic selection (``backend="auto"``) never raises it: it takes another backend, after a `FallbackWarning`.
    """


class DeviceMemoryError(OutOfMemoryError):
    """A call needs more memory than its device has free, even one task at a time; the message says how much, and names
    ways out. Whoever catches torch.OutOfMemoryError catches it too.
    """


class FallbackWarning(UserWarning):
    """A slower path than the fused one was taken; the message says why. Raised once per program.

    Example:
        >>> import warnings
        >>> from mtml_kernels import FallbackWarning
        >>> warnings.simplefilter("error", FallbackWarning)  # make a slow path an error
    """
