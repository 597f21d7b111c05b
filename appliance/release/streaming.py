"""Models that a GPU cannot hold in 16 bits are scored on it all the same: their layers stay in the files, mapped into
memory, and come to the GPU for as long as a pass goes through them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from appliance.architecture import empty_model
from appliance.home import require_space
from appliance.train.model import DTYPE, ON_GPU, load_model

BESIDE = 2 << 30
"""Bytes that a pass which scores takes beside the weights. Estimated."""
_STREAMED = "_streamed_layers"


def load_to_score(folder: Path) -> Any:
    """The model in `folder` as `load_model` gives it, or with layers that stream where the GPU cannot hold it.

    Raises what `load_model` raises.
    """
    room = free_room()
    if room is None or _bytes_of(empty_model(folder)) <= room:
        return load_model(folder)
    return stream(load_model(folder, mapped=True), room)


def free_room() -> int | None:
    """Bytes of the GPU that a model's weights can have now; None where there is none."""
    return torch.cuda.mem_get_info()[0] - BESIDE if ON_GPU else None


def stream(model: Any, room: int) -> Any:
    """`model`, mapped into memory, so that it takes `room` bytes of the GPU or little more.

    What is outside its layers goes there, and the first layers for which there is room.
    """
    device = torch.device("cuda" if ON_GPU else "cpu")
    layers = _layers(model)
    within = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    outside = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in within]
    for tensor in outside:
        tensor.data = tensor.data.to(device)
    sizes = [_bytes_of(layer) for layer in layers]
    staying = how_many_stay(sizes, room - sum(tensor.nbytes for tensor in outside))
    for layer in layers[:staying]:
        layer.to(device)
    for layer in layers[staying:]:
        _Visit(layer, device)
    setattr(model, _STREAMED, layers[staying:])
    return model


def how_many_stay(sizes: Sequence[int], room: int) -> int:
    """How many of the first layers fit in `room` bytes, the largest of the others beside them. `sizes` are bytes."""
    counts = range(len(sizes), 0, -1)
    return next((count for count in counts if sum(sizes[:count]) + max(sizes[count:], default=0) <= room), 0)


def is_streamed(model: Any) -> bool:
    """Whether a pass through `model`, or the model beneath its adapter, brings its layers one by one."""
    return hasattr(model, _STREAMED)


def make_writable(model: Any, folder: Path) -> None:
    """Give layers that stream copies of their weights on the disk of `folder`, so that these can be changed.

    In memory they would not have to fit. The files have no names: what they take is free when the model is gone, and
    after any end of the process. Raises NoSpace.
    """
    parameters = [parameter for layer in getattr(model, _STREAMED, ()) for parameter in layer.parameters()]
    if not parameters:
        return
    require_space(folder, sum(parameter.nbytes for parameter in parameters), "verifying layer by layer")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number, parameter in enumerate(parameters):
            path = f"{scratch}/{number}"
            copy = torch.from_file(path, shared=True, size=parameter.numel(), dtype=parameter.dtype)
            parameter.data = copy.view(parameter.shape).copy_(parameter.data)
            os.unlink(path)


class _Visit:
    """Brings what a layer consists of to `device` before its pass, and lets go of it afterwards, however that ended."""

    def __init__(self, layer: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._at_home: list[tuple[torch.Tensor, torch.Tensor]] = []
        layer.register_forward_pre_hook(self._bring)
        layer.register_forward_hook(self._leave, always_call=True)

    def _bring(self, layer: torch.nn.Module, _: Any) -> None:
        for tensor in (*layer.parameters(), *layer.buffers()):
            self._at_home.append((tensor, tensor.data))
            tensor.data = tensor.data.to(self._device, copy=True)

    def _leave(self, *_: Any) -> None:
        for tensor, home in self._at_home:
            tensor.data = home
        self._at_home.clear()


def _layers(model: Any) -> list[torch.nn.Module]:
    """The modules that Transformers would not divide between devices, those within others left out."""
    undivided = set(model._no_split_modules or ())
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in undivided]
    names = {name for name, _ in found}
    return [module for name, module in found if not any(name.startswith(f"{other}.") for other in names)]


def _bytes_of(module: torch.nn.Module) -> int:
    """Bytes of its parameters in the type of models that are scored."""
    return sum(parameter.numel() * DTYPE.itemsize for parameter in module.parameters())
