"""KNResNet: residual networks made for kernel normalization, for classification and for segmentation.

Blocks are pre-activated, half their convolutions are 2 x 2, and no skip connection has a projection: between two stages
stands a transition, a convolution and maximum pooling. Names of the submodules are those of the released code, whose
checkpoints `anybatch.models.load_weights` reads.

As published they have the parameters of their counterparts and about twice the multiply-adds: at 224 pixels 3.56, 7.51
and 10.51 G in KNResNet-18, 34 and 50, which is 1.96, 2.05 and 2.57 times what ResNet-18, 34 and 50 take. With
``mac_matched=True`` their widths are scaled until both take the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from anybatch.models.blocks import Pieces, named_act, torch_init
from anybatch.models.network import Level, Network
from anybatch.models.registry import register_model
from anybatch.scheme import Scheme, check_count

Pads = tuple[int, int, int, int]  # left, right, top, bottom, as in torch.nn.ZeroPad2d


class Block(nn.Module):
    """``x`` plus a branch: norm, activation and convolution, as often as there are kernels.

    Of two 2 x 2 convolutions in a branch the first adds a position in each dimension, and the last takes it away.

    Args:
        pieces: The network's pieces.
        channels: Of input and output.
        inner: Channels between the branch's convolutions.
        kernels: Their kernel sizes.

    Source:
        Nasirigerdeh et al. 2024, arXiv:2205.10089, figures 3, 5 and 6.
    """

    def __init__(self, pieces: Pieces, channels: int, inner: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.depth = len(kernels)
        widths = (channels, *[inner] * (self.depth - 1), channels)
        for i, kernel in enumerate(kernels):
            before = self.get_submodule(f"conv{i}") if i else None
            norm, act = pieces.norm_act(widths[i], behind=before)
            padding = (kernel - 1) // 2 if kernel % 2 or i else kernel // 2
            self.add_module(f"norm{i + 1}", norm)
            self.add_module(f"relu{i + 1}", act)
            self.add_module(f"conv{i + 1}", pieces.conv(widths[i], widths[i + 1], kernel, padding=padding))
        self.join = pieces.join()
        self.join.move_inside(self.get_submodule(f"conv{self.depth}"))

    def forward(self, x: Tensor) -> Tensor:
        h = self.join.prepare(self._normalized(x, 1))
        for i in range(2, self.depth + 1):
            h = self._normalized(self.get_submodule(f"conv{i - 1}")(h), i)
        return self.join.end(h, x, self.get_submodule(f"conv{self.depth}"))

    def _normalized(self, h: Tensor, i: int) -> Tensor:
        return self.get_submodule(f"relu{i}")(self.get_submodule(f"norm{i}")(h))


class ConvBlock(nn.Module):
    """Norm, activation, convolution.

    Args:
        pieces: The network's pieces.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Of the convolution.
        pads: Zeros around what it takes.
    """

    def __init__(self, pieces: Pieces, in_channels: int, out_channels: int, kernel_size: int, pads: Pads) -> None:
        super().__init__()
        self.norm, self.relu = pieces.norm_act(in_channels)
        even = len(set(pads)) == 1
        # Not every scheme's convolution pads its sides differently; to KNConv zeros are zeros, whoever added them.
        self.pad = nn.Identity() if even else nn.ZeroPad2d(pads)
        self.conv = pieces.conv(in_channels, out_channels, kernel_size, padding=pads[0] if even else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(self.relu(self.norm(x))))


class Transition(ConvBlock):
    """From one stage to the next: a `ConvBlock`, and maximum pooling that halves the map.

    A pooling of 3 x 3 positions adds one on each side; one of 2 x 2 adds none.
    """

    def __init__(
        self, pieces: Pieces, in_channels: int, out_channels: int, kernel_size: int, pads: Pads, pool: int
    ) -> None:
        super().__init__(pieces, in_channels, out_channels, kernel_size, pads)
        self.max_pool = nn.MaxPool2d(pool, stride=2, padding=(pool - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(super().forward(x))


@dataclass(frozen=True)
class Stage:
    """Blocks of one size, and the transition that leads to them from the stage before."""

    channels: int
    inner: int
    depth: int
    kernels: tuple[int, ...]
    """Of a block's convolutions."""
    kernel_size: int = 2
    """Of the transition's convolution."""
    pads: Pads = (1, 0, 1, 0)
    pool: int = 2


