"""How a changed weight is rounded to the 16 bits in which it is stored, so that small changes survive.

The weights of a 16-bit base lie on the grid of their type, and rounding to nearest takes back every change of less than
half a step. Stochastic rounding (Croci et al. 2022, doi 10.1098/rsos.211631) takes the upper neighbour as often as the
value is close to it: every weight is right on average, and so is what they compute. Its draws follow from the tensor's
name, so that the same merge gives the same files, and whoever knows the values can tell whether they were rounded so.
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy
import torch

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""The last bits of an fp32 value, for which the type has no room."""
_TO_FP32_RANGE = 2.0**-112
"""Brings the least normal number of fp16 to that of fp32, so that values below lose bits as they do in fp16."""
_BLOCK = 1 << 17
"""Values in a row that take neighbouring draws."""


class Rounding:
    """Rounds the rows of the tensor `name` of `shape` from fp32 to `dtype`; types of 32 bits and more are converted."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._dtype = dtype
        if dtype not in DROPPED_BITS:
            return
        self._width = math.prod(shape[1:])
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        blocks = -(-math.prod(shape) // _BLOCK)
        generator = torch.Generator().manual_seed(seed)
        self._starts = torch.randint(_BLOCK, (blocks,), generator=generator).tolist()

    def __call__(self, values: torch.Tensor, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """`out`, contiguous, given the `values` of `rows`, which are overwritten."""
        if self._dtype not in DROPPED_BITS:
            return out.copy_(values)
        values = values.contiguous()
        if self._dtype == torch.float16:
            values.mul_(_TO_FP32_RANGE)
        bits, draws = values.view(torch.int32).view(-1), _draws(DROPPED_BITS[self._dtype])
        begin, done = rows.start * self._width, 0
        while done < len(bits):
            block, within = divmod(begin + done, _BLOCK)
            count, at = min(len(bits) - done, _BLOCK - within), self._starts[block] + within
            bits[done : done + count].add_(draws[at : at + count])
            done += count
        if self._dtype == torch.bfloat16:  # the upper half of the bits is the value
            numpy.right_shift(bits.numpy(), 16, out=out.view(torch.int16).view(-1).numpy(), casting="unsafe")
            return out
        bits.bitwise_and_(-1 << DROPPED_BITS[self._dtype])
        return out.copy_(values.div_(_TO_FP32_RANGE))


@functools.cache
def _draws(bits: int) -> torch.Tensor:
    """[2 * _BLOCK] Even draws of so many bits: a value's last bits and one of them make the next step, or do not."""
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(1 << bits, (2 * _BLOCK,), generator=generator, dtype=torch.int32)
