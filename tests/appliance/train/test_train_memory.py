from __future__ import annotations

import ctypes

import numpy
import psutil
import pytest
import torch

from appliance.train.memory import keep_freed_memory, peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process")
def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    held = numpy.ones(1 << 28, dtype=numpy.uint8)
    peak = peak_memory()
    assert peak > 0.95 * psutil.Process().memory_info().rss, "the two are counted apart"
    assert peak > held.nbytes
    del held
    assert peak_memory() >= peak


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
