"""Layers that keep less for the backward pass and take fewer operations, with the results of those that they replace.

Everywhere: a frozen product with its adapter, as one operation. On a GPU: norms by PyTorch's own kernel, and the
product of an MLP's two halves, whose activation is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch.amp import is_autocast_available
from torch.nn.functional import rms_norm

from appliance.train import trial
from appliance.train.model import ON_GPU
from appliance.train.products import RoundedLinear

FROZEN = (torch.nn.Linear, RoundedLinear, Linear4bit)
_PROBED = 8
"""Width of the small layers by which the real ones are tried."""
_PROBE = 1e-3
"""Size of what they are given: small, so that a norm's epsilon shows."""


def fuse(model: Any, warn: Callable[..., Any]) -> None:
    """Have the layers of `model`, a base with its adapter, computed so.

    Where a trial shows that norms and MLPs would then be others, those stay, and `warn` is told why.
    """
    fuse_adapters(model)
    if not ON_GPU:
        return
    changed: list[Any] = []

    def undo() -> None:
        for layer in changed:
            del layer.forward

    if fault := trial.keep_if_same(model, lambda: changed.extend(fuse_layers(model)), undo):
        warn(message=f"norms and MLPs are computed as the model's publisher wrote them: {fault}")


def fuse_adapters(model: Any) -> None:
    """Those of plain LoRA without dropout, on linear layers."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and type(layer.get_base_layer()) in FROZEN and _is_plain(layer):
            layer.forward = partial(_adapted, layer)


def fuse_layers(model: Any) -> list[Any]:
    """The frozen norms and MLPs of `model` that are known for what they are by what each of them computes."""
    changed = []
    for layer in model.modules():
        if compute := _as_norm(layer) or _as_mlp(layer):
            layer.forward = partial(compute, layer)
            changed.append(layer)
    return changed


def _is_plain(layer: Any) -> bool:
    dropped = any(not isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values())
    return not (layer.lora_variant or dropped or any(layer.lora_bias.values()))


def _adapted(layer: Any, values: torch.Tensor, *others: Any, **named: Any) -> Any:
    """What PEFT's layer gives where one adapter is active, and it is asked for nothing special."""
    active = layer.active_adapters
    special = layer.disable_adapters or layer.merged or others or named
    if special or len(active) != 1 or active[0] not in layer.lora_A:
        return type(layer).forward(layer, values, *others, **named)
    device = values.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        values = values.to(torch.get_autocast_dtype(device))
    (name,) = active
    apply: Any = _Adapted.apply
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    return apply(values, *factors, layer.scaling[name], layer.get_base_layer())


