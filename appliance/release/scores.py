"""How likely a model finds conversations: the log-probabilities of their trained tokens, and how two models differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from appliance.data.render import Conversation, Rendered
from appliance.errors import is_out_of_memory
from appliance.release.streaming import is_streamed
from appliance.train.model import ON_GPU, release_memory

TOKENS_AT_ONCE = 2048 if ON_GPU else 512
"""Padded tokens in a forward pass: what is computed of them is the peak of memory."""
TOKENS_AT_ONCE_STREAMED = 8192
"""The same where each pass reads the model's layers anew."""
LOGITS_AT_ONCE = 1 << 24
"""Logits that are made at once."""
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
    batches = _batches(examples, TOKENS_AT_ONCE_STREAMED if is_streamed(model) else TOKENS_AT_ONCE)
    while batches:
        batch = batches.pop(0)
        rows, at = [examples[number] for number in batch], [ends[number] for number in batch]
        try:
            _score(model, rows, at, found, anew=ids is None)
            continue
        except Exception as error:  # torch, its allocators and the drivers each raise their own
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        release_memory()
        half = len(batch) // 2
        batches[:0] = [batch[:half], batch[half:]]
    return found


def _score(model: Any, rows: list[Rendered], ends: list[int], found: Scores, *, anew: bool) -> None:
    """Score `rows` in one pass; what is said of each is put in `found` up to its end, `anew` with the likeliest ids."""
    width = max(len(row.input_ids) for row in rows)
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    attended, trained = torch.zeros_like(inputs), torch.zeros(len(rows), width, dtype=torch.bool)
    for at, row in enumerate(rows):
        length = len(row.input_ids)
        inputs[at, :length] = torch.tensor(row.input_ids)
        trained[at, :length] = torch.tensor(row.trained)
        attended[at, :length] = 1
    arguments = {"input_ids": inputs.to(model.device), "attention_mask": attended.to(model.device), "use_cache": False}
    done = [end - int(part[1:].sum()) for end, part in zip(ends, trained, strict=True)]
    for places, logits in _logits(model, arguments, trained.any(0)[1:].nonzero().squeeze(1)):
        for at in range(len(rows)):
            chosen = trained[at, places + 1]
            its = slice(done[at], done[at] + int(chosen.sum()))
            done[at] = its.stop
            logps = torch.log_softmax(logits[at, chosen.to(logits.device)].float(), dim=-1).cpu()
            found.logps[its] = logps.gather(1, inputs[at, places[chosen] + 1, None]).squeeze(1)
            if anew:
                found.ids[its] = logps.topk(LIKELIEST).indices.int()
            found.likeliest[its] = logps.gather(1, found.ids[its].long())


def _logits(model: Any, arguments: dict[str, Any], wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some of the `wanted` places, and the logits after each, until all have been; the layers are gone through once."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(whole, "base_model", whole)
    if body is whole:  # it has no head apart, and makes all logits
        yield wanted, whole(**arguments).logits[:, wanted.to(whole.device)]
        return
    rows, vocabulary = len(arguments["input_ids"]), whole.config.get_text_config().vocab_size
    seen: list[Any] = []
    hook = body.register_forward_hook(lambda module, inputs, output: seen.append(output))
    its_own = vars(body).get("forward")
    try:
        for places in torch.split(wanted, max(1, LOGITS_AT_ONCE // (rows * vocabulary))):
            logits = whole(**arguments, logits_to_keep=places.to(whole.device)).logits
            # A model that knows no `logits_to_keep` makes all.
            yield places, logits if logits.shape[1] == len(places) else logits[:, places.to(logits.device)]
            body.forward = lambda *_, **__: seen[0]
    finally:
        hook.remove()
        if its_own is None:
            vars(body).pop("forward", None)
        else:
            body.forward = its_own


def divergence(expected: Scores, found: Scores) -> torch.Tensor:
    """[n] nats: KL(expected || found) of each token's distribution, the tokens not kept apart counted as one.

    By the log-sum inequality it is at most that of the whole distributions. Both must keep the same tokens apart.
    """
    theirs, ours = expected.likeliest.double(), found.likeliest.double()
    rest, our_rest = (torch.log1p(-values.exp().sum(1).clamp(max=1 - 1e-9)) for values in (theirs, ours))
    apart = (theirs.exp() * (theirs - ours)).sum(1) + rest.exp() * (rest - our_rest)
    return apart.clamp(min=0)


def _batches(examples: Sequence[Rendered], at_once: int) -> list[list[int]]:
    """Numbers of the examples by length, in batches of at most `at_once` padded tokens."""
    batches: list[list[int]] = []
    for number in sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids)):
        if batches and (len(batches[-1]) + 1) * len(examples[number].input_ids) <= at_once:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
