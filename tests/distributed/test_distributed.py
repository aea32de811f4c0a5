"""Shares of the tasks on several ranks: gradients of one process, whatever the shares; wrong use is said."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases.ranks import alone, together
from cases.shared_gradients import LEARNERS, Both, batch_of, session
from torch import Tensor, nn

import mtml
from mtml.distributed import MetaLoss, average_gradients, mean_over_tasks, shard_tasks, share_of

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
EXACT = [f"{name} {tasks}" for name in LEARNERS for tasks in (4, 5)]
EXACT += ["empty mlp", "empty rates", "empty anil", "sharded mlp", "sharded anil", "sharded empty anil"]
EXACT += ["sharded trunk 5", "sharded trunk 1"]
EXACT += ["by hand", "by hand, empty", "own forward"]


@pytest.fixture(autouse=True)
def one_process() -> Any:
    with alone():
        yield


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; the second does not come back."""
    return together(session, tmp_path_factory.mktemp("ranks"))


def difference(found: Both) -> float:
    """Of all gradients together, relative to those of one process."""
    assert found.one.keys() == found.all.keys()
    pairs = [(found.all[name].double(), one.double()) for name, one in found.one.items()]
    norm = torch.stack([one.norm() for _, one in pairs]).norm()
    return float(torch.stack([(ours - one).norm() for ours, one in pairs]).norm() / norm)


class TestRanks:
    @pytest.mark.parametrize("case", EXACT)
    def test_gradients_are_those_of_one_process(self, ranks, case):
        assert difference(ranks[0][case]) < 1e-12

    @pytest.mark.parametrize("name", LEARNERS)
    def test_in_float32_to_rounding(self, ranks, name):
        assert difference(ranks[0][f"float32 {name}"]) < 2e-6

    @pytest.mark.parametrize("control", ["means of means", "first order", "nobody averages"])
    def test_what_is_wrong_differs(self, ranks, control):
        """The controls: shares weighed alike, the second order dropped, and each rank by itself."""
        assert difference(ranks[0][control]) > 1e-3

    def test_shares_of_unequal_size_and_empty_ones_were_among_them(self, ranks):
        assert [ranks[0][case].tasks for case in ("mlp 5", "mlp 4", "empty mlp", "by hand, empty")] == [2, 2, 0, 0]

    def test_a_gradient_that_some_ranks_lack(self, ranks):
        assert ranks[0]["absent"] == [True, True, False]

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ("DDP in MAML", r"^model: .*DistributedDataParallel, .*wrap the learner.*MetaLoss\(learner\)"),
            ("DDP within", "^model: .*DistributedDataParallel at '0'"),
            ("DDP in ANIL", "^features: .*DistributedDataParallel, "),
            ("sharded MAML", r"^model: .*'0.weight'.*fully_shard\(mtml.distributed.MetaLoss\(learner\)\)"),
            ("sharded head", "^head: .*'weight' as fully_shard divides it"),
            ("later sharded head", "^head: .*'weight' as fully_shard divides it"),
            ("average", "^params: .*fully_shard"),
        ],
    )
    def test_wrong_wrappers_are_named(self, ranks, wrong, words):
        assert re.search(words, ranks[0]["refused"][wrong])

    def test_a_lost_rank_is_said_in_seconds(self, ranks):
        said, seconds = ranks[0]["lost"]
        assert said.startswith("the other process of this job was killed") and seconds < 5 and ranks[1] is None


