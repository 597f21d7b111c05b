"""An adapter in PEFT's format as changes to the base's stored weights. What cannot be merged is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from appliance.adapters import CONFIG, WEIGHTS
from appliance.architecture import Architecture, empty_model, quantised_modules
from appliance.home import sha256
from appliance.models import tensor_names
from appliance.release.peft_format import ADAPTER_SHA256, PREFIX, lora_scale, not_mergeable, read_config, unusable
from appliance.release.weights import Change, layout, require_fitting
from appliance.train.model import nf4_round_trip
from appliance.train.recipe import Recipe

_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


@dataclass(frozen=True)
class LowRank:
    """`scale` * left @ right is added, (left: rows x rank, right: rank x columns), of the weight as it is stored.

    With DoRA (arXiv 2402.09353) each output's weights are then brought to the length in `magnitude`. An output is a
    row, or where `by_column`, a column. `start` replaces the stored weight where the adapter brings its own.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    by_column: bool = False
    start: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        return self.magnitude is not None and self.by_column

    def fits(self, shape: tuple[int, ...]) -> bool:
        outputs = shape[-1] if self.by_column else shape[0]
        lengths = self.magnitude is None or self.magnitude.shape == (outputs,)
        return lengths and shape == (self.left.shape[0], self.right.shape[1])

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        value = weight if self.start is None else weight.copy_(self.start[rows])
        value.addmm_(self.left[rows], self.right, alpha=self.scale)
        if self.magnitude is None:
            return value
        if self.by_column:
            return value.mul_(self.magnitude / torch.linalg.vector_norm(value, dim=0))
        return value.mul_((self.magnitude[rows] / torch.linalg.vector_norm(value, dim=1))[:, None])


@dataclass(frozen=True)
class LowRankOfExperts:
    """`scale` * left[e] @ right[e] is added to the matrix of each expert e of a tensor with those of all."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    whole: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.left.shape[:2], self.right.shape[2])

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight.baddbmm_(self.left[rows], self.right[rows], alpha=self.scale)


@dataclass(frozen=True)
class Replaced:
    """A weight that was trained itself and saved whole."""

    value: torch.Tensor
    whole: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 0 and shape == tuple(self.value.shape)

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight.copy_(self.value[rows])


@dataclass(frozen=True)
class Rounded:
    """A weight that QLoRA keeps in NF4: it is given the values of that form, then changed as `then` says."""

    then: Change | None
    whole: bool = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.then is None or self.then.fits(shape)

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        value = nf4_round_trip(weight)
        return value if self.then is None else self.then(value, rows)


def require_trained(adapter: Path, run: Path, recipe: Recipe) -> None:
    """Raise InvalidInput unless `adapter` holds the weights that the run's last stage left, or that it was given."""
    if recipe.given:
        expected, whose, advice = recipe.given.sha256, "was given", "give it again: `appliance merge`"
    else:
        last = recipe.stages[-1].name
        expected = json.loads((run / last / "result.json").read_bytes()).get(ADAPTER_SHA256)
        whose, advice = f"{last} has left", "queue the recipe again"
    if sha256(adapter / WEIGHTS) != expected:
        raise not_mergeable(f"the adapter is not the one that {whose}", advice)


