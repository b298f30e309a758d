"""Batch normalization, the baseline: torch's own layers."""

from __future__ import annotations

from functools import partial

from torch import nn

from anybatch.scheme import Scheme, check_number


def bn(*, momentum: float = 0.1, eps: float = 1e-5) -> Scheme:
    """Batch normalization: statistics of the batch in training, running averages in evaluation.

    Training normalizes with the biased variance and averages the unbiased one, as torch does.

    Source:
        Ioffe and Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """
    check_number("momentum", momentum, at_most=1)
    check_number("eps", eps)
    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    one_d, two_d, three_d = (partial(layer, momentum=momentum, eps=eps) for layer in layers)
    return Scheme(name="bn", norm=(one_d, two_d, three_d), batch_independent=False, sources=("arXiv:1502.03167",))
