"""Residual networks: ResNet, pre-activation ResNet, ResNeXt and wide ResNet, with ImageNet's or CIFAR's stem.

With the scheme ``bn`` and ImageNet's stem, names and shapes of the parameters are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from anybatch.models.blocks import Pieces
from anybatch.models.network import Level, Network
from anybatch.models.registry import TORCHVISION, register_model
from anybatch.scheme import Scheme, check_count


class _Block(nn.Module):
    """What the blocks share: widths, the projection where the shape changes (He's option B), and the join.

    Args:
        pieces: The network's pieces.
        in_channels: Channels of the input.
        channels: Channels of the stage; the output has ``channels * expansion``.
        stride: Of the 3 x 3 convolution that halves the map.
        groups: Of that convolution.
        base_width: Its channels for 64 of the stage and for each group.
    """

    expansion: ClassVar[int] = 1
    preactivated: ClassVar[bool] = False

    def __init__(
        self, pieces: Pieces, in_channels: int, channels: int, stride: int, *, groups: int = 1, base_width: int = 64
    ) -> None:
        super().__init__()
        if self.expansion == 1 and (groups != 1 or base_width != 64):
            raise ValueError("basic blocks take groups=1 and base_width=64; use a network of bottlenecks")
        width, out_channels = channels * base_width // 64 * groups, channels * self.expansion
        if width < 1:
            raise ValueError(
                f"of width={channels} the {groups} groups of base_width={base_width} keep no channel; "
                f"take a width of {-(-64 // base_width)} or more"
            )
        transition = stride != 1 or in_channels != out_channels
        self.join = pieces.join(transition=transition)
        self._add_branch(pieces, in_channels, width, out_channels, stride, groups)
        self.downsample: nn.Module | None = None
        if transition:
            projection = pieces.conv(in_channels, out_channels, 1, stride)
            norm = None if self.preactivated else pieces.norm(out_channels)
            self.downsample = projection if norm is None else nn.Sequential(projection, norm)

    def _add_branch(
        self, pieces: Pieces, in_channels: int, width: int, out_channels: int, stride: int, groups: int
    ) -> None:
        raise NotImplementedError


class BasicBlock(_Block):
    """Two 3 x 3 convolutions; He et al. 2015, arXiv:1512.03385, figure 5 left."""

    def _add_branch(
        self, pieces: Pieces, in_channels: int, width: int, out_channels: int, stride: int, groups: int
    ) -> None:
        self.conv1 = pieces.conv(in_channels, width, 3, stride)
        self.bn1, self.act1 = pieces.norm_act(width, behind=self.conv1)
        self.conv2 = pieces.conv(width, out_channels, 3)
        self.bn2 = pieces.norm(out_channels, last_in_branch=True)
        self.act2 = pieces.join_act(self.join, self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.join.prepare(x)
        skip = x if self.downsample is None else self.downsample(h)
        h = self.act1(self.bn1(self.conv1(h)))
        return self.act2(self.join.end(h, skip, self.conv2, self.bn2))


class Bottleneck(_Block):
    """1 x 1, 3 x 3 with the stride, 1 x 1; He et al. 2015, figure 5 right, with torchvision's place of the stride."""

    expansion: ClassVar[int] = 4

    def _add_branch(
        self, pieces: Pieces, in_channels: int, width: int, out_channels: int, stride: int, groups: int
    ) -> None:
        self.conv1 = pieces.conv(in_channels, width, 1)
        self.bn1, self.act1 = pieces.norm_act(width, behind=self.conv1)
        self.conv2 = pieces.conv(width, width, 3, stride, groups=groups)
        self.bn2, self.act2 = pieces.norm_act(width, behind=self.conv2)
        self.conv3 = pieces.conv(width, out_channels, 1)
        self.bn3 = pieces.norm(out_channels, last_in_branch=True)
        self.act3 = pieces.join_act(self.join, self.conv3, self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.join.prepare(x)
        skip = x if self.downsample is None else self.downsample(h)
        h = self.act1(self.bn1(self.conv1(h)))
        h = self.act2(self.bn2(self.conv2(h)))
        return self.act3(self.join.end(h, skip, self.conv3, self.bn3))


class PreActBasicBlock(_Block):
    """Norm and activation before each convolution; He et al. 2016, arXiv:1603.05027, figure 1 b."""

    preactivated: ClassVar[bool] = True

    def _add_branch(
        self, pieces: Pieces, in_channels: int, width: int, out_channels: int, stride: int, groups: int
    ) -> None:
        self.bn1, self.act1 = pieces.norm_act(in_channels)
        self.conv1 = pieces.conv(in_channels, width, 3, stride)
        self.bn2, self.act2 = pieces.norm_act(width, behind=self.conv1)
        self.conv2 = pieces.conv(width, out_channels, 3)
        self.join.move_inside(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.join.prepare(self.act1(self.bn1(x)))
        skip = x if self.downsample is None else self.downsample(h)
        h = self.act2(self.bn2(self.conv1(h)))
        return self.join.end(h, skip, self.conv2)


class PreActBottleneck(_Block):
    """The bottleneck with norm and activation before each convolution; He et al. 2016, arXiv:1603.05027."""

    expansion: ClassVar[int] = 4
    preactivated: ClassVar[bool] = True

    def _add_branch(
        self, pieces: Pieces, in_channels: int, width: int, out_channels: int, stride: int, groups: int
    ) -> None:
        self.bn1, self.act1 = pieces.norm_act(in_channels)
        self.conv1 = pieces.conv(in_channels, width, 1)
        self.bn2, self.act2 = pieces.norm_act(width, behind=self.conv1)
        self.conv2 = pieces.conv(width, width, 3, stride, groups=groups)
        self.bn3, self.act3 = pieces.norm_act(width, behind=self.conv2)
        self.conv3 = pieces.conv(width, out_channels, 1)
        self.join.move_inside(self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.join.prepare(self.act1(self.bn1(x)))
        skip = x if self.downsample is None else self.downsample(h)
        h = self.conv1(h)
        h = self.conv2(self.act2(self.bn2(h)))
        return self.join.end(self.act3(self.bn3(h)), skip, self.conv3)


Block = type[_Block]


class ResNet(Network):
    """A residual network.

    Args:
        scheme: How it normalizes.
        block: One of the four block classes of this file.
        depths: Blocks in each stage; each stage after the first halves the map and doubles the width.
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        width: Channels of the first stage, before a bottleneck's expansion by 4.
        stem_width: Channels of the stem; None for ``width``.
        stem: ``"imagenet"`` (7 x 7 stride 2, then pooling: 1/4 of the size), ``"cifar"`` (3 x 3, full size) or
            ``"bit"``, as ``"imagenet"`` with zeros around what is pooled, for BiT's weights.
        groups: Groups of the 3 x 3 convolution in bottlenecks (ResNeXt's cardinality).
        base_width: Channels of that convolution per 64 channels of the stage and per group.
        zero_init_residual: Whether the last norm of each branch starts with scale 0, so that a block starts as the
            identity. Off as in torchvision; the GroupNorm paper has it on for ImageNet, the WS paper off.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Of stochastic depth; see `anybatch.models.blocks.Pieces`.
        act: The network's own activation, where the scheme brings none; None for ReLU.
        init: First weights, where the scheme has none; None for He's normal over fan-out.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: If the stem is unknown, a basic block is asked for groups, or the width leaves a convolution no
            channels.

    Source:
        He et al. 2015, arXiv:1512.03385; pre-activation: He et al. 2016, arXiv:1603.05027; groups: Xie et al. 2016,
        arXiv:1611.05431; width: Zagoruyko and Komodakis 2016, arXiv:1605.07146; zero_init_residual: Goyal et al. 2017,
        arXiv:1706.02677, section 5.1.
    """

    def __init__(
        self,
        scheme: Scheme,
        block: Block,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        stem_width: int | None = None,
        stem: str = "imagenet",
        groups: int = 1,
        base_width: int = 64,
        zero_init_residual: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act: Callable[[], nn.Module] | None = None,
        init: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        check_count("width", width)
        pieces = Pieces(
            scheme,
            blocks=sum(depths),
            zero_init_residual=zero_init_residual,
            act=act,
            drop_path_rate=drop_path_rate,
        )
        self.in_chans = in_chans
        channels = width if stem_width is None else stem_width
        if stem in ("imagenet", "bit"):
            self.conv1 = pieces.conv(in_chans, channels, 7, 2)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
            if stem == "bit":  # no activation stands before a pre-activated network's pooling: zeros may be the largest
                self.maxpool = nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, stride=2))
        elif stem == "cifar":
            self.conv1 = pieces.conv(in_chans, channels, 3)
            self.maxpool = nn.Identity()
        else:
            raise ValueError(f"stem must be 'imagenet', 'cifar' or 'bit', got {stem!r}")
        # A pre-activated network normalizes at the start of its blocks and once behind the last.
        none = (nn.Identity(), nn.Identity())
        self.bn1, self.act1 = none if block.preactivated else pieces.norm_act(channels, behind=self.conv1)
        reduction = 1 if stem == "cifar" else 2
        levels = [Level(("conv1", "bn1", "act1"), channels, reduction)]
        reduction = 1 if stem == "cifar" else 4
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(pieces, channels, width * 2**i, stride, groups=groups, base_width=base_width))
                channels = width * 2**i * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            first = ("maxpool",) if i == 0 else ()
            levels.append(Level((*first, f"layer{i + 1}"), channels, reduction * 2**i))
        self.levels, self.tail = tuple(levels), ("final_norm", "final_act")
        final = pieces.final_norm_act(channels) if block.preactivated else (nn.Identity(), nn.Identity())
        self.final_norm, self.final_act = final
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._add_classifier(channels, num_classes, drop_rate)
        pieces.init(self, init)


def _resnet(
    name: str,
    doc: str,
    block: Block,
    depths: Sequence[int],
    *,
    family: str = "ResNet",
    width: int = 64,
    stem_width: int | None = None,
    stem: str = "imagenet",
    published: float | None = None,
    source: str = "arXiv:1512.03385",
    groups: int = 1,
    base_width: int = 64,
) -> None:
    """Register a network: a block, its depths and, beside them, what differs from `ResNet`'s defaults."""

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = width,
        stem: str = stem,
        zero_init_residual: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> Network:
        return ResNet(
            scheme,
            block,
            depths,
            num_classes=num_classes,
            in_chans=in_chans,
            width=width,
            stem_width=stem_width,
            stem=stem,
            zero_init_residual=zero_init_residual,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            groups=groups,
            base_width=base_width,
        )

    build.__name__, build.__doc__ = name, doc
    small = stem == "cifar"
    told = source if published is None else f"{source}; {TORCHVISION}"
    register_model(
        build,
        family=family,
        scheme="ws+gn:auto" if small else "ws+gn",
        size=32 if small else 224,
        published=published,
        source=told,
    )


for _depth, _depths, _block, _preact, _top1 in (
    (18, (2, 2, 2, 2), BasicBlock, PreActBasicBlock, 69.758),
    (34, (3, 4, 6, 3), BasicBlock, PreActBasicBlock, 73.314),
    (50, (3, 4, 6, 3), Bottleneck, PreActBottleneck, 76.130),
    (101, (3, 4, 23, 3), Bottleneck, PreActBottleneck, 77.374),
    (152, (3, 8, 36, 3), Bottleneck, PreActBottleneck, 78.312),
):
    _resnet(f"resnet{_depth}", f"ResNet-{_depth}.", _block, _depths, published=_top1)
    _resnet(
        f"preact_resnet{_depth}",
        f"Pre-activation ResNet-{_depth}.",
        _preact,
        _depths,
        family="PreAct-ResNet",
        source="arXiv:1603.05027",
    )
for _depth, _width, _depths, _top1 in ((50, 4, (3, 4, 6, 3), 77.618), (101, 8, (3, 4, 23, 3), 79.312)):
    _resnet(
        f"resnext{_depth}_32x{_width}d",
        f"ResNeXt-{_depth}, 32 groups of {_width}.",
        Bottleneck,
        _depths,
        family="ResNeXt",
        published=_top1,
        source="arXiv:1611.05431",
        groups=32,
        base_width=_width,
    )
for _depth, _depths, _top1 in ((50, (3, 4, 6, 3), 78.468), (101, (3, 4, 23, 3), 78.848)):
    _resnet(
        f"wide_resnet{_depth}_2",
        f"ResNet-{_depth} with bottlenecks twice as wide.",
        Bottleneck,
        _depths,
        family="Wide ResNet",
        published=_top1,
        source="arXiv:1605.07146",
        base_width=128,
    )
for _depth in (8, 14, 20, 32, 44, 56, 110):
    _depths = ((_depth - 2) // 6,) * 3
    _resnet(f"resnet{_depth}", f"CIFAR's narrow ResNet-{_depth}.", BasicBlock, _depths, width=16, stem="cifar")
    _resnet(
        f"preact_resnet{_depth}",
        f"CIFAR's narrow pre-activation ResNet-{_depth}.",
        PreActBasicBlock,
        _depths,
        family="PreAct-ResNet",
        source="arXiv:1603.05027",
        width=16,
        stem="cifar",
    )
for _depth in (164, 1001):
    _resnet(
        f"preact_resnet{_depth}",
        f"CIFAR's pre-activation ResNet-{_depth}, of bottlenecks.",
        PreActBottleneck,
        ((_depth - 2) // 9,) * 3,
        family="PreAct-ResNet",
        source="arXiv:1603.05027",
        width=16,
        stem="cifar",
    )
for _depth, _factor in ((16, 4), (28, 10)):
    _resnet(
        f"wide_resnet{_depth}_{_factor}",
        f"CIFAR's wide ResNet-{_depth}-{_factor}, pre-activated.",
        PreActBasicBlock,
        ((_depth - 4) // 6,) * 3,
        family="Wide ResNet",
        source="arXiv:1605.07146",
        width=16 * _factor,
        stem_width=16,
        stem="cifar",
    )