class _KNNet(Network):
    """What networks of this file share: a stem, stages, what may follow them, and a last norm and activation.

    Args:
        pieces: The network's pieces.
        stages: The stages.
        in_chans: Channels of the input.
        stem: ``"imagenet"`` or ``"cifar"``.
        before_tail: Pooling in front of the last convolution, if there is one.
        last: The last convolution, if there is one, for as many channels as the last stage has.
        num_features: Channels behind it.
    """

    checkpointed = (Block, Transition)

    def __init__(
        self,
        pieces: Pieces,
        stages: Sequence[Stage],
        *,
        in_chans: int,
        stem: str,
        before_tail: nn.Module | None = None,
        last: Callable[[int], nn.Module] | None = None,
        num_features: int | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        channels = stages[0].channels
        if stem == "imagenet":
            self.block0 = nn.Sequential(pieces.conv(in_chans, channels, 7, 2), nn.MaxPool2d(3, stride=2, padding=1))
            between, reduction = ["block0.1"], 4
        elif stem == "cifar":
            self.block0 = nn.Sequential(pieces.conv(in_chans, channels, 3))
            between, reduction = [], 1
        else:
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        levels, count = [Level(("block0.0",), channels, 2 if stem == "imagenet" else 1)], 0
        for i, stage in enumerate(stages):
            if i > 0:
                made = Transition(pieces, channels, stage.channels, stage.kernel_size, stage.pads, stage.pool)
                self.add_module(f"trans_block{i}", made)
                between, reduction, channels = [f"trans_block{i}"], 2 * reduction, stage.channels
            for _ in range(stage.depth):
                count += 1
                self.add_module(f"res_block{count}", Block(pieces, channels, stage.inner, stage.kernels))
                between.append(f"res_block{count}")
            levels.append(Level(tuple(between), channels, reduction))
        self.levels = tuple(levels)
        tail = []
        if before_tail is not None:
            self.max_pool_f = before_tail
            tail.append("max_pool_f")
        if last is not None:
            self.conv_block_f = last(channels)
            tail.append("conv_block_f")
        self.kn_f, self.relu_f = pieces.final_norm_act(num_features or channels)
        self.tail = (*tail, "kn_f", "relu_f")


class KNResNet(_KNNet):
    """A KNResNet for classification.

    Args:
        scheme: How it normalizes: ``kn`` as published. Another scheme's norms and activations stand in front of each
            convolution but the stem's, and in front of the head.
        stages: The stages.
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        stem: ``"imagenet"`` (7 x 7 stride 2, then pooling: 1/4 of the size) or ``"cifar"`` (3 x 3, full size).
        tail: Channels of a last 2 x 2 convolution behind a last maximum pooling; None for neither.
        tail_padding: Of that convolution.
        positions: To how many positions a side the last map is pooled.
        act: The network's own activation, where the scheme brings none; None for ReLU.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Of stochastic depth; see `anybatch.models.blocks.Pieces`.
        init: First weights, where the scheme has none; None for the release's: convolutions by He's normal over
            fan-out, biases 0. (The release leaves 1 x 1 convolutions and all linear weights as torch draws them; here
            only the latter.)

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: If the stem is unknown or ``drop_rate`` not in [0, 1).

    Source:
        Nasirigerdeh et al. 2024, "Kernel Normalized Convolutional Networks", arXiv:2205.10089, figures 3 and 5, and its
        released code.
    """

    def __init__(
        self,
        scheme: Scheme,
        stages: Sequence[Stage],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "imagenet",
        tail: int | None = None,
        tail_padding: int = 0,
        positions: int = 1,
        act: Callable[[], nn.Module] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Callable[[nn.Module], None] | None = None,
    ) -> None:
        blocks = sum(stage.depth for stage in stages)
        pieces = Pieces(scheme, blocks=blocks, act=act, drop_path_rate=drop_path_rate)
        pads = (tail_padding, tail_padding, tail_padding, tail_padding)
        super().__init__(
            pieces,
            stages,
            in_chans=in_chans,
            stem=stem,
            before_tail=nn.MaxPool2d(2) if tail else None,
            last=(lambda channels: ConvBlock(pieces, channels, tail, 2, pads)) if tail else None,
            num_features=tail,
        )
        self.avgpool = nn.AdaptiveAvgPool2d(positions)
        self._add_classifier((tail or stages[-1].channels) * positions**2, num_classes, drop_rate)
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)
        pieces.init(self, init)


