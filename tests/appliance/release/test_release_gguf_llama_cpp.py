"""GGUF files held against llama.cpp: each architecture, each tokenizer, each quantisation, and a real model."""

from __future__ import annotations

import builtins
import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, TokenType
from llama_cpp import LlamaCpp
from safetensors.torch import load_file, save_file
from tiny import make_model
from tiny_families import class_of, tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from appliance.errors import InvalidInput
from appliance.from_gguf import convert
from appliance.gguf_words import SPLITTERS, WHOLE_WORDS, pre_tokenizer
from appliance.release.gguf_file import write_gguf
from appliance.release.gguf_quantise import quantised, type_of

SHARED = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 256},
    **{"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0},
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 1024},
    **{"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2 + i / 3 for i in range(8)]},
}
SLIDING = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama 3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500.0}},
    ),
    "mistral with wide heads": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi4 mini": (
        "phi3",
        {
            **{"sliding_window": None, "hidden_size": 128, "tie_word_embeddings": True},
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3 for long texts": (
        "phi3",
        {
            **{"sliding_window": None, "max_position_embeddings": 1 << 16, "original_max_position_embeddings": 1024},
            "rope_parameters": LONG,
        },
    ),
    "phi3 beyond what it was made for": (
        "phi3",
        {
            **{"sliding_window": None, "max_position_embeddings": 1 << 16, "original_max_position_embeddings": 16},
            "rope_parameters": {**LONG, "original_max_position_embeddings": 16, "long_factor": [2] * 8},
        },
    ),
    "gemma2": ("gemma2", {**SLIDING, "num_hidden_layers": 4}),
    "gemma2 near its caps": (
        "gemma2",
        {**SLIDING, "num_hidden_layers": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3": ("gemma3_text", {**SLIDING, "num_hidden_layers": 7}),
    "gemma3 from 4B": (
        "gemma3_text",
        {
            **{**SLIDING, "num_hidden_layers": 7},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": ROPE,
            },
        },
    ),
}
TEXTS = (
    "Hello, world!  It's 12345 o'clock\n\n  in XMLHttpRequest's naïve façade… don't WE'RE",
    "日本語のテキスト and 한국어, Ωmega\tTabs\r\n\r\nDZungla Ǆ ΑΒγ ńa can't/won't//\n/x",
    " leading and trailing  \n",
    "<|im_start|>user\n1 + 1 = 2<|im_end|>\n",
    "emoji 🙂🙂 and a lone \u0301 accent, ½ ² x₂",
)

CORPUS = [*TEXTS, *map(str.upper, TEXTS), " ".join(f"The word {word} stands for itself." for word in dir(builtins))]


