"""A Llama of a given shape with random weights, as a base model directory with a real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "1.5b": {"hidden": 2048, "inner": 8192, "layers": 22, "heads": 32, "kv_heads": 8, "vocabulary": 49152},
    "135m": {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocabulary": 49152},
    "30m": {"hidden": 384, "inner": 1024, "layers": 8, "heads": 6, "kv_heads": 2, "vocabulary": 49152},
    "tiny": {"hidden": 128, "inner": 256, "layers": 3, "heads": 4, "kv_heads": 2, "vocabulary": 49152},
}
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def write_model(directory: Path, shape: str, tokenizer: Path, seed: int = 0, device: str = "cpu") -> int:
    """Write the model in bfloat16, one shard a layer, with the tokenizer files of `tokenizer`; its parameters.

    The numbers are drawn on `device`, a GPU for the sake of time.
    """
    size = SHAPES[shape]
    directory.mkdir(parents=True)
    for name in TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, directory / name)
    config = json.loads((tokenizer / "config.json").read_text()) | {
        "hidden_size": size["hidden"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["hidden"] // size["heads"],
        "vocab_size": size["vocabulary"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator(device).manual_seed(seed)
    hidden, inner = size["hidden"], size["inner"]
    narrow = config["head_dim"] * size["kv_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    ends = {"model.embed_tokens.weight": (size["vocabulary"], hidden), "lm_head.weight": (size["vocabulary"], hidden)}

    def weight(rows: int, columns: int) -> torch.Tensor:
        numbers = torch.randn(rows, columns, generator=generator, device=device)
        return (numbers * 0.02).to(torch.bfloat16).cpu()

    shards = [
        {name: weight(*shape) for name, shape in ends.items()}
        | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    ]
    index: dict[str, str] = {}
    total = size["layers"] + 1
    parameters = 0
    for number in range(total):
        prefix = f"model.layers.{number - 1}."
        tensors = (
            shards[0] if number == 0 else {f"{prefix}{name}.weight": weight(*shape) for name, shape in layer.items()}
        )
        if number:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        name = f"model-{number + 1:05}-of-{total:05}.safetensors"
        save_file(tensors, directory / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    metadata = {"total_size": 2 * parameters}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": index}))
    return parameters
