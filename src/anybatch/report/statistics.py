"""Intervals for mean errors and their differences, from few seeds and a finite number of evaluation images.

Each run is taken as if it had been evaluated on its own sample of images. The mean over n seeds then has the variance
s²/n, s being the seeds' standard deviation, which n runs tell poorly (hence Student's t). Part of that is known
beforehand, the binomial p(1 - p)/(m n) for m images, and few seeds may show less than it by luck, so it is added in
quadrature: the half-width is ``sqrt((t s/√n)² + z² p(1 - p)/(m n))``.

- It is never narrower than Student's interval over the seeds. Adding the variances first and approximating the degrees
  of freedom (Satterthwaite) can be; simulated with two seeds and ten comparisons it errs up to ten times as often as it
  says, since it believes a small s.
- Where all seeds happen to agree, s = 0, it keeps a width; p is taken as (p m + 2) / (m + 4) (Agresti and Coull 1998),
  so that it does without any errors too.
- In fact all runs see the same images. Others may be easier or harder for all schemes alike, which the interval of a
  single mean leaves out: it would need p(1 - p)/m undivided. From differences this cancels as far as schemes err on the
  same images; rows don't tell how far. Simulated for equal schemes at an error of 4.5 %, with 1300 images redrawn each
  time, 2 to 5 seeds and difficulties correlated by 0.7 to 1, the interval erred no more often than it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean error in percent."""

    mean: float
    n: int
    """Seeds."""
    seeds: float | None
    """Variance of the mean over seeds, in points squared; None with one seed."""
    images: float
    """What the sampling of evaluation images contributes to the variance of the mean at least, in points squared."""

    def half_width(self, level: float = LEVEL) -> float | None:
        """Of the interval around the mean, in points; None with one seed."""
        if self.seeds is None:
            return None
        return _half_width(self.seeds, self.n - 1, self.images, level)


def estimate(errors: Sequence[float], images: int) -> Estimate:
    """The mean of one cell.

    Args:
        errors: In percent, one a seed, at least one.
        images: m, how many each seed was evaluated on.
    """
    mean = fmean(errors)
    share = (mean / 100 * images + 2) / (images + 4)
    return Estimate(
        mean=mean,
        n=len(errors),
        seeds=variance(errors) / len(errors) if len(errors) > 1 else None,
        images=100**2 * share * (1 - share) / (images * len(errors)),
    )


def difference(a: Estimate, b: Estimate, *, comparisons: int = 1, level: float = LEVEL) -> tuple[float, float | None]:
    """``a - b`` in points, and the half-width of its interval, which holds for all ``comparisons`` at once.

    Over the seeds it is Welch's t, so that cells may scatter differently; Bonferroni makes it simultaneous.
    The half-width is None where either has one seed.
    """
    if a.seeds is None or b.seeds is None:
        return a.mean - b.mean, None
    seeds = a.seeds + b.seeds
    freedom = seeds**2 / (a.seeds**2 / (a.n - 1) + b.seeds**2 / (b.n - 1)) if seeds > 0 else 1.0
    return a.mean - b.mean, _half_width(seeds, freedom, a.images + b.images, 1 - (1 - level) / comparisons)


def _half_width(seeds: float, freedom: float, images: float, level: float) -> float:
    upper = (1 + level) / 2
    return math.hypot(
        float(stats.t.ppf(upper, freedom)) * math.sqrt(seeds), float(stats.norm.ppf(upper)) * math.sqrt(images)
    )
