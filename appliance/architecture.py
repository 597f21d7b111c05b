"""What is inside a base model: its class, the layers of its text, and the names of its weights in the files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from appliance.errors import InvalidInput, reason
from appliance.models import stored_names

_OF_TEXT: dict[str, str] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
"""By type of model, the class that answers texts; of a type that has two, the one without images."""
_NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_ASKED_WITH_MORE = {
    **dict.fromkeys(("blip", "idefics", "kosmos-2", "kosmos-2.5", "pix2struct", "pp_formulanet"), "an image"),
    "pi0": "images and the state of a robot",
}
"""Types of models that cannot be asked with texts alone, and with what: seen by `make bench-models`."""
_NO_PRODUCTS = ("GroupedLinear", "Router")
"""How classes of linear layers are called that answer something else than a product."""
_CAUSAL_ANYHOW = ("gpt_neox", "gpt_neox_japanese")
"""Types whose configs say that they are no decoders, which the models take no notice of."""
_CLASSES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}


def model_class(config: Any) -> Any:
    """The class of a model as it was published. Raises InvalidInput where Transformers has none that answers texts."""
    needs = _ASKED_WITH_MORE.get(config.model_type)
    reads_both_ways = getattr(config, "is_decoder", None) is False and config.model_type not in _CAUSAL_ANYHOW
    if config.is_encoder_decoder or reads_both_ways:
        needs = "an encoder"
    if needs:
        raise InvalidInput(
            "unsupported_architecture",
            f"a model of the type {config.model_type} does not go on with a text: it works with {needs}",
            "use a model for chat",
        )
    named = next((name for name in config.architectures or () if name in _CLASSES), None)
    name = named or _OF_TEXT.get(config.model_type)
    if name is None:
        raise InvalidInput(
            "unsupported_architecture",
            f"a model of the type {config.model_type} does not answer texts, as far as Transformers knows",
            "use a model for chat",
        )
    return getattr(transformers, name)


def empty_model(base: Path, **options: Any) -> Any:
    """The model in `base` on the meta device, without values; `options` as Transformers' from_pretrained takes them.

    Raises InvalidInput for a directory without a usable config.json.
    """
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            return model_class(config)._from_config(config, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise InvalidInput(
            "bad_model", f"{base.name} is no model that Transformers can make: {reason(error)}", "use another base"
        ) from error


def linear_modules(model: Any) -> list[str]:
    """Names of the linear layers by which the model reads and writes text: those that can have an adapter.

    They are not the output head, not what sees images or hears, not what Mamba's kernels take the weights of, and no
    routers or groups of layers, which answer more than a product.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    of_text = decoder if decoder is not None and not isinstance(decoder, torch.nn.Linear) else model
    inside = {id(module) for module in of_text.modules()}
    past_the_layer = {
        id(mixer.out_proj)
        for mixer in of_text.modules()
        if all(hasattr(mixer, part) for part in ("A_log", "D", "out_proj"))
    }
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not type(module).__name__.endswith(_NO_PRODUCTS)
        and "router" not in name.split(".")
        and module is not head
        and id(module) in inside
        and id(module) not in past_the_layer
    ]


def expert_parameters(model: Any) -> list[str]:
    """Names of the parameters of the text's experts that are one tensor with a matrix for each of them."""
    decoder = model.get_decoder()
    inside = {id(parameter) for parameter in (model if decoder is None else decoder).parameters()}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name.split(".") and id(parameter) in inside
    ]


def trainable_modules(model: Any) -> set[str]:
    """Names of the linear layers that `all-linear` gives an adapter."""
    return set(linear_modules(model)) - taken_for_experts(model)


def require_mergeable(base: Path) -> None:
    """Raise InvalidInput where an adapter on the model in `base` could not be trained or merged.

    Its weights need not be there: names of tensors are taken from the index, and not looked at where there is none.
    """
    architecture = Architecture(base)
    takes = inspect.signature(type(architecture.skeleton).forward).parameters.values()
    needs = [one.name for one in takes if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if more := [name for name in needs if name not in ("self", "input_ids")]:
        raise InvalidInput(
            "unsupported_architecture",
            f"a {type(architecture.skeleton).__name__} cannot be asked with texts alone: it needs {more[0]}",
            "use a model for chat",
        )
    modules = trainable_modules(architecture.skeleton)
    if not modules:
        raise InvalidInput(
            "no_linear_layer", f"{base.name} has no linear layer that could have an adapter", "use another model"
        )
    if not stored_names(base):
        return
    for module in sorted(modules):
        parameter = f"{module}.weight"
        (name,) = architecture.stored(architecture.tied(parameter))[:1]
        if name not in architecture.names:
            raise InvalidInput(
                "not_mergeable",
                f"the files of {base.name} hold no tensor for {parameter}, so that no adapter could be merged into it",
                "use another model, or another copy of it",
            )


def quantised_modules(model: Any) -> list[str]:
    """Names of the layers that QLoRA keeps in NF4."""
    return [name for name in linear_modules(model) if isinstance(model.get_submodule(name), torch.nn.Linear)]


def taken_for_experts(model: Any) -> set[str]:
    """Names of linear layers beside experts that PEFT takes for those, which are one tensor, because of their names."""
    if not any(".experts." in name for name, _ in model.named_parameters()):
        return set()
    return {name for name in linear_modules(model) if name.rpartition(".")[2] in _NAMES_OF_EXPERTS}


def named_together(model: Any, modules: set[str]) -> list[str] | str:
    """`modules` as an adapter's settings name them: by the ends of their names, or where others end so, a pattern."""
    ends = sorted({name.rpartition(".")[2] for name in modules})
    every = [name for name, _ in model.named_modules()]
    if {name for name in every if name.rpartition(".")[2] in ends} == modules:
        return ends
    names = zip(min(modules).split("."), max(modules).split("."), strict=False)
    begin = ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], names))
    pattern = rf"{re.escape(begin)}\.(.*\.)?({'|'.join(map(re.escape, ends))})"
    return pattern if {name for name in every if re.fullmatch(pattern, name)} == modules else sorted(modules)


