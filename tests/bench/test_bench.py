"""The benchmark harness: formulas, match gate, records, verdicts and command line; nothing here measures speed."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure import blocks, flops, kernel, match, peak, runner, timing  # noqa: E402
from bench.providers import NAMES, Unavailable, load  # noqa: E402
from bench.providers.base import Prepared, Result  # noqa: E402
from bench.report import compare, readme, record  # noqa: E402
from bench.workloads import WORKLOADS, make_data, make_network, to_channels_last  # noqa: E402
from mtml_kernels import native  # noqa: E402

CSV_ROW = record.Record(
    "tiny", "mtml", "ok", ms=2.0, best_ms=1.5, n=7, gflop=0.5, threads=2, dtype="float32", date="2026-01-02"
)


# --- work by formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gflop", "digits"),
    [
        ("sinusoid", 0.040, 3),
        ("omniglot_mlp", 2.97, 2),
        ("siren", 4.15, 2),
        ("siren_sine", 4.15, 2),
        ("anil_head", 0.325, 3),
        ("omniglot_conv", 45, 0),
        ("mini_conv", 89, 0),
        ("l2l_higher_omniglot", 430, 0),
    ],
)
def test_flops_of_the_workloads(name: str, gflop: float, digits: int) -> None:
    assert round(flops.meta_step(WORKLOADS[name], "all") / 1e9, digits) == gflop


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "pad", "dilation"),
    [(28, 3, 2, 1, 1), (7, 3, 2, 1, 1), (84, 3, 1, 1, 1), (5, 5, 1, 2, 1), (9, 3, 1, 2, 2), (13, 3, 1, 0, 1)],
)
def test_taps_outside_the_image_are_not_counted(
    size: int, kernel_size: int, stride: int, pad: int, dilation: int
) -> None:
    """A convolution of ones with ones counts, at each output, the taps that lie inside."""
    conv = torch.nn.functional.conv1d
    counts = conv(torch.ones(1, 1, size), torch.ones(1, 1, kernel_size), None, stride, pad, dilation)
    inside = flops.taps_along(size, counts.shape[-1], kernel_size, stride, pad, dilation)
    assert inside == int(counts.sum())


def test_inside_taps_are_fewer_only_where_there_is_padding() -> None:
    padded, unpadded = WORKLOADS["mini_conv"], WORKLOADS["l2l_higher_omniglot"]
    assert flops.meta_step(padded, "inside") < flops.meta_step(padded, "all")
    assert flops.meta_step(unpadded, "inside") == flops.meta_step(unpadded, "all")


def test_modes_and_steps_add_up() -> None:
    w = WORKLOADS["omniglot_mlp"]
    adapt, forward, full = (flops.meta_step(w, mode=mode) for mode in kernel.MODES)
    assert 0 < adapt < forward < full
    one, two, three = (flops.meta_step(replace(w, steps=steps)) for steps in (1, 2, 3))
    assert two - one == three - two > 0
    assert flops.meta_step_bytes(w) > 4 * 32 * 80 * 784


# --- the match gate -------------------------------------------------------------------------------------------------


def gate() -> match.Gate:
    return runner.gate_for(WORKLOADS["tiny"], runner.Options())


def tiny(provider: str = "loop", seed: int = 0) -> Result:
    return runner.outcome(runner.prepare(WORKLOADS["tiny"], provider, torch.float32, "cpu", seed))


def test_gate_accepts_a_right_gradient() -> None:
    g = gate()
    verdict = g.check(tiny("vmap", g.seed), lambda seed: tiny("vmap", seed))
    assert verdict.ok and verdict.seeds == 1 and verdict.error < 1e-6


def wrong_by_scale(result: Result) -> Result:
    return result[0], [g * (1 + 1e-4) for g in result[1]]


def wrong_small_tensor(result: Result) -> Result:
    return result[0], [*result[1][:-1], result[1][-1] * 1.001]


def wrong_loss(result: Result) -> Result:
    return result[0] * 1.0001, result[1]


def not_a_number(result: Result) -> Result:
    return result[0], [*result[1][:-1], result[1][-1] * math.nan]


@pytest.mark.parametrize("spoil", [wrong_by_scale, wrong_small_tensor, wrong_loss, not_a_number])
def test_gate_rejects_a_wrong_result(spoil: object) -> None:
    assert callable(spoil)
    g = gate()
    assert not g.check(spoil(tiny(seed=g.seed)), lambda seed: spoil(tiny(seed=seed))).ok


def test_gate_rejects_first_order() -> None:
    """The gradient that forgets the second-order term looks plausible: the gate must see it."""
    w = WORKLOADS["tiny"]

    def first_order(seed: int) -> Result:
        net, (sx, sy, qx, qy) = make_network(w, seed=seed), make_data(w, seed=seed)
        params, total = dict(net.named_parameters()), torch.zeros(())
        for t in range(w.tasks):
            fast: dict[str, torch.Tensor] = dict(params)
            for _ in range(w.steps):
                loss = torch.nn.functional.mse_loss(torch.func.functional_call(net, fast, (sx[t],)), sy[t])
                grads = torch.autograd.grad(loss, list(fast.values()))
                fast = {n: v - w.lr * g for (n, v), g in zip(fast.items(), grads, strict=True)}
            out = torch.func.functional_call(net, fast, (qx[t],))
            total = total + torch.nn.functional.mse_loss(out, qy[t]) / w.tasks
        return total.detach(), list(torch.autograd.grad(total, list(params.values())))

    g = gate()
    assert not g.check(first_order(g.seed), first_order).ok


def test_gate_refuses_other_shapes() -> None:
    loss, grads = tiny()
    with pytest.raises(ValueError, match="expected tensors of shapes"):
        gate().truth(0).judge((loss, grads[:-1]))


def test_one_unlucky_draw_is_forgiven_and_a_systematic_error_is_not() -> None:
    g = gate()

    def unlucky_once(seed: int) -> Result:
        return wrong_by_scale(tiny(seed=seed)) if seed == g.seed else tiny(seed=seed)

    verdict = g.check(unlucky_once(g.seed), unlucky_once)
    assert verdict.ok and verdict.seeds == match.SEEDS


def test_a_provider_that_does_not_match_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: a wrong provider gets a row that says so and no milliseconds."""
    right = runner.prepare

    def prepare(w: runner.AnyWorkload, provider: str, *where: object) -> Prepared:
        prepared = right(w, provider, *where)  # type: ignore[arg-type]
        if provider != "vmap":
            return prepared
        return replace(prepared, result=lambda value: wrong_by_scale((value[0], list(value[1]))))

    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(peak, "measure", lambda *args: peak.Peak(100.0, "given"))
    said: list[str] = []
    rows = runner.run(["tiny"], runner.Options(("loop", "vmap"), seconds=0.01, threads=1), said.append)
    by_name = {r.provider: r for r in rows}
    assert by_name["loop"].ok and by_name["loop"].ms > 0
    assert by_name["vmap"].status == "mismatch" and math.isnan(by_name["vmap"].ms)
    assert any("mismatch" in line and "not timed" in line for line in said)


