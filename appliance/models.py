"""Base models on this box. This module needs no torch."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

from appliance import api
from appliance.errors import InvalidInput, NotFound
from appliance.home import Home, hashes, is_name

SOURCE = "source.json"
UNTRAINABLE = "untrainable"
"""The key of SOURCE that says why no adapter can be trained on a model that was pulled to be served only."""
_MXFP4 = "mxfp4"
"""How gpt-oss has its experts, which stay so; what is trained of it is in 16 bits."""
AUTO_MAP = "auto_map"
"""In a config: where Python code of the model's own is."""
TEMPLATE = "chat_template.jinja"
_PROCESSOR_TEMPLATE = "chat_template.json"
"""Where older multimodal models have theirs, beside the tokenizer that does not know it."""
INDEX = "model.safetensors.index.json"
MODEL_FILES = (
    "model*.safetensors",
    INDEX,
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)
"""What is taken of a model; consolidated copies of the weights, pickles and code are left behind."""

_LARGEST_HEADER = 100_000_000
"""In bytes; the format's own limit."""
_IN_16_BITS = re.compile(r"embed|(^|\.)(lm_head|wte|wpe|gate|router|shared_expert_gate|conv1d)\.")
"""Names of matrices that stay so where a model is quantised: embeddings, output heads, routers, convolutions."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def list_models(home: Home) -> list[api.Model]:
    """The base models that can be used, by name."""
    found = []
    for directory in sorted(home.models.glob("[!.]*")):
        try:
            check_model(directory)
        except InvalidInput:
            continue
        found.append(
            api.Model(
                name=directory.name,
                bytes=sum(file.stat().st_size for file in directory.iterdir()),
                source=_read_json(directory / SOURCE).get("source", str(directory)),
                context=context_length(directory),
            )
        )
    return found


def model_path(home: Home, name: str) -> Path:
    """Directory of the base model `name`. Raises NotFound, or InvalidInput naming what the directory lacks."""
    directory = home.models / name
    if not is_name(name) or not directory.is_dir():
        raise NotFound("no_such_model", f"there is no base model {name} on this box", f"run `appliance pull {name}`")
    check_model(directory)
    return directory


def check_model(directory: Path, *, code_is_left: bool = False) -> None:
    """Raise InvalidInput unless `directory` holds a model that trains and serves without running code of its own.

    `code_is_left`: whatever names such code will be taken out.
    """
    check_description(directory, code_is_left=code_is_left)
    if not any(directory.glob("model*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
        raise _lacking(
            directory,
            "weights in safetensors" + (" (pickle files are not read: they can run code)" if pickled else ""),
            "convert the weights with save_pretrained, or use another copy of the model",
        )


def check_description(directory: Path, *, code_is_left: bool = False) -> None:
    """Raise InvalidInput unless `directory` has what a model needs beside its weights, and no code of its own."""
    if not directory.is_dir():
        raise InvalidInput("no_model", f"{directory} is not a model directory", "name a directory of model files")
    if not _read_json(directory / "config.json"):
        raise _lacking(directory, "a config.json", "copy the model's config.json into it, or pull the model again")
    if not code_is_left and any(AUTO_MAP in _read_json(path) for path in config_files(directory)):
        raise InvalidInput(
            "custom_code",
            f"the model in {directory} runs Python code of its own",
            "use a model that Transformers supports itself",
        )
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise _lacking(directory, "a tokenizer", "copy the model's tokenizer files (tokenizer.json) into it")
    if not template_and_end(directory)[0]:
        raise _lacking(directory, "a chat template", "use an instruct model, or put its chat_template.jinja there")


def config_files(directory: Path) -> list[Path]:
    """The files of a model that may name code of its own: of model, tokenizer and processors."""
    return sorted(directory.glob("*config.json"))


def in_mxfp4(directory: Path) -> bool:
    """Whether the experts of the model in `directory` are stored in MXFP4, which training de-quantises."""
    quantised = _read_json(directory / "config.json").get("quantization_config")
    return isinstance(quantised, dict) and quantised.get("quant_method") == _MXFP4


def require_quantisable(directory: Path) -> None:
    """Raise InvalidInput where the model in `directory` cannot be held in NF4."""
    if in_mxfp4(directory):
        raise InvalidInput(
            "quantised_base",
            f"the experts of {directory.name} are in MXFP4, which is de-quantised for training, not turned into NF4",
            'say kind = "lora" under [adapter]',
        )


def require_trainable(directory: Path, *, quantised: bool = False, experts: bool = False) -> None:
    """Raise InvalidInput where no adapter can be trained on the model in `directory` and merged into it.

    `quantised`: with the model in NF4. `experts`: on the experts too.
    """
    if fault := _read_json(directory / SOURCE).get(UNTRAINABLE):
        raise InvalidInput(fault["code"], fault["message"], fault["next"])
    config = _read_json(directory / "config.json")
    stored = config.get("quantization_config")
    if stored and not in_mxfp4(directory):
        how = f" ({stored.get('quant_method')})" if isinstance(stored, dict) else ""
        raise InvalidInput(
            "quantised_base",
            f"the base {directory.name} is quantised already{how}: no adapter can be merged into it",
            'pull the same model in 16 bits; kind = "qlora" quantises it for training by itself',
        )
    if quantised:
        require_quantisable(directory)
    if experts and in_mxfp4(directory):
        raise InvalidInput(
            "quantised_base",
            f"the experts of {directory.name} are in MXFP4, into which no adapter can be merged",
            "take target_parameters out: what is beside the experts is trained",
        )
    rows = _embedded_tokens(directory)
    if rows and (unknown := _used_beyond(directory, rows)):
        raise InvalidInput(
            "tokenizer_too_large",
            f"the chat template of {directory.name} uses {unknown!r}, a token that its {rows} embeddings do not know",
            "pull the base again: its tokenizer is another model's, or was given tokens of its own",
        )


def _embedded_tokens(directory: Path) -> int:
    """Rows of the model's input embedding; 0 where none of the usual names is found."""
    for path in directory.glob("model*.safetensors"):
        for name, shape, _ in _tensors(path)[1]:
            if name.endswith(_EMBEDDINGS) and len(shape) == 2:
                return shape[0]
    return 0


