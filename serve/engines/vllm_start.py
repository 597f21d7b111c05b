"""Becomes vLLM's API server: `python -m serve.engines.vllm_start MODEL FOLDER SOCKET SHARE [OPTION ...]`.

The options are the server's own. What can only be known or done as it starts is done here.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from appliance import hardware

_MODEL = "model"
_SPARED = 1 << 29
"""Bytes of free memory that are left to whatever else the GPU draws."""
_SETTLED = 64 << 20
"""Bytes by which free memory may differ between some looks once it is what it will be."""
_ALIKE = 4
"""Those looks."""
_PATIENCE = 10
"""Looks at free memory, a second apart: what the driver takes back of a process that has ended comes within these."""


def link(model: Path, folder: Path) -> None:
    """Go to `folder`, where from now on `model` is the model's directory.

    vLLM's compiled code is found again under the name of the model, which for all releases is this one.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chdir(folder)
    Path(_MODEL).unlink(missing_ok=True)
    Path(_MODEL).symlink_to(model.absolute())


def memory_share(most: float, total: int, free: Callable[[], int], wait: Callable[[float], None] = time.sleep) -> float:
    """The share of the GPU's `total` bytes to take: at most `most`, and no more than is `free` once it has settled."""
    looks = [free()]
    while looks[-1] - _SPARED < most * total and len(looks) <= _PATIENCE:
        if len(looks) >= _ALIKE and max(looks[-_ALIKE:]) - min(looks[-_ALIKE:]) <= _SETTLED:
            break
        wait(1)
        looks.append(free())
    now = looks[-1]
    return min(most, max(math.floor(100 * (now - _SPARED) / total), 1) / 100)


def main() -> None:
    """Take the socket's place, settle the memory's share, and run the server in this process."""
    model, folder, socket, share, *options = sys.argv[1:]
    # Binding is all that vLLM does for its socket: what a dead process left goes first, and only this user may connect.
    os.umask(0o077)
    if path := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    Path(socket).unlink(missing_ok=True)
    if hardware.has_gpu():
        total, free = hardware.total_memory(), hardware.free_memory()
        if total is not None and free is not None:
            share = str(memory_share(float(share), total, lambda: hardware.free_memory() or 0))
            print(f"vLLM may take {share} of the GPU's memory", flush=True)
    link(Path(model), Path(folder))
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    os.execv(sys.executable, [*server, "--model", _MODEL, "--uds", socket, "--gpu-memory-utilization", share, *options])


if __name__ == "__main__":
    main()
