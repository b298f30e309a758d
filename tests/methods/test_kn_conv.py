"""What is special about KNConv: it is kernel norm and a convolution, by a cheaper way that rounds less."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import anybatch
from anybatch import layers
from anybatch.dispatch import backend, explain
from anybatch.functional import kn_conv
from anybatch.methods.kernel_norm import dropout_mask
from anybatch.models.blocks import Pieces
from helpers import assert_error_within, error, saved_tensors

KINDS = (layers.KNConv1d, layers.KNConv2d, layers.KNConv3d)
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("zeros", "reflect", "replicate", "circular")


def offset_input(*shape: int) -> Tensor:
    """Samples and channels with means and scales of their own."""
    x = torch.randn(shape, dtype=torch.float64)
    per_channel = (1, shape[1], *(1 for _ in shape[2:]))
    return x * torch.rand(per_channel, dtype=torch.float64) + 3 * torch.randn(per_channel, dtype=torch.float64)


def relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over norm of the exact result."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_by_hand() -> None:
    # Windows 1, 3 and 3, 5: normalized with eps = 3 both are -1/2, 1/2, of which the filter 1, 2 makes 1/2.
    x = torch.tensor([[[1.0, 3.0, 5.0]]], dtype=torch.float64)
    weight, bias = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    torch.testing.assert_close(kn_conv(x, weight, bias, eps=3.0), torch.full((1, 1, 2), 10.5).double())
    # The padded zeros count: 0, 1 has mean 1/2 and variance 1/4; (0 - 1/2) 1 + (1 - 1/2) 2 = 1/2.
    y = kn_conv(x, weight, bias, 2, 1, eps=0.75)
    torch.testing.assert_close(y, torch.tensor([[[10.5, 10 + 1.75**-0.5]]]).double())


GEOMETRIES = [
    (dims, kernel, stride, padding, dilation)
    for dims, kernel, stride, padding, dilation in [
        *itertools.product([2], [1, 2, 3, (3, 2)], [1, 2, 3], [0, 1, ((1, 0), (0, 2))], [1, 2]),
        *itertools.product([2], [1, 2, 3, (2, 5)], [1], ["same", "valid"], [1, 2]),
        *itertools.product([1], [1, 2, 3, 7], [1, 2, 4], [0, 3, ((2, 1),)], [1]),
        *itertools.product([3], [1, 2, (3, 1, 2)], [1, 2], [1, ((1, 0), (0, 1), (2, 1))], [1]),
        (2, 7, 2, 3, 1),
        (2, (7, 9), 1, 0, 1),
        (3, 3, 1, "same", 2),
    ]
]


@pytest.mark.parametrize(("dims", "kernel", "stride", "padding", "dilation"), GEOMETRIES, ids=str)
def test_equals_kernel_norm_and_a_convolution_with_stride_as_large_as_its_kernel(
    dims: int, kernel: Any, stride: int, padding: Any, dilation: int
) -> None:
    size = (7, 9) if dims == 2 else (11,) if dims == 1 else (5, 4, 6)
    x = offset_input(2, 4, *size)
    one = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "dtype": torch.float64}
    for mode, (groups, norm_groups), p in itertools.product(MODES, [(1, 1), (2, 1), (2, 2), (4, 2)], [0.0, 0.2]):
        layer = KINDS[dims - 1](
            4, 8, **one, groups=groups, norm_groups=norm_groups, padding_mode=mode, p=p, bias=mode != "zeros"
        )
        torch.manual_seed(8)
        got = layer(x)
        torch.manual_seed(8)
        expected = layer.literal()(x)
        assert got.shape == expected.shape
        assert error(got, expected) < 1e-12, (mode, groups, norm_groups, p)


def test_gradients_equal_those_of_the_literal_form() -> None:
    x = offset_input(2, 4, 7, 6).requires_grad_()
    for groups, p in itertools.product((1, 2), (0.0, 0.3)):
        layer = layers.KNConv2d(4, 6, 3, 2, 1, groups=groups, p=p, dtype=torch.float64)
        leaves = [x, *layer.parameters()]
        g = torch.randn(2, 6, 4, 3, dtype=torch.float64)
        torch.manual_seed(8)
        got = torch.autograd.grad(layer(x), leaves, g)
        torch.manual_seed(8)
        for a, b in zip(got, torch.autograd.grad(layer.literal()(x), leaves, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_literal_form_shares_its_parameters_and_its_mode() -> None:
    layer = layers.KNConv2d(4, 6, 3, eval_stats="expected").eval()
    literal = layer.literal()
    assert all(a is b for a, b in zip(literal.parameters(), layer.parameters(), strict=True))
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), literal(x))
    assert not literal[0].training


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_geometry_is_that_of_torchs_convolutions(dims: int, mode: str) -> None:
    """With an eps that outweighs every variance only centered filters and the scale are left."""
    x, eps = offset_input(2, 4, *(7, 6, 5)[:dims]), 1e16
    for kernel, stride, padding, dilation in [
        (1, 2, 0, 1),
        (2, 1, "same", 1),
        (3, 1, "same", 2),
        (3, 2, 1, 1),
        (2, 1, "valid", 2),
        ((3, 2, 1)[:dims], (2, 1, 3)[:dims], (1, 0, 2)[:dims], (1, 2, 1)[:dims]),
    ]:
        args = (4, 6, kernel, stride, padding, dilation, 2)
        plain = PLAIN[dims - 1](*args, bias=False, padding_mode=mode, dtype=torch.float64)
        layer = KINDS[dims - 1](*args, bias=False, padding_mode=mode, dtype=torch.float64, norm_groups=2, p=0, eps=eps)
        with torch.no_grad():
            plain.weight -= plain.weight.mean(tuple(range(1, dims + 2)), keepdim=True)
        layer.load_state_dict(plain.state_dict())
        torch.testing.assert_close(layer(x) * eps**0.5, plain(x), rtol=1e-9, atol=1e-9)


def test_asymmetric_padding_is_given_from_the_outermost_dimension() -> None:
    x, weight = offset_input(2, 4, 7, 6), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    top, bottom, left, right = 0, 1, 2, 3
    expected = kn_conv(F.pad(x, (left, right, top, bottom)), weight)
    torch.testing.assert_close(kn_conv(x, weight, padding=((top, bottom), (left, right))), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_published_form(groups: int) -> None:
    """Algorithm 1: convolve, subtract the mean times the filter's sum, divide, add the bias."""
    x, weight = offset_input(2, 4, 7, 6), torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64) + 1
    bias, seed = torch.randn(6, dtype=torch.float64), torch.tensor(5)
    mask = dropout_mask(x, 0.3, seed)
    dropped = F.pad(x * mask / torch.tensor(0.7, dtype=torch.float64), (1, 1, 1, 1))
    units = dropped.unfold(2, 3, 2).unfold(3, 3, 2)
    var, mean = torch.var_mean(units, dim=(1, 4, 5), correction=0)
    sums = weight.sum((1, 2, 3))[:, None, None]
    z = F.conv2d(x, weight, None, 2, 1, 1, groups)
    expected = (z - mean[:, None] * sums) / (var[:, None] + 1e-5).sqrt() + bias[:, None, None]
    torch.testing.assert_close(kn_conv(x, weight, bias, 2, 1, 1, groups, p=0.3, seed=seed), expected)


