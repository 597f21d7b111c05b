"""events.jsonl: what a run says about itself, one JSON object a line, `seq` rising by one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

_TAIL_BYTES = 64 << 10

KINDS = frozenset(
    {
        "stage_started",  # stage
        "forecast",  # stage, memory (by part and total), available, fits, advice, disk, tokens, steps,
        # seconds, gradient_checkpointing
        "step",  # stage, step, steps, loss, lr, grad_norm, tokens, tokens_per_second, eta_seconds, memory (peak, bytes)
        # and answer_loss (nats a token of the answers that the model is to give: all, the chosen, or those judged good)
        # and of a method with a reference reward_chosen, reward_rejected, reward_margin (nats times beta),
        # reward_accuracy (share of rows), chosen_logp (nats an answer)
        "eval",  # stage, step, loss, interval (95 %: low, high), answer_loss, and of rewards what a step has, with
        # reward_chosen_interval
        "sample",  # stage, step, prompt, text
        "checkpoint",  # stage, step, path
        "warning",  # stage, message; where known code, next, cause, log (last lines)
        "gate",  # stage, gate, passed, figures
        "stage_finished",  # stage, seconds
        "failed",  # stage, reason, next; where known log (last lines)
    }
)


class EventLog:
    """Appends to and reads one run's events.jsonl.

    Writers in several processes take turns by a file lock. A line torn by a kill is cut off by the next writer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, stage: str, **fields: Any) -> int:
        """Append one event and return its seq. Raises ValueError for an unknown kind."""
        if kind not in KINDS:
            raise ValueError(f"unknown event kind {kind!r}")
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            seq = _last_seq_cutting_torn_line(file) + 1
            event = {"seq": seq, "time": round(time.time(), 3), "event": kind, "stage": stage, **fields}
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=True).encode() + b"\n")
            file.flush()
            if kind not in ("step", "sample"):
                os.fsync(file.fileno())
        return seq

    def read(self, after: int = 0) -> list[dict[str, Any]]:
        """Whole events with a seq above `after`, oldest first."""
        return [event for event in self.read_from(0)[0] if event["seq"] > after]

    def newest(self, kind: str) -> dict[str, Any] | None:
        """The last event of that kind among the last ones, read from the end."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            # The first may be the end of a longer one.
            with contextlib.suppress(ValueError):
                event: dict[str, Any] = json.loads(line)
                if event["event"] == kind:
                    return event
        return None

    def read_from(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """The whole events that begin at byte `position` or later, and the position after them."""
        try:
            with open(self.path, "rb") as file:
                file.seek(position)
                content = file.read()
        except FileNotFoundError:
            return [], position
        whole = content[: content.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], position + len(whole)


def _last_seq_cutting_torn_line(file: Any) -> int:
    """Seq of the last whole line (0 if none), after truncating what follows it. Leaves the file at its end."""
    size = file.seek(0, os.SEEK_END)
    position, tail = size, b""
    while position > 0:
        start = max(0, position - 8192)
        file.seek(start)
        tail = file.read(position - start) + tail
        position = start
        end = tail.rfind(b"\n")
        if end < 0:
            continue
        begin = tail.rfind(b"\n", 0, end)
        if begin < 0 and position > 0:
            continue
        file.truncate(position + end + 1)
        file.seek(0, os.SEEK_END)
        return int(json.loads(tail[begin + 1 : end])["seq"])
    file.truncate(0)
    file.seek(0, os.SEEK_END)
    return 0
