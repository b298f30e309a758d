"""Norms that apply the activation behind them: the numbers of both in turn, with one tensor less kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.dispatch import backend
from anybatch.functional import batch_channel_norm, group_norm, local_context_norm, positional_norm
from anybatch.kernels.native_common import refused_native
from anybatch.layers import BatchChannelNorm1d, BatchChannelNorm2d, GroupNorm, LocalContextNorm2d, PositionalNorm
from anybatch.measure import saved_bytes
from anybatch.methods.common import ACTIVATIONS
from contract.kinds import Layout, in_layout
from helpers import assert_error_within, error, saved_tensors

C, GROUPS, SHAPE = 8, 4, (2, 8, 9, 7)
OPS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "group_norm": (lambda x, w, b, **o: group_norm(x, GROUPS, w, b, **o), 2),
    "layer_norm": (lambda x, w, b, **o: group_norm(x, 1, w, b, **o), 2),
    "instance_norm": (lambda x, w, b, **o: group_norm(x, C, w, b, **o), 2),
    "positional_norm": (lambda x, w, b, **o: positional_norm(x, w, b, **o), 2),
    "local_context_norm": (lambda x, w, b, **o: local_context_norm(x, (5, 3), GROUPS, w, b, **o), 2),
    "local_context_norm_whole": (lambda x, w, b, **o: local_context_norm(x, 9, GROUPS, w, b, **o), 2),
    "batch_channel_norm": (lambda x, *p, **o: batch_channel_norm(x, GROUPS, *p, **o), 6),
}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "group_norm": lambda x, w, b, **o: group_norm.reference(x, GROUPS, w, b, **o),
    "layer_norm": lambda x, w, b, **o: group_norm.reference(x, 1, w, b, **o),
    "instance_norm": lambda x, w, b, **o: group_norm.reference(x, C, w, b, **o),
    "positional_norm": lambda x, w, b, **o: positional_norm.reference(x, w, b, **o),
    "local_context_norm": lambda x, w, b, **o: local_context_norm.reference(x, (5, 3), GROUPS, w, b, **o),
    "local_context_norm_whole": lambda x, w, b, **o: group_norm.reference(x, C // GROUPS, w, b, **o),
    "batch_channel_norm": lambda x, *p, **o: batch_channel_norm.reference(x, GROUPS, *p, **o),
}
NAMES = pytest.mark.parametrize("name", OPS)
ACTS = pytest.mark.parametrize("activation", ACTIVATIONS)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])


def arguments(name: str, layout: Layout, dtype: torch.dtype, mean: float = 0.0) -> list[Tensor]:
    """Inputs of a given mean, and parameters: statistics near to theirs, scales near 1, shifts near 0."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + mean
    noise = 0.3 * torch.randn(OPS[name][1], C, generator=generator, dtype=torch.float64)
    starts = (1.0, 0.0) if len(noise) == 2 else (mean, 1.5, 1.0, 0.0, 1.0, 0.0)
    parameters = [n + start for n, start in zip(noise, starts, strict=True)]
    return [t.requires_grad_() for t in (in_layout(x.to(dtype), layout), *(p.to(dtype) for p in parameters))]


def output_and_gradients(call: Callable[..., Tensor], args: list[Tensor], **options: str) -> list[Tensor]:
    y = call(*args, **options)
    g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, args, g.to(y.dtype))]


@NAMES
@ACTS
@LAYOUTS
@pytest.mark.parametrize("mean", [0, 10, 100, 1000])
def test_errs_as_the_reference_does_at_any_mean(name: str, activation: str, layout: Layout, mean: float) -> None:
    args = arguments(name, layout, torch.float32, mean)
    doubled = [a.detach().double().requires_grad_() for a in args]
    exact = output_and_gradients(REFERENCES[name], doubled, activation=activation)
    naive = output_and_gradients(REFERENCES[name], args, activation=activation)
    got = output_and_gradients(OPS[name][0], args, activation=activation)
    for i, (value, wanted) in enumerate(zip(got, exact, strict=True)):
        # As in the contract: four roundings, each multiplied by mean / std (about 1), and sums that err as their root.
        # ReLU has a step: an input that a rounding takes over it changes a gradient by its output's.
        terms = args[0].numel() // value.numel()
        step = 0.0 if activation != "relu" or mean < 100 else 4.0
        roundings = 4 * torch.finfo(torch.float32).eps * (1 + mean) * max(wanted.abs().max().item(), terms**0.5)
        allowed = 2 * error(naive[i], wanted) + roundings * (1 + step)
        assert_error_within(value, wanted, allowed, f"result {i}")


@NAMES
@ACTS
@LAYOUTS
def test_gradients_in_double_precision(name: str, activation: str, layout: Layout) -> None:
    call = partial(OPS[name][0], activation=activation)
    args = arguments(name, layout, torch.float64, 1.0)
    assert torch.autograd.gradcheck(call, args, fast_mode=True)
    exact = output_and_gradients(REFERENCES[name], args, activation=activation)
    for value, wanted in zip(output_and_gradients(call, args), exact, strict=True):
        torch.testing.assert_close(value, wanted)
    if activation != "relu":  # its second derivative is 0, and at the step none
        assert torch.autograd.gradgradcheck(call, args, fast_mode=True)


@NAMES
@ACTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@LAYOUTS
def test_half_precision_takes_the_activation_before_it_rounds(
    name: str, activation: str, dtype: torch.dtype, layout: Layout
) -> None:
    args = arguments(name, layout, dtype)
    exact = OPS[name][0](*(a.double() for a in args), activation=activation)
    got = OPS[name][0](*args, activation=activation)
    assert got.dtype == dtype
    assert_error_within(got, exact, 0.51 * torch.finfo(dtype).eps * exact.abs().max().item())


