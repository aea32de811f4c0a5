"""Ctrl-C during training and beside it."""

from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from cases.command_line import SINUSOID, START, Steps, interrupt, raising, run_of

from mtml.train import loop as loops
from mtml.train import plots, record
from mtml.train.checkpoint import load_checkpoint
from mtml.train.log import read_log
from mtml.train.sinusoid import SinusoidRun
from mtml_kernels.doctor import probes


class TestInterrupt:
    def saved(self, folder: Path) -> int:
        state = load_checkpoint(folder / "checkpoint.pt", {})
        assert state["progress"]["iteration"] == state["steps"]["count"]
        return int(state["steps"]["count"])

    def test_second_one_ends_at_once_and_says_what_is_kept(self, folder):
        with pytest.raises(KeyboardInterrupt) as raised:
            run_of(Steps({7: lambda: (interrupt(), interrupt())}), folder).run()
        assert raised.value.__notes__ == ["nothing was saved yet"]
        run_of(Steps({}), folder, 20).run()
        with pytest.raises(KeyboardInterrupt) as raised:
            run_of(Steps({33: lambda: (interrupt(), interrupt())}), folder).run(resume=True)
        assert "checkpoint.pt holds iteration 20, from which --resume continues" in raised.value.__notes__[0]
        assert self.saved(folder) == 20 and {p.name for p in folder.iterdir()} == {"checkpoint.pt", "log.csv"}

    def test_during_a_save_the_save_is_finished(self, folder, monkeypatch):
        save = loops.save_checkpoint

        def interrupted(*arguments: object) -> None:
            monkeypatch.setattr(loops, "save_checkpoint", save)
            interrupt()
            save(*arguments)

        monkeypatch.setattr(loops, "save_checkpoint", interrupted)
        progress = run_of(Steps({}), folder, save_seconds=0.0).run()
        assert progress.stopped and self.saved(folder) == progress.iteration < 1000

    def test_after_the_last_iteration_it_still_counts(self, folder, monkeypatch):
        save = loops.save_checkpoint
        monkeypatch.setattr(loops, "save_checkpoint", lambda *arguments: (save(*arguments), interrupt()))
        assert run_of(Steps({}), folder, 20).run().stopped and self.saved(folder) == 20

    def test_evaluation_is_not_waited_for(self, folder):
        calls = []

        def evaluate() -> dict[str, float]:
            calls.append(1)
            interrupt()
            pytest.fail("the evaluation went on")

        options = {"columns": ("accuracy",), "evaluate": evaluate, "evaluate_seconds": 0.0}
        progress = run_of(Steps({}), folder, **options).run()
        assert progress.stopped and self.saved(folder) == progress.iteration == 10 and len(calls) == 1
        assert [row["iteration"] for row in read_log(folder / "log.csv")] == [10]

    def test_long_iteration_is_announced(self, folder, monkeypatch, capfd):
        monkeypatch.setattr(loops, "PATIENCE", -1.0)
        assert run_of(Steps({7: interrupt}), folder).run().stopped
        assert "stopping after this iteration; Ctrl-C again ends at once" in capfd.readouterr().err

    @pytest.mark.parametrize("where", ["table", "plot", "compare", "save_results"])
    def test_after_training(self, fails, monkeypatch, folder, quick, where):
        monkeypatch.setattr(SinusoidRun, where, raising(KeyboardInterrupt()))
        line = fails(*SINUSOID, status=130)
        assert "interrupted; what was trained is saved in runs/sinusoid: `mtml train sinusoid --out" in line

    def test_before_training(self, fails, monkeypatch):
        monkeypatch.setattr(SinusoidRun, "__init__", raising(KeyboardInterrupt()))
        assert fails(*SINUSOID, status=130) == "error: interrupted"

    @pytest.mark.parametrize("command", ["record", "plot", "doctor"])
    def test_other_commands(self, fails, monkeypatch, folder, command):
        owner, name = {"record": (record, "record_run"), "plot": (plots, "plot_log"), "doctor": (probes, "report")}[
            command
        ]
        monkeypatch.setattr(owner, name, raising(KeyboardInterrupt()))
        assert fails(*START.get(command, ["doctor"]), status=130) == "error: interrupted"
