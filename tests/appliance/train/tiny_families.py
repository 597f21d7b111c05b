"""A tiny random model of any family that Transformers has for texts, with a chat template of its own kind."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from chat_templates import templates, tokenizer_of
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
"""Types of models that answer texts, or texts and images."""
VOCABULARY = 512
_TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "model_dim"), 64),
    **dict.fromkeys(("embedding_size", "projection_dim", "output_hidden_size", "out_hidden_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "mlp_dim", "ffn_hidden_size", "expert_dim"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "vision_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv"), 1),
    **dict.fromkeys(("swa_num_key_value_heads", "num_global_key_value_heads"), 1),
    # The least that vLLM serves on a CPU.
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim", "swa_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers"), 1),
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"qk_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 512},
    **{"image_size": 28, "patch_size": 14, "num_channels": 3, "sliding_window": 64, "initializer_range": 0.2},
    "rotary_dim": 32,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"), 4096),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **{"mamba_d_ssm": 128, "mamba_expand": 2, "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_n_groups": 1},
    **{"n_groups": 1, "mamba_chunk_size": 16, "chunk_size": 16, "conv_dim": 64, "block_dim": 64, "lru_width": 64},
    **{"hidden_size_per_layer_input": 8, "attention_chunk_size": 64, "laurel_rank": 8, "num_kv_shared_layers": 0},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 1),
    **{"mtp_num_hidden_layers": 0, "num_mtp_layers": 0},
}
"""Settings of configs by their names, wherever they stand."""
_OF_IMAGES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_TILES = {"vision_config.image_size": [28, 28], "vision_config.patch_size": [14, 14]}
_FIXES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_config.hidden_size_global": 64, "decoder_config.hidden_size_global": 64},
    "codegen": {"n_head": 4, "rotary_dim": 16},
    "diffllama": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [32, 32]},
    "glm4_moe": {"head_dim": 32},
    "glm5_next": {"num_key_value_heads": 4, "text_config.num_key_value_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "hunyuan_vl": {
        "text_config.head_dim": 32,
        "text_config.rope_parameters": {**_OF_IMAGES, "mrope_section": [4, 4, 4, 4]},
    },
    "internvl": _TILES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32, "num_heads": 4},
    "ministral": {"head_dim": 32},
    "mistral4": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 1},
    "qianfan_ocr": _TILES,
    **{
        family: {"text_config.rope_parameters": _OF_IMAGES}
        for family in ("qwen2_vl", "qwen2_5_vl", "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl")
    },
    "glm4v_moe": {"text_config.rope_parameters": {**_OF_IMAGES, "mrope_section": [2, 2, 4]}},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _OF_IMAGES, "vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "step3p7": {"vision_config.mlp_ratio": 1.5, "text_config.sliding_window": 64},
    **{family: {"rope_parameters": _OF_IMAGES} for family in ("qwen2_vl_text", "qwen2_5_vl_text")},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family's config needs beside, by the model's type; `text_config.KEY` of its text."""
_WITH_PARTS = {"gemma4": ("vision_config",)}
"""Parts that a family's published models have, and its config by itself has not."""
_PROCESSORS = {
    "gemma3n": {
        "processor_class": "Gemma3nProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 224, "width": 224},
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
    }
}
"""What vLLM makes images and sounds into numbers with, for families that it cannot load without."""
_MARKS = {f"{token}_token": f"<{token}>" for token in ("image", "audio", "boi", "eoi", "boa", "eoa")}
_OF_IMAGE_AND_SOUND = {**_MARKS, "extra_special_tokens": _MARKS}
_TEMPLATES = (
    *(
        ("qwen3_5", "qwen3_5_nothink"),
        ("qwen3", "qwen3"),
        ("qwen2", "qwen2_5"),
        ("gemma4", "gemma4"),
        ("gemma3", "gemma3"),
    ),
    *(
        ("gemma", "gemma"),
        ("gpt_oss", "gptoss"),
        ("llama4", "llama3"),
        ("llama", "llama3_1"),
        ("deepseek", "deepseekv3"),
    ),
    *(("glm", "glm4moe"), ("cohere2", "cohere2"), ("cohere", "cohere"), ("lfm2", "lfm2"), ("phi4", "phi4")),
    *(("phi", "phi3"), ("nemotron", "nemotron_3_nano"), ("mistral", "mistral"), ("mixtral", "mistral")),
    *(("ministral", "mistral"), ("granite", "granite"), ("olmo", "olmo2")),
)
"""Beginnings of types, and the chat template that their models have; others get ChatML with a system message."""