def make(folder: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    config = AutoConfig.for_model(kind, **(SHARED | settings))
    torch.manual_seed(3)
    return make_model(folder, model=AutoModelForCausalLM.from_config(config).to(dtype))


def most_likely(folder: Path, prompts: list[list[int]]) -> list[tuple[int, float]]:
    # Others leave Gemma 2's caps of its attention out.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    with torch.no_grad():
        for prompt in prompts:
            logps = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            found.append((int(logps.argmax()), float(logps.max())))
    return found


IDS = [5 + number * 7 % 300 for number in range(40)]
PROMPTS = [IDS[:length] for length in range(20, 40)]


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_says_what_transformers_does(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    folder = make(tmp_path / "model", kind, settings)
    write_gguf(folder, tmp_path / "model.gguf")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    said = [llama_cpp.greedy(prompt, 1) for prompt in PROMPTS]
    likely = most_likely(folder, PROMPTS)
    # It is told not to end, with <|endoftext|> or <|im_end|>.
    pairs = [(one[0], other) for one, other in zip(said, likely, strict=True) if one and other[0] not in (0, 2)]
    assert len(pairs) >= 4, "the others are parts of letters, which it keeps until they are whole"
    assert len({token for _, (token, _) in pairs}) > 1
    for (token, logp), (expected, its) in pairs:
        assert abs(logp - its) < 0.03
        assert token == expected or its - float(logp) < 0.01


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_of_a_model_with_images_the_text_is_written(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    its, text = CASES["gemma3" if family == "gemma3" else "mistral with wide heads"]
    config.text_config = AutoConfig.for_model(its, **(SHARED | text))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    torch.manual_seed(3)
    folder = make_model(tmp_path / "model", model=class_of(family)._from_config(config))
    write_gguf(folder, tmp_path / "model.gguf")
    llama_cpp, model = LlamaCpp(tmp_path / "model.gguf"), class_of(family).from_pretrained(folder).eval()
    for prompt in PROMPTS:
        for token, logp in llama_cpp.greedy(prompt, 1):
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            assert abs(float(logps[token]) - logp) < 0.03


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make(tmp_path / "model", "llama", {"vocab_size": 1600})


def give_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    fast.save_pretrained(folder)


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_llama_cpp_splits_words_as_the_tokenizer_does(small: Path, tmp_path: Path, splitter: str) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitter in WHOLE_WORDS))
    tokenizer.pre_tokenizer = pre_tokenizer(splitter)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    give_tokenizer(small, tokenizer)
    write_gguf(small, tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == splitter
    compare(small, tmp_path / "model.gguf")


def compare(folder: Path, file: Path) -> None:
    llama_cpp, tokenizer = LlamaCpp(file), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = llama_cpp.tokens(text)
        assert found == ids, (tokenizer.convert_ids_to_tokens(found), tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("prepends", [False, True], ids=["gemma", "phi 3"])
def test_llama_cpp_joins_pieces_as_the_tokenizer_does(small: Path, tmp_path: Path, prepends: bool) -> None:
    replace = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends else replace
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizer
    learnt.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)(?=▁)"), "isolated")
    learnt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1200))
    special = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    described = json.loads(learnt.to_str())["model"]
    words = sorted(described["vocab"], key=described["vocab"].get)
    vocabulary = {word: id for id, word in enumerate([*special, *words])}
    merges = generate_merges({word: vocabulary[word] for word in words})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if not prepends:
        tokenizer.add_tokens(["▁▁▁", "\n\n"])
    give_tokenizer(small, tokenizer)
    write_gguf(small, tmp_path / "model.gguf")
    compare(small, tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    kinds = dict(zip(*(fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type")), strict=True))
    expected = {"<0x0A>": TokenType.BYTE, "<unk>": TokenType.UNKNOWN, "<|im_end|>": TokenType.CONTROL}
    if not prepends:
        expected |= {"   ": TokenType.USER_DEFINED, "\n\n": TokenType.USER_DEFINED}
    expected |= {"e": TokenType.NORMAL, "[PAD1599]": TokenType.UNUSED}
    assert {token: kinds.get(token) for token in expected} == expected
    tokenizer.model = models.BPE(vocabulary, merges[::2], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    give_tokenizer(small, tokenizer)
    with pytest.raises(InvalidInput, match="joins fewer pieces than SentencePiece does"):
        write_gguf(small, tmp_path / "other.gguf")


@pytest.mark.parametrize(("quantisation", "apart"), [("Q8_0", 0.2), ("Q4_K_M", 0.8)])
def test_a_quantised_file_says_nearly_the_same(tmp_path: Path, quantisation: Any, apart: float) -> None:
    folder = make(tmp_path / "model", "llama", {"hidden_size": 256, "intermediate_size": 512}, torch.bfloat16)
    write_gguf(folder, tmp_path / "whole.gguf")
    write_gguf(folder, tmp_path / "model.gguf", quantisation)
    assert (tmp_path / "model.gguf").stat().st_size < 0.6 * (tmp_path / "whole.gguf").stat().st_size
    whole, less = (LlamaCpp(tmp_path / f"{name}.gguf") for name in ("whole", "model"))
    said = [(whole.greedy(prompt, 1), less.greedy(prompt, 1)) for prompt in PROMPTS]
    differences = [abs(one[0][1] - other[0][1]) for one, other in said if one and other]
    assert 0 < float(np.mean(differences)) < apart


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_values_are_quantised_row_by_row(kind: Type) -> None:
    values = torch.randn(7, 512, generator=torch.Generator().manual_seed(1))
    data = quantised(values, kind).numpy().reshape(7, -1)
    back = gguf.quants.dequantize(data, kind)
    bits = {"8": 0.01, "6": 0.04, "5": 0.08, "4": 0.15}[kind.name[1]]
    assert 0 < float(np.abs(back - values.numpy()).mean() / values.abs().mean()) < bits
    if kind == Type.Q8_0:
        assert np.array_equal(data, gguf.quants.quantize(values.numpy(), kind))


def test_a_mixture_has_more_bits_where_llama_cpp_gives_them() -> None:
    def chosen(name: str, columns: int = 256, tied: bool = False) -> str:
        return type_of(name, (8, columns), "Q4_K_M", layers=16, tied=tied, stored=Type.BF16).name

    assert chosen("output.weight") == "Q6_K"
    assert (chosen("token_embd.weight"), chosen("token_embd.weight", tied=True)) == ("Q4_K", "Q6_K")
    more = [layer for layer in range(16) if chosen(f"blk.{layer}.ffn_down.weight") == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert chosen("blk.0.attn_qkv.weight") == "Q5_K"
    assert [chosen("blk.2.attn_q.weight", columns) for columns in (256, 576, 40)] == ["Q4_K", "Q5_0", "BF16"]
    assert chosen("output.weight", 576) == "Q8_0"
    assert type_of("output_norm.weight", (8,), "Q8_0", layers=2, tied=True, stored=Type.BF16) == Type.F32


def kinds_in(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_has_the_types_of_a_mixture(tmp_path: Path, tied: bool) -> None:
    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "tie_word_embeddings": tied}
    folder = make(tmp_path / "model", "llama", settings, torch.bfloat16)
    write_gguf(folder, tmp_path / "model.gguf", "Q4_K_M")
    kinds = kinds_in(tmp_path / "model.gguf")
    assert kinds["token_embd.weight"] == ("Q6_K" if tied else "Q4_K")
    assert kinds.get("output.weight") == (None if tied else "Q6_K")
    assert [layer for layer in range(8) if kinds[f"blk.{layer}.attn_v.weight"] == "Q6_K"] == [0, 3, 6, 7]
    assert {kinds[f"blk.{layer}.ffn_up.weight"] for layer in range(8)} == {"Q4_K"}
    assert kinds["output_norm.weight"] == "F32"
    assert GGUFReader(tmp_path / "model.gguf").fields["general.file_type"].contents() == 15


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("mistral", {"sliding_window": 64}, "a mistral whose layers slide"),
        ("phi3", {"sliding_window": 64}, "a phi3 whose layers slide"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "a qwen2 whose layers slide",
        ),
        ("llama", {"hidden_act": "gelu"}, "a llama with the activation gelu"),
        ("qwen3", {"attention_bias": True}, "a qwen3 with biases"),
        ("gemma2", {**SLIDING, "final_logit_softcapping": None}, "a gemma2 without caps"),
        ("gemma3_text", {**SLIDING, "num_hidden_layers": 7, "use_bidirectional_attention": True}, "reads both ways"),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}, "a smollm3 without positions in other"),
        ("gemma2", {**SLIDING, "layer_types": ["full_attention"] * 2}, "a gemma2 whose layers slide otherwise"),
        ("gemma2", {**SLIDING, "query_pre_attn_scalar": 32}, "divides its attention by the root of 32"),
        (
            "gemma3_text",
            {
                **{**SLIDING, "num_hidden_layers": 7},
                "rope_parameters": {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 5e5}},
            },
            "sliding layers have a rotary base of 500000",
        ),
    ],
)
def test_what_llama_cpp_takes_for_granted_has_to_be_so(tmp_path: Path, kind: str, settings: Any, said: str) -> None:
    folder = make(tmp_path / "model", kind, settings)
    with pytest.raises(InvalidInput, match=f"does not know .*{said}"):
        write_gguf(folder, tmp_path / "model.gguf")


def test_the_widest_gemma_scales_by_its_width(tmp_path: Path) -> None:
    deep = {**SLIDING, "num_hidden_layers": 46, "hidden_size": 96, "head_dim": 16, "query_pre_attn_scalar": 24}
    write_gguf(make(tmp_path / "model", "gemma2", deep), tmp_path / "model.gguf")
    with pytest.raises(InvalidInput, match="the root of 16"):
        write_gguf(make(tmp_path / "other", "gemma2", {**deep, "query_pre_attn_scalar": 16}), tmp_path / "m.gguf")


@pytest.mark.parametrize("fault", ["unknown tensor", "two types", "another text"])
def test_files_that_are_not_as_they_should_be_are_refused(tmp_path: Path, fault: str) -> None:
    folder = make(tmp_path / "model", "llama", {})
    tensors = load_file(folder / "model.safetensors")
    if fault == "unknown tensor":
        tensors["model.layers.0.extra.weight"] = torch.zeros(2, 2)
    elif fault == "two types":
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    else:
        config = tiny_config("mistral3")
        config.text_config = AutoConfig.for_model("llama", **SHARED)
        config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"unknown tensor": "the tensor model.layers.0.extra", "two types": "BF16, F32", "another text": "mistral3"}
    with pytest.raises(InvalidInput, match=said[fault]):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_without_the_library_a_quantised_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "llama", {})
    monkeypatch.setattr("appliance.release.gguf_quantise.find_spec", lambda _: None)
    from appliance.release import gguf_quantise

    gguf_quantise.llama_cpp.cache_clear()
    with pytest.raises(InvalidInput, match=r"is not installed — run `pip install xllamacpp==2"):
        write_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    assert not (tmp_path / "model.gguf").exists()
    gguf_quantise.llama_cpp.cache_clear()


