"""Merging a LoRA adapter into a Llama of 1.5B random weights, against PEFT and against `cp` of the same files.

    python bench/merge.py [--rounds N] [--shape SHAPE] [--scratch DIRECTORY] [--tokenizer BASE]

PEFT's way is merge_and_unload and save_pretrained. Each merge runs in a process of its own, alternating. Seconds are
those of the work without imports, on files in the page cache, without fsync for all three; memory is the process's
highest resident set, imports included. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGETS = {"peft_time": 2.0, "peft_memory": 4.0, "cp_time": 0.5}
"""How many times faster than PEFT, how many times less memory, and what share of cp's speed."""
RANK = 16


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--shape", default="1.5b")
    arguments.add_argument("--scratch", type=Path)
    arguments.add_argument("--tokenizer", type=Path, default=Path(".cache/home/models/smollm2-135m"))
    arguments.add_argument("--child", nargs=4)
    given = arguments.parse_args()
    if given.child:
        way, *paths = given.child
        {"ours": _ours, "peft": _peft}[way](*map(Path, paths))
        return
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="bench-merge-") as folder:
        record = measure(Path(folder), given.shape, given.tokenizer, given.rounds)
    print(json.dumps(record))


def measure(folder: Path, shape: str, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """The bench's record, all its files under `folder`."""
    from random_llama import write_model

    base, adapter = folder / "base", folder / "adapter"
    parameters = write_model(base, shape, tokenizer)
    write_adapter(base, adapter)
    taken: dict[str, list[tuple[float, int]]] = {"ours": [], "peft": [], "cp": []}
    for turn in range(rounds + 1):
        for way, runs in taken.items():
            out = folder / "out"
            out.mkdir()
            runs.append(_copy(base, out) if way == "cp" else _child(way, base, adapter, out))
            shutil.rmtree(out)
            os.sync()
            note = " (not counted)" if turn == 0 else ""
            print(f"{way:5}{runs[-1][0]:8.2f} s{runs[-1][1] / 2**20:8.0f} MiB{note}", file=sys.stderr, flush=True)
    seconds = {way: statistics.median(run[0] for run in runs[1:]) for way, runs in taken.items()}
    memory = {way: max(run[1] for run in runs[1:]) for way, runs in taken.items()}
    ratios = {
        "peft_time": round(seconds["peft"] / seconds["ours"], 2),
        "peft_memory": round(memory["peft"] / memory["ours"], 2),
        "cp_time": round(seconds["cp"] / seconds["ours"], 2),
    }
    return {
        "bench": "merge",
        "ratios": ratios,
        "targets": TARGETS,
        "met": all(ratios[name] >= target for name, target in TARGETS.items()),
        "parameters": parameters,
        "rounds": rounds,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "peft", "safetensors")},
        },
    }


def write_adapter(base: Path, adapter: Path) -> None:
    """A LoRA adapter in PEFT's format on every projection of a Llama, its values random."""
    import torch
    from safetensors.torch import save_file

    from appliance.release.weights import layout

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (_, shape, _) in layout(base).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
    targets = sorted({name.split(".")[-3] for name in tensors})
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))


def _child(way: str, base: Path, adapter: Path, out: Path) -> tuple[float, int]:
    """Seconds of the work, and the process's peak of resident bytes."""
    command = [sys.executable, __file__, "--child", way, str(base), str(adapter), str(out)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    seconds, peak = said.split()[-2:]
    return float(seconds), int(peak)


def _copy(base: Path, out: Path) -> tuple[float, int]:
    begun = time.perf_counter()
    subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(out)], check=True)
    return time.perf_counter() - begun, 0


def _ours(base: Path, adapter: Path, out: Path) -> None:
    from appliance.release.adapter import read_changes
    from appliance.release.weights import write_weights

    begun = time.perf_counter()
    write_weights(base, out, read_changes(adapter, base))
    print(time.perf_counter() - begun, _peak())


def _peft(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    print(time.perf_counter() - begun, _peak())


def _peak() -> int:
    """This process's highest resident set in bytes; unlike ru_maxrss, without what its parent had at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
