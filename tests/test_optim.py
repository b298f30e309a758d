"""Groups, optimizers, and the course of the learning rate at hand-worked points."""

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn

import anybatch
from anybatch.methods.normalizer_free import NormalizerFreeJoin
from anybatch.optim import lr_factor, make_optimizer, param_groups
from anybatch.recipe import Recipe, Schedule


@pytest.mark.parametrize("weight_decay", [-1, float("nan"), None])
def test_a_weight_decay_that_torch_would_not_check_in_groups_is_refused(weight_decay: float) -> None:
    with pytest.raises(ValueError, match=f"weight_decay={weight_decay} is not a number from 0 to below inf"):
        param_groups(torch.nn.Linear(2, 2), weight_decay)


def test_only_weights_decay():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, plain = param_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [4, 2]
    assert [p.dim() for p in plain["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert param_groups(model, 0.1, decay_all=True)[1]["weight_decay"] == 0.1


def test_gains_of_any_shape_norms_and_single_numbers_do_not_decay():
    model = nn.ModuleDict(
        {
            "conv": ScaledStdConv2d(4, 8, 3),
            "norm": nn.LayerNorm((3, 4)),
            "join": NormalizerFreeJoin(0.2, 1.0),
            "one_output": nn.Linear(8, 1),
            "depthwise": nn.Conv1d(1, 1, 3),
            "up": nn.ConvTranspose2d(4, 8, 3),
            "embedding": nn.Embedding(5, 1),
        }
    )
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in param_groups(model, 0.1))
    assert decayed == {f"{layer}.weight" for layer in ("conv", "one_output", "depthwise", "up", "embedding")}
    assert plain == set(names.values()) - decayed
    assert {"conv.gain", "norm.weight", "join.gain", "one_output.bias"} <= plain
    assert model["conv"].gain.dim() == 4


@pytest.mark.parametrize("scheme", ["nf", "fixup", "skipinit", "bn"])
def test_the_filters_of_a_network_decay_and_nothing_else(scheme):
    model = anybatch.create_model("resnet20", scheme, num_classes=3)
    decayed, plain = param_groups(model, 0.1)
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in filters}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_frozen_and_shared_parameters_are_no_duplicates():
    layer = nn.Linear(2, 2, bias=False)
    frozen = nn.Linear(2, 2)
    frozen.requires_grad_(False)
    (group,) = param_groups(nn.Sequential(layer, layer, frozen), 0.1)
    assert len(group["params"]) == 1


def test_cosine_by_hand():
    schedule = Schedule(epochs=4, warmup=1)
    factors = [lr_factor(schedule, step, 3) for step in range(13)]
    assert factors[:3] == [0.25, 0.5, 0.75]
    assert factors[3] == 1.0
    assert factors[7] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 4 / 9)).item()))
    assert factors[12] == 0.0


def test_constant_stays():
    assert {lr_factor(Schedule(name="constant", epochs=2, warmup=0), step, 5) for step in range(10)} == {1.0}


def test_a_warm_up_longer_than_the_run_is_cut():
    assert lr_factor(Schedule(epochs=1, warmup=9), 9, 10) == 1.0


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(name, kind):
    recipe = Recipe().replace({"optim.name": name, "optim.lr": 0.4, "data.batch_size": 8})
    optimizer = make_optimizer(nn.Linear(2, 2), recipe)
    assert isinstance(optimizer, kind)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
