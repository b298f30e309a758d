"""Stochastic depth: in training a residual branch is left out for samples drawn at random."""

from __future__ import annotations

from torch import Tensor, nn

from anybatch.scheme import check_rate


def stochastic_depth(branch: Tensor, p: float, *, training: bool = True, scale_by_keep: bool = False) -> Tensor:
    """Set the branch of each sample to 0 with probability p, independently of the other samples.

    ``y_n = branch_n * m_n``, ``m_n`` 1 with probability 1 - p, else 0; with ``scale_by_keep``, ``m_n / (1 - p)``, so
    that the mean over the draws is ``branch``, as in torchvision (``mode="row"``) and timm, which draw the same numbers
    as this function. Without it, as the normalizer-free networks were trained, a branch counts ``1 / (1 - p)`` times as
    much in evaluation as on average in training. In evaluation nothing is drawn, and the branch comes back as it is.
    The original paper drops a block for the whole batch, and scales by ``1 - p`` in evaluation.

    Args:
        branch: (N, *), floating point; the result keeps its memory format.
        p: Probability to drop, from 0 to below 1.
        training: Whether to drop at all.
        scale_by_keep: Whether to divide what is kept by ``1 - p``.

    Returns:
        (N, *), with the dtype of ``branch``.

    Raises:
        ValueError: If ``p`` is not in [0, 1).

    Source:
        Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382, eq. 2; for each sample and unscaled:
        the released code of Brock et al. 2021, arXiv:2102.06171.
    """
    check_rate("p", p)
    if p == 0 or not training:
        return branch
    mask = branch.new_empty((branch.shape[0], *(1 for _ in branch.shape[1:]))).bernoulli_(1 - p)
    return branch * (mask.div_(1 - p) if scale_by_keep else mask)


class StochasticDepth(nn.Module):
    """Stochastic depth as a layer at the end of a branch; see `anybatch.functional.stochastic_depth`.

    Args:
        p: Probability to drop a sample's branch in training, from 0 to below 1.
        scale_by_keep: Whether to divide what is kept by ``1 - p``.

    Shape:
        (N, *) to (N, *).

    Raises:
        ValueError: If ``p`` is not in [0, 1).

    Source:
        Huang et al. 2016, arXiv:1603.09382, eq. 2.

    >>> StochasticDepth(0.5).eval()(Tensor([[1], [1]]))
    tensor([[1.],
            [1.]])
    """

    def __init__(self, p: float, *, scale_by_keep: bool = False) -> None:
        super().__init__()
        check_rate("p", p)
        self.p = p
        self.scale_by_keep = scale_by_keep

    def forward(self, branch: Tensor) -> Tensor:
        return stochastic_depth(branch, self.p, training=self.training, scale_by_keep=self.scale_by_keep)

    def extra_repr(self) -> str:
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}"
