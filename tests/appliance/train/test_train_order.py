from __future__ import annotations

import itertools
import random

import pytest

from appliance.train.order import LengthSampler, cut_by_tokens, epoch_order

LENGTHS = random.Random(3).choices(range(10, 400), k=1003)


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def padding(order: list[int], size: int) -> float:
    """Share of padding in the batches."""
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches(order, size))
    return 1 - sum(LENGTHS) / padded


def test_every_row_comes_once() -> None:
    for epoch in range(3):
        assert sorted(epoch_order(LENGTHS, 8, 17, epoch)) == list(range(len(LENGTHS)))
    assert epoch_order([5], 8, 17, 0) == [0]
    assert sorted(epoch_order([5, 9, 7], 8, 17, 0)) == [0, 1, 2]


def test_the_same_seed_and_epoch_give_the_same_order() -> None:
    assert epoch_order(LENGTHS, 8, 17, 4) == epoch_order(LENGTHS, 8, 17, 4)
    assert epoch_order(LENGTHS, 8, 17, 4) != epoch_order(LENGTHS, 8, 17, 5)
    assert epoch_order(LENGTHS, 8, 17, 4) != epoch_order(LENGTHS, 8, 18, 4)


def test_no_two_seeds_have_an_epoch_in_common() -> None:
    rows = [10] * 200
    orders = [tuple(epoch_order(rows, 8, seed, epoch)) for seed in range(17, 27) for epoch in range(1, 11)]
    assert len(set(orders)) == 100


def test_the_longest_row_comes_first() -> None:
    longest = max(LENGTHS)
    assert all(LENGTHS[epoch_order(LENGTHS, 8, seed, 0)[0]] == longest for seed in range(5))


def test_batches_hold_rows_of_like_length() -> None:
    as_they_come = list(range(len(LENGTHS)))
    assert padding(as_they_come, 8) > 0.35
    assert padding(epoch_order(LENGTHS, 8, 17, 1), 8) < 0.05


def test_batches_come_in_no_order_of_length() -> None:
    means = [sum(LENGTHS[row] for row in batch) for batch in batches(epoch_order(LENGTHS, 8, 17, 1), 8)]
    falling = sum(a >= b for a, b in itertools.pairwise(means)) / len(means)
    assert 0.3 < falling < 0.7


def test_the_sampler_follows_the_epoch() -> None:
    sampler = LengthSampler(LENGTHS, 8, 17)
    sampler.set_epoch(3)
    assert list(sampler) == epoch_order(LENGTHS, 8, 17, 3)
    assert len(sampler) == len(LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "tokens", "rows", "parts"),
    [
        ([5], 10, 8, [1]),
        ([5, 5, 5, 5], 10, 8, [2, 2]),
        ([5, 5, 5, 5], 100, 8, [4]),
        ([5, 5, 5, 5], 100, 3, [3, 1]),
        ([50, 5, 5], 10, 8, [1, 2]),
        ([5, 50, 5], 10, 8, [1, 1, 1]),
        ([4, 6, 3, 3], 12, 8, [2, 2]),
    ],
)
def test_a_batch_is_cut_by_rows_and_by_tokens_with_their_padding(
    lengths: list[int], tokens: int, rows: int, parts: list[int]
) -> None:
    cuts = cut_by_tokens(lengths, tokens, rows)
    assert [cut.stop - cut.start for cut in cuts] == parts
    assert [row for cut in cuts for row in lengths[cut]] == lengths
