"""What Opacus' own engine finds in networks that were prepared for it is each sample's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch import create_model
from anybatch.layers import KNConv1d, KNConv2d, KNConv3d
from anybatch.methods.kernel_norm import dropout_mask
from anybatch.models.blocks import StochasticDepth
from anybatch.per_sample import prepare_for_opacus
from anybatch.step import training_loss
from helpers import assert_error_within, assert_same_gradients
from test_private import NETWORKS, batch, network

opacus = pytest.importorskip("opacus", reason="opacus is not installed")

# Opacus' first layer takes images, whose gradient nobody asks for.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def wrapped(model: nn.Module, **options: Any) -> nn.Module:
    return opacus.GradSampleModule(prepare_for_opacus(model), **options)


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_have_the_gradients_of_each_sample_alone(case: str) -> None:
    model = network(case).train()
    x, y = batch(2, 32 if case == "nf" else 16)
    named = dict(model.named_parameters())
    alone = [
        torch.autograd.grad(training_loss(model, x[i : i + 1], y[i : i + 1]), list(named.values()))
        for i in range(len(y))
    ]
    training_loss(wrapped(model), x, y).backward()
    for i, gradients in enumerate(alone):
        got = {name: p.grad_sample[i] for name, p in named.items()}  # pyright: ignore[reportAttributeAccessIssue]
        assert_same_gradients(got, dict(zip(named, gradients, strict=True)), relative=1e-9)


def test_what_is_drawn_is_differentiated_as_it_was_drawn() -> None:
    torch.manual_seed(0)
    model = create_model("knresnet13", scheme="kn(p=0.2,final_p=0.5)", num_classes=10, width=8).double().train()
    x, y = batch(3)
    torch.manual_seed(3)
    expected = training_loss(model, x, y)
    whole = torch.autograd.grad(expected, list(model.parameters()))
    ready = wrapped(model)
    for _ in range(2):  # nothing is left over from the first time
        torch.manual_seed(3)
        loss = training_loss(ready, x, y)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        loss.backward()
        for p, g in zip(model.parameters(), whole, strict=True):
            # Opacus multiplies by the number of samples what the mean over them divided.
            assert_error_within(p.grad_sample.mean(0), g, 1e-9 * g.abs().max().item())  # pyright: ignore[reportAttributeAccessIssue]
            p.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
    assert all(not m.drawn_seeds for m in model.modules() if isinstance(m, KNConv2d))  # pyright: ignore[reportArgumentType]


LAYERS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "1d": (KNConv1d, (9,), {"kernel_size": 3, "padding": 1}),
    "2d": (KNConv2d, (6, 5), {"kernel_size": 3, "padding": 1}),
    "3d": (KNConv3d, (4, 5, 3), {"kernel_size": 2}),
    "strided, uneven": (KNConv2d, (7, 6), {"kernel_size": (3, 2), "stride": (2, 1), "padding": ((1, 0), (0, 1))}),
    "dilated, reflected": (
        KNConv2d,
        (7, 6),
        {"kernel_size": 2, "dilation": 2, "padding": 1, "padding_mode": "reflect"},
    ),
    "same": (KNConv2d, (6, 5), {"kernel_size": 2, "padding": "same"}),
    "groups": (KNConv2d, (5, 5), {"kernel_size": 3, "groups": 2}),
    "groups normalized apart": (KNConv2d, (5, 5), {"kernel_size": 3, "groups": 4, "norm_groups": 2}),
    "no bias": (KNConv2d, (5, 5), {"kernel_size": 3, "bias": False}),
    "1 x 1": (KNConv2d, (5, 5), {"kernel_size": 1}),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_the_rule_of_kn_conv(case: str, act: bool, p: float) -> None:
    kind, size, options = LAYERS[case]
    torch.manual_seed(0)
    layer = kind(4, 8, p=p, dtype=torch.float64, **options).train()
    if act:
        layer.take_activation(nn.ReLU())
    x = torch.randn(3, 4, *size, dtype=torch.float64) + 1
    torch.manual_seed(7)
    y = layer(x)
    skip = torch.randn_like(y)
    gradient = torch.randn_like(y)
    torch.manual_seed(7)
    y = layer(x, skip)
    parameters = list(layer.parameters())
    # One graph of the whole batch, whose mask all samples share out; each sample's part of the result by itself.
    alone = [torch.autograd.grad((y[i] * gradient[i]).sum(), parameters, retain_graph=True) for i in range(len(x))]
    ready = wrapped(layer, loss_reduction="sum")
    torch.manual_seed(7)
    (ready(x, skip) * gradient).sum().backward()
    for k, parameter in enumerate(parameters):
        for i in range(len(x)):
            want = alone[i][k]
            assert_error_within(parameter.grad_sample[i], want, 1e-10 * want.abs().max().item())  # pyright: ignore[reportAttributeAccessIssue]


def test_a_layer_that_did_not_remember_its_seed_is_named() -> None:
    prepare_for_opacus(nn.Sequential())
    ready = opacus.GradSampleModule(KNConv2d(3, 4, 3, p=0.1))
    with pytest.raises(ValueError, match=r"call anybatch\.per_sample\.prepare_for_opacus\(model\) before"):
        ready(torch.randn(2, 3, 5, 5)).sum().backward()


def test_seeds_are_remembered_only_for_gradients() -> None:
    layer: Any = prepare_for_opacus(KNConv2d(3, 4, 3, p=0.1))
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert layer.drawn_seeds == []
    torch.manual_seed(1)
    given = layer.train()(x)
    assert len(layer.drawn_seeds) == 1
    mask = dropout_mask(x, 0.1, layer.drawn_seeds[0])
    plain = KNConv2d(3, 4, 3, p=0.1)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    assert torch.equal(plain(x), given)
    assert not mask.all()


def test_nothing_stays_in_place_and_preparing_twice_is_once() -> None:
    model = create_model("resnet8", scheme="gn:auto", num_classes=3, width=8)
    assert any(getattr(m, "inplace", False) for m in model.modules())
    assert prepare_for_opacus(prepare_for_opacus(model)) is model
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    kn = KNConv2d(3, 4, 3, p=0.1)
    prepare_for_opacus(prepare_for_opacus(kn))(torch.randn(1, 3, 4, 4))
    assert len(kn.drawn_seeds) == 1  # pyright: ignore[reportArgumentType]


def test_a_join_that_drops_branches_is_refused() -> None:
    model = network("sws+skipinit").train()
    for module in model.modules():
        if hasattr(module, "drop") and hasattr(module, "combine"):
            module.drop = StochasticDepth(0.5)
    with pytest.raises(ValueError, match="build the network with drop_path_rate=0"):
        training_loss(wrapped(model), *batch(2)).backward()


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning", "ignore:Optimal order:UserWarning")
def test_the_engine_trains_a_network_of_ours() -> None:
    torch.manual_seed(0)
    model = prepare_for_opacus(create_model("knresnet13", num_classes=2, width=8, in_chans=1))
    x = torch.randn(32, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    engine = opacus.PrivacyEngine(accountant="rdp")
    ready, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before: list[Tensor] = [p.detach().clone() for p in model.parameters()]
    for x_part, y_part in loader:
        optimizer.zero_grad()
        F.cross_entropy(ready(x_part), y_part).backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert engine.get_epsilon(1e-3) > 0
