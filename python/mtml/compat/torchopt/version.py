"""The version of the original whose interface this is."""

__all__ = ["__version__"]

__version__ = "0.7.3"
