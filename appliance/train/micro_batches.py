"""How much goes through the model at once, and how that shrinks when the memory is not enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from appliance.errors import is_out_of_memory
from appliance.train.model import release_memory
from appliance.train.order import MICRO_BATCH_TOKENS, cut_by_tokens

T = TypeVar("T")


@dataclass
class MicroBatchLimit:
    """The most rows and tokens of a micro-batch. A step is the same however it is divided."""

    rows: int = sys.maxsize
    tokens: int = MICRO_BATCH_TOKENS
    warn: Callable[..., Any] = lambda **_: None
    """Takes the fields of a warning: code, message, the new `micro_batch_tokens`, when the memory was too little."""
    last_resort: Callable[[], str] = lambda: ""
    """What else takes less memory, done and told, once every micro-batch is a single row; empty: nothing is left."""
    settled: bool = False
    """The memory has been too little before: no more tokens than these."""
    _tried: int = 0
    """Tokens of the largest micro-batch of several rows in the last division."""

    @classmethod
    def after(cls, events: Iterable[dict[str, Any]], rows: int, warn: Callable[..., Any]) -> MicroBatchLimit:
        """The limit of a stage whose `events` say how often its memory was not enough, killed by the kernel or not."""
        tokens, settled = MICRO_BATCH_TOKENS, False
        for event in events:
            if event.get("code") == "out_of_memory":
                tokens, settled = max(event.get("micro_batch_tokens", tokens // 2), 1), True
        return cls(rows, tokens, warn, settled=settled)

    def divide(self, lengths: Sequence[int], sequences_per_row: int) -> list[slice]:
        """Where to cut a batch whose rows have these lengths."""
        cuts = cut_by_tokens(lengths, self.tokens // sequences_per_row, self.rows)
        divisible = [cut for cut in cuts if cut.stop - cut.start > 1]
        sizes = [(cut.stop - cut.start) * max(lengths[cut]) * sequences_per_row for cut in divisible]
        self._tried = max(sizes, default=0)
        return cuts

    def fit(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which divides its batch by this limit and can be repeated.

        Each time the memory runs out the limit is halved. Once every micro-batch is a single row, and there is no last
        resort, raises what was raised.
        """
        while True:
            try:
                return attempt()
            except Exception as error:  # torch, its allocators and the drivers each raise their own
                if not is_out_of_memory(error):
                    raise
                if self._tried:
                    self.tokens, before = self._tried // 2, self._tried
                    how = f"at most {self.tokens} tokens in a forward pass instead of {before}"
                elif not (how := self.last_resort()):
                    raise
            release_memory()
            self.warn(
                code="out_of_memory",
                message=f"out of memory: going on with {how}; the rows of a step stay the same",
                micro_batch_tokens=self.tokens,
            )
