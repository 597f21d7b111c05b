"""GGUF files, read back by Transformers' own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tiny import CHATML, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from appliance.errors import InvalidInput
from appliance.release.gguf_file import main, write_gguf

IDS = torch.tensor([[1, 40, 60, 80, 100, 2], [1, 5, 15, 25, 35, 45]])


def save(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    make_model(folder)
    config = json.loads((folder / "config.json").read_bytes()) | {"num_key_value_heads": 2, **settings}
    if kind != "llama":
        fresh = AutoConfig.for_model(kind).to_dict()
        shared = {key: config[key] for key in config if key in fresh and key not in ("architectures", "model_type")}
        config = fresh | shared | {"head_dim": 16} | settings
        # Those of its own depth, or none.
        config.pop("layer_types", None)
    loaded = AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(loaded).to(dtype).save_pretrained(folder)
    return folder


def logits(folder: Path, **where: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    with torch.no_grad():
        values: torch.Tensor = model(IDS).logits
    return values


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_the_file_computes_what_the_folder_does(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    folder = save(tmp_path / "model", kind, **settings)
    write_gguf(folder, tmp_path / "model.gguf")
    wanted, found = logits(folder), logits(tmp_path, gguf_file="model.gguf")
    assert float(wanted.std()) > 0.1
    assert float((wanted - found).abs().max()) < 1e-4


def test_weights_of_16_bits_stay_as_they_are_and_norms_become_fp32(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", dtype=torch.bfloat16)
    write_gguf(folder, tmp_path / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors if len(tensor.shape) > 1}
    assert kinds == {"BF16"}
    assert float((logits(folder) - logits(tmp_path, gguf_file="model.gguf")).abs().max()) < 1e-4


def test_tokenizer_and_template_go_along(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    write_gguf(folder, tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    words = fields["tokenizer.ggml.tokens"].contents()
    assert words == tokenizer.convert_ids_to_tokens(range(320))
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [words[id] for id, kind in enumerate(types) if kind == 3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_llama_3_divides_its_frequencies_as_transformers_does(tmp_path: Path) -> None:
    """llama.cpp turns pair i of d by position / theta^(2i/d) / factor i."""
    rope = {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500.0}
    folder = save(tmp_path / "model", rope_parameters=rope)
    write_gguf(folder, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    theta = reader.fields["llama.rope.freq_base"].contents()
    dimensions = reader.fields["llama.rope.dimension_count"].contents()
    (factors,) = (torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert 1.0 == factors.min() < factors.max() == 8.0
    turned = theta ** -(torch.arange(0, dimensions, 2) / dimensions) / factors
    wanted = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    assert torch.allclose(turned, wanted, rtol=1e-5, atol=0)
    others = {name.name: name.data for name in reader.tensors if name.name != "rope_freqs.weight"}
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_bytes()) | {"rope_parameters": {"rope_theta": 500.0}})
    )
    write_gguf(folder, tmp_path / "plain.gguf")
    plain = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "plain.gguf").tensors}
    assert plain.keys() == others.keys()
    assert all((plain[name] == others[name]).all() for name in plain), "the other tensors are where they belong"


@pytest.mark.parametrize(
    "fault",
    [
        "models of type gpt2",
        "rope of type yarn",
        "rope of type linear",
        "rope of type llama3",
        "way of splitting",
        "type Unigram",
    ],
)
def test_what_is_not_known_is_refused_by_name_and_leaves_nothing(tmp_path: Path, fault: str) -> None:
    folder = save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    match fault:
        case "models of type gpt2":
            config["model_type"] = "gpt2"
        case "rope of type yarn":
            config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        case "rope of type linear":
            del config["rope_parameters"]
            config["rope_scaling"] = {"type": "linear", "factor": 2.0}
        case "rope of type llama3":
            config["model_type"] = "qwen2"
            config["rope_parameters"] = {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500.0}
        case "way of splitting":
            tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
        case "type Unigram":
            tokenizer["model"]["type"] = "Unigram"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidInput, match=fault):
        write_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_as_a_command_it_says_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["", str(folder), str(tmp_path / "model.gguf")])
    main()
    assert GGUFReader(tmp_path / "model.gguf").fields["general.name"].contents() == "model"
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    command = [sys.executable, "-m", "appliance.release.gguf_file", str(folder), str(tmp_path / "b.gguf")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("appliance: error: the GGUF export does not know models of type mamba — ")
    assert len(done.stderr.splitlines()) == 1
