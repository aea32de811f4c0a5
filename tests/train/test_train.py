"""Training: the engine beside the plain loop, evaluation, and both experiments from end to end."""

import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mtml
from mtml.tasks import DataError, Sinusoids
from mtml.train.compare import Comparison, compare
from mtml.train.evaluate import accuracies, estimate, losses
from mtml.train.methods import engine_step, inner_rates, make_maml, plain_losses, plain_step
from mtml.train.models import mlp
from mtml.train.omniglot import OmniglotRun, OmniglotSettings
from mtml.train.presets import resolve
from mtml.train.sinusoid import SinusoidRun, SinusoidSettings, table_text

SMALL = SinusoidSettings(iterations=40, meta_batch=3, shots=5, plain_seconds=0.2)
PLAIN_NET = {"norm": "none", "init": "torch"}  # fused, so that results are the same bits
DIGITS = OmniglotSettings(
    None, resolve("learn2learn", 5, 1, meta_batch=4, **PLAIN_NET), iterations=20, plain_seconds=0.2
)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestMethods:
    @pytest.mark.parametrize("per", [None, "all", "tensor", "element"])
    @pytest.mark.parametrize("steps", [1, 3])
    def test_engine_and_plain_loop_have_the_same_gradients(self, per, steps):
        maml = make_maml(mlp((1, 8, 1), seed=0), lr=0.05, steps=steps, loss="mse", per=per)
        batch = next(Sinusoids(4, tasks=3))
        params = list(maml.parameters())
        ours = maml.meta_loss(batch)
        plain = plain_losses(maml.module, batch, rates=inner_rates(maml), steps=steps, loss="mse")
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(loss.mean(), params) for loss in (ours, plain)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_both_steps_train(self):
        for make in (engine_step, lambda *a: plain_step(*a, "mse")):
            maml = make_maml(mlp((1, 16, 1), seed=0), lr=0.01, steps=1, loss="mse")
            step = make(maml, torch.optim.Adam(maml.parameters(), lr=0.01), itertools.repeat(next(Sinusoids(tasks=4))))
            found = [float(step().mean()) for _ in range(30)]
            assert found[-1] < 0.9 * found[0]

    def test_comparison(self):
        maml = make_maml(mlp((1, 8, 1), seed=0), lr=0.01, steps=1, loss="mse")
        before = weights(maml)
        found = compare(maml, lambda: Sinusoids(tasks=2), loss="mse", lr=0.01, seconds=0.1)
        assert found.agree and found.engine > 0 and found.plain > 0
        assert same(weights(maml), before)
        assert "they agree" in str(found)

    @pytest.mark.parametrize(("difference", "rounding"), [(1e-4, 1e-7), (1.0, 0.5), (math.nan, 1e-7), (1e-3, math.nan)])
    def test_disagreement_shows(self, difference, rounding):
        found = Comparison(2.0, 1.0, difference, rounding)
        assert not found.agree and "DISAGREE" in str(found)

    def test_flipped_relu_is_no_disagreement(self):
        found = Comparison(2.0, 1.0, 1e-3, 1e-6, 5e-15)
        assert found.agree and "rounding moved a ReLU" in str(found) and "in float64 5.0e-15" in str(found)
        for gradients, exact in ((1e-3, 1e-4), (0.3, 5e-15), (math.nan, 5e-15), (1e-3, math.nan)):
            assert not Comparison(2.0, 1.0, gradients, 1e-6, exact).agree

    def test_comparison_in_float64(self):
        maml = make_maml(mlp((1, 8, 1), seed=0), lr=0.01, steps=2, loss="mse")
        assert compare(maml, lambda: Sinusoids(tasks=2), loss="mse", lr=0.01, seconds=0.01).exact < 1e-12

    def test_rounding_of_the_loop_itself_is_no_disagreement(self):
        assert Comparison(2.0, 1.0, 2e-4, 1e-4).agree


