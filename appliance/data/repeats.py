"""Rows that say what another row says: exactly, nearly, with another answer, or on the other side of the split."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import rensa

from appliance.data.dataset import Row, prompt_messages, spoken, text_hash

SIMILAR = 0.8
"""Share of common words (their Jaccard index, estimated) from which two rows are near duplicates."""

_SLOTS = 128
_BANDS = 16
"""Rows meet in a band where its 8 slots are equal: at a similarity of 0.8, in one at least with 95 %; at 0.5, 6 %."""
_SEED = 1
_BATCH_ROWS = 1000
_PAIRS_AT_ONCE = 1 << 14
_MOST_WORD_LENGTH = 12
"""Characters a word; a text of longer ones is in a script without spaces, and its words are three characters each."""
_SAID = struct.Struct("<QQQQ")
_SAID_FIELDS = [("prompt", "<u8"), ("question", "<u8"), ("wanted", "<u8"), ("unwanted", "<u8")]


@dataclass(frozen=True)
class Repeats:
    """What `Repetition` has found among n rows."""

    near: int
    """Rows that are nearly an earlier one."""
    pairs: list[tuple[int, int, float]]
    """Some of them, each with the row it is like and the estimated similarity."""
    conflicts: int
    """Prompts with different answers; where answers are judged, answers judged both ways."""
    conflicting: list[int]
    """Some rows of such prompts."""
    groups: Any
    """[n] u64: the rows' groups, near duplicates in one."""
    questions: Any
    """[n] u64: the same for rows whose last turn of the user is the same."""


class Repetition:
    """Takes rows as they come; holds a few bytes a row in files under `scratch`, and little in memory."""

    def __init__(self, scratch: Path, stack: contextlib.ExitStack) -> None:
        self._scratch = scratch
        self._seen = sqlite3.connect(scratch / "seen.db", isolation_level=None, check_same_thread=False)
        stack.callback(self._seen.close)
        for pragma in ("journal_mode=off", "synchronous=off", "cache_size=-65536"):
            self._seen.execute(f"PRAGMA {pragma}")
        self._seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._seen.execute("BEGIN")
        self._said = _new(stack, scratch / "said")
        self._sketches = _new(stack, scratch / "sketches")
        self._bands = [_new(stack, scratch / f"band-{number}") for number in range(_BANDS)]
        self._words: list[list[str]] = []

    def is_new(self, digest: bytes) -> bool:
        """Whether this is the first row with that digest."""
        return self._seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def add(self, row: Row) -> None:
        """Take in the next row that is kept."""
        prompt = prompt_messages(row)
        question = next(message["content"] for message in reversed(prompt) if message["role"] == "user")
        if "messages" in row:
            wanted, unwanted = row["messages"][len(prompt) :], None
        elif "chosen" in row:
            wanted, unwanted = row["chosen"], row["rejected"]
        else:
            wanted, unwanted = (row["completion"], None) if row["label"] else (None, row["completion"])
        said = [None if part is None else _said(part) for part in (prompt, wanted, unwanted)]
        hashes = [0 if text is None else text_hash(text.encode()) for text in said]
        self._said.write(_SAID.pack(hashes[0], text_hash(question.encode()), *hashes[1:]))
        self._words.append(_words(" ".join([text for text in said if text])))
        if len(self._words) == _BATCH_ROWS:
            self._sketch()

    def finish(self, groups: Any) -> Repeats:
        """What has been found, of rows whose groups (by prompt) are `groups`, [n] u64."""
        self._sketch()
        for file in (self._said, self._sketches, *self._bands):
            file.flush()
        # One after another, so that only the arrays of one are in memory.
        conflicts, conflicting = _conflicts(numpy.fromfile(self._scratch / "said", _SAID_FIELDS))
        one, other, similarity = self._near_pairs(len(groups))
        near = len(groups) - len(numpy.unique(_components(len(groups), one, other)))
        shown = numpy.argsort(other, kind="stable")[:20]
        return Repeats(
            near=near,
            pairs=[(int(one[i]), int(other[i]), float(similarity[i])) for i in shown],
            conflicts=conflicts,
            conflicting=conflicting,
            groups=_joined_groups(groups, one, other),
            questions=numpy.fromfile(self._scratch / "said", _SAID_FIELDS)["question"].copy(),
        )

    def _sketch(self) -> None:
        if not self._words:
            return
        rows = rensa.RMinHash.digest_matrix_from_token_sets(self._words, _SLOTS, _SEED).to_rows()
        self._words = []
        # 16 of a slot's 32 bits: two rows that differ in it are taken for equal once in 65,536 times.
        sketches = numpy.array(rows, dtype="<u4").astype("<u2")
        sketches.tofile(self._sketches)
        halves = sketches.view("<u8").reshape(len(rows), _BANDS, -1)
        keys = halves[:, :, 0] * numpy.uint64(0x9E3779B97F4A7C15) ^ halves[:, :, 1] * numpy.uint64(0xC2B2AE3D27D4EB4F)
        for number, file in enumerate(self._bands):
            keys[:, number].tofile(file)

    def _near_pairs(self, count: int) -> tuple[Any, Any, Any]:
        """Earlier rows, later rows, similarities: enough pairs to join all near duplicates."""
        found: list[tuple[Any, Any, Any]] = []
        joined = numpy.arange(count)
        for number in range(_BANDS):
            keys = numpy.fromfile(self._scratch / f"band-{number}", "<u8")
            order = numpy.argsort(keys, kind="stable")
            meet = numpy.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            one, other = order[meet], order[meet + 1]
            apart = joined[one] != joined[other]
            one, other = one[apart], other[apart]
            similarity = self._similarity(one, other)
            near = similarity >= SIMILAR
            if near.any():
                found.append((one[near], other[near], similarity[near]))
                joined = _components(count, *(numpy.concatenate(side) for side in list(zip(*found, strict=True))[:2]))
        if not found:
            none = numpy.empty(0, dtype=numpy.int64)
            return none, none, none
        one, other, similarity = (numpy.concatenate(side) for side in zip(*found, strict=True))
        return one, other, similarity

    def _similarity(self, one: Any, other: Any) -> Any:
        shares = [numpy.empty(0)]
        with open(self._scratch / "sketches", "rb") as file:
            for at in range(0, len(one), _PAIRS_AT_ONCE):
                sides = [_sketches(file, rows[at : at + _PAIRS_AT_ONCE].tolist()) for rows in (one, other)]
                shares.append((sides[0] == sides[1]).mean(axis=1))
        return numpy.concatenate(shares)


