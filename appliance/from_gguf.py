"""A GGUF file as a model that can be trained: its weights de-quantised, its tokenizer and template as it has them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput, reason
from appliance.gguf_words import COMPOSED, SPLITTERS, WHOLE_WORDS, pre_tokenizer
from appliance.home import write_json
from appliance.models import context_length


def convert(gguf: Path, directory: Path) -> None:
    """Write the model in `gguf` to `directory`, in bfloat16.

    Raises InvalidInput for a file that Transformers cannot read, or whose tokenizer is not known here.
    """
    splitter = _splitter(gguf)
    print("de-quantising the weights", file=sys.stderr, flush=True)
    import torch
    from tokenizers.normalizers import NFC
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise _unreadable(gguf, f"Transformers cannot read it: {reason(error)}") from None
    _require_whole(gguf, model, [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    _require_same_settings(gguf, directory)
    # GGUF names the splitting without saying what it is, and Transformers' reader takes GPT-2's for any.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(splitter)
    if splitter in COMPOSED:
        tokenizer.backend_tokenizer.normalizer = NFC()
    if splitter in WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    tokenizer.model_max_length = context_length(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _require_whole(gguf: Path, model: Any, lacking: list[str]) -> None:
    """Raise InvalidInput where Transformers' reader has left something out: tensors, rotary scaling, part of a head."""
    from gguf import GGUFReader

    if lacking:
        raise _unreadable(gguf, f"it has no {sorted(lacking)[0]} that fits")
    reader = GGUFReader(gguf)
    if any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors):
        raise _unreadable(gguf, "Transformers does not read how it scales its rotary frequencies")
    said = {key.partition(".")[2]: field.contents() for key, field in reader.fields.items() if ".rope." in key}
    rope = model.config.rope_parameters.get("full_attention", model.config.rope_parameters)
    if said.get("rope.scaling.type", "none") not in ("none", rope["rope_type"]):
        raise _unreadable(gguf, f"Transformers does not read its rotary scaling ({said['rope.scaling.type']})")


def _require_same_settings(gguf: Path, directory: Path) -> None:
    """Raise InvalidInput where the model in `directory` would not be written with the settings that the file has.

    Types of models that are not written here are not compared.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFWriter

    from appliance.release.gguf_layouts import is_known, layout_of

    if not is_known(directory):
        return
    try:
        layout = layout_of(directory)
    except InvalidInput as error:
        raise _unreadable(gguf, f"Transformers makes something else of it: {error.message}") from None
    writer = GGUFWriter(gguf, MODEL_ARCH_NAMES[layout.arch])
    layout.describe(writer)
    said = {key: field.contents() for key, field in GGUFReader(gguf).fields.items()}
    for key, value in writer.kv_data[0].items():
        if key in said and not _alike(said[key], value.value):
            raise _unreadable(gguf, f"{key} is {said[key]}, and Transformers makes {value.value} of it")


def _alike(one: Any, other: Any) -> bool:
    return math.isclose(one, other, rel_tol=1e-5) if isinstance(one, float) else bool(one == other)


def _splitter(gguf: Path) -> str:
    """llama.cpp's name of how the file's tokenizer splits texts. Raises InvalidInput for one not known here."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(gguf).fields
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _unreadable(gguf, f"it is no whole GGUF file: {reason(error)}") from None

    def said(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    model, splitter = said("tokenizer.ggml.model"), said("tokenizer.ggml.pre")
    if model != "gpt2" or splitter not in SPLITTERS:
        raise _unreadable(gguf, f"its tokenizer ({model}, {splitter}) is not known here")
    return str(splitter)


def _unreadable(gguf: Path, why: str) -> InvalidInput:
    return InvalidInput("bad_gguf", f"{gguf.name} cannot be taken: {why}", "pull the model's own files instead")
