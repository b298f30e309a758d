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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of what norms in C take. They compute in float32, of which nothing as large as ``x`` is kept for half precision."""


class NativeOperator:
    """A norm of ``x`` with parameters, each without gaps or None, and numbers.

    Args:
        name: Of ``torch.ops.anybatch``.
        parameters: How many there are.
        numbers: The schema of what follows them. Eager calls may add what is for ``forward`` alone.
        reference: The norm in formulas, of ``(x, *parameters, *numbers)``, for second derivatives.
        forward: Gives, of the same, the result, in the layout of ``x``, and the moments that backward needs, or None.
        backward: Gives the gradient of ``x`` for ``(gradient, x, moments, *parameters, *numbers)``, in the layout of
            ``x``, and one tensor, ``made``, with those of the parameters. Both work in float32.
        gradients: Takes them out of ``(made, *parameters)``: one for each, None for what is None, in float32.
        rows: ``made`` is (rows, C).
        moments: Their shape, of ``(x, *parameters, *numbers)``; None where there are none.
    """

    def __init__(
        self,
        name: str,
        parameters: int,
        numbers: str,
        *,
        reference: Callable[..., Tensor],
        forward: Callable[..., tuple[Tensor, Tensor | None]],
        backward: Callable[..., tuple[Tensor, Tensor]],
        gradients: Callable[..., Sequence[Tensor | None]],
        rows: int,
        moments: Callable[..., Sequence[Any]] | None = None,
    ) -> None:
        self.reference = reference
        self._wide_forward, self._wide_backward, self._wide_gradients = forward, backward, gradients
        self.parameters, self.rows, self.moments = parameters, rows, moments
        given = "".join(f", Tensor? parameter_{i}" for i in range(parameters)) + f", {numbers}"
        kept = "" if moments is None else ", Tensor"
        self._run: Any = torch.library.custom_op(
            f"anybatch::{name}", self._forward, mutates_args=(), schema=f"(Tensor x{given}) -> (Tensor{kept})"
        )
        self._pull: Any = torch.library.custom_op(
            f"anybatch::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor gradient, Tensor x, Tensor? moments{given}) -> (Tensor, Tensor)",
        )
        self._run.register_fake(self._empty)
        self._pull.register_fake(lambda _, x, *__: self._no_gradients(x))
        self._run.register_autograd(self._gradients, setup_context=self.keep)

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """The norm of what `refused_norm` takes."""
        if not torch.compiler.is_compiling():
            return _Eager.apply(self, x, *rest)  # pyright: ignore[reportReturnType]
        made = self._run(x, *rest)
        return made if self.moments is None else made[0]

    def forward(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        """The result and the moments, for whatever of `DTYPES` ``x`` is."""
        if x.dtype == torch.float32:
            return self._wide_forward(x, *rest)
        y, moments = self._wide_forward(x.float(), *_widened(rest))
        return y.to(x.dtype), moments

    def backward(self, gradient: Tensor, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        """The gradient of ``x`` and, in float32, those of the parameters."""
        if x.dtype == torch.float32:
            return self._wide_backward(gradient, x, *more)
        g_x, made = self._wide_backward(gradient.float(), x.float(), *_widened(more))
        return g_x.to(x.dtype), made

    def gradients(self, made: Tensor, parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One for each of the parameters, in its dtype."""
        found = zip(self._wide_gradients(made, *parameters), parameters, strict=True)
        return [None if g is None or p is None else g.to(p.dtype) for g, p in found]

    def _forward(self, x: Tensor, *rest: Any) -> Any:
        if not x.numel():
            return self._empty(x, *rest)
        y, moments = self.forward(_without_gaps(x), *_dense(rest))
        y = laid_out(y, torch.empty_like(x))
        return y if moments is None else (y, moments)

    def _backward(self, gradient: Tensor, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        if not x.numel():
            g_x, made = self._no_gradients(x)
            return g_x, made.zero_()
        g_x, made = self.backward(gradient, _without_gaps(x), *_dense(more))
        return laid_out(g_x, torch.empty_like(x)), made

    def _empty(self, x: Tensor, *rest: Any) -> Any:
        y = torch.empty_like(x)
        return y if self.moments is None else (y, x.new_empty(self.moments(x, *rest), dtype=torch.float32))

    def _no_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty((self.rows, x.shape[1]), dtype=torch.float32)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *rest = inputs
        ctx.numbers = rest[self.parameters :]
        ctx.save_for_backward(x, None if self.moments is None else output[1], *rest[: self.parameters])

    def _gradients(self, ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        g_x, made = self._pull(gradient, *ctx.saved_tensors, *ctx.numbers)
        return g_x, *self.gradients(made, ctx.saved_tensors[2:]), *[None] * len(ctx.numbers)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: NativeOperator, *args: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        made = operator.forward(*args)
        ctx.operator = operator
        operator.keep(ctx, args, made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        operator, numbers = ctx.operator, ctx.numbers
        x, moments, *parameters = ctx.saved_tensors
        if taken_in_formulas(gradient):  # second derivatives
            return None, *recomputed_gradients(operator.reference, (x, *parameters, *numbers), gradient)
        g_x, made = operator.backward(gradient, x, moments, *parameters, *numbers)
        return None, g_x, *operator.gradients(made, parameters), *[None] * len(numbers)


def _without_gaps(x: Tensor) -> Tensor:
    return x if passes(x) else x.contiguous()


def _dense(values: Sequence[Any]) -> list[Any]:
    return [a.contiguous() if isinstance(a, Tensor) else a for a in values]


def _widened(values: Sequence[Any]) -> list[Any]:
    return [a.float() if isinstance(a, Tensor) else a for a in values]


def refused_norm(x: Tensor, *tensors: Tensor | None, activation: str = "none") -> str | None:
    """Why norms in C cannot take (N, C, *) and its parameters, or None; in code that is compiled too."""
    if activation not in ("none", "relu"):
        return f"activation={activation!r} is none of none, relu"
    if torch.compiler.is_compiling():
        return _refused_compiled(x, *tensors)
    if reason := refused_native(x, DTYPES):
        return reason
    for t in tensors:
        if t is not None and not (t.dtype in (torch.float32, x.dtype) and t.device == x.device and t.is_contiguous()):
            return "a parameter is neither float32 nor of the dtype of x, or is not contiguous"
    return None if passes(x) else "x is neither contiguous nor channels last"


def _refused_compiled(x: Tensor, *tensors: Tensor | None) -> str | None:
    if (reason := refused_export()) is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "torch.func takes derivatives of formulas"
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if x.dtype not in DTYPES or any(t is not None and t.dtype not in (torch.float32, x.dtype) for t in tensors):
        return "something is neither float32 nor of half precision"
    return f"x of shape {tuple(x.shape)} has no channels" if x.dim() < 2 else refused_c()