class TestEvaluate:
    def test_estimate(self):
        found = estimate(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        assert found.mean == 0.5 and found.ci95 == pytest.approx(1.96 * 0.57735 / 2, rel=1e-4)
        assert math.isnan(estimate(torch.ones(1)).ci95)

    def test_losses_and_accuracies_by_steps(self):
        maml = make_maml(mlp((64, 32, 5), seed=0), lr=0.5, steps=1, loss="cross_entropy")
        run = OmniglotRun(DIGITS, Path("unused"))
        batch = run.test.batch(0)
        found = [accuracies(maml, batch, k) for k in (0, 5)]
        assert found[0].shape == (50,) and 0.1 < found[0].mean() < 0.35 < found[1].mean()
        assert losses(maml, batch, 5).mean() < losses(maml, batch, 0).mean()


class TestSinusoid:
    @pytest.mark.parametrize("options", [{}, {"meta_sgd": True, "steps": 2}])
    def test_resuming_is_bitwise(self, tmp_path, options):
        settings = replace(SMALL, **options)
        straight = SinusoidRun(settings, tmp_path / "a")
        straight.train()
        SinusoidRun(replace(settings, iterations=20), tmp_path / "b").train()
        resumed = SinusoidRun(settings, tmp_path / "b")
        assert resumed.train(resume=True).iteration == 40
        assert same(weights(straight.maml), weights(resumed.maml))
        assert not same(weights(straight.maml), weights(SinusoidRun(settings, tmp_path).maml))

    def test_report(self, tmp_path):
        pytest.importorskip("matplotlib")
        run = SinusoidRun(SMALL, tmp_path)
        progress = run.train()
        table, comparison = run.table(), run.compare()
        assert sorted(table) == [5, 10, 20] and all(0.1 < e.mean < 20 for e in table.values())
        assert run.plot().stat().st_size > 10_000 and comparison.agree
        text = table_text(table, SMALL, progress.iteration)
        assert "1.13" in text and "0.50" in text and f"{table[5].mean:.3f}" in text
        results = json.loads(run.save_results(progress, table, comparison).read_text())
        assert results["mse"]["5"]["mean"] == table[5].mean and results["iterations"] == 40

    def test_curves_change_with_adaptation(self, tmp_path):
        tasks = SinusoidRun(SMALL, tmp_path).shown()
        for task in tasks:
            assert list(task.curves) == [0, 1, 5, 10]
            assert len({curve.tobytes() for curve in task.curves.values()}) == 4
        assert np.array_equal(tasks[0].curves[0], tasks[1].curves[0])  # before adaptation there is one network

    def test_another_setting_is_not_continued(self, tmp_path):
        SinusoidRun(replace(SMALL, iterations=1), tmp_path).train()
        with pytest.raises(DataError, match=r"shots 5 \(now 7\)"):
            SinusoidRun(replace(SMALL, shots=7), tmp_path).train(resume=True)


class TestDigits:
    pytestmark = pytest.mark.usefixtures("sklearn")

    @pytest.fixture
    def sklearn(self):
        pytest.importorskip("sklearn")

    @pytest.mark.parametrize("options", [{}, {"per": "tensor", "cosine": True}])
    def test_resuming_is_bitwise(self, tmp_path, options):
        settings = replace(DIGITS, preset=replace(DIGITS.preset, **options))
        straight = OmniglotRun(settings, tmp_path / "a")
        straight.train()
        stopped = OmniglotRun(settings, tmp_path / "b")
        stopped.tasks.source = _Interrupting(stopped.tasks.source, 9)
        assert stopped.train().stopped
        resumed = OmniglotRun(settings, tmp_path / "b")
        assert resumed.train(resume=True).iteration == 20
        assert same(weights(straight.maml), weights(resumed.maml))

    def test_plain_way_trains_the_same_network(self, tmp_path):
        """Two steps, over which rounding does not grow."""
        runs = [OmniglotRun(replace(DIGITS, iterations=2, plain=p), tmp_path / str(p)) for p in (False, True)]
        for run in runs:
            run.train()
        torch.testing.assert_close(weights(runs[0].maml), weights(runs[1].maml), rtol=1e-3, atol=1e-3)

    def test_report(self, tmp_path):
        pytest.importorskip("matplotlib")
        run = OmniglotRun(replace(DIGITS, iterations=60, test_tasks=60), tmp_path)
        progress = run.train()
        found = run.evaluate()
        wide = run.evaluate_wide()
        assert wide is not None and wide.true.shape[1] > found.true.shape[1]  # 1 query a class as published, and 15
        classes = run.per_class(found)
        assert found.tasks == 60 and len(found.accuracy) == 2
        assert found.accuracy[0].mean < found.accuracy[1].mean
        assert [p.name for p in run.plot(found, classes)] == ["digits.png", "tasks.png", "characters.png"]
        comparison = run.compare()
        assert comparison.agree
        results = json.loads(run.save_results(progress, found, wide, classes, comparison).read_text())
        assert results["accuracy"][1]["mean"] == found.accuracy[1].mean
        assert results["published"] == {} and results["macro_f1"] == classes.macro_f1

    def test_too_few_classes_are_found_before_training(self, tmp_path):
        with pytest.raises(DataError, match="11 ways need 11 classes, but there are 10"):
            OmniglotRun(replace(DIGITS, ways=11), tmp_path)


class _Interrupting:
    """A source of tasks during whose batch `at` the user presses Ctrl-C."""

    def __init__(self, source, at: int) -> None:
        self.source, self.at = source, at
        self.position = source.position

    def batch(self, index: int):
        if index == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.source.batch(index)


def test_package_has_the_learner():
    assert issubclass(mtml.MetaSGD, mtml.MAML)
