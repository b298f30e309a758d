"""Kernels attach to references, refuse with reasons, and are chosen by a switch that always goes back."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from anybatch import dispatch, functional
from anybatch.dispatch import Op, autotuned, autotunes, backend, backends, compiled_helpers, compiles_helpers, op
from anybatch.kernels.compiled import helper


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op of its own, with a kernel "fast" for even numbers and a kernel "small" for numbers below 10."""
    monkeypatch.setattr(dispatch, "_OPS", list(dispatch._OPS))

    @op
    def double(x: int, *, times: int = 2) -> tuple[str, int]:
        """Twice x."""
        return "reference", x * times

    @double.kernel("fast", refusal=lambda x, *, times=2: f"{x} is odd" if x % 2 else None)
    def double_fast(x: int, *, times: int = 2) -> tuple[str, int]:
        return "fast", x * times

    @double.kernel("small", refusal=lambda x, *, times=2: None if x < 10 else f"{x} is large")
    def double_small(x: int, *, times: int = 2) -> tuple[str, int]:
        return "small", x * times

    return double


def test_the_first_kernel_that_does_not_refuse_runs(double: Op) -> None:
    assert double(4) == ("fast", 8)
    assert double(3) == ("small", 6)
    assert double(13) == ("reference", 26)
    assert double(4, times=3) == ("fast", 12)


def test_a_kernel_may_be_asked_first(double: Op) -> None:
    @double.kernel("tiny", refusal=lambda x, *, times=2: None if x < 4 else f"{x} is not tiny", first=True)
    def double_tiny(x: int, *, times: int = 2) -> tuple[str, int]:
        return "tiny", x * times

    assert double(2) == ("tiny", 4)
    assert double(4) == ("fast", 8)
    assert list(dispatch.explain(double, 2)) == ["tiny", "fast", "small", "reference"]


def test_by_name(double: Op) -> None:
    with backend("small"):
        assert double(4) == ("small", 8)
    with backend("fast"):
        assert double(4) == ("fast", 8)
    with backend("reference"):
        assert double(4) == ("reference", 8)
    with backend("auto"):
        assert double(4) == ("fast", 8)


def test_explain_tells_what_each_backend_says(double: Op) -> None:
    def explained(name: str, x: int) -> dict[str, str]:
        with backend(name):
            return dispatch.explain(double, x)

    assert explained("auto", 4) == {"fast": "runs", "small": "could run", "reference": "could run"}
    assert explained("auto", 13) == {"fast": "13 is odd", "small": "13 is large", "reference": "runs"}
    assert explained("small", 4) == {"fast": "could run", "small": "runs", "reference": "could run"}
    assert explained("small", 12) == {"fast": "could run", "small": "12 is large", "reference": "could run"}
    assert explained("reference", 4) == {"fast": "could run", "small": "could run", "reference": "runs"}
    with backend("torch"):  # which this op has not
        assert dispatch.explain(double, 4)["reference"] == "runs"
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert dispatch.explain(functional.group_norm, x, 4)["torch"] == "x is not contiguous"
    with pytest.raises(TypeError, match=r"explain takes an op of anybatch\.functional and its arguments, got function"):
        dispatch.explain(lambda: 0)  # pyright: ignore[reportArgumentType]


def test_by_name_a_refusal_is_an_error_that_quotes_the_reason(double: Op) -> None:
    with backend("fast"), pytest.raises(ValueError, match="the 'fast' kernel of double refuses: 3 is odd"):
        double(3)
    with backend("small"), pytest.raises(ValueError, match="the 'small' kernel of double refuses: 12 is large"):
        double(12)


def test_an_op_without_that_kernel_runs_its_reference(double: Op) -> None:
    @op
    def half(x: int) -> int:
        return x // 2

    with backend("fast"):
        assert half(4) == 2


def test_unknown_backend_is_refused_and_changes_nothing(double: Op) -> None:
    with (
        pytest.raises(ValueError, match=r"unknown backend 'fats'; known backends: auto, reference, .*fast"),
        backend("fats"),
    ):
        pass
    assert double(4) == ("fast", 8)


