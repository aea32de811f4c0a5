"""Tracing a module with torch.fx's proxies into a layer program.

A private copy of the module is traced, in a context of its own, and nothing that the process shares is patched but the
name `len`: whoever else runs the module meanwhile does not notice.

Every call that forward makes is interpreted as torch.fx records it, so that shapes are known while forward runs: sizes
other than the batch's are plain integers to it. What has no counterpart becomes an *unknown* value; tracing goes on, so
that every obstacle is reported and not only the first.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from mtml_kernels.batch_norm import BATCH_NORM_MODES, batch_norm_mode
from mtml_kernels.checks import check_choice
from mtml_kernels.neutral import exclusive, neutral
from mtml_kernels.program.builder import Builder
from mtml_kernels.program.encoding import Program, Shape
from mtml_kernels.program.guards import check_module, checked_trace, guarded, in_words, inputs_of, raise_if_passing
from mtml_kernels.program.obstacles import Cannot, Unfusable
from mtml_kernels.program.private_copy import PrivateCopy
from mtml_kernels.program.values import BatchSize, SameType, Value
from mtml_kernels.program.vocabulary import ATTRIBUTES, FUNCTIONS, LAYERS, METHODS, REASONS, Handler, InPlace

__all__ = ["trace"]

UNKNOWN = object()
_STALE = "a tensor is used after another name of its memory was changed in place"


def trace(model: nn.Module, shapes: Sequence[Shape] | Mapping[str, Shape], *, batch_norm: str = "module") -> Program:
    """The layer program of `model` in its present mode (train or eval).

    Args:
        model: any module. A private copy of it is traced with torch.fx and compared with its trace on random inputs,
            in a thread of its own: neither the module nor whoever runs it meanwhile notices, and contexts around the
            call (autocast, hooks on saved tensors, transforms, modes, a default device) say nothing about the program.
            What the copy shares: classes, globals, datasets, and objects that cannot be copied (locks, files).
        shapes: the shape of one sample of each input, without the batch dimension: a sequence for positional
            arguments, a mapping for keyword arguments. An input that only embeddings read holds integer ids.
        batch_norm: how batch normalisation layers normalise: "module" as they stand; "batch" or "per_step" by batch
            statistics; "running" by running statistics; "track" as they stand, refusing those that would update their
            statistics, which a program cannot.

    Raises:
        Unfusable: some operation has no counterpart in the program; `.reasons` names each.
        MemoryError: there was no room for the copy, which says nothing about the module.

    A program leaves running statistics alone. It describes the module as it was when traced: trace again after
    train()/eval(), after replacing a submodule or changing a Python attribute that forward reads.

    Example:
        >>> import torch
        >>> from mtml_kernels.program import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> [record["op"] for record in trace(net, [(2,)]).describe()]
        ['input', 'linear', 'tanh', 'linear']
    """
    check_choice("batch_norm", batch_norm, BATCH_NORM_MODES)
    with exclusive():
        return neutral(lambda: _attempted(model, shapes, batch_norm))


def _attempted(model: nn.Module, shapes: Sequence[Shape] | Mapping[str, Shape], batch_norm: str) -> Program:
    try:
        return _checked(model, shapes, batch_norm)
    except Unfusable:
        raise
    except Exception as error:  # exotic modules fail in the strangest places; the general path may still take them
        raise_if_passing(error)
        raise Unfusable([f"{type(model).__name__}: it cannot be traced: {in_words(error)}"]) from error


def _checked(model: nn.Module, shapes: Sequence[Shape] | Mapping[str, Shape], batch_norm: str) -> Program:
    """The trace of one private copy, compared with another one: the first may have been changed by it."""
    copy = PrivateCopy(model)
    with batch_norm_mode(copy.module, batch_norm):
        program = _traced(copy, shapes)
    if any(t.device.type not in ("cpu", "cuda") for t in _tensors(copy.module).values()):
        return program  # no float64 there
    del copy
    wide = PrivateCopy(model, torch.float64).module
    with batch_norm_mode(wide, batch_norm):
        return checked_trace(wide, program, isinstance(shapes, Mapping))


def _traced(copy: PrivateCopy, shapes: Sequence[Shape] | Mapping[str, Shape]) -> Program:
    model = copy.module
    inputs = inputs_of(model, shapes)
    tracer = _Tracer(model, Builder(_tensors(model), inputs))
    names = [info.name for info in inputs] if isinstance(shapes, Mapping) else None
    tracer.listen_to(copy.modules)
    with guarded(model) as side_effects:
        output = tracer.run(functools.partial(_call, tracer, model, len(inputs), names))
    if output is None or side_effects:
        raise Unfusable(tracer.reasons + side_effects, tracer.records)
    return tracer.builder.finish(output)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, then all buffers; a shared tensor under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _call(tracer: _Tracer, model: nn.Module, count: int, names: Sequence[str] | None) -> Any:
    proxies = [tracer.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(count)]
    return model(*proxies) if names is None else model(**dict(zip(names, proxies, strict=True)))


class _Recorded(dict[str, Any]):
    """The tensors of a module that is traced: reading one as an attribute gives a proxy."""

    def __init__(self, tensors: Mapping[str, Any], read: Callable[[Any], Any]) -> None:
        super().__init__(tensors)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        return self.read(super().__getitem__(name))


class _Proxy(fx.Proxy):
    """Stands for a tensor in forward; its shape and type can be asked for."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES and self.tracer.known(self.node):
            return self.tracer.attribute(self, name)
        return Attribute(self, name)

    def __len__(self) -> int:
        raise Cannot("len() of a tensor; use x.shape[0]")

    def __float__(self) -> float:
        raise Cannot("forward needs a tensor's value, or the number of samples, as a number")


