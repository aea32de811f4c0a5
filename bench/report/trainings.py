"""``python -m bench results``: docs/results.md, what whole trainings reached beside what was published.

Read from the records of `mtml record` in bench/results/training; settings with a published figure and no record say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtml.train.published import SETTINGS, published
from mtml.train.sinusoid import PUBLISHED as SINUSOID

ROOT = Path(__file__).resolve().parents[2]
RECORDS, PAGE = ROOT / "bench" / "results" / "training", ROOT / "docs" / "results.md"

HEAD = """# Results of whole trainings

Published figures beside what `mtml train` reaches: written by `python -m bench results` from the records in
`bench/results/training/`, each with its settings, its log and its pictures. Times are those of the training alone."""

SINUSOID_TEXT = """## Sinusoids

Mean squared error on 100 unseen tasks after one inner step, by shots of the test, 95 % intervals; trained with 5 shots
on the tasks of Li et al. 2017 (Meta-SGD), where the published figures stand: `mtml train sinusoid --tasks meta-sgd
--shots 5`, with `--meta-sgd` for learnt rates."""

OMNIGLOT_TEXT = """## Omniglot

Accuracy in per cent on tasks of unseen characters (1200 for training, the others for tests, four rotations each), 95 %
intervals. Published: MAML, Finn et al. 2017; MAML++, Antoniou et al. 2019. BatchNorm normalises a query set by its own
statistics, so one query a class, as published, makes an easier test than fifteen. Finn et al. trained for 60 000
iterations; ours ended where the column says, some of them on one thread beside other work."""

Record = Mapping[str, Any]


def read_records(folder: Path = RECORDS) -> dict[str, Record]:
    """Every recorded training by its file's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _cost(record: Record) -> str:
    """Iterations, time, and the threads where the record has them."""
    threads = record.get("environment", {}).get("threads")
    on = "" if threads is None else f" on {threads} thread{'' if threads == 1 else 's'}"
    seconds = record["seconds"]
    time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{record['iterations']} | {time}{on}"


def _percent(share: Mapping[str, float]) -> str:
    return f"{100 * share['mean']:.2f} ± {100 * share['ci95']:.2f}"


def _sinusoid_rows(records: Mapping[str, Record]) -> list[str]:
    lines = ["| method | shots | published | this library | iterations | time |", "|---|---|---|---|---|---|"]
    for index, method in enumerate(("MAML", "Meta-SGD")):
        found = [r for r in records.values() if _is_sinusoid(r, meta_sgd=method == "Meta-SGD")]
        for shots, figures in SINUSOID.items():
            ours, cost = "not trained here", " | "
            if found:
                mse = found[-1]["mse"][str(shots)]
                ours, cost = f"**{mse['mean']:.2f} ± {mse['ci95']:.2f}**", _cost(found[-1])
            lines.append(f"| {method} | {shots} | {figures[index]:.2f} | {ours} | {cost} |")
    return lines


def _is_sinusoid(record: Record, meta_sgd: bool) -> bool:
    s = record["settings"]
    if "mse" not in record:
        return False
    return (s["tasks"], s["shots"], s["steps"], s["meta_sgd"]) == ("meta-sgd", 5, 1, meta_sgd)


def _omniglot_rows(records: Mapping[str, Record]) -> list[str]:
    lines = [
        "| network | ways, shots | published | queries as published | 15 queries a class | iterations | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for net, ways, shots in SETTINGS:
        figures = published(net, ways, shots)
        theirs = ", ".join(f"{100 * figures[name]:.4g} ({name})" for name in ("MAML", "MAML++") if name in figures)
        found = [r for r in records.values() if _is_omniglot(r, net, ways, shots)]
        ours, wide, cost = "not trained here", "", " | "
        if found:
            ours, cost = f"**{_percent(found[-1]['accuracy'][-1])}**", _cost(found[-1])
            wide = _percent(found[-1]["wide_test"]["accuracy"][-1])
        lines.append(f"| {net} | {ways}, {shots} | {theirs} | {ours} | {wide} | {cost} |")
    return lines


def _is_omniglot(record: Record, net: str, ways: int, shots: int) -> bool:
    s = record["settings"]
    setting = s.get("net"), s.get("ways"), s.get("shots")
    return "wide_test" in record and s.get("split") == "maml" and setting == (net, ways, shots)


def page(records: Mapping[str, Record]) -> str:
    """The whole page."""
    parts = [HEAD, SINUSOID_TEXT, "\n".join(_sinusoid_rows(records)), OMNIGLOT_TEXT, "\n".join(_omniglot_rows(records))]
    return "\n\n".join(parts) + "\n"


def write(target: Path = PAGE, folder: Path = RECORDS) -> Path:
    """Write the page from the records of `folder`."""
    target.write_text(page(read_records(folder)))
    return target
