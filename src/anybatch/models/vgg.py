"""VGG: plain chains of 3 x 3 convolutions, with ImageNet's head of three linear layers or a small one.

With the scheme ``bn`` names and shapes of the parameters are torchvision's, as in its ``vgg16_bn``; so they are with
``none``, as in its ``vgg16``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anybatch.models.blocks import Pieces
from anybatch.models.network import Level, Network
from anybatch.models.registry import TORCHVISION, register_model
from anybatch.scheme import Scheme, check_count


class VGG(Network):
    """A chain of convolutions, each with norm and activation behind it, and a pooling behind each stage.

    The paper has no norms: that is the scheme ``none``. Convolutions have biases whatever the scheme, as in torchvision
    and other releases. The two hidden linear layers are plain ones in every scheme, with no norm.

    Args:
        scheme: How it normalizes.
        depths: Convolutions in each of the five stages, each of which ends by halving the map.
        num_classes: Outputs of the classifier; 0 for none, which gives what it takes.
        in_chans: Channels of the input.
        width: Channels of the first stage. The others have 2, 4, 8 and 8 times as many, a hidden layer 64 times.
        stem: ``"imagenet"`` (7 x 7 pooled positions and two hidden layers) or ``"cifar"``, for small images (one pooled
            position and no hidden layer). It changes the head alone; the name is what other networks call this choice.
        drop_rate: Dropout behind each hidden layer, or before the classifier where there is none.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: If the stem is unknown, or the width below 1.

    Source:
        Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        arXiv:1409.1556, table 1. First weights: He's normal for convolutions, deviation 0.01 and biases 0 for linear
        layers, as torchvision's; the paper starts from a shallower trained network.
    """

    def __init__(
        self,
        scheme: Scheme,
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        stem: str = "imagenet",
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        check_count("width", width)
        pieces = Pieces(scheme)
        self.in_chans = in_chans
        self.features = nn.Sequential()
        levels, pending, channels = [], [], in_chans
        for i, depth in enumerate(depths):
            for _ in range(depth):
                conv = pieces.conv(channels, width * min(2**i, 8), 3, bias=True)
                channels = width * min(2**i, 8)
                # What the scheme leaves out takes no place, as in torchvision's two numberings.
                for module in (conv, *pieces.norm_act(channels, behind=conv)):
                    if type(module) is not nn.Identity:
                        pending.append(f"features.{len(self.features)}")
                        self.features.append(module)
            levels.append(Level(tuple(pending), channels, 2**i))
            pending = [f"features.{len(self.features)}"]
            self.features.append(nn.MaxPool2d(2))
        self.levels = (*levels, Level(tuple(pending), channels, 2 ** len(depths)))
        if stem == "imagenet":
            hidden = 64 * width
            self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(7), nn.Flatten()
            self.classifier = nn.Sequential(
                nn.Linear(channels * 7 * 7, hidden),
                pieces.act(),
                nn.Dropout(drop_rate),
                nn.Linear(hidden, hidden),
                pieces.act(),
            )
            self.pool = ("avgpool", "flatten", *(f"classifier.{i}" for i in range(len(self.classifier))))
            self.classifier_name = "classifier.6"  # 5 is the dropout that every network has before its classifier
            self._add_classifier(hidden, num_classes, drop_rate)
        elif stem == "cifar":
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier_name = "classifier"
            self._add_classifier(channels, num_classes, drop_rate)
        else:
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        pieces.init(self)

    def _run(self, names: Iterable[str], x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:  # a level at a time, since no submodule is a chain of blocks
            return checkpoint(super()._run, names, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return super()._run(names, x)


KERNEL_NORMALIZED = "ours, of arXiv:1409.1556 and arXiv:2205.10089"


def _vgg(name: str, doc: str, depths: Sequence[int], published: float | None, scheme: str, source: str) -> None:
    """Register a network by the paper's table 1."""

    def build(
        scheme: Scheme,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        stem: str = "imagenet",
        drop_rate: float = 0.5,
    ) -> Network:
        return VGG(
            scheme, depths, num_classes=num_classes, in_chans=in_chans, width=width, stem=stem, drop_rate=drop_rate
        )

    build.__name__, build.__doc__ = name, doc
    register_model(build, family="VGG", scheme=scheme, size=224, published=published, source=source)


for _letter, _depths, _top1 in (
    ("A", (1, 1, 2, 2, 2), 70.370),
    ("B", (2, 2, 2, 2, 2), 71.586),
    ("D", (2, 2, 3, 3, 3), 73.360),
    ("E", (2, 2, 4, 4, 4), 74.218),
):
    _layers = sum(_depths) + 3
    _doc = f"VGG of {_layers} layers, the paper's configuration {_letter}"
    _vgg(f"vgg{_layers}", f"{_doc}.", _depths, _top1, "bn", f"arXiv:1409.1556; {TORCHVISION}")
    _doc += ", kernel-normalized: our reading of KNVGG, whose own layers could not be had."
    _vgg(f"knvgg{_layers}", _doc, _depths, None, "kn(eps=1e-5)", KERNEL_NORMALIZED)
