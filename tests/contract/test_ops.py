"""What every op must satisfy, over the rows of `cases.OPS`."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import Kernel, backend, explain
from anybatch.functional import kn_conv
from contract.cases import HALVES, MIXED_OPS, OPS, last_format
from contract.kinds import OpCase
from helpers import assert_error_within, empty_is_nan, error, fenced_saved_tensors, saved_tensors

FIRST_OF_EACH_OP = list({case.op: case for case in reversed(OPS)}.values())
CHANNELS_LAST = [case for case in [*OPS, *MIXED_OPS] if case.layout == "channels_last"]
DTYPES = [torch.float64, torch.float32, *HALVES]
ELSEWHERE = ("x is on cpu", "no kernels in C", "ANYBATCH_NATIVE=0")
"""How refusals start that another machine, or another environment, would not give."""


def asking(args: tuple[Any, ...]) -> list[Any]:
    """The same arguments in the layouts they came in, of which each tensor asks for its gradient."""
    return [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]


def taken(cases: list[OpCase], dtypes: list[torch.dtype]) -> list[tuple[OpCase, Kernel, torch.dtype]]:
    """The calls that kernels take, here or elsewhere."""
    found = []
    for case, dtype in itertools.product(cases, dtypes):
        args = asking(case.arguments(dtype))
        for kernel in case.op.kernels:
            reason = kernel.refusal(*args, **case.options)
            if reason is None or reason.startswith(ELSEWHERE):
                found.append((case, kernel, dtype))
    return found


CALLS = taken(OPS, [torch.float32, *HALVES])


def named(value: object) -> str:
    return value.backend if isinstance(value, Kernel) else str(value).removeprefix("torch.")


def forward_and_gradients(case: OpCase, args: tuple[Any, ...], call: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradient of each tensor argument for one and the same gradient of the output."""
    leaves = asking(args)
    inputs = {f"gradient of argument {i}": a for i, a in enumerate(leaves) if isinstance(a, Tensor)}
    y = call(*leaves, **case.options)
    wanted = torch.autograd.grad(y, list(inputs.values()), case.output_gradient(dtype).to(y.dtype))
    return {"output": y.detach(), **dict(zip(inputs, wanted, strict=True))}


def assert_errs_at_most_twice_as_much(case: OpCase, kernel: Kernel, dtype: torch.dtype) -> None:
    args = case.arguments(dtype)
    if reason := kernel.refusal(*asking(args), **case.options):
        pytest.skip(f"refused: {reason}")
    exact = forward_and_gradients(case, case.doubled(args), case.op.reference, dtype)
    naive = forward_and_gradients(case, args, case.op.reference, dtype)
    with backend(kernel.backend), empty_is_nan():
        got = forward_and_gradients(case, args, case.op, dtype)
    for what, value in exact.items():
        assert got[what].dtype == naive[what].dtype, what
        terms = args[0].numel() // value.numel()
        allowed = 2 * error(naive[what], value) + case.roundoff(args, value, terms)
        assert_error_within(got[what], value, allowed, what)


def test_every_kernel_takes_some_calls() -> None:
    called = {(case.op, kernel) for case, kernel, _ in CALLS}
    for op in (case.op for case in FIRST_OF_EACH_OP):
        left = [kernel.backend for kernel in op.kernels if (op, kernel) not in called]
        assert set(left) <= {"library"}, op  # which serves compiled code alone


@pytest.mark.parametrize(("case", "kernel", "dtype"), CALLS, ids=named)
def test_kernel_errs_at_most_twice_as_much_as_the_reference(case: OpCase, kernel: Kernel, dtype: torch.dtype) -> None:
    assert_errs_at_most_twice_as_much(case, kernel, dtype)


@pytest.mark.parametrize(("case", "kernel", "dtype"), taken(MIXED_OPS, list(HALVES)), ids=named)
def test_kernel_errs_at_most_twice_as_much_with_float32_weights(
    case: OpCase, kernel: Kernel, dtype: torch.dtype
) -> None:
    assert_errs_at_most_twice_as_much(case, kernel, dtype)


ONE_MEAN = [call[:2] for call in CALLS if call[2] == torch.float32 and "mean" not in str(call[0])]


