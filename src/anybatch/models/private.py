"""Small kernel-normalized networks for training with differential privacy; `knresnet13` is one more.

Convolutions are 3 x 3 and each image is normalized on its own, so that gradients for each sample are well defined. They
were published without shapes beside 32 pixels, and with the activation ``"relu"`` or ``"mish"``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from anybatch.models.blocks import Pieces, named_act, torch_init
from anybatch.models.densenet import DenseNet
from anybatch.models.network import Level, Network
from anybatch.models.registry import register_model
from anybatch.models.resnet import PreActBasicBlock, ResNet
from anybatch.scheme import Scheme, check_count

FAMILY = "KN (private training)"
SOURCE = "arXiv:2210.00053 and its released code"


class Block(nn.Module):
    """``x`` plus twice a 3 x 3 convolution with norm and activation behind it, and no activation behind the sum."""

    def __init__(self, pieces: Pieces, channels: int) -> None:
        super().__init__()
        self.join = pieces.join()
        self.conv1 = pieces.conv(channels, channels, 3)
        self.norm1, self.activ1 = pieces.norm_act(channels, behind=self.conv1)
        self.conv2 = pieces.conv(channels, channels, 3)
        self.norm2, self.activ2 = pieces.norm_act(channels, behind=self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activ1(self.norm1(self.conv1(self.join.prepare(x))))
        return self.join(self.activ2(self.norm2(self.conv2(h))), x)


class ResNet8(Network):
    """Two residual blocks of 128 and 256 channels, activations behind the convolutions.

    Args:
        scheme: How it normalizes; ``kn(p=0.1,eps=1e-5)`` as published. Its norm before the head, or its norm,
            follows the last pooling.
        num_classes: Outputs of the classifier; 0 for none, which gives what it takes.
        in_chans: Channels of the input.
        width: Channels of the first convolution; 64 as published. The others have twice and four times as many.
        act: The network's own activation, where the scheme brings none; None for ReLU.
        drop_rate: Dropout before the classifier.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: If the width is below 1 or ``drop_rate`` not in [0, 1).

    Source:
        Nasirigerdeh et al. 2022, "Kernel Normalized Convolutional Networks for Privacy-Preserving Machine Learning",
        arXiv:2210.00053, and its released code, whose names the submodules have. First weights: torch's.
    """

    min_size = 8

    def __init__(
        self,
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        act: Callable[[], nn.Module] | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("width", width)
        self.in_chans = in_chans
        pieces = Pieces(scheme, blocks=2, act=act)
        widths = (in_chans, width, 2 * width, 4 * width)
        for i in (1, 2, 3):
            conv = pieces.conv(widths[i - 1], widths[i], 3)
            block = nn.Sequential(conv, *pieces.norm_act(widths[i], behind=conv))
            if i > 1:
                block.append(nn.MaxPool2d(2))
                self.add_module(f"res_block{i - 1}", Block(pieces, widths[i]))
            self.add_module(f"conv_block{i}", block)
        self.levels = (
            Level(("conv_block1",), width, 1),
            Level(("conv_block2", "res_block1"), 2 * width, 2),
            Level(("conv_block3", "res_block2"), 4 * width, 4),
        )
        self.max_pool = nn.MaxPool2d(2)
        self.knorm = pieces.final_norm(4 * width)
        self.tail = ("max_pool", "knorm")
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self._add_classifier(16 * width, num_classes, drop_rate)
        pieces.init(self, torch_init)


def resnet8_kn(
    scheme: Scheme,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width: int = 64,
    act: str = "relu",
    drop_rate: float = 0.0,
) -> Network:
    """ResNet-8 of the works on private training: two blocks, kernel-normalized, activations behind convolutions."""
    return ResNet8(
        scheme, num_classes=num_classes, in_chans=in_chans, width=width, act=named_act(act), drop_rate=drop_rate
    )


def densenet20x16_kn(
    scheme: Scheme,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    growth: int = 16,
    act: str = "relu",
    drop_rate: float = 0.0,
) -> Network:
    """DenseNet of 20 layers and growth 16 for private training: 3 x 3 transitions that keep the channels."""
    return DenseNet(
        scheme,
        growth,
        (5, 5, 5),
        num_classes=num_classes,
        in_chans=in_chans,
        stem="cifar",
        bottleneck=False,
        stem_channels=2 * growth,
        transition_kernel=3,
        act=named_act(act),
        init=torch_init,
        drop_rate=drop_rate,
    )


def preact_resnet18_kn(
    scheme: Scheme,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width: int = 64,
    act: str = "relu",
    drop_rate: float = 0.0,
) -> Network:
    """Pre-activation ResNet-18 at full size, kernel-normalized, for private training."""
    return ResNet(
        scheme,
        PreActBasicBlock,
        (2, 2, 2, 2),
        num_classes=num_classes,
        in_chans=in_chans,
        width=width,
        stem="cifar",
        act=named_act(act),
        init=torch_init,
        drop_rate=drop_rate,
    )


register_model(resnet8_kn, family=FAMILY, scheme="kn(p=0.1,eps=1e-5)", size=32, source=SOURCE)
for _build in (densenet20x16_kn, preact_resnet18_kn):
    register_model(_build, family=FAMILY, scheme="kn(p=0.1,eps=1e-5,final_p=0.5)", size=32, source=SOURCE)
