"""DenseNet: each layer takes the maps of all layers before it in its block; ImageNet's networks and CIFAR's.

With the scheme ``bn`` and ImageNet's stem, names and shapes of the parameters are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anybatch.models.blocks import Pieces
from anybatch.models.network import Level, Network
from anybatch.models.registry import TORCHVISION, register_model
from anybatch.scheme import Scheme, check_count


class DenseLayer(nn.Module):
    """New maps from all that came before: norm, activation, convolution, once or, with a bottleneck, twice.

    Args:
        pieces: The network's pieces.
        in_channels: Channels of the inputs together.
        growth: Channels of the output.
        bottleneck: Whether a 1 x 1 convolution to four times ``growth`` comes before the 3 x 3 one.
        drop_rate: Dropout behind each convolution.
    """

    def __init__(self, pieces: Pieces, in_channels: int, growth: int, *, bottleneck: bool, drop_rate: float) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.norm1, self.relu1 = pieces.norm_act(in_channels)
        if bottleneck:
            self.conv1 = pieces.conv(in_channels, 4 * growth, 1)
            self.norm2, self.relu2 = pieces.norm_act(4 * growth, behind=self.conv1)
            self.conv2 = pieces.conv(4 * growth, growth, 3)
        else:
            self.conv1 = pieces.conv(in_channels, growth, 3)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, *maps: Tensor) -> Tensor:
        y = self.drop(self.conv1(self.relu1(self.norm1(torch.cat(maps, 1)))))
        return self.drop(self.conv2(self.relu2(self.norm2(y)))) if self.bottleneck else y


class DenseBlock(nn.Module):
    """A chain of dense layers; the output is the input and what each layer added.

    With ``grad_checkpointing`` a layer joins its inputs again in the backward pass, so that the memory kept grows with
    the number of layers and not with its square (Pleiss et al. 2017, arXiv:1707.06990).
    """

    grad_checkpointing = False

    def __init__(
        self, pieces: Pieces, in_channels: int, growth: int, depth: int, *, bottleneck: bool, drop_rate: float
    ) -> None:
        super().__init__()
        for i in range(depth):
            layer = DenseLayer(pieces, in_channels + i * growth, growth, bottleneck=bottleneck, drop_rate=drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.children():
            if self.grad_checkpointing and self.training:
                maps.append(checkpoint(layer, *maps, use_reentrant=False))  # pyright: ignore[reportArgumentType]
            else:
                maps.append(layer(*maps))
        return torch.cat(maps, 1)


class Transition(nn.Module):
    """From one dense block to the next: norm, activation, a convolution (1 x 1 as published), and half the size."""

    def __init__(
        self, pieces: Pieces, in_channels: int, out_channels: int, drop_rate: float, kernel_size: int = 1
    ) -> None:
        super().__init__()
        self.norm, self.relu = pieces.norm_act(in_channels)
        self.conv = pieces.conv(in_channels, out_channels, kernel_size)
        self.drop = nn.Dropout(drop_rate)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.drop(self.conv(self.relu(self.norm(x)))))


class DenseNet(Network):
    """A densely connected network; a norm, an activation and global pooling follow the last block.

    Args:
        scheme: How it normalizes.
        growth: Channels that each layer adds, the paper's k.
        depths: Layers in each block. A transition between two blocks halves the map.
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        stem: ``"imagenet"`` (7 x 7 stride 2, norm, activation, pooling: 1/4 of the size) or ``"cifar"`` (a 3 x 3
            convolution alone, full size).
        bottleneck: Whether it is a DenseNet-BC: layers start with a 1 x 1 convolution, transitions halve the channels,
            and the stem has ``2 * growth`` channels. Otherwise the stem has 16, as the paper says; its released code
            has ``2 * growth`` there too.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout behind each convolution but the first. The paper has 0.2 where images are not augmented;
            torchvision and timm drop behind the 3 x 3 convolutions alone.
        stem_channels: Channels of the stem; None for those named above.
        transition_kernel: Kernel size of the transitions' convolutions.
        act: The network's own activation, where the scheme brings none; None for ReLU.
        init: First weights, where the scheme has none; None for He's normal over fan-out.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: If the stem is unknown, ``growth`` below 1, or a rate not in [0, 1).

    Source:
        Huang, Liu, van der Maaten and Weinberger 2016, "Densely Connected Convolutional Networks", arXiv:1608.06993,
        section 3, table 1. First weights: He's normal over fan-out and a bias of 0 for the classifier, as in the
        released code; torchvision's is over fan-in.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        scheme: Scheme,
        growth: int,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "imagenet",
        bottleneck: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        stem_channels: int | None = None,
        transition_kernel: int = 1,
        act: Callable[[], nn.Module] | None = None,
        init: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        check_count("growth", growth)
        if not 0 <= proj_drop_rate < 1:
            raise ValueError(f"proj_drop_rate must be in [0, 1), got {proj_drop_rate}")
        pieces = Pieces(scheme, act=act)
        self.in_chans = in_chans
        channels = stem_channels or (2 * growth if bottleneck else 16)
        self.features = nn.Sequential()
        if stem == "imagenet":
            self.features.conv0 = pieces.conv(in_chans, channels, 7, 2)
            self.features.norm0, self.features.relu0 = pieces.norm_act(channels, behind=self.features.conv0)
            self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
            levels = [Level(("features.conv0", "features.norm0", "features.relu0"), channels, 2)]
            between, reduction = ("features.pool0",), 4
        elif stem == "cifar":
            self.features.conv0 = pieces.conv(in_chans, channels, 3)
            levels = [Level(("features.conv0",), channels, 1)]
            between, reduction = (), 1
        else:
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        for i, depth in enumerate(depths, 1):
            if i > 1:
                out_channels = channels // 2 if bottleneck else channels
                transition = Transition(pieces, channels, out_channels, proj_drop_rate, transition_kernel)
                self.features.add_module(f"transition{i - 1}", transition)
                between, reduction, channels = (f"features.transition{i - 1}",), 2 * reduction, out_channels
            block = DenseBlock(pieces, channels, growth, depth, bottleneck=bottleneck, drop_rate=proj_drop_rate)
            self.features.add_module(f"denseblock{i}", block)
            channels += depth * growth
            levels.append(Level((*between, f"features.denseblock{i}"), channels, reduction))
        self.features.norm5, self.features.relu5 = pieces.final_norm_act(channels)
        self.levels, self.tail = tuple(levels), ("features.norm5", "features.relu5")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._add_classifier(channels, num_classes, drop_rate)
        if isinstance(last := self.get_classifier(), nn.Linear):
            nn.init.zeros_(last.bias)
        pieces.init(self, init)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's output for backward, and compute the rest again.

        Layers that update statistics in training, such as BatchNorm, then update them twice a step.
        """
        super().set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, DenseBlock):
                module.grad_checkpointing = enable


def _densenet(
    name: str,
    doc: str,
    growth: int,
    depths: Sequence[int],
    *,
    stem: str = "imagenet",
    bottleneck: bool = True,
    published: float | None = None,
    scheme: str = "bn",
    source: str = "arXiv:1608.06993",
) -> None:
    """Register a network: its growth and depths and, beside them, what differs from `DenseNet`'s defaults."""

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        growth: int = growth,
        stem: str = stem,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ) -> Network:
        return DenseNet(
            scheme,
            growth,
            depths,
            num_classes=num_classes,
            in_chans=in_chans,
            stem=stem,
            bottleneck=bottleneck,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
        )

    build.__name__, build.__doc__ = name, doc
    register_model(
        build,
        family="DenseNet",
        scheme=scheme,
        size=32 if stem == "cifar" else 224,
        published=published,
        source=source if published is None else f"{source}; {TORCHVISION}",
    )