def test_a_kernel_of_1_is_layer_norm_over_channels_and_a_plain_convolution() -> None:
    x, weight, bias = offset_input(2, 6, 5, 7), torch.randn(3, 6, 1, 1).double(), torch.randn(3).double()
    normal = F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
    for stride in (1, 2, (3, 1)):
        torch.testing.assert_close(kn_conv(x, weight, bias, stride), F.conv2d(normal, weight, bias, stride))


def test_a_kernel_as_large_as_the_map_is_layer_norm_and_a_linear_map() -> None:
    x, weight = offset_input(2, 6, 3, 4), torch.randn(5, 6, 3, 4, dtype=torch.float64)
    expected = F.linear(F.layer_norm(x, (6, 3, 4)).flatten(1), weight.flatten(1))
    torch.testing.assert_close(kn_conv(x, weight).flatten(1), expected)


def test_scale_and_shift_of_a_sample_change_nothing() -> None:
    x, weight = offset_input(2, 4, 7, 6), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(kn_conv(9 * x, weight, padding=1, eps=0.0), kn_conv(x, weight, padding=1, eps=0.0))
    torch.testing.assert_close(kn_conv(x - 100, weight, eps=0.0), kn_conv(x, weight, eps=0.0))
    assert error(kn_conv(x - 100, weight, padding=1), kn_conv(x, weight, padding=1)) > 0.1
    reflected = {"padding": 1, "padding_mode": "reflect", "eps": 0.0}
    torch.testing.assert_close(kn_conv(x - 100, weight, **reflected), kn_conv(x, weight, **reflected))