# --- providers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learn2learn", "higher", "torchopt", "jax"])
def test_a_peer_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEARN2LEARN_SRC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(Unavailable, match=f"{name} is not installed"):
        load(name)


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ValueError, match=f"expected one of {', '.join(NAMES)}; got 'nothing'"):
        load("nothing")
    with pytest.raises(ValueError, match="per_task, channels_last; got quickly"):
        load("loop:quickly")
    with pytest.raises(ValueError, match="workload: expected one of sinusoid"):
        runner.find("nothing")


@pytest.mark.parametrize("provider", ["mtml", "loop:per_task", "vmap:loop", "mixflow", "mixflow:loop"])
@pytest.mark.parametrize("inputs", [False, True])
def test_providers_match(provider: str, inputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w = replace(WORKLOADS["tiny"], inputs=inputs)
    options = runner.Options()
    _, row = runner.admit(w, provider, options, runner.gate_for(w, options))
    assert row.ok, row.note


def test_channels_last_keeps_the_values() -> None:
    w = WORKLOADS["omniglot_conv"]
    data = make_data(replace(w, tasks=2, query=3))
    _, (sx, *_rest) = to_channels_last(make_network(w), data)
    assert torch.equal(sx, data[0]) and sx[0].is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="image workloads"):
        to_channels_last(make_network(WORKLOADS["tiny"]), make_data(WORKLOADS["tiny"]))


