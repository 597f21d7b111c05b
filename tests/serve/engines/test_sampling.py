"""Each row of a batch is chosen by its own parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.engines.sampling import Sampling, processors

VOCABULARY = 8
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=1)


def choose(scores: torch.Tensor, samplings: list[Sampling], position: int = 0) -> list[int]:
    """The token of each row, as the engine's batch would choose it."""
    chain = processors()
    requests: list[Any] = []
    for sampling in samplings:
        parameters = sampling.parameters()
        chain.check_kwargs(parameters)
        state = SimpleNamespace(
            logit_processor_kwargs=parameters, initial_tokens=[0] * 3, generated_tokens=[0] * position
        )
        requests.append(SimpleNamespace(state=state, has_new_token=True))
    arguments = torch.zeros((chain.tensors_required, len(samplings)), dtype=torch.int32)
    chain.prepare_tensor_args(requests, arguments)
    return [int(token) for token in chain(torch.empty(0), scores, arguments).argmax(1)]


def draws(scores: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """Share of each token among `count` draws."""
    tokens = [
        token
        for start in range(0, count, 500)
        for token in choose(
            scores.repeat(500, 1),
            [Sampling(sampling.temperature, sampling.top_p, sampling.top_k, start + n) for n in range(500)],
        )
    ]
    return torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / len(tokens)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])


def test_greedy_rows_are_exact_beside_rows_that_draw() -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 500)
    samplings = [GREEDY, Sampling(1.5, 0.9, 50, 7)] * 3
    chosen = choose(scores.clone(), samplings)
    best = scores.argmax(1).tolist()
    assert chosen[::2] == best[::2]
    assert chosen[1::2] != best[1::2]


def test_greedy_takes_the_first_of_equal_scores() -> None:
    assert choose(torch.tensor([[0.0, 3.0, 3.0, 3.0]]), [GREEDY]) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution_at_a_temperature(scores: torch.Tensor, temperature: float) -> None:
    shares = draws(scores, Sampling(temperature, 1, 0, 0), 10_000)
    assert torch.allclose(shares, (scores / temperature).softmax(0), atol=0.02)


def test_top_k_keeps_the_best_and_their_proportions(scores: torch.Tensor) -> None:
    shares = draws(scores, Sampling(1, 1, 3, 0), 5_000)
    assert torch.all(shares[3:] == 0)
    assert torch.allclose(shares[:3], scores[:3].softmax(0), atol=0.03)


def test_top_p_keeps_the_smallest_set_with_that_mass(scores: torch.Tensor) -> None:
    mass = scores.softmax(0).cumsum(0)
    shares = draws(scores, Sampling(1, float(mass[2]) + 0.01, 0, 0), 5_000)
    assert torch.all(shares[4:] == 0)
    assert torch.all(shares[:4] > 0)
    assert draws(scores, Sampling(1, 0.01, 0, 0), 500)[0] == 1


def test_top_p_looks_beyond_the_likely_tokens_of_a_flat_distribution() -> None:
    scores = torch.linspace(0, -1, 5000)[None]
    nucleus = int((scores[0].softmax(0).cumsum(0) < 0.8).sum()) + 1
    tokens = [choose(scores.clone(), [Sampling(1, 0.8, 0, seed)])[0] for seed in range(300)]
    assert max(tokens) <= nucleus
    assert sum(token > 1024 for token in tokens) > 150


def test_the_same_seed_draws_the_same_wherever_its_row_is(scores: torch.Tensor) -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 1000)
    one = Sampling(1, 1, 0, 42)
    alone = choose(scores.clone(), [one])
    among = choose(scores.repeat(3, 1), [Sampling(1, 1, 0, 5), GREEDY, one])
    assert among[2:] == alone
    assert len({choose(scores.clone(), [Sampling(1, 1, 0, seed)])[0] for seed in range(20)}) > 10
    assert len({choose(scores.clone(), [one], position)[0] for position in range(20)}) > 10


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**127])
def test_any_seed_will_do(scores: torch.Tensor, seed: int) -> None:
    assert 0 <= choose(scores[None], [Sampling(1, 1, 0, seed)])[0] < VOCABULARY


def test_top_k_beyond_the_vocabulary_is_all_of_it(scores: torch.Tensor) -> None:
    assert 0 <= choose(scores[None], [Sampling(1, 1, 10**6, 0)])[0] < VOCABULARY


def test_rows_of_no_request_are_left_alone(scores: torch.Tensor) -> None:
    chain = processors()
    arguments = torch.zeros((chain.tensors_required, 1), dtype=torch.int32)
    chain.fill_defaults(arguments)
    assert torch.equal(chain(torch.empty(0), scores[None].clone(), arguments), scores[None])
