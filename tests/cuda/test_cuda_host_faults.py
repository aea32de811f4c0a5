"""Negative controls: kernels with one fault each, which a run on the CPU finds and names by its line."""

from __future__ import annotations

from signal import SIGABRT

import pytest
from cases.cuda_host import ORDERS
from cases.cuda_kernels import case, line

# Case -> where its kernel writes and reads with nothing in between that orders the two.
RACES = {
    "rotation_without_barrier": ("blocks.cu", "rotate: write", "rotate: read"),
    "pairs_without_barrier": ("warps.cu", "swap_pairs: write", "swap_pairs: read"),
    "pairs_by_shuffle": ("warps.cu", "by_shuffle: write", "by_shuffle: read"),
    "clusters_without_first": ("clusters.cu", "from_next: write", "from_next: read"),
    "copies_too_early": ("copies.cu", "early: copy", "early: read"),
    "blocks_race": ("blocks.cu", "overwrite: write"),
    "overlaps_without_wait": ("overlaps.cu", "twice: write", "add_reversed: read"),
    "overlaps_copied_early": ("overlaps.cu", "twice: write", "add_copied: wait"),
    "last_block_without_fence": ("blocks.cu", "last block: write", "last block: read"),
}


@pytest.mark.parametrize("name", RACES)
def test_a_missing_barrier_is_a_race(name: str) -> None:
    file, *comments = RACES[name]
    done = case(name, "thread")
    assert done.status == 66  # ThreadSanitizer's
    first = done.errors.split("WARNING: ThreadSanitizer: data race")[1].split("Location is")[0]
    for comment in comments:
        assert line(file, comment) in first, first


@pytest.mark.parametrize("name", ["rotation_without_barrier", "pairs_without_barrier", "clusters_without_first"])
def test_a_missing_barrier_makes_orders_differ(name: str) -> None:
    reports = [case(name, order=order).report for order in ORDERS]
    assert len({report["bits"] for report in reports}) > 1
    assert "nan" in [report["error"] for report in reports]


@pytest.mark.parametrize("name", ["copies_without_wait", "copies_too_early"])
def test_copies_have_not_arrived_before_their_wait(name: str) -> None:
    assert "nan" in [case(name, order=order).report["error"] for order in ORDERS]


# Case -> the message, and the comments that name lines of faults.cu.
FAULTS = {
    "divergent_block": ("divergent barrier", "divergent: first", "divergent: second"),
    "divergent_warp": ("divergent barrier", "divergent warp: first", "divergent warp: second"),
    "lost_block": ("lost barrier", "lost: block", "lost: warp"),
    "shuffle_out": ("a shuffle reads lane 20, which its mask 0000ffff does not name", "outside"),
    "lane_not_in_mask": ("mask 0000ffff does not name its lane 16", "not in mask"),
    "lane_gone": ("lane 7 has returned", "gone"),
    "wrong_warp": ("names lanes that do not exist", "no such lane"),
    "overrun_between": ("written past the end of this array of 40 bytes", "carved: a"),
    "overrun_past": ("written past the end of its 40 bytes",),
    "overrun_name": ("written past the end of this array of 40 bytes", "named: a"),
    "carve_too_much": ("SharedCarver: 400 bytes taken, 64 launched with", "too much"),
    "carve_differently": ("a block has one layout", "differently"),
    "misaligned": ("an address that is no multiple of 16", "misaligned"),
    "not_shared": ("the target is not in this block's shared memory", "not shared"),
    "no_such_peer": ("no block 2 in the cluster", "no such peer"),
    "peer_gone": ("block 0 of the cluster has returned", "peer gone"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_rule_ends_the_run_and_is_named(name: str) -> None:
    message, *comments = FAULTS[name]
    done = case(name)
    assert done.status == -SIGABRT
    assert message in done.errors
    for comment in comments:
        assert line("faults.cu", comment) in done.errors


@pytest.mark.parametrize("name, comment", [("between", "carved"), ("past", "end"), ("name", "named")])
def test_an_overrun_is_found_where_it_happens(name: str, comment: str) -> None:
    done = case(f"overrun_{name}", "address")
    assert done.status == 1  # AddressSanitizer's
    assert "use-after-poison" in done.errors
    assert line("faults.cu", f"overrun: {comment}") in done.errors


def test_a_block_that_returns_too_early_takes_its_memory_along() -> None:
    read = line("clusters.cu", "from_next: read")
    assert "nan" in [case("clusters_without_last", order=order).report["error"] for order in ORDERS]
    for flavour, status in (("thread", 66), ("address", 1)):
        done = case("clusters_without_last", flavour)
        assert done.status == status and read in done.errors
