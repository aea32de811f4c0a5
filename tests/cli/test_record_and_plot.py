"""`mtml record` and `mtml plot` of runs that are broken, and to places that cannot be."""

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from cases.command_line import REASONS, refuse


class TestRecordAndPlot:
    @pytest.fixture
    def run(self, folder):
        run = folder / "run"
        run.mkdir()
        (run / "results.json").write_text("{}")
        (run / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")
        (run / "sinusoid.png").write_bytes(b"png")
        (folder / "log.csv").write_text("iteration,seconds,loss\n10,1,0.5\n")
        return run

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("results.json", None),
            ("results.json", b""),
            ("results.json", b'{"half": '),
            ("results.json", b"\xff\xfe\0"),
            ("log.csv", None),
            ("log.csv", b""),
            ("log.csv", b"iteration,seconds,loss\n"),
            ("log.csv", b"\xff\xfe\0\1"),
            ("log.csv", b"iteration,loss\n1,x\n"),
        ],
    )
    def test_broken_run(self, fails, folder, run, name, content):
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
        assert name in fails("record", run, "kept/run")
        assert not (folder / "kept").exists()

    @pytest.mark.parametrize("prefix", [".", "..", "run/log", "run/../run/other", "/"])
    def test_prefix_that_names_no_files_or_the_run_itself(self, fails, run, prefix):
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        assert "prefix: expected" in fails("record", run, prefix)
        assert {p.name: p.read_bytes() for p in run.iterdir()} == before

    def test_folder_that_is_a_file(self, fails, folder, run):
        assert "results.json in" in fails("record", "log.csv", "kept/run")

    @pytest.mark.parametrize("name", ["run.json", "run.png", "run.csv"])
    @pytest.mark.parametrize("number", REASONS)
    def test_full_disk(self, fails, monkeypatch, folder, run, name, number):
        refuse(monkeypatch, name, number)
        line = fails("record", run, "kept/run")
        assert f"kept/{name}" in line and REASONS[number] in line
        assert not list((folder / "kept").glob(".*"))

    @pytest.mark.parametrize("name", ["kept", "kept/run.json"])
    def test_in_the_way(self, fails, folder, run, name):
        if name == "kept":
            (folder / name).write_text("mine")
        else:
            (folder / name).mkdir(parents=True)
        assert f"error: {name}: " in fails("record", run, "kept/run")

    @pytest.mark.parametrize("content", [b"", b"iteration\n", b"\xff\0", b"iteration,loss\n1,x\n", b"a,b\n1,2\n"])
    def test_plot_of_no_log(self, fails, folder, content):
        (folder / "log.csv").write_bytes(content)
        assert "log.csv" in fails("plot", "log.csv")

    @pytest.mark.parametrize("log", ["missing.csv", ".", "/", "log.csv/below"])
    def test_plot_of_nothing(self, fails, run, log):
        assert "is not a log of" in fails("plot", log)

    def test_plot_over_its_log(self, fails, folder, run):
        before = (folder / "log.csv").read_bytes()
        assert "out: expected another file" in fails("plot", "log.csv", "--out", folder / "log.csv")
        assert (folder / "log.csv").read_bytes() == before

    @pytest.mark.parametrize("out", ["run", "log.csv/below.png"])
    def test_plot_to_no_place(self, fails, run, quick, out):
        assert "choose another place" in fails("plot", "log.csv", "--out", out)

    @pytest.mark.parametrize("number", REASONS)
    def test_plot_to_a_full_disk(self, fails, monkeypatch, folder, run, quick, number):
        refuse(monkeypatch, "log.png", number)
        assert REASONS[number] in fails("plot", "log.csv") and not list(folder.glob(".*"))
