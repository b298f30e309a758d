"""What every network offers beside its logits: features, a head that can be exchanged, checkpointing, a description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Level:
    """A map that a network offers."""

    modules: tuple[str, ...]
    """The submodules that lead to it from the level before, in order."""
    channels: int
    reduction: int
    """Input pixels from one position of the map to the next, along a side.

    A map has the input's size over it, rounded up or down, but for what padding and kernels of even size add: the last
    one of KNResNet-18 and 34 has 8 positions at 224 pixels and a reduction of 32.
    """


@torch.fx.wrap  # so that torch.fx, which runs a network without an input, passes it over
def _check_input(x: Tensor, in_chans: int, least: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_chans or min(x.shape[2:]) < least:
        raise ValueError(
            f"the network takes (N, {in_chans}, H, W) with sides of {least} pixels or more, got shape {tuple(x.shape)}"
        )


class Network(nn.Module):
    """A chain of submodules: levels, each ending in a map; a tail behind the last; pooling; a classifier.

    Families set the attributes below and the submodules they name, and inherit the rest. The methods are called as
    timm's; of their arguments those are there that say something here.

    Shape:
        (N, in_chans, H, W) to (N, num_classes); without classes, to (N, num_features).
    """

    levels: tuple[Level, ...]
    tail: tuple[str, ...] = ()
    """Submodules behind the last level that belong to the features, such as a last norm."""
    pool: tuple[str, ...] = ("avgpool",)
    """Submodules from the features to (N, num_features), or to a shape that flattening gives it."""
    classifier_name: str = "fc"
    """The name of the last submodule, with dots where it lies inside another."""
    num_features: int
    num_classes: int
    in_chans: int
    default_cfg: dict[str, Any]
    """How it was built (``architecture``, ``scheme``, ``options``) and for what images (``input_size``, ``mean``,
    ``std``, ``interpolation``, ``crop_pct``), with timm's keys; `anybatch.models.transforms` brings images to it."""
    min_size: int | None = None
    """Least side of an image, where it is more than the last level's reduction."""
    dense = False
    """Whether it gives a map of logits, and so does not tell images apart."""
    grad_checkpointing = False
    checkpointed: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Kinds of submodules that gradient checkpointing takes as a whole, beside the parts of an `nn.Sequential`."""

    def _add_classifier(self, num_features: int, num_classes: int, drop_rate: float) -> None:
        """Dropout at ``drop_rate`` and a linear classifier, the identity for 0 classes."""
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        self.num_features, self.num_classes = num_features, num_classes
        self.drop = nn.Dropout(drop_rate)
        _replace(self, self.classifier_name, self._new_classifier(num_features, num_classes))

    def _new_classifier(self, num_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

    def _run(self, names: Iterable[str], x: Tensor) -> Tensor:
        for name in names:
            module = self.get_submodule(name)
            parts = module if isinstance(module, nn.Sequential) else (module,)
            if self.grad_checkpointing and self.training and isinstance(module, (nn.Sequential, *self.checkpointed)):
                for part in parts:
                    x = checkpoint(part, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = module(x)
        return x

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        _check_input(x, self.in_chans, self.min_size or self.levels[-1].reduction)
        for level in self.levels:
            x = self._run(level.modules, x)
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        """The map from which the head pools, (N, num_features or other channels, H / reduction, W / reduction)."""
        for y in self._maps(x):
            x = y
        return self._run(self.tail, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a map that `forward_features` gave, or what the classifier takes."""
        x = self.drop(torch.flatten(self._run(self.pool, x), 1))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """The maps of some levels: the last ``indices`` of them, those with these numbers, or all."""
        wanted = _numbers(indices, len(self.levels))
        found = {i: y for i, y in enumerate(self._maps(x)) if i in wanted}
        return [found[i] for i in wanted]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """``num_chs``, ``reduction`` and ``module`` of each level."""
        return [
            {"num_chs": level.channels, "reduction": level.reduction, "module": level.modules[-1]}
            for level in self.levels
        ]

    def get_classifier(self) -> nn.Module:
        """The last layer: linear, or the identity."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for so many classes; 0 for none, which gives what it takes.

        Pooling stays what it is: ``global_pool`` is there for callers of timm's, and is None or ``"avg"``.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', as these networks pool, or None, got {global_pool!r}")
        like = next(self.parameters())
        made = self._new_classifier(self.num_features, num_classes)
        _replace(self, self.classifier_name, made.to(like.device, like.dtype))
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward, and compute the rest again.

        Layers that update statistics in training, such as BatchNorm, then update them twice a step.
        """
        self.grad_checkpointing = enable

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """``default_cfg`` under the name by which timm's functions ask for it."""
        return self.default_cfg

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``, from which `from_pretrained` builds the network again.

        Args:
            folder: Where; it is made where it is missing, and files of these names are replaced.

        Raises:
            ValueError: If the network cannot be built again from name, scheme and options, which is tried.
        """
        from anybatch.models import hub

        hub.save_pretrained(self, folder)

    @staticmethod
    def from_pretrained(
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Network:
        """The network that `save_pretrained` or `push_to_hub` wrote, in evaluation mode on the CPU; no code is run.

        Args:
            source: A folder, or ``"someone/something"``, a repository on the Hugging Face Hub, for which
                huggingface_hub must be installed; ``"hf-hub:someone/something"`` where there is such a folder too.
            revision: Of the repository: a branch, tag or commit.
            token: Of the account; None for the one that is logged in.
            cache_dir: Where downloads are kept; None for huggingface_hub's own place.
            local_files_only: Take what is kept there and ask no network.

        Raises:
            ValueError: If there is no such folder, the Hub does not give the files, or a file is missing, damaged or
                another library's.
            ImportError: If huggingface_hub is needed and missing.
        """
        from anybatch.models import hub

        return hub.from_pretrained(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Push model using anybatch",
        token: str | None = None,
    ) -> str:
        """What `save_pretrained` writes, to a repository on the Hugging Face Hub, made where it is missing.

        Args:
            repo_id: ``"someone/something"``.
            private: Whether a new repository is; None for the owner's default.
            commit_message: Of the commit.
            token: Of the account; None for the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            ImportError: If huggingface_hub is not installed.
        """
        from anybatch.models import hub

        return hub.push_to_hub(self, repo_id, private=private, message=commit_message, token=token)


class FeaturePyramid(nn.Module):
    """The maps of a network's levels as a list, for detection and segmentation; its head is gone.

    Args:
        network: The network; it is used, not copied.
        out_indices: Numbers of the levels to give, finest first; None for all.

    Shape:
        (N, in_chans, H, W) to a list of (N, C, H / reduction, W / reduction).
    """

    def __init__(self, network: Network, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = _numbers(out_indices, len(network.levels))
        network.reset_classifier(0)
        last = max(self.out_indices)
        for name in [*(n for level in network.levels[last + 1 :] for n in level.modules), *network.tail, *network.pool]:
            _replace(network, name, nn.Identity())
        network.levels, network.tail, network.min_size = network.levels[: last + 1], (), None
        self.network = network

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """``num_chs``, ``reduction`` and ``module`` of each map."""
        known = self.network.feature_info
        return [known[i] for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the network's."""
        self.network.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(x, self.out_indices)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _numbers(indices: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Numbers of levels, from the front; negative ones count from the last."""
    if indices is None:
        return tuple(range(count))
    if _is_whole(indices, 1, count):
        return tuple(range(count - indices, count))
    wanted = tuple(indices) if isinstance(indices, Iterable) else ()
    if not wanted or not all(_is_whole(i, -count, count - 1) for i in wanted):
        raise ValueError(
            f"there are {count} levels, numbered from 0 to {count - 1}; give the numbers of some, or how many of the "
            f"last; got {indices!r}"
        )
    return tuple(i % count for i in wanted)


def _is_whole(value: object, least: int, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
