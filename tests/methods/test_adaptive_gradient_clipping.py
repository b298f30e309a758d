"""Adaptive gradient clipping: against a slow loop and timm, by module type, in optimizers, scaled, sharded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

import anybatch
from anybatch.methods.adaptive_gradient_clipping import Clipped
from anybatch.optim import AGC, adaptive_clip_grad_, attach_agc
from helpers import gradients, run_two_ranks


class Everything(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3, groups=2)
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.up1 = nn.ConvTranspose1d(4, 6, 3)
        self.up2 = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.linear = nn.Linear(7, 5)
        self.norm = nn.LayerNorm((3, 4))
        self.embedding = nn.Embedding(9, 4)
        self.gain = nn.Parameter(torch.randn(6, 1, 1, 1))
        self.number = nn.Parameter(torch.randn(()))
        self.fc = nn.Linear(5, 3)


def filled(model: nn.Module, *, weights: float = 1.0, seed: int = 1) -> nn.Module:
    """With gradients whose units differ in size by many orders."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * weights)
        size = torch.exp(3 * torch.randn(p.shape[:2] + (1,) * (p.dim() - 2), generator=generator) - 4)
        p.grad = (torch.randn(p.shape, generator=generator) * size * weights).to(p.dtype)
    return model


def unit_slices(name: str, p: Tensor) -> list[tuple]:
    """Indices of each unit, written out by hand for `Everything`."""
    if name in ("conv1.weight", "conv2.weight", "conv3.weight", "linear.weight", "fc.weight", "embedding.weight"):
        return [(i,) for i in range(p.shape[0])]
    if name == "up1.weight":
        return [(slice(None), o) for o in range(6)]
    if name == "up2.weight":  # (4, 6 / 2, 3, 3): inputs 0 and 1 are the first group's
        return [(slice(2 * g, 2 * g + 2), o) for g in range(2) for o in range(3)]
    return [(...,)]


def slowly(model: nn.Module, clip_factor: float, eps: float, exclude: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Equation 3 in a loop, in float64."""
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        g = p.grad.double().clone()
        if name not in exclude:
            for unit in unit_slices(name, p):
                most = clip_factor * max(p.detach().double()[unit].square().sum().sqrt().item(), eps)
                norm = g[unit].square().sum().sqrt().item()
                if norm > most:
                    g[unit] = g[unit] * most / max(norm, 1e-6)
        found[name] = g
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [1.0, 1e-4])
def test_against_a_slow_loop(dtype: torch.dtype, weights: float) -> None:
    model = filled(Everything().to(dtype), weights=weights)
    expected = slowly(model, 0.01, 1e-3)
    before = gradients(model)
    clipped = adaptive_clip_grad_(model, 0.01, 1e-3)
    assert 0 < clipped.clipped < clipped.units
    eps = torch.finfo(dtype).eps
    for name, g in gradients(model).items():
        assert g.dtype == dtype
        torch.testing.assert_close(
            g.double(), expected[name], rtol=max(2 * eps, 1e-14), atol=torch.finfo(dtype).tiny * eps
        )
        same = (before[name].double() == expected[name]).all()
        assert torch.equal(g, before[name]) == same


def test_what_it_tells_is_what_it_did() -> None:
    model = filled(Everything())
    before = gradients(model)
    parameters = dict(model.named_parameters())
    clipped = adaptive_clip_grad_(model, 0.02, 1e-3)
    told = clipped.by_name()
    assert list(told) == list(before)
    for name, (units, count, largest) in told.items():
        slices = unit_slices(name, parameters[name])
        ratios = [(before[name][u].norm() / parameters[name].detach()[u].norm().clamp_min(1e-3)).item() for u in slices]
        assert units == len(slices)
        assert count == sum(ratio > 0.02 for ratio in ratios)
        assert largest == pytest.approx(max(ratios), rel=1e-5)
    assert clipped.units == sum(units for units, _, _ in told.values())
    assert clipped.clipped == sum(count for _, count, _ in told.values())
    assert clipped.largest.item() == pytest.approx(max(largest for _, _, largest in told.values()))


def test_a_unit_at_its_limit_stays_and_one_above_is_brought_to_it() -> None:
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]))
    layer.weight.grad = torch.tensor([[0.0, 1.25], [6.0, 8.0], [1.0, 0.0]])
    adaptive_clip_grad_(layer, 0.25, 0.5)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.0, 1.25], [0.75, 1.0], [0.125, 0.0]]))


def test_gains_of_any_shape_are_one_vector() -> None:
    """One channel's gradient of 0.05 beside others of 0: the limit of 64 gains of 1 is 0.08, of one alone 0.01."""
    for shape in [(64,), (64, 1, 1, 1)]:
        gain = nn.Parameter(torch.ones(shape))
        gain.grad = torch.zeros(shape)
        gain.grad[3] = 0.05
        assert adaptive_clip_grad_([gain]).clipped == 0
        assert gain.grad[3] == pytest.approx(0.05)
    four_d = nn.Parameter(torch.ones(64, 1, 1, 1))
    four_d.grad = torch.zeros(64, 1, 1, 1)
    four_d.grad[3] = 0.05
    adaptive_clip_grad([four_d])
    assert four_d.grad[3] == pytest.approx(0.01)  # timm's


def test_convolutions_and_linear_layers_are_clipped_as_by_timm() -> None:
    ours = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(3, 5, 3), nn.Linear(9, 4), nn.Conv3d(2, 3, 2, groups=1)))
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.grad = a.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
    adaptive_clip_grad_(ours)
    adaptive_clip_grad(theirs.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_channels_last_gradients_keep_their_format() -> None:
    model = filled(nn.Conv2d(6, 4, 3))
    expected = slowly(SimpleModel(model), 0.01, 1e-3)
    model = model.to(memory_format=torch.channels_last)
    assert model.weight.grad is not None
    model.weight.grad = model.weight.grad.contiguous(memory_format=torch.channels_last)
    adaptive_clip_grad_(model)
    assert model.weight.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.weight.grad.double(), expected["conv2.weight"], rtol=1e-6, atol=0)


