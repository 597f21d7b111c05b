"""A worker that measures its callbacks: python timed_worker.py RUN_DIR STAGE.

Its last line is the share of its steps' time that all callbacks take, events written too.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from appliance import worker

UNTIMED = 3
"""The first steps, in which callbacks and the C library do what they do once."""


def main(run: Path, stage: str) -> float:
    from transformers.trainer_callback import CallbackHandler

    call, spent, ends = CallbackHandler.call_event, 0.0, []

    def timed(handler: Any, event: str, *arguments: Any, **named: Any) -> Any:
        nonlocal spent
        begun = time.perf_counter()
        try:
            return call(handler, event, *arguments, **named)
        finally:
            now = time.perf_counter()
            spent += now - begun
            if event == "on_step_end":
                ends.append((now, spent))

    CallbackHandler.call_event = timed
    worker.main(run, stage)
    (begun, before), (ended, after) = ends[UNTIMED - 1], ends[-1]
    return (after - before) / (ended - begun)


if __name__ == "__main__":
    os.environ.update({**worker.PATIENT, **os.environ, **worker.QUIET})
    print(main(Path(sys.argv[1]), sys.argv[2]))
