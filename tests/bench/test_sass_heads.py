"""``python -m bench predict --sass heads``: Triton's launches as compiled give the reference, and the model by hand."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.triton_process import python

pytest.importorskip("triton", reason="triton is required on Linux only")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.gpu.head_inner_loop import OPTIONS, Shape, draw_case  # noqa: E402
from bench.sass.chips import CHIPS  # noqa: E402
from bench.sass.code import Code  # noqa: E402
from bench.sass.emulation.clocks import Phase  # noqa: E402
from bench.sass.emulation.launches import Program, Ran, emulated  # noqa: E402
from bench.sass.heads import cases, report  # noqa: E402
from bench.sass.heads.model import time_of  # noqa: E402
from bench.sass.model import Launch, move_of  # noqa: E402
from bench.sass.recording import Move, started  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402
from mtml_kernels.losses import HeadLoss  # noqa: E402
from mtml_kernels.reference.head_inner_loop import gram_form  # noqa: E402
from mtml_kernels.reference.multihead_loss import multihead_loss as reference  # noqa: E402
from mtml_kernels.schedule.cost import Product  # noqa: E402
from mtml_kernels.schema.head_inner_loop import HeadArgs, encode_options  # noqa: E402
from mtml_kernels.triton import head_inner_loop, multihead_loss  # noqa: E402

H200 = CHIPS["h200"]


def kernels(found: list[Any]) -> list[Any]:
    """Without PyTorch's that fill fresh memory in tests."""
    return [one for one in found if isinstance(one, Ran) or one.name != "fill_"]


# --- as compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h200", "a100", "l4"])
def test_losses_as_compiled_give_the_reference(chip: str, tmp_path: Path) -> None:
    """Heads of one program, of several, of several kinds; the scaling skips what has the cotangent 1."""
    torch.manual_seed(0)
    shapes, kinds = (
        [(6, 5), (700, 3), (9, 40)],
        [HeadLoss(), HeadLoss(), HeadLoss("cross_entropy", label_smoothing=0.1)],
    )
    logits = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    targets = [torch.randint(c, (n,)) for n, c in shapes]
    cotangents = torch.tensor([1.0, -2.0, 0.5])
    given = [z.detach() for z in logits]
    with emulated(CHIPS[chip], [*given, *targets], True, tmp_path) as found:
        losses, gradients = multihead_loss.forward(given, targets, kinds)
        handed = multihead_loss.call_hand_out(gradients, cotangents, [1, 1, 1])
    expected = reference(logits, targets, kinds)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    expected_gradients = torch.autograd.grad(expected, logits, cotangents)
    torch.testing.assert_close(handed, list(expected_gradients), rtol=1e-4, atol=1e-7)
    names = [one.launch.name if isinstance(one, Ran) else one.name for one in kernels(found)]
    assert names == ["upload", "norm_kernel", "loss_kernel", "scale_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h200", "a100", "l4"])
def test_a_few_shot_head_as_compiled_gives_the_reference(chip: str, tmp_path: Path) -> None:
    """Loss and exact second-order gradients, those of the rates too, in four launches."""
    case = draw_case(Shape(2, 5, 7, 70, 3, 3), "cpu")
    support, query, weight, bias, labels, query_labels, rates = (t.detach() for t in case)
    tensors = (support, query, weight, bias, rates, labels, query_labels, None, None)
    args = HeadArgs(*tensors, encode_options(OPTIONS), 31)
    cotangents = torch.tensor([0.5, 2.0])
    with emulated(CHIPS[chip], [], True, tmp_path) as found:
        loss, logits, *_, carry = head_inner_loop.forward(args)
        gradients = head_inner_loop.backward((cotangents, None, None, None), args, carry)
    leaves = [t.requires_grad_() for t in args.differentiable if t is not None]
    sets = (support, labels, query, query_labels)
    expected = gram_form(*sets, weight, bias, rates, None, None, OPTIONS)
    torch.testing.assert_close((loss, logits), tuple(t.detach() for t in expected[:2]), rtol=1e-5, atol=1e-5)
    truth = torch.autograd.grad(expected[0], leaves, cotangents)
    for mine, one in zip(gradients, truth, strict=True):
        assert mine is not None and (mine - one).norm() < 1e-5 * one.norm()
    names = [one.launch.name if isinstance(one, Ran) else one.name for one in kernels(found)]
    assert names == ["products_kernel", "head_kernel", "chain_kernel", "sums_kernel"]


