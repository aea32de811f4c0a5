"""MAML as a module: batches of tasks in, meta-losses and their exact gradients out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mtml.algorithms.base import CallOptions, Loss
from mtml.algorithms.gram import gram_of_tasks, some_tasks
from mtml.algorithms.learner import ModelLearner, Rate
from mtml.clone import clone_module, inner_gradients, replace_tensors, shallow, step_rates
from mtml.params import ParamsArg, select
from mtml.paths.batch import Batch, Parts, unpacked, weights_list
from mtml.paths.fused import Fused
from mtml.paths.half import Narrowed
from mtml.paths.path import Path
from mtml_kernels.batch_norm import per_step_names, step_rows
from mtml_kernels.checks import check_steps
from mtml_kernels.general.task import apply_update
from mtml_kernels.general.twin import twin
from mtml_kernels.transforms import refuse_transforms

__all__ = ["MAML"]


class MAML(ModelLearner):
    """Model-agnostic meta-learning: adapt a model to each task by K gradient steps, and learn where to start.

    Each call takes a batch of T tasks at once: support sets sx [T, S, ...], sy [T, S, ...] to adapt on, query sets
    qx [T, Q, ...], qy [T, Q, ...] to judge the adapted models by. Inputs are a tensor, or a tuple (several arguments of
    the model) or dict (keyword arguments) of such. A `TaskBatch`, or an equal tuple, may take the place of the four.
    Targets may be None where the loss takes the output alone: loss(output), such as an entropy.
    Gradients through the inner loop are exact, second order included, unless `first_order`: to the parameters, the
    rates, the inputs, the targets that are floating point (probabilities for cross_entropy, say) and the masks.

    Models of known layers run in the fused engine (`explain` says which layers those are), everything else in PyTorch
    operations with the same results (one `FallbackWarning` says so).

    Half precision is how tensors are stored: a fused model in float16 or bfloat16 adapts in float32, and results come
    in its dtype, rounded once. Under torch.autocast a fused call computes in float32 what a plain loop rounds; data may
    be of half precision beside a float32 model then, and losses and outputs are float32. float64 stays float64. On the
    general path modules run as autocast has them.

    The model and everything given here may change between two calls: the next call takes them as they are. Only what no
    name in the forward's code shows (a file, the environment, thread-local state) is noticed late, by tracing the model
    again after 64 calls, then after 4 times as many, and so on.

    In a function that torch.compile compiles, a call is part of the graph where the model is fused. The graph follows
    such changes too; those that the function itself makes before the call are refused.

    Args:
        model: any module. It is registered as ``module``: state_dict keys start with "module.".
        lr: the inner learning rate: a number; a scalar tensor; [K], one per step; {name: rate} with each rate a scalar,
            [*shape], or per step with exactly 1 + ndim dimensions; or an `InnerLR`. Tensors may require grad.
        first_order: treat inner gradients as constants (FOMAML).
        allow_unused: leave parameters as they are that the model's output depends on and the inner loss does not, such
            as a head for the query loss alone; without it that is an error, at the first call of its kind. What no
            output depends on stays as it is in any case, but for `adapt`, which sees the loss alone. Defaults to
            `allow_nograd`.
        allow_nograd: for `adapt`: leave parameters as they are that require no grad. Batches of tasks need no such
            permission: by default they adapt what requires grad, and `params` may name what does not.
        steps: K, the number of inner gradient steps.
        loss: of a task: "cross_entropy", "mse", "bce_with_logits", "huber", "l1"; an ``nn.*Loss`` or ``F.*`` function;
            or a callable(output [N, ...], target [N, ...]) -> scalar, or losses [N, ...] per sample, which is fused
            where it computes a multiple of one of those and reads nothing but constants. One that takes the
            output alone needs no targets. The callable alone knows what to do with outputs of several tensors.
        query_loss: the same for the query set; None: as `loss`.
        params: which tensors the inner loop changes: None for all trainable parameters; names or patterns ("head.*");
            or predicate(name, tensor). Buffers and frozen parameters may be named: they are adapted for each task and
            not meta-trained (CAVIA, functa). A tensor with several names is meant by each of them, here and in a dict
            of rates, and is called by its first in results. Of the last linear layer alone (ANIL): the layers before it
            run once where that is exact and cheaper.
        batch_norm: "module": batch normalisation normalises as its layers' train()/eval() mode and track_running_stats
            say, and running statistics stay as they are; "track": they are updated, task by task; "batch": always batch
            statistics; "running": always running statistics; "per_step" (MAML++): batch statistics, and a weight and
            bias for every one of the steps: the model's BatchNorm layers are replaced, in the model itself, by
            `PerStepBatchNorm` layers, which are meta-trained and not adapted.
        backend: "auto"; "cpu" or "triton" for that engine or an error; "cuda" for a call as one launch, of models
            without convolutions, in builds with CUDA code ("auto" leaves it); "cuda:tf32" or "cuda:tf32x3" for the same
            on matrix units, of perceptrons that have kernels there: large products in TF32, or by three of TF32 each
            with about float32's error; "cpu:weights" or "cpu:low_rank" for the engine with each task's own weights, or
            with shared ones and low-rank corrections, where "cpu" chooses by a cost model; "torch" for the same inner
            loop as a list of PyTorch operations, forward-over-reverse without a graph, on any device and in half
            precision too (what "auto" takes where neither "cpu" nor "triton" runs); "reference" for the engine's plain
            PyTorch specification; "general" for PyTorch operations on the module itself, differentiable any number of
            times.
        update: another rule than gradient descent: one of `mtml.inner` (SGD with momentum, Adam, AdamW, RMSprop,
            clipping), fused; or update(params, grads, lr, step) -> params on dicts by name, on the general path. Such a
            rule with a fifth parameter `state` gets what it returned before (None at first) and returns (params,
            state). A module is registered, so that its own parameters are learned.

    Raises:
        ValueError: an unknown name in loss, backend or batch_norm; params that match nothing; rates that are not
            finite, are missing, or are fewer than the steps; shapes that disagree; labels out of range; no task at all.
        RuntimeError: the inner loss does not depend on a parameter (see allow_unused).
        TypeError: an argument or a tensor of the wrong type, such as integers where the first layer needs floats; a
            model in DistributedDataParallel (`mtml.distributed` wraps the learner instead).
        BackendUnavailable: the backend asked for by name cannot run the model, the loss, or on this machine.

    Example:
        >>> import torch, mtml
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> maml = mtml.MAML(model, lr=0.01, steps=5, loss="mse")
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> loss = maml.meta_loss(x, y, x, y)
        >>> loss.shape
        torch.Size([4])
        >>> loss.mean().backward()

    Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        steps: int = 1,
        loss: Loss = "cross_entropy",
        query_loss: Loss | None = None,
        params: ParamsArg = None,
        batch_norm: str = "module",
        backend: str = "auto",
        update: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            lr,
            first_order,
            allow_nograd if allow_unused is None else allow_unused,
            steps=steps,
            loss=loss,
            query_loss=query_loss,
            params=params,
            batch_norm=batch_norm,
            backend=backend,
            update=update,
        )
        self.allow_nograd = allow_nograd
        self._taken, self._rule_state = 0, None  # of the per-task loop: inner steps so far, the update rule's state

    def task_gradients(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> dict[str, Tensor]:
        """The meta-gradient of every task's own loss: {name: [T, *shape]} of the parameters that require grad.

        Of tensors that `start` names it is the gradient of where each task starts. Exact, in one pass where the model
        is fused, else by a backward pass a task. To clip or to balance tasks: `p.grad = clipped[name].mean(0)`.

        Args:
            sx, sy, qx, qy, options: as of `meta_forward`, less query_steps.

        Raises:
            ValueError: query_steps, which give a loss no single gradient.
            RuntimeError: within a transform of torch.func.

        Example:
            >>> import torch, mtml
            >>> maml = mtml.MAML(torch.nn.Linear(2, 1), lr=0.1, loss="mse")
            >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
            >>> maml.task_gradients(x, y, x, y)["weight"].shape
            torch.Size([4, 1, 2])
        """
        refuse_transforms("task_gradients", "torch.func.jacrev of meta_loss, by torch.func.functional_call")
        if options.get("query_steps"):
            raise ValueError("query_steps: expected False, a loss for every task; call meta_loss and differentiate it")
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        masks = options.get("support_mask"), options.get("query_mask")
        path, batch = self._apart(unpacked(sx, sy, qx, qy, *masks, self), options)
        if isinstance(path.path if isinstance(path, Narrowed) else path, Fused):
            found = path(batch).adapted
            tasks = batch.tasks
            return {n: found[n] if n in found else p.new_zeros(tasks, *p.shape) for n, p in named.items()}
        start = self._extras(False, False, options.get("start")).start or {}
        own = {name: tensor.detach().requires_grad_() for name, tensor in start.items()}
        if own:
            options["start"] = own
        loss, inputs = self.meta_loss(sx, sy, qx, qy, **options), [own.get(name, p) for name, p in named.items()]
        rows = [torch.autograd.grad(each, inputs, retain_graph=True, materialize_grads=True) for each in loss]
        columns = zip(named, zip(*rows, strict=True), strict=True)
        return {n: torch.stack([g[t] if n in own else g for t, g in enumerate(column)]) for n, column in columns}

    def task_gram(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> Tensor:
        """Inner products of the tasks' meta-gradients, [T, T]: who agrees with whom.

        Arguments and errors as of `task_gradients`. Of all T gradients as many are held at a time as fit 1 GiB; where
        that is not all, they are computed several times over.

        Example:
            >>> import torch, mtml
            >>> maml = mtml.MAML(torch.nn.Linear(2, 1), lr=0.1, loss="mse")
            >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
            >>> maml.task_gram(x, y, x, y).shape
            torch.Size([4, 4])
        """
        masks = options.pop("support_mask", None), options.pop("query_mask", None)
        parts, start = unpacked(sx, sy, qx, qy, *masks, self), options.pop("start", None)

        def gradients(tasks: slice) -> dict[str, Tensor]:
            *data, support_mask, query_mask = some_tasks(tuple(parts), tasks)
            given: CallOptions = {**options, "support_mask": support_mask, "query_mask": query_mask}
            if start is not None:
                given["start"] = some_tasks(start, tasks)
            return self.task_gradients(*data, **given)

        each = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
        return gram_of_tasks(gradients, len(Batch(*parts)), max(each, 1))

    def _apart(self, parts: Parts, options: CallOptions) -> tuple[Path, Batch]:
        """The path that gives gradients a task, and its batch."""
        steps, first_order, weights = options.get("steps"), options.get("first_order"), options.get("step_weights")
        steps = self.steps if steps is None else steps
        first_order = self.first_order if first_order is None else first_order
        extras = self._extras(options.get("per_step", False), False, options.get("start"))._replace(apart=True)
        listed = None if weights is None else weights_list(weights, check_steps(steps))
        batch = Batch(*parts, listed, extras)
        paths = self._paths if self._paths.owner is self else self._own_paths()
        return paths.find(batch, steps, first_order, 0), batch

    # --- one task at a time -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; of a clone that took k steps, with row k of what exists once per step."""
        rows = step_rows(self.module, self._taken, query=False)
        if not rows:
            return self.module(*args, **kwargs)
        own = dict(self.module.named_parameters())
        new = {id(own[name]): row for name, row in rows.items()}
        return twin(self.module, lambda tensor, _: new.get(id(tensor), tensor))(*args, **kwargs)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A copy to adapt to one task; gradients of what it computes arrive in this module's parameters.

        Buffers, and so running statistics, are shared. The arguments replace this module's settings in the copy.

        Example:
            >>> import torch, mtml
            >>> maml = mtml.MAML(torch.nn.Linear(2, 1), lr=0.1)
            >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
            >>> learner = maml.clone()
            >>> learner.adapt((learner(x) - y).square().mean())
            >>> (learner(x) - y).square().mean().backward()
            >>> maml.module.weight.grad.shape
            torch.Size([1, 2])
        """
        named = frozenset() if self.params is None else frozenset(select(self.module, self.params))
        given = {"first_order": first_order, "allow_unused": allow_unused, "allow_nograd": allow_nograd}
        learner: MAML = shallow(self, given, module=clone_module(self.module, named))
        return learner

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner gradient step on a task's loss, in place; call it on a clone.

        Raises:
            RuntimeError: the loss does not depend on a parameter (unless `allow_unused`), or a parameter requires no
                grad (unless `allow_nograd`); or the call is within a transform of torch.func.
            ValueError: the loss is no scalar, or there is no learning rate for this step.
        """
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        first_order = self.first_order if first_order is None else first_order
        tensors = self._adapted_tensors()
        names = list(tensors)
        grads = inner_gradients(
            loss,
            list(tensors.values()),
            lambda: names,
            create_graph=not first_order,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        found = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
        new = self._stepped({name: tensors[name] for name in found}, found)
        replace_tensors(self.module, {id(tensors[name]): tensor for name, tensor in new.items()})
        self._taken += 1

    def _adapted_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.module.named_parameters())
        if self.params is None:
            fixed = per_step_names(self.module)
            return {name: p for name, p in found.items() if p.is_floating_point() and name not in fixed}
        found = dict(self.module.named_buffers()) | found
        return {name: found[name] for name in select(self.module, self.params)}

    def _stepped(self, tensors: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors after one step of the update rule."""
        if not tensors:
            return {}
        rates = step_rates(self.lr, self.module, tensors, self._taken)
        new, self._rule_state = apply_update(self.update, tensors, grads, rates, self._taken, self._rule_state)
        return new

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)
