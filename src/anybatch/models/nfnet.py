"""Networks without normalization: NFNet-F0 to F7 and their wider kin, NF-ResNet, NF-RegNet, all of one kind of block.

Names of the submodules are timm's. The defaults are DeepMind's release: TensorFlow's padding, gains on the activations
with its constants, the tanh form of GELU, ReLU inside squeeze-excite. The scheme says the rest, so that the same
networks run with norms too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.methods.squeeze_excite import SqueezeExcite
from anybatch.models.blocks import Pieces
from anybatch.models.network import Level, Network
from anybatch.models.registry import register_model
from anybatch.scheme import Scheme, check_count, check_number, check_positive

Padding = Literal["same", "symmetric"]


class SamePad(nn.Module):
    """What TensorFlow's SAME puts around a map: ``ceil(size / stride)`` positions come out; more of it is behind.

    For kernels that leave no position out: of ``stride`` positions or more.
    """

    def __init__(self, kernel_size: int, stride: int, value: float = 0.0) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.value = kernel_size, stride, value

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size in reversed(x.shape[2:]):  # without a branch on it, so that it may be exported as a variable
            total = (-(-size // self.stride) - 1) * self.stride + self.kernel_size - size
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads, value=self.value)

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, value={self.value}"


def _pad(padding: Padding, kernel_size: int, stride: int, value: float = 0.0) -> tuple[nn.Module, int]:
    """What stands before a convolution or pooling, and its own padding."""
    if padding == "same" and stride > 1:
        return SamePad(kernel_size, stride, value), 0
    return nn.Identity(), (kernel_size - 1) // 2


class Shortcut(nn.Module):
    """The skip connection of a block that changes the shape: a 1 x 1 convolution, strided or behind average pooling.

    Args:
        pieces: The network's pieces.
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the block.
        pooled: Average over 2 x 2 positions, those outside the map not counted, in place of a stride.
        pool_gain: A factor behind that average. The published networks have 1, which loses variance: a factor of 4 for
            pixels without correlation, about 2.3 for natural images. With 2 pixels without correlation keep theirs.
    """

    def __init__(
        self, pieces: Pieces, in_channels: int, out_channels: int, stride: int, *, pooled: bool, pool_gain: float
    ) -> None:
        super().__init__()
        self.pool_gain = pool_gain if pooled and stride > 1 else 1.0
        self.pool = (
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if pooled and stride > 1 else nn.Identity()
        )
        self.conv = pieces.conv(in_channels, out_channels, 1, 1 if pooled else stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        return self.conv(x if self.pool_gain == 1 else self.pool_gain * x)


def _rounded(value: float, step: int) -> int:
    """The nearest multiple of ``step`` that is not more than a tenth below the value, as timm rounds; cut off for 1."""
    if step == 1:
        return int(value)
    nearest = max(step, int(value + step / 2) // step * step)
    return nearest + step if nearest < 0.9 * value else nearest


@dataclass(frozen=True)
class BlockShape:
    """What the blocks of a family share."""

    group_width: int | None = None
    """Channels in each group of the 3 x 3 convolutions; None for one group."""
    second: bool = False
    """A second 3 x 3 convolution."""
    squeeze: Literal["none", "middle", "last"] = "none"
    """Squeeze-excite behind the 3 x 3 convolutions, before their activation, or at the end of the branch."""
    squeeze_ratio: float = 0.5
    pooled: bool = True
    pool_gain: float = 1.0
    padding: Padding = "same"
    round_to: int = 1
    """Widths are rounded to multiples of it, as timm's are to 8."""

    def __post_init__(self) -> None:
        if self.padding not in ("same", "symmetric"):
            raise ValueError(f"padding must be 'same' or 'symmetric', got {self.padding!r}")
        check_number("se_ratio", self.squeeze_ratio, at_most=1)
        check_positive("pool_gain", self.pool_gain)
        check_count("round_to", self.round_to)

    def squeeze_excite(self, where: str, channels: int) -> nn.Module:
        if self.squeeze != where:
            return nn.Identity()
        return SqueezeExcite(channels, hidden=max(1, _rounded(channels * self.squeeze_ratio, self.round_to)))


