"""An adapter's settings as PEFT saves them, and which of them weights cannot follow. No torch here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from appliance.adapters import CONFIG, WEIGHTS
from appliance.errors import InvalidInput

ADAPTER_SHA256 = "adapter_sha256"
"""In the result of a training stage: the hash of the weights that it has left."""
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base."""
_REFUSED = {
    "lora_bias": "biases of its own (lora_bias)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "alora_invocation_tokens": "activated LoRA, which is on for a part of the text only (alora_invocation_tokens)",
    "arrow_config": "routed adapters (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "sampled adapters (monteclora_config)",
    "megatron_config": "Megatron's layers (megatron_config)",
}
"""Settings of a LoRA adapter under which the merged weights would not compute what the adapter does."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that alter the base's weights, so that the adapter belongs to weights that are not published."""


def read_config(adapter: Path) -> dict[str, Any]:
    """The settings of a LoRA adapter. Raises InvalidInput `not_mergeable` naming what weights cannot follow."""
    try:
        config = dict(json.loads((adapter / CONFIG).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise unusable(error) from None
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise not_mergeable(
            f"the adapter is of PEFT's type {kind or 'none'}, and only LORA can be merged", "train a LoRA adapter"
        )
    trained = [what for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        trained.append(f"trained biases (bias = {config['bias']})")
    if trained:
        raise not_mergeable(f"the adapter has {trained[0]}, which cannot be merged", "train plain LoRA or DoRA")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise not_mergeable(
            f"the adapter was begun with {start}, which changes the base's weights",
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it",
        )
    return config


def lora_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """By what the product of a module's factors is multiplied; rsLoRA divides by the rank's root (arXiv 2312.03732)."""
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def not_mergeable(message: str, next: str) -> InvalidInput:
    """The error for an adapter that merged weights cannot follow."""
    return InvalidInput("not_mergeable", message, next)


def unusable(error: Exception) -> InvalidInput:
    """The error for files that cannot be read as an adapter."""
    return not_mergeable(
        f"the adapter has no usable {CONFIG} and {WEIGHTS}: {error}", "save it with PEFT's save_pretrained"
    )


def _pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the module's name ends in, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
