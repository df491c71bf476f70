"""What may be said of a handful of runs: means, interquartile means and comparisons, each with a 95 % interval.

The intervals are the stratified percentile bootstrap of Agarwal et al., "Deep reinforcement learning at the edge of the
statistical precipice" (2021): runs are drawn anew with replacement within each task, by `scipy.stats.bootstrap`. The
definitions are those of their `rliable`; `tests/test_tables.py` holds numbers that it gave. Of five runs or fewer such
an interval is too narrow, since it cannot know of values that no run had: read it as the least that is uncertain.

`strata` is a list of arrays (runs,), one for each task.
"""

import numpy as np
from scipy.stats import bootstrap, trim_mean

RESAMPLES = 5_000


def mean(*strata, axis=-1):
    """Each task's mean over its runs, then the mean of the tasks. strata: arrays (..., runs) -> (...)."""
    return np.mean([x.mean(axis) for x in strata], 0)


def interquartile_mean(*strata, axis=-1):
    """The mean of the middle half of all runs of all tasks; less moved by one odd run than the mean, and less blind to
    it than the median. Of fewer than four numbers it is their mean. strata: arrays (..., runs) -> (...)."""
    return trim_mean(np.concatenate(strata, axis), 0.25, axis)


def improvement(*strata, axis=-1):
    """How often a run of X is better than one of Y (an equal one counts half), mean over the tasks.

    strata: arrays (..., runs), of X for each task, then of Y for each task in the same order -> (...) in [0, 1].
    """
    half = len(strata) // 2
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(strata[:half], strata[half:])]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], 0)


def interval(statistic, strata) -> tuple[float, float]:
    """The 95 % interval of a statistic above. NaN, NaN where some task has a single run: nothing tells its spread."""
    if min(map(len, strata)) < 2:
        return float("nan"), float("nan")
    found = bootstrap(strata, statistic, paired=False, vectorized=True, n_resamples=RESAMPLES,
                      method="percentile", rng=0)  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def with_interval(statistic, strata) -> tuple[float, float, float]:
    """A statistic above, and its interval."""
    strata = [np.asarray(x, float) for x in strata]
    return float(statistic(*strata)), *interval(statistic, strata)