@pytest.mark.parametrize(("case", "kernel"), ONE_MEAN, ids=named)
def test_backward_reads_what_autograd_keeps_alone(case: OpCase, kernel: Kernel) -> None:
    args = case.arguments(torch.float32)
    if reason := kernel.refusal(*asking(args), **case.options):
        pytest.skip(f"refused: {reason}")
    with backend(kernel.backend):
        plain = forward_and_gradients(case, args, case.op, torch.float32)
        with fenced_saved_tensors():
            copied = forward_and_gradients(case, args, case.op, torch.float32)
    for what, value in plain.items():
        torch.testing.assert_close(copied[what], value, rtol=0, atol=0, equal_nan=True, msg=what)


@pytest.mark.parametrize(("case", "kernel"), ONE_MEAN, ids=named)
def test_backward_takes_several_gradients_at_once(case: OpCase, kernel: Kernel) -> None:
    args = case.arguments(torch.float32)
    leaves = asking(args)
    if reason := kernel.refusal(*leaves, **case.options):
        pytest.skip(f"refused: {reason}")
    exact = forward_and_gradients(case, case.doubled(args), case.op.reference, torch.float32)
    naive = forward_and_gradients(case, args, case.op.reference, torch.float32)
    inputs = {f"gradient of argument {i}": a for i, a in enumerate(leaves) if isinstance(a, Tensor)}
    with backend(kernel.backend):
        y = case.op(*leaves, **case.options)
    g = case.output_gradient(torch.float32).to(y.dtype)
    several = torch.autograd.grad(y, list(inputs.values()), torch.stack([g, -2 * g]), is_grads_batched=True)
    for what, both in zip(inputs, several, strict=True):
        value = exact[what]
        allowed = 2 * error(naive[what], value) + case.roundoff(args, value, args[0].numel() // value.numel())
        assert_error_within(both[0], value, allowed, what)
        assert_error_within(both[1], -2 * value, 2 * allowed, what)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=named)
@pytest.mark.parametrize("case", [*OPS, *MIXED_OPS], ids=str)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_output_is_as_accurate_as_two_passes_in_float32(case: OpCase, dtype: torch.dtype, choice: str) -> None:
    args = case.arguments(dtype)
    exact = case.op.reference(*case.doubled(args), **case.options)
    with backend(choice):
        plain = case.op is kn_conv and explain(kn_conv, *args, **case.options)["native"] == "runs"
        allowed = case.roundoff(args, exact, as_they_are=plain)
        assert_error_within(case.op(*args, **case.options), exact, allowed)


def test_the_bound_refuses_a_variance_taken_as_a_difference_of_squares() -> None:
    (case,) = (case for case in OPS if case.name == "group_norm-mean_1000")
    args = case.arguments(torch.float32)
    exact = case.op.reference(*case.doubled(args))
    x_rows = case.rows(args[0])
    mean = x_rows.mean(1, keepdim=True)
    var = (x_rows.square().mean(1, keepdim=True) - mean.square()).clamp_min(0)
    y = ((x_rows - mean) * (var + 1e-5).rsqrt()).reshape(args[0].shape)
    per_channel = (1, -1, 1, 1)
    with pytest.raises(AssertionError, match="allowed"):
        assert_error_within(
            y * args[2].reshape(per_channel) + args[3].reshape(per_channel), exact, case.roundoff(args, exact)
        )


@pytest.mark.parametrize("case", OPS, ids=str)
def test_reference_passes_gradcheck(case: OpCase) -> None:
    args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in case.arguments(torch.float64)]
    slow = args[0].numel() <= 300
    assert torch.autograd.gradcheck(lambda *a: case.op.reference(*a, **case.options), args, fast_mode=not slow)


