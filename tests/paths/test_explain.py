"""explain(): which path, which kernel, and why."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import mlp, regression
from torch import Tensor, nn

from mtml import MAML, FallbackWarning, inner
from mtml_kernels.ops.inner_loop import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS.available())
def test_fused(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    maml, batch = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse", backend=backend), regression()
    explanation = maml.explain(*batch)
    content = explanation.to_dict()
    assert content["path"] == "fused" and content["kernel"].startswith(backend) and content["reasons"] == []
    assert [node["op"] for node in content["nodes"]] == ["input", "linear", "tanh", "linear"]
    assert content["adapted"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (content["steps"], content["first_order"], content["loss"]) == (2, False, "mse")
    printed = capsys.readouterr().out
    assert printed.strip() == str(explanation).strip()
    assert "path: fused" in printed and "0.weight 0.bias" in printed and "2 steps, exact second order" in printed
    json.dumps(content)


def test_a_schedule_is_listed_call_by_call(capsys: pytest.CaptureFixture[str]) -> None:
    maml, batch = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse", backend="torch"), regression()
    found = maml.explain(*batch)
    assert f"schedule: {len(found.calls)} calls, " in capsys.readouterr().out
    assert "fp64 on an H200" in found.predicted and found.predicted.endswith("the tensors lie on cpu")
    assert [set(call) for call in found.calls] == [{"where", "name", "flops", "bytes", "us", "bound"}] * len(
        found.calls
    )
    assert found.calls[0]["where"] == "step 0: support values" and found.calls[0]["name"].endswith(
        "linear.forward + act.forward"
    )
    assert sum(call["us"] for call in found.calls) > 2.2 * len(found.calls)
    longer = MAML(mlp(3, 6, 2), 0.1, steps=3, loss="mse", backend="torch").explain(*batch)
    assert len(longer.calls) > len(found.calls) and found.to_dict()["calls"] == found.calls


def test_what_runs_by_no_schedule_lists_no_calls() -> None:
    for backend in ("cpu", "reference", "general"):
        found = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse", backend=backend).explain(*regression())
        assert found.calls == [] and found.predicted == "" and "schedule" not in str(found)
        assert found.launch == "" and "launch" not in str(found)


def test_threads_are_said_of_the_engine_alone() -> None:
    """Of as many as PyTorch allows: the tests' small calls are worth every one."""
    maml = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse", backend="cpu")
    most = torch.get_num_threads()
    found = maml.explain(*regression())
    assert found.threads == f"at most {most} of {most}" and f"threads: {found.threads}" in str(found)
    for backend in ("torch", "reference", "general"):
        other = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse", backend=backend).explain(*regression())
        assert other.threads == "" and "\nthreads:" not in str(other)


def test_the_one_launch_of_backend_cuda_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """In numbers, for an H200 where there is no GPU, and with the reason why it does not run here."""
    found = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse", backend="torch").explain(*regression())
    assert f"launch: {found.launch}" in capsys.readouterr().out and found.to_dict()["launch"] == found.launch
    numbers = (
        r"plain kernel, \d+ phases in \d+ words; 3 blocks of 32 threads; a task takes [\d,]+ bytes of shared memory"
    )
    assert re.match(rf"by backend='cuda' one for all steps, on an H200: {numbers} and 0 of workspace", found.launch)
    assert ("; not here: " in found.launch) == ("cuda" not in BACKENDS.available() or not torch.cuda.is_available())


def test_of_the_trunk_and_of_the_gram_form_no_launch_is_claimed() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = [t.float() for t in regression()]
    trunk = MAML(net, 0.1, params="2.*", steps=20, loss="mse", backend="torch").explain(*batch)
    assert trunk.trunk.startswith("it runs once") == trunk.launch.endswith("the pass of the trunk is another")


def test_what_no_block_can_run_is_named_with_the_way_out() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    images, targets = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 2)
    found = MAML(net, 0.1, loss="mse", backend="torch").explain(images, targets, images, targets)
    why = "conv.forward has no form in a thread block"
    assert found.launch == f"backend='cuda' cannot run it: {why}; backend='triton' does, layer by layer"


def test_a_schedule_of_class_ids_ids_and_learnt_rates() -> None:
    """Whatever a call can hold has its place in the schedule that explain() makes up."""
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 5))
    ids, labels = torch.randint(0, 7, (2, 6, 3)), torch.randint(0, 5, (2, 6))
    rate = torch.tensor(0.1, requires_grad=True)
    found = MAML(net, rate, steps=2, loss="cross_entropy", backend="torch").explain(ids, labels, ids, labels)
    assert any("update.rate" in call["name"] for call in found.calls)
    rule = MAML(net, 0.1, steps=2, loss="cross_entropy", backend="torch", update=inner.Adam())
    adam = rule.explain(ids, labels, ids, labels)
    assert any("update.adjoint" in call["name"] for call in adam.calls)
    assert len(rule.explain(ids, labels).calls) > 0  # without query sets
    of_head = MAML(net, 0.1, params="2.*", steps=20, loss="cross_entropy", backend="torch")
    assert of_head.explain(ids, labels, ids, labels).calls


def test_fused_names_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where one call gives several tensors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.w = nn.Linear(3, 8), nn.RMSNorm(4), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).chunk(2, -1)
            hidden = self.norm(F.elu(left)) * right.softmax(-1)
            return hidden @ self.w.T @ self.w @ self.w.T

    print(MAML(Net().double(), 0.1, loss="mse").explain(*regression()))
    printed = capsys.readouterr().out
    assert "path: fused" in printed
    for op in ("slice 0:4", "slice 4:8", "elu", "rms_norm", "softmax", "linear_transposed"):
        assert f"  {op} " in printed, op


def test_general_names_every_obstacle() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 4), nn.Softsign(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(self.norm(self.a(x)), -1))

    maml, batch = (
        MAML(Net().double(), 0.1, loss=nn.MSELoss(), query_loss=lambda o, t: (o - t).abs().mean()),
        regression(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = maml.explain(*batch).to_dict()
    assert content["path"] == "general" and content["kernel"] in ("loop", "vmap")
    reasons = "\n".join(content["reasons"])
    for word in ("norm", "cumsum", "lambda"):
        assert word in reasons
    assert any(not node["fused"] for node in content["nodes"])
    assert content["loss"] == "MSELoss" and content["query_loss"] == "<lambda>"
    json.dumps(content)
    # the warning of the first real call has explain()'s line
    with pytest.warns(FallbackWarning) as caught:
        maml.meta_loss(*batch)
    assert content["reasons"][0] in str(caught[0].message) and len(caught) == 1


def test_without_queries_and_from_a_batch() -> None:
    maml, batch = MAML(mlp(3, 6, 2), 0.1, loss="mse"), regression()
    assert maml.explain(*batch[:2]).path == "fused"
    assert maml.explain(batch).path == "fused"
    assert MAML(mlp(3, 6, 2), 0.1, loss="mse", backend="general").explain(*batch).reasons == [
        "backend: 'general' was asked for"
    ]
    with pytest.raises(AttributeError):
        _ = maml.explain(*batch).nothing
