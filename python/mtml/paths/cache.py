"""The prepared paths of a learner, and whether they still hold: the host time of every meta-step is spent here.

A path was prepared for a model as it was. It is stale after train()/eval(), a replaced submodule or parameter, a hook,
a parametrization, another dtype, or a change of anything else that forward can read (`mtml.paths.reach`). All of it
stands in dicts under names, or in a few attributes of the parameters; what stood there is compared by identity, in
loops that run in C, in a few microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from mtml.notices import warn_of_fallback, warn_of_statistics
from mtml.paths.batch import Batch, Extras
from mtml.paths.contents import Contents, package_of
from mtml.paths.explain import Explanation, Subject, loss_names
from mtml.paths.finder import GENERAL, PathFinder
from mtml.paths.fused import Fused
from mtml.paths.loss_reads import LossReads, Verdicts, tokens_of
from mtml.paths.path import Finder, Options, Path
from mtml.paths.reach import Reach
from mtml.paths.shortcut import Shortcut, remember
from mtml.paths.stand_in import describe, stand_in
from mtml.paths.traced import Traces, traced_path
from mtml.wrappers import refuse_sharded
from mtml_kernels.checks import check_batch, check_flag, check_initialised, check_steps
from mtml_kernels.native.snapshot import snapshot
from mtml_kernels.neutral import uncompiled
from mtml_kernels.ops.inner_loop_lane import is_open

__all__ = ["PathCache", "Watch"]

STATES = 8  # of a model (train and eval, say) whose paths are kept
CALLS = 64  # signatures per state
NO_EXTRAS = Extras()

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [vars(module_hooks)[f"_global{name}"] for name in _HOOKS]
_OWN = ("_paths", "_long", "_taken", "_rule_state")  # of a learner: what it writes itself
_traits = attrgetter("requires_grad", "dtype", "shape", "device")


class PathCache:
    """The prepared paths of one MAML. It is no part of the module's state: copies and pickles start an empty one."""

    finds: type[PathFinder] = PathFinder

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.now: PathFinder | None = None
        self.shortcuts: dict[Hashable, Shortcut] = {}  # of that one
        self.states: dict[Hashable, PathFinder] = {}
        self.reads = LossReads()
        self.traces = Traces(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> PathCache:
        return type(self)(None)

    def find(self, batch: Batch, steps: int, first_order: bool, keep: int, quiet: bool = False) -> Path:
        """How to run this call. Warns, unless `quiet`, where it falls back to the general path."""
        finder = self.now
        if finder is None or not finder.fresh():
            finder = uncompiled(self.finder)
        finder.left -= 1
        if finder.left == 0:
            uncompiled(finder.verify)
        key = (
            batch.signature,
            steps,
            first_order,
            keep,
            torch.is_grad_enabled(),
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0,  # `is_forward_mode`
            torch._C._len_torch_dispatch_stack(),
            torch._C._is_any_autocast_enabled() and finder.autocast(),
        )
        try:
            path = finder.calls.get(key)
        except TypeError:  # sizes that torch.export traces have no hash
            batch = stand_in(describe(batch), check_steps(steps))
            return self.find(batch, steps, check_flag("first_order", first_order), keep, quiet)
        if path is None:
            extras = batch.extras or NO_EXTRAS
            flag = check_flag("first_order", first_order)
            options = Options(check_steps(steps), flag, keep, extras.axes, extras.taken)
            path = self._prepared(finder, key, batch, options)
        if keep == 0 and type(path) is Fused and path.plain:
            remember(finder, path, batch, steps, first_order)
        if path.notice is not None and not quiet:
            (mode, reasons), path.notice = path.notice, None
            warn_of_fallback(self.owner.module, mode, reasons)
        return path

    # what torch.compile traces in its place; to ask for it here would be one more function in every eager call
    find._torchdynamo_inline = traced_path  # type: ignore[attr-defined]

    def _prepared(self, finder: PathFinder, key: Hashable, batch: Batch, options: Options) -> Path:
        path = finder.prepare(batch, options)
        if len(finder.calls) >= CALLS:
            finder.calls.pop(list(finder.calls)[0], None)  # noqa: RUF015 - other threads may add to it meanwhile
        if not torch._C._len_torch_dispatch_stack():  # a path made under FakeTensorMode, say, holds its tensors
            finder.calls[key] = path
        self._warn(finder)
        return path

    def _warn(self, finder: PathFinder) -> None:
        """Of what the model's state makes of every call."""
        warn_of_statistics(self.owner.module, finder.batch_norm)

    def explain(self, batch: Batch) -> Explanation:
        """How such calls run, with the owner's steps and order, and why."""
        owner = self.owner
        path = self.find(batch, owner.steps, owner.first_order, 0 if batch.qx is not None else 1, quiet=True)
        traced = self.finder().obstacles(batch)
        nodes = [dict(node) for node in traced.nodes]
        names = loss_names(owner.loss, owner.query_loss, () if path.kind == GENERAL else traced.losses)
        subject = Subject(list(traced.reasons), nodes, *names, owner.batch_norm)
        return path.explain(subject, check_batch(*batch.parts()))

    def finder(self) -> PathFinder:
        """The finder of the module as it stands."""
        owner = self.owner
        check_initialised(owner.module)
        refuse_sharded("model", owner.module)
        verdicts = {} if owner.backend == GENERAL else self.reads.look((owner.loss, owner.query_loss))
        options = _options(owner, verdicts)
        words = (owner.batch_norm, owner.backend, owner.allow_unused)
        key = (structure(owner.module), tuple(options.tokens), words)
        finder = self.states.pop(key, None)
        if finder is None:
            finder = self.finds(owner)
            while len(self.states) >= STATES:
                self.states.pop(next(iter(self.states)))
        finder.verdicts = verdicts
        finder.look_again()
        finder.watch = Watch(owner, [finder.reach, *(v for v in verdicts.values() if isinstance(v, Reach))], options)
        finder.fresh = finder.watch.ask()
        self.states[key] = self.now = finder
        self.shortcuts = finder.shortcuts
        return finder


def at_once(
    paths: Finder, sx: Any, sy: Any, qx: Any, qy: Any, steps: Any, first_order: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a call gives that is like one before; None for others. In eager code only (`is_open`)."""
    if not paths.shortcuts or not is_open():
        return None
    try:
        shortcut = paths.shortcuts.get((steps, first_order, torch.is_grad_enabled()))
    except TypeError:  # the checks say what is wrong
        return None
    return None if shortcut is None else shortcut(sx, sy, qx, qy)


def _none(*_: Any) -> None:
    """In place of `at_once` where torch.compile traces, which guards what it reads: shortcuts come and go."""


at_once._torchdynamo_inline = _none  # type: ignore[attr-defined]


class Watch:
    """A snapshot of a MAML, its model and what it was given beside it. Call it: True while nothing has changed."""

    __slots__ = (
        "contents", "dicts", "empty", "entries", "filled", "keys", "modules", "names", "native", "owners", "sizes",
        "tensors", "traits", "types", "values",
    )  # fmt: skip

    def __init__(self, owner: Any, reaches: Sequence[Reach], options: Contents) -> None:
        # lists and objects met on the way, which can change in place; most models have none
        self.contents = [contents for contents in (*(r.contents for r in reaches), options) if contents.changeable]
        self.modules = list(owner.modules())
        self.types = list(map(type, self.modules))
        pairs: list[tuple[Mapping[str, Any], str]]
        pairs = [(m.__dict__, name) for m in self.modules for name in ("training", *_TABLES, *_HOOKS)]
        pairs += chain.from_iterable(reach.pairs for reach in reaches)
        # of the MAML itself and of modules beside the model (rates, losses, update rules) every attribute counts
        seen = {id(m) for m in owner.module.modules()}
        others = [m.__dict__ for m in self.modules if id(m) not in seen]
        pairs += [(d, name) for d in others for name in d if name not in _OWN]
        self.owners, self.keys = [d for d, _ in pairs], [name for _, name in pairs]
        self.values = list(map(getitem, self.owners, self.keys))
        tables = [m.__dict__[name] for m in self.modules for name in (*_TABLES, *_HOOKS)] + _GLOBAL_HOOKS
        self.empty = [d for d in tables if not d]  # most of them: hooks that nobody set
        self.filled = [d for d in tables if d]
        self.names = list(chain.from_iterable(self.filled))
        self.entries = list(chain.from_iterable(map(dict.values, self.filled)))
        self.dicts = [*(m.__dict__ for m in self.modules), *chain.from_iterable(reach.classes for reach in reaches)]
        self.sizes = [*map(len, self.dicts[: len(self.modules)]), *chain.from_iterable(r.sizes for r in reaches)]
        self.tensors = [*owner.parameters(), *owner.buffers()]
        self.traits = list(map(_traits, self.tensors))
        self.native = snapshot(
            owners=self.owners, keys=self.keys, values=self.values, tables=tables, sized=self.dicts,
            sizes=self.sizes, tensors=self.tensors, typed=self.modules,
        )  # fmt: skip

    def reads(self, holder: Any, name: str) -> bool:
        """Whether an attribute is among what is compared."""
        namespace = getattr(holder, "__dict__", None)
        return any(owner is namespace and key == name for owner, key in zip(self.owners, self.keys, strict=True))

    def containers(self) -> Iterator[Any]:
        """What is compared by what it contains."""
        return chain(self.empty, self.filled, *(contents.containers() for contents in self.contents))

    def __call__(self) -> bool:
        if self.native is not None:
            return self.native() and (not self.contents or all(contents() for contents in self.contents))
        return self.looks_the_same()

    def ask(self) -> Callable[[], bool]:
        """What to call in its place, with nothing between where the compiled module alone compares."""
        return self if self.native is None or self.contents else self.native

    def looks_the_same(self) -> bool:
        """The same by Python alone."""
        try:
            return (
                not any(self.empty)
                and list(chain.from_iterable(self.filled)) == self.names
                and list(map(len, self.dicts)) == self.sizes
                and all(map(is_, map(getitem, self.owners, self.keys), self.values))
                and all(map(is_, chain.from_iterable(map(dict.values, self.filled)), self.entries))
                and list(map(_traits, self.tensors)) == self.traits
                and list(map(type, self.modules)) == self.types
                and (not self.contents or all(contents() for contents in self.contents))
            )
        except KeyError:  # a name is gone
            return False


def structure(model: nn.Module) -> Hashable:
    """What the module is, as a key: types, tree, modes, tensors, hooks."""
    parts: list[Hashable] = [tuple(map(len, _GLOBAL_HOOKS))]
    for path, module in model.named_modules(remove_duplicate=False):
        inner = module.__dict__
        parts += [path, id(type(module)), id(module), module.training]
        for name, tensor in chain(inner["_parameters"].items(), inner["_buffers"].items()):
            parts += [name, id(tensor), None if tensor is None else _traits(tensor)]
        parts += [(name, len(value)) for name, value in inner.items() if name.endswith("hooks") and value]
    return tuple(parts)


def _options(owner: Any, verdicts: Verdicts) -> Contents:
    """What a MAML was given beside its model; where that was read in advance it is looked into, for it may be changed
    in place. Callables run live, unless they hold nothing but constants: what they hold is their own affair, and may
    change at every call.
    """
    options = Contents(versions=False)  # tensors among them are read at every call
    options.visit(owner.lr)
    options.visit(owner.params)
    for loss in (owner.loss, owner.query_loss):
        if isinstance(loss, nn.Module) and package_of(type(loss)) == "torch":
            options.visit(loss.__dict__)
        if isinstance(loss, str | functools.partial):
            options.visit(loss)
    live = (owner.loss, owner.query_loss, owner.update)
    options.tokens += [None if given is None or isinstance(given, str) else id(given) for given in live]
    options.tokens += tokens_of(verdicts)
    return options.settle()
