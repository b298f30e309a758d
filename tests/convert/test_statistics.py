"""Freezing that a change of mode does not undo, and population statistics against those of all data in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import anybatch
from anybatch.convert import freeze_batchnorm, precise_batchnorm, unfreeze_batchnorm
from anybatch.layers import BatchRenorm2d, FrozenBatchNorm, SyncBatchNorm

KINDS = [
    (nn.BatchNorm1d, (4, 6, 7)),
    (nn.BatchNorm2d, (4, 6, 5, 7)),
    (nn.BatchNorm3d, (4, 6, 2, 3, 3)),
    (nn.SyncBatchNorm, (4, 6, 5, 7)),
    (SyncBatchNorm, (4, 6, 5, 7)),
    (BatchRenorm2d, (4, 6, 5, 7)),
    (BatchNormAct2d, (4, 6, 5, 7)),
]


def trained(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A network with one layer whose statistics are neither its first ones nor those of its next batch."""
    layer = kind(6)
    for t in (*layer.parameters(), layer.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return nn.Sequential(layer, nn.Dropout(0.5))


# Freezing


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_a_frozen_layer_stays_in_evaluation(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, x = trained(kind), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model[0]).eval()(x)
    assert freeze_batchnorm(model) == ["0"]
    model.train()
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert isinstance(model[0], kind)
    torch.testing.assert_close(model[0](x), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert list(model.state_dict()) == list(before)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_frozen_too_and_thaws(kind: type[nn.Module], shape: tuple[int, ...], duplicate) -> None:
    model, x = trained(kind), torch.randn(shape)
    freeze_batchnorm(model)
    again = duplicate(model).train()
    torch.testing.assert_close(again[0](x), model[0](x), rtol=0, atol=0)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert unfreeze_batchnorm(again) == ["0"]
    assert type(again[0]) is kind
    assert again[0].training
    assert again.train()[0](x).isfinite().all()
    assert not torch.equal(again[0].running_mean, model[0].running_mean)
    assert not model[0].training


def test_gradients_stop_at_frozen_parameters_and_pass_to_what_lies_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *trained())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert freeze_batchnorm(model) == ["1"]
    assert model[1].weight.grad is None, "an optimizer would go on with the gradient of before"
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None


def test_unfreezing_restores_which_parameters_asked_for_gradients() -> None:
    model = trained()
    model[0].bias.requires_grad_(False)
    freeze_batchnorm(model)
    assert freeze_batchnorm(model) == []
    unfreeze_batchnorm(model)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)
    assert unfreeze_batchnorm(model) == []
    freeze_batchnorm(model.eval())
    unfreeze_batchnorm(model)
    assert not model[0].training


def test_what_lies_in_a_layer_with_activation_goes_on() -> None:
    layer = BatchNormAct2d(6, act_layer=nn.PReLU, drop_layer=nn.Dropout)
    model = nn.Sequential(layer)
    freeze_batchnorm(model)
    model.train()
    assert (layer.training, layer.drop.training) == (False, True)
    assert [p.requires_grad for p in layer.act.parameters()] == [True]


def test_every_batch_norm_of_a_network_freezes_and_nothing_else() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    expected = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert freeze_batchnorm(model) == expected
    assert len(expected) == 20
    assert model.train().conv1.weight.requires_grad
    for scheme in ("gn", "frozenbn"):
        assert freeze_batchnorm(anybatch.create_model("resnet8", scheme, num_classes=3, width=32)) == []


def test_a_layer_without_averages_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"layer '1' keeps no running averages \(track_running_stats=False\)"):
        freeze_batchnorm(model)
    assert model.train()[0].training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_frozen_network_compiles() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), *trained()[:1]), torch.randn(2, 3, 8, 8)
    freeze_batchnorm(model)
    model.train()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


# Population statistics


def batches_of(sizes: list[int], channels: int = 6, mean: float = 3.0) -> list[Tensor]:
    """Images that differ in mean and contrast, as those of a data set do."""
    generator = torch.Generator().manual_seed(1)
    n = sum(sizes)
    x = torch.randn(n, channels, 5, 7, generator=generator, dtype=torch.float64)
    own = torch.randn(2, n, channels, 1, 1, generator=generator, dtype=torch.float64)
    return list((x * own[0].exp() + 2 * own[1] + mean).split(sizes))


