"""`mtml train multitask`: training, resuming, results and pictures, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtml.tasks import DataError
from mtml.train.log import read_log
from mtml.train.multitask import MultiTaskRun, MultiTaskSettings, table_text
from mtml.train.multitask_groups import GROUPS, make_learner, named

SMALL = MultiTaskSettings(groups=("sinusoid", "tokens", "segmentation"), iterations=6, meta_batch=2, steps=2)


def test_results_log_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = MultiTaskRun(SMALL, tmp_path)
    progress = run.train()
    found = run.test()
    run.plot(found)
    run.save_results(progress, found)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "log.csv", "results.json", "multitask.png"}
    row = read_log(tmp_path / "log.csv")[-1]
    assert row["iteration"] == 6 and set(SMALL.groups) < set(row)
    groups = json.loads((tmp_path / "results.json").read_text())["groups"]
    assert list(groups) == list(SMALL.groups) and list(groups["tokens"]["accuracy"]) == ["0", "1", "2", "4"]
    assert groups["sinusoid"]["accuracy"] == {}
    text = table_text(found)
    assert "segmentation accuracy" in text and "sinusoid accuracy" not in text


def test_a_resumed_run_ends_as_one_without_a_break(tmp_path: Path) -> None:
    whole = MultiTaskRun(replace(SMALL, weighting="rlw"), tmp_path / "whole")
    whole.train()
    MultiTaskRun(replace(SMALL, weighting="rlw", iterations=3), tmp_path / "parts").train()
    parts = MultiTaskRun(replace(SMALL, weighting="rlw"), tmp_path / "parts")
    parts.train(resume=True)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_groups_do_not_resume(tmp_path: Path) -> None:
    MultiTaskRun(SMALL, tmp_path).train()
    with pytest.raises(DataError, match="groups 'sinusoid,tokens,segmentation'"):
        MultiTaskRun(replace(SMALL, groups=("tokens",)), tmp_path).train(resume=True)


def test_digits() -> None:
    pytest.importorskip("sklearn")
    model = make_learner(("digits",), 0.1, 0, steps=2)
    batch = next(GROUPS["digits"].stream(2, 0, 0))
    model.meta_loss({"digits": batch}).total.backward()
    assert model.trunk["digits"][0].weight.grad.abs().sum() > 0


def test_training_adapts_better() -> None:
    settings = replace(SMALL, groups=("tokens",), steps=3)
    model = make_learner(settings.groups, 0.1, 0, steps=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    stream, test = (GROUPS["tokens"].stream(8, 0, number) for number in (0, 1))
    fresh = {"tokens": next(test)}
    before = float(model.meta_loss(fresh).total.detach())
    for _ in range(60):
        optimizer.zero_grad()
        model.meta_loss({"tokens": next(stream)}).total.backward()
        optimizer.step()
    assert float(model.meta_loss(fresh).total.detach()) < 0.8 * before


@pytest.mark.parametrize("text", ["", "digits,cats"])
def test_unknown_groups_are_named(text: str) -> None:
    with pytest.raises(DataError, match="groups: expected some of digits,sinusoid"):
        named(text)
    assert named("tokens, digits,tokens") == ("tokens", "digits")
