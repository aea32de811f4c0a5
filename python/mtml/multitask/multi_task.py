"""Multi-task meta-learning: groups of tasks of several kinds that learn one start together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from mtml.algorithms.learner import Rate
from mtml.balance.affinity import gram
from mtml.distributed.shares import mean_over_tasks
from mtml.inner_lr import InnerLR
from mtml.multihead.heads import Head, HeadLayer
from mtml.multihead.inputs import check_heads
from mtml.multitask.adapted import AdaptedGroup
from mtml.multitask.arguments import by_group, check_inputs, check_sets, layers_of, trunks_of
from mtml.multitask.features import GroupModel
from mtml.multitask.group import Group
from mtml.multitask.joint import joint_losses
from mtml.multitask.losses import MultiTaskLoss
from mtml.params import ParamsArg
from mtml.paths.explain import Explanation
from mtml.tasks.task_batch import TaskBatch
from mtml.weighting.base import Weighting
from mtml.weighting.following import takes_gradients
from mtml.weighting.make import make_weighting
from mtml_kernels.checks import check_steps, leaves, shown
from mtml_kernels.neutral import uncompiled

__all__ = ["MultiTaskMAML"]

Trunk = nn.Module | Mapping[str, nn.Module]
GroupRate = Rate | Mapping[str, Any] | Callable[[nn.Module], InnerLR]
GroupParams = ParamsArg | Mapping[str, ParamsArg]


class MultiTaskMAML(nn.Module):
    """Meta-learn one start for groups of tasks that differ in inputs, outputs, loss and size.

    A group has a head (theta_i, and with it a loss L_i); the trunk (theta) is shared. The inner loop adapts the head of
    a task's group to its support set, or whatever `params` names; the query losses are averaged over a group's tasks,
    and the weighting makes the groups' losses one. Gradients through the inner loop are exact, second order included,
    unless `first_order`: to the trunk, the heads, the rates and the weighting.

    Where heads alone are adapted (the default) a trunk runs once over all samples of a group, support and query
    together, as in `ANIL`: any module, recurrent ones and embeddings included, and a batch normalisation in train mode
    takes its statistics over all of them. The inner loop is then one call of the engine for a group, on a row of
    features for each sample, pixel or token. With `params` of the trunk, a group is a `MAML` of trunk and head. Losses
    that the inner loop has not fused ("kl", "gaussian_nll", pos_weight, class weights with label smoothing) take the
    general path, with the same results.

    With ``steps=0`` there is no inner loop: plain multi-task learning of trunk and heads on the query sets, whose
    losses are one fused operation.

    Trunks, heads, rates and options may change between two calls: the next call takes them as they are.

    A state_dict has "trunk.*" ("trunk.GROUP.*" where each group has its own), "heads.GROUP.weight" and
    "heads.GROUP.bias", and "weighting.*", "lr.*", "update.*" where these learn or remember something.

    Args:
        trunk: one for all groups, or {group: trunk}, in which a module may stand for several groups. It returns
            features as the group's head takes them: [N, D], [N, D, H, W] or [N, L, D]; for a head of one prediction a
            sample, features of pixels or positions are averaged.
        heads: {group: head}, such as `mtml.Classification(5)`; see `mtml.multihead.heads.Head` for kinds and targets.
        lr: the inner learning rate, as of `MAML`, or {group: such}. Rates by name say "head.weight", "trunk.0.bias" and
            so on. A function from a group's model, which has those names, to an `InnerLR` gives each group its own:
            ``lambda model: mtml.InnerLR(model, 0.1, per="tensor", params="head.*")``.
        steps: K, the number of inner gradient steps; 0 for plain multi-task learning.
        params: what the inner loop changes, by the names of a group's model: None for "head.*"; patterns or a
            predicate, as of `MAML`; or {group: such}.
        weighting: across groups: "sum", "uncertainty", "dwa", "gls", "rlw", "gradnorm", "famo", "stch", "imtl_l",
            "cosmos", {group: weight} or a `mtml.weighting.Weighting`. "gradnorm" measures gradients at the trunks'
            parameters, or where it is told.
        first_order, update, backend: as of `MAML`.
        in_features: D of the trunk's features, or {group: D}; None: as the trunk's last layer with a width says.

    Raises:
        ValueError: no heads, a group without a trunk or a trunk without a head, params or rates that match nothing;
            when called, unknown groups, shapes that do not fit. Each is named with what was expected.
        TypeError: arguments of the wrong type.
        BackendUnavailable: the backend asked for by name cannot run here.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
        >>> heads = {"shape": mtml.Classification(3), "size": mtml.Regression(2)}
        >>> model = mtml.MultiTaskMAML(trunk, heads, lr=0.1, steps=3, in_features=16)
        >>> x, ids = torch.randn(5, 8, 4), torch.randint(3, (5, 8))
        >>> few, values = torch.randn(2, 6, 4), torch.randn(2, 6, 2)
        >>> shapes, sizes = mtml.TaskBatch(x, ids, x, ids), mtml.TaskBatch(few, values, few, values)
        >>> losses = model.meta_loss({"shape": shapes, "size": sizes})
        >>> losses.total.backward()
        >>> {name: tuple(each.shape) for name, each in losses.per_task.items()}
        {'shape': (5,), 'size': (2,)}

    Papers: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017; Raghu,
    Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?", 2020; Wang, Zhao, Li, "Bridging Multi-Task Learning and
    Meta-Learning", 2021 (arXiv:2106.09017), for how near the two are.
    """

    weighting: Weighting
    heads: Mapping[str, HeadLayer]  # a ModuleDict

    def __init__(
        self,
        trunk: Trunk,
        heads: Mapping[str, Head],
        lr: GroupRate,
        *,
        steps: int = 1,
        params: GroupParams = None,
        weighting: str | Mapping[str, float] | Weighting = "sum",
        first_order: bool = False,
        update: Callable[..., Any] | None = None,
        backend: str = "auto",
        in_features: int | Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        kinds = check_heads(heads)
        trunk = dict(trunk.items()) if isinstance(trunk, nn.ModuleDict) else trunk
        trunks = trunks_of(trunk, kinds)
        self.steps, self.first_order, self.backend = check_steps(steps), first_order, backend
        self.trunk = nn.ModuleDict(trunks) if isinstance(trunk, Mapping) else trunk
        self.heads = nn.ModuleDict(layers_of(trunks, kinds, in_features))  # type: ignore[assignment]
        self.weighting = make_weighting(weighting)
        self.weighting.bind(kinds)
        self.update, self.params = update, params
        self._register_rates(lr, trunks)
        self._made_of: tuple[Any, ...] = ()
        self._groups: dict[str, Group] = {}
        self._current()  # raises where an option does not fit

    def _register_rates(self, lr: GroupRate, trunks: Mapping[str, nn.Module]) -> None:
        """`lr`: the rate of all groups, or those that are modules; `_own_rates`: each group's own, if any."""
        own = by_group("lr", lr, self.heads) if isinstance(lr, Mapping) and set(lr) & set(self.heads) else None
        if callable(lr) and not isinstance(lr, nn.Module):
            own = {name: lr(GroupModel(trunks[name], layer)) for name, layer in self.heads.items()}
        self._own_rates = own
        modules = {name: rate for name, rate in (own or {}).items() if isinstance(rate, nn.Module)}
        self.lr = lr if own is None else nn.ModuleDict(modules)

    def _current(self) -> dict[str, Group]:
        """The groups; made anew where a trunk, a head, the rates or an option is another than they were made of.

        They hold what is registered here already, and so are no submodules.
        """
        names = list(self.heads)
        trunks = [self.trunk[name] if isinstance(self.trunk, nn.ModuleDict) else self.trunk for name in names]
        options = (self.lr, self.update, self.params, self.steps, self.first_order, self.backend)
        made_of = (*trunks, *self.heads.values(), *options)
        if len(made_of) != len(self._made_of) or any(a is not b for a, b in zip(made_of, self._made_of, strict=True)):
            params = by_group("params", self.params, names)
            rates = dict.fromkeys(names, self.lr) if self._own_rates is None else self._own_rates
            self._groups = {
                name: self._group(name, trunk, self.heads[name], rates[name], params[name])
                for name, trunk in zip(names, trunks, strict=True)
            }
            self._made_of = made_of
        return self._groups

    def _group(self, name: str, trunk: nn.Module, layer: HeadLayer, lr: Any, params: ParamsArg) -> Group:
        options: dict[str, Any] = {"first_order": self.first_order, "update": self.update, "backend": self.backend}
        return Group(name, trunk, layer, lr, params=params, steps=self.steps, **options)

    def forward(self, batches: Mapping[str, TaskBatch], **options: Any) -> MultiTaskLoss:
        """`meta_loss`, with its arguments: what DistributedDataParallel wraps."""
        return self.meta_loss(batches, **options)

    def meta_loss(
        self,
        batches: Mapping[str, TaskBatch],
        *,
        steps: int | None = None,
        first_order: bool | None = None,
        step_weights: Sequence[float] | Tensor | None = None,
        tasks: Mapping[str, int] | None = None,
    ) -> MultiTaskLoss:
        """The query losses of every task of every group, and the weighted total to differentiate.

        Args:
            batches: {group: TaskBatch}, for some or all groups: sx [T, S, ...], sy, qx [T, Q, ...], qy, where T, S, Q
                and shapes are a group's own and targets [T, N, ...] are as `Head` says of [N, ...]; masks [T, N] weigh
                samples, or [T, N, H, W], [T, N, L] pixels and tokens. A group without data is absent: its loss is 0 and
                it moves nothing.
            steps, first_order, step_weights: as of `MAML.meta_forward`.
            tasks: {group: T of all ranks together}, where each rank has a share of every batch (`shard_tasks`): the
                ranks' average is then exact, as of `mean_over_tasks`, for weightings that are linear in the losses.

        Example:
            >>> import torch, mtml
            >>> model = mtml.MultiTaskMAML(torch.nn.Linear(4, 8), {"size": mtml.Regression(1)}, lr=0.1)
            >>> x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 1)
            >>> total, per_task = model.meta_loss({"size": mtml.TaskBatch(x, y, x, y)})
            >>> bool(torch.isclose(total, per_task["size"].mean()))
            True
        """
        options = {"first_order": first_order, "step_weights": step_weights}
        count = self.steps if steps is None else check_steps(steps)
        if self.weighting.needs_norms and self.weighting.learning and is_dynamo_compiling():
            takes_gradients()
            found: MultiTaskLoss = uncompiled(self._meta_loss, batches, count, options, tasks)
            return found
        return self._meta_loss(batches, count, options, tasks)

    def _meta_loss(
        self, given: Any, steps: int, options: Mapping[str, Any], tasks: Mapping[str, int] | None
    ) -> MultiTaskLoss:
        batches, every = self._checked(given), self._current()
        groups = {name: every[name] for name, batch in batches.items() if batch.tasks}
        if steps:
            per_task = {name: group.losses(batches[name], steps=steps, **options) for name, group in groups.items()}
        else:
            per_task = joint_losses(groups, batches)
        per_task = {name: per_task[name] if name in per_task else self._no_losses() for name in batches}
        zero = next(iter(self.heads.values())).weight.new_zeros(())
        per_group = {name: _mean(per_task[name], name, tasks) if name in per_task else zero for name in every}
        return MultiTaskLoss(self._total(per_group), per_task, per_group)

    def _total(self, per_group: Mapping[str, Tensor]) -> Tensor:
        """The groups' losses as one."""
        losses = torch.stack(list(per_group.values()))
        norms = None
        if self.weighting.needs_norms and self.weighting.learning and losses.requires_grad:
            shared = getattr(self.weighting, "shared", None)
            shared = [p for p in self.trunk.parameters() if p.requires_grad] if shared is None else shared
            norms = gram(losses, shared).diagonal().sqrt()
        total: Tensor = self.weighting(losses, losses.detach() != 0, norms)
        return total

    def _no_losses(self) -> Tensor:
        """The losses [0] of no task, with a gradient of zero for every parameter: who averages waits for all ranks."""
        return torch.cat([p.reshape(-1)[:0] for p in self.parameters() if p.requires_grad])

    def transfer(
        self,
        name: str,
        head: Head | None,
        sx: Any,
        sy: Tensor,
        steps: int = 10,
        *,
        support_mask: Tensor | None = None,
        lr: Any = None,
        trunk: str | None = None,
        first_order: bool | None = None,
        keep_steps: bool = False,
    ) -> AdaptedGroup:
        """Adapt to tasks never seen: K steps from the meta-learned start, with a head of the group's or a new one.

        Args:
            name: what the tasks are called; of one of the groups with ``head=None``: its head is the start.
            head: a new head, which starts at zero.
            sx [T, S, ...], sy: support sets, T = 1 for one task; support_mask: as of `meta_loss`.
            steps: K.
            lr: the inner rate; None: the group's, or for a new head what all groups share.
            trunk: the group whose trunk a new head reads, where each group has its own; None: that of `name`.
            first_order, keep_steps: as of `MAML.adapt_tasks`.

        Returns:
            The adapted models. ``adapted(x)`` are predictions; ``adapted.params`` {name: [T, *shape]};
            ``adapted.task(t)`` is a module of its own, with a state_dict; torch.save takes ``adapted.detach()``.

        Raises:
            ValueError: an unknown group, or no rate for a new head. TypeError: no head.

        Example:
            >>> import torch, mtml
            >>> model = mtml.MultiTaskMAML(torch.nn.Linear(4, 8), {"size": mtml.Regression(1)}, lr=0.1)
            >>> x, ids = torch.randn(1, 6, 4), torch.randint(3, (1, 6))
            >>> adapted = model.transfer("shape", mtml.Classification(3), x, ids, steps=5)
            >>> adapted(x).shape, adapted.support_losses.shape
            (torch.Size([1, 6, 3]), torch.Size([5, 1]))
        """
        group = self._group_for(name, head, lr, trunk)
        check_inputs("sx", sx)
        options = {"steps": steps, "first_order": first_order, "keep_steps": keep_steps}
        return group.adapt(sx, sy, support_mask, **options)

    def _group_for(self, name: str, head: Head | None, lr: Any, trunk: str | None) -> Group:
        """The group of that name, or one with a new head."""
        groups = self._current()
        if head is None:
            group = groups[self._known("name", name)]
            if lr is None:
                return group
            layer, source = group.layer, name
        else:
            source = self._source(name, trunk)
            layer = self._new_layer(name, head, groups[source].layer)
            lr = self._new_rate(name) if lr is None else lr
        return self._group(name, groups[source].model.trunk, layer, lr, by_group("params", self.params, groups)[source])

    def _new_layer(self, name: str, head: Head, like: HeadLayer) -> HeadLayer:
        """A head at zero, on the features that `like` reads."""
        check_heads({name: head})
        layer = HeadLayer(like.in_features, head).to(like.weight)
        for p in layer.parameters():
            nn.init.zeros_(p)
        return layer

    def _source(self, name: str, trunk: str | None) -> str:
        """The group whose trunk a new head reads."""
        names = list(self.heads)
        if trunk is not None:
            return self._known("trunk", trunk)
        if name in names:
            return name
        if len({id(group.model.trunk) for group in self._groups.values()}) == 1:
            return names[0]
        raise ValueError(
            f"trunk: expected the group whose trunk {name!r} reads, since each has its own, out of "
            f"{', '.join(names)}; got None"
        )

    def _new_rate(self, name: str) -> Any:
        if self._own_rates is None:
            return self.lr
        raise ValueError(f"lr: expected a rate for the new head of {name!r}, since each group has its own; got None")

    def _known(self, argument: str, name: str) -> str:
        if name not in self.heads:
            raise ValueError(
                f"{argument}: expected a group out of {', '.join(self.heads)}, got {name!r}; transfer() takes others "
                "with a head of theirs"
            )
        return name

    def explain(self, batches: Mapping[str, TaskBatch]) -> dict[str, Explanation]:
        """Print a line a group, and return how each one's inner loop runs: {group: Explanation}."""
        batches, groups = self._checked(batches), self._current()
        found = {name: groups[name].explain(batch) for name, batch in batches.items()}
        for name, explanation in found.items():
            print(_line(groups[name], batches[name], explanation))
        return found

    def _checked(self, batches: Any) -> dict[str, TaskBatch]:
        """Batches in the groups' order."""
        if not isinstance(batches, Mapping) or not batches:
            raise TypeError(f"batches: expected {{group: TaskBatch}}, got {shown(batches)}")
        for name, batch in batches.items():
            self._known("batches", name)
            if not isinstance(batch, TaskBatch):
                raise TypeError(f"batches[{name!r}]: expected a TaskBatch(sx, sy, qx, qy), got {shown(batch)}")
            check_sets(name, batch)
        return {name: batches[name] for name in self.heads if name in batches}


def _mean(losses: Tensor, name: str, tasks: Mapping[str, int] | None) -> Tensor:
    if tasks is not None:
        if not isinstance(tasks, Mapping):
            raise TypeError(f"tasks: expected {{group: number of tasks}}, got {shown(tasks)}")
        if name not in tasks:
            raise ValueError(f"tasks: expected the number of tasks of {name!r} too, got {tasks}")
        return mean_over_tasks(losses, tasks[name])
    return losses.mean() if len(losses) else losses.sum()


def _line(group: Group, batch: TaskBatch, found: Explanation) -> str:
    """One group's way, in a line."""
    sizes = [next(tensor for _, tensor in leaves("x", x)).shape[1] for x in (batch.sx, batch.qx)]
    trunk = "trunk once in PyTorch, " if group.rows else ""
    what = f"{type(group.layer.head).__name__}, {batch.tasks} tasks of {sizes[0]} + {sizes[1]} samples"
    loop = f"{found.path} ({found.kernel}): {found.reason}" if found.steps else "no inner loop, one multi-head loss"
    return f"{group.name}: {what}: {trunk}{loop}; adapts {', '.join(found.adapted)}"
