"""Standard output that is full, closed or narrow."""

import io
import os
import subprocess
import sys
from contextlib import suppress

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from cases.command_line import DIGITS, SINUSOID

from mtml.cli import main


class TestStandardOutput:
    COMMANDS = (
        SINUSOID,
        DIGITS,
        ["plot", "log.csv"],
        ["doctor"],
        ["doctor", "--json"],
        ["--help"],
        ["train", "--help"],
    )

    @pytest.fixture(autouse=True)
    def prepared(self, folder, monkeypatch, quick):
        from mtml_kernels.doctor import probes as doctor

        monkeypatch.setattr(doctor, "PROBES", {"cpu": doctor._cpu})
        (folder / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_full(self, fails, monkeypatch, command):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert "output: No space left on device" in fails(*command)

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_reader_that_has_left(self, monkeypatch, capfd, command):
        reader, writer = os.pipe()
        os.close(reader)
        with suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:  # closing it tries once more
            monkeypatch.setattr(sys, "stdout", pipe)
            with pytest.raises(SystemExit, match="1"):
                main(command)
        assert not capfd.readouterr().err

    def test_narrow_alphabet(self, monkeypatch, folder):
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", narrow)
        main(SINUSOID)
        narrow.seek(0)
        assert "95 % interval" in narrow.read()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
    def test_doctor_by_itself(self, folder):
        code = "from mtml_kernels.doctor import probes; probes.PROBES = {'cpu': probes._cpu}; probes.command()"
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: the report cannot be printed: No space left on device\n"
