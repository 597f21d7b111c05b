"""Whether a model still says, and learns, the same after its layers are computed in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from appliance.errors import is_out_of_memory, reason
from appliance.train.head import TrainedLogProbs
from appliance.train.model import DTYPE

SAME_WITHIN = 0.2
"""How far, of their size, log-probabilities and gradient may be from what they were: several times what rounding does.
SmolLM2's gradient is by 0.03 with products in bf16 instead of fp32, and by 0.05 with norms that round once less in
bf16."""
_TRIED = (2, 48, 16)
"""Rows and tokens of the trial, and how many of a row's are predicted: few, for the sake of memory."""

Said = tuple[torch.Tensor, torch.Tensor]
"""The log-probabilities of some rows' last tokens, and their gradient by what is trained, each as a vector."""


def said(model: Any) -> Said:
    """What `model`, a base with its adapter, makes of some rows."""
    rows, width, last = _TRIED
    base, head = model.get_base_model(), model.get_output_embeddings()
    ids = torch.arange(rows * width, device=model.device).view(rows, width) * 7 % len(head.weight)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, DTYPE, enabled=torch.bfloat16 == DTYPE):
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -last - 1 : -1].flatten(0, 1)
            apply: Any = TrainedLogProbs.apply
            logps, *_ = apply(hidden.to(head.weight.dtype), head.weight, head.bias, ids[:, -last:].flatten(), 1.0, 0)
        found = torch.autograd.grad(logps.mean(), trained, allow_unused=True)
    finally:
        model.train(training)
    return logps.detach(), torch.cat([one.flatten() for one in found if one is not None])


def keep_if_same(model: Any, change: Callable[[], None], undo: Callable[[], None]) -> str:
    """Make `change` to the layers of `model`; where it then says or learns another thing, `undo` it.

    The answer is why it was undone; empty: it stays.
    """
    try:
        expected = said(model)
        change()
        fault = _difference(expected, said(model))
    except Exception as error:  # models are their publishers' code
        undo()
        if is_out_of_memory(error):
            raise
        return f"the model refuses ({reason(error)})"
    if fault:
        undo()
    return fault


def _difference(expected: Said, found: Said) -> str:
    for what, one, other in zip(("what it says", "its gradient"), expected, found, strict=True):
        difference = float((other.float() - one.float()).norm() / one.float().norm())
        if not difference < SAME_WITHIN:
            return f"{what} would differ by {difference:.2f} of its size"
    return ""
