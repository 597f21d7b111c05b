"""An adapter for weights that another adapter of the same base is merged into already. No torch here.

The live release serves W + s1 B1 A1, and s2 B2 A2 was trained on W. What leads from the one to the other is low-rank
again: s2 B2 A2 - s1 B1 A1 = [s2 B2, -s1 B1] [A2; A1], of both ranks together. So an engine that serves the live release
can serve the newly trained adapter beside it, before anything is merged.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from appliance.adapters import CONFIG, WEIGHTS
from appliance.errors import Conflict
from appliance.home import building, write_json
from appliance.release.peft_format import PREFIX, lora_scale, read_config, unusable

Array = np.ndarray[Any, np.dtype[np.float32]]
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Factors:
    """`left` @ `right` is added to a weight: (outputs, rank) and (rank, inputs), the scale in `left`."""

    left: Array
    right: Array

    @property
    def rank(self) -> int:
        return len(self.right)


def write_difference(trained: Path, merged: Path | None, target: Path, largest_rank: int) -> None:
    """Write to directory `target`, in PEFT's format, what leads from the weights with `merged` in them to `trained`.

    `merged` is None where the weights are the base's own. Raises Conflict where one of the adapters is not plain LoRA
    on linear layers, or the ranks together are above `largest_rank`; InvalidInput for files that cannot be read.
    """
    parts = [read_factors(trained)]
    if merged is not None:
        parts.append({module: Factors(-one.left, one.right) for module, one in read_factors(merged).items()})
    by_module: defaultdict[str, list[Factors]] = defaultdict(list)
    for part in parts:
        for module, factors in part.items():
            by_module[module].append(factors)
    rank = max(sum(factors.rank for factors in found) for found in by_module.values())
    if rank > largest_rank:
        raise Conflict(
            "rank_too_large",
            f"the adapter and the live release's have rank {rank} together, and the engine takes {largest_rank}",
            f"set APPLIANCE_ADAPTER_RANK={rank} and start again, or wait for the merged release",
        )
    tensors: dict[str, Array] = {}
    for module, found in by_module.items():
        # One rank for all, as an adapter's settings have it.
        missing = rank - sum(factors.rank for factors in found)
        left, right = np.hstack([one.left for one in found]), np.vstack([one.right for one in found])
        tensors[f"{PREFIX}{module}{_A}"] = np.ascontiguousarray(np.pad(right, ((0, missing), (0, 0))))
        tensors[f"{PREFIX}{module}{_B}"] = np.ascontiguousarray(np.pad(left, ((0, 0), (0, missing))))
    names = sorted({module.rpartition(".")[2] for module in by_module})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": names}
    shutil.rmtree(target, ignore_errors=True)
    with building(target) as folder:
        save_file(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, config | {"bias": "none", "base_model_name_or_path": None})


def read_factors(adapter: Path) -> dict[str, Factors]:
    """The factors of a plain LoRA adapter by the base's modules. Raises Conflict for another, InvalidInput for none."""
    config = read_config(adapter)
    try:
        tensors = dict(deserialize((adapter / WEIGHTS).read_bytes()))  # type: ignore[no-untyped-call]  # it has no types
        shaped = {name: _array(tensor) for name, tensor in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise unusable(error) from None
    odd = [name for name in shaped if not name.endswith((_A, _B)) or not name.startswith(PREFIX)]
    if odd or config.get("use_dora") or config.get("target_parameters"):
        what = "DoRA" if config.get("use_dora") else f"{odd[0]} of its own" if odd else "experts' parameters"
        raise Conflict(
            "not_plain_lora",
            f"only plain LoRA on linear layers is served unmerged, and this or the live release's adapter has {what}",
            "wait for the merged release",
        )
    found = {}
    for module in {name.removesuffix(_A).removesuffix(_B) for name in shaped}:
        right, left = shaped.get(module + _A), shaped.get(module + _B)
        if right is None or left is None or left.shape[1] != len(right):
            raise unusable(ValueError(f"the factors of {module} do not fit each other"))
        name = module.removeprefix(PREFIX)
        found[name] = Factors(left * np.float32(lora_scale(config, name, len(right))), right)
    return found


def _array(tensor: dict[str, Any]) -> Array:
    """A tensor of a safetensors file in fp32."""
    raw, kind = bytes(tensor["data"]), tensor["dtype"]
    if kind == "BF16":
        # The upper half of an fp32.
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        types = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
        if kind not in types:
            raise unusable(ValueError(f"it has numbers of type {kind}"))
        values = np.frombuffer(raw, types[kind]).astype(np.float32)
    return values.reshape(tensor["shape"])
