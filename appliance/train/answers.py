"""What forward passes say of each row: its own loss, and how likely the answer is that the model is to give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from appliance.statistics import Interval, mean_interval


@dataclass(frozen=True)
class RowFigures:
    """Of the rows of a pass; none of it has a gradient."""

    losses: torch.Tensor
    """Each row's loss (rows)."""
    weights: torch.Tensor
    """What each counts for: the pass's loss is the sum of the losses over that of the weights (rows)."""
    nats: torch.Tensor
    """What each answer costs that the model is to give: all in sft, the chosen, or those judged good (answers)."""
    tokens: torch.Tensor
    """Their trained tokens (answers)."""


@contextmanager
def outputs_of(model: Any) -> Iterator[list[Any]]:
    """Within, the list is given whatever `model` returns."""
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def sequence_nats(inputs: dict[str, Any], output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the trained tokens of each sequence cost in nats, and their number, from the output of TRL's head.

    `inputs` are those of the pass; packed ones are taken apart again.
    """
    # Nothing predicts a sequence's first token.
    costs, counted = pad(-output.log_probs.detach().float(), (1, 0)), pad(output.label_mask, (1, 0))
    if "cu_seq_lens_q" not in inputs:
        return costs.sum(1), counted.sum(1)
    bounds = inputs["cu_seq_lens_q"].long()
    nats, tokens = (pad(packed[0].double().cumsum(0), (1, 0))[bounds].diff() for packed in (costs, counted))
    return nats, tokens


def answer_loss(figures: Sequence[RowFigures]) -> tuple[float, Interval | None] | None:
    """Nats a token of the answers that the model is to give and the mean's interval; None where there are none."""
    return _mean([one.nats for one in figures], [one.tokens for one in figures])


def row_loss(figures: Sequence[RowFigures]) -> tuple[float, Interval | None] | None:
    """The mean loss of the rows, whatever the method, and its interval; None where there are none."""
    return _mean([one.losses for one in figures], [one.weights for one in figures])


def _mean(sums: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[float, Interval | None] | None:
    if not sum(len(some) for some in sums):
        return None
    values, counts = torch.cat(sums).tolist(), torch.cat(weights).tolist()
    return sum(values) / sum(counts), mean_interval(values, counts)
