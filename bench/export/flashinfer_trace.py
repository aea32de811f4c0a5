"""``python -m bench export --format flashinfer-trace``: a data set that FlashInfer-Bench reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from bench.export import losses, meta_steps, safetensors
from bench.export.definition import Exported
from bench.workloads import WORKLOADS


def chosen(names: Iterable[str]) -> Iterator[Exported]:
    """The exports of these workloads, or all: meta-steps, then losses. Raises ValueError for an unknown name."""
    wanted = list(names) or [*meta_steps.NAMES, *losses.NAMES]
    for name in wanted:
        if name not in WORKLOADS and name not in losses.NAMES:
            raise ValueError(f"workload: expected some of {', '.join((*WORKLOADS, *losses.NAMES))}; got {name!r}")
    steps, heads = [n for n in wanted if n in WORKLOADS], [n for n in wanted if n in losses.NAMES]
    return chain(meta_steps.exports(steps), losses.exports(heads))


def write(out: Path, exported: Iterable[Exported]) -> Iterator[Path]:
    """Definitions, workloads and tensors below a root; yields the files of definitions and workloads."""
    for d, workloads in exported:
        definition = out / "definitions" / d.op_type / f"{d.name}.json"
        lines = out / "workloads" / d.op_type / f"{d.name}.jsonl"
        for path, text in (
            (definition, json.dumps(d.to_json(), indent=2) + "\n"),
            (lines, "".join(json.dumps(w.to_json(d)) + "\n" for w in workloads)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            yield path
        for w in workloads:
            if w.held:
                safetensors.write(out / w.blob(d), w.held)