def _used_beyond(directory: Path, rows: int) -> str:
    """A token of the chat template whose id is `rows` or more; empty where there is none."""
    tokens = _read_json(directory / "tokenizer.json").get("added_tokens")
    template, _ = template_and_end(directory)
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and token.get("id", 0) >= rows and str(token.get("content")) in template:
            return str(token["content"])
    return ""


def template_and_end(directory: Path) -> tuple[str, str]:
    """The chat template and the end token that a directory's files say; each empty where they say none."""
    config = _read_json(directory / "tokenizer_config.json")
    template = config.get("chat_template") or processors_template(directory)
    if isinstance(template, list):
        # Of several by name, the one that is used where none is asked for.
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default") or ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        template = (directory / TEMPLATE).read_text()
    eos = config.get("eos_token") or _read_json(directory / "special_tokens_map.json").get("eos_token") or ""
    return str(template), str(eos.get("content", "") if isinstance(eos, dict) else eos)


def processors_template(directory: Path) -> str:
    """The chat template that the model's processor alone knows; empty where there is none, or its tokenizer has one."""
    known = (directory / TEMPLATE).exists() or _read_json(directory / "tokenizer_config.json").get("chat_template")
    return "" if known else str(_read_json(directory / _PROCESSOR_TEMPLATE).get("chat_template") or "")


def context_length(directory: Path) -> int:
    """The longest sequence in tokens that the model was made for; 0 where its config does not say."""
    config = _read_json(directory / "config.json")
    text = config.get("text_config")
    length = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return length if isinstance(length, int) else 0


def count_parameters(directory: Path) -> int:
    """How many numbers the model's weight files hold, by their headers. Raises InvalidInput for a broken file."""
    return sum(math.prod(shape) for path in directory.glob("model*.safetensors") for _, shape, _ in _tensors(path)[1])


def count_linear(directory: Path) -> int:
    """How many of these numbers are weights of linear layers and of experts. Raises InvalidInput for a broken file."""
    return sum(
        math.prod(shape)
        for path in directory.glob("model*.safetensors")
        for name, shape, _ in _tensors(path)[1]
        if len(shape) in (2, 3)
        and (name.endswith("weight") or "experts" in name.split("."))
        and not name.endswith("bias")
        and not stays_in_16_bits(name)
    )


def stays_in_16_bits(name: str) -> bool:
    """Whether the matrix of that name stays so where a model is quantised."""
    return bool(_IN_16_BITS.search(name))


def is_quantised(directory: Path) -> bool:
    """Whether the model in `directory` is stored in fewer than 16 bits, all of it or a part."""
    return bool(_read_json(directory / "config.json").get("quantization_config"))


def published_as(directory: Path) -> str:
    """What the model in `directory` is called where it comes from: a repository, or a directory; empty: unknown."""
    about = _read_json(directory / SOURCE)
    source = str(about.get("source", ""))
    return str(about.get("repo", "")) or source.removeprefix("hub:").partition("@")[0]


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file. Raises InvalidInput for a broken file."""
    return [name for name, _, _ in _tensors(path)[1]]


def stored_names(directory: Path) -> list[str]:
    """Names of all tensors of the model in `directory`, by its weights or before they come its index; none: unknown.

    Raises InvalidInput for a broken file.
    """
    files = sorted(directory.glob("model*.safetensors"))
    listed = _read_json(directory / INDEX).get("weight_map")
    return [name for path in files for name in tensor_names(path)] or list(listed if isinstance(listed, dict) else ())


def check_weights(path: Path) -> None:
    """Raise InvalidInput unless the weight file is as long as its header says."""
    begin, tensors = _tensors(path)
    if begin + max((end for _, _, end in tensors), default=0) != path.stat().st_size:
        raise _unusable(path, "it is not as long as its header says")


def _tensors(path: Path) -> tuple[int, list[tuple[str, list[int], int]]]:
    """Where the values of a weight file begin; name, shape and end of each, from there. Raises InvalidInput."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LARGEST_HEADER)))
        header.pop("__metadata__", None)
        return 8 + size, [(name, tensor["shape"], tensor["data_offsets"][1]) for name, tensor in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _unusable(path, str(error)) from None


def _unusable(path: Path, why: str) -> InvalidInput:
    return InvalidInput("bad_model", f"{path} holds no usable model: {why}", "pull the base model again")


def base_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the model's files, as they were when it was pulled; computed where nothing says so."""
    recorded = _read_json(directory / SOURCE).get("files", {})
    return {name: file["sha256"] for name, file in recorded.items()} or hashes(directory)


def _lacking(directory: Path, what: str, next: str) -> InvalidInput:
    return InvalidInput("incomplete_model", f"the model directory {directory} lacks {what}", next)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
