"""The version whose names and semantics these are."""

__all__ = ["VERSION"]

VERSION = "1.8.0"