def read_changes(adapter: Path, base: Path) -> dict[str, Change]:
    """What the adapter in directory `adapter` changes in the base's stored weights, by their names.

    Raises InvalidInput `not_mergeable` naming what cannot be merged.
    """
    config, tensors = _read(adapter)
    architecture = Architecture(base)
    modules = dict(architecture.skeleton.named_modules())
    wrapped = _wrapped_parameters(adapter, base) if config.get("target_parameters") else {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, part = _split(name.removeprefix(PREFIX))
        parts.setdefault(module, {})[part] = tensor
    changes: dict[str, Change] = {}
    by_parameter: dict[str, Change] = {}
    for module, found in parts.items():
        if module in wrapped:
            changes |= _of_experts(architecture, config, wrapped[module], modules, found)
        elif any(part in _FACTORS for part in found):
            by_parameter[f"{module}.weight"] = _low_rank(modules.get(module), config, module, found)
        else:
            by_parameter |= {f"{module}.{part}": Replaced(tensor) for part, tensor in found.items()}
    for parameter, change in by_parameter.items():
        group = architecture.tied(parameter)
        if any(not _same(change, by_parameter.get(member)) for member in group):
            raise not_mergeable(
                f"{' and '.join(sorted(group))} are one tensor in the base model, and the adapter does not change "
                "them alike",
                "train it again with ensure_weight_tying, or on other modules",
            )
        changes |= dict.fromkeys(architecture.stored(group), change)
    require_fitting(base, changes)
    return changes


def require_complete(adapter: Path, base: Path) -> None:
    """Raise InvalidInput where the adapter lacks layers that its settings name, as PEFT reads those."""
    config = LoraConfig.from_pretrained(adapter)
    model = inject_adapter_in_model(config, Architecture(base).skeleton, low_cpu_mem_usage=True)
    wanted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    held = {_split(name.removeprefix(PREFIX))[0] for name in tensor_names(adapter / WEIGHTS)}
    if missing := sorted(wanted - held):
        raise not_mergeable(
            f"the adapter's settings name {len(wanted)} layers, and its file lacks {len(missing)} of them, "
            f"such as {missing[0]}",
            f"save it again, or mend target_modules in its {CONFIG}",
        )


def rounded_changes(base: Path, changes: dict[str, Change]) -> dict[str, Change]:
    """`changes` on top of the weights that QLoRA trained on: those of its linear layers in NF4."""
    architecture = Architecture(base)
    names = {
        name
        for module in quantised_modules(architecture.skeleton)
        for name in architecture.stored({f"{module}.weight"})
    }
    rounded: dict[str, Change] = {name: Rounded(changes.get(name)) for name in names}
    require_fitting(base, rounded)
    return changes | rounded


def require_present(base: Path, parameters: set[str], of_experts: set[str]) -> None:
    """Raise InvalidInput where a weight that training is to change is not in the base's files."""
    architecture, present = Architecture(base), layout(base)
    missing = sorted(name for name in parameters if architecture.stored([name])[0] not in present)
    for name in sorted(of_experts):
        architecture.of_experts(name)
    if missing:
        raise not_mergeable(
            f"the base model's files hold no tensor {missing[0]}",
            "target modules whose weights the files hold, or use another base model",
        )


def _read(adapter: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings and tensors of an adapter that can be merged as far as its settings say."""
    config = read_config(adapter)
    try:
        return config, load_file(adapter / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise unusable(error) from None


def _split(name: str) -> tuple[str, str]:
    """Module and part of a tensor's name in an adapter."""
    name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    for part in (*_FACTORS, "base_layer.weight"):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    module, _, part = name.rpartition(".")
    return module, part


def _low_rank(module: Any, config: dict[str, Any], name: str, parts: dict[str, torch.Tensor]) -> LowRank:
    """The change of the base's `module`, turned to the way in which its weight is stored."""
    if module is None:
        raise not_mergeable(
            f"the base model has no module {name}, which the adapter changes",
            "merge into the base model that it was trained on",
        )
    transposed = isinstance(module, Conv1D | torch.nn.Embedding)
    if not transposed and not isinstance(module, torch.nn.Linear):
        raise not_mergeable(f"{name} is a {type(module).__name__}, not a linear or embedding layer", "take it out")
    kind = "lora_embedding_{}" if isinstance(module, torch.nn.Embedding) else "lora_{}.weight"
    a, b = parts.pop(kind.format("A"), None), parts.pop(kind.format("B"), None)
    magnitude, start = parts.pop("lora_magnitude_vector", None), parts.pop("base_layer.weight", None)
    if a is None or b is None or parts:
        raise not_mergeable(
            f"the adapter holds {', '.join(sorted(parts)) or 'one factor only'} for {name}", "save it with PEFT again"
        )
    if start is not None and start.shape != module.weight.shape:
        raise not_mergeable(
            f"the vocabulary was resized: {name} is {tuple(start.shape)} in the adapter and "
            f"{tuple(module.weight.shape)} in the base model",
            "train it with the base's own vocabulary",
        )
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise not_mergeable(f"the adapter's settings and its tensors disagree on DoRA for {name}", "save it again")
    a, b = a.float(), b.float()
    left, right = (a.T.contiguous(), b.T.contiguous()) if transposed else (b, a)
    scale = lora_scale(config, name, len(a))
    return LowRank(left, right, scale, None if magnitude is None else magnitude.float(), transposed, start)


def _wrapped_parameters(adapter: Path, base: Path) -> dict[str, str]:
    """By the name of PEFT's layer the parameter that it adapts; those of one module are wrapped in each other."""
    model = inject_adapter_in_model(LoraConfig.from_pretrained(adapter), empty_model(base), low_cpu_mem_usage=True)
    return {
        name: f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def _of_experts(
    architecture: Architecture,
    config: dict[str, Any],
    parameter: str,
    modules: dict[str, Any],
    parts: dict[str, torch.Tensor],
) -> dict[str, Change]:
    """The changes of the stored tensors of a parameter with a matrix for each expert, by their names."""
    module, _, name = parameter.rpartition(".")
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    weight = getattr(modules[module], name)
    if a is None or b is None or len(parts) > 2 or weight.ndim != 3 or len(a) % len(weight):
        raise not_mergeable(
            f"{parameter} has an adapter that is not of two factors for each of its experts", "train it without"
        )
    experts, rank = len(weight), len(a) // len(weight)
    right = a.float().view(experts, rank, -1)
    left = b.float().view(len(b), rank, experts).permute(2, 0, 1)  # PEFT lets the experts' numbers change fastest
    scale = lora_scale(config, parameter, rank)
    if getattr(modules[module], "is_transposed", False):
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    found: dict[str, Change] = {}
    for stored in architecture.of_experts(parameter):
        if stored.expert is None:
            found[stored.name] = LowRankOfExperts(left.contiguous(), right.contiguous(), scale)
        else:
            found[stored.name] = LowRank(stored.within(left).contiguous(), right[stored.expert], scale)
    return found


def _same(one: Change, other: Change | None) -> bool:
    """Whether two changes have the same effect on one tensor."""
    if one is other:
        return True
    if isinstance(one, Replaced) and isinstance(other, Replaced):
        return torch.equal(one.value, other.value)
    if isinstance(one, LowRank) and isinstance(other, LowRank) and one.left.shape == other.left.shape:
        same = torch.equal(one.left, other.left) and torch.equal(one.right, other.right) and one.scale == other.scale
        return same and one.magnitude is None and other.magnitude is None
    return False