def test_a_constant_in_a_filter_counts_under_dropout_alone() -> None:
    x, weight = offset_input(2, 4, 7, 6), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    seed = torch.tensor(5)
    for options in ({}, {"p": 0.3}):
        torch.testing.assert_close(
            kn_conv(x, weight + 5, padding=1, **options), kn_conv(x, weight, padding=1, **options)
        )
    dropped = {"padding": 1, "p": 0.3, "seed": seed}
    assert error(kn_conv(x, weight + 5, **dropped), kn_conv(x, weight, **dropped)) > 0.1


def test_gradients_of_filters_have_mean_0_without_dropout() -> None:
    x, seed = offset_input(2, 4, 7, 6), torch.tensor(5)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    (clean,) = torch.autograd.grad(kn_conv(x, weight, padding=1), weight, g)
    assert clean.abs().max() > 1
    assert clean.mean((1, 2, 3)).abs().max() < 1e-13
    (dropped,) = torch.autograd.grad(kn_conv(x, weight, padding=1, p=0.3, seed=seed), weight, g)
    assert dropped.mean((1, 2, 3)).abs().max() > 1e-3


# Numerics.


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_a_large_mean_costs_no_more_than_its_rounding(offset: float) -> None:
    weight = torch.randn(64, 64, 3, 3)
    x = (torch.randn(2, 64, 12, 12, dtype=torch.float64) + offset).float()
    exact = kn_conv(x.double(), weight.double())
    got = kn_conv(x, weight)
    # Filters are convolved as they are: roundings of partial sums, of which the k-th is as large as offset sqrt(k), and
    # where the processor's convolution adds term by term they are as many as terms.
    rounding = torch.finfo(torch.float32).eps / 2 * (weight[0].numel() / 2) ** 0.5
    assert (got.double() - exact).abs().sum() / exact.abs().sum() < rounding * (1 + offset)
    if offset:  # what this bound refuses: variances as differences of squares
        mean, square = (F.avg_pool2d(t.mean(1, keepdim=True), 3, 1) for t in (x, x.square()))
        var = (square - mean.square()).clamp_min(0)
        z = F.conv2d(x, weight) - mean * weight.sum((1, 2, 3))[:, None, None]
        assert relative(z * (var + 1e-5).rsqrt(), exact) > 0.02


@pytest.mark.parametrize("brightness", [1.0, 255.0])
def test_flat_parts_of_images_keep_their_contrast(brightness: float) -> None:
    x = ((0.8 + 1e-3 * torch.randn(1, 3, 16, 16, dtype=torch.float64)) * brightness).float()
    weight = torch.randn(16, 3, 7, 7)
    assert relative(kn_conv(x, weight, stride=2), kn_conv(x.double(), weight.double(), stride=2)) < 2e-3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ratio", [0, 3, 30])
