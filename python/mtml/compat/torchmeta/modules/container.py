"""Layers one after another."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtml.compat.torchmeta.modules.module import MetaModule, Params

__all__ = ["MetaSequential"]


class MetaSequential(nn.Sequential, MetaModule):
    """`torch.nn.Sequential` whose forward takes its parameters by name, as `params`."""

    def forward(self, input: Any, params: Params | None = None) -> Any:
        if params is None:
            return super().forward(input)
        for name, module in self._modules.items():
            if isinstance(module, MetaModule):
                input = module(input, params=self.get_subdict(params, name))
            elif isinstance(module, nn.Module):
                input = module(input)
            else:
                raise TypeError(f"{name}: expected an nn.Module in MetaSequential, got {type(module).__name__}")
        return input
