"""Products with frozen weights in bf16, on processors that multiply it several times as fast as fp32.

What a CPU trains stays in fp32, and so do norms, attention, output head and loss: only what a frozen linear layer is
given, its weights and what it gives are rounded, as they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from appliance.errors import is_out_of_memory, reason
from appliance.train.head import TrainedLogProbs
from appliance.train.memory import give_back_freed_memory
from appliance.train.model import ON_GPU

NATIVE = ("amx_bf16", "avx512_bf16")
"""What torch calls the instructions that multiply bf16."""
SAME_WITHIN = 0.1
"""How far, of their size, log-probabilities and gradient may be from those in fp32: SmolLM2's gradient is by 0.02, and
under autocast, with which a GPU trains, by 0.06."""
_TRIED = (4, 64, 16)
"""Rows and tokens of the trial, and how many of a row's are predicted: few, for the sake of memory."""


def are_fast() -> bool:
    """Whether this machine trains on a processor that multiplies bf16."""
    return not ON_GPU and any(torch.cpu.get_capabilities().get(name) for name in NATIVE)


def round_frozen(model: Any, warn: Callable[..., Any]) -> None:
    """Have the frozen linear layers of `model`, a base with its adapter, multiply in bf16 and hold their weights so.

    Where a trial shows that the model or its gradient is then another, nothing changes, and `warn` is told why.
    """
    layers = frozen_layers(model)
    expected = _said(model)
    for layer in layers:
        layer.__class__ = RoundedLinear
    if fault := _fault(model, expected):
        for layer in layers:
            layer.__class__ = torch.nn.Linear
        warn(message=f"products stay in fp32 instead of bf16: {fault}")
        return
    hold_rounded(layers)
    give_back_freed_memory()  # weights in fp32 and the trial have left holes that few tensors of a step fit


def frozen_layers(model: Any) -> list[torch.nn.Linear]:
    """The linear layers of `model` that no gradient is for, the output head left out."""
    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and module is not head and not module.weight.requires_grad
    ]


def hold_rounded(layers: list[torch.nn.Linear]) -> None:
    """Make `layers` RoundedLinear, and their weights bf16."""
    for layer in layers:
        layer.__class__ = RoundedLinear
        layer.weight.data = layer.weight.data.to(torch.bfloat16)


class RoundedLinear(torch.nn.Linear):
    """A frozen linear layer between tensors in fp32 whose products are in bf16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        apply: Any = _Product.apply
        product: torch.Tensor = apply(input, self.weight)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """`values` (..., in) times a frozen `weight` (out, in): (..., out)."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(values.to(torch.bfloat16), weight.to(torch.bfloat16)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (gradient.to(torch.bfloat16) @ weight.to(torch.bfloat16)).to(gradient.dtype), None


def _said(model: Any) -> tuple[torch.Tensor, ...]:
    """The log-probabilities of some rows' last tokens, and their gradient by what is trained, each as a vector."""
    rows, width, last = _TRIED
    base, head = model.get_base_model(), model.get_output_embeddings()
    ids = torch.arange(rows * width, device=model.device).view(rows, width) * 7 % len(head.weight)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    training = model.training
    model.eval()
    try:
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -last - 1 : -1].flatten(0, 1)
        apply: Any = TrainedLogProbs.apply
        logps, *_ = apply(hidden, head.weight, head.bias, ids[:, -last:].flatten(), 1.0, 0)
        found = torch.autograd.grad(logps.mean(), trained, allow_unused=True)
    finally:
        model.train(training)
    return logps.detach(), torch.cat([one.flatten() for one in found if one is not None])


def _fault(model: Any, expected: tuple[torch.Tensor, ...]) -> str:
    """Why the present products of `model` will not do in the place of those that gave `expected`; empty: they do."""
    try:
        found = _said(model)
    except Exception as error:  # models are their publishers' code
        if is_out_of_memory(error):
            raise
        return f"the model refuses them ({reason(error)})"
    for what, one, other in zip(("what it says", "its gradient"), expected, found, strict=True):
        difference = float((other - one).norm() / one.norm())
        if not difference < SAME_WITHIN:
            return f"{what} would differ by {difference:.2f} of its size"
    return ""