def test_bfloat16_errs_as_a_plain_convolution_does_whatever_the_mean(ratio: float, groups: int) -> None:
    """Of inputs in bfloat16 and filters in float32, as under autocast, a convolution rounds filters and result.

    We round the filters, what is convolved, and the result: half a rounding more, in the root of the squares.
    """
    x = (torch.randn(2, 64, 20, 20) + ratio).bfloat16()
    weight = torch.randn(64, 64 // groups, 3, 3) + 0.5
    plain = F.conv2d(x, weight.bfloat16(), groups=groups)
    usual = relative(plain, F.conv2d(x.double(), weight.double(), groups=groups))
    assert 1.2e-3 < usual < 2.6e-3
    got = kn_conv(x, weight, groups=groups)
    exact = kn_conv(x.double(), weight.double(), groups=groups)
    assert got.dtype == torch.bfloat16
    assert relative(got, exact) < 1.5**0.5 * 2.3e-3 * 1.05
    if ratio == 30:
        mean, var = x.float().mean(1, keepdim=True), x.float().var(1, keepdim=True)
        mean, var = F.avg_pool2d(mean, 3, 1), F.avg_pool2d(var, 3, 1)
        late = (plain.float() - mean * weight.sum((1, 2, 3))[:, None, None]) * (var + 1e-5).rsqrt()
        assert relative(late.bfloat16(), exact) > 0.1  # what subtracting the mean behind the rounding would err


# Dropout and evaluation.


def test_the_layer_draws_in_training_alone() -> None:
    x = offset_input(2, 4, 7, 6)
    layer = layers.KNConv2d(4, 3, 3, padding=1, p=0.2, eval_stats="clean", dtype=torch.float64)
    assert error(layer(x), layer(x)) > 0.001
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    torch.manual_seed(7)
    torch.testing.assert_close(layer(x), kn_conv(x, layer.weight, layer.bias, padding=1, p=0.2, seed=seed))
    layer.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(layer(x), kn_conv(x, layer.weight, layer.bias, padding=1))
    layer.eval_stats = "expected"
    torch.testing.assert_close(layer(x), kn_conv(x, layer.weight, layer.bias, padding=1, p=0.2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("eval_stats", ["clean", "expected"])
def test_exported_evaluation_draws_nothing(eval_stats: Any) -> None:
    layer = layers.KNConv2d(4, 3, 3, eval_stats=eval_stats).eval()
    program = torch.export.export(layer, (torch.randn(2, 4, 7, 6),)).run_decompositions()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("convolution" in name for name in called)
    assert not [name for name in called if any(word in name for word in ("rand", "dropout", "bernoulli"))]


def test_a_training_step_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    layer, x = layers.KNConv2d(4, 3, 3, p=0.2), torch.randn(2, 4, 7, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), compiled(x)) > 1e-3
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


def test_gradients_of_each_sample() -> None:
    """As differential privacy takes them, each sample under a mask of its own."""
    layer, x = layers.KNConv2d(4, 3, 3, p=0.2), torch.randn(3, 4, 7, 6)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
    assert error(each(layer.weight, x[:1].expand(3, -1, -1, -1))[0], each(layer.weight, x[:1])[0]) > 1e-3
    layer.eval()
    singly = torch.stack([torch.func.grad(loss)(layer.weight, sample) for sample in x])
    torch.testing.assert_close(each(layer.weight, x), singly)
    half = x.bfloat16()  # through the kernel that recomputes
    singly = torch.stack([torch.func.grad(loss)(layer.weight, sample) for sample in half])
    torch.testing.assert_close(each(layer.weight, half), singly, rtol=1e-2, atol=0.5)


def test_gradcheck_with_a_mask_and_groups() -> None:
    x, weight = offset_input(1, 4, 3, 4), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    bias, seed = torch.randn(2, dtype=torch.float64), torch.tensor(5)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kn_conv(x, weight, bias, 1, 1, groups=2, p=0.3, seed=seed)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


# Cost.


class _Largest(TorchDispatchMode):
    """The most elements that any operation within this context has returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (7, 1), (3, 4)])
def test_windows_are_never_written_out(kernel: int, groups: int, p: float) -> None:
    layer = layers.KNConv2d(16, 16, kernel, padding="same", groups=groups, p=p)
    x = torch.randn(2, 16, 28, 28, requires_grad=True)
    with _Largest() as seen:
        layer(x).sum().backward()
    assert seen.elements == x.numel()
    with _Largest() as seen:
        layer.literal()(x).sum().backward()
    assert seen.elements >= kernel**2 * x.numel()


@pytest.mark.parametrize("groups", [1, 8])
def test_half_precision_keeps_the_input_and_the_output(groups: int) -> None:
    layer, x = layers.KNConv2d(16, 8, 3, groups=groups, p=0.2), torch.randn(2, 16, 14, 14).bfloat16().requires_grad_()
    with saved_tensors() as kept:
        layer(x)
    large = [t for t in kept if t.numel() > 2 * 12 * 12 and t is not layer.weight]
    assert sorted((tuple(t.shape), t.dtype) for t in large) == [
        ((2, 8, 12, 12), torch.bfloat16),
        ((2, 16, 14, 14), torch.bfloat16),
    ]


def test_an_output_that_is_overwritten_is_an_error_that_says_so() -> None:
    y = layers.KNConv2d(4, 3, 3)(torch.randn(1, 4, 5, 5)).relu_()
    with pytest.raises(RuntimeError, match=r"overwritten before backward, as nn.ReLU\(inplace=True\) behind it does"):
        y.sum().backward()


@pytest.mark.parametrize(("dims", "groups"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 4), (3, 2)])
@pytest.mark.parametrize("mean", [0, 10, 100, 1000])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_errs_as_the_reference_does(
    dims: int, groups: int, mean: float, p: float, dtype: torch.dtype
) -> None:
    size = (9, 8, 5)[:dims]
    x = (torch.randn(2, 16, *size, dtype=torch.float64) + mean).to(dtype)
    leaves = [x, torch.randn(12, 16 // groups, *[3] * dims).to(dtype), torch.randn(12).to(dtype)]
    residual, g = torch.randn(2, 12, *size).to(dtype), torch.randn(2, 12, *size).to(dtype)
    if dims == 2:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    options = {"p": p, "seed": torch.tensor(5) if p else None, "activation": "relu"}

    def run(choice: str, dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype, copy=True).requires_grad_() for t in (*leaves, residual)]
        with backend(choice):
            y = kn_conv(*given[:3], 1, 1, 1, groups, residual=given[3], **options)
        return [y, *torch.autograd.grad(y, given, g.to(dtype))]

    exact = run("reference", torch.float64)
    for what, got, plain, right in zip(
        ("y", "x", "weight", "bias", "residual"), run("fused", dtype), run("reference", dtype), exact, strict=True
    ):
        # Where y is near 0 either may cut off what the other passes on, so errors are those of the whole.
        fused, reference = ((t.double() - right).norm() / right.norm() for t in (got, plain))
        allowed = 2 * reference + torch.finfo(dtype).eps
        assert fused <= allowed, f"{what}: {fused:.3g}, the reference {reference:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_how_saved_tensors_lie_in_memory(dtype: torch.dtype) -> None:
    """Hooks that keep tensors elsewhere may bring them back contiguous; the dropout must be the same."""
    x = torch.randn(2, 4, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    for groups in (1, 2):
        weight = torch.randn(4, 4 // groups, 3, 3, dtype=dtype, requires_grad=True)
        found = []
        for unpack in (lambda t: t, lambda t: t.contiguous()):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                y = kn_conv(x, weight, None, 1, 1, 1, groups, p=0.3, seed=torch.tensor(1))
            found.append(torch.autograd.grad(y.square().sum(), [x, weight]))
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= 8 * torch.finfo(dtype).eps * one.norm()


def test_a_large_skip_connection_leaves_half_precision_its_gradient() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 12, 12).bfloat16(), (torch.randn(32, 32, 3, 3) / 17).bfloat16()
    residual, g = (1000 * torch.randn(2, 32, 12, 12)).bfloat16(), torch.randn(2, 32, 12, 12).bfloat16()

    def gradient(dtype: torch.dtype, choice: str) -> Tensor:
        given = x.to(dtype, copy=True).requires_grad_()
        with backend(choice):
            y = kn_conv(given, weight.to(dtype), None, 1, 1, activation="relu", residual=residual.to(dtype))
        return torch.autograd.grad(y, given, g.to(dtype))[0].double()

    exact = gradient(torch.float64, "reference")
    fused, plain = ((gradient(torch.bfloat16, c) - exact).norm() for c in ("fused", "reference"))
    assert fused <= 2 * plain


def test_no_gradient_is_computed_that_nobody_asks_for() -> None:
    layer, x = layers.KNConv2d(4, 3, 3, p=0.2), torch.randn(1, 4, 5, 5)
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, of its first use
def test_forward_mode_goes_through_the_formulas() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = torch.autograd.forward_ad.unpack_dual(kn_conv(dual, weight))
    assert y.tangent is not None
    assert y.tangent.abs().max() < 1e-3, "a constant is no change"


def test_layers_that_are_exchanged_in_a_fused_block_are_an_error() -> None:
    model = anybatch.create_model("resnet8", "kn", width=8)
    block: Any = model.get_submodule("layer1.0")
    block.bn2 = nn.GroupNorm(2, 8)
    with pytest.raises(RuntimeError, match="the branch's last convolution adds the skip connection itself"):
        model(torch.randn(1, 3, 16, 16))


def test_the_fused_kernel_keeps_one_activation_where_batch_norm_keeps_two() -> None:
    x = torch.randn(2, 16, 14, 14).requires_grad_()
    layer = layers.KNConv2d(16, 16, 3, padding=1, p=0.2)
    assert layer.take_activation(nn.ReLU())
    with saved_tensors() as kept:
        y = layer(x, torch.randn(2, 16, 14, 14))
    large = {t.data_ptr() for t in kept if t.numel() >= x.numel()}
    assert len(large) == 3, "the input, the output and what was added, each of which is kept anyway by its neighbors"
    assert {x.data_ptr(), y.data_ptr()} < large


def test_activation_and_residual_are_the_ones_behind() -> None:
    x, residual = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 6, 5)
    layer = layers.KNConv2d(4, 3, 3, padding=1).eval()
    plain = layer(x)
    torch.testing.assert_close(layer(x, residual), plain + residual)
    for act in (nn.ReLU(), nn.Identity()):
        assert layer.take_activation(act)
        torch.testing.assert_close(layer(x, residual), act(plain + residual))
        torch.testing.assert_close(layer(x[0], residual[0]), act(plain + residual)[0])
        torch.testing.assert_close(layer.literal()(x), act(plain))
    torch.testing.assert_close(layer(x, residual.double()), plain + residual.double(), rtol=1e-5, atol=1e-6)
    for name, act in (("silu", F.silu), ("gelu", F.gelu)):
        y = kn_conv(x, layer.weight, layer.bias, padding=1, activation=name, residual=residual)
        torch.testing.assert_close(y, act(plain + residual))
    for act in (nn.Mish(), nn.GELU(), nn.SiLU(), nn.PReLU()):
        assert not layer.take_activation(act)
    with pytest.raises(
        ValueError, match=r"residual of shape \(1, 3, 6, 5\) is added to a result of shape \(2, 3, 6, 5\)"
    ):
        layer(x, residual[:1])
    with pytest.raises(ValueError, match="activation='mish' is none of none, relu, silu, gelu"):
        kn_conv(x, layer.weight, activation="mish")


# The layer and the part.


def test_parameters_are_a_convolutions() -> None:
    for dims, (kind, plain) in enumerate(zip(KINDS, PLAIN, strict=True), 1):
        args = (4, 6, (3, 2, 1)[:dims], 2, 1, 1, 2)
        torch.manual_seed(9)
        ours = kind(*args)
        torch.manual_seed(9)
        theirs = plain(*args)
        assert {name: p.shape for name, p in ours.named_parameters()} == {
            name: p.shape for name, p in theirs.named_parameters()
        }
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
        assert not isinstance(ours, PLAIN), "tools for plain convolutions would take it for one"
        assert kind(*args, bias=False).bias is None


def test_single_samples_and_padding_as_stored() -> None:
    layer = layers.KNConv2d(4, 6, 3, padding=((1, 0), (2, 1)), p=0)
    assert layer.padding == ((1, 0), (2, 1))
    assert layers.KNConv2d(4, 6, 3, padding=((1, 1), (2, 2))).padding == (1, 2)
    assert layers.KNConv2d(4, 6, 3, padding="same").padding == "same"
    x = torch.randn(4, 7, 6)
    assert layer(x).shape == (6, 6, 7)
    assert layer(x[None]).shape == (1, 6, 6, 7)


@pytest.mark.parametrize("how", ["auto", "native", "fused", "reference"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_of_the_function(how: str, half: torch.dtype) -> None:
    """The convolution's result came in half precision, which kernels in C took for float32, beyond its end."""
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator) for shape in ((3, 8, 7, 7), (6, 8, 3, 3), (6,))]

    def both_ways() -> list[Tensor]:
        asked = [t.clone().requires_grad_() for t in args]
        y = kn_conv(*asked, padding=1)
        return [y, *torch.autograd.grad(y.square().sum(), asked)]

    with backend(how):
        if how == "native" and explain(kn_conv, *args)["native"] != "runs":
            pytest.skip("no kernels in C")
        alone = both_ways()
        with torch.autocast("cpu", half):
            within = both_ways()
    torch.testing.assert_close(within, alone, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1,), (4,), (), (6, 1)])
