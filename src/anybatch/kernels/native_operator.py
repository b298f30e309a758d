"""Norms in C as autograd and torch.compile see them: two calls, and what is kept between them.

Eager code has a function of autograd's. Compiled code calls an operator of torch.library, since the compiler's
own passes over maps take up to 22 times as long on the CPU (docs/log.md); exported programs hold formulas, which run
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_export
from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import passes, refused_c, refused_native
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas


class NativeOperator:
    """A norm of ``x`` and its other arguments, ``rest``, that are tensors without gaps, None, or numbers.

    Args:
        name: Of ``torch.ops.anybatch``.
        rest: The schema of the other arguments.
        forward: Gives the result for ``(x, *rest)``, in the layout of ``x``, and what else backward needs, ``kept``.
        backward: Gives the gradient of ``x`` for ``(gradient, x, *rest, *kept)``, in the layout of ``x``, and one
            tensor, ``made``, with those of the parameters.
        gradients: Takes them out of ``(made, *rest)``: one for each of ``rest``, None for what is None or no tensor.
        rows: ``made`` is (rows, C).
        kept: How many tensors are kept.
        shape: Theirs, of ``(x, *rest)``.
    """

    def __init__(
        self,
        name: str,
        rest: str,
        *,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, Tensor]],
        gradients: Callable[..., Sequence[Tensor | None]],
        rows: int,
        kept: int = 0,
        shape: Callable[..., Sequence[Any]] = lambda *_: (),
    ) -> None:
        self.forward, self.backward, self.gradients = forward, backward, gradients
        self.rows, self.kept, self.shape = rows, kept, shape
        given = "".join(f", Tensor kept_{i}" for i in range(kept))
        outputs = ", ".join(["Tensor"] * (1 + kept))
        self._run: Any = torch.library.custom_op(
            f"anybatch::{name}", self._forward, mutates_args=(), schema=f"(Tensor x, {rest}) -> ({outputs})"
        )
        self._pull: Any = torch.library.custom_op(
            f"anybatch::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor gradient, Tensor x, {rest}{given}) -> (Tensor, Tensor)",
        )
        self._run.register_fake(self._empty)
        self._pull.register_fake(lambda _, x, *__: self._no_gradients(x))
        self._run.register_autograd(self._gradients, setup_context=_keep)

    def __call__(self, reference: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """The norm of what `refused_norm` takes; ``reference`` gives it in formulas, for second derivatives."""
        if not torch.compiler.is_compiling():
            return _Eager.apply(self, reference, x, *rest)  # pyright: ignore[reportReturnType]
        made = self._run(x, *rest)
        return made[0] if self.kept else made

    def _forward(self, x: Tensor, *rest: Any) -> Any:
        if not x.numel():
            return self._empty(x, *rest)
        y, *kept = self.forward(_without_gaps(x), *_dense(rest))
        y = laid_out(y, torch.empty_like(x))
        return (y, *(t.clone() for t in kept)) if kept else y  # what is kept may be parts of one tensor

    def _backward(self, gradient: Tensor, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        if not x.numel():
            g_x, made = self._no_gradients(x)
            return g_x, made.zero_()
        g_x, made = self.backward(gradient, _without_gaps(x), *_dense(more))
        return laid_out(g_x, torch.empty_like(x)), made

    def _empty(self, x: Tensor, *rest: Any) -> Any:
        kept = [x.new_empty(self.shape(x, *rest)) for _ in range(self.kept)]
        return (torch.empty_like(x), *kept) if kept else torch.empty_like(x)

    def _no_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty((self.rows, x.shape[1]))

    def _gradients(self, ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, rest, kept = _kept(ctx)
        g_x, made = self._pull(gradient, x, *rest, *kept)
        return g_x, *self.gradients(made, *rest)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: NativeOperator, reference: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        y, *kept = operator.forward(x, *rest)
        ctx.operator, ctx.reference = operator, reference
        _keep(ctx, (x, *rest), (y, *kept))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, rest, kept = _kept(ctx)
        if taken_in_formulas(gradient):  # second derivatives
            return None, None, *recomputed_gradients(ctx.reference, (x, *rest), gradient)
        g_x, made = ctx.operator.backward(gradient, x, *rest, *kept)
        return None, None, g_x, *ctx.operator.gradients(made, *rest)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    kept = output[1:] if isinstance(output, tuple) else ()
    ctx.others = [None if isinstance(a, Tensor) else (a,) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), *kept)


def _kept(ctx: Any) -> tuple[Tensor, list[Any], list[Tensor]]:
    """``x``, the other arguments and what was kept."""
    tensors = iter(ctx.saved_tensors)
    x, *rest = (next(tensors) if other is None else other[0] for other in ctx.others)
    return x, rest, list(tensors)


def _without_gaps(x: Tensor) -> Tensor:
    return x if passes(x) else x.contiguous()


def _dense(values: Sequence[Any]) -> list[Any]:
    return [a.contiguous() if isinstance(a, Tensor) else a for a in values]


def refused_norm(x: Tensor, *tensors: Tensor | None, activation: str = "none") -> str | None:
    """Why norms in C cannot take (N, C, *) and its parameters, or None; in code that is compiled too."""
    if activation not in ("none", "relu"):
        return f"activation={activation!r} is none of none, relu"
    if torch.compiler.is_compiling():
        return _refused_compiled(x, *tensors)
    if reason := refused_native(x):
        return reason
    if any(t is not None and (t.dtype != x.dtype or t.device != x.device or not t.is_contiguous()) for t in tensors):
        return "a parameter has another dtype than x or is not contiguous"
    return None if passes(x) else "x is neither contiguous nor channels last"


def _refused_compiled(x: Tensor, *tensors: Tensor | None) -> str | None:
    if (reason := refused_export()) is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "torch.func takes derivatives of formulas"
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if any(t is not None and t.dtype != torch.float32 for t in (x, *tensors)):
        return "something is not float32"
    return f"x of shape {tuple(x.shape)} has no channels" if x.dim() < 2 else refused_c()
