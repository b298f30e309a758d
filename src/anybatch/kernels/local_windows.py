"""What all kernels of local context normalization refuse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anybatch.methods.local_context_norm import Window, windows_within


def refused_windows(x: Tensor, window: Window, channels_per_group: int, released: bool) -> str | None:
    """Why kernels do not take these windows of (N, C, *), or None."""
    if released:
        return "released=True has gradients of its own"
    if x.dim() < 3:
        return f"x of shape {tuple(x.shape)} has no positions"
    if channels_per_group < 1 or x.shape[1] % channels_per_group:
        return f"channels_per_group={channels_per_group} does not divide the {x.shape[1]} channels of x"
    try:
        windows = windows_within(window, x.shape[2:])
    except ValueError as error:
        return str(error)
    return "a window holds one value" if channels_per_group * math.prod(windows) == 1 else None


def refused_whole(
    x: Tensor, window: Window, channels_per_group: int = 2, *_: Any, released: bool = False, **__: Any
) -> str | None:
    """Why it is `group_norm` that computes with these windows, or None."""
    if refused_windows(x, window, channels_per_group, released) is not None:
        return None
    whole = windows_within(window, x.shape[2:]) == tuple(x.shape[2:])
    return "windows cover the map, so that it is group_norm's" if whole else None


def refused_compiled(*args: Any, **options: Any) -> str | None:
    """Why compiled code does not compute these windows anew, or None: it traces no kernel within another's."""
    return refused_whole(*args, **options) if torch.compiler.is_compiling() else None
