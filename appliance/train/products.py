"""Products with frozen weights in bf16, on processors that multiply it several times as fast as fp32.

What a CPU trains stays in fp32, and so do norms, attention, output head and loss: only what a frozen linear layer is
given, its weights and what it gives are rounded, as they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from appliance.train import trial
from appliance.train.memory import give_back_freed_memory
from appliance.train.model import ON_GPU

NATIVE = ("amx_bf16", "avx512_bf16")
"""What torch calls the instructions that multiply bf16."""


def are_fast() -> bool:
    """Whether this machine trains on a processor that multiplies bf16."""
    return not ON_GPU and any(torch.cpu.get_capabilities().get(name) for name in NATIVE)


def round_frozen(model: Any, warn: Callable[..., Any]) -> None:
    """Have the frozen linear layers of `model`, a base with its adapter, multiply in bf16 and hold their weights so.

    Where a trial shows that the model or its gradient is then another, nothing changes, and `warn` is told why.
    """
    layers = frozen_layers(model)

    def become(kind: type[torch.nn.Linear]) -> None:
        for layer in layers:
            layer.__class__ = kind

    if fault := trial.keep_if_same(model, partial(become, RoundedLinear), partial(become, torch.nn.Linear)):
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
