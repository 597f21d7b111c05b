"""What merged weights have to be, as PEFT itself computes it: nothing here knows how our merge does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from appliance.adapters import WEIGHTS
from appliance.architecture import Architecture, OfExperts, quantised_modules
from appliance.release.peft_format import PREFIX
from appliance.train.model import nf4_round_trip

_NAME = "default"
"""PEFT's name of the one adapter that is loaded."""


class Oracle:
    """PEFT's layers of an adapter over a base without values, which is given them one weight at a time.

    `rounded`: the adapter is merged into the values that NF4 has of the base's linear layers.
    """

    def __init__(self, adapter: Path, base: Path, *, rounded: bool) -> None:
        architecture = Architecture(base)
        skeleton = architecture.skeleton
        self._parameters: dict[str, str] = {}
        """What the model calls the stored tensors that may differ from the base's."""
        self._rounded: set[str] = set()
        if rounded:
            for module in quantised_modules(skeleton):
                names = architecture.stored({f"{module}.weight"})
                self._parameters |= dict.fromkeys(names, f"{module}.weight")
                self._rounded.update(names)
        groups = {name: architecture.tied(name) for name, _ in skeleton.named_parameters()}
        _without_values(skeleton)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that only a model with values has
            model = PeftModel.from_pretrained(
                skeleton, adapter, torch_device="cpu", low_cpu_mem_usage=True, local_files_only=True
            )
        own = load_file(adapter / WEIGHTS)
        self._own: dict[str, torch.Tensor] = {}
        """Weights of the base that the adapter has its own of, in the place of the stored ones."""
        self._layers: dict[str, LoraLayer] = {}
        self._saved: dict[str, torch.Tensor] = {}
        self._of_experts: dict[str, OfExperts] = {}
        self._wrappers: dict[str, ParamWrapper] = {}
        self._model: Any = model.base_model.model
        self._added: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, ParamWrapper):
                parameter = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
                parts = {one.name: one for one in architecture.of_experts(parameter)}
                self._parameters |= dict.fromkeys(parts, parameter)
                self._of_experts |= parts
                self._wrappers[parameter] = module
            elif isinstance(module, LoraLayer):
                names = architecture.stored(groups[f"{name}.weight"])
                self._parameters |= dict.fromkeys(names, f"{name}.weight")
                self._layers |= dict.fromkeys(names, module)
                if (value := own.get(f"{PREFIX}{name}.base_layer.weight")) is not None:
                    self._own |= dict.fromkeys(names, value)
            elif isinstance(module, ModulesToSaveWrapper):
                for part, value in module.modules_to_save[_NAME].named_parameters():
                    names = architecture.stored(groups[f"{name}.{part}"])
                    self._parameters |= dict.fromkeys(names, f"{name}.{part}")
                    self._saved |= dict.fromkeys(names, value.detach())

    @property
    def targeted(self) -> set[str]:
        """Names of the stored tensors that the adapter changes."""
        return self._layers.keys() | self._saved.keys() | self._of_experts.keys()

    @property
    def changed(self) -> set[str]:
        """Names of the stored tensors that may differ from the base's."""
        return self.targeted | self._rounded

    def values(self, model: Any, name: str) -> torch.Tensor:
        """Where the loaded `model` has the values of the stored tensor `name`: a view of a parameter."""
        parameter: torch.Tensor = model.get_parameter(self._parameters[name])
        return self._of_experts[name].within(parameter) if name in self._of_experts else parameter

    def start(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter is added to, of the stored `weight`: fp32, a copy."""
        weight = self._own.get(name, weight)
        return nf4_round_trip(weight) if name in self._rounded else weight.to(torch.float32, copy=True)

    def merged(self, name: str, start: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter merged in, fp32. `start` is left as it is."""
        if name in self._saved:
            return self._saved[name].float()
        if name in self._of_experts:
            return start + self._added_to_experts(self._parameters[name])[name]
        if name not in self._layers:
            return start
        layer: Any = self._layers[name]
        base = layer.get_base_layer()
        nothing, base.weight = base.weight, torch.nn.Parameter(start.clone(), requires_grad=False)
        try:
            layer.merge()
            value: torch.Tensor = base.weight.data
            return value
        finally:
            base.weight = nothing
            layer.merged_adapters.clear()

    def _added_to_experts(self, parameter: str) -> dict[str, torch.Tensor]:
        """What PEFT adds to a parameter of all experts, by the stored tensors that Transformers would save it as."""
        if parameter in self._added:
            return self._added[parameter]
        delta = self._wrappers[parameter].get_delta_weight(_NAME).detach()
        parts = sorted(revert_weight_conversion(self._model, {parameter: delta}).items(), key=_natural)
        names = sorted((name for name in self._of_experts if self._parameters[name] == parameter), key=dot_natural_key)
        # Files have the tensors of a layer's two parameters in turn.
        while len(self._added) > 1:
            del self._added[next(iter(self._added))]
        self._added[parameter] = {name: value for name, (_, value) in zip(names, parts, strict=True)}
        return self._added[parameter]


def _natural(item: tuple[str, torch.Tensor]) -> Any:
    return dot_natural_key(item[0])


def _without_values(skeleton: Any) -> None:
    """Give each parameter of a model on the meta device its shape on the CPU, for which one value is enough.

    PEFT puts an adapter where its base is.
    """
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
