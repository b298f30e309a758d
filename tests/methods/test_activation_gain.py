"""What is special about gains: values by hand and by closed form, kinks and jumps anywhere, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.functional import activation_gain
from anybatch.layers import ScaledActivation
from anybatch.methods.activation_gain import NONLINEARITIES, RELEASED
from helpers import saved_tensors

# By dense quadrature elsewhere, to ten digits.
EXACT = {
    "identity": 1.0,
    "relu": 1.7128585504,
    "gelu": 1.7009262434,
    "gelu_tanh": 1.7009165617,
    "leaky_relu": 1.7048316272,
    "relu6": 1.7128585550,
    "celu": 1.2708434179,
    "elu": 1.2708434179,
    "selu": 1.0,
    "sigmoid": 4.8013133716,
    "silu": 1.7871872221,
    "soft_sign": 2.3375333632,
    "softplus": 1.9191259801,
    "log_sigmoid": 1.9191259801,
    "tanh": 1.5925374198,
    "mish": 1.5920253811,
    "hardswish": 1.8138714738,
    "hardsigmoid": 6.0150344857,
    "quick-gelu": 1.7093585899,
    "erf": 1.4671669505,
    "sin": 1.5208666232,
    "relu_squared": 0.8944271910,
}


def density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def above(t: float) -> float:
    """The probability that z > t."""
    return 0.5 * math.erfc(t / math.sqrt(2))


@pytest.mark.parametrize("name", EXACT)
def test_the_table(name: str) -> None:
    assert activation_gain(name) == pytest.approx(EXACT[name], rel=0, abs=1e-9)


def test_closed_forms() -> None:
    assert activation_gain("relu") == pytest.approx((2 / (1 - 1 / math.pi)) ** 0.5, rel=1e-13)
    # The variance of z clamped to [-3, 3], by parts, over 36.
    clamped = 1 - 2 * above(3) - 6 * density(3) + 18 * above(3)
    assert activation_gain("hardsigmoid") == pytest.approx((clamped / 36) ** -0.5, rel=1e-12)
    # E[z^4] = 3 over the positive half, less the squared mean: 3/2 - 1/4.
    assert activation_gain("relu_squared") == pytest.approx(1.25**-0.5, rel=1e-13)
    assert activation_gain("sin") == pytest.approx((0.5 - 0.5 * math.exp(-2)) ** -0.5, rel=1e-13)
    # The mean of erf(z)^2 is (2 / pi) asin(2 / 3).
    assert activation_gain("erf") == pytest.approx((2 / math.pi * math.asin(2 / 3)) ** -0.5, rel=1e-13)
    mean, square = math.exp(0.5), math.exp(2)
    assert activation_gain(torch.exp) == pytest.approx((square - mean**2) ** -0.5, rel=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.2505, 0.25 - 1e-7, 1 / 3, -1.7, 3.0001])
def test_jumps_and_kinks_anywhere(t: float) -> None:
    jump = activation_gain(lambda z: (z > t).double())
    assert jump == pytest.approx((above(t) * (1 - above(t))) ** -0.5, rel=1e-9)
    mean = density(t) - t * above(t)
    square = (1 + t * t) * above(t) - t * density(t)
    assert activation_gain(lambda z: F.relu(z - t)) == pytest.approx((square - mean**2) ** -0.5, rel=1e-9)


def test_scale_and_shift_of_the_output() -> None:
    assert activation_gain(lambda z: 1e-30 * F.silu(z)) == pytest.approx(1e30 * activation_gain("silu"), rel=1e-12)
    assert activation_gain(lambda z: F.silu(z) + 1e6) == pytest.approx(activation_gain("silu"), rel=1e-9)


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_gains_give_unit_variance_to_many_normal_numbers(name: str) -> None:
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    y = activation_gain(name) * NONLINEARITIES[name]()(z).detach().double()
    spread = ((y - y.mean()).square().var() / len(y)).sqrt().item()  # of the variance's estimate
    assert abs(y.var().item() - 1) < 5 * spread


def test_names_modules_and_functions_agree() -> None:
    assert activation_gain("SiLU") == activation_gain("swish") == activation_gain(nn.SiLU()) == activation_gain(F.silu)
    assert activation_gain(nn.LeakyReLU(0.2)) == pytest.approx((0.52 - 0.32 / math.pi) ** -0.5, rel=1e-12)
    slope = nn.PReLU(init=0.2)
    assert activation_gain(slope) == pytest.approx(activation_gain(nn.LeakyReLU(0.2)), rel=1e-7)  # held in float32
    assert slope.weight.dtype == torch.float32
    assert activation_gain(nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True))) == activation_gain("relu")


def test_released_constants_are_near_the_exact_gains() -> None:
    assert activation_gain("relu", released=True) == 1.7139588594436646
    assert activation_gain("Swish", released=True) == 1.7881293296813965
    for name in RELEASED.keys() - {"glu", "log_softmax"}:
        assert RELEASED[name] == pytest.approx(activation_gain(name), rel=1e-3), name


def test_released_constants_are_timms() -> None:
    from timm.models.nfnet import _nonlin_gamma

    # timm calls them relu, silu, softsign...; its own names for what it lacks of torch's are of no matter here.
    spelled = {name.replace("_", ""): value for name, value in _nonlin_gamma.items()}
    common = {name: value for name, value in RELEASED.items() if name.replace("_", "") in spelled}
    assert len(common) >= 15
    assert {name: spelled[name.replace("_", "")] for name in common} == common


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("reluu", "unknown nonlinearity 'reluu'; did you mean relu"),
        ("glu", r"act='glu' does not act on each element alone.*released=True"),
        ("log_softmax", r"act='log_softmax' does not act on each element alone.*released=True"),
        (nn.Softmax(dim=1), r"act=Softmax\(dim=1\) does not act on each element alone"),
        (nn.GLU(dim=1), r"act=GLU\(dim=1\) does not"),
        (nn.PReLU(6), r"act=PReLU\(num_parameters=6\) does not"),
        (lambda z: z.mean(), r"turns \(2, 6, 4, 4\) into \(\)"),
        (lambda z: z - z.mean(), "does not act on each element alone"),
        (torch.randn_like, "or is random"),
        (lambda z: z.float(), r"turns float64 into torch\.float32"),
        (lambda z: (1e7 * z).sin(), "too rough"),
        (lambda z: 0 * z + 3.7, "is constant, so that no gain"),
        (torch.zeros_like, "is constant, so that no gain"),
        (torch.log, "is not finite at -"),
        (lambda z: (z * z / 4).exp(), "no finite variance"),
    ],
)
def test_refusals(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activation_gain(act)


def test_released_refusals() -> None:
    with pytest.raises(ValueError, match=r"unknown nonlinearity 'mish'.* Known: celu"):
        activation_gain("mish", released=True)
    with pytest.raises(ValueError, match=r"the released constants go by name, got act=ReLU\(\)"):
        activation_gain(nn.ReLU(), released=True)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "prelu", "identity"])
def test_the_layer_multiplies_by_the_gain_and_leaves_its_input(name: str) -> None:
    x = torch.randn(4, 3, 5, 5)
    kept = x.clone()
    y = ScaledActivation(name)(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    torch.testing.assert_close(y, activation_gain(name) * NONLINEARITIES[name]()(x), rtol=0, atol=0)


def test_a_module_that_works_in_place_is_set_not_to() -> None:
    for module in (nn.ReLU(inplace=True), nn.SiLU(inplace=True)):
        layer, x = ScaledActivation(module), torch.randn(9)
        kept = x.clone()
        layer(x)
        torch.testing.assert_close(x, kept, rtol=0, atol=0)
        assert module.inplace
        assert not layer.act.inplace


def test_behind_relu_one_tensor_is_kept_for_it_and_the_next_layer() -> None:
    conv, act = nn.Conv2d(3, 3, 1), ScaledActivation("relu")
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with saved_tensors() as kept:
        conv(act(x * 1.0))
    maps = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert len(maps) == 1


def test_released_gain_given_gain_and_functions_in_the_layer() -> None:
    assert ScaledActivation("gelu", released=True).gain == 1.7015043497085571
    glu = ScaledActivation(nn.GLU(1), gain=activation_gain("glu", released=True))
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(glu(x), 1.8484294414520264 * F.glu(x, 1))
    assert repr(ScaledActivation(torch.erf, gain=2.0)) == "ScaledActivation(act=erf, gain=2.0)"


def test_gradients() -> None:
    for act in ("relu", "silu", lambda z: z.tanh()):
        layer = ScaledActivation(act)
        x: Tensor = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
        assert torch.autograd.gradgradcheck(layer, (x,))


def test_gains_are_computed_on_the_cpu_wherever_a_network_is_built() -> None:
    with torch.device("meta"):
        assert activation_gain(torch.tanh) == activation_gain("tanh")