def _sketches(file: BinaryIO, rows: list[int]) -> Any:
    """[rows, slots] of the file of sketches. Read, not mapped: the kernel maps far more of a file than is touched."""
    size = _SLOTS * 2
    read = b"".join([os.pread(file.fileno(), size, row * size) for row in rows])
    return numpy.frombuffer(read, "<u2").reshape(-1, _SLOTS)


def _new(stack: contextlib.ExitStack, path: Path) -> BinaryIO:
    return stack.enter_context(open(path, "wb"))


def _components(count: int, one: Any, other: Any) -> Any:
    """[count]: for each row the lowest row that the pairs (one[i], other[i]) join it with."""
    lowest = numpy.arange(count)
    while len(one):
        least = numpy.minimum(lowest[one], lowest[other])
        before = lowest.copy()
        numpy.minimum.at(lowest, one, least)
        numpy.minimum.at(lowest, other, least)
        numpy.minimum.at(lowest, before[one], least)
        numpy.minimum.at(lowest, before[other], least)
        lowest = lowest[lowest]
        if numpy.array_equal(lowest, before):
            break
    return lowest


def _joined_groups(groups: Any, one: Any, other: Any) -> Any:
    """[n] u64 groups, those of the rows one[i] and other[i] in one: that of the lowest hash."""
    if not len(one):
        return groups
    order = numpy.argsort(groups, kind="stable")
    same = numpy.flatnonzero(groups[order[1:]] == groups[order[:-1]])
    one, other = numpy.concatenate([one, order[same]]), numpy.concatenate([other, order[same + 1]])
    together = _components(len(groups), one, other)
    lowest = groups.copy()
    numpy.minimum.at(lowest, together, groups)
    return lowest[together]


def _conflicts(said: Any) -> tuple[int, list[int]]:
    """How many prompts or answers conflict, and some rows of them."""
    if not said["unwanted"].any():
        order = numpy.lexsort((said["wanted"], said["prompt"]))
        prompts, answers = said["prompt"][order], said["wanted"][order]
        clash = numpy.flatnonzero((prompts[1:] == prompts[:-1]) & (answers[1:] != answers[:-1]))
        return len(numpy.unique(prompts[clash])), sorted(order[clash[:20]].tolist())
    mixed = {side: said["prompt"] * numpy.uint64(0x9E3779B97F4A7C15) ^ said[side] for side in ("wanted", "unwanted")}
    judged = {side: numpy.where(said[side] != 0, mixed[side], 0) for side in mixed}
    both = numpy.setdiff1d(numpy.intersect1d(judged["wanted"], judged["unwanted"]), [0])
    rows = numpy.flatnonzero(numpy.isin(judged["wanted"], both))
    return len(both), rows[:20].tolist()


def _words(text: str) -> list[str]:
    text = text.casefold()
    words = text.split()
    if len(text) <= _MOST_WORD_LENGTH * len(words):
        return words
    joined = "".join(words)
    return [joined[at : at + 3] for at in range(max(1, len(joined) - 2))]


def _said(messages: list[dict[str, Any]]) -> str:
    calls = [str(message["tool_calls"]) for message in messages if "tool_calls" in message]
    return " ".join([spoken(messages), *calls])