class _Adapted(torch.autograd.Function):
    """`frozen` of `values` (..., in), plus `scale` times their product with `down` (rank, in) and `up` (out, rank)."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, frozen: Any
    ) -> torch.Tensor:
        rows = values.flatten(0, -2)
        ctx.precision = down.dtype
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        narrow = rows @ down.T
        found: torch.Tensor = frozen(values)
        found.view(-1, found.shape[-1]).addmm_(narrow, up.T, alpha=scale)
        ctx.save_for_backward(rows, narrow, down, up)
        ctx.scale, ctx.frozen, ctx.shape = scale, frozen, values.shape
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, narrow, down, up = ctx.saved_tensors
        by_row = gradient.flatten(0, -2)
        by_narrow = (by_row @ up).mul_(ctx.scale)
        by_down = (by_narrow.T @ rows).to(ctx.precision)
        by_up = (by_row.T @ narrow).to(ctx.precision).mul_(ctx.scale)
        if not ctx.needs_input_grad[0]:
            return None, by_down, by_up, None, None
        weight = _weight(ctx.frozen)
        by_value = (by_row.to(weight.dtype) @ weight).to(rows.dtype).addmm_(by_narrow, down)
        return by_value.view(ctx.shape), by_down, by_up, None, None


def _weight(frozen: Any) -> torch.Tensor:
    """The weights (out, in) of a frozen layer, unpacked where they are in 4 bits."""
    weight = frozen.weight
    found: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state) if type(frozen) is Linear4bit else weight
    return found


def _as_norm(layer: Any) -> Callable[..., Any] | None:
    """How to compute a layer that divides by the root of the mean square, and scales by weight or by 1 + weight."""
    epsilon = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if set(layer._parameters) != {"weight"} or layer._modules or layer.weight.requires_grad or epsilon is None:
        return None
    weight = torch.linspace(0.5, 1.5, _PROBED)
    for offset in (0, 1):
        compute = partial(_normed, offset=offset, epsilon=epsilon)
        if _computes(layer, compute, parameters={"weight": torch.nn.Parameter(weight, requires_grad=False)}):
            return compute
    return None


def _as_mlp(layer: Any) -> Callable[..., Any] | None:
    """How to compute a layer that multiplies an activation of one linear layer with another, for a third."""
    projections = ("gate_proj", "up_proj", "down_proj")
    if layer._parameters or set(layer._modules) != {*projections, "act_fn"} or any(layer.act_fn.parameters()):
        return None
    linear = {name: torch.nn.Linear(_PROBED, _PROBED, bias=False) for name in projections}
    return _gated_mlp if _computes(layer, _gated_mlp, modules=linear | {"act_fn": layer.act_fn}) else None


def _computes(layer: Any, compute: Callable[..., Any], *, parameters: Any = None, modules: Any = None) -> bool:
    """Whether a small layer of the kind of `layer` gives what `compute` gives of it."""
    small = copy(layer)
    small._parameters, small._modules = parameters or {}, modules or {}
    values = _PROBE * torch.arange(-_PROBED, 2.0 * _PROBED).view(-1, _PROBED)
    try:
        with torch.no_grad():
            return torch.allclose(small(values), compute(small, values), rtol=1e-4)
    except Exception:  # models are their publishers' code
        return False


def _normed(layer: Any, values: torch.Tensor, *, offset: int, epsilon: float) -> Any:
    if not offset and values.dtype != layer.weight.dtype:
        return type(layer).forward(layer, values)
    apply: Any = _Norm.apply
    return apply(values, layer.weight, offset, epsilon)


class _Norm(torch.autograd.Function):
    """`values` (..., size) over the root of their mean square, times `offset` + `weight` (size)."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, offset: int, epsilon: float) -> torch.Tensor:
        ctx.save_for_backward(values, weight)
        ctx.given = offset, epsilon
        return _norm(values, weight, offset, epsilon)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        again = values.detach().requires_grad_()
        with torch.enable_grad():
            (by_value,) = torch.autograd.grad(_norm(again, weight, *ctx.given), again, gradient)
        return by_value, None, None, None


def _norm(values: torch.Tensor, weight: torch.Tensor, offset: int, epsilon: float) -> torch.Tensor:
    with torch.autocast(values.device.type, enabled=False):
        if offset:  # in fp32: the sum would be rounded
            found: torch.Tensor = rms_norm(values.float(), weight.shape, offset + weight.float(), epsilon)
        else:
            found = rms_norm(values, weight.shape, weight, epsilon)
    return found.to(values.dtype)


def _gated_mlp(layer: Any, values: torch.Tensor) -> Any:
    apply: Any = _Gated.apply
    return layer.down_proj(apply(layer.act_fn, layer.gate_proj(values), layer.up_proj(values)))


class _Gated(torch.autograd.Function):
    """`activate` of `gate`, times `up`, of which the backward pass computes the first again."""

    @staticmethod
    def forward(ctx: Any, activate: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activate = activate
        active: torch.Tensor = activate(gate)
        return active * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        again = gate.detach().requires_grad_()
        with torch.enable_grad():
            active = ctx.activate(again)
        (by_gate,) = torch.autograd.grad(active, again, gradient * up)
        return None, by_gate, gradient * active.detach()
