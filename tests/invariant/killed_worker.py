"""A worker that kills itself."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from transformers import Trainer

from appliance import worker
from appliance.train.trainer import MicroBatchTrainer

save, compute = Trainer._save_checkpoint, MicroBatchTrainer.training_step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counting(function: Any, left: Any) -> Any:
    def counted(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            die()
        return function(*arguments, **named)

    return counted


def work(run: Path, stage: str, step: int, call: int) -> int:
    """Work on `run` until this process kills itself.

    With `call` -1 in the middle of `step`, with n in the first save from `step` on, before its n-th call that changes
    the disk.
    """

    def training_step(trainer: Any, *arguments: Any) -> Any:
        loss = compute(trainer, *arguments)
        if call < 0 and trainer.state.global_step == step - 1:
            die()
        return loss

    def save_checkpoint(trainer: Any, *arguments: Any) -> None:
        """Transformers' own, within our saving, which then makes the files durable and puts them in their place."""
        if call >= 0 and trainer.state.global_step >= step:
            if call == 0:
                die()
            left = iter(range(call - 1))
            for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
                setattr(module, name, counting(getattr(module, name), left))
        save(trainer, *arguments)

    MicroBatchTrainer.training_step = training_step  # type: ignore[method-assign]
    Trainer._save_checkpoint = save_checkpoint
    return worker.main(run, stage)
