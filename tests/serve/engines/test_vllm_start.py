"""How vLLM's server starts: on a name that all releases share, and with the memory that is there then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.engines import vllm_start
from serve.engines.vllm_start import link, memory_share

GIB = 1 << 30


def share_of(looks: Sequence[float], most: float = 0.92, total: int = 24) -> tuple[float, int]:
    """The share where the GPU has so many GiB free at each look, and the seconds until it is settled."""
    left, waits = list(looks), []

    def free() -> int:
        return int((left.pop(0) if len(left) > 1 else left[0]) * GIB)

    return memory_share(most, total * GIB, free, waits.append), len(waits)


def test_a_free_card_gives_the_largest_share_at_once() -> None:
    assert share_of([23.6]) == (0.92, 0)
    assert share_of([79], most=0.5, total=80) == (0.5, 0)


def test_what_other_programs_hold_is_left_to_them() -> None:
    """vLLM does not start where less is free than its share."""
    share, waited = share_of([20])
    assert (share, waited) == (0.81, 3)
    assert share * 24 <= 20 - 0.5


def test_memory_that_comes_back_is_waited_for() -> None:
    assert share_of([2, 9, 16, 23.6]) == (0.92, 3)
    assert share_of([2, 2, 9, 20, 20]) == (0.81, 6), "a moment's rest is not its end"
    assert share_of([0, 0, 23.6]) == (0.92, 2)
    assert share_of([2, *range(3, 30)], total=80) == (0.14, 10), "and not for ever"


def test_a_card_without_room_is_vllms_to_refuse() -> None:
    assert share_of([0.1])[0] == 0.01


def test_the_model_has_the_same_name_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("r1", "r2", "r1"):
        (tmp_path / "releases" / name).mkdir(parents=True, exist_ok=True)
        link(tmp_path / "releases" / name, tmp_path / name)
        assert Path.cwd() == tmp_path / name
        assert Path("model").resolve() == tmp_path / "releases" / name
    assert list((tmp_path / "releases" / "r1").iterdir()) == []


def test_it_becomes_the_server_on_a_private_socket(tmp_path: Path) -> None:
    """A server that writes down what it is told takes vLLM's place."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(
        "import json, os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[sys.argv.index('--uds') + 1])\n"
        "print(json.dumps([os.getcwd(), sys.argv[1:]]))\n"
    )
    path, folder = tmp_path / "e.sock", tmp_path / "r1"
    path.write_text("what a dead process left")
    asked = [str(part) for part in (tmp_path, folder, path, "0.3", "--dtype", "a")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", vllm_start.__name__, *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    where, told = json.loads(done.stdout)
    assert where == str(folder)
    given = dict(zip(told[::2], told[1::2], strict=True))
    assert given == {"--model": "model", "--uds": str(path), "--gpu-memory-utilization": "0.3", "--dtype": "a"}
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_vllm_finds_what_it_has_compiled_again_for_every_release(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("vllm")
    made = "EngineArgs('model').create_model_config()"
    command = [sys.executable, "-c", f"from vllm.engine.arg_utils import EngineArgs; print({made}.compute_hash())"]
    hashes = set()
    for name in ("r1", "r2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(tiny)
        done = subprocess.run(command, cwd=tmp_path / name, capture_output=True, text=True, check=True)
        hashes.add(done.stdout.strip().splitlines()[-1])
    assert len(hashes) == 1
