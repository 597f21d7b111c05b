"""Models that a GPU cannot hold in 16 bits are scored on it all the same: their layers come to it for as long as a pass
goes through them, and stay beside meanwhile, mapped from their files into memory.

Experts, and weights that are stored in another type, are made of what the files hold, and take memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from appliance.architecture import empty_model, expert_parameters
from appliance.errors import InvalidInput
from appliance.home import require_space
from appliance.release.weights import DTYPES, layout
from appliance.train.model import DTYPE, ON_GPU, load_model

BESIDE = 2 << 30
"""Bytes that a pass which scores takes beside the weights. Estimated."""
_STREAMED = "_streamed_layers"
_STORED = {dtype: name for name, dtype in DTYPES.items()}


def load_to_score(folder: Path) -> Any:
    """The model in `folder` as `load_model` gives it, or with layers that stream where the GPU cannot hold it.

    Raises what `load_model` raises, and InvalidInput where this machine's memory has no room for what cannot be mapped.
    """
    room, skeleton = free_room(), empty_model(folder)
    if room is None or _bytes_of(skeleton) <= room:
        return load_model(folder)
    _require_memory(folder, skeleton)
    return stream(load_model(folder, mapped=True), room, torch.device("cuda" if ON_GPU else "cpu"))


def free_room() -> int | None:
    """Bytes of the GPU that a model's weights can have now; None where there is none."""
    return torch.cuda.mem_get_info()[0] - BESIDE if ON_GPU else None


def stream(model: Any, room: int, device: torch.device) -> Any:
    """`model`, mapped into memory, so that it takes `room` bytes of `device` or little more.

    What is outside its layers goes there, and the first layers for which there is room.
    """
    layers = _layers(model)
    within = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    outside = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in within]
    _bring(outside, device)
    sizes = [_bytes_of(layer) for layer in layers]
    staying = how_many_stay(sizes, room - sum(tensor.nbytes for tensor in outside))
    for layer in layers[:staying]:
        _bring((*layer.parameters(), *layer.buffers()), device)
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

    In memory they would not have to fit. The files lose their names before they are written to: what they take is free
    when the model is gone, and after any end of the process. Raises NoSpace.
    """
    parameters = [parameter for layer in getattr(model, _STREAMED, ()) for parameter in layer.parameters()]
    if not parameters:
        return
    require_space(folder, sum(parameter.nbytes for parameter in parameters), "verifying layer by layer")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number, parameter in enumerate(parameters):
            path = f"{scratch}/{number}"
            copy = torch.from_file(path, shared=True, size=parameter.numel(), dtype=parameter.dtype)
            os.unlink(path)
            parameter.data = copy.view(parameter.shape).copy_(parameter.data)


class _Visit:
    """Brings what a layer consists of to `device` before its pass, and lets go of it afterwards, however that ended."""

    def __init__(self, layer: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._at_home: list[tuple[torch.Tensor, torch.Tensor]] = []
        layer.register_forward_pre_hook(self._bring)
        layer.register_forward_hook(self._leave, always_call=True)

    def _bring(self, layer: torch.nn.Module, _: Any) -> None:
        tensors = (*layer.parameters(), *layer.buffers())
        self._at_home += [(tensor, tensor.data) for tensor in tensors]
        _bring(tensors, self._device)

    def _leave(self, *_: Any) -> None:
        for tensor, home in self._at_home:
            tensor.data = home
        self._at_home.clear()


def _bring(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device, copy=True)


def _require_memory(folder: Path, skeleton: Any) -> None:
    stored = {dtype for _, _, dtype in layout(folder).values()}
    copied = [skeleton.get_parameter(name) for name in expert_parameters(skeleton)]
    if stored != {_STORED[DTYPE]}:
        copied = list(skeleton.parameters())
    needed, free = sum(one.numel() * DTYPE.itemsize for one in copied), psutil.virtual_memory().available
    if needed > free:
        raise InvalidInput(
            "no_memory",
            f"{folder.name} does not fit the GPU in 16 bits, and to be verified layer by layer takes "
            f"{needed / 2**30:.1f} GiB of this machine's memory, of which {free / 2**30:.1f} are free",
            "free memory, and resume the run; or take a smaller base",
        )


def _layers(model: Any) -> list[torch.nn.Module]:
    """The modules that Transformers would not divide between devices, those within others left out."""
    undivided = set(model._no_split_modules or ())
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in undivided]
    names = {name for name, _ in found}
    return [module for name, module in found if not any(name.startswith(f"{other}.") for other in names)]


def _bytes_of(module: torch.nn.Module) -> int:
    """Bytes of its parameters in the type of models that are scored."""
    return sum(parameter.numel() * DTYPE.itemsize for parameter in module.parameters())