@dataclass(frozen=True)
class OfExperts:
    """What the stored tensor `name` holds of a parameter with a matrix (outputs, inputs) for each expert.

    All of it, or where `expert` is a number, the `part`th of `parts` of this expert's outputs.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """A view of the parameter: what this tensor holds of it."""
        return parameter if self.expert is None else parameter[self.expert].chunk(self.parts)[self.part]


class Architecture:
    """A base model without values, and the names under which its files hold its parameters."""

    def __init__(self, base: Path) -> None:
        self.skeleton = empty_model(base)
        self.names = frozenset(stored_names(base))
        """Of the tensors in the files."""
        self._experts = {name: one.shape[0] for name, one in self.skeleton.named_parameters() if one.ndim == 3}
        self._stored = self._parts()
        """By parameter the tensors in the files that it is made of, and the converter's pattern of each, if any."""

    def _parts(self) -> dict[str, list[tuple[str, str | None]]]:
        transforms = get_model_conversion_mapping(self.skeleton)
        renamed = [one for one in transforms if isinstance(one, WeightRenaming)]
        converted = [one for one in transforms if isinstance(one, WeightConverter)]
        self._converters = {pattern: one for one in converted for pattern in one.source_patterns}
        state, prefix = self.skeleton.state_dict(), self.skeleton.base_model_prefix
        found: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(self.names):
            parameter, pattern = rename_source_key(name, renamed, converted, prefix, state)
            found.setdefault(parameter, []).append((name, pattern))
        return found

    def tied(self, parameter: str) -> set[str]:
        """`parameter` and the names of all that share its tensor."""
        tied: dict[str, str] = self.skeleton.all_tied_weights_keys
        root = tied.get(parameter, parameter)
        return {root, *(name for name, other in tied.items() if other == root)}

    def stored(self, parameters: Iterable[str]) -> list[str]:
        """Names in the files of what the model calls `parameters`, which are one tensor; the least where none is there.

        Raises InvalidInput where the tensor in the model is another than those in the files, such as several of them.
        """
        parameters = sorted(parameters)
        found = [tensor for name in parameters for tensor in self._stored.get(name, ())]
        if made_over := [name for name, pattern in found if pattern]:
            raise _made_over(parameters[0], made_over[0])
        return [name for name, _ in found] or parameters[:1]

    def of_experts(self, parameter: str) -> list[OfExperts]:
        """The stored tensors of a parameter that has a matrix for each expert.

        Raises InvalidInput where the files have none, or more than stacking and joining makes the parameter of them.
        """
        found = sorted(self._stored.get(parameter, ()), key=lambda one: dot_natural_key(one[0]))
        if not found:
            raise InvalidInput(
                "not_mergeable", f"the base model's files hold no tensor {parameter}", "take it out of the targets"
            )
        if len(found) == 1 and found[0][1] is None:
            return [OfExperts(found[0][0])]
        converter = self._converters.get(found[0][1])
        patterns = [] if converter is None else list(converter.source_patterns)
        by_part = [[name for name, pattern in found if pattern == part] for part in patterns]
        if not _stacks(converter) or any(len(names) != self._experts[parameter] for names in by_part):
            raise _made_over(parameter, found[0][0])
        return [
            OfExperts(name, expert, part, len(by_part))
            for part, names in enumerate(by_part)
            for expert, name in enumerate(names)
        ]


def _stacks(converter: WeightConverter | None) -> bool:
    """Whether all it does is to stack the experts' matrices, and to join the outputs of those that belong together."""
    if converter is None:
        return False
    done = [(type(one), one.dim) for one in converter.operations if isinstance(one, MergeModulelist | Concatenate)]
    stacked = [(MergeModulelist, 0), (Concatenate, 1)][: min(len(converter.source_patterns), 2)]
    return done == stacked and len(done) == len(converter.operations)


def _made_over(parameter: str, tensor: str) -> InvalidInput:
    return InvalidInput(
        "not_mergeable",
        f"{parameter} is made of other tensors in the files, such as {tensor}, and cannot be merged",
        "take it out of the adapter's targets",
    )
