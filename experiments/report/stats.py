"""Statistics of few runs, from SciPy: intervals of means and contrasts, interquartile means across tasks,
probability of improvement, performance profiles. Scores of one method are a list with one array per task,
one number per seed in each (Agarwal et al. 2021, arXiv 2108.13264). Extra `bench`.
"""

import math

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2_000
FEWEST = 5  # values in a group from which the bootstrap says anything; of 5 in each of 3 tasks it covers 0.90


def mean_interval(values) -> tuple[float, float, float]:
    """Mean of values [n] and the ends of its 95 % interval by Student's t; NaN ends for one value."""
    return contrast([(1.0, values)])


def contrast(terms) -> tuple[float, float, float]:
    """Σ w mean(x) over terms (w, x [n]) with its 95 % interval: Welch's, with Satterthwaite's degrees of
    freedom, so that groups may differ in size and spread. NaN ends where a group has one value."""
    groups = [(weight, np.asarray(values, float)) for weight, values in terms]
    if min(len(values) for _, values in groups) < 2:
        return float(sum(weight * values.mean() for weight, values in groups)), math.nan, math.nan
    return welch([(weight, values.mean(), values.var(ddof=1), len(values)) for weight, values in groups])


def welch(groups) -> tuple[float, float, float]:
    """The same of groups (w, mean, variance, n)."""
    estimate = float(sum(weight * mean for weight, mean, _, _ in groups))
    parts = [(weight**2 * variance / count, count - 1) for weight, _, variance, count in groups]
    total = sum(part for part, _ in parts)
    if total == 0:
        return estimate, estimate, estimate
    freedom = total**2 / sum(part**2 / free for part, free in parts)
    half = math.sqrt(total) * stats.t.ppf(0.5 + LEVEL / 2, freedom)
    return estimate, float(estimate - half), float(estimate + half)


def share_interval(successes: int, count: int) -> tuple[float, float, float]:
    """successes / count with its 95 % interval (Wilson)."""
    interval = stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return successes / count, float(interval.low), float(interval.high)


def interquartile_mean(*tasks, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all scores, tasks and seeds pooled; arrays [.., seeds] per task."""
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def bootstrapped(statistic, groups, seed: int = 0) -> tuple[float, float, float]:
    """statistic(*groups, axis) with its 95 % interval by the percentile bootstrap; each group is resampled by
    itself: strata are tasks (and methods). NaN ends where a group has fewer than FEWEST values: to resample
    two or three makes an interval far too narrow."""
    groups = [np.asarray(group, float) for group in groups]
    estimate = float(statistic(*groups, axis=-1))
    if min(len(group) for group in groups) < FEWEST:
        return estimate, math.nan, math.nan
    rule = {"n_resamples": RESAMPLES, "method": "percentile", "confidence_level": LEVEL}
    rule |= {"vectorized": True, "axis": -1, "rng": np.random.default_rng(seed)}
    found = stats.bootstrap(groups, statistic, **rule).confidence_interval
    return estimate, float(found.low), float(found.high)


def improvement(x, y, seed: int = 0) -> tuple[float, float, float]:
    """Probability that a run of x beats one of y on the same task, ties half, mean over tasks (lists of
    arrays); with its 95 % interval by the stratified bootstrap."""
    count = len(x)

    def statistic(*groups, axis=-1):
        firsts, seconds = groups[:count], groups[count:]
        wins = [np.sign(a[..., :, None] - b[..., None, :]).mean((-2, -1))
                for a, b in zip(firsts, seconds, strict=True)]  # fmt: skip
        return 0.5 + 0.5 * np.mean(wins, axis=0)

    return bootstrapped(statistic, [*x, *y], seed)


def profile(tasks, levels) -> np.ndarray:
    """Share of runs above each level [k], tasks weighing equally (lists of arrays) -> [k]."""
    return np.mean([(np.asarray(t)[None] > np.asarray(levels)[:, None]).mean(1) for t in tasks], axis=0)
