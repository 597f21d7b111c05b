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
    rewards: tuple[torch.Tensor, torch.Tensor] | None = None
    """For a method with a reference: beta times how much likelier the model makes an answer than the reference does, in
    nats, of the answers to be given (answers) and of the others (others)."""
    right: torch.Tensor | None = None
    """With `rewards`: which rows the method has on the right side (rows)."""


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


def figures_of(figures: Sequence[RowFigures]) -> dict[str, Any]:
    """What a step or an evaluation is told by beside its loss: of its answers, and of a method's rewards.

    `answer_loss` is in nats a token, `chosen_logp` in nats an answer; each `_interval` is that of 95 % around its mean.
    """
    found: dict[str, Any] = {}
    if answers := answer_loss(figures):
        found["answer_loss"], found["answer_interval"] = answers
    rewards = [one.rewards for one in figures if one.rewards is not None]
    if rewards:
        chosen, rejected = (torch.cat(some).double() for some in zip(*rewards, strict=True))
        if len(chosen):
            found["chosen_logp"] = -float(torch.cat([one.nats for one in figures]).double().mean())
            found["reward_chosen"] = float(chosen.mean())
            found["reward_chosen_interval"] = mean_interval(chosen.tolist(), [1] * len(chosen))
        if len(rejected):
            found["reward_rejected"] = float(rejected.mean())
        if len(chosen) and len(rejected):
            found["reward_margin"] = found["reward_chosen"] - found["reward_rejected"]
        right = torch.cat([one.right for one in figures if one.right is not None])
        found["reward_accuracy"] = float(right.double().mean())
    return found


LEAST_DISPLACED = 0.01
"""Of a reward, from which answers count as less likely: more than the rounding of bf16 makes."""


def is_displaced(reward_chosen: Interval | None) -> bool:
    """Whether answers whose mean reward has that interval have become less likely than to the reference."""
    return reward_chosen is not None and reward_chosen[1] < -LEAST_DISPLACED


def _mean(sums: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[float, Interval | None] | None:
    if not sum(len(some) for some in sums):
        return None
    values, counts = torch.cat(sums).tolist(), torch.cat(weights).tolist()
    return sum(values) / sum(counts), mean_interval(values, counts)