class KNSegmentation(_KNNet):
    """A fully convolutional KNResNet, whose classifier is a 1 x 1 convolution; logits stay at 1/32 of the image's size.

    Kernels are 3 x 3, beside the 2 x 2 ones in bottlenecks. The paper's figure gives neither stride nor padding of the
    3 x 3 poolings nor how logits are enlarged: poolings have stride 2 and a position added on each side here, and
    enlarging is left to the caller.

    Args:
        scheme: How it normalizes: ``kn(p=0.1,final_p=0.5)`` as published.
        stages: The stages.
        num_classes: Channels of the output; 0 for none, which gives the last features.
        in_chans: Channels of the input.
        last: Whether a last 3 x 3 convolution follows the stages.
        act: The network's own activation, where the scheme brings none; None for ReLU.
        drop_rate: Dropout before the classifier.

    Shape:
        (N, in_chans, H, W) to (N, num_classes, H / 32, W / 32), rounded up.

    Source:
        Nasirigerdeh et al. 2024, arXiv:2205.10089, figure 6 and table 3, whose numbers of parameters it has; the code
        of these networks was not released. First weights: as in `KNResNet`.
    """

    pool = ()
    dense = True

    def __init__(
        self,
        scheme: Scheme,
        stages: Sequence[Stage],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        last: bool = False,
        act: Callable[[], nn.Module] | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        pieces = Pieces(scheme, blocks=sum(stage.depth for stage in stages), act=act)
        super().__init__(
            pieces,
            stages,
            in_chans=in_chans,
            stem="imagenet",
            last=(lambda channels: ConvBlock(pieces, channels, channels, 3, (1, 1, 1, 1))) if last else None,
        )
        self._add_classifier(stages[-1].channels, num_classes, drop_rate)
        pieces.init(self)

    def _new_classifier(self, num_features: int, num_classes: int) -> nn.Module:
        return nn.Conv2d(num_features, num_classes, 1) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of logits of a map that `forward_features` gave, or what the classifier takes."""
        x = self.drop(x)
        return x if pre_logits else self.get_classifier()(x)


def _factor(width: int) -> float:
    """Of the published widths, of which the first is 64."""
    check_count("width", width)
    return width / 64


def _scaled(stages: Sequence[Stage], factor: float) -> list[Stage]:
    """Stages of other widths, multiples of 4."""
    if factor == 1:
        return list(stages)
    return [replace(s, channels=_times(s.channels, factor), inner=_times(s.inner, factor)) for s in stages]


def _times(channels: int, factor: float) -> int:
    return channels if factor == 1 else max(4 * round(channels * factor / 4), 4)


BASIC, BOTTLENECK, NARROW_BOTTLENECK = (2, 2), (2, 3, 2), (1, 3, 1)
STAGES = {
    18: (
        Stage(64, 256, 2, BASIC),
        Stage(256, 256, 2, BASIC),
        Stage(512, 512, 1, BASIC, pads=(0, 1, 0, 1)),
        Stage(724, 724, 1, BASIC, pads=(2, 1, 2, 1)),
    ),
    34: (
        Stage(64, 256, 4, BASIC),
        Stage(256, 320, 5, BASIC),
        Stage(512, 640, 3, BASIC, pads=(0, 1, 0, 1)),
        Stage(512, 843, 2, BASIC, pads=(2, 1, 2, 1)),
    ),
    50: (
        Stage(256, 64, 4, BOTTLENECK),
        Stage(512, 128, 5, BOTTLENECK),
        Stage(810, 201, 4, BOTTLENECK, pads=(0, 1, 0, 1)),
        Stage(2048, 512, 2, NARROW_BOTTLENECK, kernel_size=1, pads=(0, 0, 0, 0)),
    ),
}
MATCHED = {18: 0.712, 34: 0.695, 50: 0.617}
"""Factors of the widths with which a network's multiply-adds are those of the ResNet of its depth, within 2 %, at 224
pixels and at 32 with CIFAR's stem. Found by search; the root of their ratio is near it, but widths are rounded."""


def _knresnet(depth: int, ratio: float, published: float) -> None:
    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        stem: str = "imagenet",
        mac_matched: bool = False,
        act: str = "relu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> Network:
        if mac_matched and width != 64:
            raise ValueError(f"mac_matched=True chooses the width, which was given too, as {width}")
        factor = MATCHED[depth] if mac_matched else _factor(width)
        stages, tail = _scaled(STAGES[depth], factor), None if depth == 50 else _times(512, factor)
        if stem == "cifar" and tail is not None:
            stages[-1] = replace(stages[-1], pads=(1, 0, 1, 0))
        model = KNResNet(
            scheme,
            stages,
            num_classes=num_classes,
            in_chans=in_chans,
            stem=stem,
            tail=tail,
            tail_padding=int(stem == "cifar"),
            act=named_act(act),
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        if tail is not None:  # what leaves one position to the last convolution, or two where it pads none
            model.min_size = 16 if stem == "cifar" else 93
        return model

    build.__name__ = f"knresnet{depth}"
    build.__doc__ = (
        f"KNResNet-{depth}: {ratio} times the multiply-adds of ResNet-{depth}; as many with mac_matched=true, which "
        f"makes it narrower than published."
    )
    register_model(
        build,
        family="KNResNet",
        scheme="kn(eps=1e-5)",
        size=224,
        published=published,
        source="arXiv:2205.10089, figures 3 and 5, table 2",
    )


_knresnet(18, 1.96, 71.17)
_knresnet(34, 2.05, 74.60)
_knresnet(50, 2.57, 76.54)


def _segmentation(depth: int, depths: Sequence[int], inner: Sequence[int], miou: float) -> None:
    kernels = BOTTLENECK if depth == 50 else (3, 3)
    stages = [
        Stage(channels, within, number, kernels, kernel_size=3, pads=(1, 1, 1, 1), pool=3)
        for channels, within, number in zip((64, 128, 256, 512), inner, depths, strict=True)
    ]

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        act: str = "relu",
        drop_rate: float = 0.0,
    ) -> Network:
        return KNSegmentation(
            scheme,
            _scaled(stages, _factor(width)),
            num_classes=num_classes,
            in_chans=in_chans,
            last=depth == 50,
            act=named_act(act),
            drop_rate=drop_rate,
        )

    build.__name__ = f"knresnet{depth}_seg"
    build.__doc__ = (
        f"KNResNet-{depth} for segmentation: a map of logits at 1/32 of the size; published mean IoU {miou} % on "
        f"Cityscapes, with 19 classes."
    )
    register_model(
        build,
        family="KNResNet (segmentation)",
        scheme="kn(p=0.1,eps=1e-5,final_p=0.5)",
        size=512,
        source="arXiv:2205.10089, figure 6, table 3",
    )


_segmentation(18, (2, 2, 2, 1), (128, 256, 512, 625), 64.37)
_segmentation(34, (4, 4, 4, 3), (128, 256, 256, 512), 67.61)
_segmentation(50, (4, 4, 4, 3), (128, 256, 458, 512), 68.02)


def knresnet13(
    scheme: Scheme,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width: int = 64,
    act: str = "relu",
    drop_rate: float = 0.0,
) -> Network:
    """KNResNet-13 for training with differential privacy on CIFAR-10, there with act=mish."""
    stages = [Stage(channels, channels, 1, (3, 3), kernel_size=3, pads=(1, 1, 1, 1)) for channels in (64, 64, 128, 256)]
    return KNResNet(
        scheme,
        _scaled(stages, _factor(width)),
        num_classes=num_classes,
        in_chans=in_chans,
        stem="cifar",
        positions=2,
        act=named_act(act),
        drop_rate=drop_rate,
        init=torch_init,
    )


register_model(
    knresnet13,
    family="KNResNet (private training)",
    scheme="kn(p=0.1,eps=1e-5,final_p=0.5)",
    size=32,
    source="arXiv:2210.00053 and its released code",
)
