"""A worker that is killed: python killed_worker.py RUN_DIR STAGE STEP CALL.

CALL -1 kills it in the middle of STEP; CALL n in the first save from STEP on, before its n-th call that changes the
disk.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer

from appliance import worker
from appliance.train.trainer import PartwiseTrainer

run, stage, step, call = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
save, compute = Trainer._save_checkpoint, PartwiseTrainer.training_step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def training_step(trainer: Any, *arguments: Any) -> Any:
    loss = compute(trainer, *arguments)
    if call < 0 and trainer.state.global_step == step - 1:
        die()
    return loss


def save_checkpoint(trainer: Any, *arguments: Any) -> None:
    """Transformers' own, within our saving: what follows it makes the files durable and puts them in their place."""
    if call >= 0 and trainer.state.global_step >= step:
        if call == 0:
            die()
        left = iter(range(call - 1))
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
            setattr(module, name, counting(getattr(module, name), left))
    save(trainer, *arguments)


def counting(function: Any, left: Any) -> Any:
    def counted(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            die()
        return function(*arguments, **named)

    return counted


PartwiseTrainer.training_step = training_step  # type: ignore[method-assign]
Trainer._save_checkpoint = save_checkpoint
sys.exit(worker.main(run, stage))