@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
def test_second_derivatives_are_right(case: OpCase) -> None:
    args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in case.arguments(torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *a: case.op(*a, **case.options), args, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("case", [*OPS, *MIXED_OPS], ids=str)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_output_has_the_dtype_of_the_input_and_the_shape_told(case: OpCase, dtype: torch.dtype, choice: str) -> None:
    args = case.arguments(dtype)
    with backend(choice):
        y = case.op(*args, **case.options)
    assert y.dtype == dtype
    assert y.shape == (case.out_shape or args[0].shape)


@pytest.mark.parametrize("case", CHANNELS_LAST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_channels_last_stays_channels_last(case: OpCase, dtype: torch.dtype, choice: str) -> None:
    args = case.arguments(dtype)
    x = args[0].requires_grad_()
    with backend(choice):
        y = case.op(*args, **case.options)
    assert y.is_contiguous(memory_format=last_format(x))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.is_contiguous(memory_format=last_format(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=named)
@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_inputs_that_are_not_floating_point_are_refused(case: OpCase, dtype: torch.dtype, choice: str) -> None:
    x, *others = case.arguments(torch.float32)
    with backend(choice), pytest.raises(TypeError, match=f"must be floating point, got {dtype}"):
        case.op(x.to(dtype), *others, **case.options)


@pytest.mark.parametrize("case", OPS, ids=str)
def test_arguments_are_left_as_they_were(case: OpCase) -> None:
    args = case.arguments(torch.float32)
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    case.op(*args, **case.options)
    for a, b in zip((a for a in args if isinstance(a, Tensor)), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=named)
@pytest.mark.parametrize("case", [case for case in [*OPS, *MIXED_OPS] if case.activations], ids=str)
def test_nothing_of_the_inputs_size_is_kept_in_float32(case: OpCase, dtype: torch.dtype) -> None:
    args = case.arguments(dtype)
    for a in args:
        if isinstance(a, Tensor):
            a.requires_grad_()
    with saved_tensors() as kept:
        case.op(*args, **case.options)
    assert kept
    wide = [t for t in kept if t.dtype.itemsize > 2 and t.numel() >= args[0].numel()]
    assert not wide, [(tuple(t.shape), t.dtype) for t in wide]


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("value", [0.0, 3.14159, 1e3])
@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
def test_a_constant_input_gives_finite_output_and_gradient(case: OpCase, value: float, choice: str) -> None:
    x, *others = case.arguments(torch.float32)
    x = torch.full_like(x, value).requires_grad_()
    with backend(choice):
        y = case.op(x, *others, **case.options)
    (gradient,) = torch.autograd.grad(y, x, case.output_gradient(torch.float32))
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
def test_compiles_to_one_graph_with_the_same_result(case: OpCase, layout: str) -> None:
    x, *others = case.arguments(torch.float32)
    args = (x if layout == "contiguous" else x.contiguous(memory_format=last_format(x)), *others)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    eager = forward_and_gradients(case, args, case.op, torch.float32)
    for what, value in forward_and_gradients(case, args, compiled, torch.float32).items():
        torch.testing.assert_close(value, eager[what], msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
def test_compiles_to_one_graph_in_half_precision(case: OpCase) -> None:
    args = case.arguments(torch.bfloat16)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    # The reference rounds as compiled code does, and kernels elsewhere; an operator runs kernels there too.
    is_operator = any(kernel.backend == "library" for kernel in case.op.kernels)
    with backend("auto" if is_operator else "reference"):
        eager = forward_and_gradients(case, args, case.op, torch.bfloat16)
    for what, value in forward_and_gradients(case, args, compiled, torch.bfloat16).items():
        torch.testing.assert_close(value, eager[what], msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
def test_compiled_code_keeps_to_a_choice_of_backend(case: OpCase) -> None:
    args = case.arguments(torch.float32)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    # Left to choose, a kernel may run other formulas where it is traced; `test_dispatch.py` tells those choices apart.
    for choice, exact in [("auto", False), ("reference", True), ("auto", False)]:
        with backend(choice):
            tolerances = {"rtol": 0, "atol": 0} if exact else {}
            torch.testing.assert_close(compiled(*args), case.op(*args), **tolerances)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", FIRST_OF_EACH_OP, ids=str)
def test_inductor_errs_within_roundoff(case: OpCase) -> None:
    args = case.arguments(torch.float32)
    exact = case.op.reference(*case.doubled(args))
    got = torch.compile(case.op, fullgraph=True)(*args)
    assert_error_within(got, exact, case.roundoff(args, exact))
