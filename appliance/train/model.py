"""The model of a training stage: base weights from this box, NF4 where asked for, and the adapter on top."""

from __future__ import annotations

import contextlib
import gc
import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional as nf4
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, Mxfp4Config, set_seed
from transformers.pytorch_utils import Conv1D

from appliance.architecture import (
    empty_model,
    expert_parameters,
    linear_modules,
    named_together,
    quantised_modules,
    trainable_modules,
)
from appliance.data.render import render_conversation
from appliance.errors import InvalidInput, reason
from appliance.models import in_mxfp4
from appliance.train.recipe import Adapter

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
"""bf16 is far slower than fp32 on most CPUs."""


def load_model(folder: Path, *, quantised: bool = False, mapped: bool = False) -> Any:
    """A causal language model in evaluation mode: fp32 on a CPU, bf16 on a GPU.

    `quantised` gives its linear layers (not the output head) the values of NF4 with double quantisation. On a GPU
    bitsandbytes keeps them in 4 bits. On a CPU they are rounded once: what its layers compute while training, without
    their cost per pass and without the packed form that they take on at evaluation, whose gradients are wrong.
    `mapped`: not on the GPU; weights that are stored in its type are read from the files as they are needed.
    Raises InvalidInput for files that are no such model.
    """
    skeleton = empty_model(folder)
    kept = set(quantised_modules(skeleton))
    if quantised and not kept:
        raise InvalidInput(
            "no_linear_layer", f"{folder.name} has no linear layer that NF4 can hold", 'train it with kind = "lora"'
        )
    options: dict[str, Any] = {"device_map": {"": 0}} if ON_GPU and not mapped else {}
    if getattr(skeleton.config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # Gemma 2's caps are left out by PyTorch's own attention
    if in_mxfp4(folder):  # its kernels have no gradients
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    elif quantised and ON_GPU:
        others = [
            f"{re.escape(name)}$"
            for name, module in skeleton.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and name not in kept
        ]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
            llm_int8_skip_modules=others,
        )
    try:
        model, found = type(skeleton).from_pretrained(
            folder, dtype=DTYPE, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InvalidInput(
            "bad_model", f"{folder} holds no usable model: {reason(error)}", "pull the base model again"
        ) from error
    if not hasattr(model, model.base_model_prefix):
        # Where TRL looks for the layers, which are elsewhere in Llama 4: there too, without being its part twice.
        decoder = model.get_decoder()
        object.__setattr__(model, model.base_model_prefix, getattr(decoder, "model", decoder))
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InvalidInput("bad_model", f"{folder} lacks the weights {missing[0]}", "pull the base model again")
    if quantised and not ON_GPU:
        with torch.no_grad():
            for name in kept:
                weight = model.get_submodule(name).weight
                weight.copy_(nf4_round_trip(weight))
    return model.eval()


def settle_router_loss(model: Any) -> None:
    """Make a mixture of experts ready for TRL's loss of routers, or leave that out where the model gives none."""
    text = model.config.get_text_config()
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        text.num_experts = text.num_local_experts  # TRL's name for them
    if not getattr(text, "router_aux_loss_coef", 0):
        return
    given = None
    with torch.no_grad(), contextlib.suppress(IndexError, AttributeError, TypeError):
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        given = getattr(model(input_ids=ids, output_router_logits=True, use_cache=False), "aux_loss", None)
    if not isinstance(given, torch.Tensor):
        text.router_aux_loss_coef = 0.0


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) as fp32 values of NF4 in blocks of 64 with double quantisation, where training rounds it.

    A GPU may take another code than a CPU: an H200 did for one value in some thousand, an H100 for none of 59 million.
    """
    source = weight.detach().to("cuda" if ON_GPU else "cpu", DTYPE).contiguous()
    codes, state = nf4.quantize_4bit(source, quant_type="nf4", compress_statistics=True)
    values: torch.Tensor = nf4.dequantize_4bit(codes, state)
    return values.to(weight.device, torch.float32)


def targeted_modules(model: Any, targets: tuple[str, ...], layers: tuple[int, ...] = ()) -> set[str]:
    """Names of the modules that a recipe's `targets` mean in the base's `layers`, all of them where none is named.

    Raises InvalidInput where a target or a layer fits none.
    """
    linear = trainable_modules(model)
    if not linear:
        raise InvalidInput("no_linear_layer", "the base model has no linear layer to adapt", "use another base model")
    if layers:
        linear = _of_layers(model, linear, layers)
    if targets == ("all-linear",):
        return linear
    meant: set[str] = set()
    for target in targets:
        matched = {name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")}
        if not matched:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise InvalidInput(
                "no_such_module",
                f"the adapter's target {target!r} matches no module of the base model",
                f"choose from {known}",
            )
        if not matched & linear:
            raise InvalidInput(
                "bad_target", f"the adapter's target {target!r} is not a linear layer inside the model", "take it out"
            )
        meant |= matched & linear
    return meant


def targeted_parameters(model: Any, targets: tuple[str, ...], layers: tuple[int, ...] = ()) -> set[str]:
    """Names of the experts' parameters that a recipe's `target_parameters` mean in the base's `layers`.

    Raises InvalidInput where a target or a layer fits none.
    """
    if not targets:
        return set()
    known = set(expert_parameters(model))
    if not known:
        raise InvalidInput(
            "no_experts",
            "the base model has no parameter with a matrix for each of several experts",
            "take target_parameters out",
        )
    if layers:
        known = _of_layers(model, known, layers)
    if targets == ("all-experts",):
        return known
    meant: set[str] = set()
    for target in targets:
        matched = {name for name in known if name == target or name.endswith(f".{target}")}
        if not matched:
            ends = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in known}))
            raise InvalidInput(
                "no_such_parameter",
                f"the adapter's target {target!r} matches no parameter of experts",
                f"choose from {ends}",
            )
        meant |= matched
    return meant


def _of_layers(model: Any, names: set[str], layers: tuple[int, ...]) -> set[str]:
    """Those of `names` that are in the layers of these numbers, from -1 for the last. Raises InvalidInput."""
    known = {number for name in (*linear_modules(model), *expert_parameters(model)) if (number := _layer(name)) >= 0}
    count = max(known, default=-1) + 1
    meant = {layer: layer + count if layer < 0 else layer for layer in layers}
    if unknown := [layer for layer, number in meant.items() if number not in known]:
        raise InvalidInput(
            "no_such_layer",
            f"the adapter's layer {unknown[0]} is none of the base model",
            f"choose from 0 to {count - 1}, or from -{count} to -1" if count else "take `layers` out",
        )
    return {name for name in names if _layer(name) in meant.values()}


def _layer(name: str) -> int:
    """The number of the layer that a module or parameter is in; -1: in none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def require_covered(model: Any, meant: set[str]) -> None:
    """Raise InvalidInput unless the adapter on `model` covers each module or parameter that its recipe means."""
    missing = sorted(meant - {*model.targeted_module_names, *model.targeted_parameter_names})
    if missing:
        raise InvalidInput(
            "adapter_incomplete",
            f"the adapter covers {len(meant) - len(missing)} of the {len(meant)} layers that its recipe names; "
            f"{missing[0]} has none",
            "name them in targets and target_parameters, or train the stages anew",
        )


def add_adapter(model: Any, adapter: Adapter, seed: int) -> Any:
    """`model` with a new LoRA adapter that changes nothing yet. Raises InvalidInput for targets that do not fit."""
    meant = targeted_modules(model, adapter.targets, adapter.layers)
    of_experts = targeted_parameters(model, adapter.target_parameters, adapter.layers)
    if not meant | of_experts:
        raise InvalidInput("no_such_layer", "the adapter's layers have none of its targets", "name others of either")
    set_seed(seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        target_modules=named_together(model, meant),
        target_parameters=sorted(of_experts) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """`model` with the adapter saved in `folder`."""
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable, local_files_only=True)


def stop_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Every token that ends an answer: the model's own, the tokenizer's, and the template's end of a turn."""
    path = folder / "generation_config.json"
    published = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
    ids = set(published if isinstance(published, list) else [published])
    ids.add(tokenizer.eos_token_id)
    turn = render_conversation(
        tokenizer, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    )
    ids.add(turn[-1].input_ids[-1])
    return sorted(ids - {None})


def release_memory() -> None:
    """Give back what models that nothing refers to any more have held."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
