"""``python -m bench export``: the data set holds to FlashInfer-Bench's schema, and its references are right.

The rules below are those of flashinfer-ai/flashinfer-bench at 40e6ca7 (2026-04-30): its models of definition, workload
and trace, and what its validator asks of a data set's layout.
"""

from __future__ import annotations

import ast
import json
import math
import struct
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.export import code, flashinfer_trace, losses, meta_steps, safetensors  # noqa: E402
from bench.measure import runner  # noqa: E402
from bench.workloads import WORKLOADS, Workload, convnet, make_network  # noqa: E402

Json = dict[str, Any]
DTYPES = {
    *("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1"),
    *("int64", "int32", "int16", "int8", "bool"),
}


# --- the schema -------------------------------------------------------------------------------------------------------


def text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_axis(axis: Json) -> None:
    assert axis.keys() <= {"type", "value", "description"} and text(axis["description"])
    assert axis["type"] in ("const", "var") and ("value" in axis) == (axis["type"] == "const")
    assert axis["type"] == "var" or natural(axis["value"])


def check_tensor(spec: Json, axes: Json) -> None:
    assert spec.keys() == {"shape", "dtype", "description"} and spec["dtype"] in DTYPES and text(spec["description"])
    assert spec["shape"] is None or all(name in axes for name in spec["shape"])


def check_definition(d: Json) -> None:
    assert d.keys() <= {
        *("name", "op_type", "axes", "inputs", "outputs", "reference", "tags", "description", "constraints")
    }
    assert all(text(d[name]) for name in ("name", "op_type", "reference", "description"))
    assert all(map(text, d["tags"]))
    for axis in d["axes"].values():
        check_axis(axis)
    for spec in (*d["inputs"].values(), *d["outputs"].values()):
        check_tensor(spec, d["axes"])
    assert not d["inputs"].keys() & d["outputs"].keys()
    (run,) = [n for n in ast.parse(d["reference"]).body if isinstance(n, ast.FunctionDef) and n.name == "run"]
    assert [a.arg for a in run.args.args] == list(d["inputs"])  # which are handed over in their order
    bound = {name for spec in d["inputs"].values() for name in spec["shape"] or ()}
    assert {name for name, axis in d["axes"].items() if axis["type"] == "var"} <= bound


def sizes(spec: Json, d: Json, workload: Json) -> list[int]:
    fixed = {name: axis["value"] for name, axis in d["axes"].items() if axis["type"] == "const"}
    return [(fixed | workload["axes"])[name] for name in spec["shape"]]


