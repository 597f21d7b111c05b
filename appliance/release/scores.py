"""How likely a model finds conversations: the log-probabilities of their trained tokens, and how two models differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from appliance.data.render import Conversation, Rendered
from appliance.train.model import ON_GPU

TOKENS_AT_ONCE = 2048 if ON_GPU else 512
"""Padded tokens in a forward pass: what is computed of them is the peak of memory."""
LOGITS_AT_ONCE = 1 << 24
"""Logits that are brought to fp32 at once."""
LIKELIEST = 32
"""Tokens of each distribution that are kept apart; the others count as one."""


@dataclass(frozen=True)
class Scores:
    """What a model says of the n trained tokens of conversations, one conversation after the other."""

    tokens: torch.Tensor
    """[conversations] int64: the trained tokens of each."""
    logps: torch.Tensor
    """[n] fp32: of the token that is there."""
    ids: torch.Tensor
    """[n, LIKELIEST] int32: the tokens that are kept apart."""
    likeliest: torch.Tensor
    """[n, LIKELIEST] fp32: the log-probabilities of those."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return -float(self.logps.double().mean())

    def nats(self) -> list[float]:
        """What each conversation costs in total."""
        return [-float(part.double().sum()) for part in torch.split(self.logps, self.tokens.tolist())]

    def part(self, first: int, last: int) -> Scores:
        """Those of the conversations from `first` up to `last`."""
        begin, end = (int(self.tokens[:number].sum()) for number in (first, last))
        rows = slice(begin, end)
        return Scores(self.tokens[first:last], self.logps[rows], self.ids[rows], self.likeliest[rows])


@torch.inference_mode()
def score(model: Any, conversations: Sequence[Conversation], ids: torch.Tensor | None = None) -> Scores:
    """Score `model` on rendered conversations, of which there must be one or more.

    `ids` are the tokens to keep apart, another model's Scores.ids of the same conversations; else this one's likeliest.
    """
    examples = [example for conversation in conversations for example in conversation]
    counts = [sum(example.trained[1:]) for example in examples]
    ends = torch.tensor(counts).cumsum(0).tolist()
    found = Scores(
        torch.tensor([sum(sum(one.trained[1:]) for one in conversation) for conversation in conversations]),
        torch.empty(ends[-1]),
        torch.empty(ends[-1], LIKELIEST, dtype=torch.int32) if ids is None else ids,
        torch.empty(ends[-1], LIKELIEST),
    )
    for batch in _batches(examples):
        width = max(len(examples[number].input_ids) for number in batch)
        inputs = torch.zeros(len(batch), width, dtype=torch.long)
        attended, trained = torch.zeros_like(inputs), torch.zeros(len(batch), width, dtype=torch.bool)
        for at, number in enumerate(batch):
            length = len(examples[number].input_ids)
            inputs[at, :length] = torch.tensor(examples[number].input_ids)
            trained[at, :length] = torch.tensor(examples[number].trained)
            attended[at, :length] = 1
        arguments = {"input_ids": inputs.to(model.device), "attention_mask": attended.to(model.device)}
        wanted = trained.any(0)[1:].nonzero().squeeze(1)
        logits = model(**arguments, use_cache=False, logits_to_keep=wanted.to(model.device)).logits
        column = torch.arange(width) if logits.shape[1] == width else (torch.cumsum(trained.any(0)[1:], 0) - 1)
        for at, number in enumerate(batch):
            positions = trained[at, 1:].nonzero().squeeze(1)
            begin = ends[number] - counts[number]
            for some in torch.split(positions, max(1, LOGITS_AT_ONCE // logits.shape[-1])):
                end = begin + len(some)
                logps = torch.log_softmax(logits[at, column[some].to(logits.device)].float(), dim=-1).cpu()
                found.logps[begin:end] = logps.gather(1, inputs[at, some + 1, None]).squeeze(1)
                if ids is None:
                    found.ids[begin:end] = logps.topk(LIKELIEST).indices.int()
                found.likeliest[begin:end] = logps.gather(1, found.ids[begin:end].long())
                begin = end
    return found


def divergence(expected: Scores, found: Scores) -> torch.Tensor:
    """[n] nats: KL(expected || found) of each token's distribution, the tokens not kept apart counted as one.

    By the log-sum inequality it is at most that of the whole distributions. Both must keep the same tokens apart.
    """
    theirs, ours = expected.likeliest.double(), found.likeliest.double()
    rest, our_rest = (torch.log1p(-values.exp().sum(1).clamp(max=1 - 1e-9)) for values in (theirs, ours))
    apart = (theirs.exp() * (theirs - ours)).sum(1) + rest.exp() * (rest - our_rest)
    return apart.clamp(min=0)


def _batches(examples: Sequence[Rendered]) -> list[list[int]]:
    """Numbers of the examples by length, in batches of at most TOKENS_AT_ONCE padded tokens."""
    batches: list[list[int]] = []
    for number in sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids)):
        if batches and (len(batches[-1]) + 1) * len(examples[number].input_ids) <= TOKENS_AT_ONCE:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