# --- timing and peaks -----------------------------------------------------------------------------------------------


def test_interleaving_takes_turns_and_makes_bursts_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns = [0.0], list[str]()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> None:
        turns.append(name)
        now[0] += seconds

    runs = {"slow": lambda: call("slow", 0.05), "fast": lambda: call("fast", 0.001)}
    times = timing.interleave(runs, seconds=0.2)
    assert times["slow"].ms == pytest.approx(50) and times["fast"].ms == pytest.approx(1)
    assert times["slow"].count == 1 and times["fast"].count * 0.001 >= timing.BURST_SECONDS
    assert times["slow"].n == times["fast"].n >= 3
    assert math.isnan(times["slow"].iqr_ms) if times["slow"].n < 4 else times["slow"].iqr_ms == pytest.approx(0)
    rounds = turns[-(1 + times["fast"].count) * times["fast"].n :]
    assert rounds == (["slow"] + ["fast"] * times["fast"].count) * times["fast"].n


def test_spread_is_the_middle_half() -> None:
    assert timing.spread([9.0, 1.0, 2.0, 3.0, 4.0]) == 2.0  # one slow burst does not widen it
    assert math.isnan(timing.spread([1.0, 2.0, 3.0]))
    found = timing.summary([0.001, 0.002, 0.003, 0.004, 0.009], 7)
    assert (found.ms, found.best_ms, found.n, found.count, found.iqr_ms) == pytest.approx((3.0, 1.0, 5, 7, 2.0))


def test_peak_says_how_it_was_measured() -> None:
    measured = peak.measure(torch.float32, 1, seconds=0.01)
    assert measured.gflops > 0 and measured.source in ("FMA", "torch matmul")


# --- records, verdicts, table ---------------------------------------------------------------------------------------


def test_csv_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.csv"
    noted = replace(CSV_ROW, provider="higher", status="failed", note='a "quoted", note')
    record.write_csv(path, [CSV_ROW])
    record.write_csv(path, [noted], append=True)
    first, second = record.read_csv(path)
    assert (first.key, first.ms, first.n, first.date) == (CSV_ROW.key, 2.0, 7, "2026-01-02")
    assert second.note == noted.note and math.isnan(second.gflops) and not second.ok
    with path.open() as file:
        assert next(csv.reader(file))[:4] == ["workload", "provider", "status", "ms"]
    assert [p.name for p in path.parent.iterdir()] == ["run.csv"]


def test_csv_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a CSV written by"):
        record.read_csv(path)


def rows(ours: float, peer: float, slow: float = 9.0) -> list[record.Record]:
    times = {"mtml": ours, "compile": peer, "loop": slow}
    return [replace(CSV_ROW, provider=name, ms=ms) for name, ms in times.items()]


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        (rows(2.0, 6.0), "same"),
        (rows(4.0, 12.0, 18.0), "same"),  # the machine was slower: the ratio is not
        (rows(2.3, 6.0), "slower"),
        (rows(1.5, 6.0), "faster"),
        (rows(2.0, 6.0)[1:], "gone"),
        ([replace(rows(2.0, 6.0)[0], status="mismatch")], "mismatch"),
    ],
)
def test_compare_judges_the_ratio_to_the_fastest_common_peer(head: list[record.Record], verdict: str) -> None:
    (judged,) = compare.compare(rows(2.0, 6.0), head)
    assert judged.verdict == verdict
    assert judged.regressed == (verdict in ("slower", "gone", "mismatch"))


def test_compare_by_time_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = tmp_path / "base.csv", tmp_path / "head.csv"
    record.write_csv(base, rows(2.0, 6.0))
    record.write_csv(head, rows(4.0, 12.0))
    assert main(["compare", str(base), str(head)]) == 0
    assert main(["compare", str(base), str(head), "--metric", "ms"]) == 1
    assert "1 regressions among 1 rows" in capsys.readouterr().out
    for path, own in ((base, 2.0), (head, 2.3)):
        record.write_csv(path, spread(rows(own, 6.0), 0.2))
    assert main(["compare", str(base), str(head)]) == 0
    assert "0 regressions among 1 rows, tolerance 5%; 1 ambiguous" in capsys.readouterr().out
    record.write_csv(base, rows(2.0, 6.0)[1:])
    assert main(["compare", str(base), str(head)]) == 2


