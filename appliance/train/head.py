"""The log-probabilities of trained tokens on a CPU, a block at a time, the logits of the others never computed.

TRL's own head leaves the untrained tokens out only where Triton is, and computes all logits again in the backward pass.
Here the logits of a block serve both: they give the log-probability's gradient too, and that alone is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer import utils

LOGITS_AT_ONCE = 1 << 24
"""Tokens of a block times the vocabulary: 64 MB of logits, and as much for their softmax."""


def install() -> None:
    """Give TRL's trainers this head."""
    utils._ChunkedLogProbFunction = TrainedLogProbs
    utils._use_triton = lambda device: True


class TrainedLogProbs(torch.autograd.Function):
    """Called and answering as TRL's function of the same place, with zeros for the figures that TRL takes from
    the logits of the whole vocabulary.

    With z = cap(scale * (W h + b)) the log-probability of target t is z_t - logsumexp(z), and its gradient by h is
    scale * W^T ((onehot_t - softmax(z)) * cap'), which the backward pass multiplies by one number a token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Log-probabilities (tokens) of `targets` (tokens) after `hidden` (tokens, width)."""
        log_probs = hidden.new_empty(len(hidden))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        tokens = min(max(LOGITS_AT_ONCE // len(weight), 1), len(hidden))
        # The same memory for each block: the C library would find new memory for each.
        all_logits, all_logs = hidden.new_empty(2, tokens, len(weight))
        for start in range(0, len(hidden), max(tokens, 1)):
            block = slice(start, start + tokens)
            target = targets[block, None]
            logits, logs = all_logits[: len(target)], all_logs[: len(target)]
            torch.mm(hidden[block], weight.T, out=logits)
            if bias is not None:
                logits += bias
            if (scale, softcap, temperature) != (1, None, 1):
                _cap(logits.mul_(scale), softcap).div_(temperature)
            torch.log_softmax(logits, -1, out=logs)
            log_probs[block] = logs.gather(1, target)[:, 0]
            if gradient is not None:
                by_logit = logs.exp_().neg_()
                by_logit.scatter_add_(1, target, torch.ones_like(target, dtype=logs.dtype))
                if softcap:
                    by_logit *= 1 - (logits * (temperature / softcap)) ** 2
                torch.mm(by_logit, weight, out=gradient[block])
        if gradient is not None and (scale, temperature) != (1, 1):
            gradient *= scale / temperature
        ctx.save_for_backward(gradient)
        nothing = torch.zeros_like(log_probs)
        none_right = nothing.bool()
        ctx.mark_non_differentiable(nothing, none_right)
        return log_probs, nothing, nothing, nothing, none_right

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Gradient by `hidden`; the head itself is frozen."""
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, *[None] * 8


def _cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits
