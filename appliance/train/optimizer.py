"""What is set at Transformers' AdamW before the first step."""

from __future__ import annotations

from typing import Any

import torch


def set_loraplus_rates(optimizer: torch.optim.Optimizer, model: Any, ratio: float) -> None:
    """Give the factors B of LoRA `ratio` times the learning rate of the factors A (LoRA+, arXiv 2402.12354)."""
    if ratio == 1:
        return
    outer = {id(weight) for name, weight in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        faster = [weight for weight in group["params"] if id(weight) in outer]
        group["params"] = [weight for weight in group["params"] if id(weight) not in outer]
        if faster:
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": faster, "lr": ratio * group["lr"]})


def hold_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have AdamW hold its moments now, by a step that moves nothing and does not count.

    Otherwise they come in the first step, where a lack of memory could not be mended: only passes can be repeated.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        state["step"].zero_()
