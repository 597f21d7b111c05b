"""Stochastic rounding: right on average, the same each time, and however the rows are divided."""

from __future__ import annotations

import pytest
import torch

from appliance.release.rounding import Rounding

SHAPE = (300, 1024)
SIXTEEN_BIT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def values(dtype: torch.dtype, small: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a base on the grid of `dtype`, and an update far smaller than its steps."""
    draw = torch.Generator().manual_seed(1)
    weights = (torch.randn(SHAPE, generator=draw) * 0.05).to(dtype)
    update = torch.randn(SHAPE[0], 4, generator=draw) @ torch.randn(4, SHAPE[1], generator=draw) * small
    return weights, update


def rounded(exact: torch.Tensor, dtype: torch.dtype, name: str = "w") -> torch.Tensor:
    rounding = Rounding(name, tuple(exact.shape), dtype)
    return rounding(exact.clone(), slice(0, len(exact)), torch.empty_like(exact, dtype=dtype))


@SIXTEEN_BIT
def test_the_update_survives_where_rounding_to_nearest_loses_it(dtype: torch.dtype) -> None:
    weights, update = values(dtype)
    exact = weights.float() + update

    def kept(stored: torch.Tensor) -> float:
        return float(((stored.float() - weights.float()) * update).sum() / update.square().sum())

    assert kept(rounded(exact, dtype)) == pytest.approx(1, abs=0.03)
    assert kept(exact.to(dtype)) < (0.5 if dtype == torch.bfloat16 else 0.96)


@SIXTEEN_BIT
def test_each_value_becomes_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    exact = values(dtype)[0].float() * 1.001
    stored = rounded(exact, dtype)
    nearest = exact.to(dtype)
    away = torch.where(
        nearest.float().abs() >= exact.abs(), nearest.view(torch.int16) - 1, nearest.view(torch.int16) + 1
    )
    assert ((stored == nearest) | (stored.view(torch.int16) == away)).all()
    assert 0.1 < float((stored != nearest).float().mean()) < 0.4


@SIXTEEN_BIT
def test_what_lies_on_the_grid_stays(dtype: torch.dtype) -> None:
    weights, _ = values(dtype)
    weights[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max])
    assert torch.equal(rounded(weights.float(), dtype).view(torch.int16), weights.view(torch.int16))


def test_small_values_of_fp16_are_right_on_average_too() -> None:
    """Below its least normal number, 6e-5, the steps of fp16 stay the same."""
    exact = torch.full((64, 4096), 1e-7)
    stored = rounded(exact, torch.float16).float()
    assert set(stored.unique().tolist()) == {2.0**-24, 2.0**-23}
    assert float(stored.mean()) == pytest.approx(1e-7, rel=0.01)


def test_every_row_and_column_is_right_on_average() -> None:
    """Blocks of 2^18 values take their draws from one table, each from another place on."""
    exact = torch.full((512, 2048), 1 + 2.0**-9)
    up = (rounded(exact, torch.bfloat16) > 1).float()
    spread = 6 * (0.25 * 0.75) ** 0.5
    assert (up.mean(1) - 0.25).abs().max() < spread / 2048**0.5
    assert (up.mean(0) - 0.25).abs().max() < spread / 512**0.5
    for block in range(1, 4):
        both = up[:128] * up[128 * block : 128 * (block + 1)]
        assert float(both.mean()) == pytest.approx(0.25**2, abs=0.005)


def test_rows_may_be_rounded_in_any_parts() -> None:
    weights, update = values(torch.bfloat16)
    exact = weights.float() + update
    rounding = Rounding("w", SHAPE, torch.bfloat16)
    whole = torch.empty_like(exact, dtype=torch.bfloat16)
    for a, b in ((0, 1), (1, 130), (130, 256), (256, 300)):
        rounding(exact[a:b].clone(), slice(a, b), whole[a:b])
    assert torch.equal(whole, rounded(exact, torch.bfloat16))


def test_the_draws_are_those_of_the_name() -> None:
    exact = values(torch.bfloat16)[0].float() * 1.001
    assert torch.equal(rounded(exact, torch.bfloat16), rounded(exact, torch.bfloat16))
    assert not torch.equal(rounded(exact, torch.bfloat16), rounded(exact, torch.bfloat16, "v"))


def test_vectors_and_wider_types() -> None:
    exact = torch.linspace(0, 1, 1000)
    assert float((rounded(exact, torch.bfloat16).float() - exact).mean()) == pytest.approx(0, abs=1e-3)
    assert torch.equal(rounded(exact, torch.float32), exact)
    assert rounded(exact, torch.float64).dtype == torch.float64
