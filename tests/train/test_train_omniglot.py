"""`mtml train omniglot` in full: networks, presets, splits, metrics, pictures and the record of a run."""

import csv
import itertools
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
from cases.omniglot_files import make_omniglot, zip_parts
from sklearn.metrics import classification_report

from mtml.tasks import DataError, ImageEpisodes, TaskBatch
from mtml.train.evaluate import Evaluation, accuracies, classify
from mtml.train.log import read_log
from mtml.train.methods import engine_step, inner_rates, make_maml, plain_losses
from mtml.train.metrics import per_class
from mtml.train.models import adapted_names, conv4, mlp
from mtml.train.omniglot import OmniglotRun, OmniglotSettings, table_text
from mtml.train.presets import PRESETS, default_preset, resolve, step_weights
from mtml.train.published import published
from mtml.train.record import record_run

pytestmark = pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
SMALL = {"test_tasks": 20, "log_tasks": 10, "plain_seconds": 0.1, "iterations": 6}


@pytest.fixture(scope="module")
def zips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("omniglot")
    return zip_parts(make_omniglot(root / "folders"), root / "zips")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))


def settings(data: Path | None = None, net: str = "mlp", preset: str = "finn2017", **options) -> OmniglotSettings:
    given = {name: options.pop(name) for name in ("meta_batch", "cosine", "per", "steps") if name in options}
    chosen = resolve(preset, options.get("ways", 5), options.get("shots", 1), net=net, **{"meta_batch": 2} | given)
    return OmniglotSettings(data, chosen, net=net, **SMALL | options)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def tasks(shape: tuple[int, ...], count: int = 2, ways: int = 5) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)
    x, qx = (torch.rand(count, ways * n, *shape, generator=generator, dtype=torch.float64) for n in (1, 2))
    y = torch.arange(ways)
    return TaskBatch(x, y.repeat(count, 1), qx, y.repeat_interleave(2).repeat(count, 1))


