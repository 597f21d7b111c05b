"""Release folder to one GGUF file: `python -m appliance.release.gguf_file FOLDER FILE [Q8_0|Q4_K_M]`.

Written a tensor at a time, with the llama.cpp project's `gguf` library. Models whose layout or tokenizer is not known
here are refused by name.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import get_args

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

from appliance.errors import ApplianceError, Exit, InvalidInput
from appliance.home import disk_error, replacing
from appliance.release.gguf_layouts import Layout, layout_of, unknown
from appliance.release.gguf_quantise import FILE_TYPES, Quantisation, llama_cpp, nbytes, quantised, type_of
from appliance.release.gguf_tokenizer import add_tokenizer
from appliance.release.weights import layout, shards

_TYPES = {
    "BF16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "F16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "F32": (Type.F32, gguf.LlamaFileType.ALL_F32),
}


def write_gguf(folder: Path, target: Path, quantisation: Quantisation | None = None) -> None:
    """Write the model in `folder` to the GGUF file `target`, which is there whole in the end or not at all.

    Raises InvalidInput for a model that cannot be written so, or not `quantisation` without llama.cpp's library.
    """
    if quantisation:
        llama_cpp()
    model = layout_of(folder)
    tensors = _tensors(folder, model, quantisation)
    with replacing(target) as file:
        writer = gguf.GGUFWriter(file.name, gguf.MODEL_ARCH_NAMES[model.arch])
        # llama.cpp gives the tokens of what is called so the properties of Phi 3's.
        writer.add_name(re.sub("phi-?3", "phi", folder.name, flags=re.IGNORECASE))
        writer.add_file_type(FILE_TYPES[quantisation] if quantisation else _stored(folder, model)[1])
        if quantisation:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        model.describe(writer)
        add_tokenizer(writer, folder, model.config.vocab_size)
        for name, value in model.extra.items():
            writer.add_tensor_info(name, value.shape, None, value.nbytes, raw_dtype=Type.F32)
        for new, shape, kind in tensors.values():
            writer.add_tensor_info(new, shape, None, nbytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for value in model.extra.values():
            writer.write_tensor_data(value.numpy())
        for path in shards(folder):
            with safe_open(path, framework="pt") as stored:
                for name in (name for name in layout(folder) if name in tensors and name in stored.keys()):  # noqa: SIM118
                    _, _, kind = tensors[name]
                    value = model.value(name, stored.get_tensor(name))
                    data = quantised(value, kind) if gguf.GGML_QUANT_SIZES[kind][0] > 1 else value.contiguous()
                    writer.write_tensor_data(data.view(torch.uint8).numpy())
        writer.close()


def _stored(folder: Path, model: Layout) -> tuple[Type, gguf.LlamaFileType]:
    """The type of the model's matrices. Raises InvalidInput where they have several."""
    renamed = model.renamer()
    found = {dtype for name, (_, shape, dtype) in layout(folder).items() if len(shape) > 1 and renamed(name)}
    if len(found) != 1 or not found <= _TYPES.keys():
        raise unknown(f"weights stored as {', '.join(sorted(found))}")
    return _TYPES[found.pop()]


def _tensors(
    folder: Path, model: Layout, quantisation: Quantisation | None
) -> dict[str, tuple[str, tuple[int, ...], Type]]:
    """By name in the files, llama.cpp's name, shape and type of each tensor. Raises InvalidInput for one not known."""
    rename = model.renamer()
    renamed = {name: rename(name) for name in layout(folder)}
    if missing := sorted(name for name, new in renamed.items() if new is None):
        raise unknown(f"the tensor {missing[0]}")
    stored, _ = _stored(folder, model)
    tied = "output.weight" not in renamed.values()
    found: dict[str, tuple[str, tuple[int, ...], Type]] = {}
    for name, (_, shape, _) in layout(folder).items():
        if new := renamed[name]:
            kind = stored if len(shape) > 1 else Type.F32
            if quantisation:
                layers = model.config.num_hidden_layers
                kind = type_of(new, shape, quantisation, layers=layers, tied=tied, stored=stored)
            found[name] = (new, shape, kind)
    return found


def main() -> None:
    """Write as the arguments say; exits with the error's status after one line about it."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    folder, target, *quantisation = sys.argv[1:]
    try:
        write_gguf(Path(folder), Path(target), _quantisation(quantisation))
    except OSError as error:
        _end(disk_error(error, Path(target).parent))
    except ApplianceError as error:
        _end(error)


def _quantisation(said: list[str]) -> Quantisation | None:
    known: tuple[Quantisation, ...] = get_args(Quantisation)
    found = next((one for one in known if [one] == said), None)
    if said and not found:
        raise InvalidInput("bad_quantisation", f"{said[0]} is not known", f"choose from {', '.join(known)}")
    return found


def _end(error: ApplianceError) -> None:
    print(f"appliance: error: {error}", file=sys.stderr)
    sys.exit(error.exit or Exit.FAILED)


if __name__ == "__main__":
    main()
