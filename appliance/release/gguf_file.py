"""Release folder to one GGUF file: `python -m appliance.release.gguf_file FOLDER FILE`.

Written a tensor at a time, nothing quantised, with the llama.cpp project's `gguf` library. Models whose layout or
tokenizer is not known here are refused by name.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from appliance.errors import ApplianceError, Exit, InvalidInput
from appliance.gguf_words import name_of
from appliance.home import disk_error, replacing
from appliance.release.weights import layout, shards

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_TYPES = {
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}

_F32 = gguf.GGMLQuantizationType.F32
_ROPE_FACTORS = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
_WIDTHS = {gguf.GGMLQuantizationType.BF16: 2, gguf.GGMLQuantizationType.F16: 2, gguf.GGMLQuantizationType.F32: 4}


def write_gguf(folder: Path, target: Path) -> None:
    """Write the model in `folder` to the GGUF file `target`, which is there whole in the end or not at all.

    Raises InvalidInput for a model that cannot be written so.
    """
    config = json.loads((folder / "config.json").read_bytes())
    architecture = _ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise _unknown(f"models of type {config['model_type']}")
    rope_theta, rope_factors = _rope(folder, architecture)
    tensors = layout(folder)
    stored = {dtype for _, shape, dtype in tensors.values() if len(shape) > 1}
    if len(stored) != 1 or not stored <= _TYPES.keys():
        raise _unknown(f"weights stored as {', '.join(sorted(stored))}")
    kind, file_type = _TYPES[stored.pop()]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    renamed = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    if unknown := sorted(name for name, new in renamed.items() if new is None):
        raise _unknown(f"the tensor {unknown[0]}")

    with replacing(target) as file:
        writer = gguf.GGUFWriter(file.name, gguf.MODEL_ARCH_NAMES[architecture])
        _describe(writer, folder, config, rope_theta, file_type)
        if rope_factors is not None:
            writer.add_tensor_info(_ROPE_FACTORS, rope_factors.shape, None, rope_factors.nbytes, raw_dtype=_F32)
        for name, (_, shape, _) in tensors.items():
            its_kind, width = (_F32, 4) if len(shape) == 1 else (kind, _WIDTHS[kind])
            writer.add_tensor_info(renamed[name], shape, None, width * math.prod(shape), raw_dtype=its_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope_factors is not None:
            writer.write_tensor_data(rope_factors.numpy())
        for value in _values(folder, config, architecture):
            writer.write_tensor_data(value.contiguous().view(torch.uint8).numpy())
        writer.close()


def _rope(folder: Path, architecture: Any) -> tuple[float, torch.Tensor | None]:
    """The rotary base, and by what llama.cpp divides each pair's frequency, where it does. Raises InvalidInput."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Transformers brings what older files say, under other names, to this form.
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind == "default":
        return float(rope["rope_theta"]), None
    if kind != "llama3" or architecture != gguf.MODEL_ARCH.LLAMA:
        raise _unknown(f"rope of type {kind}")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return float(rope["rope_theta"]), plain / scaled


def _describe(writer: Any, folder: Path, config: dict[str, Any], rope_theta: float, file_type: int) -> None:
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(folder.name)
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope_theta)
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, folder, config["vocab_size"])


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    described = json.loads((folder / "tokenizer.json").read_bytes())
    if described["model"]["type"] != "BPE":
        raise _unknown(f"tokenizers of type {described['model']['type']}")
    splitter = name_of(described["pre_tokenizer"])
    if splitter is None:
        raise _unknown("this tokenizer's way of splitting words")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = {id: word for word, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    normal, unused = gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    types = [normal if id in words else unused for id in range(size)]
    for id, token in added.items():
        types[id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([words.get(id, f"[PAD{id}]") for id in range(size)])
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)


def _values(folder: Path, config: dict[str, Any], architecture: Any) -> Iterator[torch.Tensor]:
    """The tensors in the layout's order, as llama.cpp wants them."""
    heads = config["num_attention_heads"]
    for shard in shards(folder):
        order = [name for name, (file, _, _) in layout(folder).items() if file == shard.name]
        with safe_open(shard, framework="pt") as file:
            for name in order:
                value = file.get_tensor(name)
                if architecture == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
                    value = _interleaved(value, heads)
                elif architecture == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
                    value = _interleaved(value, config.get("num_key_value_heads") or heads)
                yield value.float() if value.ndim == 1 else value


def _interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a rotary projection with both halves of each head interleaved, as llama.cpp's LLAMA rotates them."""
    halves = value.view(heads, 2, len(value) // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def _unknown(what: str) -> InvalidInput:
    return InvalidInput(
        "not_gguf",
        f"the GGUF export does not know {what}",
        "export a folder and convert it with llama.cpp's convert_hf_to_gguf.py",
    )


def main() -> None:
    """Write as the arguments say; exits with the error's status after one line about it."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    folder, target = map(Path, sys.argv[1:])
    try:
        write_gguf(folder, target)
    except OSError as error:
        _end(disk_error(error, target.parent))
    except ApplianceError as error:
        _end(error)


def _end(error: ApplianceError) -> None:
    print(f"appliance: error: {error}", file=sys.stderr)
    sys.exit(error.exit or Exit.FAILED)


if __name__ == "__main__":
    main()