class TestNetworks:
    def test_conv4_is_the_published_network(self):
        net = conv4(5, init="finn2017", seed=0)
        kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 4 + [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
        assert [type(layer) for layer in net] == kinds
        assert [tuple(c.weight.shape) for c in net if isinstance(c, nn.Conv2d)] == [(64, 1, 3, 3)] + [
            (64, 64, 3, 3)
        ] * 3
        assert net[:12](torch.rand(3, 1, 28, 28)).shape == (3, 64, 2, 2)
        assert all(c.stride == (2, 2) and not c.bias.any() for c in net if isinstance(c, nn.Conv2d))
        bound = math.sqrt(6 / (64 * 9 * 2))
        assert 0.95 * bound < net[3].weight.abs().max() <= bound
        assert 0.7 < net[-1].weight.std() < 1.3 and not net[-1].bias.any()

    def test_smaller_images_have_fewer_layers(self):
        net = conv4(3, side=8, filters=4)
        assert sum(isinstance(layer, nn.Conv2d) for layer in net) == 2 and net(torch.rand(2, 1, 8, 8)).shape == (2, 3)

    @pytest.mark.parametrize("make", [lambda **o: mlp((9, 8, 6, 3), **o), lambda **o: conv4(3, side=8, filters=4, **o)])
    def test_normalisation(self, make):
        for norm, trained, adapted in (("bias", 2, 0), ("affine", 4, 4), ("meta-affine", 4, 0)):
            net = make(norm=norm, init="finn2017")
            layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
            assert len(layers) == 2 and all(m.running_mean is None for m in layers.values())
            own = [(f"{n}.{k}", p) for n, m in layers.items() for k, p in m.named_parameters()]
            assert sum(p.requires_grad for _, p in own) == trained
            names = adapted_names(net, norm) or [n for n, p in net.named_parameters() if p.requires_grad]
            assert sum(name in names for name, _ in own) == adapted
            assert {n for n, _ in net.named_parameters()} - {n for n, _ in own} <= set(names)
        assert not any("BatchNorm" in type(m).__name__ for m in make(norm="none"))

    def test_mode_makes_no_difference(self):
        net, x = conv4(3, side=8, filters=4, norm="affine"), torch.rand(4, 1, 8, 8)
        assert torch.equal(net.train()(x), net.eval()(x))

    def test_learn2learn_draws_the_scales(self):
        scale = conv4(5, init="learn2learn", norm="affine", seed=0)[1].weight
        assert 0 <= scale.min() < 0.1 and 0.9 < scale.max() <= 1

    def test_seed_decides(self):
        nets = [conv4(5, side=8, filters=4, init="finn2017", seed=seed) for seed in (1, 1, 2)]
        assert torch.equal(nets[0][0].weight, nets[1][0].weight) and not torch.equal(
            nets[0][0].weight, nets[2][0].weight
        )

    def test_unknown_norm(self):
        with pytest.raises(ValueError, match="norm: expected one of none, bias, affine, meta-affine; got 'layer'"):
            conv4(5, norm="layer")


class TestPresets:
    def test_published_settings(self):
        few, many = resolve("finn2017", 5, 1, net="conv4"), resolve("finn2017", 20, 5, net="conv4")
        assert (few.steps, few.test_steps, few.meta_batch, few.inner_lr, few.queries) == (1, 3, 32, 2.0, 1)
        assert (many.steps, many.test_steps, many.meta_batch, many.inner_lr, many.queries) == (5, 5, 16, 2.0, 5)
        assert few.norm == "bias" and few.outer_lr == 1e-3 and few.iterations == 60_000
        plus = resolve("maml++", 20, 1, net="conv4")
        assert (plus.steps, plus.inner_lr, plus.per, plus.rates_per_step) == (5, 0.1, "tensor", True)

    def test_budget(self):
        none = {"iterations": None}
        assert settings(Path("x"), **none).budget.iterations == 60_000
        assert settings(Path("x"), preset="mtml", **none).budget.minutes == 20
        assert settings(None, **none).budget.minutes == 1
        assert settings(Path("x"), minutes=2, **none).budget.iterations is None

    def test_default(self):
        assert (default_preset("mlp"), default_preset("conv4")) == ("mtml", "finn2017")

    def test_step_weights_move_to_the_last_step(self):
        preset = PRESETS["maml++"](5, 1)
        assert step_weights(preset, 0.0) == pytest.approx([0.2] * 5)
        half = step_weights(preset, 0.05)
        assert half == pytest.approx([0.1] * 4 + [0.6]) and sum(half) == pytest.approx(1)
        assert step_weights(preset, 0.0999)[0] == pytest.approx(0.03 / 5)
        assert step_weights(preset, 0.1) is None and step_weights(PRESETS["finn2017"](5, 1), 0.0) is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"net": "resnet"}, "net: expected one of mlp, conv4; got 'resnet'"),
            ({"name": "mtml", "net": "conv4"}, r"preset: expected one of finn2017, .* with --net conv4, got 'mtml'"),
            ({"norm": "layer"}, "norm: expected one of none, bias, affine, meta-affine; got 'layer'"),
            ({"name": "maml++", "test_steps": 7}, r"test-steps: expected at most the 5 steps .* got 7. Raise --steps"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(DataError, match=message):
            resolve(arguments.pop("name", "finn2017"), 5, 1, **arguments)

    def test_settings_follow_each_other(self):
        assert resolve("maml++", 5, 1, steps=2).test_steps == 2
        without = resolve("maml++", 5, 1, per="no", test_steps=7, norm="none")
        assert (without.rates_per_step, without.test_steps, without.batch_norm) == (False, 7, "module")


class TestGradients:
    @pytest.mark.parametrize("net", ["mlp", "conv4"])
    @pytest.mark.parametrize("preset", ["finn2017", "learn2learn", "maml++"])
    def test_learner_and_plain_loop_agree(self, net, preset):
        chosen = resolve(preset, 5, 1, net=net, steps=2)
        options = {"init": "he", "norm": chosen.norm, "seed": 0}
        model = conv4(5, side=8, filters=4, **options) if net == "conv4" else mlp((64, 12, 5), **options)
        maml = make_maml(
            model.double(),
            lr=0.1,
            steps=2,
            loss="cross_entropy",
            per=chosen.per,
            rates_per_step=chosen.rates_per_step,
            params=adapted_names(model, chosen.norm),
            batch_norm=chosen.batch_norm,
        )
        batch, step = tasks((1, 8, 8) if net == "conv4" else (64,)), step_weights(chosen, 0.02)
        params = [p for p in maml.parameters() if p.requires_grad]
        ours = maml.meta_loss(batch, step_weights=step)
        rates = inner_rates(maml)
        assert ("1.weight" in rates) == (preset == "learn2learn") and ("1.bias" in rates) == (preset == "learn2learn")
        plain = plain_losses(maml.module, batch, rates=rates, steps=2, loss="cross_entropy", weights=step)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
        grads = [torch.autograd.grad(loss.mean(), params) for loss in (ours, plain)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)

    def test_multi_step_weights_are_used(self):
        maml = make_maml(mlp((64, 8, 5), seed=0).double(), lr=0.5, steps=3, loss="cross_entropy")
        seen = itertools.cycle([[0.5, 0.25, 0.25], None])
        step = engine_step(
            maml, torch.optim.SGD(maml.parameters(), lr=0.0), itertools.repeat(tasks((64,))), lambda: next(seen)
        )
        by_step = [maml.meta_loss(tasks((64,)), steps=k).detach() for k in (1, 2, 3)]
        torch.testing.assert_close(step(), 0.5 * by_step[0] + 0.25 * by_step[1] + 0.25 * by_step[2])
        torch.testing.assert_close(step(), by_step[2])


class TestMetrics:
    NAMES = tuple(f"Alphabet/character{i:02d}" for i in range(6))

    @pytest.fixture
    def found(self) -> Evaluation:
        """Tasks of 3 classes out of the first five of six; predictions within the task, mostly right."""
        rng = np.random.default_rng(0)
        drawn = np.stack([rng.permutation(5)[:3] for _ in range(40)])
        true = drawn.repeat(4, axis=1)
        wrong = np.take_along_axis(drawn, rng.integers(3, size=true.shape), 1)
        return Evaluation([], drawn, true, np.where(rng.random(true.shape) < 0.7, true, wrong))

    def test_against_scikit_learn(self, found):
        ours = per_class(found, self.NAMES)
        report = classification_report(found.true.ravel(), found.named.ravel(), output_dict=True)
        for i in range(5):
            assert ours.recall[i] == pytest.approx(report[str(i)]["recall"])
            assert ours.f1[i] == pytest.approx(report[str(i)]["f1-score"])
            assert ours.tasks[i] == (found.drawn == i).sum()
        assert ours.macro_recall == pytest.approx(report["macro avg"]["recall"])
        assert ours.macro_f1 == pytest.approx(report["macro avg"]["f1-score"])

    def test_class_in_no_task_has_no_numbers(self, found, tmp_path):
        ours = per_class(found, self.NAMES)
        assert ours.tasks[5] == 0 and math.isnan(ours.recall[5]) and math.isnan(ours.f1[5])
        rows = list(csv.DictReader(ours.write(tmp_path / "characters.csv").open()))
        assert [row["character"] for row in rows[:-1]] == [self.NAMES[i] for i in ours.by_difficulty()]
        assert [float(row["f1"]) for row in rows[:-1]] == sorted(float(row["f1"]) for row in rows[:-1])
        assert rows[-1] == {"character": self.NAMES[5], "tasks": "0", "recall": "", "f1": ""}

    def test_classify_knows_the_characters(self):
        """A network that looks at one pixel, in which the class is written, is right about every character."""
        images = np.zeros((7, 6, 4), np.uint8)
        images[..., 0] = 36 * np.arange(7)[:, None]
        episodes = ImageEpisodes(images, ways=3, shots=1, queries=2, tasks=4)
        maml = make_maml(mlp((4, 16, 3), init="he", seed=0), lr=0.5, steps=1, loss="cross_entropy")
        found = classify(maml, episodes, tasks=6, steps=2)
        assert found.tasks == 6 and len(found.accuracy) == 3 and found.named.shape == (6, 6)
        expected = torch.cat([accuracies(maml, episodes.batch(i), 2) for i in range(2)])[:6]
        assert found.accuracy[2].mean == pytest.approx(float(expected.mean()))
        assert (found.true == found.named).mean() == pytest.approx(float(expected.mean()))
        assert all(set(named) <= set(drawn) for named, drawn in zip(found.named, found.drawn, strict=True))

    def test_missing_scikit_learn(self, found, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
        with pytest.raises(DataError, match=r'pip install "mtml-kernels\[train\]"'):
            per_class(found, self.NAMES)


class TestRuns:
    @pytest.mark.parametrize(
        ("net", "preset", "options"),
        [
            ("mlp", "finn2017", {}),
            ("conv4", "finn2017", {"split": "background"}),
            ("mlp", "learn2learn", {}),
            ("mlp", "maml++", {"validation": 5}),
            ("mlp", "mtml", {}),
        ],
    )
    def test_from_training_to_results(self, zips, tmp_path, net, preset, options):
        run = OmniglotRun(settings(zips, net, preset, **options), tmp_path)
        progress = run.train()
        assert progress.iteration == 6
        found, wide = run.evaluate(), run.evaluate_wide()
        classes = run.per_class(wide or found)
        assert len(found.accuracy) == run.settings.preset.test_steps + 1 and found.tasks == 20
        assert len(classes.names) == len(run.images.test) and classes.names[0].count("/") == 1
        saved = json.loads(run.save_results(progress, found, wide, classes, None).read_text())
        # as published, with a second test where that is not 15 queries, or as many as there are
        most = min(15, run.images.test.shape[1] - 1)
        tested = most if preset == "mtml" else 1
        assert saved["test"]["queries_per_class"] == tested and found.true.shape == (20, 5 * tested)
        assert (wide is None) == (preset == "mtml") == (saved["wide_test"] is None)
        assert wide is None or (wide.true.shape == (20, 5 * most) and saved["wide_test"]["queries_per_class"] == most)
        assert saved["settings"]["net"] == net and str(zips) not in json.dumps(saved)
        assert saved["published"] == ({} if options.get("split") else published(net, 5, 1))
        text = table_text(run, found, wide, classes)
        assert ("MAML, published" in text) == ("split" not in options) and "raise --test-tasks" in text
        assert ("own batch statistics" in text) == (preset != "mtml")
        assert (tmp_path / "characters.csv").read_text().startswith("character,tasks,recall,f1\n")

    @pytest.mark.parametrize(
        ("net", "preset"), [("mlp", "finn2017"), ("conv4", "finn2017"), ("conv4", "maml++"), ("mlp", "learn2learn")]
    )
    def test_resuming(self, tmp_path, net, preset):
        """To the bit where the engine runs it; elsewhere the general path chooses by measuring, and Adam makes steps of
        the rounding in gradients that are zero (biases before a normalisation)."""
        long = settings(net=net, preset=preset, cosine=False)
        long = replace(long, preset=replace(long.preset, multi_step=0.0), iterations=4)
        straight = OmniglotRun(long, tmp_path / "a")
        straight.train()
        OmniglotRun(replace(long, iterations=2), tmp_path / "b").train()
        resumed = OmniglotRun(long, tmp_path / "b")
        assert resumed.train(resume=True).iteration == 4
        batch = resumed.test.batch(0)
        if resumed.maml.explain(batch).to_dict()["path"] != "general":
            assert all(map(torch.equal, weights(straight.maml), weights(resumed.maml)))
        losses = [run.maml.meta_loss(batch).mean().detach() for run in (straight, resumed, OmniglotRun(long, tmp_path))]
        torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)
        assert abs(losses[2] - losses[0]) > 2 * abs(losses[1] - losses[0])
        assert resumed.tasks.position == 4 and int(resumed.optimizer.steps) == 4

    def test_another_network_or_length_is_not_continued(self, tmp_path):
        OmniglotRun(settings(iterations=1), tmp_path).train()
        with pytest.raises(DataError, match=r"net 'mlp' \(now 'conv4'\)"):
            OmniglotRun(settings(net="conv4"), tmp_path).train(resume=True)
        OmniglotRun(settings(preset="maml++", iterations=1), tmp_path).train()
        with pytest.raises(DataError, match=r"iterations 1 \(now 6\)"):
            OmniglotRun(settings(preset="maml++"), tmp_path).train(resume=True)

    def test_schedules(self, tmp_path):
        run = OmniglotRun(settings(preset="maml++"), tmp_path)
        run._schedule(0.0)
        assert run.optimizer.lr == 1e-3 and run._weights == pytest.approx([0.2] * 5)
        run._schedule(1.0)
        assert run.optimizer.lr == pytest.approx(1e-5) and run._weights is None

    def test_published_settings_learn(self, tmp_path):
        run = OmniglotRun(settings(net="conv4", iterations=40, meta_batch=16), tmp_path)
        run.train()
        found = run.evaluate()
        assert found.accuracy[0].mean < 0.3 and found.accuracy[3].mean > found.accuracy[0].mean + 0.15

    def test_split_of_the_digits(self, tmp_path):
        with pytest.raises(DataError, match="split: expected Omniglot for 'background', got scikit-learn's digits"):
            OmniglotRun(settings(split="background"), tmp_path)
        with pytest.raises(DataError, match="split: expected one of maml, background; got 'lake'"):
            OmniglotRun(settings(split="lake"), tmp_path)

    @pytest.mark.parametrize("preset", ["finn2017", "learn2learn", "maml++"])
    def test_comparison_and_plain_training(self, tmp_path, preset):
        run = OmniglotRun(settings(net="conv4", preset=preset, plain_seconds=0.01), tmp_path)
        assert run.compare().agree
        plain = OmniglotRun(settings(net="conv4", preset=preset, plain=True, iterations=2), tmp_path)
        assert plain.train().iteration == 2 and plain.compare() is None

    def test_published_figures(self):
        assert published("conv4", 5, 1)["MAML"] == 0.987 and published("mlp", 5, 1) == {"MAML": 0.897}
        assert published("conv4", 20, 1)["MAML++"] == 0.9765 and published("conv4", 7, 1) == {}


class TestPictures:
    @pytest.mark.parametrize(("ways", "shots"), [(5, 2), (8, 1)])
    def test_pages_of_tasks(self, tmp_path, ways, shots):
        from PIL import Image

        run = OmniglotRun(
            settings(ways=ways, shots=shots, net="conv4" if shots == 1 else "mlp", iterations=2), tmp_path
        )
        run.train()
        found = run.evaluate()
        tasks = run.shown()
        assert len(tasks) == 6 and tasks[0].support.shape == (ways, 8, 8)
        assert all(
            task.query.shape == (2 * ways, 8, 8) and sorted(set(task.truth)) == list(range(ways)) for task in tasks
        )
        for picture in run.plot(found, run.per_class(found)):
            image = Image.open(picture).convert("RGB")
            assert min(image.size) > 500 and len(image.getcolors(1 << 20)) > 100, picture
        colours = np.asarray(Image.open(tmp_path / "tasks.png").convert("RGB")).reshape(-1, 3)
        green, red = ((colours == c).all(1).sum() for c in ((44, 160, 44), (214, 39, 40)))
        right = sum(int((task.after == task.truth).sum()) for task in tasks)
        assert (green > 0) == (right > 0) and red > 0


class TestRecord:
    def test_files_and_thinned_log(self, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        rows = [f"{i},{i / 10},0.5,{'0.9' if i == 7 else ''}," for i in range(1, 101)]
        (folder / "log.csv").write_text("\n".join(["iteration,seconds,loss,accuracy,ci95", *rows]) + "\n")
        (folder / "results.json").write_text("{}")
        (folder / "tasks.png").write_bytes(b"picture")
        written = record_run(folder, tmp_path / "kept" / "conv4", rows=10)
        assert {p.name for p in written} == {"conv4.json", "conv4-tasks.png", "conv4.csv"}
        found = read_log(tmp_path / "kept" / "conv4.csv")
        assert [int(r["iteration"]) for r in found] == [7, *range(10, 101, 10)]
        assert found[0]["accuracy"] == 0.9

    def test_unfinished(self, tmp_path):
        with pytest.raises(DataError, match=r"folder: expected a finished run with results\.json"):
            record_run(tmp_path, tmp_path / "kept")


class TestCommand:
    @pytest.fixture
    def command(self):
        pytest.importorskip("typer")
        from typer.testing import CliRunner

        from mtml.train.commands import app

        def run(*arguments: str | Path, status: int = 0) -> str:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = CliRunner().invoke(app, [str(a) for a in arguments])
            assert result.exit_code == status, result.output + repr(result.exception)
            return result.output

        return run

    def test_conv4_and_its_record(self, command, zips, tmp_path):
        options = ["--net", "conv4", "--meta-batch", "2", "--iterations", "2", "--test-tasks", "10"]
        output = command(
            "train", "omniglot", "--data", zips, *options, "--plain-seconds", "0.1", "--out", tmp_path / "run"
        )
        assert "2 inner" not in output and "1 inner step(s) at 2; conv4" in output
        assert re.search(r"MAML, published +98.70 %", output) and re.search(
            r"first-order MAML, published +98.30", output
        )
        assert "macro average over 5 classes: recall" in output
        assert output.count("picture: ") == 3 and "characters.csv" in output
        names = command("record", tmp_path / "run", tmp_path / "kept" / "conv4").split()
        assert len(names) == 6 and all(Path(name).exists() for name in names)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--net", "resnet"], "net: expected one of mlp, conv4"),
            (["--net", "conv4", "--preset", "mtml"], "with --net conv4, got 'mtml'"),
            (["--split", "background"], "name Omniglot's folder with --data"),
            (["--preset", "maml++", "--test-steps", "9"], "test-steps: expected at most the 5 steps"),
            (["--norm", "group"], "norm: expected one of"),
        ],
    )
    def test_contradictions(self, command, tmp_path, arguments, message):
        output = command("train", "omniglot", *arguments, "--out", tmp_path, status=2)
        assert message in output and "Traceback" not in output and not (tmp_path / "log.csv").exists()
