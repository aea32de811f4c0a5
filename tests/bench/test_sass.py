"""``python -m bench predict --sass``: the reader of SASS against products of known size, and its model by hand."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cases.triton_process import TESTS, python

pytest.importorskip("triton", reason="triton is required on Linux only")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.sass import meta_steps, model, report  # noqa: E402
from bench.sass.chain import clocks_of  # noqa: E402
from bench.sass.chips import CHIPS  # noqa: E402
from bench.sass.counting import Counts, matrix_macs, words_of  # noqa: E402
from bench.sass.listing import Instruction, instructions  # noqa: E402
from bench.sass.meta_steps import kernels_of  # noqa: E402
from bench.sass.paths import Path as Way  # noqa: E402
from bench.sass.paths import Repeat  # noqa: E402
from bench.sass.recording import Move, Recorded  # noqa: E402
from bench.sass.turns import SourceLoop, jobs_of  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402

H200, A100 = CHIPS["h200"], CHIPS["a100"]
LISTING = """
launched:
.text.launched:
	//## File "<made>", line 5 inlined at "<made>", line 9
	//## File "<made>", line 9
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10] ;
.L_x_0:
	//## File "<made>", line 7 inlined at "<made>", line 9
        /*0020*/                   FFMA R8, R4.reuse, R5, R8 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
        /*0060*/                   NOP;
