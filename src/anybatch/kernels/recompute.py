"""Any op with its inputs alone kept for backward: the reference is differentiated anew there.

For half precision, in which a reference would keep its float32 intermediates, each twice as large as its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from anybatch.dispatch import Op


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True  # gradients of each sample, for differential privacy

    @staticmethod
    def forward(call: Callable[..., Tensor], *args: Any) -> Tensor:
        return call(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *args = inputs
        ctx.tensors = [isinstance(a, Tensor) for a in args]
        ctx.others = [a for a in args if not isinstance(a, Tensor)]
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        args = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.tensors]
        return None, *recomputed_gradients(ctx.call, args, gradient, ctx.needs_input_grad[1:])


def taken_in_formulas(*gradients: Tensor | None) -> bool:
    """Whether a backward must be formulas: it is differentiated itself, or takes several gradients at once."""
    return torch.is_grad_enabled() or any(g is not None and several_at_once(g) for g in gradients)


def several_at_once(gradient: Tensor) -> bool:
    """Whether it is a batch of gradients, as ``is_grads_batched=True`` gives, whose memory no kernel can read."""
    return is_legacy_batchedtensor(gradient)


def recomputed_gradients(
    call: Callable[..., Tensor], args: Sequence[Any], gradient: Tensor, needs: Sequence[bool] | None = None
) -> list[Tensor | None]:
    """The gradients of ``call(*args)``, which is evaluated anew, for its floating-point tensors; None for the rest.

    Args:
        needs: Of which of ``args`` alone one is asked for.
    """
    asked = [True] * len(args) if needs is None else needs
    moving = [isinstance(a, Tensor) and a.is_floating_point() and n for a, n in zip(args, asked, strict=True)]

    def of_moving(*floating: Tensor) -> Tensor:
        given = iter(floating)
        return call(*(next(given) if m else a for m, a in zip(moving, args, strict=True)))

    pulled = iter(torch.func.vjp(of_moving, *(a for m, a in zip(moving, args, strict=True) if m))[1](gradient))
    return [next(pulled) if m else None for m in moving]


def _refusal(x: Tensor, *_: Any, **__: Any) -> str | None:
    return f"x is {x.dtype}, of which the reference keeps no wider copies" if x.dtype.itemsize >= 4 else None


def _refusal_where_linear(x: Tensor, *others: Any, **options: Any) -> str | None:
    if not any(isinstance(a, Tensor) and a.requires_grad for a in (*others, *options.values())):
        return "x alone asks for a gradient, for which the reference keeps nothing of its size"
    return _refusal(x)


def _refusal_where_compiled(x: Tensor, *_: Any, **__: Any) -> str | None:
    # Torch 2.15 cannot trace `torch.func.vjp` of what asks for strides.
    return "torch.compile chooses what it keeps" if torch.compiler.is_compiling() else _refusal(x)


def attach(
    op: Op, *, linear: bool = False, asks_for_strides: bool = False, refused: Callable[..., str | None] | None = None
) -> None:
    """Give an op whose first argument is its activations the kernel ``"recompute"``.

    Args:
        op: The op.
        linear: Whether it is linear in its activations.
        asks_for_strides: Whether the reference does. Compiled code then runs the reference itself.
        refused: Why the kernel is of no use for some arguments, where it is not.
    """
    refusal = _refusal_where_linear if linear else _refusal_where_compiled if asks_for_strides else _refusal

    def either(*args: Any, **options: Any) -> str | None:
        return refusal(*args, **options) or (refused(*args, **options) if refused is not None else None)

    @op.kernel("recompute", refusal=either)
    def recompute(*args: Any, **options: Any) -> Tensor:
        names = tuple(options)

        def call(*given: Any) -> Tensor:
            return op.reference(*given[: len(args)], **dict(zip(names, given[len(args) :], strict=True)))

        return _Recomputed.apply(call, *args, *options.values())
