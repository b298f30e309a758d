"""ConvNeXt: depthwise 7 x 7 convolutions, one norm and one activation a block.

With its own scheme, ``pn(eps=1e-6)``, it takes torchvision's state dict.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.models.blocks import Pieces, zero_bias
from anybatch.models.network import Level, Network
from anybatch.models.registry import register_model
from anybatch.scheme import Scheme, check_count, check_positive
from anybatch.schemes import scheme as parse_scheme


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, norm, 1 x 1 to four times the channels, activation, 1 x 1 back, times a scale for each channel.

    It loads torchvision's linear layers, (O, I), as 1 x 1 convolutions, (O, I, 1, 1).

    Args:
        pieces: The network's pieces.
        channels: Of input and output.
        layer_scale: Where the scales start.
    """

    def __init__(self, pieces: Pieces, channels: int, *, layer_scale: float) -> None:
        super().__init__()
        # Numbered as in torchvision, where 1 and 6 turn the dimensions.
        self.block = nn.Sequential(
            OrderedDict(
                {
                    "0": pieces.conv(channels, channels, 7, groups=channels, bias=True),
                    "2": pieces.norm(channels),
                    "3": pieces.conv(channels, 4 * channels, 1, bias=True),
                    "4": pieces.act(),
                    "5": pieces.conv(4 * channels, channels, 1, bias=True),
                }
            )
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.join = pieces.join()

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.join.prepare(x))
        h = (self.layer_scale * h).to(h.dtype)  # the scale is wider than h under autocast
        return self.join(h, x)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] (torch passes all by position)
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        for key in (f"{prefix}block.3.weight", f"{prefix}block.5.weight"):
            if key in state_dict and state_dict[key].dim() == 2:
                state_dict[key] = state_dict[key][:, :, None, None]
        super()._load_from_state_dict(state_dict, prefix, *args)


class ConvNeXt(Network):
    """A ConvNeXt.

    The published norm is over the channels of each position: the scheme ``pn(eps=1e-6)``. Another norm takes all its
    places: behind the stem, in the blocks, before each halving and before the classifier. A scheme's convolutions are
    those of the stem, of the halvings and of the blocks, depthwise and 1 x 1 ones alike: the released code's linear
    layers are 1 x 1 convolutions here. So ``ws`` standardizes a depthwise filter over its 49 values and a 1 x 1 filter
    over its channels, although the layer scale and no norm follows the latter, and ``kn`` normalizes before each
    convolution over all channels of its window. All convolutions have biases. A scheme's activation takes the place of
    GELU.

    Args:
        scheme: How it normalizes.
        depths: Blocks in each stage; each stage after the first halves the map and doubles the width.
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        width: Channels of the first stage.
        layer_scale: Where each branch's scales start.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability to leave out the last block's branch for a sample in training; it grows from 0 in
            equal steps from block to block.
        downsampling: Another scheme for the halvings alone, whose norm, if any, and activation, or ReLU, stand in front
            of the convolution; None for the same scheme and its norm alone. KNConvNeXt has ``kn(p=0.1,eps=1e-5)``.
        head_norm_first: Whether the last norm stands before pooling. As published it stands behind, where a map has one
            position: norms over positions, as in ``in``, or over a batch of 1 in ``bn``, have nothing to normalize
            there.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: If the width is below 1, ``layer_scale`` not above 0, or a rate not in [0, 1).

    Source:
        Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545, sections 2 and 3, appendix A. First weights: a
        normal with deviation 0.02, biases 0, as in the released code.
    """

    pool = ("avgpool", "classifier.0")
    classifier_name = "classifier.2"

    def __init__(
        self,
        scheme: Scheme,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 96,
        layer_scale: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        downsampling: Scheme | None = None,
        head_norm_first: bool = False,
    ) -> None:
        super().__init__()
        check_count("width", width)
        check_positive("layer_scale", layer_scale)
        pieces = Pieces(scheme, blocks=sum(depths), act=nn.GELU, drop_path_rate=drop_path_rate, full_rate_last=True)
        halving = None if downsampling is None else Pieces(downsampling)
        self.in_chans = in_chans
        channels, levels = width, []
        self.features = nn.Sequential()
        for i, depth in enumerate(depths):
            if i == 0:
                stem = pieces.conv(in_chans, channels, 4, 4, padding=0, bias=True)
                self.features.append(nn.Sequential(stem, pieces.norm(channels)))
            else:
                before = (pieces.norm(channels),) if halving is None else _filled(halving.norm_act(channels))
                conv = (halving or pieces).conv(channels, 2 * channels, 2, 2, padding=0, bias=True)
                self.features.append(nn.Sequential(*before, conv))
                channels *= 2
            blocks = [ConvNeXtBlock(pieces, channels, layer_scale=layer_scale) for _ in range(depth)]
            self.features.append(nn.Sequential(*blocks))
            levels.append(Level((f"features.{2 * i}", f"features.{2 * i + 1}"), channels, 4 * 2**i))
        self.levels = tuple(levels)
        if head_norm_first:
            self.tail, self.pool = ("classifier.0",), ("avgpool",)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(pieces.norm(channels), nn.Flatten())
        self._add_classifier(channels, num_classes, drop_rate)
        pieces.init(self, _first_weights)


def _filled(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if not isinstance(module, nn.Identity)]


def _first_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            zero_bias(module)


def _convnext(
    name: str,
    doc: str,
    depths: Sequence[int],
    width: int,
    drop_path_rate: float,
    published: float,
    *,
    downsampling: str = "",
    train_size: int = 224,
    source: str = "arXiv:2201.03545, table 1, trained on ImageNet-1K",
) -> None:
    """Register a network, with the rate of stochastic depth at which it was trained on ImageNet."""

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = width,
        layer_scale: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = drop_path_rate,
        downsampling: str = downsampling,
        head_norm_first: bool = False,
    ) -> Network:
        return ConvNeXt(
            scheme,
            depths,
            num_classes=num_classes,
            in_chans=in_chans,
            width=width,
            layer_scale=layer_scale,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            downsampling=parse_scheme(downsampling) if downsampling else None,
            head_norm_first=head_norm_first,
        )

    build.__name__, build.__doc__ = name, doc
    register_model(
        build,
        family="ConvNeXt",
        scheme="pn(eps=1e-6)",
        size=224,
        train_size=train_size,
        published=published,
        source=source,
    )


_convnext("convnext_tiny", "ConvNeXt-T.", (3, 3, 9, 3), 96, 0.1, 82.1)
_convnext("convnext_small", "ConvNeXt-S.", (3, 3, 27, 3), 96, 0.4, 83.1)
_convnext("convnext_base", "ConvNeXt-B.", (3, 3, 27, 3), 128, 0.5, 83.8)
_convnext(
    "knconvnext_tiny",
    "KNConvNeXt-T: ConvNeXt-T with ReLU and KNConv in the three halvings, normalized elsewhere as before.",
    (3, 3, 9, 3),
    96,
    0.1,
    81.25,
    downsampling="kn(p=0.1,eps=1e-5)",
    train_size=176,
    source="arXiv:2205.10089, section 5, 600 epochs of torchvision's recipe, with which ConvNeXt-T reached 80.87",
)