def header(path: Path) -> Json:
    """What a .safetensors file says of its tensors; it must hold exactly their bytes, in a row."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found: Json = json.loads(data[8 : 8 + length])
    at = 0
    for entry in found.values():
        start, end = entry["data_offsets"]
        assert start == at and end - start == math.prod(entry["shape"]) * {"F32": 4, "I64": 8}[entry["dtype"]]
        at = end
    assert len(data) == 8 + length + at and length % 8 == 0
    return found


def check_input(name: str, given: Json, d: Json, workload: Json, root: Path) -> None:
    spec = d["inputs"][name]
    if given["type"] == "scalar":
        assert given.keys() == {"type", "value"} and spec["shape"] is None and isinstance(given["value"], float)
        return
    assert spec["shape"] is not None
    if given["type"] == "random":
        # integers would be drawn from -1024 to 1023: no class ids
        assert given.keys() == {"type"} and spec["dtype"] == "float32"
        return
    assert given["type"] == "safetensors" and given.keys() == {"type", "path", "tensor_key"}
    stored = header(root / given["path"])[given["tensor_key"]]
    assert stored["shape"] == sizes(spec, d, workload)
    assert stored["dtype"] == {"float32": "F32", "int64": "I64"}[spec["dtype"]]


def check_workload(line: Json, d: Json, root: Path) -> None:
    assert line.keys() == {"definition", "workload", "solution", "evaluation"}
    assert line["definition"] == d["name"] and line["solution"] is None and line["evaluation"] is None
    workload = line["workload"]
    assert workload.keys() == {"uuid", "axes", "inputs"} and uuid.UUID(workload["uuid"])
    assert workload["axes"].keys() == {name for name, axis in d["axes"].items() if axis["type"] == "var"}
    assert all(natural(size) and size > 0 for size in workload["axes"].values())
    assert workload["inputs"].keys() == d["inputs"].keys()
    for name, given in workload["inputs"].items():
        check_input(name, given, d, workload, root)


def check_data_set(root: Path) -> dict[str, Json]:
    definitions: dict[str, Json] = {}
    identities = []
    for path in sorted(root.glob("definitions/*/*.json")):
        d = json.loads(path.read_text())
        check_definition(d)
        assert (d["op_type"], d["name"]) == (path.parent.name, path.stem) and d["name"] not in definitions
        definitions[d["name"]] = d
        lines = (root / "workloads" / d["op_type"] / f"{d['name']}.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            check_workload(line, d, root)
            identities.append(line["workload"]["uuid"])
    assert len(identities) == len(set(identities))
    assert len(list(root.rglob("*.json*"))) == 2 * len(definitions)
    return definitions


@pytest.mark.parametrize("name", ["sinusoid", "omniglot_mlp", "omniglot_conv", "segmentation", "linear_many"])
def test_schema(name: str, tmp_path: Path) -> None:
    assert main(["export", name, "--format", "flashinfer-trace", "--out", str(tmp_path)]) == 0
    assert len(check_data_set(tmp_path)) == 1
    written = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    list(flashinfer_trace.write(tmp_path, flashinfer_trace.chosen([name])))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == written  # every bit again


def test_everything_is_exported_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(meta_steps, "exports", lambda names: asked.extend(names) or iter(()))
    monkeypatch.setattr(losses, "exports", lambda names: asked.extend(names) or iter(()))
    assert list(flashinfer_trace.chosen([])) == []
    assert asked == [*meta_steps.NAMES, *losses.NAMES]


def test_the_schema_can_be_broken(tmp_path: Path) -> None:
    """The checks above see what they are to see."""
    list(flashinfer_trace.write(tmp_path, flashinfer_trace.chosen(["sinusoid"])))
    path = tmp_path / "definitions" / "inner_loop" / "maml_sinusoid.json"
    good = path.read_text()
    for old, new in (
        ('"size_40"\n', '"size_41"\n'),
        ("def run(support_x, support_y", "def run(support_y, support_x"),
        ('"dtype": "float32"', '"dtype": "float"'),
        ('"loss": {', '"lr": {'),
        ('"name": "maml_sinusoid"', '"name": "maml"'),
    ):
        assert old in good
        path.write_text(good.replace(old, new, 1))
        with pytest.raises((AssertionError, ValueError)):
            check_data_set(tmp_path)
    path.write_text(good)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"\0" * 8)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check_data_set(tmp_path)


# --- the references ---------------------------------------------------------------------------------------------------


def reference(text: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    names: dict[str, Any] = {}
    exec(compile(text, "reference", "exec"), names)
    run: Callable[..., tuple[torch.Tensor, ...]] = names["run"]
    return run


def inputs_of(d: Any, w: Any) -> list[Any]:
    """Those of a workload, as the benchmark draws and loads them."""
    axes = {name: size for name, (size, _) in d.axes.items() if size is not None} | dict(w.axes)
    drawn = []
    for name, spec in d.inputs.items():
        if name in w.scalars:
            drawn.append(w.scalars[name])
        elif name in w.held:
            drawn.append(w.held[name])
        else:
            drawn.append(torch.randn([axes[axis] for axis in spec["shape"]]))
    return drawn


def small(name: str) -> Workload:
    if name == "conv":
        net = {"build": lambda: convnet(3, 4, 4 * 2 * 2, 5, depth=2), "x": (3, 9, 9)}
        return replace(WORKLOADS["mini_conv"], name="conv", tasks=2, query=6, steps=2, **net)  # type: ignore[arg-type]
    if name == "head":
        return replace(WORKLOADS["anil_head"], tasks=2, support=4, query=3, steps=2)
    return replace(WORKLOADS[name], tasks=2)


@pytest.mark.parametrize("name", ["tiny", "sinusoid", "siren_sine", "conv", "head"])
def test_references_of_meta_steps(name: str) -> None:
    """The text computes what the plain loop does, gradients of the inputs among it, under no_grad as it is called."""
    w = replace(small(name), support=5, query=6)
    d, workload = meta_steps.definition(w), meta_steps.sized(w)
    given = inputs_of(d, workload)
    with torch.no_grad():
        found = dict(zip(d.outputs, reference(d.reference)(*given), strict=True))
    axes = {n: size for n, (size, _) in d.axes.items() if size is not None} | dict(workload.axes)
    for output, spec in d.outputs.items():
        assert list(found[output].shape) == [axes[a] for a in spec["shape"]] and found[output].dtype == torch.float32
    data = dict(zip(d.inputs, given, strict=True))
    sets = [data[n].requires_grad_(w.inputs and n.endswith("x")) for n in meta_steps.SETS]
    prepared = runner.providers.load("loop")(w, make_network(w), tuple(sets))  # type: ignore[arg-type]
    loss, grads = runner.outcome(prepared)
    torch.testing.assert_close(found["loss"].mean(), loss)
    names = [n for n in found if n != "loss"]
    torch.testing.assert_close([found[n] for n in names], grads)


@pytest.mark.parametrize("case", ["segmentation", "linear_many"])
def test_references_of_losses(case: str) -> None:
    ((d, workloads),) = losses.exports([case])
    given = inputs_of(d, workloads[-1])
    with torch.no_grad():
        loss, *grads = reference(d.reference)(*given)
    assert len(grads) == len(d.outputs) - 1 and all(g.shape == x.shape for g, x in zip(grads, given, strict=False))
    data = dict(zip(d.inputs, given, strict=True))
    leaves = [data[n.removesuffix("_grad")].clone().requires_grad_() for n in list(d.outputs)[1:]]
    if case == "linear_many":
        features, *weights = leaves
        pairs = [(features @ w.T, data[f"labels_{i}"]) for i, w in enumerate(weights)]
        want = torch.stack([torch.nn.functional.cross_entropy(z, y) for z, y in pairs])
    else:
        want = torch.nn.functional.cross_entropy(leaves[0], data["labels"], ignore_index=0).reshape(1)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grads, list(torch.autograd.grad(want.sum(), leaves)), rtol=1e-4, atol=1e-7)


def test_what_has_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = torch.nn.Sequential(torch.nn.GELU())
    with pytest.raises(ValueError, match="network: no reference text for a layer GELU"):
        code.meta_step(WORKLOADS["tiny"], net, [], [])
    with pytest.raises(ValueError, match=r"x: expected one of torch\.float64"):
        safetensors.write(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert main(["export", "nothing", "--format", "flashinfer-trace", "--out", str(tmp_path)]) == 2
    assert main(["export", "siren", "--format", "hf-kernels", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
