"""Seeds that follow from a recipe's one: no two uses of chance are the same, nor those of neighbouring recipes."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, purpose: str, number: int) -> int:
    """The seed of the `number`-th use for a purpose, such as an epoch's order, in a run of the recipe's `seed`.

    A hash and not a sum: by a sum one seed's second epoch would be the next seed's first.
    """
    said = f"{seed} {purpose} {number}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=4).digest(), "little")