@pytest.mark.thorough
def test_the_real_small_model_answers_in_llama_cpp_as_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    write_gguf(smollm2, tmp_path / "model.gguf")
    llama_cpp, tokenizer = LlamaCpp(tmp_path / "model.gguf", 512), AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    things = ("the moon", "bread", "a river", "Paris", "iron", "a cat", "rain", "music", "a bridge", "salt")
    asked = [f"{what} {thing}?" for what in ("What is", "Tell me, who needs") for thing in things]
    for question in asked:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama_cpp.tokens(text) == ids
        with torch.no_grad():
            answer = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, min_new_tokens=16)
            logps = model(input_ids=answer).logits[0].log_softmax(-1)
        expected = answer[0, len(ids) :].tolist()
        for place, (token, logp) in enumerate(llama_cpp.greedy(ids, 16)):
            its = logps[len(ids) + place - 1]
            assert abs(float(its[token]) - logp) < 0.05
            if token != expected[place]:
                assert float(its.max() - its[token]) < 0.05, "they differ where two tokens are as likely"
                break


def test_a_release_that_is_called_phi3_is_no_phi3_to_llama_cpp(tmp_path: Path) -> None:
    folder = make(tmp_path / "my-Phi3-7", "llama", {})
    write_gguf(folder, tmp_path / "model.gguf")
    assert LlamaCpp(tmp_path / "model.gguf").greedy(PROMPTS[0], 4)


