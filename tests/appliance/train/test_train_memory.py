from __future__ import annotations

import ctypes
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from forked import start
from tiny import add_run, result, stage

from appliance import worker
from appliance.home import Home
from appliance.train import stage as training
from appliance.train.memory import keep_freed_memory, peak_memory

SIZE = 1 << 27
"""Bytes of a tensor that the C library gives back when it is freed, unless told otherwise."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process")
def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    held = numpy.ones(1 << 28, dtype=numpy.uint8)
    peak = peak_memory()
    assert peak > 0.95 * psutil.Process().memory_info().rss, "the two are counted apart"
    assert peak > held.nbytes
    del held
    assert peak_memory() >= peak


def given_back() -> int:
    """Bytes less that this process holds after a tensor of SIZE is freed."""
    held = torch.ones(SIZE, dtype=torch.uint8)
    before = psutil.Process().memory_info().rss
    del held
    return before - psutil.Process().memory_info().rss


def gives_back() -> int:
    return int(given_back() < 0.9 * SIZE)


def work_on_a_stage_that_frees_memory(run: Path) -> int:
    training.train_stage = lambda *_: {"given_back": given_back()}
    return worker.main(run, "sft")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no such setting")
def test_a_worker_keeps_freed_memory(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS"))
    forks = [start(run / "log.txt", gives_back), start(run / "log.txt", work_on_a_stage_that_frees_memory, run)]
    for fork in forks:
        fork.join()
        assert fork.exitcode == 0, (run / "log.txt").read_text()
    assert result(run, "sft")["given_back"] < 0.1 * SIZE


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
