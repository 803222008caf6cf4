"""What the operators' registrations with torch.library share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Operators compute in float32 whatever autocast says: it would turn their matrix products into bfloat16 ones."""
    return torch.autocast(tensor.device.type, enabled=False)


def vmap_over_samples(operator: Any) -> None:
    """Register a vmap rule: every tensor has the samples in front, so a mapped axis joins them there."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def join(value: Any, axis: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            mapped = value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)
            return mapped.flatten(0, 1)

        result = operator(*(join(value, axis) for value, axis in zip(args, in_dims)))
        if isinstance(result, Tensor):
            return result.unflatten(0, (size, -1)), 0
        return tuple(part.unflatten(0, (size, -1)) for part in result), tuple(0 for _ in result)

    operator.register_vmap(rule)


def differentiable_once(operator: Callable[..., tuple[Tensor, ...]], name: str) -> Callable[..., tuple[Tensor, ...]]:
    """An adjoint operator that raises where it is differentiated.

    Without it a second derivative through torch.func would silently be zero: the operator's result carries no graph.
    """

    class Adjoint(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"{name} is differentiable once; for second derivatives use backend='reference', which is plain PyTorch"
            )

    def adjoint(*args: Any) -> tuple[Tensor, ...]:
        # Dynamo traces no autograd function within the backward pass of another; it differentiates once anyway.
        return operator(*args) if torch.compiler.is_compiling() else Adjoint.apply(*args)

    return adjoint
