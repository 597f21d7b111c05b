"""Weights as they lie in safetensors files: read, changed and written tensor by tensor, never through a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from appliance.errors import InvalidInput
from appliance.train.model import nf4_round_trip

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Update:
    """What an adapter adds: `scale` * B A for the weight of each module in `factors`, (A: rank x in, B: out x rank)."""

    scale: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def weights(self) -> set[str]:
        """Names of the weights that are changed."""
        return {f"{module}.weight" for module in self.factors}


def read_update(adapter: Path) -> Update:
    """The update of a LoRA adapter in PEFT's format."""
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    factors = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            factors[module.removeprefix(_PREFIX)] = (tensors[name], tensors[f"{module}.lora_B.weight"])
    return Update(config["lora_alpha"] / config["r"], factors)


def shards(folder: Path) -> list[Path]:
    """The weight files of a model."""
    return sorted(folder.glob("*.safetensors"))


def layout(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor of a model, by name."""
    found = {}
    for shard in shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                found[name] = (shard.name, tuple(part.get_shape()), part.get_dtype())
    return found


def pairs(base: Path, model: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every tensor by name as it is in the base and in a model of the same layout."""
    for shard in shards(base):
        with safe_open(shard, framework="pt") as before, safe_open(model / shard.name, framework="pt") as after:
            for name in before.keys():  # noqa: SIM118 - not a dict
                yield name, before.get_tensor(name), after.get_tensor(name)


def merged(update: Update, rounded: set[str]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """How a base tensor becomes the release's: base + update in fp32, stored in the base's dtype.

    The weights in `rounded` are first given the values that QLoRA trained on.
    """

    def transform(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if name not in rounded and module not in update.factors:
            return tensor
        value = nf4_round_trip(tensor) if name in rounded else tensor.float()
        if module in update.factors:
            a, b = update.factors[module]
            value = value + update.scale * (b.float() @ a.float())
        return value.to(tensor.dtype)

    return transform


def write_weights(base: Path, folder: Path, transform: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Write the base's weight files into `folder`, each tensor transformed."""
    for shard in shards(base):
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata()
            content = {
                name: transform(name, file.get_tensor(name)).contiguous()
                for name in file.keys()  # noqa: SIM118 - not a dict
            }
        save_file(content, folder / shard.name, metadata=metadata)


def require_present(base: Path, names: set[str]) -> None:
    """Raise InvalidInput where a weight that is to change is not in the base's files under its own name."""
    missing = names - layout(base).keys()
    if missing:
        raise InvalidInput(
            "not_mergeable",
            f"the base model's files hold no tensor {min(missing)}",
            "target modules whose weights the files hold, or use another base model",
        )


def require_mergeable(base: Path, update: Update, rounded: set[str]) -> None:
    """Raise InvalidInput where a changed weight is not in the base's files in the shape that its update has."""
    require_present(base, update.weights | rounded)
    present = layout(base)
    for module, (a, b) in update.factors.items():
        shape = present[f"{module}.weight"][1]
        if shape != (b.shape[0], a.shape[1]):
            raise InvalidInput(
                "not_mergeable",
                f"{module} is {shape} in the base model and {(b.shape[0], a.shape[1])} in the adapter",
                "train again on this base model",
            )
