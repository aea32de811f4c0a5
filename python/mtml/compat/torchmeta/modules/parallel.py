"""Data parallelism over devices."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel.replicate import _broadcast_coalesced_reshape

from mtml.compat.torchmeta.modules.module import MetaModule, Params

__all__ = ["DataParallel"]


class DataParallel(nn.DataParallel[nn.Module], MetaModule):
    """`torch.nn.DataParallel` with the argument `params`, whose names may begin with "module." or not.

    The samples are divided between the devices, `params` is copied to each.
    """

    def scatter(self, inputs: Any, kwargs: dict[str, Any] | None, device_ids: Any) -> tuple[Any, Any]:
        kwargs = dict(kwargs or {})
        if kwargs.get("params") is None or not isinstance(self.module, MetaModule):
            return super().scatter(inputs, kwargs, device_ids)
        params = kwargs.pop("params")
        inputs, scattered = super().scatter(inputs, kwargs, device_ids)
        copies = self._copies(self._inner(params), device_ids[: len(inputs)])
        return inputs, tuple({**each, "params": copy} for each, copy in zip(scattered, copies, strict=True))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if not self.device_ids and kwargs.get("params") is not None:  # no GPU: the module is called as it is
            kwargs["params"] = self._inner(kwargs["params"])
        return super().forward(*inputs, **kwargs)

    def _inner(self, params: Params) -> Params:
        """By the names of the wrapped module."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.get_subdict(params, "module") or params

    def _copies(self, params: Params, devices: Any) -> list[OrderedDict[str, Tensor]]:
        tensors = list(params.values())
        copies = _broadcast_coalesced_reshape(tensors, devices, detach=not torch.is_grad_enabled())
        return [OrderedDict(zip(params, copy, strict=True)) for copy in copies]