class SimpleModel(nn.Module):
    """A convolution under the name that `unit_slices` knows."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv2 = conv


def test_tensors_pairs_and_a_model_give_the_same() -> None:
    ways = [
        lambda m: adaptive_clip_grad_(m.parameters()),
        lambda m: adaptive_clip_grad_(m.named_parameters()),
        lambda m: adaptive_clip_grad_(m),
    ]
    found = []
    for way in ways:
        model = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4)))
        clipped = way(model)
        found.append((gradients(model), int(clipped.clipped)))
    for again, count in found[1:]:
        assert count == found[0][1] > 0
        torch.testing.assert_close(again, found[0][0], rtol=0, atol=0)
    one = nn.Parameter(torch.ones(2, 2))
    one.grad = torch.ones(2, 2)
    assert adaptive_clip_grad_(one).names == ("parameter 0",)


def test_parameters_without_gradient_are_left_out() -> None:
    model = filled(Everything())
    model.conv1.weight.grad = model.gain.grad = None
    clipped = adaptive_clip_grad_(model)
    assert not {"conv1.weight", "gain"} & set(clipped.names)
    assert model.conv1.weight.grad is None


def test_clipping_before_backward_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(
        ValueError, match=r"none of the 4 parameters \(0\.weight, 0\.bias, 1\.weight, \.\.\.\) has a grad"
    ):
        adaptive_clip_grad_(model)
    with pytest.raises(ValueError, match="none of the 2 parameters"):
        adaptive_clip_grad_([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_and_its_neighbors_stay(value: float) -> None:
    layer = nn.Linear(3, 2, bias=False)
    nn.init.ones_(layer.weight)
    layer.weight.grad = torch.tensor([[1.0, value, 2.0], [3.0, 4.0, 0.0]])
    clipped = adaptive_clip_grad_(layer)
    torch.testing.assert_close(layer.weight.grad[0], torch.tensor([1.0, value, 2.0]), equal_nan=True)
    assert layer.weight.grad[1].norm() == pytest.approx(0.01 * 3**0.5)
    assert clipped.clipped == 1


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of 0\.weight is sparse.* exclude 0\.weight"):
        adaptive_clip_grad_(model)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True])
@pytest.mark.parametrize("name", ["clip_factor", "eps"])
def test_other_thresholds_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is not a finite number above 0"):
        adaptive_clip_grad_(filled(nn.Linear(2, 2)), **{name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, o: adaptive_clip_grad_(m, exclude=None), "exclude=None is neither a name nor names"),
        (lambda m, o: adaptive_clip_grad_(m, exclude=[3]), r"exclude=\[3\] is neither a name nor names"),
        (lambda m, o: adaptive_clip_grad_([m]), "parameters must be a model, tensors, or pairs .* got a Linear"),
        (lambda m, o: adaptive_clip_grad_("w"), "parameters must be a model, tensors, or pairs .* got a str in them"),
        (lambda m, o: attach_agc(m, o), "model must be a torch module, got SGD"),
        (lambda m, o: AGC(m, o), "model must be a torch module, got SGD"),
        (lambda m, o: anybatch.scheme("agc(exclude=None)"), "exclude=None is not a name"),
    ],
)
def test_other_kinds_of_arguments_are_refused_by_name(call, message: str) -> None:
    layer = filled(nn.Linear(2, 2))
    with pytest.raises((TypeError, ValueError), match=message):
        call(layer, torch.optim.SGD(layer.parameters(), lr=0.1))


def test_a_scheme_excludes_a_layer_whose_name_is_a_number() -> None:
    model = nn.Sequential(filled(nn.Linear(2, 2)), filled(nn.Linear(2, 2)))
    clip = anybatch.scheme("agc(exclude=1)").clip
    assert clip is not None
    assert "1.weight" not in clip(model)().names


def test_flattened_shards_are_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"weight of a Linear has shape \(4,\): .*fully_shard"):
        adaptive_clip_grad_(layer)


# Names.


def excluded(model: nn.Module, exclude: str | tuple[str, ...] = "auto") -> set[str]:
    handle = attach_agc(torch.optim.SGD(model.parameters(), lr=0.1), model, exclude=exclude)
    return set(handle.excluded)


class Headed(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        for name, layer in layers.items():
            self.add_module(name, layer)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: anybatch.create_model("resnet8", "nf", num_classes=3), {"fc.weight"}),
        (lambda: anybatch.create_model("resnet8", "nf", num_classes=0), set()),
        (lambda: timm.create_model("test_nfnet"), {"head.fc.weight"}),
        (lambda: timm.create_model("test_vit"), {"head.weight"}),
        (lambda: timm.create_model("test_byobnet", num_classes=0), set()),
        (lambda: Headed(head=nn.Linear(4, 2)), {"head.weight"}),
        (
            lambda: Headed(classifier=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))),
            {"classifier.2.weight"},
        ),
        (lambda: Headed(classifier=nn.Conv2d(4, 2, 1)), {"classifier.weight"}),
        (lambda: nn.DataParallel(Headed(fc=nn.Linear(4, 2))), {"fc.weight"}),
        (lambda: torch.compile(Headed(fc=nn.Linear(4, 2))), {"fc.weight"}),
    ],
)
def test_the_classifier_is_found(make, expected: set[str]) -> None:
    assert excluded(make()) == expected


def test_timm_configurations_name_the_classifier() -> None:
    model = Headed(last=nn.Linear(4, 2))
    model.pretrained_cfg = {"classifier": "last"}  # pyright: ignore[reportArgumentType]
    assert excluded(model) == {"last.weight"}


def test_a_classifier_that_cannot_be_found_must_be_named() -> None:
    model = Headed(last=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"which layer of Headed is the classifier: .*fc, head\.fc, .*exclude='last'"):
        excluded(model)
    assert excluded(model, "last") == {"last.weight"}
    assert excluded(model, "none") == set()
    assert excluded(model, ()) == set()


def test_names_are_checked_against_the_model() -> None:
    model = Headed(fc=nn.Linear(4, 2))
    assert excluded(model, ("fc.bias", "stem")) == {"fc.bias", "stem.weight"}
    assert excluded(model, "fc.bias|stem") == {"fc.bias", "stem.weight"}
    with pytest.raises(ValueError, match=r"unknown parameter or layer 'stm' of Headed; did you mean stem"):
        excluded(model, "stm")
    with pytest.raises(ValueError, match="leaves no parameter"):
        excluded(nn.Linear(2, 2), ("weight", "bias"))
    with pytest.raises(ValueError, match=r"unknown parameter or layer 'fcc'; did you mean fc"):
        adaptive_clip_grad_(filled(model).named_parameters(), exclude=["fcc"])
    with pytest.raises(ValueError, match="needs names; give a model"):
        adaptive_clip_grad_(model.parameters(), exclude=["fc"])


def test_only_the_weight_of_the_classifier_is_exempt() -> None:
    model = filled(Everything())
    before = gradients(model)
    expected = slowly(model, 1e-6, 1e-3, exclude=("fc.weight",))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach_agc(optimizer, model, 1e-6)
    optimizer.step()
    for name, g in gradients(model).items():
        torch.testing.assert_close(g.double(), expected[name], rtol=1e-6, atol=0)
        assert torch.equal(g, before[name]) == (name == "fc.weight")
    assert isinstance(handle.last, Clipped)
    assert "fc.bias" in handle.last.names
    by_pairs = filled(Everything())
    adaptive_clip_grad_(by_pairs.named_parameters(), 1e-6, exclude=["fc"])
    assert torch.equal(by_pairs.fc.weight.grad, before["fc.weight"])
    assert not torch.equal(by_pairs.fc.bias.grad, before["fc.bias"])


# In optimizers.


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    return Headed(fc=nn.Linear(4, 2)), torch.randn(8, 4), torch.randint(2, (8,))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model.get_submodule("fc")(model.get_submodule("stem")(x).relu()), y)


def trained(way: str, *, steps: int = 3, **options) -> dict[str, Tensor]:
    """Weights after some steps of SGD with clipping by one of the ways."""
    model, x, y = small()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, **options)
    if way in ("hook", "hook with closure"):
        attach_agc(optimizer, model, 0.05)
    elif way in ("wrapper", "wrapper with closure"):
        optimizer = AGC(optimizer, model, 0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    for _ in range(steps):
        if way.endswith("with closure"):
            assert optimizer.step(closure) is not None
            continue
        closure()
        if way == "by hand":
            adaptive_clip_grad_(model, 0.05, exclude=["fc"])
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("way", ["hook", "hook with closure", "wrapper", "wrapper with closure"])
def test_every_way_takes_the_same_steps(way: str, options: dict) -> None:
    torch.testing.assert_close(trained(way, **options), trained("by hand", **options), rtol=0, atol=0)
    assert not torch.equal(trained("nothing", **options)["stem.weight"], trained(way, **options)["stem.weight"])


def test_a_removed_hook_no_longer_clips() -> None:
    model = filled(Everything())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach_agc(optimizer, model)
    handle.remove()
    before = gradients(model)
    optimizer.step()
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)
    assert handle.last is None


def test_only_what_the_optimizer_holds_is_clipped() -> None:
    model = filled(Everything())
    before = gradients(model)
    optimizer = torch.optim.SGD(model.conv2.parameters(), lr=0.0)
    handle = attach_agc(optimizer, model, 1e-6)
    optimizer.step()
    after = gradients(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"conv2.weight", "conv2.bias"}
    assert handle.last is not None
    assert handle.last.names == ("conv2.weight", "conv2.bias")
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        attach_agc(torch.optim.SGD(nn.Linear(1, 1).parameters()), model)
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        AGC(torch.optim.SGD(nn.Linear(1, 1).parameters()), model)


def test_accumulated_gradients_are_clipped_once() -> None:
    model, x, y = small()
    for some, wanted in zip(x.split(2), y.split(2), strict=True):
        (loss_of(model, some, wanted) / 4).backward()
    adaptive_clip_grad_(model, 0.05)
    accumulated = gradients(model)
    model.zero_grad()
    loss_of(model, x, y).backward()
    adaptive_clip_grad_(model, 0.05)
    torch.testing.assert_close(accumulated, gradients(model))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("way", ["hook", "wrapper"])
def test_scaled_gradients_are_clipped_as_if_they_were_not(fused: bool, unscaled: bool, way: str) -> None:
    model, x, y = small()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=fused)
    if way == "hook":
        attach_agc(optimizer, model, 0.05)
    else:
        optimizer = AGC(optimizer, model, 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(dict(model.named_parameters()), trained("by hand"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_steps_with_infinite_gradients(fused: bool) -> None:
    model, x, y = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    attach_agc(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.scale(loss_of(model, x, y)).backward()
    model.stem.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert scaler.get_scale() == 512


def test_the_wrapper_is_its_base_to_schedulers_checkpoints_and_copies() -> None:
    model, x, y = small()
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    optimizer = AGC(base, model, 0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()

    step(model, optimizer)
    schedule.step()
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.state is base.state
    assert repr(optimizer).startswith("AGC around SGD (")
    torch.testing.assert_close(optimizer.state_dict(), base.state_dict())

    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other, again = duplicate((model, optimizer))
        assert isinstance(again, AGC)
        step(other, again)
        assert again.last is not None
        assert again.last.clipped > 0
        reference = copy.deepcopy(model)
        kept = AGC(torch.optim.SGD(reference.parameters(), lr=1.0, momentum=0.9), reference, 0.05)
        kept.load_state_dict(optimizer.state_dict())
        step(reference, kept)
        torch.testing.assert_close(other.state_dict(), reference.state_dict(), rtol=0, atol=0)

    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(base.param_groups) == 2
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got type"):
        AGC(torch.optim.SGD, model)  # pyright: ignore[reportArgumentType]


def test_lbfgs_gets_clipped_gradients_from_every_call_of_its_closure() -> None:
    model, x, y = small()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    seen: list[float] = []
    attach_agc(optimizer, model, 1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer.register_step_post_hook(lambda *_: seen.append(model.stem.weight.grad.norm(dim=1).max().item()))
    optimizer.step(closure)
    assert seen[0] <= 1e-3 * model.stem.weight.norm(dim=1).max().item() * 1.01


# As a part of a scheme.


def test_the_part_clips_a_finished_model() -> None:
    model = anybatch.create_model("resnet8", "nf", num_classes=5, width=16)
    clip = anybatch.scheme("nf+agc(clip_factor=0.02)").clip
    assert clip is not None
    clips = clip(model)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    clipped = clips()
    assert "fc.bias" in clipped.names
    assert "fc.weight" not in clipped.names
    assert {"layer1.0.join.gain", "layer1.0.conv1.gain"} <= set(clipped.names)
    ratio = (model.conv1.weight.grad.flatten(1).norm(dim=1) / model.conv1.weight.flatten(1).norm(dim=1)).max()
    assert ratio <= 0.02 * 1.0001
    with pytest.raises(ValueError, match="clip_factor=0 is not a finite number above 0"):
        anybatch.scheme("agc(clip_factor=0)")
    wrong = anybatch.scheme("agc(exclude=fd)").clip
    assert wrong is not None
    with pytest.raises(ValueError, match="unknown parameter or layer 'fd' of ResNet; did you mean fc"):
        wrong(model)


# Sharded.


@pytest.mark.slow
def test_shards_are_clipped_as_the_whole(tmp_path: Path) -> None:
    run_two_ranks(Path(__file__).with_name("agc_worker.py"), tmp_path)
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = filled(Sharded())
    adaptive_clip_grad_(model)
    expected = gradients(model)
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=1e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")


class Sharded(nn.Module):
    """Of layers whose rows two processes do not share evenly, and a vector that one of them holds alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3)
        self.up = nn.ConvTranspose2d(5, 6, 3)
        self.linear = nn.Linear(7, 3)
        self.one = nn.Linear(4, 1)