def spread(records: list[record.Record], iqr: float) -> list[record.Record]:
    """The same times, each with this interquartile range, relative to it."""
    return [replace(r, iqr_ms=iqr * r.ms, best_ms=r.ms * (1 - iqr)) for r in records]


@pytest.mark.parametrize(
    ("iqr", "own", "verdict"),
    [
        (0.01, 2.3, "slower"),  # 15 % slower, known to 1 %
        (0.2, 2.3, "ambiguous"),  # to 20 %: the ranges overlap
        (0.2, 1.75, "ambiguous"),
        (0.2, 6.0, "slower"),  # no spread hides a factor of three
        (0.2, 2.02, "same"),  # within the tolerance whatever the spread
    ],
)
def test_a_change_within_the_spread_is_ambiguous(iqr: float, own: float, verdict: str) -> None:
    (judged,) = compare.compare(spread(rows(2.0, 6.0), iqr), spread(rows(own, 6.0), iqr))
    assert judged.verdict == verdict
    assert judged.regressed == (verdict == "slower") and ("overlap" in compare.line(judged)) == (verdict == "ambiguous")


def test_runs_without_a_recorded_spread_are_judged_by_their_medians(tmp_path: Path) -> None:
    """A file of before the column was there reads as it did; against a new one, medians decide."""
    path = tmp_path / "old.csv"
    record.write_csv(path, rows(2.0, 6.0))
    lines = [line.split(",") for line in path.read_text().splitlines()]
    where = lines[0].index("iqr_ms")
    path.write_text("\n".join(",".join(cells[:where] + cells[where + 1 :]) for cells in lines) + "\n")
    old = record.read_csv(path)
    assert all(math.isnan(r.iqr_ms) for r in old) and [r.ms for r in old] == [2.0, 6.0, 9.0]
    (judged,) = compare.compare(old, spread(rows(2.3, 6.0), 0.2))
    assert judged.verdict == "slower"


@pytest.mark.parametrize("name", ["", "images"])
def test_readme_table_stands_between_its_markers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "README.md"
    start, end = readme.markers(name)
    path.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    measured = [replace(r, workload="sinusoid", machine="a machine", peak_gflops=500.0) for r in rows(2.0, 6.0)]
    measured[0] = replace(measured[0], share_of_peak=0.5)
    for _ in range(2):  # writing twice gives the same file
        readme.write(path, measured, name)
        text = path.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "| sinusoid | MLP 1-40-40-1, ReLU | 9 ms | 6 ms (compile) | 2 ms | **3.0x** | 50% |" in text
        assert "a machine" in text and "2026-01-02" in text
    readme.write(path, spread(measured, 0.01), name)
    assert "| 6 ms (IQR 0.06) (compile) | 2 ms (IQR 0.02) |" in path.read_text()
    path.write_text("no markers")
    with pytest.raises(ValueError, match="expected the markers"):
        readme.write(path, measured, name)
    with pytest.raises(ValueError, match="no timed row"):
        readme.table(measured[1:])


def test_every_table_has_one_document() -> None:
    assert readme.document().name == "README.md"
    assert {readme.document(name).name for name in ("images", "heads", "contention")} == {"benchmarks.md"}
    with pytest.raises(ValueError, match="--table nothing"):
        readme.document("nothing")


