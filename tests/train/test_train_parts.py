"""The parts of the trainer: optimiser, networks, log, checkpoints, presets, and the loop that holds them together."""

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mtml.tasks import DataError
from mtml.train.adam import FlatAdam
from mtml.train.checkpoint import load_checkpoint, save_checkpoint
from mtml.train.log import CsvLog, read_log
from mtml.train.loop import Budget, Diverged, Loop, Progress
from mtml.train.models import mlp
from mtml.train.presets import PRESETS, resolve


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestFlatAdam:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_torch_adam(self, dtype):
        ours, theirs = (mlp((3, 17, 5), seed=0).to(dtype) for _ in range(2))
        flat, adam = FlatAdam(ours.parameters(), lr=0.01), torch.optim.Adam(theirs.parameters(), lr=0.01)
        for _ in range(30):
            x = torch.randn(6, 3, dtype=dtype)
            for net, optimizer in ((ours, flat), (theirs, adam)):
                optimizer.zero_grad()
                net(x).square().sum().backward()
                optimizer.step()
        torch.testing.assert_close(weights(ours), weights(theirs))

    def test_continues_bitwise(self):
        nets = [mlp((3, 4, 1), seed=0) for _ in range(2)]
        optimizers = [FlatAdam(net.parameters(), lr=0.1) for net in nets]
        inputs = torch.randn(8, 5, 3)

        def train(index: int, rows: torch.Tensor) -> None:
            for x in rows:
                optimizers[index].zero_grad()
                nets[index](x).sum().sin().backward()
                optimizers[index].step()

        train(0, inputs)
        train(1, inputs[:4])
        model, state = nets[1].state_dict(), optimizers[1].state_dict()
        nets[1] = mlp((3, 4, 1), seed=9)
        optimizers[1] = FlatAdam(nets[1].parameters(), lr=0.1)
        nets[1].load_state_dict(model)
        optimizers[1].load_state_dict(state)
        train(1, inputs[4:])
        assert same(weights(nets[0]), weights(nets[1]))

    def test_parameters_start_on_cache_lines(self):
        net = mlp((1, 3, 3, 1))
        FlatAdam(net.parameters())
        starts = {p.data_ptr() % 64 for p in net.parameters()}
        assert len(starts) == 1
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())

    def test_number_of_threads_stays(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            net = mlp((2, 3, 1))
            FlatAdam(net.parameters()).step()
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_leaves_frozen_parameters_alone(self):
        net = mlp((2, 3, 1))
        net[0].weight.requires_grad_(False)
        assert len(FlatAdam(net.parameters()).params) == 3

    def test_errors(self):
        with pytest.raises(ValueError, match="got none"):
            FlatAdam([])
        with pytest.raises(ValueError, match="one dtype"):
            FlatAdam([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))])


class TestModels:
    def test_initialisations(self):
        published = mlp((50, 40, 40), init="finn2017", seed=0)
        assert 0.005 < published[0].weight.std() < 0.01 and published[0].weight.abs().max() <= 0.02
        he = mlp((50, 40, 40), init="he", seed=0)
        assert abs(he[0].weight.std() / math.sqrt(2 / 50) - 1) < 0.1 and not he[2].bias.any()

    def test_seed_decides_and_the_global_generator_stays(self):
        state = torch.get_rng_state()
        assert same(weights(mlp((2, 3, 1), seed=4)), weights(mlp((2, 3, 1), seed=4)))
        assert torch.equal(torch.get_rng_state(), state)
        assert [type(layer) for layer in mlp((1, 2, 1))] == [nn.Linear, nn.ReLU, nn.Linear]

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match="init: expected one of torch, finn2017, he, learn2learn, maml\\+\\+; got 'zeros'"
        ):
            mlp((1, 1), init="zeros")


class TestLog:
    def test_round_trip_and_continuation(self, tmp_path):
        path = tmp_path / "log.csv"
        columns = ["iteration", "loss", "accuracy"]
        log = CsvLog(path, columns)
        for i in (10, 20, 1_234_570):
            log.write(iteration=i, loss=1 / i)
        log.close()
        continued = CsvLog(path, columns, keep_until=20)
        continued.write(iteration=30, loss=0.5, accuracy=0.25)
        continued.close()
        rows = read_log(path)
        assert [row["iteration"] for row in rows] == [10, 20, 30]
        assert rows[0] == {"iteration": 10, "loss": 0.1} and rows[2]["accuracy"] == 0.25
        assert path.read_text().splitlines()[0] == "iteration,loss,accuracy"

    @pytest.mark.parametrize("text", [None, "a,b\n1,2\n", "iteration,loss\n1,x\n"])
    def test_errors(self, tmp_path, text):
        path = tmp_path / "log.csv"
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=r"log.csv is not a log of"):
            read_log(path)


