"""The codes that Python writes into programs and options are those that the C++ header gives the engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from mtml_kernels import program
from mtml_kernels.program.layers.window import WINDOW_CONSTANTS
from mtml_kernels.schema.losses import HEAD_KINDS, KINDS, LOSSES, SOFT

HEADER = (Path(__file__).parents[2] / "csrc/include/mtml/program.h").read_text()


def enumerators(name: str) -> list[tuple[str, int]]:
    """Names in small letters without the k, and codes, of an enum whose enumerators are written `kName = number`."""
    found = re.search(rf"enum {name} : int32_t {{(.*?)}}", HEADER, re.DOTALL)
    assert found is not None, name
    return [(text.lower(), int(code)) for text, code in re.findall(r"k(\w+) = (\d+)", found[1])]


def check(enum: str, names: Sequence[str], prefix: str = "") -> None:
    """The enum has these names, numbered from 0, and at most its count after them.

    A name may be longer or shorter on one side: kBatchNorm is BATCH, kBce is bce_with_logits.
    """
    theirs = [(name.removeprefix(prefix), code) for name, code in enumerators(enum) if not name.endswith("count")]
    assert [code for _, code in theirs] == list(range(len(names)))
    for (found, _), name in zip(theirs, names, strict=True):
        expected = name.lower().replace("_", "")
        assert found.startswith(expected) or expected.startswith(found), (found, expected)
    assert all(code == len(names) for name, code in enumerators(enum) if name.endswith("count"))


def test_operations() -> None:
    assert [program.OPS[code].code for code in range(len(program.OPS))] == list(range(len(program.OPS)))
    check("Op", [program.OPS[code].name for code in range(len(program.OPS))])
    assert all(program.OPS[op].name == op.name.lower() for op in program.Op)


@pytest.mark.parametrize(
    ("enum", "kinds"), [("Act", program.Act), ("NormKind", program.Norm), ("PoolKind", program.Pool)]
)
def test_kinds(enum: str, kinds: Sequence[program.Act]) -> None:
    assert [int(kind) for kind in kinds] == list(range(len(kinds)))
    check(enum, [kind.name for kind in kinds])


def test_losses() -> None:
    assert [LOSSES[kind].code for kind in KINDS] == list(range(len(KINDS)))
    check("LossKind", [*KINDS, "soft_cross_entropy"])
    assert len(KINDS) == SOFT
    assert [LOSSES[kind].head_code for kind in HEAD_KINDS] == list(range(len(HEAD_KINDS)))
    check("MultiheadKind", HEAD_KINDS, "multihead")


def test_layouts_and_widths() -> None:
    layouts = (program.LAYOUT_LINEAR, program.LAYOUT_ROWS, program.LAYOUT_CONV, program.LAYOUT_STEPS)
    layouts = (*layouts, program.LAYOUT_IN_OUT)
    names = ("linearweight", "rows", "convweight", "steprows", "inoutweight")
    assert enumerators("ParamLayout")[: len(names)] == list(zip(names, layouts, strict=True))
    numbers = {name: int(value) for name, value in re.findall(r"constexpr int k(\w+) = (\d+);", HEADER)}
    assert numbers["HeaderInts"] == program.HEADER_INTS and numbers["ParamInts"] == program.PARAM_INTS
    assert numbers["NodeInts"] == program.NODE_INTS and numbers["Version"] == program.VERSION
    assert numbers["WindowConsts"] == WINDOW_CONSTANTS
