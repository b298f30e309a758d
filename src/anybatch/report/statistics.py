"""Intervals for mean errors and their differences, from few seeds and a finite number of evaluation images.

Two things would come out differently if a study were run again. Other seeds give other weights: with n runs whose
errors have the sample variance s², their mean has the variance s²/n, known only as well as n runs allow, hence Student's
t. Other images would be evaluated: a mean error p over m images has the binomial variance p(1 - p)/m, and since all
seeds are evaluated on the same images, more seeds do not lower it. The half-width is ``sqrt((t s/√n)² + z² p(1 - p)/m)``.

- It is never narrower than Student's interval over the seeds. Adding variances first and approximating the degrees of
  freedom (Satterthwaite) would be, and with two seeds it errs up to ten times as often as it says: a small s is then
  believed that came about by luck.
- Where all seeds happen to agree, s = 0, the images still give a width; p is taken as (p m + 2) / (m + 4) (Agresti and
  Coull 1998), so that no errors at all do too.
- Part of the images' variance is in s² already, and in a difference of two cells it partly cancels, since both are
  evaluated on the same images. Rows don't tell how much, so both are counted whole: the interval errs on the wide side.
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
    """Variance of the mean over samples of evaluation images, in points squared."""

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
        images=100**2 * share * (1 - share) / images,
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
