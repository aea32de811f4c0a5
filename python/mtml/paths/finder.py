"""From a model and the signature of a call to the path that runs it: all checks that need no values, all choices."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtml.inner import Rule
from mtml.params import adaptable, aliases, select
from mtml.paths.as_written import OTHER_IDS, AsWritten, as_written
from mtml.paths.batch import Batch, Extras
from mtml.paths.fused import Fused
from mtml.paths.general import General, general_data
from mtml.paths.gram import FusedHead, is_head
from mtml.paths.half import Narrowed
from mtml.paths.inputs import input_names, named_inputs, sample_shapes
from mtml.paths.loss_reads import Verdicts
from mtml.paths.path import Options, Path
from mtml.paths.rates import Rates
from mtml.paths.reach import Reach
from mtml.paths.shortcut import Shortcut
from mtml.paths.trunk import TrunkOnce
from mtml_kernels.batch_norm import check_batch_norm
from mtml_kernels.checks import NARROW, Sizes, check_batch, check_devices, check_dtypes, check_ids, check_target
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.general.choice import choose, probe
from mtml_kernels.general.task import TaskRule
from mtml_kernels.general.unused import refuse_unused
from mtml_kernels.losses import LossSpec, Opaque, Recognised, recognise, resolve, unfused_target
from mtml_kernels.losses.matching import Sizes as LossSizes
from mtml_kernels.losses.task import TaskLoss
from mtml_kernels.neutral import exclusive, uncompiled, unhooked
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.precision import HALF, autocast_dtype, computed_in, first_floating, mixes
from mtml_kernels.program import Norm, Op, Program, Unfusable, trace
from mtml_kernels.program.guards import SIDE_EFFECTS
from mtml_kernels.program.split import once_is_dearer, split_head
from mtml_kernels.registry import VARIANT
from mtml_kernels.schema.inner_loop import MOMENTS, PER_STEP, QUERY_STEPS, InnerLoopSpec
from mtml_kernels.transforms import is_forward_mode

__all__ = ["GENERAL", "PathFinder"]

Losses = Sequence[LossSpec | Recognised | Opaque]
GENERAL = "general"
_computed = computed_in(BACKENDS)
FIRST_LOOK = 64  # calls of a model with code of the user's before its program is traced again; then 4 times as many


class _Traced(NamedTuple):
    program: Program | None
    reasons: list[str]
    nodes: list[dict[str, object]]
    shapes: Any = None  # of one sample, as `trace` takes them
    losses: Losses = ()  # of support and query set


def _writes(traced: _Traced) -> bool:
    """Whether forward changes the module, so that it differs at every call and never can be fused."""
    return any(SIDE_EFFECTS in reason for reason in traced.reasons)


class PathFinder:
    """Paths for one state of one model and one set of options; `fresh()` says whether that state still holds."""

    left: int  # calls until `verify`; from 0 on down there is none
    watch: Any  # a Watch over the model, set by who watches it
    fresh: Callable[[], bool]  # what asks it
    verdicts: Verdicts = MappingProxyType({})  # on callable losses, set likewise

    def __init__(self, maml: Any) -> None:
        self.model: nn.Module = maml.module
        # held, so that nothing else can take their place in memory: a cache knows them by their ids
        self.lr, self.update, self.held = maml.lr, maml.update, (maml.loss, maml.query_loss, maml.params)
        self.rule = self.update if isinstance(self.update, Rule) else None
        self.batch_norm, self.backend, self.allow_unused = maml.batch_norm, maml.backend, maml.allow_unused
        check_batch_norm(self.model, self.batch_norm)
        self.losses = tuple(map(resolve, (maml.loss, maml.loss if maml.query_loss is None else maml.query_loss)))
        self.names, self.others = select(self.model, maml.params), aliases(self.model)
        self.tensors = adaptable(self.model) | dict(self.model.named_buffers()) | dict(self.model.named_parameters())
        self.device_type = first_floating(self.tensors.values()).device.type
        self.calls: dict[Hashable, Path] = {}
        self.shortcuts: dict[Hashable, Shortcut] = {}
        self.programs: dict[Hashable, _Traced] = {}
        self.changes = 0
        self._look()

    def _look(self) -> None:
        """Find out what the model's forward can read, and whether it may read more than that."""
        self.reach = Reach(self.model)
        self.interval = FIRST_LOOK if self.reach.foreign or not self.reach.complete else 0
        self.left = self.interval

    def look_again(self) -> None:
        """Forget what was traced where forward can read other things than it could."""
        if not self.reach.same():  # a traced program may have read what changed; the general path reads it live
            self.changes += 1
            self._look()
            self.forget()

    def forget(self) -> None:
        """Drop what was traced; what could not be is tried again, but ever more rarely."""
        failed = {key: traced for key, traced in self.programs.items() if traced.program is None}
        self.programs = failed
        self.shortcuts.clear()
        self.calls = {key: path for key, path in self.calls.items() if path.kind == GENERAL}
        if failed and self.changes & (self.changes - 1) == 0 and not any(map(_writes, failed.values())):
            self.programs = {key: self._program(traced.shapes) for key, traced in failed.items()}
            if any(traced.program for traced in self.programs.values()):
                self.calls = {}

    def verify(self) -> None:
        """Trace once more, now and then: code can read a file, the environment or another library's state, which no
        name shows.
        """
        self.interval *= 4
        self.left = self.interval
        for traced in self.programs.values():
            if traced.program is not None and self._program(traced.shapes).program != traced.program:
                self.changes += 1
                self.forget()
                return

    # --- deciding ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, options: Options) -> Path:
        """The path for calls like this one, after all checks that only need shapes, dtypes and devices."""
        return uncompiled(self._prepare, batch, options)

    def _prepare(self, batch: Batch, options: Options) -> Path:
        whole, batch = batch, batch.first_step()
        if whole.extras is not None:
            self._check_extras(whole, whole.extras, options.steps)
        sizes = check_batch(*batch.parts(), options.steps)
        like = first_floating(self.tensors.values())
        check_devices(like.device, iter(batch.tensors()))
        rates = self._rates(self.names, options, like)
        if self.requested() == GENERAL:
            return self._live(whole, options, rates)
        traced = self.obstacles(batch)
        if not traced.reasons:
            assert traced.program is not None
            path = self._fused(traced.program, _specs(traced.losses), batch, options, sizes)
            self._set_precision(path, traced.program, whole)
            return self._narrowed(self._as_written(path, traced.losses, options, rates), traced.program)
        self._refuse_to_fall_back(traced.reasons)
        general = self._live(whole, options, rates)
        general.notice = general.plan.mode, "; ".join(traced.reasons)
        return general

    def _rates(self, names: Sequence[str], options: Options, like: Tensor) -> Rates:
        shapes = {name: self.tensors[name].shape for name in names}
        return Rates(self.lr, shapes, options.steps, like, [*self.tensors], self.others)

    def requested(self) -> str:
        """The argument, else MTML_BACKEND, else "auto"."""
        return self.backend if self.backend != "auto" else os.environ.get("MTML_BACKEND") or "auto"

    def obstacles(self, batch: Batch) -> _Traced:
        """The program, or every reason why these calls cannot be fused."""
        reasons = []
        if self.update is not None and self.rule is None:
            reasons.append("update: a rule other than those of mtml.inner is not fused")
        if torch._C._are_functorch_transforms_active():
            reasons.append("torch.func: the call is inside a transform (grad, vmap, ...), which needs the general path")
        elif is_forward_mode():
            reasons.append("forward_ad: the call is inside a dual level, which needs the general path")
        if torch.is_grad_enabled() and isinstance(batch.weights, Tensor) and batch.weights.requires_grad:
            reasons.append("step_weights requires grad, which the fused path does not give")
        traced = self._trace(batch)
        losses = self._recognised(traced.program, batch)
        reasons += dict.fromkeys(loss.reason for loss in losses if isinstance(loss, Opaque))
        reasons += traced.reasons
        if traced.program is not None:
            reasons += self._unfused_targets(traced.program, losses, batch)
            reasons += self._unfused_tensors(traced.program)
            reasons += _single_values(traced.program, batch) + _other_shapes(batch)
        return _Traced(traced.program, reasons, traced.nodes, losses=losses)

    def _recognised(self, program: Program | None, batch: Batch) -> Losses:
        """The losses, callables among them as what they compute at the sizes of this batch."""
        sets = [(batch.sy, batch.support_mask), (batch.qy, batch.query_mask)]
        if batch.qx is None:  # the query loss judges nothing
            sets[1] = sets[0]
        return [self._known(loss, program, *given) for loss, given in zip(self.losses, sets, strict=True)]

    def _known(
        self, loss: LossSpec | Opaque, program: Program | None, target: Any, mask: Tensor | None
    ) -> LossSpec | Recognised | Opaque:
        verdict = self.verdicts.get(id(loss.callable)) if isinstance(loss, Opaque) else None
        if isinstance(loss, LossSpec) or verdict is None:
            return loss
        if isinstance(verdict, str):
            return replace(loss, reason=f"{loss.reason}: {verdict}")
        if program is None or not isinstance(target, Tensor):
            missing = "the model's output" if program is None else "its targets"
            return replace(loss, reason=f"{loss.reason}: it is not tried without {missing}")
        shape, dtype = tuple(target.shape[1:]), self._dtype(program)
        given = dtype if self._fits(target.dtype, program) else target.dtype
        sizes = LossSizes((shape[0], *program.output_shape), shape, given, dtype)
        factors = self.update is None  # a factor is one of the rates for plain steps alone
        return recognise(loss, sizes, mask is not None, factors)

    def _trace(self, batch: Batch) -> _Traced:
        shapes = sample_shapes(batch.sx)
        if shapes is None:
            return _Traced(None, ["sx: inputs nested deeper than one tuple or dict are not fused"], [])
        key = tuple(shapes.items()) if isinstance(shapes, dict) else tuple(shapes)
        with exclusive():  # threads that make the first call together wait for one trace
            if key not in self.programs:
                self.programs[key] = self._program(shapes)
            return self.programs[key]

    def autocast(self) -> torch.dtype | None:
        """What torch.autocast, where it is on, casts to on the model's device."""
        return autocast_dtype(self.device_type)

    def _dtype(self, program: Program) -> torch.dtype:
        """What a fused call computes in."""
        stored = self.tensors[program.params[0].name].dtype
        if self.autocast() is not None:
            return torch.float32 if mixes(stored) else stored
        asked = self.requested()  # `explain` tells of the general path, too, what another would do
        return _computed("auto" if asked == GENERAL else asked, self.device_type, stored)

    def _fits(self, dtype: torch.dtype, program: Program) -> bool:
        """Whether data of a dtype goes with the program's parameters: theirs, or what autocast mixes with it."""
        stored = self.tensors[program.params[0].name].dtype
        return dtype is stored or (self.autocast() is not None and mixes(dtype) and mixes(stored))

    def _program(self, shapes: Any) -> _Traced:
        try:
            program = trace(self.model, shapes, batch_norm=self.batch_norm)
        except Unfusable as error:
            return _Traced(None, error.reasons, error.nodes, shapes)
        return _Traced(program, [], program.describe(), shapes)

    def _unfused_targets(self, program: Program, losses: Losses, batch: Batch) -> list[str]:
        reasons = []
        for name, loss, target in (("sy", losses[0], batch.sy), ("qy", losses[1], batch.qy)):
            if target is None or not isinstance(loss, LossSpec):  # what was recognised was tried on the targets
                continue
            if not isinstance(target, Tensor):
                reasons.append(f"{name}: a tuple or dict of targets is not fused")
                continue
            check_target(name, loss.kind, target, (*target.shape[:2], *program.output_shape))
            reason = unfused_target(loss, program.output_shape, target, tuple(target.shape[2:]))
            probabilities = loss.info.ids and target.is_floating_point()
            if probabilities and program.params and not self._fits(target.dtype, program):
                dtype = self.tensors[program.params[0].name].dtype
                reason = f"{loss.kind}: the probabilities are {target.dtype}, the model {dtype}"
            reasons += [f"{name}: {reason}"] if reason else []
        return reasons

    def _unfused_tensors(self, program: Program) -> list[str]:
        params = [self.tensors[p.name] for p in program.params]
        if not any(p.name in self.names for p in program.params):
            return ["params: the model reads none of the adapted tensors"]
        for name in program.statistics:
            if name in self.names or self.tensors[name].requires_grad:
                return [f"{name}: a running statistic, which PyTorch gives no gradient, is adapted or requires grad"]
        kinds = {(t.dtype, t.device) for t in params}
        alike = all(device == params[0].device and self._fits(dtype, program) for dtype, device in kinds)
        if not alike:
            return [f"model: its parameters differ in dtype or device ({sorted(map(str, kinds))})"]
        dtype, device = self._dtype(program), params[0].device
        backends = [BACKENDS.named(name) for name in BACKENDS.names() if name != "reference"]
        refusals = [backend.supports(device.type, dtype) for backend in backends]
        if self.requested() == "auto" and refusals and all(refusals):
            return [f"no compiled backend takes {dtype} on {device.type!r}: {refusals[0]}"]
        return []

    # --- building ---------------------------------------------------------------------------------------------------

    def _fused(
        self, program: Program, losses: Sequence[LossSpec], batch: Batch, options: Options, sizes: Sizes
    ) -> Fused | TrunkOnce:
        """The engine's path: the whole program in every step, or its trunk once where that is exact and cheaper."""
        like = self.tensors[program.params[0].name]
        backend = BACKENDS.resolve(self.requested(), like.device.type, self._dtype(program)).name
        self._check_dtypes(program, losses, batch)
        names = (input_names(program, batch.sx), input_names(program, batch.sx if batch.qx is None else batch.qx))
        parts = split_head(program, [p.name in self.names for p in program.params])
        if options.axes:
            why = "the call has data, starts or query losses of every step"
        elif isinstance(parts, str):
            why = parts
        else:
            why = once_is_dearer(parts.trunk, sizes.support, sizes.query, options.steps, options.first_order)
            if not why:
                head = self._in_engine(parts.head, losses, batch, options, sizes, backend, (None, None))
                return TrunkOnce(parts, self.tensors, head, names)
        path = self._in_engine(program, losses, batch, options, sizes, backend, names)
        path.trunk = f"it runs in every step: {why}" if why else ""
        return path

    def _set_precision(self, path: Fused | TrunkOnce, program: Program, batch: Batch) -> None:
        """Whether the path copies what batches hold in half precision; and what `explain` says of dtypes."""
        if not mixes(dtype := self._dtype(program)):
            return
        stored, engine = self.tensors[program.params[0].name].dtype, path.head if isinstance(path, TrunkOnce) else path
        path.float32 = engine.float32 = dtype not in HALF and any(t.dtype in HALF for t in batch.floats())
        if self.autocast() is not None:
            engine.how += "; in float32 throughout, which autocast does not round"
        elif stored is not dtype:
            engine.how += f"; in float32 throughout, {str(stored).removeprefix('torch.')} is how tensors are stored"

    def _narrowed(self, path: Fused | TrunkOnce | AsWritten, program: Program) -> Path:
        """The path with results in the dtypes that they are to have."""
        dtype, read = self._dtype(program), {p.name for p in program.params}
        kinds = {name: self.tensors[name].dtype for name in (*read, *self.names)}
        if all(kind is dtype for kind in kinds.values()):
            return path
        result = dtype if self.autocast() is not None else self.tensors[program.params[0].name].dtype
        return Narrowed(path, result, kinds)

    def _in_engine(
        self,
        program: Program,
        losses: Sequence[LossSpec],
        batch: Batch,
        options: Options,
        sizes: Sizes,
        backend: str,
        names: tuple[Any, Any],
    ) -> Fused:
        """One call of the engine for every step of this program."""
        adapted = [p.name in self.names for p in program.params]
        losses = [loss.fitting(target) for loss, target in zip(losses, (batch.sy, batch.qy), strict=True)]
        spec = self._spec(program, adapted, losses, options)
        moving = [p.name for p, flag in zip(program.params, adapted, strict=True) if flag]
        dtype = self._dtype(program)
        rates = self._rates(moving, options, self.tensors[program.params[0].name].new_empty(0, dtype=dtype))
        narrow = any(isinstance(y, Tensor) and y.dtype in NARROW for y in (batch.sy, batch.qy))
        looks = backend in ("reference", "torch") or narrow
        classes = _classes(program.output_shape[-1:], losses, batch) if looks else (0, 0)
        if self.rule is not None or options.axes or _beyond_gram(batch, losses):
            return Fused(program, self.tensors, self.names, rates, spec, backend, names, classes, self.rule, dtype)
        # asked for a way of holding weights, or for the schedule: of those the Gram form has none
        asked = VARIANT in backend or backend == "torch"
        kind = FusedHead if not asked and is_head(program, spec, rates(), losses, sizes) else Fused
        return kind(program, self.tensors, self.names, rates, spec, backend, names, classes, None, dtype)

    def _spec(
        self, program: Program, adapted: Sequence[bool], losses: Sequence[LossSpec], options: Options
    ) -> InnerLoopSpec:
        rule = None if self.rule is None or self.rule.plain else self.rule.spec
        axes = options.axes | (MOMENTS if options.keep and rule is not None and rule.moments else 0)
        named = options._asdict() | {"axes": axes}
        return InnerLoopSpec.of(program, adapted, losses, update=rule, **named)

    def _check_extras(self, batch: Batch, extras: Extras, steps: int) -> None:
        """Raise where data of every step, starts or moments do not fit the call or the model."""
        if extras.per_step:
            for name, tensor in batch.tensors():
                if name.startswith("s") and (tensor.ndim < 3 or tensor.shape[1] != steps):
                    raise ValueError(
                        f"{name}: expected [T, K, S, ...] with K = {steps} steps for per_step=True, got "
                        f"{list(tensor.shape)}"
                    )
        for name, tensor in (extras.start or {}).items():
            if name not in self.names:
                raise ValueError(f"start: expected names of adapted tensors, {', '.join(self.names)}; got {name!r}")
            like = self.tensors[name]
            expected = [batch.tasks, *like.shape]
            if list(tensor.shape) != expected:
                raise ValueError(f"start[{name!r}]: expected [T, *shape] = {expected}, got {list(tensor.shape)}")
            mixed = self.autocast() is not None and mixes(tensor.dtype) and mixes(like.dtype)
            if (tensor.dtype is not like.dtype and not mixed) or tensor.device != like.device:
                raise TypeError(
                    f"start[{name!r}]: expected {like.dtype} on {like.device}, as the model's, got {tensor.dtype} on "
                    f"{tensor.device}; convert it with .to()"
                )

    def _refuse_to_fall_back(self, reasons: Sequence[str]) -> None:
        if self.backend != "auto":
            raise BackendUnavailable(
                f"backend={self.backend!r} runs fused programs only, and this one is not: {'; '.join(reasons)}. "
                "Use backend='auto' or 'general' for the general path, which runs any module and loss"
            )

    def _as_written(
        self, path: Fused | TrunkOnce, losses: Losses, options: Options, rates: Rates
    ) -> Fused | TrunkOnce | AsWritten:
        """The path with what its losses are beside the engine's; on other ids than the engine's it runs live."""

        def live(batch: Batch) -> General:
            self._refuse_to_fall_back([OTHER_IDS])
            return self._live(batch, options, rates)

        return as_written(path, losses, live)

    def _live(self, whole: Batch, options: Options, rates: Rates) -> General:
        """The general path."""
        with unhooked():  # what is measured here is not run again by activation checkpointing around this call
            return self._general(whole, whole.first_step(), options, rates)

    def _general(self, whole: Batch, batch: Batch, options: Options, rates: Rates) -> General:
        found = probe(self.model, batch.sx, self.batch_norm)
        support, query = (TaskLoss(loss) for loss in self.losses)
        if found.output is not None:
            self._check_targets(batch, found.output[1:])
        rule = TaskRule(
            self.model,
            self.names,
            support,
            query,
            options.steps,
            options.first_order,
            self.update,
            options.keep,
            bool(options.axes & PER_STEP),
            bool(options.axes & QUERY_STEPS),
            options.taken,
        )
        theta, data = {name: self.tensors[name] for name in self.names}, general_data(whole)
        # a loss that is known by name depends on all of an output that is one tensor
        partial = found.output is None or support.spec is None
        if partial and options.steps and not self.allow_unused and _plain_autograd():
            refuse_unused(replace(rule, per_step=False), theta, batch.given(), self.batch_norm, found.recomputes)
        plan = choose(rule, theta, rates(), data, batch.weights, self.batch_norm, found)
        classes = (0, 0) if found.output is None else _classes(found.output[1:2], self.losses, batch)
        return General(rule, plan, self.tensors, rates, classes)

    def _check_targets(self, batch: Batch, output: tuple[int, ...]) -> None:
        for name, loss, target in (("sy", self.losses[0], batch.sy), ("qy", self.losses[1], batch.qy)):
            if isinstance(loss, LossSpec) and target is not None:
                lead = target.shape[:2] if isinstance(target, Tensor) else ()
                check_target(name, loss.kind, target, (*lead, *output))

    def _check_dtypes(self, program: Program, losses: Sequence[LossSpec], batch: Batch) -> None:
        dtype = self.tensors[program.params[0].name].dtype
        why = f"the model's dtype, which {_first_layer(program)} needs"
        for name, x in (("sx", batch.sx), ("qx", batch.qx)):
            for info, called, tensor in [] if x is None else named_inputs(program, name, x):
                if info.ids:
                    check_ids(called, tensor)
                elif not self._fits(tensor.dtype, program):
                    check_dtypes(dtype, iter([(called, tensor)]), why)
        for name, loss, target in (("sy", losses[0], batch.sy), ("qy", losses[1], batch.qy)):
            if isinstance(target, Tensor) and target.is_floating_point() and not self._fits(target.dtype, program):
                check_dtypes(dtype, iter([(name, target)]), f"the model's dtype, for loss {loss.kind!r}")