"""


def some(text: str) -> list[Instruction]:
    """Instructions without source lines, one a line."""
    numbered = (f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(text.strip().splitlines()))
    return instructions("\n".join(numbered))


# --- the reader -------------------------------------------------------------------------------------------------------


def test_listing() -> None:
    """Guards, operands, lines from inmost to outmost, targets of branches; no padding, nothing that is called."""
    found = instructions(LISTING)
    assert [one.opcode for one in found] == ["LDC", "LDG.E.128", "FFMA", "BRA", "EXIT"]
    assert found[1].guard == "@!P0" and found[1].operands == ("R4", "desc[UR6][R2.64+0x10]")
    assert found[0].frames == (("<made>", 5), ("<made>", 9)) and found[2].frames == (("<made>", 7), ("<made>", 9))
    assert [one.target for one in found] == [None, None, None, 0x20, None]
    behind = LISTING.replace(".L_x_1:", "$__internal_0_$__cuda_sm20_div:\n        /*0050*/ MUFU.RCP R0, R1 ;\n.L_x_1:")
    assert instructions(behind) == found


@pytest.mark.parametrize(
    "text, words, macs",
    [
        ("LDS.128 R4, [R2]", 4, 0),
        ("LDG.E.64 R4, desc[UR6][R2.64]", 2, 0),
        ("LDS R4, [R2]", 1, 0),
        ("LDSM.16.M88.4 R4, [R2]", 4, 0),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 1, 1024),
        ("HGMMA.64x32x8.F32.TF32 R24, R4, gdesc[UR4], R24", 1, 4096),
    ],
)
def test_words_and_multiply_adds(text: str, words: int, macs: int) -> None:
    (one,) = some(text)
    assert (words_of(one), matrix_macs(one)) == (words, macs)


def test_multiply_adds_of_compiled_products(tmp_path: Path) -> None:
    """FMAs x threads x turns are M N K of each task, within padding; one that is missed is told."""
    script = TESTS / "triton" / "compile" / "product.py"
    done = python(script, "90", TRITON_CACHE_DIR=str(tmp_path / "triton"), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    whole, deep, odd, matrix = json.loads(done.stdout)["90"]
    for case in (whole, deep):
        tasks, rows, cols, depth = case["sizes"]
        assert case["fma"] == tasks * rows * cols * depth and not case["matrix"]
        assert case["rounds"] == [depth // 32]
    tasks, rows, cols, depth = odd["sizes"]
    assert tasks * rows * cols * depth < odd["fma"] <= tasks * 128 * 64 * 64 and odd["programs"] == 2 * tasks
    assert matrix["matrix"] == deep["fma"] and not matrix["fma"]
    assert all("multiply-adds found" in case["unchecked"] for case in (whole, deep, matrix))


# --- what a meta-step starts ------------------------------------------------------------------------------------------


def test_kernels_of_a_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the schedule's launches, losses and moves start; every loop's turns are known, every program's job."""
    found = kernels_of(WORKLOADS["omniglot_conv"], "fp32")
    names = Counter(kernel.name for kernel in found)
    assert names["rstd_kernel"] == 7 and names["moments_kernel"] == 1 and names["launched"] > 50
    moves = [kernel for kernel in found if isinstance(kernel, Move)]
    assert moves and all(move.bytes > 0 for move in moves)
    for kernel in found:
        if isinstance(kernel, Recorded):
            jobs = jobs_of(kernel)
            assert sum(job.programs for job in jobs) == kernel.programs
            if kernel.name == "moments_kernel":  # two passes over a chunk of rows, 16 of 64 features at a time
                chunk = min(kernel.numbers["CHUNK"], kernel.numbers["M"])
                assert [loop.turns for loop in jobs[0].loops] == [-(-chunk // kernel.numbers["ROWS"])] * 2
    texts = {precision: {k.key() for k in kernels_of(WORKLOADS["tiny"], precision) if isinstance(k, Recorded)}
             for precision in ("fp32", "tf32")}  # fmt: skip
    assert texts["fp32"] != texts["tf32"] and texts["fp32"] & texts["tf32"]
    monkeypatch.setattr(meta_steps, "interpreted", lambda: True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected not to be set"):
        kernels_of(WORKLOADS["tiny"], "fp32")


def test_precisions_of_launches() -> None:
    with pytest.raises(ValueError, match="precision: expected one of fp32, 3xtf32, tf32; got 'fp64'"):
        kernels_of(WORKLOADS["tiny"], "fp64")


# --- the model --------------------------------------------------------------------------------------------------------


def clocks(text: str, rounds: int = 1) -> float:
    return clocks_of([Repeat(tuple(some(text)), rounds, None)], H200, 4, 270)


def test_a_warp_waits_for_what_it_needs() -> None:
    chained = clocks("FFMA R1, R1, R2, R1\n" * 10)
    apart = clocks("\n".join(f"FFMA R{i}, R20, R21, R{i}" for i in range(10)))
    assert 9 * 4 < chained <= 10 * 6 and apart <= 12
    assert clocks("LDG.E R1, desc[UR4][R2.64]\nFADD R3, R1, R4") > 270 > clocks("LDG.E R1, desc[UR4][R2.64]")
    pair = "LDG.E.64 R4, desc[UR4][R2.64]\nFADD R6, R5, R0"
    assert clocks(pair) > 270  # the second register of two
    assert clocks("@P0 FADD R1, R2, R3") < 10 < clocks("MUFU.RCP R9, R8\nISETP.GE.AND P0, PT, R9, RZ, PT\n@P0 EXIT")


def test_copies_are_waited_for_by_groups() -> None:
    copy = "LDGSTS.E [R1], desc[UR4][R2.64]\nLDGDEPBAR\n"
    assert clocks(copy + "DEPBAR.LE SB0, 0x0") > 270
    assert clocks(copy * 2 + "DEPBAR.LE SB0, 0x2") < 100
    assert clocks("LDGSTS.E [R1], desc[UR4][R2.64]\n" + "DEPBAR.LE SB0, 0x0") < 100  # of no group
    product = "WARPGROUP.ARRIVE\nHGMMA.64x64x8.F32.TF32 R24, R4, gdesc[UR4], R24\n"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert clocks(product) + 10 < clocks(product + wait) < 100
    assert clocks(product + wait[:-1] + "1") < clocks(product + wait)
    assert clocks(copy + product + wait) < 100  # which are not the copies


def test_further_rounds_take_as_long_as_the_third() -> None:
    body = "LDS.128 R4, [R2]\nFFMA R8, R4, R5, R8\nFFMA R9, R6, R7, R9\nBAR.SYNC 0x0"
    unrolled = clocks("\n".join([body] * 40))
    assert clocks(body, 40) == pytest.approx(unrolled, rel=0.02)
    assert clocks(body, 0) == 0


def test_what_a_multiprocessor_holds() -> None:
    assert H200.fma_lanes == 128 and A100.fma_lanes == 64
    assert H200.resident(128, 0, 4) == 4 and H200.resident(32, 0, 4) == 16  # by registers; by warps
    assert H200.resident(32, 48 * 1024, 4) == 4 and A100.resident(32, 48 * 1024, 4) == 3  # by shared memory


def launch(monkeypatch: pytest.MonkeyPatch, counts: Counts, programs: int, size: int, chain: float) -> model.Launch:
    """Of one job with these counts."""
    way = Way(programs, (), ())
    monkeypatch.setattr(model, "paths_of", lambda launch, code: [way])
    monkeypatch.setattr(model, "count", lambda path: counts)
    monkeypatch.setattr(model, "clocks_of", lambda nodes, chip, warps, far: chain)
    kernel: Any = type("Kernel", (), {"name": "k", "programs": programs, "bytes": lambda self, used: size})()
    code: Any = type("Code", (), {"used": frozenset(), "registers": 128, "shared": 0, "warps": 4})()
    return model.launch_of(kernel, code, H200)


def test_what_bounds_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its turn, in seconds that are counted by hand."""
    none = Counts(Counter(), 0, 0, 0, 0)
    hertz, held = H200.device.hertz, 132 * 4
    fma = none._replace(by_pipe=Counter({"fma": 1_000_000, "other": 10}), fma=1_000_000)
    found = launch(monkeypatch, fma, 133, 1000, 100.0)  # two programs on one multiprocessor, a warp a scheduler each
    assert found.bound == "issue" and found.issue == pytest.approx(2 * 1_000_010 / hertz)
    assert found.issued == 133 * 4 * 1_000_010 and found.fma == 133 * 4 * 1_000_000
    found = launch(monkeypatch, none._replace(matrix=10**8, synchronous=10**8), 1, 1000, 100.0)
    assert found.bound == "matrix" and found.matrix == pytest.approx(4e8 / 0.62 / H200.matrix_macs / hertz)
    found = launch(monkeypatch, none, 1, 10**9, 100.0)
    assert found.bound == "bytes" and found.bytes == pytest.approx(1e9 / H200.device.bandwidth)
    found = launch(monkeypatch, none, held + 1, 1000, 10_000.0)
    assert found.bound == "latency" and found.latency == pytest.approx(2 * 10_000 / hertz) and found.resident == 4
    found = launch(monkeypatch, none, 1, 1000, 100.0)
    assert found.bound == "launch" and found.seconds == pytest.approx(2.2e-6 + 100 / hertz)


def test_a_product_that_lost_an_instruction_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(1, (), (SourceLoop("<made>", 1, 2, 1, 32, 32),))
    monkeypatch.setattr(model, "paths_of", lambda launch, code: [way])
    code: Any = type("Code", (), {"warps": 4})()
    nothing: Any = None
    with pytest.raises(ValueError, match="0 multiply-adds found, where the products take 32 to 32"):
        model.launch_of(nothing, code, H200)


# --- the command ------------------------------------------------------------------------------------------------------


def test_table_of_launches(tmp_path: Path) -> None:
    """Times by bound add up, equal launches stand together, and the CSV has the line's numbers."""
    short = model.Launch("a", 2e-6, 0.0, 0.0, 0.0, 1e-6)
    long = model.Launch("b", 2e-6, 9e-6, 0.0, 5e-6, 1e-6)
    found = report.Prediction("tiny", "h200", "fp32", 2, 7e-6, (short, long, short))
    assert found.seconds == pytest.approx(17e-6) and found.bound == "issue"
    assert found.by_bound == pytest.approx({"launch": 6e-6, "issue": 11e-6, "matrix": 0, "bytes": 0, "latency": 0})
    assert found.worst(5) == [(1, long), (2, short)]
    first, *rest = report.lines(found, 1)
    assert first.split() == [
        "tiny",
        "h200",
        "fp32",
        "2",
        "7.0",
        "3",
        "17.0",
        "6.0",
        "11.0",
        "0.0",
        "0.0",
        "0.0",
        "issue",
    ]
    assert len(rest) == 1 and rest[0].endswith(" b")
    report.write_csv(tmp_path / "p.csv", [found])
    (row,) = csv.DictReader((tmp_path / "p.csv").open())
    assert row["first_us"] == "7.0" and row["us"] == "17.0" and row["mostly"] == "issue"
    each = list(csv.DictReader(report.write_launches(tmp_path, found).open()))
    assert [one["kernel"] for one in each] == ["a", "b", "a"] and each[1]["us"] == "11.00"


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "tiny", "--out", "x.csv"]) == 2
    assert "out: expected with --sass" in capsys.readouterr().err
    for options in (["--device", "h100"], ["--precision", ""]):
        with pytest.raises(SystemExit):
            main(["predict", "tiny", *options])
    assert "got 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    """Compiled once: again is the same, and quick enough not to have compiled anything."""
    out = tmp_path / "predicted.csv"
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path)}
    words = ("-m", "bench", "predict", "tiny", "--sass", "--device", "h200", "--out", out)
    first = python(*words, PYTHONPATH=f"{ROOT}:{ROOT / 'python'}", **variables)
    assert first.returncode == 0, first.stderr
    kept = sorted(path.name for path in (tmp_path / "mtml-kernels" / "sass").iterdir())
    second = python(*words, PYTHONPATH=f"{ROOT}:{ROOT / 'python'}", **variables)
    assert second.stdout == first.stdout
    assert sorted(path.name for path in (tmp_path / "mtml-kernels" / "sass").iterdir()) == kept
    (row,) = csv.DictReader(out.open())
    launches = int(row["launches"])
    assert (row["workload"], row["chip"]) == ("tiny", "h200")
    ours = sum(isinstance(kernel, Recorded) for kernel in kernels_of(WORKLOADS["tiny"], "fp32"))
    assert ours < launches <= ours + 2  # PyTorch's besides, which fill fresh memory in this process
    assert 2.2 * launches < float(row["us"]) < 6 * launches and row["mostly"] == "launch"
