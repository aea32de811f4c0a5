"""Training by two ranks: the same tasks and updates as by one, decisions taken together, and an end with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases.ranks import alone, environment, free_port, together
from cases.shared_training import RUNS, session, trained

from mtml.tasks import DataError
from mtml.train import job
from mtml.train.job import own_place
from mtml.train.log import read_log
from mtml.train.ranks import ALONE, join

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


@pytest.fixture(autouse=True)
def one_process() -> Any:
    with alone():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks found; one that goes on from what one rank has trained among it."""
    pytest.importorskip("sklearn")
    with alone():
        trained("sinusoid", folder / "later two", iterations=20)
    return together(session, folder)


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The relative difference of all weights together."""
    flat = [torch.cat([p.double().reshape(-1) for p in weights]) for weights in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


class TestTogether:
    @pytest.mark.parametrize("name", RUNS)
    def test_weights_are_those_of_one_rank(self, ranks, folder, tmp_path, name):
        one = trained(name, tmp_path)
        assert apart(ranks[0][name], one) < 1e-5 < apart(trained(name, tmp_path / "other", seed=1), one)
        assert all(map(torch.equal, ranks[0][name], ranks[1][name]))  # ranks do not drift apart
        logs = [read_log(path / "log.csv") for path in (folder / name, tmp_path)]
        assert [row["iteration"] for row in logs[0]] == [row["iteration"] for row in logs[1]]
        assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-4)

    def test_a_checkpoint_of_other_numbers_of_ranks(self, ranks, folder, tmp_path):
        straight = trained("sinusoid", tmp_path)
        assert apart(trained("sinusoid", folder / "later one", resume=True), straight) < 1e-5
        assert apart(ranks[1]["later two"], straight) < 1e-5

    def test_one_rank_asked_to_stop_stops_all(self, ranks, folder):
        for who in (0, 1):
            (count, known), other = (rank["interrupted"][who] for rank in ranks)
            assert known and other == (count, True) and 17 <= count < 10**6
            saved = torch.load(folder / f"interrupted {who}" / "checkpoint.pt")["state"]
            assert saved["steps"]["count"] == saved["progress"]["iteration"] == count

    def test_one_clock(self, ranks):
        iterations, seconds = ranks[0]["by time"]
        assert ranks[1]["by time"] == (iterations, seconds) and seconds >= 0.18 and iterations > 10

    def test_losses_are_averaged_over_tasks(self, ranks, folder):
        """In step k rank 0 has one task of loss k, and rank 1 two of loss k + 1."""
        rows = read_log(folder / "interrupted 0" / "log.csv")
        assert rows[0]["loss"] == pytest.approx(5.5 + 2 / 3, rel=1e-5)

    def test_all_see_that_the_loss_diverges(self, ranks):
        assert ranks[0]["diverged"] == ranks[1]["diverged"]
        assert "the loss is nan at iteration 10" in ranks[1]["diverged"]

    def test_all_start_from_the_main_rank(self, ranks):
        assert [rank["started"] for rank in ranks] == [1, 1]

    def test_the_main_rank_alone_fails(self, ranks):
        assert ranks[0]["fails"][0] == "DataError" and ranks[1]["fails"][0] == "RankLost"
        assert ranks[1]["fails"][1].endswith("nothing was saved yet")


class TestPlace:
    @pytest.mark.parametrize(
        ("rank", "count", "found"), [(None, None, (0, 1)), ("0", "1", (0, 1)), ("3", "4", (3, 4)), (None, "1", (0, 1))]
    )
    def test_told_by_the_launcher(self, monkeypatch, rank, count, found):
        for name, value in (("RANK", rank), ("WORLD_SIZE", count)):
            if value is not None:
                monkeypatch.setenv(name, value)
        assert own_place() == found

    @pytest.mark.parametrize(("rank", "count"), [(None, "2"), ("2", "2"), ("-1", "2"), ("a", "2"), ("0", "0")])
    def test_contradictions(self, monkeypatch, rank, count):
        monkeypatch.setenv("WORLD_SIZE", count)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(DataError, match="expected 0 <= RANK < WORLD_SIZE"):
            own_place()

    def test_alone(self):
        assert join() is ALONE

    def test_of_several_the_first_speaks(self, monkeypatch, capsys):
        monkeypatch.setattr(job, "_store", dist.HashStore())
        job.say_why("first")
        job.say_why("second")
        assert capsys.readouterr().err == "error: first\n"

    def test_where_nobody_can_be_asked_all_speak(self, monkeypatch, capsys):
        """Without torchrun's store, and with one that has gone."""
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        job.say_why("first")
        for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), *environment(1, 2, free_port()).items()):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(job, "SECONDS", 0.1)
        job.say_why("second")
        assert capsys.readouterr().err == "\nerror: first\n\nerror: second\n"

    def test_nobody_there(self, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with pytest.raises(DataError, match=r"2 processes of this job do not find each other .*MASTER_ADDR.*torchrun"):
            join()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "mtml", "train", "sinusoid"]


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found by Linux's /proc")
class TestLauncher:
    pytestmark = pytest.mark.usefixtures("extras")

    @pytest.fixture
    def extras(self):
        for name in ("typer", "matplotlib"):
            pytest.importorskip(name)

    @pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
    def test_a_killed_rank_ends_the_job_with_one_line(self, tmp_path, rank):
        run = [*TORCHRUN, "--minutes", "5", "--iterations", "1000000", "--out", str(tmp_path)]
        job = subprocess.Popen(run, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.settings())
        log, deadline = tmp_path / "log.csv", time.monotonic() + 100
        while not (log.exists() and len(log.read_text().splitlines()) > 1):
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()
            time.sleep(0.05)
        ranks = sorted(children(job.pid))
        os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        errors = job.communicate(timeout=60)[1].splitlines()
        assert time.monotonic() - killed < 10 and job.returncode and not any(map(alive, ranks))
        said = [line for line in errors if "error: " in line and "torch/" not in line]
        assert len(said) == 1 and said[0].endswith(
            "error: the other process of this job was killed, has failed, or cannot be reached; nothing was saved yet"
        )

    @pytest.mark.slow
    def test_a_wrong_option_is_said_once(self, tmp_path):
        run = [*TORCHRUN, "--steps", "0", "--out", str(tmp_path)]
        done = subprocess.run(run, text=True, capture_output=True, timeout=100, env=self.settings())
        assert done.returncode and done.stderr.count("error: Invalid value for '--steps'") == 1

    def settings(self) -> dict[str, str]:
        """The environment of a job: nothing of one that the tests themselves are a part of."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
