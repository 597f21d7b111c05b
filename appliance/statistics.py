"""What chance makes: intervals of mean losses, and the tests by which models and releases are compared. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
SIGN_FLIPS = 1 << 14
"""Sign patterns that a paired test looks at: all of them up to 14 rows, else so many drawn."""
SEED = 17
ROWS_AT_ONCE = 64

Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """One model against another on the same rows."""

    difference: float
    """Nats a token that the first is worse by; below 0: better."""
    interval: Interval | None
    """The 95 % confidence interval of the difference; None for a single row."""
    p_worse: float
    """How likely chance makes the first so much worse, or more, were the two alike: one-sided, and of n rows never
    below 1 in 2^n, because few rows prove little."""


def mean_interval(nats: Sequence[float], tokens: Sequence[float]) -> Interval | None:
    """The 95 % confidence interval of the mean loss a token, from each row's nats and its number of trained tokens.

    Rows are what was drawn, not tokens, so the mean is a ratio of two sums over rows, and its standard error that of
    the jackknife: of the means without one row each (Tukey 1958; Efron and Tibshirani 1993, chapter 11), with Student's
    t for few rows. Where each row counts as one, `tokens` are ones, and this is the interval of a plain mean. None for
    a single row, which says nothing of others.
    """
    import numpy

    of_row, weight = numpy.asarray(nats, float), numpy.asarray(tokens, float)
    count = len(of_row)
    if count < 2:
        return None
    without = (of_row.sum() - of_row) / (weight.sum() - weight)
    error = math.sqrt((count - 1) * float(without.var()))
    mean, half = float(of_row.sum() / weight.sum()), student_quantile(count - 1) * error
    return mean - half, mean + half


def paired(first: Sequence[float], second: Sequence[float], tokens: Sequence[float]) -> Paired:
    """Compare the nats that two models lose on the same rows of so many trained tokens each.

    The test flips signs of the rows' differences (Fisher 1935, The Design of Experiments, section 21): were the two
    alike, each difference would be as likely with the other sign. All flips are looked at where rows are few, else a
    seeded draw of them, with what was found counted as one more (Phipson and Smyth 2010).
    """
    import numpy

    differences, weight = numpy.asarray(first, float) - numpy.asarray(second, float), numpy.asarray(tokens, float)
    found = float(differences.sum())
    flipped = _flipped_sums(differences)
    # Sums of the same numbers in another order differ by rounding.
    as_large = int((flipped >= found - 1e-9 * float(numpy.abs(differences).sum())).sum())
    every = 1 << len(differences)
    drawn = every > SIGN_FLIPS
    p_worse = (as_large + drawn) / ((SIGN_FLIPS if drawn else every) + drawn)
    return Paired(found / float(weight.sum()), mean_interval(differences.tolist(), tokens), p_worse)


def _flipped_sums(differences: Any) -> Any:
    """Sums of `differences` [n] under sign patterns: all 2^n, or SIGN_FLIPS drawn ones where those are fewer."""
    import numpy

    if 1 << len(differences) <= SIGN_FLIPS:
        sums = numpy.zeros(1)
        for difference in differences:
            sums = numpy.concatenate([sums + difference, sums - difference])
        return sums
    draw = numpy.random.default_rng(SEED)
    sums = numpy.zeros(SIGN_FLIPS)
    for start in range(0, len(differences), ROWS_AT_ONCE):
        some = differences[start : start + ROWS_AT_ONCE]
        sums += (2 * draw.integers(0, 2, (SIGN_FLIPS, len(some)), numpy.int8) - 1) @ some
    return sums


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """What Student's t of so many degrees of freedom stays below in absolute value with that probability."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """How likely |t| is below sqrt(freedom) * tan(angle). Abramowitz and Stegun 1964, formulas 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(angle), freedom % 2
    term = total = cosine if odd else 1.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def fisher_excess(worse: int, of: int, usual: int, of_usual: int) -> float:
    """How likely chance gives the first side so many bad cases or more, were both sides alike.

    Fisher's exact test, one-sided: a tail of the hypergeometric distribution (Fisher 1935, The Design of Experiments).
    """
    bad, every = worse + usual, of + of_usual
    total = _log_choose(every, of)
    return sum(
        math.exp(_log_choose(bad, count) + _log_choose(every - bad, of - count) - total)
        for count in range(max(worse, bad - of_usual), min(bad, of) + 1)
    )


def sign_test(heads: int, tosses: int) -> float:
    """How likely a fair coin shows so many heads or more: the sign test of whether a median exceeds a value."""
    return sum(math.comb(tosses, count) for count in range(heads, tosses + 1)) / (1 << tosses)


def _log_choose(every: int, some: int) -> float:
    return math.lgamma(every + 1) - math.lgamma(some + 1) - math.lgamma(every - some + 1)
