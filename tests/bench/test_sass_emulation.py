"""SASS that runs on the CPU: instructions, ways that part and meet, clocks by hand, and the whole kernel."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is required on Linux only")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.sass.chips import CHIPS  # noqa: E402
from bench.sass.emulation.block import Block  # noqa: E402
from bench.sass.emulation.clocks import Clocks, Phase  # noqa: E402
from bench.sass.emulation.state import GLOBAL, WINDOW, State  # noqa: E402
from bench.sass.listing import instructions  # noqa: E402
from bench.sass.persistent.kernel import Kernel  # noqa: E402
from bench.sass.persistent.model import GAP_SECONDS, LAUNCH_SECONDS, time_of  # noqa: E402
from bench.sass.persistent.perceptrons import sum_blocks  # noqa: E402
from bench.sass.persistent.tiles import TileLaunch, time_of_call  # noqa: E402

H200 = CHIPS["h200"]
EXIT = "EXIT"
LANES = np.arange(32, dtype=np.uint32)


def listing(*lines: str) -> Any:
    """Lines of SASS, labels among them ("name:"), one file for all."""
    text, at = 'kernel:\n\t//## File "<made>", line 1\n', 0
    for line in (*lines, EXIT):
        if line.endswith(":"):
            text += f"{line}\n"
            continue
        text += f"        /*{at:04x}*/  {line} ;\n"
        at += 16
    return instructions(text)


def ran(*lines: str, warps: int = 1, observe: Any = None, **registers: Any) -> State:
    """After the lines, with registers as they are given: R4=..."""
    state = State(warps, {0: np.arange(64, dtype=np.uint32)}, np.arange(1024, dtype=np.uint32), 2048)
    for name, value in registers.items():
        target = state.floats if np.asarray(value).dtype.kind == "f" else state.registers
        target[int(name[1:])] = value
    code = listing(*lines)
    seen = Clocks(code, state, H200) if observe is None else observe(code, state)
    Block(code, state).run(seen)
    return state


def clocks_of(*lines: str, warps: int = 1, **registers: Any) -> Clocks:
    """What the lines take."""
    kept = []

    def observe(code: Any, state: State) -> Clocks:
        kept.append(Clocks(code, state, H200))
        return kept[0]

    ran(*lines, warps=warps, observe=observe, **registers)
    kept[0].barrier()
    return kept[0]


@pytest.mark.parametrize(
    "line, value",
    [
        ("IADD3 R9, R1, -R2, R3", 7 - 3 + 5),
        ("IADD3 R9, RZ, -0x2, RZ", 2**32 - 2),
        ("IMAD R9, R1, R2, R3", 7 * 3 + 5),
        ("IMAD.HI.U32 R9, R4, R4, R6", ((2**32 - 1) ** 2 + (9 << 32)) % 2**64 >> 32),
        ("LEA R9, R1, R2, 0x2", 7 * 4 + 3),
        ("LEA.HI R9, R4, R2, RZ, 0x5", 31 + 3),
        ("LOP3.LUT R9, R1, 0x6, RZ, 0xc0, !PT", 6),
        ("LOP3.LUT R9, R1, R2, R3, 0x96, !PT", 7 ^ 3 ^ 5),
        ("SHF.R.S32.HI R9, RZ, 0x1f, R4", 2**32 - 1),
        ("SHF.R.U64 R9, R1, 0x1, R3", (7 | 5 << 32) >> 1 & 0xFFFFFFFF),
        ("SHF.L.U64.HI R9, R4, 0x4, R3", 5 << 4 | 15),
        ("SEL R9, R1, R2, !PT", 3),
        ("PRMT R9, R1, 0x9910, RZ", 7),
        ("VIADDMNMX.U32 R9, R1, R2, 0x4, PT", 4),
        ("HFMA2.MMA R9, -RZ, RZ, 1.875, 5.9604644775390625e-08", 0x3F800001),
        ("LDC R9, c[0x0][R2+0x1]", 1),
        ("FLO.U32 R9, R7", 3),
        ("F2I.FTZ.U32.TRUNC.NTZ R9, R8", 2),
        ("IMAD.HI R9, R4, R2, RZ", 2**32 - 1),
        ("SGXT R9, R4, 0x1", 2**32 - 1),
        ("SGXT.U32 R9, R1, 0x2", 3),
        ("REDUX.SUM.S32 R9, R1", 7 * 32),
        ("SHFL.IDX PT, R9, R1, RZ, 0x1f", 7),
    ],
)  # fmt: skip
def test_an_instruction_on_integers(line: str, value: int) -> None:
    state = ran(line, R1=7, R2=3, R3=5, R4=2**32 - 1, R6=0, R7=9, R8=np.float32(2.75))
    assert state.registers[9].tolist() == [[value] * 32]


@pytest.mark.parametrize(
    "line, value",
    [
        ("FFMA R9, R1, -R2, R3", -1.5 * 4 + 8),
        ("FADD R9, -R1, |R4|", -1.5 + 2),
        ("FMUL R9, R1, 0.5", 0.75),
        ("FFMA.SAT R9, R1, R2, RZ", 1),
        ("FSEL R9, R1, R2, PT", 1.5),
        ("MUFU.RCP R9, R2", 0.25),
        ("I2FP.F32.S32 R9, R5", -3),
        ("FMNMX R9, R1, R2, !PT", 4),
    ],
)
def test_an_instruction_on_reals(line: str, value: float) -> None:
    numbers = {f"R{i}": np.float32(x) for i, x in ((1, 1.5), (2, 4), (3, 8), (4, -2))}
    assert ran(line, R5=2**32 - 3, **numbers).floats[9].tolist() == [[value] * 32]


def test_64_bits_carry() -> None:
    state = ran("IADD3 R4, P1, R0, R2, RZ", "IADD3.X R5, R1, R3, RZ, P1, !PT", R0=2**32 - 1, R1=1, R2=2, R3=3)
    assert (state.wide(4) == (2**32 - 1 + (1 << 32)) + (2 + (3 << 32))).all()


def test_doubles_are_pairs_of_registers() -> None:
    state = ran("F2F.F64.F32 R2, R0", "DMUL R4, R2, 0.1", "F2F.F32.F64 R6, R4", R0=np.float32(3))
    assert state.floats[6].tolist() == [[float(np.float32(3 * 0.1))] * 32]


def test_generic_addresses_find_shared_and_global_memory() -> None:
    lines = ("ST.E [R2.64+0x4], R0", "LDS R8, [R2+0x4]", "LD.E R9, [R4.64]", "LD.E.64 R10, [R4.64]")
    place = GLOBAL + 4 * LANES.astype(np.uint64) * 2
    low, high = (place & 0xFFFFFFFF).astype(np.uint32), (place >> 32).astype(np.uint32)
    state = ran(*lines, R0=LANES + 100, R2=4 * LANES, R3=WINDOW, R4=low, R5=high)
    assert (state.registers[8] == LANES + 100).all() and (state.registers[9] == 2 * LANES).all()
    assert (state.registers[11] == 2 * LANES + 1).all()


def test_an_address_outside_of_memory_is_an_error() -> None:
    with pytest.raises(ValueError, match="outside of memory"):
        ran("LD.E R9, [R4.64]", R4=0, R5=0)


def test_an_unknown_instruction_is_an_error_where_it_runs() -> None:
    with pytest.raises(ValueError, match=r"0x0 HMMA\.16816"):
        ran("HMMA.16816.F32 R4, R8, R12, R4")
    assert ran("@!PT HMMA.16816.F32 R4, R8, R12, R4").registers[4].tolist() == [[0] * 32]


LOOP = (
    "S2R R0, SR_TID.X",
    "BSSY B0, `(.L_x_2)",
    ".L_x_1:",
    "IADD3 R1, R1, 0x1, RZ",
    "ISETP.LT.U32.AND P0, PT, R1, R0, PT",
    "@P0 BRA `(.L_x_1)",
    "BSYNC B0",
    ".L_x_2:",
    "IADD3 R2, R2, 0x1, RZ",
)


def test_lanes_part_in_a_loop_and_meet_behind_it() -> None:
    kept = clocks_of(*LOOP, warps=2)
    # Turns of the slowest lanes; lanes 0 and 1 of the first warp end alike.
    assert kept.lines[2] == 31 + 63
    assert kept.lines[6] == 2  # together again, warp by warp
    state = ran(*LOOP, warps=2)
    assert state.registers[1].ravel().tolist() == [1, *range(1, 64)] and (state.registers[2] == 1).all()


def test_a_shuffle_sums_over_lanes() -> None:
    lines = [f"SHFL.BFLY PT, R1, R0, {hex(by)}, 0x1f\n" for by in (16, 8, 4, 2, 1)]
    steps = [part for line in lines for part in (line.strip(), "FADD R0, R0, R1")]
    assert ran(*steps, R0=LANES.astype(np.float32)).floats[0].tolist() == [[496.0] * 32]


def test_a_difference_carries_where_it_is_not_negative() -> None:
    lines = ("LEA R4, P1, -R0, R1, 0x4", "IMAD.X R5, RZ, RZ, ~R2, P1")
    assert (ran(*lines, R0=0, R1=5, R2=0).wide(4) == 5).all()
    assert (ran(*lines, R0=1, R1=5, R2=0).wide(4) == 2**64 - 11).all()


def test_a_vote_is_of_the_lanes_at_work() -> None:
    lines = ("ISETP.LT.U32.AND P1, PT, R0, 0x20, PT", "ISETP.LT.U32.AND P2, PT, R0, 0x1f, PT")
    state = ran(*lines, "VOTEU.ALL UP0, P1", "VOTEU.ALL UP1, P2", "VOTEU.ANY UP2, P2", R0=LANES)
    assert state.uniform_predicates[:3, 0, 0].tolist() == [True, False, True]
    some = ran(*lines, "@P2 VOTEU.ALL UP0, P2", R0=LANES)
    assert some.uniform_predicates[0, 0, 0]


def test_bits_become_predicates() -> None:
    state = ran("R2P PR, R0, 0x6", "SEL R1, R2, RZ, P1", "SEL R3, R2, RZ, P2", R0=0b1101, R2=9)
    assert (state.registers[1] == 0).all() and (state.registers[3] == 9).all()


def test_predicates_of_a_warp() -> None:
    lines = ("UPLOP3.LUT UP1, UPT, UPT, UPT, UPT, 0x80, 0x0", "USEL UR3, UR2, URZ, UP1", "MOV R0, UR3")
    assert (ran("R2UR UR2, R1", *lines, R1=9).registers[0] == 9).all()


def test_a_uniform_register_is_written_for_warps_at_work() -> None:
    """By the first thread of them that is; the second warp keeps what it had."""
    state = ran("MOV R0, R1", warps=2, R1=LANES)
    state.uniform[4] = 7
    state.mask = np.arange(64).reshape(2, LANES.size) < LANES.size
    state.mask[0, :3] = False
    state.write_uniform(4, LANES + 10)
    assert state.uniform[4].ravel().tolist() == [13, 7]


def test_a_carry_may_be_a_warps_own() -> None:
    lines = ("UIADD3 UR4, UP1, UR2, UR3, URZ", "UIADD3.X UR5, URZ, URZ, URZ, UP1, !UPT", "MOV R0, UR5")
    assert (ran("R2UR UR2, R1", "R2UR UR3, R1", *lines, R1=2**31).registers[0] == 1).all()


def test_matrices_are_rows_of_16_bytes() -> None:
    """Each lane stores a word of its row; read back with the addresses of the rows in another order."""
    order = np.concatenate([LANES[:8][::-1], LANES[8:]])
    lines = ("STSM.16.M88 [R2], R0", "LDSM.16.M88 R4, [R3]")
    state = ran(*lines, R0=LANES + 100, R2=16 * LANES, R3=16 * order.astype(np.uint32))
    assert state.registers[4].ravel().tolist() == [100 + 4 * (7 - lane // 4) + lane % 4 for lane in range(32)]
    (phase,) = clocks_of("LDSM.16.M88.4 R4, [R3]", R3=16 * LANES).phases
    assert phase.units["shared memory"] == 4


def test_a_thread_has_memory_of_its_own() -> None:
    state = ran("STL [R1+0x8], R0", "IADD3 R0, R0, 0x1, RZ", "STL [R1+0xc], R0", "LDL.64 R4, [R1+0x8]", R0=LANES)
    assert (state.registers[4] == LANES).all() and (state.registers[5] == LANES + 1).all()


def test_an_atomic_sum_gives_what_was_there() -> None:
    """Word 8 of global memory holds 8, and 9 above it."""
    place = {"R4": (GLOBAL & 0xFFFFFFFF) + 32, "R5": GLOBAL >> 32, "R6": 2, "R7": 0}
    lines = ("ISETP.EQ.AND P0, PT, R0, RZ, PT", "@P0 ATOMG.E.ADD.64.STRONG.GPU PT, R2, [R4.64], R6", "LD.E R8, [R4.64]")
    state = ran(*lines, R0=LANES, **place)
    assert state.registers[2][0, 0] == 8 and state.registers[3][0, 0] == 9 and (state.registers[8] == 10).all()
    with pytest.raises(ValueError, match="of several lanes"):
        ran(lines[1].removeprefix("@P0 "), **place)


def test_sectors_are_counted_once() -> None:
    lane = {"R4": (GLOBAL & 0xFFFFFFFF) + 4 * LANES, "R5": GLOBAL >> 32}
    kept = clocks_of("LD.E R8, [R4.64]", "LD.E R8, [R4.64]", "ST.E [R4.64+0x20], R8", **lane)
    assert kept.read == {0, 1, 2, 3} and kept.written == {1, 2, 3, 4}


def test_warps_wait_for_each_other() -> None:
    """A warp stores, the other one loads behind the barrier."""
    lines = ("S2R R0, SR_TID.X", "IMAD.SHL.U32 R1, R0, 0x4, RZ", "STS [R1], R0", "BAR.SYNC 0x0",
             "LOP3.LUT R2, R1, 0x80, RZ, 0x3c, !PT", "LDS R3, [R2]")  # fmt: skip
    state = ran(*lines, warps=2)
    assert (state.registers[3].ravel() == np.arange(64) ^ 32).all()


def test_a_chain_waits_for_what_it_reads() -> None:
    times = H200.latencies
    (apart,) = clocks_of("FFMA R4, R0, R1, R4", "FFMA R5, R0, R1, R5").phases
    (chained,) = clocks_of("FFMA R4, R0, R1, R4", "FFMA R5, R0, R1, R4").phases
    assert chained.chain - apart.chain == times.arithmetic - 1
    assert (apart.issued, apart.fma, apart.issued_fma, apart.chain) == (3, 64, 2, 3 + times.barrier)
    (loaded,) = clocks_of("LDS R4, [R0]", "FADD R5, R4, R4", R0=4 * LANES).phases
    assert loaded.chain == times.shared + 2 + times.barrier


WAVES = [("LDS", 4, 1), ("LDS", 8, 2), ("LDS", 128, 32), ("LDS", 0, 1), ("LDS.128", 16, 4), ("LDS.128", 128, 32),
         ("LDS.128", 144, 4)]  # fmt: skip


@pytest.mark.parametrize("opcode, stride, waves", WAVES)
def test_wavefronts_are_those_of_the_banks(opcode: str, stride: int, waves: int) -> None:
    (phase,) = clocks_of(f"{opcode} R4, [R0]", R0=np.uint32(stride) * LANES).phases
    assert phase.units["shared memory"] == waves


def test_global_memory_is_near_the_second_time() -> None:
    line = ("LD.E R8, [R4.64]", "IADD3 R9, R8, R8, RZ")
    lane = {"R4": (GLOBAL & 0xFFFFFFFF) + 4 * LANES, "R5": GLOBAL >> 32}
    (once,), (twice,) = clocks_of(*line, **lane).phases, clocks_of(*line, *line, **lane).phases
    assert once.chain == H200.latencies.l2 + 2 + H200.latencies.barrier
    assert twice.chain - once.chain == H200.latencies.shared + 1


def test_a_launch_takes_its_latency_or_its_work() -> None:
    phases = [Phase(chain=1000.0, issue=200.0, units={"fma": 50.0}, issued=800, fma=0, issued_fma=0)]
    alone = time_of(phases, H200, 25, 1)
    assert (alone.latency, alone.work, alone.bound, alone.blocks) == (1000.0, 200.0, "latency", 1)
    full = time_of(phases, H200, 132 * 32, 16)
    assert (full.latency, full.work, full.bound, full.blocks) == (2000.0, 32 * 200.0, "issue", 16)
    assert full.seconds == pytest.approx(LAUNCH_SECONDS + 6400 / H200.device.hertz)


def tile_launch(blocks: int, resident: int, copied: int = 0, written: int = 0, times: int = 1) -> TileLaunch:
    clocks = clocks_of("MOV R0, R1")
    clocks.phases[:] = [Phase(chain=1000.0, issue=200.0, units={"fma": 50.0}, issued=800, fma=0, issued_fma=0)]
    clocks.copied, clocks.written = copied, set(range(written))
    return TileLaunch("tiles", times, Kernel([], 0, 0, np.zeros(0, np.uint32), 0), 128, blocks, resident, clocks)


def test_a_launch_of_tiles_waits_for_its_copies() -> None:
    hertz, share = H200.device.hertz, H200.device.l2_bandwidth / H200.device.processors
    alone = tile_launch(132, 1).time(H200)
    assert (alone.seconds, alone.bound) == (pytest.approx(1000 / hertz), "latency")
    copies = tile_launch(133, 2, copied=1000).time(H200)  # two blocks share a multiprocessor
    assert copies.seconds == pytest.approx(1000 / hertz + 2 * 4 * 1000 / share)
    writes = tile_launch(132, 1, written=10**5).time(H200)
    assert (writes.seconds, writes.bound) == (pytest.approx(32e5 / share), "second-level cache")


def test_launches_of_tiles_have_gaps() -> None:
    launches = [tile_launch(132, 1, times=3), tile_launch(132 * 3, 1, times=2)]
    found = time_of_call(launches, H200)
    assert found.seconds == pytest.approx((3 + 6) * 1000 / H200.device.hertz + 4 * GAP_SECONDS + LAUNCH_SECONDS)


@pytest.mark.parametrize(("widths", "blocks"), [((2, 64, 64, 64, 3), 38), ((1, 40, 40, 1), 9)])
def test_sums_of_tiles_take_a_thread_four_parameters(widths: tuple[int, ...], blocks: int) -> None:
    """2308 vectors by 64, and a block more; of the other 20 + 450 + 12."""
    assert sum_blocks(widths) == blocks


# --- the whole kernel -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h200", "a100"])
def test_the_kernel_as_compiled_gives_the_reference(chip: str) -> None:
    """Two tasks of a small network through the instructions for the chip; and every multiply-add is there."""
    from bench.sass.persistent.engine import Emulated
    from bench.sass.persistent.meta_steps import call_of
    from bench.sass.persistent.words import macs_of
    from bench.workloads import WORKLOADS, mlp
    from mtml_kernels.cuda.inner_loop.backend import Persistent
    from mtml_kernels.schedule.backend import torch_schedule

    w = replace(WORKLOADS["sinusoid"], build=lambda: mlp(1, 9, 5, 1), support=3, query=4, steps=2)
    a, engine = call_of(w), Emulated(chip, 25, all_tasks=True)
    backend, weights = Persistent(lambda: engine), torch.tensor([0.5, -2.0])
    mine, there = backend.forward(a), torch_schedule.forward(a)
    grads = (
        backend.backward(weights, None, None, (), a, mine[4])[0],
        torch_schedule.backward(weights, None, None, (), a, there[4])[0],
    )
    torch.testing.assert_close(mine[0], there[0], rtol=1e-5, atol=1e-6)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    (found,) = engine.ran
    assert sum(phase.fma for phase in found.clocks.phases) >= macs_of(found.program.words) > 0


def test_a_product_of_fragments() -> None:
    """D [16, 8] = A B + C by what lanes hold of them; of a fraction 10 bits are read, sums are cut off."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(16, 8)), rng.normal(size=(8, 8)), rng.normal(size=(16, 8)).astype(np.float32)
    a, b = ((x.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    group, within = np.divmod(np.arange(32), 4)
    left = {f"R{4 + i}": a[group + 8 * (i % 2), within + 4 * (i // 2)] for i in range(4)}
    right = {f"R{8 + i}": b[within + 4 * i, group] for i in range(2)}
    added = {f"R{12 + i}": c[group + 8 * (i // 2), 2 * within + i % 2] for i in range(4)}
    left["R4"] = np.nextafter(left["R4"], np.float32(np.inf) * np.sign(left["R4"]))  # which is not seen
    state = ran("HMMA.1688.F32.TF32 R16, R4, R8, R12", **left, **right, **added)
    exact = a.astype(np.float64) @ b + c
    for i in range(4):
        expected = exact[group + 8 * (i // 2), 2 * within + i % 2]
        found = state.floats[16 + i, 0].astype(np.float64)
        assert (np.abs(found) <= np.abs(expected)).all()
        np.testing.assert_allclose(found, expected, rtol=2**-22)
    with pytest.raises(ValueError, match="not known here"):
        ran("HMMA.16816.F32.BF16 R16, R4, R8, R12")


def test_what_products_of_fragments_take() -> None:
    """Each waits for its accumulator; all share the matrix units, at the rate of mma.sync."""
    one, two = "HMMA.1688.F32.TF32 R16, R4, R8, RZ", "HMMA.1688.F32.TF32 R16, R4, R8, R16"
    (apart,), (chain,) = clocks_of(one, one).phases, clocks_of(one, two).phases
    assert chain.chain == apart.chain + H200.latencies.matrix - 1
    (four,) = clocks_of(one, two, warps=4).phases
    assert four.units["matrix"] == pytest.approx(4 * chain.units["matrix"])
    assert four.units["matrix"] == pytest.approx(8 * 1024 / (H200.matrix_macs * 0.62))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h200", "a100"])
@pytest.mark.parametrize("tasks", [25, 4096])
def test_perceptrons_as_compiled_give_the_reference(chip: str, tasks: int) -> None:
    """The first task through the kernel for few tasks, and through that for many."""
    from bench.sass.persistent.meta_steps import call_of
    from bench.sass.persistent.perceptrons import EmulatedKernels, macs_of_perceptron
    from bench.workloads import WORKLOADS
    from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
    from mtml_kernels.schedule.backend import torch_schedule

    a, kernels = call_of(replace(WORKLOADS["sinusoid"], steps=2)), EmulatedKernels(chip, tasks)
    perceptrons = Perceptrons(kernels)
    bound = perceptrons.bound(a)
    assert bound is not None
    loss, output, _, _, (parts,) = perceptrons.forward(a, bound)
    there = torch_schedule.forward(a)
    params = torch_schedule.backward(torch.tensor([1.0, 0.0]), None, None, (), a, there[4])[0]
    torch.testing.assert_close(loss[0], there[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output[0], there[1][0], rtol=1e-4, atol=1e-5)
    expected = torch.cat([g.flatten() for g in params if g is not None])
    torch.testing.assert_close(parts[0], expected, rtol=1e-4, atol=1e-5)
    (found,) = kernels.ran
    assert sum(phase.fma for phase in found.clocks.phases) >= macs_of_perceptron(found.widths, found.call) > 0


@pytest.mark.slow
def test_the_command_says_what_bounds_a_launch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bench.__main__ import main

    table = tmp_path / "table.csv"
    options = ["--backend", "cuda", "--interpreted", "--steps", "1", "--tasks", "25", "--worst", "1", "--out"]
    line = ["predict", "sinusoid", *options, str(table)]
    assert main(line) == 0
    head, row = table.read_text().splitlines()
    found = dict(zip(head.split(","), row.split(","), strict=True))
    assert (found["workload"], found["chip"], found["bound"]) == ("sinusoid", "h200", "latency")
    assert found["kernel"] == "program"
    assert 10 < float(found["us"]) < 200 and 0 < float(found["peak_share"]) < 0.02
    out = capsys.readouterr().out
    assert "clocks of warps: " in out and out.count("  phase ") == 1


def test_products_of_a_program_are_those_of_the_formula() -> None:
    """There and back without steps: one forward, two products back, none to the input."""
    from bench.sass.persistent.engine import policy
    from bench.sass.persistent.meta_steps import call_of
    from bench.sass.persistent.words import macs_of, phases_of
    from bench.workloads import WORKLOADS, mlp
    from mtml_kernels.cuda.inner_loop.backend import Persistent
    from mtml_kernels.schedule.build import plan_of

    class Asked:
        def chip_bytes(self, tasks: int, device: torch.device) -> int:
            return policy("h200").planes(25)

        def blocks(self, program: object, tasks: int, device: torch.device) -> int:
            return tasks

    w = replace(WORKLOADS["sinusoid"], build=lambda: mlp(3, 8, 2), x=(3,), out=2, support=5, query=7, steps=0)
    a = call_of(w)
    program = Persistent(Asked).program(a, plan_of(a).usually)  # type: ignore[arg-type]
    forward, weights, inputs = 3 * 8 + 8 * 2, 3 * 8 + 8 * 2, 8 * 2
    assert macs_of(program.words) == 7 * (forward + weights + inputs)
    assert len(phases_of(program.words)) == program.words.phases