class NFBlock(nn.Module):
    """A pre-activated bottleneck: 1 x 1, 3 x 3 with the stride, 3 x 3 again in NFNets, 1 x 1.

    Args:
        pieces: The network's pieces.
        in_channels: Of the input.
        out_channels: Of the output.
        middle: Channels of the 3 x 3 convolutions, rounded down to a multiple of the group width.
        stride: Of the first 3 x 3 convolution.
        shape: What the family's blocks share.

    Source:
        Brock et al. 2021, arXiv:2102.06171, appendix C.
    """

    def __init__(
        self, pieces: Pieces, in_channels: int, out_channels: int, middle: int, stride: int, shape: BlockShape
    ) -> None:
        super().__init__()
        groups = max(middle // shape.group_width, 1) if shape.group_width else 1
        middle = groups * (shape.group_width or middle)
        transition = stride > 1 or in_channels != out_channels
        self.norm1, self.act1 = pieces.norm_act(in_channels)
        self.join = pieces.join(transition=transition)
        self.downsample = (
            Shortcut(pieces, in_channels, out_channels, stride, pooled=shape.pooled, pool_gain=shape.pool_gain)
            if transition
            else None
        )
        self.conv1 = pieces.conv(in_channels, middle, 1)
        self.norm2, self.act2 = pieces.norm_act(middle)
        self.pad2, padding = _pad(shape.padding, 3, stride)
        self.conv2 = pieces.conv(middle, middle, 3, stride, groups=groups, padding=padding)
        self.norm2b, self.act2b = pieces.norm_act(middle) if shape.second else (nn.Identity(), nn.Identity())
        self.conv2b = pieces.conv(middle, middle, 3, groups=groups) if shape.second else nn.Identity()
        self.attn = shape.squeeze_excite("middle", middle)
        self.norm3, self.act3 = pieces.norm_act(middle)
        self.conv3 = pieces.conv(middle, out_channels, 1)
        self.attn_last = shape.squeeze_excite("last", out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # The published order: beta divides what the activation gives, which for GELU is not the same as before it.
        h = self.join.prepare(self.act1(self.norm1(x)))
        skip = x if self.downsample is None else self.downsample(h)
        h = self.conv2(self.pad2(self.act2(self.norm2(self.conv1(h)))))
        h = self.conv2b(self.act2b(self.norm2b(h)))
        h = self.conv3(self.act3(self.norm3(self.attn(h))))
        return self.join(self.attn_last(h), skip)


class DeepStem(nn.Module):
    """Four 3 x 3 convolutions, the first and last with stride 2, activations between; Brock et al. 2021, table 1."""

    def __init__(self, pieces: Pieces, in_chans: int, channels: int, padding: Padding) -> None:
        super().__init__()
        widths, strides = (in_chans, 16, 32, 64, channels), (2, 1, 1, 2)
        for i in range(4):
            pad, inner = _pad(padding, 3, strides[i])
            self.add_module(f"pad{i + 1}", pad)
            self.add_module(f"conv{i + 1}", pieces.conv(widths[i], widths[i + 1], 3, strides[i], padding=inner))
            norm, act = pieces.norm_act(widths[i + 1]) if i < 3 else (nn.Identity(), nn.Identity())
            self.add_module(f"norm{i + 1}", norm)
            self.add_module(f"act{i + 1}", act)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class PlainStem(nn.Module):
    """One convolution with stride 2, and in NF-ResNets maximum pooling with stride 2."""

    def __init__(self, pieces: Pieces, in_chans: int, channels: int, kernel_size: int, pool: bool, padding: Padding):
        super().__init__()
        self.pad, inner = _pad(padding, kernel_size, 2)
        self.conv = pieces.conv(in_chans, channels, kernel_size, 2, padding=inner)
        self.pool_pad, inner = _pad(padding, 3, 2, value=-float("inf")) if pool else (nn.Identity(), 0)
        self.pool = nn.MaxPool2d(3, 2, inner) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.pool_pad(self.conv(self.pad(x))))


class Head(nn.Module):
    """The classifier under the name that timm gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc: nn.Module = nn.Identity()


class NormalizerFreeNet(Network):
    """A stem, stages of `NFBlock`, perhaps a last 1 x 1 convolution, an activation, pooling, a classifier.

    Args:
        scheme: How it normalizes; the published networks have ``nf``.
        stem: ``"deep"`` (four convolutions, 1/4 of the size), ``"7x7"`` (and pooling, 1/4) or ``"3x3"`` (1/2).
        stem_channels: Channels behind the stem.
        widths: Channels of each stage.
        depths: Blocks in each stage.
        strides: Of each stage's first block.
        ratio: Channels of a block's 3 x 3 convolutions, over those of its output; or, where ``expand``, of its input.
        shape: What the blocks share.
        expand: Take ``ratio`` of a block's input, and 1 in the very first block, as NF-RegNets do.
        final_channels: Of the last 1 x 1 convolution; None for none.
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Of stochastic depth; see `anybatch.models.blocks.Pieces`.
        zero_classifier: Whether the classifier's weight starts at 0, as in NF-RegNets.

    Raises:
        ValueError: If a rate is not in [0, 1).

    Source:
        Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization", arXiv:2102.06171,
        section 4 and appendix C (NFNets); Brock, De and Smith 2021, arXiv:2101.08692 (NF-ResNet, NF-RegNet); details
        as in DeepMind's release.
    """

    classifier_name = "head.fc"

    def __init__(
        self,
        scheme: Scheme,
        *,
        stem: Literal["deep", "7x7", "3x3"],
        stem_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int],
        ratio: float,
        shape: BlockShape,
        expand: bool = False,
        final_channels: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_classifier: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        pieces = Pieces(scheme, blocks=sum(depths), drop_path_rate=drop_path_rate)
        if stem == "deep":
            self.stem = DeepStem(pieces, in_chans, stem_channels, shape.padding)
        else:
            self.stem = PlainStem(pieces, in_chans, stem_channels, int(stem[0]), stem == "7x7", shape.padding)
        channels, reduction = stem_channels, 2 if stem == "3x3" else 4
        levels = [Level(("stem",), channels, reduction)]
        self.stages = nn.Sequential()
        for i, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                of = width if not expand else channels
                middle = _rounded(of * (1 if expand and i == j == 0 else ratio), shape.round_to)
                stage.append(NFBlock(pieces, channels, width, middle, stride if j == 0 else 1, shape))
                channels = width
            self.stages.append(stage)
            reduction *= stride
            levels.append(Level((f"stages.{i}",), channels, reduction))
        self.levels = tuple(levels)
        self.final_conv = pieces.conv(channels, final_channels, 1) if final_channels else nn.Identity()
        channels = final_channels or channels
        self.final_norm, self.final_act = pieces.final_norm_act(channels)
        self.tail = ("final_conv", "final_norm", "final_act")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = Head()
        self._add_classifier(channels, num_classes, drop_rate)
        pieces.init(self)
        if zero_classifier and isinstance(self.head.fc, nn.Linear):
            nn.init.zeros_(self.head.fc.weight)


NFNET = BlockShape(group_width=128, second=True, squeeze="last")
NF_RESNET = BlockShape(pooled=False)
NF_REGNET = BlockShape(group_width=8, squeeze="middle")
GELU_NF = "nf(act=gelu_tanh,skip_gain=0,released=True)"


def _nfnet(name: str, doc: str, level: int, *, wide: bool, top1: float | None) -> None:
    """Register a network, with the rates of dropout and of stochastic depth at which it was trained on ImageNet."""
    widths = (384, 768, 2048, 2048) if wide else (256, 512, 1536, 1536)
    depths = tuple((level + 1) * depth for depth in (1, 2, 6, 3))
    train = (192, 224, 256, 320, 384, 416, 448, 480)[level]
    test = (256, 320, 352, 416, 512, 544, 576, 608)[level]
    drop_rate = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)[level]

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = drop_rate,
        drop_path_rate: float = 0.25,
        padding: Padding = "same",
        pool_gain: float = 1.0,
    ) -> Network:
        return NormalizerFreeNet(
            scheme,
            stem="deep",
            stem_channels=widths[0] // 2,
            widths=widths,
            depths=depths,
            strides=(1, 2, 2, 2),
            ratio=0.5,
            shape=replace(NFNET, padding=padding, pool_gain=pool_gain),
            final_channels=2 * widths[-1],
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )

    build.__name__, build.__doc__ = name, doc
    source = "arXiv:2102.06171, tables 1 and 3" if top1 else "arXiv:2102.06171"
    if level == 6 and top1:
        source += "; top-1 with sharpness-aware minimization"
    register_model(build, family="NFNet", scheme=GELU_NF, size=test, train_size=train, published=top1, source=source)


for _level, _top1 in enumerate((83.6, 84.7, 85.1, 85.7, 85.9, 86.0, 86.5, None)):
    _nfnet(f"nfnet_f{_level}", f"NFNet-F{_level}.", _level, wide=False, top1=_top1)
    _nfnet(f"nfnet_f{_level}_plus", f"NFNet-F{_level}+, wider.", _level, wide=True, top1=None)


def _nf_resnet(depth: int, depths: Sequence[int]) -> None:
    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        padding: Padding = "same",
        pooled: bool = False,
        pool_gain: float = 1.0,
        se_ratio: float = 0.0,
    ) -> Network:
        squeeze = "last" if se_ratio else "none"
        return NormalizerFreeNet(
            scheme,
            stem="7x7",
            stem_channels=64,
            widths=(256, 512, 1024, 2048),
            depths=depths,
            strides=(1, 2, 2, 2),
            ratio=0.25,
            shape=replace(
                NF_RESNET,
                padding=padding,
                pooled=pooled,
                pool_gain=pool_gain,
                squeeze=squeeze,
                squeeze_ratio=se_ratio,
            ),
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )

    build.__name__, build.__doc__ = f"nf_resnet{depth}", f"NF-ResNet-{depth}."
    scheme = "nf(skip_gain=0,released=True)"
    register_model(build, family="NF-ResNet", scheme=scheme, size=224, source="arXiv:2101.08692")


for _depth, _depths in {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
}.items():
    _nf_resnet(_depth, _depths)


def _nf_regnet(level: int, widths: Sequence[int], depths: Sequence[int], train: int, test: int) -> None:
    """Register a network, with the rates of dropout and of stochastic depth of DeepMind's release."""
    drop_rate = (0.2, 0.2, 0.3, 0.3, 0.4, 0.4)[level]

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = drop_rate,
        drop_path_rate: float = 0.1,
        padding: Padding = "same",
        pool_gain: float = 1.0,
        round_to: int = 1,
    ) -> Network:
        shape = replace(NF_REGNET, padding=padding, pool_gain=pool_gain, round_to=round_to)
        scaled = [_rounded(0.75 * width, round_to) for width in widths]
        final = 1280 * scaled[-1] // 440 if round_to == 1 else _rounded(0.75 * (1280 * widths[-1] // 440), round_to)
        return NormalizerFreeNet(
            scheme,
            stem="3x3",
            stem_channels=scaled[0],
            widths=scaled,
            depths=depths,
            strides=(2, 2, 2, 2),
            ratio=2.25,
            shape=shape,
            expand=True,
            final_channels=final,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_classifier=True,
        )

    build.__name__, build.__doc__ = f"nf_regnet_b{level}", f"NF-RegNet-B{level}."
    register_model(
        build,
        family="NF-RegNet",
        scheme="nf(act=silu,skip_gain=0,released=True)",
        size=test,
        train_size=train,
        source="arXiv:2101.08692",
    )


for _level, (_widths, _depths, _train, _test) in enumerate(
    (
        ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224),
        ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256),
        ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272),
        ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320),
        ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384),
        ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456),
    )
):
    _nf_regnet(_level, _widths, _depths, _train, _test)