@pytest.mark.parametrize("sizes", [[20], [5, 5, 5, 5], [1] * 20, [7, 1, 9, 3]], ids=str)
@pytest.mark.parametrize(("kind", "dims"), [(nn.BatchNorm2d, 2), (SyncBatchNorm, 2), (BatchNormAct2d, 2)])
def test_the_pooled_estimate_is_that_of_all_values(sizes: list[int], kind: type[nn.Module], dims: int) -> None:
    model, batches = trained(kind).double(), batches_of(sizes)
    assert precise_batchnorm(model, batches) == ["0"]
    var, mean = torch.var_mean(torch.cat(batches), (0, 2, 3), correction=0)
    torch.testing.assert_close(model[0].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, var, rtol=1e-12, atol=0)


def test_the_pooled_estimate_keeps_its_digits_at_a_mean_of_1000_in_float32() -> None:
    model, batches = nn.Sequential(nn.BatchNorm2d(6)), [x.float() for x in batches_of([4] * 5, mean=1000)]
    precise_batchnorm(model, batches)
    exact = torch.cat(batches).double().var((0, 2, 3), correction=0)
    # A batch's mean is rounded by 1000 * 6e-8, against deviations of about 2; a difference of squares would lose 1e-2.
    torch.testing.assert_close(model[0].running_var.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [7, 1, 9, 3]], ids=str)
def test_the_mean_estimate_is_torchs_plain_average_and_the_papers(sizes: list[int]) -> None:
    model, other, batches = trained().double(), nn.BatchNorm2d(6, momentum=None).double(), batches_of(sizes)
    precise_batchnorm(model, batches, estimator="mean")
    for x in batches:
        other(x)
    torch.testing.assert_close(model[0].running_mean, other.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, other.running_var, rtol=1e-12, atol=0)
    m = [35 * n for n in sizes]
    paper = sum(x.var((0, 2, 3), correction=0) * k / (k - 1) for x, k in zip(batches, m, strict=True)) / len(m)
    torch.testing.assert_close(model[0].running_var, paper)


def test_with_one_image_a_batch_the_papers_estimate_misses_what_lies_between_images() -> None:
    # Images whose means vary by 1 and whose pixels vary around them by 1/4: together 1.25.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, 1, 1, 1, generator=generator) + 0.5 * torch.randn(400, 1, 16, 16, generator=generator)
    found = {}
    for estimator in ("mean", "pooled"):
        model = nn.Sequential(nn.BatchNorm2d(1))
        precise_batchnorm(model, images.split(1), batches=None, estimator=estimator)
        found[estimator] = model[0].running_var.item()
    assert abs(found["mean"] - 0.25) < 0.01
    # 400 means estimate a variance of 1 with a deviation of sqrt(2 / 400) = 0.07.
    assert abs(found["pooled"] - 1.25) < 0.2
    assert abs(found["pooled"] - images.var(correction=0).item()) < 1e-5