class TestShares:
    @pytest.mark.parametrize("tasks", [0, 1, 2, 5, 8, 25])
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_every_task_is_in_one_share(self, tasks, count):
        shares = [range(tasks)[share_of(tasks, rank, count)] for rank in range(count)]
        assert [task for share in shares for task in share] == list(range(tasks))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_of_batches_of_every_form(self):
        batch = batch_of(5, "mlp", masks=True)
        share = shard_tasks(batch, rank=1, ranks=2)
        assert isinstance(share, mtml.TaskBatch) and share.tasks == 3
        assert all(torch.equal(part, whole[2:]) for part, whole in zip(share, batch, strict=True))
        assert shard_tasks(batch_of(5, "mlp"), rank=0, ranks=2).support_mask is None
        nested = {"a": (torch.arange(4), [torch.zeros(4, 2)]), "b": None, "c": "name"}
        found = shard_tasks(nested, rank=1, ranks=2)
        assert found["a"][0].tolist() == [2, 3] and found["a"][1][0].shape == (2, 2) and found["c"] == "name"

    def test_one_process_has_all(self):
        batch = batch_of(3, "mlp")
        assert shard_tasks(batch) is batch

    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda: share_of(5, 2, 2), ValueError, r"rank: expected 0\.\.1 of 2 ranks, got 2"),
            (lambda: shard_tasks(batch_of(5, "mlp"), rank=1), ValueError, "expected both or neither"),
            (lambda: shard_tasks((torch.zeros(2), torch.zeros(3))), ValueError, r"same T .* \[2, 3\]"),
            (lambda: shard_tasks({"a": None}), TypeError, "expected tensors"),
            (lambda: shard_tasks(torch.tensor(1.0)), TypeError, "expected tensors"),
            (lambda: mean_over_tasks(torch.zeros(2, 2)), ValueError, "losses: expected one for each"),
            (lambda: mean_over_tasks(torch.zeros(2), 1), ValueError, "tasks: expected the number of tasks of all"),
            (lambda: mean_over_tasks(torch.zeros(2), 3), ValueError, "on one of 1 rank"),
            (lambda: mean_over_tasks(torch.zeros(0)), ValueError, "got 0 with 0 losses"),
            (lambda: MetaLoss(nn.Linear(2, 1)), TypeError, "learner: expected an mtml.MAML"),
        ],
    )
    def test_bad_arguments(self, call, error, words):
        with pytest.raises(error, match=words):
            call()

    def test_a_group_that_was_not_joined(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        for call in (shard_tasks, mean_over_tasks, lambda x: average_gradients([x])):
            with pytest.raises(RuntimeError, match=r"2 processes that WORLD_SIZE names.*init_process_group"):
                call(torch.zeros(2))


class TestMetaLoss:
    def test_is_the_meta_loss(self):
        torch.manual_seed(0)
        maml, batch = LEARNERS["mlp"]().double(), batch_of(3, "mlp")
        options: dict[str, Any] = {"steps": 2, "step_weights": [0.5, 0.5]}
        assert torch.equal(MetaLoss(maml)(batch, **options), maml.meta_loss(batch, **options))
        assert torch.equal(mean_over_tasks(maml.meta_loss(batch), 3), maml.meta_loss(batch).mean())
        assert MetaLoss(maml).state_dict().keys() == {f"learner.{name}" for name in maml.state_dict()}

    @pytest.mark.parametrize("name", LEARNERS)
    def test_no_tasks_have_gradients_of_zero(self, name):
        learner = LEARNERS[name]().double()
        batch = shard_tasks(batch_of(1, name), rank=0, ranks=2)
        losses = MetaLoss(learner)(batch)
        assert losses.shape == (0,) and batch.tasks == 0
        with torch.no_grad():
            next(learner.parameters()).fill_(float("inf"))  # of which a product with zero would be NaN
        losses.sum().backward()
        grads: list[Tensor | None] = [p.grad for p in learner.parameters()]
        assert all(grad is not None and not grad.any() for grad in grads)

    def test_no_tasks_at_every_step(self):
        maml, batch = LEARNERS["mlp"]().double(), shard_tasks(batch_of(1, "mlp"), rank=0, ranks=2)
        assert MetaLoss(maml)(batch, query_steps=True).shape == (4, 0)
        assert MetaLoss(maml)(*batch[:4], query_steps=True, steps=0).shape == (1, 0)
