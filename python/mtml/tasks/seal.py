"""A line at the end of a file by which every change of its bytes is noticed before anything in it is believed."""

from __future__ import annotations

import hashlib
import re

__all__ = ["Unsealed", "sealed", "unsealed"]

# At the end, not in front, so that the programs that read the content (torch.load, numpy.load) still open the file.
LINE = re.compile(rb"\nmtml ([a-z]+) (\d+) sha256 ([0-9a-f]{64})\n\Z")
LONGEST = 160


class Unsealed(ValueError):
    """Bytes that are not what was written, or are of another format; the message says which of a file that it leaves to
    the caller to name."""


def sealed(content: bytes, kind: str, version: int) -> bytes:
    """`content` with its seal: what it is, the number of its format, and the digest of all of that."""
    head = content + f"\nmtml {kind} {version} sha256 ".encode()
    return head + hashlib.sha256(head).hexdigest().encode() + b"\n"


def unsealed(data: bytes, kind: str, version: int) -> bytes:
    """The content of what `sealed` made.

    Raises:
        Unsealed: where a byte differs from what was written, or it is of another kind or format.
    """
    found = LINE.search(data, max(0, len(data) - LONGEST))
    if found is None:
        raise Unsealed("it has no digest at its end: it was cut short, or this version of mtml did not write it")
    if hashlib.sha256(memoryview(data)[: found.start(3)]).hexdigest().encode() != found[3]:
        raise Unsealed("it is damaged: its bytes do not have the digest that was written with them")
    if found[1].decode() != kind:
        raise Unsealed(f"it is a file of another kind: expected {kind}, got {found[1].decode()}")
    if (number := int(found[2])) != version:
        age = "a newer" if number > version else "an older"
        raise Unsealed(f"it has format {number} of {age} version of mtml, expected format {version}")
    return data[: found.start()]
