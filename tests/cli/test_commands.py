"""The command line: what it prints, how it ends, and that it imports little."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner

import mtml.train.compare
from mtml.cli import main
from mtml.train.commands import app
from mtml.train.log import read_log

SINUSOID = ["train", "sinusoid", "--meta-batch", "2", "--shots", "5", "--plain-seconds", "0.1"]
OMNIGLOT_FILES = {"checkpoint.pt", "log.csv", "results.json", "characters.csv", "tasks.png", "characters.png"}
DIGITS = ["train", "omniglot", "--meta-batch", "2", "--plain-seconds", "0.1", "--learn-lr", "no", "--no-cosine"]


def run(*arguments: str | Path, status: int = 0) -> str:
    """What the command prints; it must end with `status`."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def process(*arguments: str | Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mtml", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


class TestSinusoid:
    def test_everything_it_shows(self, tmp_path):
        output = run(*SINUSOID, "--iterations", "120", "--out", tmp_path)
        assert "sinusoid (finn2017): 120 meta-iterations of 2 tasks, 5 shots" in output
        assert "MAML, published" in output and "1.13" in output and "0.63" in output
        assert re.search(r"fused engine +[\d.]+ meta-iterations/s", output)
        assert re.search(r"ratio +[\d.]+", output) and "they agree" in output
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "log.csv", "results.json", "sinusoid.png"}
        assert [row["iteration"] for row in read_log(tmp_path / "log.csv")] == [100, 120]

    def test_resume(self, tmp_path):
        run(*SINUSOID, "--iterations", "10", "--out", tmp_path)
        assert "30 meta-iterations in" in run(*SINUSOID, "--iterations", "30", "--out", tmp_path, "--resume")
        output = run(*SINUSOID, "--seed", "1", "--out", tmp_path, "--resume", status=2)
        assert "error: resume:" in output and "seed 0 (now 1)" in output

    def test_disagreeing_gradients_are_a_failure(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mtml.train.compare, "_gradient_differences", lambda *_: (0.3, 1e-6))
        output = run(*SINUSOID, "--iterations", "5", "--out", tmp_path, status=1)
        assert "THEY DISAGREE" in output

    def test_divergence_is_one_line(self, tmp_path):
        output = run(*SINUSOID, "--iterations", "300", "--inner-lr", "1e9", "--out", tmp_path, status=2)
        assert re.search(r"error: the loss is (nan|inf) at iteration 100: try a lower --inner-lr", output)
        assert "Traceback" not in output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--init", "zeros"], "one of torch, finn2017, he"),
            (["--tasks", "cosines"], "one of finn2017, meta-sgd"),
            (["--steps", "0"], "'--steps'"),
            (["--resume"], "no checkpoint at"),
        ],
    )
    def test_bad_options(self, tmp_path, arguments, message):
        assert message in run(*SINUSOID, *arguments, "--out", tmp_path, status=2)

    def test_interrupt_saves_and_says_how_to_go_on(self, tmp_path):
        child = process(*SINUSOID, "--iterations", "100000000", "--out", tmp_path)
        while not (log := tmp_path / "log.csv").exists() or len(log.read_text().splitlines()) < 3:
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 130, errors
        assert "--resume` continues" in output and "Traceback" not in errors
        done = int(re.search(r"(\d+) meta-iterations in", output)[1])
        more = str(done + 5)
        assert f"{more} meta-iterations in" in run(*SINUSOID, "--iterations", more, "--out", tmp_path, "--resume")


class TestMultiTask:
    def test_everything_it_shows(self, tmp_path):
        options = ["--groups", "tokens,sinusoid", "--meta-batch", "2", "--steps", "2", "--out", tmp_path]
        output = run("train", "multitask", "--iterations", "4", *options)
        assert "multitask (tokens, sinusoid): 4 meta-iterations of 2 tasks a group" in output
        assert "tokens accuracy" in output and (tmp_path / "multitask.png").exists()
        assert "6 meta-iterations in" in run("train", "multitask", "--iterations", "6", *options, "--resume")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--groups", "cats"], "groups: expected some of"), (["--weighting", "best"], "expected one of sum")],
    )
    def test_bad_options(self, tmp_path, arguments, message):
        assert message in run("train", "multitask", *arguments, "--out", tmp_path, status=2)