def test_a_launch_of_some_programs(tmp_path: Path) -> None:
    """A small one, of which eight programs of twelve run; their tensors stay as they are."""
    gradients, cotangents = [torch.ones(20_000 + i) for i in range(6)], torch.full((6,), 3.0)
    with emulated(H200, gradients, folder=tmp_path) as found:
        results = multihead_loss.backward(gradients, cotangents)
    upload, ran = kernels(found)
    assert isinstance(upload, Move) and upload.name == "upload" and isinstance(ran, Ran)
    assert ran.launch.programs == 12 and len(ran.programs) == 8
    near, far = ran.moved()
    moved = sum(t.nbytes for t in (*gradients, *results))
    assert 0.5 * moved < far <= near < 2 * moved
    with emulated(H200, gradients, True, tmp_path):
        whole = multihead_loss.backward(gradients, cotangents)
    assert all((g == 3).all() for g in whole)


# --- the model --------------------------------------------------------------------------------------------------------


def ran(programs: int, **phase: float) -> Ran:
    """Of two programs that ran, the second of which took twice as long."""
    launch: Any = type("Launch", (), {"name": "k", "programs": programs})()
    code = Code("", "", 128, 0, 4)  # of which a multiprocessor holds four
    made = [
        Program([Phase(n * phase["chain"], n * phase["issue"], {}, 4 * int(n * phase["issue"]), 0, 0)], [96], [32])
        for n in (1, 2)
    ]
    return Ran(launch, code, made, [1000])


def test_a_launch_is_the_mean_of_its_programs() -> None:
    hertz = H200.device.hertz
    few = time_of(ran(2, chain=1000.0, issue=100.0), H200)
    assert few.bound == "launch" and few.latency == pytest.approx(2000 / hertz) and few.resident == 4
    many = time_of(ran(132 * 8, chain=1000.0, issue=100.0), H200)  # two rounds of four
    assert many.latency == pytest.approx(2 * 1500 / hertz) and many.issue == pytest.approx(8 * 150 / hertz)
    assert many.issued == 132 * 8 * 600
    near, far = ran(132 * 8, chain=1.0, issue=1.0).moved()
    assert (near, far) == (132 * 8 * 128, 2000)  # all that is there, once read and once written


def test_products_of_pytorch_are_those_of_the_first_prediction() -> None:
    a, b = torch.empty(4, 70, 300, device="meta"), torch.empty(4, 300, 20, device="meta")
    with started() as found:
        torch.empty(4, 70, 20, device="meta").baddbmm_(a, b)
    (move,) = found
    assert isinstance(move, Move) and move.product == Product(4, 70, 20, 4 * 70 * 20 * 300)
    alone = move_of(Move("mul", move.bytes), H200)
    product = move_of(move, H200)
    assert alone.issue == alone.latency == 0 and product.bytes == alone.bytes
    assert product.issue > 0 and "4 x [70, 20] of 300" in product.name


def test_every_case_has_work() -> None:
    for name in cases.DEFAULT:
        if name not in ("heads_vocab_ce", "heads_segmentation"):  # larger than a test needs
            case = cases.case_of(name)
            assert case.bytes > 0 and (case.flops > 0) == (name not in ("heads_many_small",))
    assert set(cases.DEFAULT) <= set(cases.NAMES) and not {*cases.NAMES, report.GROUP} & {*WORKLOADS} - {"anil_head"}


def test_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times by bound add up, and the floor is two launches and the longer of FLOPs and bytes."""
    case = cases.Case("anil_head", lambda: None, (), 67_000_000, 1_000)
    launches = (Launch("a", 2.2e-6, 0.0, 0.0, 0.0, 1e-6), Launch("b", 2.2e-6, 9e-6, 0.0, 5e-6, 1e-6))
    made = report.Prediction(case, H200, launches)
    assert made.floor == pytest.approx(4.4e-6 + 1e-6) and made.work[1] == "FP32"
    monkeypatch.setattr(report, "predicted", lambda name, chip: made)
    lines = list(report.report(["anil_head"], ["h200"], 1, str(tmp_path / "heads.csv")))
    assert " ".join(lines[2].split()) == "anil_head h200 2 14.4 3.2 11.2 0.0 0.0 0.0 issue 0.067 0.00 5.4 7% FP32"
    assert lines[3].strip().startswith("1 x") and lines[3].endswith(" b")
    (row,) = csv.DictReader((tmp_path / "heads.csv").open())
    assert (row["us"], row["floor_us"], row["mostly"]) == ("14.4", "5.4", "issue")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["sinusoid"], ["--precision", "tf32"], ["--launches", "folder"]])
def test_heads_stand_alone(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "heads", *more, "--sass"]) == 2
    assert "workloads: expected heads, or some of anil_head" in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "interpreted", lambda: True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected not to be set"):
        report.predicted("anil_head", "h200")


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "heads.csv"
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path)}
    words = ("-m", "bench", "predict", "heads_many_small", "--sass", "--device", "h200", "--out", out)
    done = python(*words, PYTHONPATH=f"{ROOT}:{ROOT / 'python'}", **variables)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(out.open())
    assert row["launches"] == "3" and row["mostly"] == "launch" and 2.2 * 3 < float(row["us"]) < 15
