"""What the fake daemon has: recipes, datasets, gates."""

from __future__ import annotations

from typing import Any

STAGES = ["sft", "dpo", "merge", "verify", "probe"]
GIB = 1 << 30

RECIPE = """\
# Teaches the invented facts of the sample files, then prefers the terse answer.
name = "facts"
base = "smollm2-135m"
promote = true

[adapter]
kind = "qlora"
rank = 16
alpha = 32

[[stages]]
method = "sft"
dataset = "facts"
epochs = 8
learning_rate = 1e-3

[[stages]]
method = "dpo"
dataset = "preferences"
epochs = 2
learning_rate = 5e-5
beta = 0.1
"""

BASE_RECIPE = """\
# Releases the base model as it is, to compare with.
name = "base"
base = "smollm2-135m"
"""

DATASETS = (
    ("3f9ac41b77d0e652", "facts", "messages", 1200),
    ("a01b5c7711e0ffee", "preferences", "preference", 320),
)
GATES: dict[str, dict[str, Any]] = {
    "structure": {"tensors": 272, "changed": 210},
    "fidelity": {"adapter_loss": 0.4712, "merged_loss": 0.4719, "base": "de-quantised"},
    "parity": {"prompts": 8, "equal": 8},
    "stopping": {"probes": 8, "stopped": 8},
    "quality": {"loss": 0.4719, "live_loss": 1.9034},
}


def row(index: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Question {index} [/foo] \x1b[31mred"},
            {"role": "assistant", "content": f"Answer {index}"},
        ],
        "line": index + 1,
    }
