"""The worker as bench/gpu.sh runs it: python gpu_worker.py RUN STAGE [--padded] [--memory GIB] [--streamed].

It differs in what is asked for, and where PyTorch is older than the pinned one. In the end it leaves what torch has
reserved of the GPU in reserved.json of the run's directory.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from appliance import worker


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--padded", action="store_true", help="pad where rows could be packed")
    parser.add_argument("--memory", type=float, help="GiB that the worker may have of the GPU")
    parser.add_argument("--streamed", action="store_true", help="score models of which half of the layers stream")
    given = parser.parse_args()
    # Before the libraries are imported: they read it then.
    os.environ.update({**worker.PATIENT, **os.environ, **worker.QUIET})
    import torch

    use_older_attention()
    if given.padded:
        sft: Any = import_module("appliance.train.sft")
        sft.can_pack = lambda *_: False
    if given.memory:
        limit_memory(given.memory)
    if given.streamed:
        stream_half()
    try:
        sys.exit(worker.main(given.run.absolute(), given.stage))
    finally:
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        (given.run / "reserved.json").write_text(json.dumps(reserved))


def use_older_attention() -> None:
    """Have packed rows call the attention of an older PyTorch as it was then: it shares heads without being asked."""
    packing: Any = import_module("appliance.train.packing")
    kernel = packing.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return

    @wraps(kernel)
    def attention(*arguments: Any, enable_gqa: bool = False, **named: Any) -> Any:
        return kernel(*arguments, **named)

    packing.varlen_attn = attention


def stream_half() -> None:
    """Have models verified as on a GPU that can hold half of their layers."""
    import torch

    streaming: Any = import_module("appliance.release.streaming")
    verify: Any = import_module("appliance.release.verify")

    def load(folder: Path) -> Any:
        model = streaming.load_model(folder, mapped=True)
        sizes = [streaming._bytes_of(layer) for layer in streaming._layers(model)]
        room = streaming._bytes_of(model) - sum(sizes) // 2
        return streaming.stream(model, room, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    verify.load_to_score = load


def limit_memory(gib: float) -> None:
    """Have the memory run out: of the GPU above so many GiB, without one in a pass of several rows."""
    import torch

    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole)
        return
    trainers: Any = import_module("appliance.train.trainer")
    divide = trainers.MicroBatchTrainer.micro_batches

    def parts(trainer: Any, inputs: Any) -> Any:
        found = divide(trainer, inputs)
        if max(len(part["input_ids"]) for part, _ in found) > 1:
            raise torch.OutOfMemoryError("out of memory, as asked for")
        return found

    trainers.MicroBatchTrainer.micro_batches = parts


if __name__ == "__main__":
    main()
