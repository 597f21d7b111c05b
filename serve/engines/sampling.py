"""Choosing the next token, for each request by its own parameters.

Transformers' own per-request processors sort the whole vocabulary twice for every token and draw also where the answer
should be greedy; these leave rows alone that do not need them, and end in an argmax: greedy where there is no noise,
and with Gumbel noise a draw from the distribution.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

_GREEDY_BELOW = 1e-5
_LIKELY_TOKENS = 1024
"""So many of the most probable tokens nearly always hold the mass that top_p asks for."""


@dataclass(frozen=True)
class Sampling:
    """How one answer is chosen. temperature 0: greedy; top_k 0: all tokens. The same seed draws the same answer."""

    temperature: float
    top_p: float
    top_k: int
    seed: int

    def parameters(self) -> dict[str, Any]:
        """As the processors below take them."""
        if self.temperature < _GREEDY_BELOW:
            return {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": -1}
        top_k = max(self.top_k, 0)
        return {
            "temperature": float(self.temperature),
            "top_k": top_k,
            "top_p": float(self.top_p),
            "seed": self.seed % (1 << 63),
        }


def processors() -> ContinuousBatchingLogitsProcessorList:
    """The processors of all requests, in order."""
    chain = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Temperature(), _TopK(), _TopP(), _Noise()]))
    chain.tensors_required = len(chain.logits_processor)
    return chain


class _Processor(ContinuousBatchingLogitsProcessor):
    """Acts on the scores by one number for each row, which travels as the bits of an int32."""

    name: str
    kind: type = float
    neutral: float | int
    """The number that changes nothing; rows that belong to no request have it."""
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.supported_kwargs = {self.name: self.kind}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.kind is float else torch.int32

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.copy_(torch.tensor([self.neutral], dtype=self.dtype).view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        numbers = [self.number(request.state) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=self.dtype).view(torch.int32)

    def number(self, state: Any) -> float | int:
        """The number for one request's next token."""
        value: float | int = state.logit_processor_kwargs[self.name]
        return value

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return self.process(scores, tensor_arg[: scores.shape[0]].view(self.dtype))

    @abstractmethod
    def process(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """New scores (rows, vocabulary) by the numbers (rows)."""


class _Temperature(_Processor):
    name = "temperature"
    neutral = 1.0

    def process(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return scores / numbers[:, None]


class _TopK(_Processor):
    name = "top_k"
    kind = int
    neutral = 0

    def process(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows = numbers > 0
        if not rows.any():
            return scores
        ks = numbers[rows].clamp(max=scores.shape[1])
        best = scores[rows].topk(int(ks.max())).values
        least = best.gather(1, ks.long()[:, None] - 1)
        return _without(scores, rows, least)


class _TopP(_Processor):
    name = "top_p"
    neutral = 1.0

    def process(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows = numbers < 1
        if not rows.any():
            return scores
        chosen, mass = scores[rows], numbers[rows][:, None]
        total = chosen.logsumexp(1, keepdim=True)
        for count in (min(_LIKELY_TOKENS, scores.shape[1]), scores.shape[1]):
            best = chosen.topk(count).values
            before = (best - total).exp().cumsum(1) - (best - total).exp()
            if bool((before[:, -1:] >= mass).all()):
                break
        last = (before < mass).sum(1, keepdim=True) - 1
        return _without(scores, rows, best.gather(1, last))


class _Noise(_Processor):
    """Gumbel noise, the same for the same seed and position; none where the seed is -1."""

    name = "seed"
    kind = int
    neutral = 0

    def number(self, state: Any) -> int:
        seed = state.logit_processor_kwargs["seed"]
        position = len(state.initial_tokens) + len(state.generated_tokens)
        return 0 if seed < 0 else 1 + hash((seed, position)) % (1 << 30)

    def process(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        generator = torch.Generator(scores.device)
        for row, seed in enumerate(numbers.tolist()):
            if seed:
                generator.manual_seed(seed)
                scores[row] -= torch.empty_like(scores[row]).exponential_(generator=generator).log()
        return scores


def _without(scores: torch.Tensor, rows: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Scores whose `rows` have lost the tokens below their row of `least`."""
    kept = scores.clone()
    kept[rows] = scores[rows].masked_fill(scores[rows] < least, -torch.inf)
    return kept