def by_formulas(x: Tensor, name: str, layout: Layout) -> bool:
    """Whether no kernel serves the case."""
    return name == "local_context_norm" and (layout == "strided" or refused_native(x) is not None)


def by_torch_with_relu(x: Tensor, name: str, activation: str, layout: Layout) -> bool:
    """Whether torch's own kernel and its ReLU in place serve the case, as where there is no C compiler."""
    case = activation == "relu" and layout == "contiguous" and name not in ("positional_norm", "batch_channel_norm")
    return case and refused_native(x) is not None


@NAMES
@LAYOUTS
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_keeps_its_input_alone(name: str, activation: str, layout: Layout) -> None:
    x, *parameters = arguments(name, layout, torch.float32)
    size = x.numel() * 4
    if by_formulas(x, name, layout):
        pytest.skip("keeps what autograd keeps of formulas")
    with saved_tensors() as kept:
        OPS[name][0](x, *parameters, activation=activation)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= x.numel()}
    if by_torch_with_relu(x, name, activation, layout):
        assert len(large) == 2, "the output too, which the next convolution keeps anyway"
        return
    assert large == {x.untyped_storage().data_ptr()}
    layer = nn.ParameterList(parameters)
    pair = saved_bytes(layer, lambda: ACTIVATIONS[activation](OPS[name][0](x, *parameters)))
    together = saved_bytes(layer, lambda: OPS[name][0](x, *parameters, activation=activation))
    assert 0.9 * size < pair - together < 1.1 * size  # and some moments more or less


@NAMES
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_nothing_wide(name: str, layout: Layout, dtype: torch.dtype) -> None:
    x, *parameters = arguments(name, layout, dtype)
    with saved_tensors() as kept:
        OPS[name][0](x, *parameters, activation="silu")
    assert not [t.shape for t in kept if t.dtype.itemsize > 2 and t.numel() >= x.numel()]


@NAMES
@LAYOUTS
def test_what_follows_may_work_in_place(name: str, layout: Layout) -> None:
    args = arguments(name, layout, torch.float32)
    # Torch's own ReLU refuses, as nn.ReLU's does.
    torchs = by_formulas(args[0], name, layout) or by_torch_with_relu(args[0], name, "relu", layout)
    activation = "gelu" if torchs else "relu"
    (expected,) = torch.autograd.grad(OPS[name][0](*args, activation=activation).mul(2).square().sum(), args[0])
    (got,) = torch.autograd.grad(OPS[name][0](*args, activation=activation).mul_(2).square().sum(), args[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@NAMES
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_an_unknown_activation_is_refused_by_name(name: str, choice: str) -> None:
    args = arguments(name, "contiguous", torch.float32)
    with (
        backend(choice),
        pytest.raises(ValueError, match="activation='mish' is none of none, relu, silu, gelu"),
    ):
        OPS[name][0](*args, activation="mish")


@NAMES
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    for layout in ("contiguous", "channels_last"):
        x, *parameters = (a.detach() for a in arguments(name, layout, torch.float32))
        # Torch's SiLU and GELU themselves depend on where in memory an element lies.
        together = OPS[name][0](x, *parameters, activation="relu")
        alone = OPS[name][0](x[1:], *parameters, activation="relu")
        torch.testing.assert_close(alone, together[1:], rtol=0, atol=0)


@NAMES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_each_sample(name: str, layout: Layout) -> None:
    """As differential privacy takes them: vmap over samples equals a loop over them."""
    x, *parameters = (a.detach() for a in arguments(name, layout, torch.float64))

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return OPS[name][0](sample[None], *parameters[:-2], weight, parameters[-1], activation="gelu").pow(3).sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters[-2], x)
    singly = torch.stack([torch.func.grad(loss)(parameters[-2], sample) for sample in x])
    torch.testing.assert_close(together, singly)


@pytest.mark.parametrize(
    "make",
    [
        partial(GroupNorm, C, GROUPS),
        partial(PositionalNorm, C),
        partial(LocalContextNorm2d, C, 5),
        partial(LocalContextNorm2d, C, 5, released=True),
        partial(BatchChannelNorm2d, C, GROUPS),
        partial(BatchChannelNorm2d, C, GROUPS, statistics="batch"),
    ],
    ids=["gn", "pn", "lcn", "lcn_released", "bcn", "bcn_batch"],
)
def test_layers_take_the_activation_behind_them(make: Callable[..., nn.Module]) -> None:
    layer, plain = make(), make()
    assert "activation" not in repr(layer)
    x = torch.randn(SHAPE)
    for act, name in ((nn.ReLU(inplace=True), "relu"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu")):
        assert layer.take_activation(act)  # pyright: ignore[reportCallIssue]
        assert f"activation={name}" in repr(layer)
        torch.testing.assert_close(layer(x), act(plain(x)))
    for act in (nn.Mish(), nn.GELU(approximate="tanh"), nn.LeakyReLU()):
        assert not layer.take_activation(act)  # pyright: ignore[reportCallIssue]
    assert "activation=gelu" in repr(layer)
    assert layer.state_dict().keys() == plain.state_dict().keys()


def test_a_sample_without_a_batch_is_activated_too() -> None:
    layer = BatchChannelNorm1d(C, GROUPS)
    layer.take_activation(nn.ReLU())
    x = torch.randn(C, 9)
    plain = BatchChannelNorm1d(C, GROUPS)
    torch.testing.assert_close(layer(x), F.relu(plain(x)))
