"""The types of the weights in a GGUF file: as they are, or quantised by llama.cpp's own code.

Which tensor of Q4_K_M has which type is llama.cpp's choice, from its `llama-quantize`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from appliance.errors import InvalidInput

Quantisation = Literal["Q8_0", "Q4_K_M"]

FILE_TYPES = {"Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M}
_LAYERS_OF_70B = 80
_IN_SMALLER_BLOCKS = {
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
"""For rows that are no multiple of 256 values."""


def type_of(
    name: str,
    shape: tuple[int, ...],
    quantisation: Quantisation,
    *,
    layers: int,
    tied: bool,
    stored: Type,
) -> Type:
    """The type of the tensor that llama.cpp calls `name`, of a model with `layers`; `stored`: what it has in 16 bits.

    `tied`: the output head is the embedding.
    """
    if len(shape) < 2:
        return Type.F32
    kind = Type.Q8_0 if quantisation == "Q8_0" else _mixed(name, layers, tied)
    for fitting in (kind, _IN_SMALLER_BLOCKS.get(kind, kind)):
        if shape[-1] % gguf.GGML_QUANT_SIZES[fitting][0] == 0:
            return fitting
    return stored


def _mixed(name: str, layers: int, tied: bool) -> Type:
    if name == ("token_embd.weight" if tied else "output.weight"):
        return Type.Q6_K
    if name.endswith("attn_qkv.weight"):
        return Type.Q5_K
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer = int(name.split(".")[1])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        if more:
            return Type.Q6_K
        return Type.Q5_K if layers == _LAYERS_OF_70B and name.endswith("attn_v.weight") else Type.Q4_K
    return Type.Q4_K


def nbytes(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // block * size)


def quantised(values: torch.Tensor, kind: Type) -> torch.Tensor:
    """The bytes of `values` (rows, columns) in a quantised type."""
    library = llama_cpp()
    rows, columns = math.prod(values.shape[:-1]), values.shape[-1]
    source = values.float().contiguous()
    target = torch.empty(nbytes(tuple(values.shape), kind), dtype=torch.uint8)
    at_once = -(-rows // len(os.sched_getaffinity(0)))

    def part(start: int) -> None:
        count = min(at_once, rows - start)
        library.ggml_quantize_chunk(
            int(kind), source.data_ptr(), target.data_ptr(), start * columns, count, columns, None
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(part, range(0, rows, at_once)))
    return target


def _pinned(package: str) -> str:
    """The version of an optional package that this one asks for."""
    asked = (requirement.partition(";")[0].strip() for requirement in requires("finetune-appliance") or ())
    return next((one for one in asked if one.startswith(package)), package)


@functools.cache
def llama_cpp() -> ctypes.CDLL:
    """llama.cpp's library. Raises InvalidInput where it is not installed."""
    package = find_spec("xllamacpp")
    if package is None or not package.submodule_search_locations:
        raise InvalidInput(
            "no_llama_cpp",
            "llama.cpp's library, which quantises, is not installed",
            f"run `pip install {_pinned('xllamacpp')}`",
        )
    path = next(Path(package.submodule_search_locations[0]).glob("xllamacpp*.so"))
    library = ctypes.CDLL(str(path))
    numbers = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *numbers, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
