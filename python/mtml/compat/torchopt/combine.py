"""Transformations one after another."""

from __future__ import annotations

from mtml.compat.torchopt.base import ChainedGradientTransformation, GradientTransformation, identity

__all__ = ["chain", "chain_flat"]


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """The transformations one after another: each takes the updates that the one before it gives.

    Raises:
        TypeError: something that is no GradientTransformation.
    """
    for each in transformations:
        if not isinstance(each, GradientTransformation):
            raise TypeError(f"chain: expected GradientTransformations, got {each!r} ({type(each).__name__})")
    if len(transformations) < 2:
        return transformations[0] if transformations else identity()
    return ChainedGradientTransformation(*transformations)


chain_flat = chain  # every chain works on leaves where its members can
chain.flat = chain_flat  # type: ignore[attr-defined]  # where the original has it
