"""What our tensors are called in the checkpoints of other libraries and releases, and which shape they have there.

A layout is a set of substitutions on our names. What reads a checkpoint turns them around, so that importing and
exporting cannot disagree; spellings that occur beside the usual one are brought to it first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anybatch.models.convnext import ConvNeXt
from anybatch.models.densenet import DenseNet
from anybatch.models.network import Network
from anybatch.models.nfnet import NormalizerFreeNet
from anybatch.models.resnet import ResNet
from anybatch.models.vgg import VGG

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Patterns and what takes their place, applied to a name one after another."""
Shapes = Sequence[tuple[str, Callable[[Tensor], Tensor]]]
"""Patterns, and what brings a tensor of ours whose name has one to the shape it has there."""


@dataclass(frozen=True)
class Table:
    """One network's part in a layout."""

    rules: Rules = ()
    shapes: Shapes = ()

    def name(self, key: str) -> str:
        """What stands there under our name ``key``."""
        return _substituted(key, self.rules)

    def shaped(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of ours in the shape it has there."""
        for pattern, shape in self.shapes:
            if re.search(pattern, key):
                return shape(tensor)
        return tensor


@dataclass(frozen=True)
class Layout:
    """How a library or a release writes checkpoints."""

    about: str
    table: Callable[[Network], Table] = lambda model: Table()
    spelling: Rules = ()
    """From names that occur in files to those that the table gives."""
    left_out: str | None = None
    """Names of what has no place in our networks and may be there all the same."""
    knows: Callable[[Network], bool] = lambda model: True
    """Whether networks of this kind are written so."""
    transposed: bool = False
    """Whether filters are (H, W, I, O) and linear weights (I, O)."""

    def spelled(self, name: str) -> str | None:
        """The usual spelling of a name in a file, None for what may be left out."""
        name = _substituted(name, ((r"^(module\.|_orig_mod\.)+", ""), *self.spelling))
        return None if self.left_out and re.search(self.left_out, name) else name

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor as in a file, with its dimensions in torch's order."""
        if not self.transposed or tensor.dim() not in (2, 4):
            return tensor
        return tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor.t()


def _substituted(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _dims(count: int) -> Callable[[Tensor], Tensor]:
    """Dimensions of size 1 behind the others, as many more or fewer as it takes."""

    def shaped(tensor: Tensor) -> Tensor:
        sizes = tuple(tensor.shape)
        return tensor.reshape(sizes[:count] + (1,) * (count - len(sizes)))

    return shaped


def _plus(step: int, form: str) -> Callable[[re.Match[str]], str]:
    """The match with its numbered groups put into ``form``, the first one, a number, raised by ``step``."""
    return lambda match: form.format(int(match[1]) + step, *match.groups()[1:])


_STEM_AND_STAGES = (
    (r"^features\.0\.(\d)\.", r"stem.\1."),
    (r"^features\.([246])\.(\d)\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
)
_PREACTIVATED = Table(
    (
        (r"^conv1\.", "stem.conv."),
        (r"^layer(\d)\.(\d+)\.", _plus(-1, "stages.{}.blocks.{}.")),
        (r"\.bn(\d)\.", r".norm\1."),
        (r"downsample\.", "downsample.conv."),
        (r"^final_norm\.", "norm."),
        (r"^fc\.", "head.fc."),
    ),
    ((r"^fc\.weight$", _dims(4)),),
)
_TIMM: dict[type[Network], Table] = {
    NormalizerFreeNet: Table(
        ((r"join\.gain$", "skipinit_gain"),),
        ((r"conv\w*\.gain$", _dims(4)), (r"attn(_last)?\.fc\d\.weight$", _dims(4))),
    ),
    ConvNeXt: Table(
        (
            *_STEM_AND_STAGES,
            (r"block\.0\.", "conv_dw."),
            (r"block\.2\.", "norm."),
            (r"block\.3\.", "mlp.fc1."),
            (r"block\.5\.", "mlp.fc2."),
            (r"layer_scale$", "gamma"),
            (r"^classifier\.0\.", "head.norm."),
            (r"^classifier\.2\.", "head.fc."),
        ),
        ((r"block\.[35]\.weight$", _dims(2)), (r"layer_scale$", _dims(1))),
    ),
    VGG: Table(
        (
            (r"^classifier\.0\.", "pre_logits.fc1."),
            (r"^classifier\.3\.", "pre_logits.fc2."),
            (r"^classifier\.6\.", "head.fc."),
        ),
        (
            (r"^classifier\.0\.weight$", lambda t: t.unflatten(1, (-1, 7, 7))),
            (r"^classifier\.3\.weight$", _dims(4)),
        ),
    ),
}


def _timm(model: Network) -> Table:
    return _PREACTIVATED if _is_preactivated(model) else _TIMM.get(type(model), Table())


def _in_timm(model: Network) -> bool:
    """Whether the network, and not one of ours alone or with CIFAR's stem, is there."""
    if isinstance(model, VGG):
        return model.classifier_name == "classifier.6"
    known = isinstance(model, (ResNet, DenseNet, ConvNeXt, NormalizerFreeNet))
    return known and model.levels[0].reduction > 1


def _in_torchvision(model: Network) -> bool:
    return _in_timm(model) and not isinstance(model, NormalizerFreeNet) and not _is_preactivated(model)


def _is_preactivated(model: Network) -> bool:
    first: Any = getattr(model, "layer1", [None])
    return isinstance(model, ResNet) and first[0].preactivated


def _torchvision(model: Network) -> Table:
    linear = ((r"block\.[35]\.weight$", _dims(2)),)
    return Table((), linear) if isinstance(model, ConvNeXt) else Table()


def _deepmind(model: Network) -> Table:
    """Haiku's names without the root, blocks numbered through the network."""
    stages = model.get_submodule("stages") if isinstance(model, NormalizerFreeNet) else nn.Sequential()
    blocks = [f"stages.{s}.{b}" for s, stage in stages.named_children() for b, _ in stage.named_children()]
    numbers = {block: i for i, block in enumerate(blocks)}
    return Table(
        (
            (r"(?<=conv)(\d)", _plus(-1, "{}")),
            (r"^stem\.conv(\d)", r"stem_conv\1"),
            (r"^stem\.conv\.", "initial_conv."),
            (r"^(stages\.\d+\.\d+)\.", lambda m: f"block{numbers.get(m[1], m[1])}."),
            (r"join\.gain$", "skip_gain"),
            (r"downsample\.conv\.", "conv_shortcut."),
            (r"attn(_last)?\.fc1\.", "squeeze_excite.linear."),
            (r"attn(_last)?\.fc2\.", "squeeze_excite.linear_1."),
            (r"^head\.fc\.", "linear."),
        )
    )


def _bit(model: Network) -> Table:
    if not _is_preactivated(model):
        return Table()
    letter = {"1": "a", "2": "b", "3": "c"}
    return Table(
        (
            (r"^conv1\.", "root_block.standardized_conv2d."),
            (r"^layer(\d)\.(\d+)\.", lambda m: f"block{m[1]}.unit{int(m[2]) + 1:02d}."),
            (r"\.conv([123])\.", lambda m: f".{letter[m[1]]}.standardized_conv2d."),
            (r"\.bn([123])\.", lambda m: f".{letter[m[1]]}.group_norm."),
            (r"downsample\.", "a.proj.standardized_conv2d."),
            (r"^final_norm\.", "group_norm."),
            (r"^fc\.", "head.conv2d."),
        )
    )


LAYOUTS: dict[str, Layout] = {
    "anybatch": Layout("our own"),
    "torchvision": Layout(
        "ResNet, ResNeXt, wide ResNet, VGG, DenseNet (with old names, norm.1 for norm1, too) and ConvNeXt",
        _torchvision,
        ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
        knows=_in_torchvision,
    ),
    "timm": Layout(
        "dm_nfnet, nf_resnet, nf_regnet, resnet*_gn, resnetv2, vgg, densenet and convnext", _timm, knows=_in_timm
    ),
    "knresnet": Layout("the KNResNet release", spelling=((r"\.conv1x1\.", "."),)),
    "ws": Layout("the releases of Weight Standardization and Batch-Channel Norm", left_out=r"\.estbn_moving_speed$"),
    "mmcv": Layout(
        "backbones of mmdetection and its kin, with ConvAWS too; necks and heads but a classifier are left out",
        spelling=((r"^backbone\.", ""), (r"^head\.fc\.", "fc."), (r"(^|\.)gn(\d)\.", r"\1bn\2.")),
        left_out=r"^(neck|\w*head|data_preprocessor)\.",
    ),
    "deepmind": Layout(
        "haiku's parameters of NFNet, NF-ResNet and NF-RegNet",
        _deepmind,
        (
            (r"/~/|/", "."),
            (r"^NF(Net|_ResNet|_RegNet)\.", ""),
            (r"^nf_(?:res_)?block(?=\.)", "block0"),
            (r"^nf_(?:res_)?block_", "block"),
            (r"\.w$", ".weight"),
            (r"\.b$", ".bias"),
        ),
        knows=lambda model: isinstance(model, NormalizerFreeNet),
        transposed=True,
    ),
    "bit": Layout(
        "Google's BiT",
        _bit,
        ((r"/", "."), (r"^resnet\.", ""), (r"\.(kernel|gamma)$", ".weight"), (r"\.beta$", ".bias")),
        knows=_is_preactivated,
        transposed=True,
    ),
}

_WS = "scheme ws(variant=paper)+gn for the WS release, ws(variant=bcn)+bcn for BCN's"
SAME_OUTPUTS: dict[tuple[str, str], str] = {
    ("timm", "NFNet"): "scheme nf(act=gelu,released=True,eps_rule=add)",
    (
        "timm",
        "NF-ResNet",
    ): "scheme nf(skip_gain=None,released=True,fold_gain=True,eps_rule=add), padding=symmetric, pooled=True",
    ("timm", "NF-RegNet"): (
        "scheme nf(act=silu,skip_gain=None,released=True,fold_gain=True,eps_rule=add), padding=symmetric, round_to=8"
    ),
    ("timm", "PreAct-ResNet"): "for BiT scheme ws(eps=1e-08)+gn, stem=bit, and images scaled to -1 .. 1",
    ("bit", "PreAct-ResNet"): "scheme ws(variant=bit)+gn, stem=bit, and images scaled to -1 .. 1",
    ("ws", "ResNet"): _WS,
    ("ws", "ResNeXt"): _WS,
    ("mmcv", "ResNet"): "scheme ws(variant=aws)+bn for ConvAWS, ws(variant=paper)+gn for ConvWS",
}
"""With what a network computes the outputs that a layout's weights were trained for, where it is not the default."""
