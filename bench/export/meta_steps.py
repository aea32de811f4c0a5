"""Meta-steps as definitions: the query losses of all tasks, and the exact second-order meta-gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bench.export import code
from bench.export.definition import Definition, Exports, Sized, scalar, tensor
from bench.workloads import Data, Workload, make_data, make_network, select

NAMES = ("sinusoid", "omniglot_mlp", "siren", "anil_head", "omniglot_conv", "mini_conv")
SETS = ("support_x", "support_y", "query_x", "query_y")


def _parameters(w: Workload) -> dict[str, Tensor]:
    """The starting weights of seed 0 by names that a Python function can take."""
    return {"layer" + name.replace(".", "_"): p.detach() for name, p in make_network(w).named_parameters()}


def _data(d: Definition, w: Workload) -> None:
    """Inputs of support and query sets; values of classes are ids."""
    tasks = d.variable("tasks", "tasks of a meta-batch")
    for kind, count in (("support", "samples of a task's support set"), ("query", "samples of a task's query set")):
        samples = [tasks, d.variable(kind, count)]
        image = [d.size(n) for n in w.x]
        d.inputs[f"{kind}_x"] = tensor([*samples, *image], torch.float32, f"inputs of the {kind} sets")
        regression = w.loss == "mse"
        shape, dtype = ([*samples, d.size(w.out)], torch.float32) if regression else (samples, torch.int64)
        what = "targets" if regression else f"class ids below {w.out}"
        d.inputs[f"{kind}_y"] = tensor(shape, dtype, f"{what} of the {kind} sets")


def definition(w: Workload) -> Definition:
    """Inputs in the order of ``run``: both sets, the rate, the parameters. Outputs: losses, then a gradient each."""
    params = _parameters(w)
    about = f"One MAML meta-step of {w.steps} inner steps, {w.loss}, on {w.network}: query losses, exact meta-gradient."
    text = code.meta_step(w, make_network(w), list(params), [*SETS, "lr", *params])
    d = Definition(f"maml_{w.name}", "inner_loop", about, text)
    _data(d, w)
    d.inputs["lr"] = scalar("rate of the inner steps")
    d.outputs["loss"] = tensor(["tasks"], torch.float32, "mean query loss of each task after its inner steps")
    for name, p in params.items():
        d.inputs[name] = tensor([d.size(n) for n in p.shape], torch.float32, f"parameter {name} at the start")
        d.outputs[f"{name}_grad"] = {**d.inputs[name], "description": f"gradient of the mean loss for {name}"}
    for name in ("support_x", "query_x") if w.inputs else ():
        d.outputs[f"{name}_grad"] = {**d.inputs[name], "description": f"gradient of the mean loss for {name}"}
    return d


def sized(w: Workload) -> Sized:
    """The workload's sizes; what is not standard normal is dumped: class ids, weights, scaled inputs."""
    data: Data = make_data(w)
    random = (w.scale == 1.0, w.loss == "mse") * 2
    held = {name: part for name, part, normal in zip(SETS, data, random, strict=True) if not normal}
    axes = {"tasks": w.tasks, "support": w.support, "query": w.query}
    return Sized(axes, {"lr": w.lr}, {**held, **_parameters(w)})


def exports(names: Iterable[str] = NAMES) -> Exports:
    """Definitions of these workloads, each with its own size and with a single task."""
    for w in select(names):
        yield definition(w), [sized(w), sized(replace(w, tasks=1))]
