"""What tests of several families ask of a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import anybatch
from anybatch.models.network import Network
from anybatch.models.nfnet import NF_REGNET, NF_RESNET, NFNET, NormalizerFreeNet
from helpers import assert_same_gradients, gradients, saved_tensors


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def undrawn(make: Callable[[], Any]) -> Any:
    """A network in evaluation mode whose values are yet to come: the first ones of a large one take seconds to draw."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else 0)
    return model.eval()


def made(name: str, scheme: str | None = None, **options: Any) -> Any:
    """One of ours that is `undrawn`, for 10 classes."""
    return undrawn(lambda: anybatch.create_model(name, scheme, **{"num_classes": 10, **options}))


def randomized(model: Any) -> Any:
    """In evaluation mode, with every gain, bias, scale, statistic and weight away from where it starts.

    At 0 or 1 they hide that one is missing. Always the same values, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.dim() == 0:
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "weight_beta")):
            value.normal_(0, 0.1, generator=generator)
        elif name.endswith(("gain", "weight_gamma")):  # standardized filters have no other scale to make good theirs
            value.normal_(1, 0.1, generator=generator).abs_()
        elif value.numel() == max(value.shape):
            value.uniform_(0.3, 0.7, generator=generator)
        else:  # makes good what scales of 0.5 on average take
            value.normal_(0, (4 / value[0].numel()) ** 0.5, generator=generator)
    return model.eval()


def small_nf(kind: str, depths: tuple[int, ...] = (1, 2, 1, 2)) -> Any:
    """A `randomized` network of the kind that the publication's code calls so, with that many blocks a stage."""
    shape, stem, root = {
        "NFNet": (NFNET, "deep", 16),
        "NF_ResNet": (NF_RESNET, "7x7", 8),
        "NF_RegNet": (NF_REGNET, "3x3", 8),
    }[kind]
    return randomized(
        NormalizerFreeNet(
            anybatch.scheme("nf(act=gelu_tanh)"),
            stem=stem,  # pyright: ignore[reportArgumentType]
            stem_channels=root,
            widths=(32, 64, 64, 96)[: len(depths)],
            depths=depths,
            strides=((1, 2, 2, 2) if stem != "3x3" else (2, 2, 2, 2))[: len(depths)],
            ratio=0.5,
            shape=shape if shape.group_width is None else type(shape)(**{**vars(shape), "group_width": 8}),
            final_channels=None if stem == "7x7" else 48,
            num_classes=5,
        )
    )


def assert_same_logits(ours: nn.Module, theirs: nn.Module, sizes: tuple[int, ...] = (64, 75)) -> None:
    contrast, brightness = torch.tensor([[3.0, 0.3], [-1.0, 1.0]])[:, :, None, None, None]
    for size in sizes:
        x = torch.randn(2, 3, size, size) * contrast + brightness
        with torch.no_grad():
            got, expected = ours(x), theirs(x)
        assert expected.std(0).max() > 0.05 * expected.abs().max(), "the logits hardly depend on the image"
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def assert_same_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].shape == value.shape, key
        assert torch.equal(got[key], value), key


def assert_same_layout(ours: nn.Module, theirs: nn.Module) -> None:
    """Names, order and number of values of all parameters and buffers."""
    got, expected = ([(key, v.numel()) for key, v in m.state_dict().items()] for m in (ours, theirs))
    assert got == expected


def assert_a_step_reaches_every_parameter(model: nn.Module, x: Tensor) -> None:
    y = model.train()(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def assert_survives_wrapping(model: nn.Module, x: Tensor) -> None:
    """Full-graph compilation, export with any batch size, and channels_last."""
    model = model.double().eval()
    x = x.double()
    expected = model(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(exported(x[:1]), expected[:1])
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    maps = last.forward_intermediates(x.contiguous(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected)


def assert_checkpointing_changes_memory_alone(model: Network, x: Tensor, *, at_most: float) -> None:
    """The same gradients, with at most this part of the values kept."""
    model, x = model.double().train(), x.double()
    kept, found = [], []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        with saved_tensors() as tensors:
            loss = model(x).square().sum()
        owned = {p.data_ptr() for p in model.parameters()}
        kept.append(sum({t.data_ptr(): t.numel() for t in tensors if t.data_ptr() not in owned}.values()))
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], relative=1e-10)
    assert kept[1] <= at_most * kept[0], f"kept {kept[1]} of {kept[0]} values"


def assert_pyramid_fits(model: Network, x: Tensor) -> None:
    """Maps have the channels and the sizes that the network tells, and the last leads to the logits."""
    model.eval()
    maps = model.forward_intermediates(x)
    assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
    assert [x.shape[2] // y.shape[2] for y in maps] == [info["reduction"] for info in model.feature_info]
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), rtol=0, atol=0)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (len(x), model.num_features)