for _depth, _growth, _depths, _top1 in (
    (121, 32, (6, 12, 24, 16), 74.434),
    (161, 48, (6, 12, 36, 24), 77.138),
    (169, 32, (6, 12, 32, 32), 75.600),
    (201, 32, (6, 12, 48, 32), 76.896),
):
    _doc = f"DenseNet-BC-{_depth}, growth {_growth}"
    _densenet(f"densenet{_depth}", f"{_doc}.", _growth, _depths, published=_top1)
    _densenet(
        f"kndensenet{_depth}",
        f"{_doc}, kernel-normalized: our reading of KNDenseNet, whose own layers could not be had.",
        _growth,
        _depths,
        scheme="kn(eps=1e-5)",
        source="ours, of arXiv:1608.06993 and arXiv:2205.10089",
    )
for _depth, _growth, _error in ((40, 12, 5.24), (100, 12, 4.10), (100, 24, 3.74)):
    _densenet(
        f"densenet{_depth}_{_growth}",
        f"CIFAR's DenseNet-{_depth}, growth {_growth}; published error {_error:.2f}% on augmented CIFAR-10.",
        _growth,
        ((_depth - 4) // 3,) * 3,
        stem="cifar",
        bottleneck=False,
    )
for _depth, _growth, _error in ((100, 12, 4.51), (100, 24, None), (100, 32, None), (190, 40, 3.46), (250, 24, 3.62)):
    _told = "not in the paper" if _error is None else f"published error {_error:.2f}% on augmented CIFAR-10"
    _densenet(
        f"densenet_bc{_depth}_{_growth}",
        f"CIFAR's DenseNet-BC-{_depth}, growth {_growth}; {_told}.",
        _growth,
        ((_depth - 4) // 6,) * 3,
        stem="cifar",
    )
