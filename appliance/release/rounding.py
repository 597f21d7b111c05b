"""How a changed weight is rounded to the 16 bits in which it is stored, so that small changes survive.

The weights of a 16-bit base lie on the grid of their type, and rounding to nearest takes back every change of less than
half a step. Stochastic rounding (Croci et al. 2022, doi 10.1098/rsos.211631) takes the upper neighbour as often as the
value is close to it: every weight is right on average, and so is what they compute. Its draws follow from the tensor's
name, so that the same merge gives the same files, and whoever knows the values can tell whether they were rounded so.
"""

from __future__ import annotations

import hashlib
import math

import torch

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""The last bits of an fp32 value, for which the type has no room."""
_TO_FP32_RANGE = 2.0**-112
"""Brings the least normal number of fp16 to that of fp32, so that values below lose bits as they do in fp16."""
_TABLE = 1 << 18
"""Draws that are kept at once."""


class Rounding:
    """Rounds the rows of the tensor `name` of `shape` from fp32 to `dtype`; types of 32 bits and more are converted."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._dtype = dtype
        if dtype not in DROPPED_BITS:
            return
        rows, columns = shape[0], max(1, math.prod(shape[1:]))
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator, most = torch.Generator().manual_seed(seed), 1 << DROPPED_BITS[dtype]
        self._height = min(rows, max(1, _TABLE // columns))
        self._table = torch.randint(most, (self._height, columns), generator=generator, dtype=torch.int32)
        # Blocks of so many rows share their draws, each block turned by another number of columns.
        blocks = -(-rows // self._height)
        self._turns = (torch.randperm(max(columns, blocks), generator=generator)[:blocks] % columns).tolist()

    def __call__(self, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """The `values` of `rows`, which are overwritten, in the tensor's type."""
        if self._dtype not in DROPPED_BITS:
            return values.to(self._dtype)
        values = values.contiguous()
        if self._dtype == torch.float16:
            values.mul_(_TO_FP32_RANGE)
        bits = values.view(torch.int32).view(len(values), -1)
        start = rows.start
        while start < rows.stop:
            block, at = divmod(start, self._height)
            stop = min(rows.stop, start + self._height - at)
            draws, turn = self._table[at : at + stop - start], self._turns[block]
            part = bits[start - rows.start : stop - rows.start]
            part[:, turn:].add_(draws[:, : draws.shape[1] - turn])
            part[:, :turn].add_(draws[:, draws.shape[1] - turn :])
            start = stop
        bits.bitwise_and_(-1 << DROPPED_BITS[self._dtype])
        if self._dtype == torch.float16:
            values.div_(_TO_FP32_RANGE)
        return values.to(self._dtype)