def test_plot_writes_an_image(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    record.write_csv(path, rows(2.0, 6.0))
    assert main(["plot", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 1000


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in ("run", "gpu", "triton-report", "export", "compare", "plot", "readme")),
        *([name] for name in ("kernel", "memory", "host", "checksum", "predict", "contention")),
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0 and "usage: python -m bench" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "nothing"], "workload: expected one of"),
        (["run", "tiny", "--providers", "nothing"], "provider: expected one of"),
        (["kernel", "nothing"], "op: expected one of inner_loop"),
        (["kernel", "inner_loop", "--shape", "3x4"], "shape: expected widths"),
        (["kernel", "task_linear", "--shape", "3-4-5"], "shape: expected inputs-outputs"),
        (["kernel", "task_conv2d", "--shape", "3-4-5-2"], "shape: expected an odd kernel"),
        (["kernel", "task_update", "--rule", "lion"], "rule: expected one of sgd"),
        (["kernel", "inner_loop", "--mode", "backward"], "mode: expected some of"),
        (["kernel", "inner_loop", "--steps", "1,x"], "steps: expected different whole numbers"),
        (["kernel", "inner_loop", "--steps", "2,2"], "steps: expected different whole numbers"),
        (["plot", "/nowhere/at/all.csv"], "No such file"),
        (["predict", "nothing"], "workload: expected one of"),
    ],
)
def test_bad_input_is_one_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.csv"
    command = ["run", "tiny", "--providers", "mtml,loop", "--seconds", "0.05", "--threads", "1", "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        assert main(command) == 0, capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    by_name = {r.provider: r for r in record.read_csv(out)}
    assert by_name["mtml"].ok and by_name["loop"].ok
    assert by_name["mtml"].share_of_peak > 0 and by_name["mtml"].threads == 1 and by_name["mtml"].match_score <= 1
    assert "x the fastest peer (loop)" in capsys.readouterr().out


def test_kernel_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "kernel",
        "inner_loop",
        "--shape",
        "3-8-2",
        "--tasks",
        "2",
        "--backend",
        "reference",
        "--seconds",
        "0.02",
    ]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert all(mode in printed for mode in kernel.MODES) and "GFLOP/s" in printed


def test_kernel_at_several_numbers_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "2", "--support", "3", "--query", "4", "--backend", "reference", "--seconds", "0.02"]
    modes = ["--mode", "forward", "--mode", "adapt"]
    command = ["kernel", "head_inner_loop", "--shape", "6-3", "--steps", "2,1,40", *modes, *options]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "2,1,40 steps" in printed
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[mode, f"K={k}"] for mode in ("adapt", "forward") for k in (2, 1, 40)]
    for mode in (rows[:3], rows[3:]):
        times = [float(row[row.index("ms") - 1]) for row in mode]
        ratios = [float(row[row.index("x") + 1]) for row in mode]
        assert ratios == pytest.approx([t / times[0] for t in times], abs=0.01) and ratios[2] > 2


@pytest.mark.parametrize(
    ("op", "shape", "gflop"),
    [
        ("task_linear", "6-3", 2 * 5 * 6 * 3),
        ("task_conv2d", "2-3-4-3", 2 * 5 * 16 * 2 * 3 * 9),
        ("task_update", "6-3", 0),
    ],
)
def test_building_blocks_as_kernels(op: str, shape: str, gflop: float, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernel", op, "--shape", shape, "--tasks", "1", "--support", "5", "--seconds", "0.01"]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert f"{op} {shape}, 1 tasks" in printed and all(mode in printed for mode in blocks.MODES)
    block = blocks.BLOCKS[op](kernel.Options(kernel.parse_shape(shape), 1, 5))
    assert block.work(False)[0] == gflop and block.work(True)[0] == 3 * gflop
    assert block.work(False)[1] == 4 * (sum(t.numel() for t in block.tensors) + block.results)
    results = block.call(False)()
    outputs = [results] if isinstance(results, torch.Tensor) else results
    assert sum(y.numel() for y in outputs) == block.results  # type: ignore[union-attr, attr-defined]


def test_kernel_at_one_number_of_steps_prints_no_ratio() -> None:
    rows, _ = kernel.measure("head_inner_loop", kernel.Options((6, 3), 2, 3, 4, 7, modes=("forward",), seconds=0.02))
    assert [(row.mode, row.steps, row.ratio) for row in rows] == [("forward", 7, 1.0)]


def test_checksums_do_not_depend_on_the_threads(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for threads in ("1", "2"):
        assert main(["checksum", "tiny", "--here", "--threads", threads]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0] == lines[1] and [line.split()[2] for line in lines[0]] == ["float32", "float64"]
    assert len({line.split()[3] for line in lines[0]}) == 2


@pytest.mark.slow
def test_checksums_of_every_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checksum", "tiny"]) == 0
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert found == [isa for isa in native.info()["available"] for _ in range(2)]
