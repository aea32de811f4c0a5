"""Data sets that an original downloads, and that are not here."""

from __future__ import annotations

from typing import Any, NoReturn

from mtml.tasks import DataError

__all__ = ["Absent"]


class Absent:
    """Takes the place of a data set: importing it is no error, using it is.

    Args:
        name: of the data set.
        way_out: what to do instead, for the message.

    Raises:
        DataError: when it is called.
    """

    def __init__(self, name: str, way_out: str) -> None:
        self.__name__, self.way_out = name, way_out

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DataError(f"{self.__name__}: not here, since mtml.compat downloads nothing. {self.way_out}")

    def __repr__(self) -> str:
        return f"<{self.__name__}, which is absent>"
