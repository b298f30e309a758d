"""Our networks in timm's registry, so that ``timm.create_model`` builds them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from anybatch.models.network import FeaturePyramid, Network
from anybatch.models.registry import create_model, list_models, model_entry

__all__ = ["register_timm"]
_ENTERED: dict[str, str] = {}


def register_timm() -> dict[str, str]:
    """Enter our networks into timm's registry, under names that timm does not have.

    A network keeps its name where timm has none of that name (``knresnet18``); else the parts of its own scheme stand
    behind it (``resnet50_wsgn``, ``nf_resnet50_nf``, ``convnext_tiny_pn``), or, where timm has that one too,
    ``anybatch`` (``vgg11_anybatch``). Nothing of timm's is replaced, and a second call enters nothing twice.

    ``timm.create_model`` then takes our options (``scheme="gn"`` among them), and ``features_only=True`` gives a
    `FeaturePyramid` whose ``feature_info`` is timm's. ``pretrained=True`` is refused: there are no weights of ours.

    Returns:
        Our names by timm's, of all that are entered.

    Raises:
        ImportError: If timm is not installed.
    """
    try:
        from timm.models import is_model, register_model
    except ImportError:
        raise ImportError("register_timm needs timm: pip install 'anybatch[timm]'") from None
    for name in list_models():
        if name in _ENTERED.values():
            continue
        parts = "".join(re.findall(r"\w+", re.sub(r"\(.*?\)|:\w+|/\d+", "", model_entry(name).scheme)))
        told = next(told for told in (name, f"{name}_{parts}", f"{name}_anybatch") if not is_model(told))
        # timm adds the name to what this module exports, so that it must be there.
        globals()[told] = register_model(_entrypoint(told, name))
        _ENTERED[told] = name
    return dict(_ENTERED)


class _Pyramid(FeaturePyramid):
    @property
    def feature_info(self) -> Any:
        """timm's object in place of our list."""
        from timm.models import FeatureInfo

        return FeatureInfo(self.network.feature_info, self.out_indices)


def _entrypoint(told: str, name: str) -> Any:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        features_only: bool = False,
        out_indices: Any = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"{told} has no weights to download; load some with anybatch.models.load_weights")
        if pretrained_cfg is not None and not isinstance(pretrained_cfg, dict):
            raise ValueError(f"pretrained_cfg of {told} must be a dictionary, got {pretrained_cfg!r}")
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices={out_indices!r} goes with features_only=True")
        model = create_model(name, **options)
        if not isinstance(model, Network):
            raise ValueError(
                f"options {options} of {told} make no Network; timm asks for pyramids by features_only=True"
            )
        model.default_cfg.update(pretrained_cfg or {}, **pretrained_cfg_overlay or {})
        return _Pyramid(model, out_indices) if features_only else model

    build.__name__, build.__doc__ = told, model_entry(name).about
    return build