def _in_place(target: Any) -> Callable[[_Proxy, Any], Any]:
    """torch.fx has no in-place operators: without these, `x += y` would leave other names of x unchanged."""
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _operator in ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "imatmul"):
    setattr(_Proxy, f"__{_operator}__", _in_place(getattr(operator, _operator)))


class _Tracer(fx.Tracer):
    """Interprets each call as it is recorded."""

    def __init__(self, model: nn.Module, builder: Builder) -> None:
        super().__init__()
        self.builder = builder
        self.reasons: list[str] = []
        self.records: list[dict[str, object]] = []
        self._values: dict[fx.Node, Any] = {}
        self._names = {id(tensor): name for name, tensor in builder.tensors.items()}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._scope = ["forward"]
        self._failed_in = ""
        self._batch_sizes: dict[int, fx.Proxy] = {}
        self._thread = threading.get_ident()
        self._parameters: dict[str, Any] = {}  # proxies by name
        self.root, self.graph, self.tensor_attrs = nn.Module(), fx.Graph(tracer_cls=type(self)), {}

    def listen_to(self, modules: Sequence[nn.Module]) -> None:
        """Record the calls and the parameters of these modules, which must be private: they work no more without.

        torch.fx's own way replaces `nn.Module.__call__` and `__getattr__` for every module and every thread.
        """
        for m in modules:
            inner = m.__dict__
            inner["_compiled_call_impl"] = functools.partial(self._called_module, m)
            for table in ("_parameters", "_buffers"):
                inner[table] = _Recorded(inner[table], self._read)

    def run(self, call: Callable[[], Any]) -> Value | None:
        """The value that forward returns, or None with at least one reason."""
        try:
            returned = self.create_arg(call())
        except Exception as error:  # whatever forward or torch.fx raises: the module stays usable on the general path
            raise_if_passing(error)
            why = str(error) if isinstance(error, Cannot) else f"it cannot be traced: {in_words(error)}"
            if not self.reasons:  # else a consequence of what is reported already
                self._refuse(self._failed_in or "forward", why)
            return None
        output = self._output(returned)
        return None if self.reasons else output

    def _output(self, returned: Any) -> Value | None:
        value = self._values.get(returned) if isinstance(returned, fx.Node) else returned
        if value is UNKNOWN:
            return None
        if not isinstance(value, Value):
            self._refuse("output", f"it is a {type(returned).__name__}; only a single tensor is fused")
        elif _is_stale(value):
            self._refuse("output", _STALE)
        elif not value.batched:
            self._refuse("output", "it does not depend on the input")
        elif value.lead != 1:
            self._refuse("output", f"its shape {value} does not start with the batch dimension")
        else:
            return value
        return None

    def _refuse(self, where: str, why: str) -> None:
        reason = f"{where}: {why}"
        if reason not in self.reasons:
            self.reasons.append(reason)

    # What torch.fx asks of a tracer

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in LAYERS:
            return True
        return type(m).__module__.startswith(("torch.nn.modules", "torch.ao")) and not isinstance(m, nn.Sequential)

    def _called_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return m._call_impl(*args, **kwargs)
        path = self._paths.get(id(m), f"{self._scope[-1]}:{type(m).__name__}") or "forward"
        leaf = self.is_leaf_module(m, path)
        obstacle = check_module(m, leaf)
        self._scope.append(path)
        try:
            if leaf or obstacle is not None:
                return self._leaf(m, f"{path} ({type(m).__name__})", obstacle, args, kwargs)
            return m._call_impl(*args, **kwargs)
        except Exception:
            self._failed_in = self._failed_in or path
            raise
        finally:
            self._scope.pop()

    def _read(self, value: Any) -> Any:
        name = self._names.get(id(value)) if isinstance(value, Tensor) else None
        if name is None or threading.get_ident() != self._thread:
            return value
        if name not in self._parameters:
            self._parameters[name] = self.create_proxy("get_attr", name, (), {})
        return self._parameters[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if id(a) in self._names:
                return self.create_proxy("get_attr", self._names[id(a)], (), {}).node
            raise Cannot("forward uses a tensor that is neither a parameter nor a buffer; register it as a buffer")
        if isinstance(a, numbers.Real):
            return a
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Records the call; returns a proxy of the result, or the result itself where it is plain Python."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        where = f"{self._scope[-1]}, node {proxy.node.name}"
        return self._interpret(proxy, where, functools.partial(self._handle, proxy.node))

    # Interpretation

    def known(self, node: fx.Node) -> bool:
        return self._values.get(node, UNKNOWN) is not UNKNOWN

    def attribute(self, proxy: _Proxy, name: str) -> Any:
        """x.shape, x.T, ..."""
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def _interpret(self, proxy: fx.Proxy, where: str, handler: Handler) -> Any:
        """Run the handler on what is known of the arguments; keep and return the result."""
        node = proxy.node
        record: dict[str, object] = {"path": where, "op": _called(node), "fused": True}
        self.records.append(record)
        outer, self.builder.path = self.builder.path, where
        try:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._lookup)
            result = handler(*args, **kwargs)
            if isinstance(result, InPlace):
                result = self._overwrite(node, result.value)
            values = [v for v in (result if isinstance(result, tuple) else (result,)) if isinstance(v, Value)]
            if values:
                record["shape"] = ", ".join(map(str, values))
                _check_context(node)
        except Cannot as error:
            record.update(fused=False, reason=str(error))
            self._refuse(where, str(error))
            result = UNKNOWN
        except _Unknown:
            record.update(fused=False)
            result = UNKNOWN
        finally:
            self.builder.path = outer
        return self._store(proxy, result)

    def _lookup(self, argument: Any) -> Any:
        value = self._values[argument] if isinstance(argument, fx.Node) else argument
        if isinstance(value, Value) and _is_stale(value):
            raise Cannot(_STALE)
        return value

    def _handle(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """A placeholder, a parameter, a function, a method or an operator."""
        if node.op == "placeholder":
            return self.builder.input(int(str(node.target).removeprefix("input_")))
        if node.op == "get_attr":
            return self.builder.param(str(node.target))
        if node.target is getattr:
            handler, args = ATTRIBUTES.get(args[1]), args[:1]
        else:
            handler = METHODS.get(str(node.target)) if node.op == "call_method" else FUNCTIONS.get(node.target)
        unknown = _has_unknown((args, kwargs))
        if handler is None:
            if unknown and (node.target is getattr or _called(node).startswith("operator.")):
                raise _Unknown  # arithmetic on something that is reported already
            name = _called(node)
            raise Cannot(f"{name}: {REASONS.get(name.rsplit('.', 1)[-1].strip('_'), 'it is not fused')}")
        if unknown:
            raise _Unknown
        return _checked_call(handler, self.builder, *args, **kwargs)

    def _leaf(self, m: nn.Module, where: str, obstacle: str | None, args: Any, kwargs: Any) -> Any:
        """A call of a layer, or of a module that cannot be traced into."""

        def handler(*values: Any, **named: Any) -> Any:
            if obstacle is not None:
                raise Cannot(obstacle)
            layer = LAYERS.get(type(m))
            if layer is None:
                raise Cannot("this layer is not fused")
            if _has_unknown((values, named)):
                raise _Unknown
            return _checked_call(layer, self.builder, m, self._weight, *values, **named)

        proxy = super().create_proxy("call_module", type(m).__name__, args, kwargs)
        return self._interpret(proxy, where, handler)

    def _weight(self, tensor: Any) -> Value:
        """A layer's parameter; reading the attribute while tracing has made it a proxy."""
        value: Any = self._values.get(tensor.node) if isinstance(tensor, fx.Proxy) else None
        if value is UNKNOWN:
            raise _Unknown
        if not isinstance(value, Value):
            raise Cannot("its parameters are not registered in the model")
        return value

    def _store(self, proxy: fx.Proxy, result: Any) -> Any:
        """Keep a symbolic result under its node; hand plain Python to forward, with proxies for batch sizes."""
        if isinstance(result, tuple):
            parts = [self._part(proxy, i) if isinstance(item, Value) else proxy for i, item in enumerate(result)]
            return tuple(map(self._store, parts, result))
        if isinstance(result, BatchSize):  # one proxy for each, so that x.shape == y.shape is decided
            if result.times not in self._batch_sizes:
                self._values[proxy.node] = result
                self._batch_sizes[result.times] = proxy
            return self._batch_sizes[result.times]
        if result is UNKNOWN or isinstance(result, Value | SameType):
            self._values[proxy.node] = result
            return proxy
        return result

    def _part(self, proxy: fx.Proxy, index: int) -> fx.Proxy:
        """A proxy of its own for one of several results."""
        part: fx.Proxy = super().create_proxy("call_function", operator.getitem, (proxy, index), {})
        return part

    def _overwrite(self, node: fx.Node, value: Value) -> Value:
        """The call's first tensor now has this value, under all its names; views of it have lost theirs."""
        target: Any = node.args[0] if node.args else node.kwargs["input"]
        old: Value = self._values[target]
        if old.memory.owner:
            raise Cannot(f"it changes {old.memory.owner} in place")
        if (old.lead, old.shape) != (value.lead, value.shape):
            raise Cannot(f"the result {value} does not fit into {old} in place")
        old.memory.version += 1
        new = Value(value.node, value.shape, value.lead, old.memory, old.memory.version, image=value.image)
        self._values[target] = new
        return new


class _Unknown(Exception):
    """An argument is unknown, for a reason that is reported already."""


def _is_stale(value: Value) -> bool:
    return value.version != value.memory.version


def _has_unknown(tree: Any) -> bool:
    found: list[bool] = []
    fx.node.map_aggregate(tree, lambda leaf: found.append(leaf is UNKNOWN))
    return any(found)


def _check_context(node: fx.Node) -> None:
    """torch.fx does not record these contexts; a custom autograd Function runs its forward without gradients."""
    if node.op in ("placeholder", "get_attr"):
        return
    if not torch.is_grad_enabled():
        raise Cannot("it runs under torch.no_grad() or inside a custom autograd Function")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Cannot("it runs under autocast")


def _called(node: fx.Node) -> str:
    """What the user wrote, for a message."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op != "call_function":
        return str(node.target)
    if node.target is getattr:
        return f"Tensor.{node.args[1]}"
    name = getattr(node.target, "__name__", str(node.target))
    module = getattr(node.target, "__module__", None) or "torch"
    return f"{module.replace('torch._C._nn', 'torch.nn.functional').replace('_operator', 'operator')}.{name}"


def _checked_call(handler: Handler, *args: Any, **kwargs: Any) -> Any:
    try:
        inspect.signature(handler).bind(*args, **kwargs)
    except TypeError as error:
        raise Cannot(f"these arguments are not fused: {error}") from None
    return handler(*args, **kwargs)
