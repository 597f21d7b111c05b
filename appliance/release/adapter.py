"""An adapter in PEFT's format as changes to the base's stored weights. What cannot be merged is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from appliance.release.peft_format import PREFIX, WEIGHTS, lora_scale, not_mergeable, read_config, unusable
from appliance.release.weights import Change, layout, require_fitting
from appliance.train.model import nf4_round_trip, quantised_modules

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


def read_changes(adapter: Path, base: Path) -> dict[str, Change]:
    """What the adapter in directory `adapter` changes in the base's stored weights, by their names.

    Raises InvalidInput `not_mergeable` naming what cannot be merged.
    """
    config, tensors = _read(adapter)
    skeleton = load_skeleton(base)
    stored, modules = layout(base), dict(skeleton.named_modules())
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, part = _split(name.removeprefix(PREFIX))
        parts.setdefault(module, {})[part] = tensor
    by_parameter: dict[str, Change] = {}
    for module, found in parts.items():
        if any(part in _FACTORS for part in found):
            by_parameter[f"{module}.weight"] = _low_rank(modules.get(module), config, module, found)
        else:
            by_parameter |= {f"{module}.{part}": Replaced(tensor) for part, tensor in found.items()}
    changes: dict[str, Change] = {}
    for parameter, change in by_parameter.items():
        group = tie_group(skeleton, parameter)
        if any(not _same(change, by_parameter.get(member)) for member in group):
            raise not_mergeable(
                f"{' and '.join(sorted(group))} are one tensor in the base model, and the adapter does not change "
                "them alike",
                "train it again with ensure_weight_tying, or on other modules",
            )
        changes |= dict.fromkeys(stored_names(skeleton, stored, group), change)
    require_fitting(base, changes)
    return changes


def rounded_changes(base: Path, changes: dict[str, Change]) -> dict[str, Change]:
    """`changes` on top of the weights that QLoRA trained on: those of its linear layers in NF4."""
    skeleton, stored = load_skeleton(base), layout(base)
    names = {
        name for module in quantised_modules(skeleton) for name in stored_names(skeleton, stored, {f"{module}.weight"})
    }
    rounded: dict[str, Change] = {name: Rounded(changes.get(name)) for name in names}
    require_fitting(base, rounded)
    return changes | rounded


def require_present(base: Path, parameters: set[str]) -> None:
    """Raise InvalidInput where a weight that training is to change is not in the base's files."""
    skeleton, stored = load_skeleton(base), layout(base)
    missing = sorted(name for name in parameters if stored_names(skeleton, stored, [name])[0] not in stored)
    if missing:
        raise not_mergeable(
            f"the base model's files hold no tensor {missing[0]}",
            "target modules whose weights the files hold, or use another base model",
        )


def load_skeleton(base: Path) -> Any:
    """The base model without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))


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


def tie_group(skeleton: Any, parameter: str) -> set[str]:
    """`parameter` and the names of all that share its tensor."""
    tied: dict[str, str] = skeleton.all_tied_weights_keys
    root = tied.get(parameter, parameter)
    return {root, *(name for name, other in tied.items() if other == root)}


def stored_names(skeleton: Any, stored: dict[str, Any], parameters: Iterable[str]) -> list[str]:
    """Names in the files of what the model calls `parameters`; some files leave out the body's name, or add it."""
    body = f"{skeleton.base_model_prefix}."
    spellings = [(name, name.removeprefix(body), body + name) for name in parameters]
    found = [next((name for name in names if name in stored), None) for names in spellings]
    names = [name for name in found if name is not None]
    return names or [min(parameters)]


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