@pytest.mark.parametrize("how", ["auto", "reference"])
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...], how: str) -> None:
    with backend(how), pytest.raises(ValueError, match="bias must be one number for each of 8 filters"):
        kn_conv(torch.randn(2, 8, 5, 5), torch.randn(8, 2, 3, 3), torch.randn(shape), groups=4)


def test_no_filters_are_refused() -> None:
    with pytest.raises(ValueError, match="holds no filters"):
        kn_conv(torch.randn(2, 8, 5, 5), torch.randn(0, 8, 3, 3))


def test_autocast_normalizes_what_it_convolves() -> None:
    layer, x = layers.KNConv2d(64, 8, 3, p=0), torch.randn(1, 64, 9, 9) + 30
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, layer(x.bfloat16()), rtol=0, atol=0)
    assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.0}, "p=1.0 is not a probability from 0 to below 1"),
        ({"p": -0.1}, "p=-0.1 is not a probability"),
        ({"eval_stats": "sample"}, "eval_stats='sample' is neither 'clean' nor 'expected'"),
        (
            {"norm_groups": 2},
            "norm_groups=2 does not divide groups=1: a filter reads the channels of one group, all of",
        ),
        ({"groups": 2, "norm_groups": 4}, "norm_groups=4 does not divide groups=2"),
        ({"norm_groups": 0}, "norm_groups=0 does not divide"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
        ({"groups": 3}, "in_channels must be divisible by groups"),
        ({"kernel_size": 1, "groups": 4, "norm_groups": 4}, "leave one value in each window, which normalizing would"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1, got stride=2"),
        ({"padding": ((1, 0),)}, "is not one pair"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror' is none of"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size=.* is not a number of 1 or more, or 2 of them"),
    ],
    ids=str,
)
def test_refusals_of_the_layer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers.KNConv2d(4, 4, **{"kernel_size": 3, **options})


def test_refusals_of_the_input() -> None:
    layer = layers.KNConv2d(4, 4, 3)
    for shape in [(2, 3, 7, 7), (3, 7, 7), (7, 7), (1, 1, 4, 7, 7)]:
        with pytest.raises(
            ValueError, match=r"KNConv2d takes \(N, 4, \*\) or \(4, \*\) with 2 spatial dimensions, got"
        ):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"spans \(3, 3\) positions, more than x of shape \(1, 4, 2, 7\)"):
        layer(torch.zeros(1, 4, 2, 7))


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        ((1, 4, 7), (4, 4, 3, 3), {}, r"x must be \(N, C, \*\) with 2 spatial dimensions as the kernel has"),
        ((1, 4, 7, 7), (4, 4), {}, "weight must have 1 to 3 dimensions of positions"),
        ((1, 4, 7, 7), (4, 3, 3, 3), {}, "takes 3 channels and .*, got x of shape"),
        ((1, 4, 7, 7), (3, 2, 3, 3), {"groups": 2}, "needs filters that the groups divide evenly"),
        ((1, 1, 7, 7), (4, 1, 1, 1), {}, "leave one value in each window of x .* use fewer groups or a larger kernel"),
        ((1, 4, 7, 7), (4, 4, 3, 3), {"p": 1.5}, "p=1.5 is not a probability"),
        ((1, 4, 7, 7), (4, 4, 3, 3), {"seed": torch.ones(1)}, "seed must be one number of int64"),
    ],
    ids=str,
)
def test_refusals_of_the_function(x: Any, weight: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kn_conv(torch.zeros(x), torch.zeros(weight), **options)


def test_part() -> None:
    for name in ("kn(p=0.25,eps=1e-3,eval_stats=expected)", "KernelNorm(p=0.25,eps=1e-3,eval_stats=expected)"):
        layer = Pieces(anybatch.scheme(name)).conv(8, 16, 3, 2)
        assert isinstance(layer, layers.KNConv2d)
        assert (layer.p, layer.eps, layer.eval_stats, layer.padding) == (0.25, 1e-3, "expected", (1, 1))
        assert layer.bias is not None
    assert isinstance(Pieces(anybatch.scheme("kn"), dims=1).conv(8, 16, 3), layers.KNConv1d)
    assert isinstance(Pieces(anybatch.scheme("kn"), dims=3).conv(8, 16, 3), layers.KNConv3d)
    made = anybatch.scheme("kn")
    assert (made.filled, made.batch_independent, made.sources) == (
        ("conv", "final"),
        True,
        ("arXiv:2205.10089",),
    )


def final(scheme: str, channels: int = 8, dims: int = 2) -> tuple[nn.Module, nn.Module]:
    return Pieces(anybatch.scheme(scheme), dims=dims).final_norm_act(channels)


@pytest.mark.parametrize(
    ("scheme", "p"),
    [("kn", 0.25), ("kn(p=0.01)", 0.05), ("kn(p=0.1)", 0.25), ("kn(p=0)", 0.0), ("kn(p=0.1,final_p=0.5)", 0.5)],
)
def test_the_norm_before_the_head_drops_as_released(scheme: str, p: float) -> None:
    norm, act = final(scheme)
    assert isinstance(norm, layers.KernelNorm2d)
    assert (norm.kernel_size, norm.p) == ((1, 1), pytest.approx(p))
    assert isinstance(act, nn.ReLU)
    assert anybatch.scheme(anybatch.scheme(scheme).name).name == scheme
    again = final(anybatch.scheme(scheme).name)[0]
    assert repr(again) == repr(norm)


def test_the_norm_before_the_head_has_the_schemes_options_and_dimensions() -> None:
    norm, _ = final("kn(eps=1e-3,eval_stats=expected,norm_groups=2)")
    assert isinstance(norm, layers.KernelNorm2d)
    assert (norm.eps, norm.eval_stats, norm.norm_groups) == (1e-3, "expected", 2)
    with pytest.raises(ValueError, match="norm_groups=2 does not divide 7 channels"):
        final("kn(norm_groups=2)", 7)
    assert isinstance(final("kn", dims=1)[0], layers.KernelNorm1d)
    assert isinstance(final("kn", dims=3)[0], layers.KernelNorm3d)


def test_another_norm_keeps_its_place_before_the_head() -> None:
    assert isinstance(final("kn+gn(groups=2)")[0], layers.GroupNorm)
    assert [type(m).__name__ for m in final("kn+frn")] == ["FilterResponseNorm2d", "Identity"]
    assert [type(m).__name__ for m in final("none")] == ["Identity", "ReLU"]
    assert anybatch.scheme("gn+kn").name == "kn+gn"


@pytest.mark.parametrize(
    ("name", "options", "where"),
    [
        ("preact_resnet8", {"width": 8}, "final_norm"),
        ("densenet40_12", {"growth": 4}, "features.norm5"),
        ("nf_resnet26", {}, "final_norm"),
        ("resnet8", {"width": 8}, None),
    ],
)
def test_pre_activated_networks_alone_have_a_norm_before_the_head(
    name: str, options: dict[str, int], where: str | None
) -> None:
    with torch.device("meta"):
        model = anybatch.create_model(name, "kn", num_classes=3, **options)
    found = [name for name, m in model.named_modules() if isinstance(m, layers.KernelNorm2d)]
    assert found == ([] if where is None else [where])


def test_networks_start_from_hes_initialization() -> None:
    model = anybatch.create_model("resnet8", "kn", width=32, num_classes=5)
    convs = convs_of(model)
    assert len(convs) == 9
    for conv in convs:
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)
        assert conv.bias is not None
        most = conv.weight[0].numel() ** -0.5
        assert 0.5 * most < conv.bias.abs().max() < most, "as torch draws it, so that flat backgrounds do not stay flat"


