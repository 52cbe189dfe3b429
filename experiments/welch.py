"""Welch's t-test, which all reports compare methods with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy import stats


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The p-value of Welch's t-test, None where it says nothing: for fewer than two values, or none that vary."""
    if min(len(first), len(second)) < 2 or (len({*first}) == 1 and len({*second}) == 1):
        return None
    moments = [(statistics.mean(values), statistics.stdev(values), len(values)) for values in (first, second)]
    return float(stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False).pvalue)
