"""Weights as they lie in safetensors files: changed and written a few rows at a time, never through a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from appliance.errors import InvalidInput
from appliance.release.peft_format import not_mergeable
from appliance.release.rounding import Rounding

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of weights that can be changed."""
_BLOCK = 1 << 18
"""Values changed at once: their copies in fp32 stay in the processor's cache."""
_LONGEST_HEADER = 100 << 20
_THREADS = min(8, len(os.sched_getaffinity(0)))


class Change(Protocol):
    """How a stored weight becomes the release's."""

    @property
    def whole(self) -> bool:
        """Whether it needs all rows at once."""
        ...

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be made to a weight of this shape."""
        ...

    def __call__(self, weight: torch.Tensor, rows: slice, /) -> torch.Tensor:
        """The new values of `rows`, of which `weight` are the stored ones, to be overwritten; both in fp32."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors writes it, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A weight file: everything before the first value, and the tensors in the order in which they lie."""

    path: Path
    header: bytes
    tensors: list[Stored]


def shards(folder: Path) -> list[Path]:
    """The weight files of a model."""
    return sorted(folder.glob("*.safetensors"))


def read_shard(path: Path) -> Shard:
    """The header of a weight file; the format is 8 bytes of length, JSON, then the values. Raises InvalidInput."""
    with open(path, "rb") as file:
        header = file.read(8)
        header += file.read(min(int.from_bytes(header, "little"), _LONGEST_HEADER))
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        tensors = [
            Stored(name, entry["dtype"], tuple(entry["shape"]), *(len(header) + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(path.name) from None
    if tensors and max(tensor.end for tensor in tensors) != path.stat().st_size:
        raise _broken(path.name)
    return Shard(path, header, sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)))


def layout(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor of a model, by name."""
    return {
        tensor.name: (path.name, tensor.shape, tensor.dtype)
        for path in shards(folder)
        for tensor in read_shard(path).tensors
    }


def pairs(base: Path, model: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every tensor by name as it is in the base and in a model of the same layout."""
    for shard in shards(base):
        with safe_open(shard, framework="pt") as before, safe_open(model / shard.name, framework="pt") as after:
            for name in before.keys():  # noqa: SIM118 - not a dict
                yield name, before.get_tensor(name), after.get_tensor(name)


def write_weights(base: Path, folder: Path, changes: Mapping[str, Change]) -> None:
    """Write the base's weight files into `folder` with `changes` made to the tensors that they name.

    Headers are the base's byte for byte, and so are all other tensors. In memory are one tensor whose change needs it
    whole, and a block of rows for each thread.
    """
    with ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        written = []
        for shard in map(read_shard, shards(base)):
            target = folder / shard.path.name
            target.write_bytes(shard.header)
            for tensor in shard.tensors:
                change = changes.get(tensor.name)
                if change is not None and change.whole:
                    _write_tensor(shard.path, target, tensor, change)
                else:
                    written.append(pool.submit(_write_tensor, shard.path, target, tensor, change))
        for future in written:
            future.result()


def require_fitting(base: Path, changes: Mapping[str, Change]) -> None:
    """Raise InvalidInput where a changed weight is not in the base's files, or not in the shape of its change."""
    present = layout(base)
    for name, change in sorted(changes.items()):
        if name not in present:
            raise not_mergeable(f"the base model's files hold no tensor {name}", "use another base model")
        _, shape, dtype = present[name]
        if dtype not in DTYPES:
            raise not_mergeable(f"{name} is stored as {dtype} in the base model", "use the base in 16 bits")
        if not change.fits(shape):
            raise not_mergeable(
                f"{name} has the shape {shape} in the base model, which the adapter does not fit",
                "merge into the base model that it was trained on",
            )


def _write_tensor(base: Path, target: Path, tensor: Stored, change: Change | None) -> None:
    with open(base, "rb", buffering=0) as source, open(target, "r+b", buffering=0) as file:
        source.seek(tensor.begin)
        file.seek(tensor.begin)
        if change is None:
            _copy(source, file, tensor.end - tensor.begin)
        else:
            _write_changed(source, file, tensor, change)


def _write_changed(source: FileIO, target: FileIO, tensor: Stored, change: Change) -> None:
    dtype = DTYPES[tensor.dtype]
    count = tensor.shape[0]
    width = (tensor.end - tensor.begin) // count
    step = count if change.whole else min(count, max(1, _BLOCK * dtype.itemsize // width))
    rounding = Rounding(tensor.name, tensor.shape, dtype)
    block = torch.empty((step, *tensor.shape[1:]), dtype=dtype)
    exact = torch.empty_like(block, dtype=torch.float32)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        stored = block[: rows.stop - start]
        _fill(source, _bytes(stored))
        changed = change(exact[: len(stored)].copy_(stored), rows)
        _write(target, _bytes(rounding(changed, rows, out=stored)))


def _copy(source: FileIO, target: FileIO, length: int) -> None:
    while length:
        sent = os.sendfile(target.fileno(), source.fileno(), None, length)
        _require_more(sent)
        length -= sent


def _bytes(values: torch.Tensor) -> memoryview:
    """The memory of a tensor."""
    return values.contiguous().view(torch.uint8).numpy().data.cast("B")


def _fill(source: FileIO, buffer: memoryview) -> None:
    while buffer:
        count = source.readinto(buffer)
        _require_more(count)
        buffer = buffer[count:]


def _require_more(count: int) -> None:
    if not count:
        raise _broken("a weight file")


def _broken(name: str) -> InvalidInput:
    return InvalidInput("bad_model", f"{name} is damaged or cut short", "pull the base model again")


def _write(target: FileIO, data: memoryview) -> None:
    while data:
        data = data[target.write(data) :]