class TestCheckpoint:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "folder" / "checkpoint.pt"
        save_checkpoint(path, {"a": torch.ones(2)}, {"seed": 1})
        assert torch.equal(load_checkpoint(path, {"seed": 1})["a"], torch.ones(2))
        assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]

    def test_a_failed_write_leaves_the_old_one(self, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint.pt"
        save_checkpoint(path, {"a": 1}, {})

        def broken(state, file):
            file.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", broken)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(path, {"a": 2}, {})
        assert load_checkpoint(path, {})["a"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_errors(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        with pytest.raises(DataError, match="no checkpoint at"):
            load_checkpoint(path, {})
        path.write_bytes(b"nonsense")
        with pytest.raises(DataError, match="is not a checkpoint"):
            load_checkpoint(path, {})
        save_checkpoint(path, {}, {"seed": 1, "shots": 5})
        with pytest.raises(DataError, match=r"made with seed 1 \(now 2\); give the same options"):
            load_checkpoint(path, {"seed": 2, "shots": 5})


class Counter:
    """Counts its steps; the loss is the given one."""

    def __init__(self, loss: float = 1.0, after: dict[int, object] | None = None) -> None:
        self.count, self.loss, self.after = 0, loss, after or {}

    def step(self) -> torch.Tensor:
        self.count += 1
        if action := self.after.get(self.count):
            action()
        return torch.full((3,), self.loss)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def loop(counter: Counter, folder: Path, budget: Budget, **options) -> Loop:
    return Loop(counter.step, {"counter": counter}, budget, folder, {"seed": 0}, log_every=10, **options)


class TestLoop:
    def test_iterations_log_and_checkpoint(self, tmp_path):
        counter = Counter(loss=0.5)
        progress = loop(counter, tmp_path, Budget(25)).run()
        assert (counter.count, progress.iteration, progress.stopped) == (25, 25, False)
        assert [(r["iteration"], r["loss"]) for r in read_log(tmp_path / "log.csv")] == [
            (10, 0.5),
            (20, 0.5),
            (25, 0.5),
        ]
        assert loop(Counter(), tmp_path, Budget(30)).run(resume=True).iteration == 30
        assert [r["iteration"] for r in read_log(tmp_path / "log.csv")] == [10, 20, 25, 30]

    def test_finished_run_resumes_to_nothing(self, tmp_path):
        loop(Counter(), tmp_path, Budget(5)).run()
        again = Counter()
        assert loop(again, tmp_path, Budget(5)).run(resume=True).iteration == 5
        assert again.count == 5

    def test_minutes(self, tmp_path):
        counter = Counter(after={i: lambda: time.sleep(0.01) for i in range(1, 1000)})
        progress = loop(counter, tmp_path, Budget(minutes=0.1 / 60)).run()
        assert 0.1 <= progress.seconds < 2 and progress.iteration == counter.count <= 11

    def test_last_iteration_may_outrun_the_minutes(self, tmp_path):
        counter = Counter(after={1: lambda: time.sleep(0.8)})
        assert loop(counter, tmp_path, Budget(minutes=0.1 / 60)).run().iteration == 1

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_saves_the_iteration_in_progress(self, tmp_path, number):
        previous = signal.getsignal(number)
        counter = Counter(after={7: lambda: os.kill(os.getpid(), number)})
        progress = loop(counter, tmp_path, Budget(1000)).run()
        assert progress.stopped and progress.iteration == counter.count in (7, 8)
        assert signal.getsignal(number) is previous
        assert loop(Counter(), tmp_path, Budget(12)).run(resume=True).iteration == 12

    def test_evaluation_is_logged_and_not_counted(self, tmp_path):
        def evaluate():
            time.sleep(0.2)
            return {"accuracy": 0.75}

        options = {"columns": ("accuracy",), "evaluate": evaluate, "evaluate_seconds": 0.0}
        progress = loop(Counter(), tmp_path, Budget(25), **options).run()
        assert [r["accuracy"] for r in read_log(tmp_path / "log.csv")] == [0.75, 0.75, 0.75]
        assert progress.seconds < 0.2

    def test_schedule_sees_the_share_of_the_budget(self, tmp_path):
        seen = []
        loop(Counter(), tmp_path, Budget(4, minutes=10), schedule=seen.append).run()
        assert seen == [0.0, 0.25, 0.5, 0.75]

    def test_divergence_stops_and_does_not_replace_the_checkpoint(self, tmp_path):
        loop(Counter(), tmp_path, Budget(20)).run()
        with pytest.raises(Diverged, match="the loss is nan at iteration 30: try a lower"):
            loop(Counter(loss=math.nan), tmp_path, Budget(50), save_seconds=0.0).run(resume=True)
        assert load_checkpoint(tmp_path / "checkpoint.pt", {})["progress"]["iteration"] == 20

    def test_earlier_checkpoint_is_announced(self, tmp_path, capsys):
        loop(Counter(), tmp_path, Budget(5)).run()
        assert loop(Counter(), tmp_path, Budget(5)).run() == Progress(5, pytest.approx(0, abs=1))
        assert "will be replaced" in capsys.readouterr().err

    def test_checkpoint_with_other_parts(self, tmp_path):
        loop(Counter(), tmp_path, Budget(5)).run()
        other = replace(loop(Counter(), tmp_path, Budget(9)), parts={"model": nn.Linear(1, 1)})
        with pytest.raises(DataError, match="does not fit"):
            other.run(resume=True)


class TestPresets:
    def test_published_rates_are_those_under_a_mean(self):
        assert PRESETS["finn2017"](5, 1).inner_lr == 2.0
        assert PRESETS["finn2017"](20, 1).inner_lr == 2.0
        assert PRESETS["finn2017"](20, 5).meta_batch == 16

    def test_settings_replace(self):
        found = resolve("mtml", 5, 1, queries=3, steps=None, per="no")
        assert found.queries == 3 and found.per is None and found.steps == PRESETS["mtml"](5, 1).steps

    @pytest.mark.parametrize("given", [("other", {}), ("mtml", {"init": "zeros"}), ("mtml", {"per": "layer"})])
    def test_unknown_names(self, given):
        with pytest.raises(DataError, match="expected one of"):
            resolve(given[0], 5, 1, **given[1])
