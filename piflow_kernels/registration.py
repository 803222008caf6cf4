"""What the operators' registrations with torch.library share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def free_namespace() -> str:
    """Of the operators in torch.ops: "piflow", or for a further copy of this package the first number that is free."""
    names = itertools.chain(["piflow"], (f"piflow_{i}" for i in itertools.count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "gm_integrate"))


NAMESPACE = free_namespace()
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Operators compute in float32 whatever autocast says: it would turn their matrix products into bfloat16 ones."""
    return torch.autocast(tensor.device.type, enabled=False)


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define a functional operator: torch.compile, export, fake tensors and vmap see it as one opaque call.

    Defined on the library itself because `torch.library.custom_op` costs tens of microseconds a call.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap_over_samples(overload), lib=LIBRARY)
    return overload


def vmap_over_samples(overload: Any) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule: every tensor has the samples in front, so a mapped axis joins them there."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def join(value: Any, axis: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            mapped = value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)
            return mapped.flatten(0, 1)

        joined = [join(value, axis) for value, axis in zip(args, in_dims)]
        first, axis = next((value, axis) for value, axis in zip(args, in_dims) if isinstance(value, Tensor))
        samples = (first if axis is None else first.movedim(axis, -1)).shape[0]

        def split(part: Tensor) -> Tensor:  # all results of an operator have the samples in front
            return part.unflatten(0, (size, part.shape[0] // size if size else samples))

        result = overload(*joined)
        if isinstance(result, Tensor):
            return split(result), 0
        return tuple(split(part) for part in result), tuple(0 for _ in result)

    return rule


def differentiable(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    leaves: tuple[int, ...],
    n_tensors: int,
    policy: str,
    name: str,
) -> Callable[..., Tensor]:
    """Make an operator differentiable once, by an autograd function outside, so that torch.func transforms see it.

    forward(*tensors, *options): all parameters named (Dynamo counts them), the last option not needed backwards.
    backward(grad, *tensors, *options[:-1]): the adjoints of the arguments at the positions `leaves`; for those that are
    None an empty one.
    """

    class Adjoint(torch.autograd.Function):
        """Without it a second derivative through torch.func would silently be zero: no graph leads through it."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"the {policy} policy is differentiable once; for second derivatives use backend='reference', which is "
                "plain PyTorch"
            )

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[:n_tensors])
            ctx.options = inputs[n_tensors:-1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            # Dynamo traces no autograd function within the backward pass of another; it differentiates once anyway.
            adjoint = backward if torch.compiler.is_compiling() else Adjoint.apply
            tensors = ctx.saved_tensors  # once: checkpointing computes them again for each time they are asked for
            bars = adjoint(grad, *tensors, *ctx.options)
            result: list[Tensor | None] = [None] * (n_tensors + len(ctx.options) + 1)
            for position, bar in zip(leaves, bars):
                if tensors[position] is not None:
                    result[position] = bar
            return tuple(result)

    Differentiable.forward = staticmethod(forward)  # type: ignore[method-assign]
    # Dynamo calls the operator itself where it sees nothing that requires gradients, as in a compiled torch.func.grad.
    # Without a derivative of its own its gradients would silently be zero there; with it, Dynamo refuses.
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", Differentiable.backward, setup_context=Differentiable.setup_context, lib=LIBRARY
    )

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():  # Dynamo takes no tensor twice, as x_start and x_src often are
            args = tuple(
                value.view_as(value)
                if isinstance(value, Tensor) and any(value is other for other in args[:i])
                else value
                for i, value in enumerate(args)
            )
        # An autograd function costs as much as the rest of a call. Without gradients the operator alone will do, unless
        # a tangent asks for a derivative that it would silently drop.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return Differentiable.apply(*args)
        return forward(*args)

    return call