def test_a_deep_layer_gets_statistics_behind_layers_that_normalize_by_their_batch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).double()
    batches = batches_of([6, 4])
    precise_batchnorm(model, batches)
    behind = [model[2](F.relu(F.batch_norm(x, None, None, training=True))) for x in batches]
    z = torch.cat([h.transpose(0, 1).flatten(1) for h in behind], 1)
    torch.testing.assert_close(model[3].running_mean, z.mean(1))
    torch.testing.assert_close(model[3].running_var, z.var(1, correction=0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        BatchNormAct2d(4, drop_layer=nn.Dropout),
    ).double()


@pytest.mark.parametrize("training", [True, False])
def test_all_else_is_left_as_it_was(training: bool) -> None:
    model = network().train(training)
    model[4].eval()
    model[5].drop.train(not training)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    assert precise_batchnorm(model, batches_of([3, 3])) == ["1", "5"]
    assert torch.equal(torch.get_rng_state(), state), "dropout was not in evaluation"
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[1].track_running_stats) == (0.3, True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{n}.running_{what}" for n in (1, 5) for what in ("mean", "var")}
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_layers_are_left_as_they_are() -> None:
    model = network().train()
    freeze_batchnorm(model[:2])
    assert precise_batchnorm(model, batches_of([3, 3])) == ["5"]
    model = network().train()
    model[1].eval()
    assert precise_batchnorm(model, batches_of([3, 3])) == ["5"]
    assert precise_batchnorm(model.eval(), batches_of([3, 3])) == ["1", "5"]
    freeze_batchnorm(model)
    for frozen in (model, nn.Sequential(FrozenBatchNorm(6))):
        with pytest.raises(
            ValueError, match="the model has no BatchNorm whose statistics could be set: it has none, or"
        ):
            precise_batchnorm(frozen, batches_of([3, 3]))


def test_a_layer_called_twice_counts_both_and_one_not_called_is_left() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.idle = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(2 * x)

    model, batches = Twice().double(), batches_of([3, 4])
    assert precise_batchnorm(model, batches) == ["norm"]
    x = torch.cat(batches)
    torch.testing.assert_close(model.norm.running_mean, torch.cat([x, 2 * x]).mean((0, 2, 3)))
    assert not model.idle.running_mean.any()


@pytest.mark.parametrize("scheme", ["brn", "syncbn", "bcn(groups=4,statistics=batch)"])
def test_schemes_with_statistics_of_the_batch_take_part(scheme: str) -> None:
    model = anybatch.create_model("resnet8", scheme, num_classes=3, width=32).double()
    found = precise_batchnorm(model, [torch.randn(2, 3, 16, 16, dtype=torch.float64) for _ in range(2)])
    assert len(found) >= 9
    assert all(model.get_submodule(name).running_mean.any() for name in found)


def test_estimates_of_batch_channel_norm_do_not() -> None:
    model = anybatch.create_model("resnet8", "bcn", num_classes=3, width=32)
    with pytest.raises(ValueError, match="the model has no BatchNorm whose statistics could be set"):
        precise_batchnorm(model, [torch.randn(2, 3, 16, 16)])


def test_a_compiled_model_takes_part() -> None:
    model, batches = network(), batches_of([3, 4])
    precise_batchnorm(torch.compile(model, backend="eager"), batches)
    other = network()
    precise_batchnorm(other, batches)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_names_are_those_of_the_model_inside_data_parallelism_and_compilation() -> None:
    model, batches = network(), batches_of([3])
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))  # pyright: ignore[reportArgumentType]
    assert precise_batchnorm(wrapped, batches) == precise_batchnorm(model, batches)


def test_loaders_and_how_much_of_them() -> None:
    batches, told = batches_of([2] * 6), []
    labelled = [(x, torch.zeros(len(x))) for x in batches]

    def endless() -> Iterator[Tensor]:
        while True:
            yield from batches

    found = []
    for loader, most in ((batches, 4), (labelled, 4), ([list(pair) for pair in labelled], 4), (endless(), 4)):
        model = trained().double()
        precise_batchnorm(model, loader, batches=most, tell=told.append)
        found.append(model[0].running_var)
    assert told == [1, 2, 3, 4] * 4
    for var in found:
        torch.testing.assert_close(var, torch.cat(batches[:4]).var((0, 2, 3), correction=0))
    model = trained().double()
    precise_batchnorm(model, batches, batches=None)
    torch.testing.assert_close(model[0].running_var, torch.cat(batches).var((0, 2, 3), correction=0))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "the loader is empty"),
        ([{"image": 1}], {}, r"the loader gave a dict, whose input would be a dict; give tensors or \(x, y\) pairs"),
        ([({"image": 1}, 2)], {}, "the loader gave a tuple, whose input would be a dict"),
        ([()], {}, "the loader gave a tuple, whose input would be a tuple"),
        ([torch.zeros(1, 6, 1, 1)], {}, r"layer '0' got one value in each channel, x of shape \(1, 6, 1, 1\)"),
        ([torch.zeros(0, 6, 3, 3)], {}, r"layer '0' got no value in each channel, x of shape \(0, 6, 3, 3\)"),
        ([torch.full((2, 6, 3, 3), float("nan"))], {}, "layer '0' got values that are not finite"),
        (None, {"batches": 0}, "batches=0 is not 1 or more; None takes all"),
        (None, {"batches": 1.5}, r"batches=1\.5 is not 1 or more; None takes all"),
        (None, {"estimator": "median"}, "estimator='median' is neither 'pooled' nor 'mean'"),
    ],
)
def test_refusals_set_nothing(loader, options: dict[str, object], message: str) -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    first = [x.float() for x in batches_of([3])] if loader and isinstance(loader[0], Tensor) else []
    with pytest.raises(ValueError, match=message):
        precise_batchnorm(model.eval(), [*first, *(loader or [])], **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m.training for m in model.modules())
    assert model[0].track_running_stats
    assert not model[0]._forward_pre_hooks


def test_a_model_that_calls_no_layer_is_told() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"the model called none of its BatchNorm layers \(norm\)"):
        precise_batchnorm(Idle(), [torch.zeros(2, 6, 3, 3)])


def test_convert_is_public_and_loads_on_use() -> None:
    assert anybatch.convert.precise_batchnorm is precise_batchnorm
