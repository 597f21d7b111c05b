"""Intervals and tests against tables, plain formulas and simulation."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import pytest

from appliance.statistics import fisher_excess, mean_interval, paired, sign_test, student_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (30, 2.042), (99, 1.984), (1000, 1.962)],
)
def test_student_quantile(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_where_rows_count_alike_it_is_the_interval_of_a_mean() -> None:
    values = [0.2, 1.1, 0.7, 0.9]
    half = 3.182 * statistics.stdev(values) / math.sqrt(4)
    assert mean_interval(values, [1] * 4) == pytest.approx((0.725 - half, 0.725 + half), abs=1e-3)


def test_long_rows_are_no_noise() -> None:
    """Rows of another length and the same loss a token say the same."""
    assert mean_interval([1.0, 10.0, 100.0], [1, 10, 100]) == pytest.approx((1.0, 1.0))
    low, high = mean_interval([1.0, 20.0, 100.0], [1, 10, 100]) or (0.0, 0.0)
    assert low < 121 / 111 < high
    assert low + high == pytest.approx(2 * 121 / 111)


def test_a_single_row_has_no_interval() -> None:
    assert mean_interval([3.0], [7]) is None
    assert paired([3.0], [2.0], [7]).interval is None


def rows(dice: random.Random, count: int) -> tuple[list[float], list[int]]:
    """Nats and tokens of rows of many lengths, each row with its own loss a token; the mean over tokens is 1."""
    tokens = [dice.randrange(5, 60) for _ in range(count)]
    return [length * dice.gammavariate(4, 0.25) for length in tokens], tokens


@pytest.mark.parametrize("count", [8, 64])
def test_the_interval_holds_the_true_mean_nineteen_times_of_twenty(count: int) -> None:
    dice, held = random.Random(3), 0
    for _ in range(1000):
        low, high = mean_interval(*rows(dice, count)) or (0.0, 0.0)
        held += low < 1.0 < high
    assert 910 < held < 970


@pytest.mark.parametrize(
    ("differences", "p_worse"),
    [
        ([1.0, 2.0, 3.0], 1 / 8),
        ([-1.0, 2.0, 3.0], 2 / 8),
        ([-1.0, -2.0, -3.0], 1.0),
        ([0.0, 0.0, 0.0], 1.0),
        ([0.5] * 14, 1 / 2**14),
        ([0.1] * 60, 1 / (2**14 + 1)),
    ],
)
def test_few_rows_are_compared_by_every_flip(differences: list[float], p_worse: float) -> None:
    ours = [4.0 + difference for difference in differences]
    found = paired(ours, [4.0] * len(ours), [2] * len(ours))
    assert found.p_worse == pytest.approx(p_worse)
    assert found.difference == pytest.approx(statistics.mean(differences) / 2)
    low, high = found.interval or (1.0, 0.0)
    assert low <= found.difference <= high


def chance_of_worse(count: int, change: Callable[[random.Random], float], least: float) -> float:
    """How often a model whose rows differ by `change` comes out worse at p < `least`, in 200 comparisons."""
    dice, worse = random.Random(5), 0
    for _ in range(200):
        theirs, tokens = rows(dice, count)
        ours = [nats + length * change(dice) for nats, length in zip(theirs, tokens, strict=True)]
        worse += paired(ours, theirs, tokens).p_worse < least
    return worse / 200


@pytest.mark.parametrize("count", [10, 64])
def test_models_that_are_alike_come_out_worse_as_often_as_chance_says(count: int) -> None:
    assert 0.01 < chance_of_worse(count, lambda dice: dice.gauss(0, 0.02), 0.05) < 0.1


def test_a_model_that_is_worse_on_most_rows_comes_out_worse() -> None:
    """By 0.01 nats of 1, far inside the interval of either loss."""
    assert chance_of_worse(64, lambda dice: dice.gauss(0.01, 0.02), 0.05) > 0.9
    assert chance_of_worse(64, lambda dice: dice.gauss(-0.01, 0.02), 0.05) == 0.0


def test_a_comparison_is_the_same_each_time() -> None:
    ours, tokens = rows(random.Random(1), 100)
    theirs, _ = rows(random.Random(2), 100)
    assert paired(ours, theirs, tokens) == paired(ours, theirs, tokens)


@pytest.mark.parametrize(
    ("table", "chance"),
    [((3, 3, 0, 20), 1 / 1771), ((2, 100, 0, 900), 9900 / 999000), ((1, 100, 0, 900), 0.1), ((0, 9, 5, 9), 1.0)],
)
def test_fishers_exact_test(table: tuple[int, int, int, int], chance: float) -> None:
    assert fisher_excess(*table) == pytest.approx(chance)


def test_the_sign_test() -> None:
    assert sign_test(10, 10) == 1 / 1024
    assert sign_test(0, 10) == 1.0
    assert sign_test(9, 10) == pytest.approx(11 / 1024)