class TestOmniglot:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))

    def test_digits(self, tmp_path):
        pytest.importorskip("sklearn")
        out = tmp_path / "run"
        output = run(*DIGITS, "--iterations", "60", "--out", out)
        assert "scikit-learn's digits: 5 ways, 1 shots" in output
        assert "before adaptation" in output and "after 1 step " in output and "they agree" in output
        assert {p.name for p in out.iterdir()} == OMNIGLOT_FILES | {"digits.png"}
        settings = json.loads((out / "results.json").read_text())["settings"]
        assert settings["per"] is None and settings["cosine"] is False and settings["meta_batch"] == 2

    def test_plain(self, tmp_path):
        pytest.importorskip("sklearn")
        output = run(*DIGITS, "--iterations", "6", "--plain", "--out", tmp_path)
        assert "before adaptation" in output and "fused engine" not in output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "nowhere"], "nowhere does not exist"),
            (["--ways", "11"], "11 ways need 11 classes, but there are 10"),
            (["--shots", "122", "--queries", "9"], "but there are 130. Ask for fewer shots or queries"),
            (["--preset", "best"], "preset: expected one of mtml, finn2017, learn2learn, maml++; got 'best'"),
            (["--resume"], "no checkpoint at"),
        ],
    )
    def test_errors_before_training(self, tmp_path, arguments, message):
        output = run(*DIGITS, *arguments, "--out", tmp_path, status=2)
        assert f"error: {message}" in output or message in output
        assert "Traceback" not in output and not (tmp_path / "log.csv").exists()

    def test_truncated_zip(self, tmp_path):
        (tmp_path / "images_background.zip").write_bytes(b"PK\x03\x04 not all of it")
        output = run(*DIGITS, "--data", tmp_path, status=2)
        assert output.count("error:") == 1 and "is not a whole zip file" in output


class TestOthers:
    def test_plot(self, tmp_path):
        log = tmp_path / "log.csv"
        log.write_text("iteration,seconds,loss,accuracy,ci95\n10,1,0.5,,\n20,2,0.25,0.8,0.01\n")
        assert str(tmp_path / "log.png") in run("plot", log)
        assert (tmp_path / "log.png").read_bytes()[:4] == b"\x89PNG"
        run("plot", log, "--out", tmp_path / "other.png")
        assert (tmp_path / "other.png").exists()

    def test_plot_errors(self, tmp_path):
        assert "is not a log of" in run("plot", tmp_path / "missing.csv", status=2)
        (tmp_path / "log.csv").write_text("iteration,seconds,loss\n")
        assert "has no rows yet" in run("plot", tmp_path / "log.csv", status=2)

    def test_doctor(self):
        assert isinstance(json.loads(run("doctor", "--json")), dict)

    def test_help_names_everything(self):
        assert all(word in run("--help") for word in ("doctor", "train", "plot", "record"))
        assert all(word in run("train", "--help") for word in ("sinusoid", "omniglot"))

    def test_main_takes_a_command_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as status:
            main(["plot", str(tmp_path / "missing.csv")])
        assert status.value.code == 2 and "is not a log of" in capsys.readouterr().err

    def test_missing_typer_is_explained_and_the_doctor_works_without_it(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "typer", None)
        with pytest.raises(SystemExit, match="2"):
            main(["train", "sinusoid"])
        assert 'pip install "mtml-kernels[train]"' in capsys.readouterr().err
        main(["doctor", "--json"])
        assert json.loads(capsys.readouterr().out)

    @pytest.mark.parametrize("missing", ["matplotlib", "tqdm"])
    def test_missing_extra_is_named(self, tmp_path, monkeypatch, missing):
        for name in [m for m in sys.modules if m.split(".")[0] == missing]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, missing, None)
        output = run(*SINUSOID, "--iterations", "5", "--out", tmp_path, status=2)
        assert 'pip install "mtml-kernels[train]"' in output and "Traceback" not in output

    def test_importing_it_is_light(self):
        code = (
            "import sys, mtml.cli, mtml.tasks; "
            "heavy = {'matplotlib', 'typer', 'sklearn', 'PIL', 'mtml.train.loop'} & set(sys.modules); "
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