def _specs(losses: Losses) -> list[Any]:
    """The losses as the engine knows them; those that it does not as they are."""
    return [loss.spec if isinstance(loss, Recognised) else loss for loss in losses]


def _classes(count: Sequence[int], losses: Sequence[LossSpec | Opaque], batch: Batch) -> tuple[int, int]:
    """How many classes the ids in sy and qy may name; 0 where they are none."""
    found = []
    for loss, target in zip(losses, (batch.sy, batch.qy), strict=True):
        ids = isinstance(loss, LossSpec) and loss.kind == "cross_entropy"
        ids = ids and isinstance(target, Tensor) and not target.is_floating_point()
        found.append(count[0] if ids and count else 0)
    return found[0], found[1]


def _plain_autograd() -> bool:
    """Whether torch.autograd.grad works here: not within a torch.func transform, and not in inference mode."""
    return not torch._C._are_functorch_transforms_active() and not torch.is_inference_mode_enabled()


def _beyond_gram(batch: Batch, losses: Sequence[LossSpec]) -> bool:
    """Whether the Gram form lacks something: probabilities as targets, gradients to targets or masks."""
    data = (batch.sy, batch.qy, batch.support_mask, batch.query_mask)
    asked = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in data)
    return asked or any(loss.soft for loss in losses)


def _single_values(program: Program, batch: Batch) -> list[str]:
    """PyTorch refuses batch statistics of a single value, in words that the general path passes on."""
    batch_norms = [node for node in program.nodes if node.op == Op.NORM and node.b == Norm.BATCH]
    rows = min((node.rows for node in batch_norms), default=2)
    sets = [(name, t) for name, t in batch.tensors() if name.startswith(("sx", "qx"))]
    return [f"{name}: batch statistics of a single sample" for name, t in sets if rows * t.shape[1] == 1]


def _other_shapes(batch: Batch) -> list[str]:
    """A program knows one shape of samples: the engine would read others past their end."""
    if batch.qx is None:
        return []
    support, query = sample_shapes(batch.sx), sample_shapes(batch.qx)
    return [] if query == support else [f"qx: samples of shape {query}, in sx of {support}; a program takes one shape"]


def _first_layer(program: Program) -> str:
    """What the first layer that reads an input is called."""
    records = program.describe()
    inputs = {r["node"] for r in records if r["op"] == "input"}
    for record in records:
        if inputs & set(record["operands"]):  # type: ignore[call-overload]
            return f"the first layer {str(record['path'])!r} ({record['op']})"
    return "the model"
