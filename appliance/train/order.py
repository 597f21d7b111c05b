"""The order in which rows are trained on: batches of rows of like length, the same for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from appliance.train.seeds import seed_for

BATCHES_SORTED_TOGETHER = 32

MICRO_BATCH_TOKENS = 2048 if torch.cuda.is_available() else 512
"""Tokens of one forward pass, padding included: on a CPU more would save a little time, for much memory."""


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Row indices of one epoch, each `batch_size` of them a batch; the incomplete batch comes last.

    Rows are shuffled and sorted by length within stretches of a few batches, so that batches differ from epoch to
    epoch and hold little padding; then the batches are shuffled. The first batch of the first epoch has the
    longest row, so that a lack of memory shows at once.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if epoch == 0:
        longest = max(shuffled, key=lengths.__getitem__)
        shuffled.remove(longest)
        shuffled.insert(0, longest)
    whole = len(lengths) - len(lengths) % batch_size
    stretch = BATCHES_SORTED_TOGETHER * batch_size
    batches = []
    for start in range(0, whole, stretch):
        rows = sorted(shuffled[start : min(start + stretch, whole)], key=lambda index: -lengths[index])
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    order: list[int] = torch.randperm(len(batches), generator=generator).tolist()
    if epoch == 0:
        order.sort(key=lambda batch: batch != 0)
    return [index for batch in order for index in batches[batch]] + shuffled[whole:]


def cut_by_tokens(lengths: Sequence[int], tokens: int, rows: int) -> list[slice]:
    """Where to cut a batch whose rows have these lengths, so that each micro-batch has at most so many rows and tokens.

    Tokens are counted with the padding to its longest row. A row that is too long alone is a micro-batch of its own.
    """
    cuts: list[slice] = []
    start = longest = 0
    for at, length in enumerate(lengths):
        longest = max(longest, length)
        if at > start and (at - start == rows or (at - start + 1) * longest > tokens):
            cuts.append(slice(start, at))
            start, longest = at, length
    return [*cuts, slice(start, len(lengths))]


class LengthSampler(torch.utils.data.Sampler[int]):
    """`epoch_order` for a data loader, which tells it the epoch.

    Transformers' own sampler takes its order from the global random state, which a resumed stage does not have.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.batch_size, self.seed, self.epoch))