def template_of(family: str) -> str:
    """The name of the chat template that a family's models have, or such as they have."""
    return next((template for begin, template in _TEMPLATES if family.startswith(begin)), "smollm2")


def tiny_config(family: str) -> Any:
    """A family's config with everything small. Raises what Transformers raises where there is none such."""
    kind: type[PreTrainedConfig] = CONFIG_MAPPING[family]
    return _shrunk(kind, _FIXES.get(family, {}), _WITH_PARTS.get(family, ()))


def class_of(family: str) -> Any:
    """The class that models of a family are published as: the one with images, where there is one."""
    both = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    name = both[family]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _shrunk(kind: Any, fixes: dict[str, Any], needed: tuple[str, ...] = ()) -> Any:
    plain = kind(**{name: kind.sub_configs[name]() for name in needed})
    parts = {
        name: _shrunk(type(getattr(plain, name)), _below(name, fixes))
        for name in (plain.sub_configs or {})
        if getattr(plain, name, None) is not None
    }
    said = plain.to_dict()
    settings = {key: value for key, value in _TINY.items() if key in said and said[key] is not None}
    settings |= _shortened(said)
    if "qk_rope_head_dim" in settings:  # latent attention, which has all heads and turns a part of each
        its_own = {"head_dim": settings["qk_rope_head_dim"], "num_key_value_heads": 2}
        settings |= {key: value for key, value in its_own.items() if key in settings}
    if "mrope_section" in (rope := said.get("rope_parameters") or {}):
        settings["rope_parameters"] = {**rope, "mrope_section": [4, 6, 6]}
    settings |= {key: value for key, value in fixes.items() if "." not in key}
    made = kind(**settings, **parts)
    for key, value in settings.items():
        # Some take no notice of what they call otherwise.
        with contextlib.suppress(Exception):
            if getattr(made, key, None) != value:
                setattr(made, key, value)
    return made


def _below(name: str, fixes: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in fixes.items() if key.startswith(f"{name}.")}


def _shortened(said: dict[str, Any]) -> dict[str, Any]:
    """Lists with an item a layer, as long as there are layers and with as many kinds of these as fit."""
    found: dict[str, Any] = {}
    depth = next(
        (said[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(said.get(key), int)), 0
    )
    for key, value in said.items():
        if isinstance(value, list) and depth and len(value) == depth:
            kinds = list(dict.fromkeys(map(str, value)))
            firsts = sorted(next(at for at, item in enumerate(value) if str(item) == one) for one in kinds[-2:])
            found[key] = [value[at] for at in (firsts if len(firsts) == 2 else [0, 0])]
    return found


def make_family(folder: Path, family: str, **settings: Any) -> Path:
    """Write a tiny random model of the family, with `settings` of its config, as it would be pulled."""
    config = tiny_config(family)
    for key, value in settings.items():
        setattr(config, key, value)
    kind = class_of(family)
    torch.manual_seed(3)
    model = kind._from_config(config) if hasattr(kind, "_from_config") else kind(config)
    model.save_pretrained(folder)
    tokenizer = tokenizer_of(templates()[template_of(family)])
    if family in _PROCESSORS:
        tokenizer.add_tokens(["\n" * times for times in range(1, 5)])
        (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[family]))
    if len(tokenizer) > VOCABULARY:
        raise ValueError(f"{len(tokenizer)} tokens")
    tokenizer.save_pretrained(folder)
    if family in _PROCESSORS:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | _OF_IMAGE_AND_SOUND))
    (folder / "source.json").write_text('{"source": "made here"}')
    return folder


def in_mxfp4(folder: Path) -> Path:
    """The gpt_oss model in `folder` with experts of random blocks and scales, as its publisher stores them."""
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor.bfloat16()
            continue
        experts, inputs, outputs = tensor.shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(121, 124, blocks, dtype=torch.uint8, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
