"""The doctor reports on whatever is there, and outlives whatever is broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mtml_kernels
from mtml_kernels.doctor import probes as doctor

BROKEN_TORCH = "import sys; sys.modules['torch'] = None; from mtml_kernels import doctor; doctor.main(json=True)"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Of a process of its own: in this one, another test may have loaded scikit-learn and with it a second OpenMP."""
    run = [sys.executable, "-P", "-m", "mtml_kernels.doctor", "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    return found


def test_report_has_every_section_and_fits_json(report: dict[str, Any]) -> None:
    assert set(report) == {*doctor.PROBES, "problems"}
    assert json.loads(json.dumps(report)) == report


def test_report_knows_this_installation(report: dict[str, Any]) -> None:
    assert report["versions"]["mtml-kernels"] == mtml_kernels.__version__
    assert report["package"]["build_record"]["flags"]
    assert report["native"]["isa"] in report["native"]["available"]
    assert report["native"]["isa_reason"]
    assert report["threads"]["torch"] >= 1
    assert report["ops"]["inner_loop"]["cpu"] is None
    assert report["ops"]["inner_loop"]["reference"] is None


@pytest.mark.parametrize("version", ["2.11.0", "2.13.4+cpu", "2.10.1", "2.14.0", "3.0", "not installed"])
def test_says_whether_this_torch_was_tested(version: str) -> None:
    found = doctor._tested(version)
    assert found.startswith("2.11 to 2.13")
    assert ("this one among them" in found) == (version in ("2.11.0", "2.13.4+cpu"))
    assert ("this one not" in found) == (version in ("2.10.1", "2.14.0", "3.0"))


def test_self_test_compares_every_backend_with_the_reference(report: dict[str, Any]) -> None:
    assert {"cpu", "reference"} <= set(report["self_test"])
    for result in report["self_test"].values():
        assert result["ok"]
        assert 0 < result["errors"]["float32"]["gradient"] < 1e-4
        assert result["errors"]["float64"]["gradient"] < 1e-11
    assert report["problems"] == []


def test_self_test_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtml_kernels.doctor import selftest

    right = selftest.meta_step

    def wrong(backend: str, dtype: Any) -> tuple[Any, Any]:
        loss, grad = right(backend, dtype)
        return loss, grad * 1.01 if backend == "cpu" else grad

    monkeypatch.setattr(selftest, "meta_step", wrong)
    assert not selftest.check_backend("cpu")["ok"]
    assert selftest.check_backend("reference")["ok"]


def test_text_shows_sections_in_columns(report: dict[str, Any]) -> None:
    lines = doctor.render(report).splitlines()
    assert {"versions", "native", "ops", "self test", "problems"} <= set(lines)
    assert any(line.split() == ["inner_loop.cpu", "available"] for line in lines)
    assert lines[-1] == "  none"


def test_numbers_are_not_taken_for_yes_and_no() -> None:
    assert dict(doctor._flat({"one": 1, "true": True, "none": None, "empty": [], "list": [1, 2]})) == {
        "one": "1",
        "true": "yes",
        "none": "-",
        "empty": "-",
        "list": "1, 2",
    }


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtml_kernels.doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout)["versions"]["mtml-kernels"] == mtml_kernels.__version__


def test_reports_without_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_TORCH], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert found["cpu"]["cores"] >= 1
    assert "torch" in found["native"]["error"]
    assert any("torch" in problem for problem in found["problems"])


def test_reports_without_compiled_module(tmp_path: Path) -> None:
    package = Path(mtml_kernels.__file__).parent
    shutil.copytree(
        package, tmp_path / "mtml_kernels", ignore=shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    )
    # An editable install answers for every module of the package, the compiled one included: out of the way with it.
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
from mtml_kernels import doctor
doctor.main(json=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["package"]["compiled_modules"] == []
    assert found["ops"]["inner_loop"]["cpu"] is not None
    assert found["self_test"]["reference"]["ok"]
    assert any("pip install -e ." in problem for problem in found["problems"])


@pytest.mark.parametrize("failure", [RuntimeError("broken"), SystemExit("stop"), ImportError("gone")])
def test_a_failing_probe_is_a_finding(failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise failure

    monkeypatch.setattr(doctor, "PROBES", {**dict.fromkeys(doctor.PROBES, probe)})
    found = doctor.report()
    assert all(doctor.failed(found[name]) for name in doctor.PROBES)
    assert len(found["problems"]) == len(doctor.PROBES)
    assert str(failure) in doctor.render(found)


def test_a_self_test_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    died = subprocess.CompletedProcess([], returncode=-4, stdout="", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: died)
    assert doctor._self_test() == {"error": "the process died of SIGILL"}