def test_the_choice_goes_back_after_an_error_and_nests(double: Op) -> None:
    with pytest.raises(ZeroDivisionError), backend("reference"):
        raise ZeroDivisionError
    assert double(4) == ("fast", 8)
    with backend("reference"):
        with backend("small"):
            assert double(4) == ("small", 8)
        assert double(4) == ("reference", 8)
    assert double(4) == ("fast", 8)


def test_a_backend_attaches_once(double: Op) -> None:
    with pytest.raises(ValueError, match="double has a 'fast' kernel already"):
        double.kernel("fast", refusal=lambda x: None)(lambda x: x)
    assert [kernel.backend for kernel in double.kernels] == ["fast", "small"]


def test_a_kernels_function_is_left_as_it_was(double: Op) -> None:
    run = double.kernel("third", refusal=lambda x: None)(abs)
    assert run is abs


def test_names(double: Op) -> None:
    assert double.__name__ == "double"
    assert double.__doc__ == "Twice x."
    assert repr(double) == "<op double, kernels: fast, small>"
    assert double.reference(5) == ("reference", 10)
    assert {"auto", "reference", "fast", "small"} <= set(backends())
    assert backends()[:2] == ["auto", "reference"]


def test_the_ops_here_have_a_torch_kernel() -> None:
    from anybatch.functional import group_norm, weight_standardize

    assert "torch" in [kernel.backend for kernel in group_norm.kernels]
    assert "torch" in [kernel.backend for kernel in weight_standardize.kernels]
    assert "torch" in backends()


def test_helpers_are_compiled_only_where_asked_for() -> None:
    assert not compiles_helpers()
    with pytest.raises(ValueError, match="out"), compiled_helpers():  # noqa: PT012
        assert compiles_helpers()
        with compiled_helpers(False):
            assert not compiles_helpers()
        assert compiles_helpers()
        raise ValueError("out")
    assert not compiles_helpers()


def test_kernels_are_tuned_only_where_asked_for() -> None:
    assert not autotunes()
    with pytest.raises(ValueError, match="out"), autotuned():  # noqa: PT012
        assert autotunes()
        with autotuned(False):
            assert not autotunes()
        assert autotunes()
        raise ValueError("out")
    assert not autotunes()


@pytest.mark.parametrize(("given", "told"), [("1", "True"), ("0", "False"), ("", "False")])
def test_an_environment_variable_tunes_kernels_everywhere(given: str, told: str) -> None:
    code = "from anybatch import dispatch; print(dispatch.autotunes())"
    environment = {**os.environ, "ANYBATCH_AUTOTUNE": given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == told


def test_a_helper_that_cannot_be_compiled_runs_as_it_stands_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))

    @helper
    def doubled(x: torch.Tensor, times: float) -> torch.Tensor:
        return x * times

    x = torch.tensor([1.0, 2.0])
    assert doubled(x, 2.0).tolist() == [2, 4]
    with compiled_helpers():
        with pytest.warns(UserWarning, match=r"doubled runs without torch.compile, which failed: .*no compiler here"):
            assert doubled(x, 2.0).tolist() == [2, 4]
        assert doubled(x, 3.0).tolist() == [3, 6]  # a second warning would be an error


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_helper_is_a_formula_like_any_other_to_autograd_and_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    @helper
    def squared(x: torch.Tensor) -> torch.Tensor:
        return x * x

    x = torch.tensor([1.0, 2.0])
    with compiled_helpers():
        assert squared(x).tolist() == [1, 4]
        y = x.clone().requires_grad_()
        squared(y).sum().backward()
        assert y.grad is not None
        assert y.grad.tolist() == [2, 4]
        assert torch.func.vmap(squared)(x).tolist() == [1, 4]
        assert torch.func.vmap(torch.func.grad(squared))(x).tolist() == [2, 4]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_runs_the_backend_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", list(dispatch._OPS))

    @op
    def plus(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @plus.kernel("thousand", refusal=lambda x: None if len(x) > 2 else "x is short")
    def plus_thousand(x: torch.Tensor) -> torch.Tensor:
        return x + 1000

    compiled = torch.compile(plus, fullgraph=True, backend="aot_eager")
    x = torch.zeros(3)
    for choice, value in [("auto", 1000), ("reference", 1), ("thousand", 1000), ("auto", 1000)]:
        with backend(choice):
            assert compiled(x).tolist() == [value] * 3
    assert compiled(x[:2]).tolist() == [1, 1]
