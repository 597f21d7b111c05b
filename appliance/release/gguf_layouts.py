"""What llama.cpp's architectures want of a model's settings and tensors. Others are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from appliance.errors import InvalidInput


@dataclass(frozen=True)
class _Known:
    """A type of model as llama.cpp knows it."""

    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    """Whether both halves of each head's rotary dimensions are interleaved in the files."""
    norms_from_zero: bool = False
    """Whether norms multiply by one more than their weight, which llama.cpp wants added."""
    ropes: tuple[str, ...] = ("default",)


_LLAMA = _Known(gguf.MODEL_ARCH.LLAMA, interleaved=True, ropes=("default", "llama3"))
_KNOWN = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": _Known(gguf.MODEL_ARCH.SMOLLM3, interleaved=True),
    "qwen2": _Known(gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Known(gguf.MODEL_ARCH.QWEN3),
    "gemma2": _Known(gguf.MODEL_ARCH.GEMMA2, norms_from_zero=True),
    "gemma3_text": _Known(gguf.MODEL_ARCH.GEMMA3, norms_from_zero=True, ropes=("default", "linear")),
    "phi3": _Known(gguf.MODEL_ARCH.PHI3, ropes=("default", "longrope")),
}
_WITH_IMAGES = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Types with images, and the type of their text, which is written without what sees."""
_OF_IMAGES = ("vision_tower.", "vision_model.", "multi_modal_projector.")
_OF_TEXT = ("language_model.model.", "model.language_model.")
_HEAD = "lm_head.weight"
_SLIDING_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""llama.cpp knows by the architecture which layers see all: each such one."""
_WIDEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, which scale the attention by another number than the size of a head."""


@dataclass(frozen=True)
class Layout:
    """How a model becomes a GGUF file."""

    config: Any
    """Of its text."""
    arch: gguf.MODEL_ARCH
    extra: dict[str, torch.Tensor]
    """Tensors in fp32 that the files have not, by llama.cpp's names."""
    known: _Known
    with_images: bool
    """Whether the files hold more than the text."""

    @property
    def head_size(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def key_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def renamer(self) -> Callable[[str], str | None]:
        """llama.cpp's name of a tensor in the files; empty for what is left out, None for what is not known."""
        names = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)

        def renamed(name: str) -> str | None:
            if self.with_images and name.endswith(_HEAD):
                name = _HEAD
            elif self.with_images:
                if name.removeprefix("model.").startswith(_OF_IMAGES):
                    return ""
                begin = next((one for one in _OF_TEXT if name.startswith(one)), None)
                if begin is None:
                    return None
                name = f"model.{name.removeprefix(begin)}"
            found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
            return found

        return renamed

    def value(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the files as llama.cpp wants it; with one dimension in fp32."""
        if self.known.interleaved and ".q_proj." in name:
            value = _interleaved(value, self.config.num_attention_heads)
        elif self.known.interleaved and ".k_proj." in name:
            value = _interleaved(value, self.key_heads)
        if value.ndim == 1:
            value = value.float()
        return value + 1 if self.known.norms_from_zero and name.endswith("norm.weight") else value

    def describe(self, writer: Any) -> None:
        """Write the settings."""
        config, rope = self.config, _rope_of(self.config)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(int(self.head_size * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        writer.add_vocab_size(config.vocab_size)
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if self.arch == gguf.MODEL_ARCH.PHI3:
            original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_sliding_window(config.sliding_window or 0)
            if rope["rope_type"] == "longrope":
                longer = max(config.max_position_embeddings / original, 1)
                factor = rope.get("attention_factor") or math.sqrt(1 + math.log(longer) / math.log(original))
                writer.add_rope_scaling_attn_factors(factor)
        if config.model_type in _SLIDING_EVERY:
            writer.add_sliding_window(config.sliding_window)
        for write, key in (
            (writer.add_attn_logit_softcapping, "attn_logit_softcapping"),
            (writer.add_final_logit_softcapping, "final_logit_softcapping"),
        ):
            if getattr(config, key, None) is not None:
                write(getattr(config, key))


def is_known(folder: Path) -> bool:
    """Whether the model in `folder` is of a type that is written."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).model_type in _KNOWN


def layout_of(folder: Path) -> Layout:
    """How the model in `folder` becomes a GGUF file. Raises InvalidInput for one that is not known."""
    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = whole.get_text_config() if whole.model_type in _WITH_IMAGES else whole
    known = _KNOWN.get(config.model_type)
    if known is None or _WITH_IMAGES.get(whole.model_type, config.model_type) != config.model_type:
        raise unknown(f"models of type {whole.model_type}")
    rope = _rope_of(config)
    if rope["rope_type"] not in known.ropes:
        raise unknown(f"rope of type {rope['rope_type']}")
    _require_as_built_in(config)
    return Layout(config, known.arch, _rope_tensors(config, rope), known, whole is not config)


def _rope_of(config: Any) -> dict[str, Any]:
    """The rotary settings of the layers that see all."""
    # Transformers brings what older files say, under other names, to this form.
    rope: dict[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return rope


def _rope_tensors(config: Any, rope: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By what llama.cpp divides each pair's frequency, where it does."""
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
        return {"rope_freqs.weight": plain / scaled}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def _require_as_built_in(config: Any) -> None:
    """Raise InvalidInput where a model is not what llama.cpp takes for granted of its architecture."""
    kind, layers = config.model_type, range(config.num_hidden_layers)
    activation = "gelu_pytorch_tanh" if kind in _SLIDING_EVERY else "silu"
    if (its := getattr(config, "hidden_activation", None) or config.hidden_act) != activation:
        raise unknown(f"a {kind} with the activation {its}")
    if kind == "qwen3" and config.attention_bias:
        raise unknown("a qwen3 with biases of its attention")
    if kind == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise unknown("a gemma2 without caps of its logits")
    if getattr(config, "use_bidirectional_attention", None):
        raise unknown(f"a {kind} that reads both ways")
    if every := _SLIDING_EVERY.get(kind):
        sliding = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in layers]
        if list(config.layer_types) != sliding:
            raise unknown(f"a {kind} whose layers slide otherwise than each but the {every}th")
        size = config.hidden_size / config.num_attention_heads if len(layers) == _WIDEST[kind] else config.head_dim
        if config.query_pre_attn_scalar != size:
            raise unknown(f"a {kind} that divides its attention by the root of {config.query_pre_attn_scalar}")
        local = config.rope_parameters.get("sliding_attention", {"rope_theta": 10000.0})
        if kind == "gemma3_text" and (local["rope_theta"], local.get("rope_type", "default")) != (10000.0, "default"):
            raise unknown(f"a {kind} whose sliding layers have a rotary base of {local['rope_theta']} or scale it")
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise unknown(f"a {kind} whose layers slide")
    if kind in ("mistral", "phi3") and (config.sliding_window or math.inf) < config.max_position_embeddings:
        raise unknown(f"a {kind} whose layers slide")
    if kind == "smollm3" and list(config.no_rope_layers) != [int((layer + 1) % 4 != 0) for layer in layers]:
        raise unknown("a smollm3 without positions in other layers than each fourth")


def _interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a rotary projection with both halves of each head interleaved, as llama.cpp rotates them there."""
    halves = value.view(heads, 2, len(value) // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def unknown(what: str) -> InvalidInput:
    """The error for a model that cannot be written."""
    return InvalidInput(
        "not_gguf",
        f"the GGUF export does not know {what}",
        "export a folder and convert it with llama.cpp's convert_hf_to_gguf.py",
    )