@pytest.mark.parametrize("fault", ["lower case", "a space before", "tokens that take spaces", "merges left out"])
def test_what_a_tokenizer_does_beside_is_refused(small: Path, tmp_path: Path, fault: str) -> None:
    described = json.loads((small / "tokenizer.json").read_bytes())
    splits = {
        "type": "ByteLevel",
        "add_prefix_space": fault == "a space before",
        "trim_offsets": True,
        "use_regex": True,
    }
    if fault == "lower case":
        described["normalizer"] = {"type": "Lowercase"}
    elif fault == "a space before":
        described["pre_tokenizer"] = splits
    elif fault == "merges left out":
        described["pre_tokenizer"], described["model"]["ignore_merges"] = splits, True
    else:
        described["added_tokens"][1]["rstrip"] = True
    (small / "tokenizer.json").write_text(json.dumps(described))
    if fault == "tokens that take spaces":
        path = small / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"added_tokens_decoder": {}}))
    with pytest.raises(InvalidInput, match="does not know"):
        write_gguf(small, tmp_path / "model.gguf")


def test_a_token_beyond_the_embeddings_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama", {})
    described = json.loads((folder / "tokenizer.json").read_bytes())
    described["added_tokens"].append({**described["added_tokens"][-1], "id": 320, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    write_gguf(folder, tmp_path / "model.gguf")
    assert LlamaCpp(tmp_path / "model.gguf").greedy(PROMPTS[0], 4)


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_comes_back_as_it_was_or_is_refused(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    folder = make(tmp_path / "model", kind, settings)
    write_gguf(folder, tmp_path / "model.gguf")
    (tmp_path / "back").mkdir()
    refused = False
    with contextlib.suppress(InvalidInput):
        refused = True
        convert(tmp_path / "model.gguf", tmp_path / "back")
        refused = False
    if refused:
        assert case not in ("llama", "llama with a tied head", "qwen2", "phi3")
        return
    before, after = most_likely(folder, PROMPTS), most_likely(tmp_path / "back", PROMPTS)
    assert [abs(one - other) < 0.1 for (_, one), (_, other) in zip(before, after, strict=True)].count(False) <= 1


@pytest.mark.parametrize("case", ["llama 3", "phi4 mini", "phi3 for long texts"])
def test_a_gguf_whose_rotary_scaling_is_not_read_is_refused(tmp_path: Path, case: str) -> None:
    write_gguf(make(tmp_path / "model", *CASES[case]), tmp_path / "model.gguf")
    (tmp_path / "back").mkdir()
    with pytest.raises(InvalidInput, match=r"does not read how .* own files instead|and Transformers makes"):
        convert(tmp_path / "model.gguf", tmp_path / "back")
