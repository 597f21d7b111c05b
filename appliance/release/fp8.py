"""What FP8 makes of a model, as vLLM rounds it while it loads 16-bit files (`--quantization fp8_per_tensor`).

The weights of each linear layer, and of each expert, are divided by one scale, so that the largest becomes the largest
number of float8_e4m3fn, and rounded to nearest. On a card that multiplies in FP8 what goes into a layer is rounded too,
with a scale for each token. Embeddings, norms, routers and the output head stay as they are.

vLLM takes layers that read the same input together, such as q, k and v, and gives them one scale. Here each has its
own: the numbers are rounded as coarsely, because the type's steps grow with them.
"""

from __future__ import annotations

from typing import Any

import torch

from appliance.architecture import expert_parameters
from appliance.models import stays_in_16_bits

_TYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_TYPE).max
_LEAST_SCALE = 1 / (512 * _LARGEST)
"""Of a token, as vLLM has it."""


@torch.no_grad()
def round_to_fp8(model: Any, *, inputs: bool) -> None:
    """Give the weights of the loaded `model` the values that they have in FP8.

    `inputs`: from now on its layers read their inputs so too, experts the first time that they multiply.
    """
    head = model.get_output_embeddings()
    readers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not stays_in_16_bits(f"{name}.weight")
    }
    for layer in readers.values():
        layer.weight.copy_(rounded(layer.weight, layer.weight.abs().amax()))
    for name in expert_parameters(model):
        experts = model.get_parameter(name)
        for weight in experts:
            weight.copy_(rounded(weight, weight.abs().amax()))
        readers[name.rpartition(".")[0]] = model.get_submodule(name.rpartition(".")[0])
    for layer in readers.values() if inputs else ():
        layer.register_forward_pre_hook(_round_input)


def _round_input(layer: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    if not given:
        return given
    first, *others = given
    return rounded(first, first.abs().amax(-1, keepdim=True)), *others


def rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """`values` as FP8 has them where `largest` is the largest number of the type."""
    scale = (largest.float() / _LARGEST).clamp_min(_LEAST_SCALE)
    return ((values.float() / scale).clamp(-_LARGEST, _LARGEST).to(_TYPE).float() * scale).to(values.dtype)