def test_published_networks_keep_the_published_eps() -> None:
    with torch.device("meta"):
        for name in ("resnet8", "preact_resnet18"):
            assert {m.eps for m in convs_of(anybatch.create_model(name, "kn"))} == {0.1}
        for name in ("knresnet18", "knresnet34_seg", "knresnet13", "resnet8_kn", "knvgg11", "kndensenet121"):
            assert {m.eps for m in convs_of(anybatch.create_model(name))} == {1e-5}


def convs_of(model: nn.Module) -> list[layers.KNConv2d]:
    found = [m for m in model.modules() if isinstance(m, layers.KNConv2d)]
    assert found
    return found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kn(p=1)", "p=1 is not a probability"),
        ("kn(final_p=1)", "final_p=1 is not a probability"),
        ("kn(p=much)", "p='much' is not a probability"),
        ("kn(eps=-1)", "eps=-1 is not a number from 0"),
        ("kn(eval_stats=sample)", "eval_stats='sample' is neither"),
        ("kn(norm_groups=0)", "norm_groups must be a whole number of 1 or more, got 0"),
    ],
)
def test_refusals_of_the_part(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anybatch.scheme(spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", *(kernel.backend for kernel in kn_conv.kernels)])
@pytest.mark.parametrize("groups", [1, 2])
def test_filters_that_are_centered_need_not_be_centered_again(name: str, dtype: torch.dtype, groups: int) -> None:
    x, weight = torch.randn(2, 4, 7, 6, dtype=dtype) + 3, torch.randn(6, 4 // groups, 3, 3)
    weight -= weight.mean((1, 2, 3), keepdim=True)
    x.requires_grad_()
    geometry = (1, 1, 1, groups)
    if name != "reference" and explain(kn_conv, x, weight, None, *geometry, centered=True)[name] not in (
        "runs",
        "could run",
    ):
        pytest.skip(f"{name} does not run here")
    seed = torch.tensor(5)
    with backend(name):
        for how in ({}, {"p": 0.2, "seed": seed, "activation": "relu"}):
            wanted, got = (kn_conv(x, weight, None, *geometry, centered=centered, **how) for centered in (False, True))
            assert_error_within(got, wanted, 2e-2 if dtype == torch.bfloat16 else 1e-5)
            g = (wanted > 0).to(dtype)
            slopes = [torch.autograd.grad(y, x, g, create_graph=True)[0] for y in (wanted, got)]
            assert_error_within(slopes[1], slopes[0], 4e-2 if dtype == torch.bfloat16 else 1e-5)
            bent = [torch.autograd.grad(slope.square().sum(), x)[0] for slope in slopes]
            assert_error_within(
                bent[1], bent[0], (4e-2 if dtype == torch.bfloat16 else 1e-4) * bent[0].abs().max().item()
            )
